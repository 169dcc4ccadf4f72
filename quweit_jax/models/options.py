"""Options that several models share, as frozen dataclasses built from plain mappings with named
errors.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

from quweit_jax.errors import InputError, check_above_zero, check_choice
from quweit_jax.layers import mlp
from quweit_jax.layers.lookup_glu import LookupGLU, check_glu
from quweit_jax.layers.norms import Initializer, normal
from quweit_jax.layers.weightless import WeightlessBlock, check_options

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


MOST_BLOCKS = 1000


def check_positive(config: object, *names: str, zero: str = "") -> None:
    """Raises InputError unless these fields are at least 1, or 0 if that means something."""
    for name in names:
        if getattr(config, name) < (0 if zero else 1):
            expected = f"a positive number, or 0 for {zero}" if zero else "at least 1"
            raise InputError(f"model.{name}: expected {expected}, found {getattr(config, name)}.")
        if name in ("layers", "depth") and getattr(config, name) > MOST_BLOCKS:
            raise InputError(
                f"model.{name}: expected at most {MOST_BLOCKS:,} blocks, each of which is traced, "
                f"found {getattr(config, name):,}."
            )


def check_init(config: Any) -> None:
    """Raises InputError for an `mlp_init` that no kernel can be drawn with."""
    check_above_zero("model.mlp_init", config.mlp_init, "1 / sqrt(width)")


def first_init(config: Any, width: int) -> Initializer:
    """Of the first kernel of an MLP or gated unit, by the config's `mlp_init`."""
    return normal(config.mlp_init or width**-0.5)


def kinds_of_mlp(kinds: str | Sequence[str], blocks: int, integer: bool = False) -> tuple[str, ...]:
    """The kind of each block's MLP, from one kind for all or one for each, joined by '+'
    ('dense+weightless').

    Raises:
      InputError: an unknown kind, or another number of them.
    """
    found = tuple(kinds.split("+") if isinstance(kinds, str) else kinds)
    found = found * blocks if len(found) == 1 else found
    if len(found) != blocks:
        raise InputError(
            f"model.mlp: expected 1 kind or {blocks} (one a block), found {len(found)}: {kinds!r}."
        )
    for kind in found:
        check_choice("model.mlp", kind, mlp.kinds(integer))
    return found


def repeated(key: str, kinds: str, choices: Sequence[str], blocks: int) -> tuple[str, ...]:
    """The kind of each block's layer, from a pattern that is repeated: 'a+a+b' for a, a, b, a, ...

    Raises:
      InputError: an unknown kind, or a pattern that does not fill the blocks; names `key`.
    """
    pattern = tuple(kinds.split("+"))
    for kind in pattern:
        check_choice(key, kind, choices)
    if blocks % len(pattern):
        raise InputError(
            f"{key}: expected kinds whose number divides the {blocks} blocks, found "
            f"{len(pattern)}: '{kinds}'."
        )
    return pattern * (blocks // len(pattern))


def _options_of(block: type, *left_out: str) -> type:
    """A dataclass with the fields of a block's that an experiment may set, and their defaults."""
    space = vars(sys.modules[block.__module__])
    fields = [
        (f.name, eval(f.type, space) if isinstance(f.type, str) else f.type, f.default)
        for f in dataclasses.fields(block)
        if f.name not in ("parent", "name", "features", "dtype", *left_out)
    ]
    return dataclasses.make_dataclass(f"{block.__name__}Fields", fields, frozen=True)


@dataclasses.dataclass(frozen=True)
class WeightlessOptions(_options_of(WeightlessBlock, "use_norm", "norm_bias")):
    """The fields of `layers.weightless.WeightlessBlock`, where each is described."""

    def __post_init__(self):
        check_options(self, "model.weightless.")


@dataclasses.dataclass(frozen=True)
class LookupGLUOptions(_options_of(LookupGLU, "use_norm", "norm_bias")):
    """The fields of `layers.lookup_glu.LookupGLU`, where each is described."""

    def __post_init__(self):
        check_glu(self, "model.lookup_glu.")


@dataclasses.dataclass(frozen=True)
class GatedOptions:
    """Of gated linear units. hidden: units; 0 for 8 d / 3, in multiples of 8."""

    hidden: int = 0

    def __post_init__(self):
        check_positive(self, "hidden", zero="8 d / 3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelMixers:
    """What the configs of all models say of channel mixers.

    mlp: the kind for every block, or one for each block joined by '+', see `layers.mlp.kinds`.
    weightless, lookup_glu, swiglu, bitglu: options of the blocks of that kind.
    """

    mlp: str = "dense"
    weightless: WeightlessOptions = dataclasses.field(default_factory=WeightlessOptions)
    lookup_glu: LookupGLUOptions = dataclasses.field(default_factory=LookupGLUOptions)
    swiglu: GatedOptions = dataclasses.field(default_factory=GatedOptions)
    bitglu: GatedOptions = dataclasses.field(default_factory=GatedOptions)
