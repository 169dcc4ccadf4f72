"""Keeping XLA on CPU from fusing what it should not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree, Shaped

T = TypeVar("T")


def no_fusion(function: Callable[..., T], first: Shaped[Array, "..."], *operands: PyTree) -> T:
    """Returns function(first, *operands), computed on CPU behind a branch that is always taken,
    across which nothing is fused.

    XLA fuses producers into their consumers there even where that repeats them for every element
    (the many steps of an integer square root), or makes them walk memory column by column (the
    transposes around a look-up): 20 times slower, and minutes to compile. `optimization_barrier`
    doesn't help, as it is dropped before fusion.

    Args:
      function: of arrays. first: an array of whole numbers or bits, from which the branch is taken.
    """
    function = jax.jit(function)  # traced once, not once for each of its three uses here
    if not first.size:
        return function(first, *operands)

    def branch(*arguments: PyTree) -> T:
        shapes = jax.eval_shape(function, *arguments)
        always = arguments[0][(0,) * first.ndim].astype(jnp.float32) > -(2.0**40)
        return jax.lax.cond(
            always,
            function,
            lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            *arguments,
        )

    return jax.lax.platform_dependent(first, *operands, cpu=branch, default=function)
