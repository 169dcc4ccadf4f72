"""A model of our own in one folder, as trained or as deployed: model.json says what it is,
model.safetensors has its arrays, tokenizer.json a language model's tokenizer. And the few that come
with the package.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from quweit_jax import models
from quweit_jax.data import tokenizers
from quweit_jax.errors import InputError, closest, require
from quweit_jax.pretrained import hub, rounded
from quweit_jax.pretrained.tensors import write_arrays
from quweit_jax.reading import is_whole, read_json, shown, why

FORMAT = "quweit_jax model"
BOX = Path(__file__).parent / "box"
_DESCRIPTION, _WEIGHTS, _TOKENIZER = "model.json", "model.safetensors", "tokenizer.json"
_PUBLISHED = "config.json"  # what runs and published checkpoints have


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """model, variables: for `model.apply`. tokenizer: of a language model. about: the rest of
    model.json: where it comes from, what its inputs are.
    """

    model: nn.Module
    variables: dict[str, PyTree]
    tokenizer: tokenizers.Tokenizer | None
    about: dict[str, Any]


def save_model(
    folder: str | Path,
    config: Mapping[str, object],
    outputs: int,
    variables: Mapping[str, PyTree],
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    about: Mapping[str, object] | None = None,
    overwrite: bool = False,
    bits: int = 0,
) -> int:
    """Writes a model's folder, which `load_model` reads, and returns the bytes of its arrays.

    Args:
      config: `config.model` of a run, 'name' and the model's options. outputs: vocabulary or
        classes. variables: as trained, or packed.
      about: further entries of model.json. overwrite: whether a model that is there may be
        replaced. bits: of each weight of matrices that are not packed, see `rounded`; 0: as they
        are.

    Raises:
      InputError: see `check_target`; the folder cannot be written; bits not from 2 to 8.
    """
    folder = Path(folder).expanduser()
    check_target(folder, overwrite)
    models.build(config, outputs)  # refuses what could not be read again
    require("safetensors.numpy", "to write a model", "or safetensors alone")
    flat = flatten_dict(dict(variables), sep="/")
    arrays = {name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in flat.items()}
    said = {"format": FORMAT, "version": 1, "model": dict(config), "outputs": outputs}
    if bits:
        arrays, shapes = rounded.encode(arrays, bits)
        said |= {"version": 2, "weights": {"bits": bits, "shapes": shapes}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _DESCRIPTION).unlink(missing_ok=True)
        write_arrays(arrays, folder / _WEIGHTS)
        (folder / _TOKENIZER).unlink(missing_ok=True)  # of a model that was there
        if tokenizer is not None:
            tokenizers.save(tokenizer, folder / _TOKENIZER)
        # last: without it nobody takes what is there for a whole model
        text = json.dumps({**said, **(about or {})}, indent=1)
        (folder / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        # the library's files are for their owner alone
        (folder / _WEIGHTS).chmod((folder / _DESCRIPTION).stat().st_mode)
    except OSError as error:
        raise InputError(
            f"{shown(folder)} cannot be written ({why(error)}); give another folder."
        ) from None
    return sum(leaf.nbytes for leaf in arrays.values())


def check_target(folder: Path, overwrite: bool) -> None:
    """Raises InputError if a model's folder cannot be written there: it has one already, or files
    of these names that are something else's, such as a run's or a published checkpoint's.
    """
    there = [n for n in (_DESCRIPTION, _WEIGHTS, _TOKENIZER) if os.path.lexists(folder / n)]
    if _DESCRIPTION not in there and os.path.lexists(folder / _PUBLISHED):
        raise InputError(
            f"--out: {shown(folder)} holds a run or a published checkpoint ({_PUBLISHED}), parts "
            "of which would be replaced; give another folder."
        )
    if there and not overwrite:
        raise InputError(
            f"--out: {shown(folder)} holds {_a_model(there)}; give another folder, or --overwrite."
        )


def _a_model(there: Sequence[str]) -> str:
    return "a model already" if _DESCRIPTION in there else f"files already: {', '.join(there)}"


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a model that `save_model` wrote."""
    return os.path.isfile(folder / _DESCRIPTION) and os.path.isfile(folder / _WEIGHTS)


def load_model(folder: str | Path) -> SavedModel:
    """Reads what `save_model` wrote.

    Raises:
      InputError: no such model, or one that is damaged.
    """
    model, tokenizer, about, read = open_model(folder)
    return SavedModel(model, read(), tokenizer, about)


def open_model(
    folder: str | Path,
) -> tuple[nn.Module, tokenizers.Tokenizer | None, dict[str, Any], Callable[[], dict[str, PyTree]]]:
    """The same without its arrays, which the last of what it returns reads."""
    folder = Path(folder).expanduser()
    about = read_json(folder / _DESCRIPTION, "model")
    if about.get("format") != FORMAT or about.get("version") not in (1, 2):
        raise InputError(
            f"{shown(folder / _DESCRIPTION)}: expected format '{FORMAT}', version 1 or 2, found "
            f"{about.get('format')!r}, {about.get('version')!r}; was it written by `pack --out`?"
        )
    config, outputs = about.pop("model", None), about.pop("outputs", None)
    if not isinstance(config, dict) or not is_whole(outputs):
        raise InputError(
            f"{shown(folder / _DESCRIPTION)}: expected 'model' with its options and 'outputs', a "
            "number; write the folder again."
        )
    model = models.build(config, int(outputs))
    path = folder / _TOKENIZER
    tokenizer = tokenizers.load(path) if os.path.lexists(path) else None
    weights = about.pop("weights", None)
    told = None if weights is None else rounded.check(weights)
    if told is not None:
        about["weight_bits"] = told[0]
    return model, tokenizer, about, functools.partial(_read_arrays, folder / _WEIGHTS, told)


def _read_arrays(path: Path, told: tuple[int, dict[str, list[int]]] | None) -> dict[str, PyTree]:
    reader = require("safetensors", "to read a model", "or safetensors alone")
    try:
        with reader.safe_open(path, framework="numpy") as file:  # mapped, not read as a whole
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, reader.SafetensorError) as error:
        raise InputError(
            f"{shown(path)} cannot be read ({error}); write the folder again."
        ) from None
    return unflatten_dict(rounded.decode(flat, *told) if told else flat, sep="/")


def boxed() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in BOX.glob(f"*/{_DESCRIPTION}"))


def find_model(given: str) -> Path:
    """The folder of a model: the path itself where there is one, or of a name of the box, or of a
    hub, which is fetched (see `hub.fetch`).

    Raises:
      InputError: neither; names those in the box.
    """
    path = Path(given).expanduser()
    if os.path.lexists(path):
        return path
    names = boxed()
    if given in names:
        return BOX / given
    if hub.is_name(given):
        return hub.fetch(given)
    raise InputError(
        f"--model: no folder {shown(path)}, nor a model of that name.{closest(given, names)} Here "
        f"are {', '.join(names) or 'none'}. One of a hub is named ORGANIZATION/NAME."
    )
