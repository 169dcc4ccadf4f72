"""Whatever a person calls a model: a folder that `pack` wrote, a published checkpoint in Hugging
Face's layout, the name of a model that comes with the package, or one on a hub.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import PyTree

from quweit_jax.data.prompting import Prompting
from quweit_jax.data.tokenizers import FileTokenizer, Tokenizer
from quweit_jax.errors import InputError
from quweit_jax.pretrained import saved
from quweit_jax.pretrained.kinds import KINDS, kind_of
from quweit_jax.pretrained.layout import Opened
from quweit_jax.reading import read_json, shown

_TOKENS = 8  # any number: of tokens that a model is packed with
_PREPROCESSOR = "preprocessor_config.json"
# Means and deviations where a folder tells none: those of DeiT, and of transformers' ViT.
_USUAL = {"vit": ((0.5,), (0.5,))}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Found:
    """A model that was found, its arrays not read yet.

    place: where. read: reads the variables. tokenizer, prompting: of a language model. about: what
    is known of it: 'kind' (of a published one), 'form', 'input_shape', 'pixels', 'labels', 'data',
    'data_config', 'validation', 'training_step', as `pack` writes them.
    """

    place: Path
    model: nn.Module
    read: Callable[[], dict[str, PyTree]]
    tokenizer: Tokenizer | None
    prompting: Prompting
    about: dict[str, Any]

    @property
    def published(self) -> bool:
        """Whether it is in a public layout."""
        return "kind" in self.about

    def init_inputs(self) -> np.ndarray:
        """Zeros of the shape and type of the model's inputs, a batch of one."""
        shape = self.about.get("input_shape") or [1, _TOKENS]
        return np.zeros(shape, np.int32 if self.tokenizer is not None else np.float32)


def find(given: str, *, speaks: bool = True) -> Found:
    """Opens what a person has named, without reading its arrays.

    Args:
      given: a folder or a file of weights, the name of a model that comes with the package
        (`saved.boxed()`), or one on a hub, see `hub.fetch`.
      speaks: whether a published language model's tokenizer is needed; False leaves it unread.

    Raises:
      InputError: there is none, or it is damaged or of no kind known here; of a published language
        model that is to speak, it has no tokenizer.json.
    """
    place = saved.find_model(given)
    if saved.is_saved(place):
        model, tokenizer, about, read = saved.open_model(place)
        prompting = Prompting.from_json(about.pop("prompting", {}))
        return Found(place, model, read, tokenizer, prompting, about)
    kind = kind_of(place)
    opened = KINDS[kind](place)
    about: dict[str, Any] = {"kind": kind, "form": "trained"}
    if opened.image_shape is not None:
        about |= _about_images(place, opened, *_USUAL.get(kind, _IMAGENET))
        return Found(place, opened.model, opened.read, None, Prompting(), about)
    if not speaks:
        return Found(place, opened.model, opened.read, None, Prompting(), about)
    tokenizer = _tokenizer(place)
    prompting = Prompting.read(_folder(place), tokenizer)
    return Found(place, opened.model, opened.read, tokenizer, prompting, about)


def _folder(place: Path) -> Path:
    return place if os.path.isdir(place) else place.parent


def _tokenizer(place: Path) -> FileTokenizer:
    folder = _folder(place)
    if not os.path.isfile(folder / "tokenizer.json"):
        raise InputError(
            f"--model: {shown(folder)} has no tokenizer.json, the file of Hugging Face's "
            "tokenizers; fetch it too, or write it with transformers: AutoTokenizer."
            "from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    return FileTokenizer.read(str(folder))


def _about_images(
    place: Path, opened: Opened, mean: Sequence[float], deviation: Sequence[float]
) -> dict[str, Any]:
    """What a vision model's inputs are, and its classes: as timm's config.json or Hugging Face's
    preprocessor_config.json say, by this mean and deviation where none does.
    """
    folder = _folder(place)
    config, processor = (
        read_json(folder / name, "--model") if os.path.isfile(folder / name) else {}
        for name in ("config.json", _PREPROCESSOR)
    )
    timm = config.get("pretrained_cfg")
    timm = timm if isinstance(timm, dict) else config
    mean = processor.get("image_mean") or timm.get("mean") or mean
    deviation = processor.get("image_std") or timm.get("std") or deviation
    if processor.get("do_normalize") is False:
        mean, deviation = [0.0], [1.0]
    about: dict[str, Any] = {
        "input_shape": [1, *(opened.image_shape or ())],
        "pixels": {
            "formula": "(pixel / 255 - mean) / deviation",
            "mean": list(mean),
            "deviation": list(deviation),
        },
    }
    crop = timm.get("crop_pct")
    if isinstance(crop, int | float) and 0 < crop <= 1:
        about["crop_fraction"] = float(crop)
    labels = _labels(config)
    return about | ({"labels": labels} if labels else {})


def _labels(config: Mapping[str, Any]) -> list[str]:
    """The classes' names, [] where they are not told."""
    names = config.get("label_names")
    if isinstance(names, list):
        return [str(name) for name in names]
    by_id = config.get("id2label")
    if not isinstance(by_id, dict) or not all(str(key).isdecimal() for key in by_id):
        return []
    return [str(name) for _, name in sorted(by_id.items(), key=lambda item: int(item[0]))]
