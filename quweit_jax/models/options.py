"""Options that several models share, as frozen dataclasses built from plain mappings with named
errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from quweit_jax.errors import InputError, check_choice, nearest
from quweit_jax.layers.lookup import MAPPINGS, TABLE_INITS
from quweit_jax.layers.weightless import SUMS, WeightlessBlock
from quweit_jax.ops.lut import DECAYS, MAX_LUT_INPUTS
from quweit_jax.ops.thermometer import WINDOWS

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "model") -> T:
    """Builds a (frozen) dataclass from a mapping; nested dataclasses from nested mappings.

    Raises:
      InputError: an unknown key (names the nearest) or a missing one.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{where}: unknown key '{key}'.{nearest(key, fields)}")
        factory = fields[key].default_factory
        if isinstance(value, Mapping) and factory is not dataclasses.MISSING:
            value = from_mapping(factory, value, f"{where}.{key}")  # type: ignore[arg-type]
        arguments[key] = tuple(value) if isinstance(value, list) else value
    missing = [
        n
        for n, f in fields.items()
        if n not in arguments
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}.")
    return cls(**arguments)


MLPS = ("dense", "weightless", "none")
DTYPES = ("float32", "bfloat16", "float16")


# Width, layers and heads of language models, as MatMul-free LM names and sizes them ('tiny' is for
# tests and for two cores).
LM_SIZES = {
    "tiny": (128, 4, 4),
    "370m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "13b": (5120, 40, 40),
}


def size_of(size: str) -> tuple[int, int, int]:
    """Width, layers and heads of a language model of a named size."""
    check_choice("model.size", size, LM_SIZES)
    return LM_SIZES[size]


def glu_width(width: int) -> int:
    """The hidden width of a gated linear unit with about the parameters of an MLP four times as
    wide: 8 d / 3, in multiples of 256.
    """
    return 256 * math.ceil(int(8 * width / 3) / 256)


def check_positive(config: Any, *names: str, zero: str = "") -> None:
    """Raises InputError unless these fields are at least 1, or 0 if that means something."""
    for name in names:
        if getattr(config, name) < (0 if zero else 1):
            expected = f"a positive number, or 0 for {zero}" if zero else "at least 1"
            raise InputError(f"model.{name}: expected {expected}, found {getattr(config, name)}.")


def kinds_of_mlp(mlp: str | Sequence[str], blocks: int) -> tuple[str, ...]:
    """The kind of each block's MLP, from one kind for all or one for each, joined by '+'
    ('dense+weightless').

    Raises:
      InputError: an unknown kind, or another number of them.
    """
    kinds = tuple(mlp.split("+")) if isinstance(mlp, str) else tuple(mlp)
    kinds = kinds * blocks if len(kinds) == 1 else kinds
    if len(kinds) != blocks:
        raise InputError(
            f"model.mlp: expected 1 kind or {blocks} (one a block), found {len(kinds)}: {mlp!r}."
        )
    for kind in kinds:
        check_choice("model.mlp", kind, MLPS)
    return kinds


@dataclasses.dataclass(frozen=True)
class WeightlessOptions:
    """The fields of `layers.weightless.WeightlessBlock` that an experiment may set; see there for
    each, and for the defaults.
    """

    num_luts: int | Sequence[int] = WeightlessBlock.num_luts
    lut_inputs: int = WeightlessBlock.lut_inputs
    thermometer_bits: int = WeightlessBlock.thermometer_bits
    learn_thresholds: bool = WeightlessBlock.learn_thresholds
    window: float = WeightlessBlock.window
    window_shape: str = WeightlessBlock.window_shape
    sum: str = WeightlessBlock.sum
    signed: bool = WeightlessBlock.signed
    int8_sums: bool = WeightlessBlock.int8_sums
    vector_init: float = WeightlessBlock.vector_init
    mapping: str = WeightlessBlock.mapping
    candidates: int = WeightlessBlock.candidates
    tau: float = WeightlessBlock.tau
    decay: str = WeightlessBlock.decay
    alpha: float | None = WeightlessBlock.alpha
    beta: float | None = WeightlessBlock.beta
    table_init: str = WeightlessBlock.table_init
    table_scale: float = WeightlessBlock.table_scale

    def __post_init__(self):
        check_choice("model.weightless.window_shape", self.window_shape, WINDOWS)
        check_choice("model.weightless.sum", self.sum, SUMS)
        check_choice("model.weightless.mapping", self.mapping, MAPPINGS)
        check_choice("model.weightless.decay", self.decay, DECAYS)
        check_choice("model.weightless.table_init", self.table_init, TABLE_INITS)
        if not 1 <= self.lut_inputs <= MAX_LUT_INPUTS:
            raise InputError(
                f"model.weightless.lut_inputs: a table can have 1 to {MAX_LUT_INPUTS} inputs, "
                f"found {self.lut_inputs}; use more, smaller tables."
            )
        if self.thermometer_bits < 1:
            raise InputError(
                "model.weightless.thermometer_bits: expected at least 1, found "
                f"{self.thermometer_bits}."
            )
