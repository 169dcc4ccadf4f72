"""What the kernels for TPUs share: their calls and blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import PyTree, Shaped

from quweit_jax.ops.kernels import choice, dividing
from quweit_jax.ops.kernels.dividing import round_up

Semantics = Literal["parallel", "arbitrary"]
# A register holds 8 rows of 128 lanes.
ROWS, LANES = 8, 128
# Fast memory a kernel may fill; every chip since v4 has more.
FAST_MEMORY = 48 * 2**20


def even_block(length: int, most: int, multiple: int) -> int:
    """The length of equal blocks, multiples of `multiple` and at most `most`, that cover a length
    with the least waste.
    """
    count = -(-length // most)
    return round_up(-(-length // count), multiple)


def call(
    kernel: Callable[..., None],
    *,
    grid: Sequence[int],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: PyTree,
    semantics: Sequence[Semantics],
    name: str,
    scratch: Sequence[Any] = (),
) -> Callable[..., Any]:
    """`pallas_call` for a TPU, interpreted where kernels are (`choice.interpreted`).

    semantics: of the grid's dimensions, 'parallel' or 'arbitrary' (in order).
    """

    def run(*operands: Shaped[Array, "..."]) -> Any:
        return pl.pallas_call(
            kernel,
            grid=tuple(grid),
            in_specs=list(in_specs),
            out_specs=out_specs,
            out_shape=dividing.like_operands(out_shape, operands),
            scratch_shapes=list(scratch),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=tuple(semantics), vmem_limit_bytes=2 * FAST_MEMORY
            ),
            interpret=choice.is_interpreted(),
            name=name,
        )(*operands)

    return run


def each(count: int) -> Callable[[Callable[[Any], None]], None]:
    """A decorator that calls a function of 0, 1, ..., written out when it is compiled; a loop,
    quick to compile, when kernels are interpreted.
    """

    def run(body: Callable[[Any], None]) -> None:
        if choice.is_interpreted():
            pl.loop(0, count)(body)
        else:
            for i in range(count):
                body(i)

    return run


def added(count: int, term: Callable[[Any], Array]) -> Array:
    """term(0) + term(1) + ..., written out as `each` does."""
    if choice.is_interpreted():
        return jax.lax.fori_loop(1, count, lambda i, total: total + term(i), term(0))
    return functools.reduce(jnp.add, map(term, range(count)))
