"""What the kernels for TPUs share: their calls, blocks, and division over devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree, Shaped

from quweit_jax.ops.kernels import choice

Semantics = Literal["parallel", "arbitrary"]
# A register holds 8 rows of 128 lanes.
ROWS, LANES = 8, 128
# Fast memory a kernel may fill; every chip since v4 has more.
FAST_MEMORY = 48 * 2**20


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not less than a value."""
    return -(-value // multiple) * multiple


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
        kinds = [jax.typeof(x).manual_axis_type for x in operands]
        varying = ManualAxisType(varying=frozenset().union(*(kind.varying for kind in kinds)))
        shapes = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=varying), out_shape
        )
        return pl.pallas_call(
            kernel,
            grid=tuple(grid),
            in_specs=list(in_specs),
            out_specs=out_specs,
            out_shape=shapes,
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


def over_devices(
    function: Callable[..., Any],
    division: choice.Division | None,
    length: int,
    in_axes: Sequence[int | None],
    out_axes: PyTree,
) -> Callable[..., Any]:
    """The function of what each device of a mesh has, in `jax.shard_map`; itself without one.

    Args:
      division: the mesh and those of its axes that divide. length: of what is divided; if it cannot
        be, every device computes all. in_axes, out_axes: of each array, the dimension that is
        divided; None for what every device has whole.
    """
    if division is None:
        return function
    divides = _divides(division, length)

    def spec(axis: int | None) -> P:
        return P() if axis is None or not divides else P(*[None] * axis, division.axes)

    return jax.shard_map(
        function,
        mesh=division.mesh,
        in_specs=tuple(map(spec, in_axes)),
        out_specs=jax.tree.map(spec, out_axes, is_leaf=lambda axis: axis is None),
        check_vma=False,
    )


def total(
    x: Shaped[Array, "..."], division: choice.Division | None, length: int
) -> Shaped[Array, "..."]:
    """In a function of `over_devices`: the sum over devices of what each made of its part."""
    if division is None or not _divides(division, length):
        return x
    return jax.lax.psum(x, division.axes)


def _divides(division: choice.Division, length: int) -> bool:
    return length % division.parts == 0
