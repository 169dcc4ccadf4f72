"""How kernels, which the compiler cannot divide, are divided over devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import ManualAxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree, Shaped

from quweit_jax.ops.kernels import choice


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not less than a value."""
    return -(-value // multiple) * multiple


def like_operands(out_shape: PyTree, operands: Sequence[Shaped[Array, "..."]]) -> PyTree:
    """The shapes of what a kernel makes, which varies over the axes over which its operands do."""
    kinds = [jax.typeof(x).manual_axis_type for x in operands]
    varying = ManualAxisType(varying=frozenset().union(*(kind.varying for kind in kinds)))
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=varying), out_shape
    )


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
