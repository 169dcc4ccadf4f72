"""Numbers of one or two binary digits, by which a machine multiplies with a shift, or with two and
an addition: what gates are rounded to where no product is wanted.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from quweit_jax.errors import InputError
from quweit_jax.ops.integer import straight_through

_DIGITS = (1, 2)


def round_to_shifts(
    x: Float[Array, "*shape"], digits: int = 1, smallest: int = -8
) -> Float[Array, "*shape"]:
    """The nearest number of a few binary digits, the gradient straight through.

    With one digit that is 0 or +-2**k; with two also +-1.5 * 2**k. Times another number, it is that
    one shifted by k places, for 1.5 once more by k - 1 places and added. Of two numbers equally
    near the larger magnitude is taken.

    Args:
      x: any real numbers; NaN and infinities stay what they are.
      digits: 1 or 2.
      smallest: the lowest k of one digit; below half of 2**k it is 0.

    Raises:
      InputError: digits is neither, or 2**smallest is no normal number of x's dtype.
    """
    if digits not in _DIGITS:
        raise InputError(f"round_to_shifts: digits: expected 1 or 2, found {digits}.")
    if 2.0**smallest < _smallest_normal(x.dtype):
        raise InputError(
            f"round_to_shifts: smallest: {x.dtype} has no 2**{smallest}; use at least "
            f"{int(jnp.finfo(x.dtype).minexp)}."
        )
    magnitude = jnp.abs(x)
    # One digit less in a mantissa of 1 to 2 is a grid of 2**k / digits; rounding up may carry.
    _, exponent = jnp.frexp(jnp.maximum(magnitude, 2.0**smallest))
    grid = jnp.ldexp(jnp.ones_like(x), exponent - digits)
    nearest = jnp.floor(magnitude / grid + 0.5) * grid
    rounded = jnp.where(jnp.isfinite(x), jnp.copysign(nearest, x), x)
    return straight_through(rounded, x)


def _smallest_normal(dtype: DTypeLike) -> float:
    return float(jnp.finfo(dtype).tiny)
