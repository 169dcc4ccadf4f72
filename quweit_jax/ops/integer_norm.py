"""I-LayerNorm: normalization of whole numbers (I-ViT, Li & Gu, ICCV 2023).

Whole numbers are held as in `ops.integer`: in float32 for training, in int32 as deployed.

Dimensions: d features (last axis).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Int32, Real

from quweit_jax.errors import InputError
from quweit_jax.ops import int64
from quweit_jax.ops.fusion import no_fusion
from quweit_jax.ops.integer import DIVIDEND, is_integer, power_of_two, saturate

LAYER_NORM_ITERATIONS = 10
MAX_NORM_WIDTH = 2**14  # features whose squares can be added in 32-bit words
_SMALLEST_ROOT = 64.0  # where ten Newton steps from 2**16 end for a tiny variance


def layer_norm_constants(
    weight: Float[Array, " d"], bias: Float[Array, " d"]
) -> tuple[Int32[Array, " d"], Int32[Array, " d"], Float[Array, " d"]]:
    """What I-LayerNorm needs of weight and bias, (d,) float: (bias_int int32 (d,), halvings int32
    (d,), out_scale float32 (d,)).

    halvings is 0 but for channels whose bias is so much larger than their weight that the sum would
    not fit 32 bits; their output is coarser by that power of two. A weight of 0 counts as a very
    small one.

    Raises:
      InputError: more than 16,384 features.
    """
    width = weight.shape[0]
    _check_norm_width(width)
    unit = jnp.float32(math.sqrt(width) / 2**30)
    weight, bias = jax.lax.stop_gradient(weight), jax.lax.stop_gradient(bias)
    largest = jnp.maximum(jnp.abs(weight).max(initial=0.0), jnp.abs(bias).max(initial=0.0))
    tiny = largest * 2.0**-24 + 1e-20
    weight = jnp.where(jnp.abs(weight) < tiny, tiny, weight)
    ratio = bias / weight / unit
    halvings = jnp.maximum(0, jnp.ceil(jnp.log2(jnp.maximum(jnp.abs(ratio), 1.0) / 2**30))).astype(
        jnp.int32
    )
    step = jnp.exp2(halvings.astype(jnp.float32))
    return saturate(jnp.floor(ratio / step)), halvings, unit * weight * step


def _check_norm_width(width: int) -> None:
    if width > MAX_NORM_WIDTH:
        raise InputError(
            f"int_layer_norm: expected at most {MAX_NORM_WIDTH:,} features, the most of which the "
            f"sum of 16-bit numbers' squares is exact, found {width:,}; make the model narrower."
        )


def layer_norm_units(
    x: Real[Array, "*tokens d"], bias_int: Int32[Array, " d"], halvings: Int32[Array, " d"]
) -> Real[Array, "*tokens d"]:
    """I-LayerNorm of whole numbers (..., d), |x| < 2**16, with `layer_norm_constants`: whole
    numbers (..., d).

    Raises:
      InputError: more than 16,384 features, or integers (where known) of 2**16 or more.
    """
    _check_norm_width(x.shape[-1])
    if is_integer(x) and not isinstance(x, Tracer) and x.size and x.dtype.itemsize > 1:
        x = x.astype(jnp.int32)
        if bool((x >= 2**16).any() | (x <= -(2**16)).any()):
            raise InputError(
                "int_layer_norm: expected whole numbers below 2**16, the sum of whose squares is "
                f"exact, found {x.min()} to {x.max()}; requantize them."
            )
    if not is_integer(x):
        centered = x - jnp.round(x.mean(-1, keepdims=True))
        root = jnp.maximum(
            jnp.floor(jnp.sqrt(jnp.square(centered).sum(-1, keepdims=True))), _SMALLEST_ROOT
        )
        return (
            jnp.floor(centered * jnp.floor(DIVIDEND / root) * power_of_two(-1 - halvings))
            + bias_int
        )
    return no_fusion(_layer_norm_int, x, bias_int, halvings)


def _layer_norm_int(x: Array, bias_int: Array, halvings: Array) -> Array:
    width = x.shape[-1]
    total = x.sum(-1, keepdims=True, dtype=jnp.int32)
    mean = total // width
    rest = 2 * (total - mean * width)
    mean = mean + ((rest > width) | ((rest == width) & (mean & 1 == 1)))
    centered = x - mean
    high, low = _sum_of_squares(jnp.minimum(int64.magnitude(centered), 2**17 - 1))

    def newton(_: int, root: Array) -> Array:
        return (root + int64.divide(high, low, root)) >> 1

    root = jax.lax.fori_loop(0, LAYER_NORM_ITERATIONS, newton, jnp.full_like(low, 2**16))
    factor = (jnp.uint32(DIVIDEND) // root).astype(jnp.int32)
    return ((centered * factor) >> (1 + halvings)) + bias_int


def layer_norm_shadow(
    x: Float[Array, "*tokens d"], weight: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "*tokens d"]:
    """The real function whose gradient I-LayerNorm takes: (x - mean) / std * weight + bias."""
    centered = x - x.mean(-1, keepdims=True)
    return (
        centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-12) * weight
        + bias
    )


def _sum_of_squares(x: Array) -> tuple[Array, Array]:
    """The sum over the last axis of squares of uint32 below 2**17, up to 2**14 of them, the axis
    kept: (high, low) words.
    """
    upper, lower = x >> 9, x & jnp.uint32(511)
    total = functools.partial(jnp.sum, axis=-1, keepdims=True, dtype=jnp.uint32)
    squares, crosses, small = total(upper * upper), total(upper * lower), total(lower * lower)
    zero = jnp.zeros_like(small)
    return int64.add(
        int64.add((squares >> 14, squares << 18), (crosses >> 22, crosses << 10)), (zero, small)
    )
