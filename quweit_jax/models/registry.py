"""The models by name: adding one means its own file, a line in MODELS and an experiment file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import ml_collections

from quweit_jax.config import SECTIONS, Config, from_mapping
from quweit_jax.errors import InputError, check_choice
from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.models.matmulfree import MatMulFree, MatMulFreeConfig
from quweit_jax.models.transformer_pp import TransformerPP, TransformerPPConfig
from quweit_jax.models.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's Flax module, the dataclass of its options, and what it is for."""

    module: Callable[..., nn.Module]
    config: type
    task: Literal["language", "classify"]

    @property
    def outputs(self) -> str:
        """The field of the config that the data decides."""
        return "vocab_size" if self.task == "language" else "num_classes"


MODELS = {
    "gpt": Model(GPT, GPTConfig, "language"),
    "dwn": Model(DWN, DWNConfig, "classify"),
    "matmulfree": Model(MatMulFree, MatMulFreeConfig, "language"),
    "transformer_pp": Model(TransformerPP, TransformerPPConfig, "language"),
    "vit": Model(ViT, ViTConfig, "classify"),
}


def find(name: object) -> Model:
    """The model of this name; InputError names the nearest for an unknown one."""
    check_choice("model.name", name, MODELS)
    return MODELS[str(name)]


def config_of(values: Mapping[str, object], outputs: int | None = None) -> Any:
    """The frozen config of `values['name']`, made of the other keys; see `build`."""
    options = dict(values)
    model = find(options.pop("name", None))
    if outputs is not None:
        options[model.outputs] = outputs
    return from_mapping(model.config, options)


def build(config: Mapping[str, object], outputs: int | None = None) -> nn.Module:
    """The model `config['name']` with the other keys as its configuration.

    outputs: the vocabulary size or number of classes, when the data decides it.

    Raises:
      InputError: an unknown model, key or value.
    """
    return find(config.get("name")).module(config_of(config, outputs))


def defaults(name: str) -> Config:
    """`config.model` of a named model, complete but for what the data decides."""
    model = find(name)
    values = dataclasses.asdict(model.config(**{model.outputs: 1}))
    del values[model.outputs]
    return ml_collections.ConfigDict({"name": name, **values}, type_safe=False)


def described(model: nn.Module) -> tuple[dict[str, Any], int]:
    """The inverse of `build`: (config, outputs) of a model of MODELS.

    Raises:
      InputError: it is of another class.
    """
    names = [name for name, known in MODELS.items() if known.module is type(model)]
    if not names:
        raise InputError(
            f"models: expected one of {', '.join(MODELS)}, found a {type(model).__name__}."
        )
    values = dataclasses.asdict(getattr(model, "config"))  # noqa: B009 - of all of them
    outputs = values.pop(MODELS[names[0]].outputs)
    return {"name": names[0], **values}, outputs


SECTIONS["model"] = lambda values: find(values.get("name")).config
