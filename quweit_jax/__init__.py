"""Transformers without matrix multiplications, trained, compared and deployed in JAX.

`import quweit_jax as qj` is all a notebook needs: what is listed here is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for editors and type checkers
    from quweit_jax import costs, data, deploy, layers, models, ops, pretrained, report, training
    from quweit_jax.costs.count import count
    from quweit_jax.deploy.pack import pack
    from quweit_jax.errors import InputError, RunError
    from quweit_jax.layers.lookup import GroupSum, LearnableReduction, LUTLayer, VectorLUTLayer
    from quweit_jax.layers.lookup_glu import LookupGLU
    from quweit_jax.layers.mlp import MLP, SwiGLU
    from quweit_jax.layers.ternary import MLGRU, BitGLU, BitLinear
    from quweit_jax.layers.weightless import WeightlessBlock
    from quweit_jax.models import build
    from quweit_jax.ops.lut import lut_lookup
    from quweit_jax.ops.pair_table import pair_lookup
    from quweit_jax.ops.recurrence import gated_recurrence
    from quweit_jax.ops.sums import conditional_sum, group_sum
    from quweit_jax.ops.ternary import bit_linear
    from quweit_jax.ops.thermometer import distributive_thresholds, encode, encode_ste
    from quweit_jax.ops.vector_lut import vector_lookup
    from quweit_jax.ops.wiring import learnable_wiring, random_wiring
    from quweit_jax.training.optimizers import keep_tables_in_range

__version__ = "0.1.0"

_NAMES = {  # module: what of it can be used as quweit_jax.NAME
    "errors": ("InputError", "RunError"),
    "layers.weightless": ("WeightlessBlock",),
    "layers.lookup": ("LUTLayer", "VectorLUTLayer", "GroupSum", "LearnableReduction"),
    "layers.lookup_glu": ("LookupGLU",),
    "layers.ternary": ("BitLinear", "BitGLU", "MLGRU"),
    "layers.mlp": ("MLP", "SwiGLU"),
    "ops.lut": ("lut_lookup",),
    "ops.pair_table": ("pair_lookup",),
    "ops.vector_lut": ("vector_lookup",),
    "ops.sums": ("conditional_sum", "group_sum"),
    "ops.thermometer": ("encode", "encode_ste", "distributive_thresholds"),
    "ops.wiring": ("random_wiring", "learnable_wiring"),
    "ops.ternary": ("bit_linear",),
    "ops.recurrence": ("gated_recurrence",),
    "models": ("build",),
    "deploy.pack": ("pack",),
    "costs.count": ("count",),
    "training.optimizers": ("keep_tables_in_range",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_ROOMS = ["costs", "data", "deploy", "layers", "models", "ops", "pretrained", "report", "training"]

__all__ = ["__version__", *_HOME, *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """Imports a name when it is first used."""
    if name in _ROOMS:
        return importlib.import_module(f"quweit_jax.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'quweit_jax' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"quweit_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
