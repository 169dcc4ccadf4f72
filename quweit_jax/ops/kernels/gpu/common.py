"""What the kernels for GPUs share: their calls, loads and stores, and blocks.

A program is a block of threads; its arrays, whose sizes are powers of two, lie in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Bool, Int32, PyTree, Shaped

from quweit_jax.ops.kernels import choice, dividing

WARP = 32
# Programs that are enough to fill a GPU: a few for each of its some hundred multiprocessors.
PROGRAMS = 1024
_MOST_ELEMENTS = 2**31  # places are int32


def power_above(value: int) -> int:
    """The smallest power of two that is not less than a value."""
    return 1 << max(0, value - 1).bit_length()


def hindrance(sizes_known: bool, elements: int = 0) -> choice.Hindrance:
    """What hinders kernels for GPUs, on a platform, whose largest array has so many elements."""
    on = choice.not_exported(choice.kernels_for("gpu"))

    def hinders(at: str) -> str | None:
        if not sizes_known:
            return "needs sizes that are numbers"
        if elements >= _MOST_ELEMENTS:
            return f"cannot count the {elements:,} elements of an array"
        return on(at)

    return hinders


def call(
    kernel: Callable[..., None], *, grid: Sequence[int], out_shape: PyTree, warps: int
) -> Callable[..., Any]:
    """`pallas_call` for a GPU, of flat arrays, interpreted where kernels are.

    The kernel that is compiled has the function's name. grid: its first dimension is the one whose
    neighbors run at the same time. warps: of a program, 32 threads each.
    """

    def run(*operands: Shaped[Array, "..."]) -> Any:
        return pl.pallas_call(
            kernel,
            grid=tuple(grid),
            out_shape=dividing.like_operands(out_shape, operands),
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
            interpret=choice.is_interpreted(),
            name=kernel.__name__,
        )(*(x.reshape(-1) for x in operands))

    return run


def program(dimension: int) -> Int32[Array, ""]:
    """Which program of a dimension of the grid this is."""
    return pl.program_id(dimension)


def span(block: int | Int32[Array, ""], size: int) -> Int32[Array, " size"]:
    """The places of a block of so many."""
    return block * size + jax.lax.iota(jnp.int32, size)


def load(
    ref: Any,
    at: Int32[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
    other: float = 0,
) -> Shaped[Array, "*shape"]:
    """What of a flat array is at some places; `other` where the mask is false."""
    if mask is None:
        return plgpu.load(ref.at[at])
    return plgpu.load(ref.at[at], mask=mask, other=jnp.full(at.shape, other, ref.dtype))


def store(
    ref: Any,
    at: Int32[Array, "*shape"],
    values: Shaped[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
) -> None:
    """Writes to some places of a flat array."""
    plgpu.store(ref.at[at], values.astype(ref.dtype), mask=mask)
