"""What the kernels for TPUs share: their calls, blocks, and division over devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree, Shaped

from quweit_jax.ops.kernels import choice

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
    semantics: Sequence[str],
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
    divides = length % division.parts == 0

    def spec(axis: int | None) -> P:
        return P() if axis is None or not divides else P(*[None] * axis, division.axes)

    return jax.shard_map(
        function,
        mesh=division.mesh,
        in_specs=tuple(map(spec, in_axes)),
        out_specs=jax.tree.map(spec, out_axes, is_leaf=lambda axis: axis is None),
        check_vma=False,
    )
