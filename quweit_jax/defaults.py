"""Complete default configs, made from the rooms' own dataclasses; experiments start from these."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from quweit_jax.config import Config
from quweit_jax.data.sources import DataConfig
from quweit_jax.models.dwn import DWNConfig
from quweit_jax.models.gpt import GPTConfig
from quweit_jax.models.matmulfree import MatMulFreeConfig
from quweit_jax.models.transformer_pp import TransformerPPConfig
from quweit_jax.models.vit import ViTConfig
from quweit_jax.training.optimizers import OptimizerConfig
from quweit_jax.training.sharding import MeshConfig


def base_config() -> Config:
    """The keys every experiment has; `model` is added by the experiment."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "steps": 2000,
            "batch_size": 12,
            "grad_accum": 1,
            "log_every": 10,
            "eval_every": 250,
            "eval_batches": 0,  # 0: the whole validation split
            "eval_batch_size": 64,
            "checkpoint_every": 250,
            "keep": 2,
            "prefetch": 4,
            "sample_tokens": 200,
            "init_from": "",  # a run directory or a published checkpoint to begin from
            "data": dataclasses.asdict(DataConfig()),
            "optimizer": dataclasses.asdict(OptimizerConfig()),
            "mesh": dataclasses.asdict(MeshConfig()),
            "model": {},
        },
        convert_dict=True,
        type_safe=False,
    )


def gpt_defaults() -> Config:
    """`config.model` of a GPT, complete but for the vocabulary, which the data decides."""
    return _model_defaults("gpt", GPTConfig(vocab_size=1), "vocab_size")


def matmulfree_defaults() -> Config:
    """`config.model` of a MatMul-free language model, complete but for the vocabulary, which the
    data decides.
    """
    return _model_defaults("matmulfree", MatMulFreeConfig(vocab_size=1), "vocab_size")


def transformer_pp_defaults() -> Config:
    """`config.model` of a Transformer++, complete but for the vocabulary, which the data decides."""
    return _model_defaults("transformer_pp", TransformerPPConfig(vocab_size=1), "vocab_size")


def dwn_defaults() -> Config:
    """`config.model` of a DWN classifier, complete but for the classes, which the data decides."""
    return _model_defaults("dwn", DWNConfig(num_classes=1), "num_classes")


def vit_defaults() -> Config:
    """`config.model` of a ViT, complete but for the classes, which the data decides."""
    return _model_defaults("vit", ViTConfig(num_classes=1), "num_classes")


def _model_defaults(name: str, defaults: Any, decided_by_data: str) -> Config:
    values = dataclasses.asdict(defaults)
    del values[decided_by_data]
    return ml_collections.ConfigDict({"name": name, **values}, type_safe=False)
