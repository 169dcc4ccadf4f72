"""Whole networks; `build` picks one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from quweit_jax.errors import check_choice
from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.models.matmulfree import MatMulFree, MatMulFreeConfig
from quweit_jax.models.options import from_mapping
from quweit_jax.models.transformer_pp import TransformerPP, TransformerPPConfig
from quweit_jax.models.vit import ViT, ViTConfig

# name -> (module, config, the config's field for the number of outputs)
MODELS: dict[str, tuple[Any, Any, str]] = {
    "gpt": (GPT, GPTConfig, "vocab_size"),
    "dwn": (DWN, DWNConfig, "num_classes"),
    "matmulfree": (MatMulFree, MatMulFreeConfig, "vocab_size"),
    "transformer_pp": (TransformerPP, TransformerPPConfig, "vocab_size"),
    "vit": (ViT, ViTConfig, "num_classes"),
}


def build(config: Mapping[str, Any], outputs: int | None = None) -> nn.Module:
    """The model `config['name']` with the other keys as its configuration.

    outputs: the vocabulary size or number of classes, when the data decides it.

    Raises:
      InputError: an unknown model, key or value.
    """
    values = dict(config)
    name = values.pop("name", None)
    check_choice("model.name", name, MODELS)
    module, config_class, outputs_field = MODELS[name]
    if outputs is not None:
        values[outputs_field] = outputs
    return module(from_mapping(config_class, values))
