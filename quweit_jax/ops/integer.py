"""I-ViT's integer-only arithmetic (Li & Gu, ICCV 2023): shift-exponential, Shiftmax, ShiftGELU,
I-LayerNorm, dyadic requantization.

A real number is x = x_int * scale. The functions ending in `_units` work on the whole numbers
x_int, in either representation: integers (int8, int16, int32), exactly and into int32, or float32,
the same formulas with float32's 24 bits where a product or a sum needs more. Layers train on the
latter, which every platform does fast, and are deployed on the former. What is computed from scales
(multipliers, shifts, thresholds) is constant at inference.

The functions ending in `_shadow` are the real functions (softmax's and GELU's kind) whose gradients
the integers take, by `straight_through`.

Dimensions: d features (last axis), I input features, O output features.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Int32, Real, Shaped

from quweit_jax.errors import InputError
from quweit_jax.ops import int64
from quweit_jax.ops.fusion import no_fusion

SOFTMAX_SHIFTS = 15
GELU_SHIFTS = 23
GELU_BITS = 8
GELU_SLOPE = 1.702
_SMALLEST_SCALE = 1e-8
_FAR = 2**30  # further from 0 than anything an exponential tells apart
DIVIDEND = 2.0**31  # the published 2**31 - 1, which is this in the float32 it is computed in


@jax.custom_vjp
def straight_through(
    value: Float[Array, "*shape"], shadow: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`value`, with the gradient going to `shadow` (of the same shape): how exact integers get a
    real function's gradient.
    """
    return value


straight_through.defvjp(lambda value, shadow: (value, None), lambda _, g: (jnp.zeros_like(g), g))


def is_integer(x: Shaped[ArrayLike, "..."]) -> bool:
    """Whether an array's dtype is an integer one."""
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.integer)


def symmetric_scale(
    low: Float[Array, "*outputs"], high: Float[Array, "*outputs"], bits: int
) -> Float[Array, "*outputs"]:
    """The scale of a symmetric quantizer over [low, high]: max(-low, high) / (2**(bits-1) - 1),
    float32, not below 1e-8.
    """
    _check_bits("symmetric_scale", bits)
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    return jnp.maximum(jnp.maximum(-low, high) / (2 ** (bits - 1) - 1), _SMALLEST_SCALE)


def quantize(
    x: Float[Array, "*shape"], scale: Float[Array, "*#shape"], bits: int
) -> Int32[Array, "*shape"]:
    """Returns round(x / scale) clamped to `bits`-bit integers, ties to even: int32."""
    _check_bits("quantize", bits)
    limit = 2 ** (bits - 1)
    return jnp.clip(jnp.round(x / scale), -limit, limit - 1).astype(jnp.int32)


def _check_bits(where: str, bits: int) -> None:
    if not 2 <= bits <= 32:
        raise InputError(f"{where}: expected numbers of 2 to 32 bits, found {bits}.")


def quantize_weights(
    weight: Float[Array, "I O"], *, bits: int = 8
) -> tuple[Int32[Array, "I O"], Float[Array, " O"]]:
    """Symmetric weights, one scale an output: (I, O) float -> (int32 (I, O), scale float32 (O,)),
    scale = max|w| / (2**(bits-1) - 1).

    Raises:
      InputError: so many inputs that their products with 8-bit activations may not fit int32.
    """
    _check_inputs(weight.shape[0], bits)
    weight = jax.lax.stop_gradient(weight)
    scale = symmetric_scale(weight.min(0, initial=0.0), weight.max(0, initial=0.0), bits)
    return quantize(weight, scale, bits), scale


def quantize_bias(bias: Float[Array, " O"], scale: Float[Array, " O"]) -> Int32[Array, " O"]:
    """Returns round(bias / scale) as int32; scale is that of the products it is added to."""
    return saturate(jnp.round(jax.lax.stop_gradient(bias) / scale))


def saturate(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Turns floats into int32, clipped to +-2**30 so that a sum of two still fits."""
    return jnp.clip(x, -(2.0**30), 2.0**30).astype(jnp.int32)


def matmul_units(
    x: Real[Array, "*tokens I"], weight_int: Int[Array, "I O"]
) -> Real[Array, "*tokens O"]:
    """(..., I) @ (I, O) of whole numbers of 8 bits, the second from -127 to 127: (..., O). See
    `einsum_units`.

    Raises:
      InputError: integers, and more inputs than int32 is sure to hold the sum of, 132,104 (66,311
        of uint8), or wider ones (where known) that need more than 8 bits.
    """
    if is_integer(x):
        _check_inputs(weight_int.shape[0], 8, 255 if x.dtype == jnp.uint8 else 128)
        _check_8_bits(x)
    return einsum_units("...i,io->...o", x, weight_int)


def _check_8_bits(x: Array) -> None:
    """Of integers that could be wider, where they are known."""
    wide = x.dtype.itemsize > 1 and not isinstance(x, Tracer) and x.size
    if wide and not bool((x >= -128).all() & (x <= 127).all()):
        raise InputError(
            f"int_linear: expected whole numbers of 8 bits, found {x.min()} to {x.max()}; "
            "requantize them."
        )


def _check_inputs(inputs: int, bits: int, largest: int = 2**7) -> None:
    limit = int64.INT32_MAX // (largest * max(1, 2 ** (bits - 1) - 1))
    if inputs > limit:
        raise InputError(
            f"int_linear: expected at most {limit:,} inputs, whose products with {bits}-bit "
            f"weights int32 is sure to hold the sum of, found {inputs:,}; split the layer."
        )


def einsum_units(
    subscripts: str, a: Real[Array, "..."], b: Real[Array, "..."]
) -> Real[Array, "..."]:
    """A product of two arrays of whole numbers, in the representation of the first.

    Integer operands, which may differ in width, are multiplied as they are and summed in int32. For
    a float32 one the other is taken to float32 too, which matrix units do fast and which is exact
    while every partial sum stays below 2**24.
    """
    if is_integer(a):
        common = jnp.promote_types(a.dtype, b.dtype)
        return jnp.einsum(
            subscripts, a.astype(common), b.astype(common), preferred_element_type=jnp.int32
        )
    return jnp.einsum(subscripts, a, b.astype(a.dtype), precision=jax.lax.Precision.HIGHEST)


def shift_exp(
    x: Real[Array, "*shape"], inverse: Int[Array, "*#shape"], shifts: Int[Array, "*#shape"] | int
) -> Real[Array, "*shape"]:
    """Computes exp(x * scale) times `inverse` * 2**shifts, by shifts and one division.

    Args:
      x: whole numbers, integers or float32; what lies below -shifts * inverse counts as that.
      inverse: `inverse_scale(scale)`. shifts: m, the number of halvings kept.

    Returns:
      uint32, saturated at 2**31 - 1, or float32.
    """
    return (
        _shift_exp_int(x, inverse, shifts)
        if is_integer(x)
        else _shift_exp_float(x, inverse, shifts)
    )


def _shift_exp_int(x: Array, inverse: Array, shifts: Array | int) -> Array:
    x = jnp.clip(x.astype(jnp.int32), -_FAR, _FAR)  # the sum below fits; beyond it nothing changes
    x = x + (x >> 1) - (x >> 4)
    x = jnp.maximum(x, -shifts * inverse)
    # x = -halvings * inverse + rest with -inverse < rest <= 0; where x > 0 (exp of a negative
    # maximum) halvings is negative.
    positive = x > 0
    whole = jax.lax.div(
        jnp.where(positive, x, -x) + jnp.where(positive, inverse - 1, 0),
        jnp.broadcast_to(inverse, x.shape),
    )
    halvings = jnp.where(positive, -whole, whole)
    twice = (x + halvings * inverse + 2 * inverse).astype(jnp.uint32)  # 2 * (rest / 2 + inverse)
    shift = jnp.asarray(shifts - halvings)
    few = jnp.clip(shift, 0, 31).astype(jnp.uint32)
    too_far = (shift > 31) | (twice > (jnp.uint32(2**32 - 1) >> few))
    return jnp.where(too_far, jnp.uint32(int64.INT32_MAX), (twice << few) >> 1)


def _shift_exp_float(x: Array, inverse: Array, shifts: Array | int) -> Array:
    x = x + jnp.floor(x / 2) - jnp.floor(x / 16)
    # The barrier keeps the division by one number from becoming a product with its inverse, which
    # can fall below a whole quotient.
    unit = jax.lax.optimization_barrier(jnp.broadcast_to(-inverse.astype(jnp.float32), x.shape))
    x = jnp.maximum(x, shifts * unit)
    halvings = jnp.floor(x / unit)
    rest = (x - unit * halvings) / 2 - unit
    return jnp.maximum(jnp.floor(rest * power_of_two(shifts - halvings)), 0.0)


def power_of_two(exponent: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2.0**exponent for whole numbers, exactly."""
    return jax.lax.bitcast_convert_type(
        (jnp.clip(exponent, -126, 127).astype(jnp.int32) + 127) << 23, jnp.float32
    )


def inverse_scale(scale: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Returns -floor(-1 / scale), the integer that stands for 1: int32, from 1 to 2**24."""
    inverse = -jnp.floor(-1.0 / jax.lax.stop_gradient(scale))
    return jnp.clip(inverse, 1.0, 2.0**24).astype(jnp.int32)


def published_grid(
    x: Real[Array, "*tokens d"], scale: Float[Array, "*#one"]
) -> Float[Array, "*tokens d"]:
    """x * scale / scale, both rounded to float32 as the published program does before it rounds
    down: a whole number or the one just beside it. x: whole numbers; scale: one. No gradient.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    # Without the barriers the product is cancelled, and the division done as a product.
    scale = jax.lax.optimization_barrier(jnp.broadcast_to(jax.lax.stop_gradient(scale), x.shape))
    return jax.lax.optimization_barrier(x * scale) / scale


def shiftmax_units(
    x: Real[Array, "*tokens d"], inverse: Int[Array, "*#one"], *, bits: int
) -> Real[Array, "*tokens d"]:
    """Shiftmax of whole numbers (..., d), with the constant `inverse` of `inverse_scale`: whole
    numbers in units of 2**-(bits-1).
    """
    _check_bits("shiftmax", bits)
    if is_integer(x):
        x = x.astype(jnp.int32)
    if not x.size:
        return x
    if is_integer(x):
        return no_fusion(functools.partial(_shiftmax, bits=bits), x, inverse)
    return _shiftmax(x, inverse, bits)


@functools.partial(jax.jit, static_argnames="bits")  # traced once for all layers of a shape
def _shiftmax(x: Array, inverse: Array, bits: int) -> Array:
    inverse = jnp.minimum(inverse, 2**15)
    exponentials = shift_exp(_below_the_largest(x), inverse, SOFTMAX_SHIFTS)
    if not is_integer(x):
        total = jnp.minimum(exponentials.sum(-1, keepdims=True), DIVIDEND)
        return jnp.floor(exponentials * jnp.floor(DIVIDEND / total) / 2.0 ** (32 - bits))
    # The sum has to fit 32 bits; scales so small that it might not lose the last of their many
    # bits.
    spare = _bit_length(inverse) + SOFTMAX_SHIFTS + math.ceil(math.log2(max(1, x.shape[-1]))) - 32
    exponentials = exponentials >> jnp.maximum(0, spare).astype(jnp.uint32)
    total = jnp.clip(exponentials.sum(-1, keepdims=True, dtype=jnp.uint32), 1, int64.INT32_MAX)
    return ((exponentials * (jnp.uint32(DIVIDEND) // total)) >> (32 - bits)).astype(jnp.int32)


def shift_gelu_units(
    x: Real[Array, "*tokens d"], inverse: Int[Array, "*#one"]
) -> Real[Array, "*tokens d"]:
    """ShiftGELU of whole numbers (..., d); `inverse` is `inverse_scale(1.702 * scale)`. Whole
    numbers in units of scale * 2**-7.

    Raises:
      InputError: integers (where known) of 2**24 or more, whose products int32 does not hold; while
        it is traced they count as the next below.
    """
    if is_integer(x):
        x = _within_24_bits(x.astype(jnp.int32))
    if not x.size:
        return x
    return no_fusion(_shift_gelu, x, inverse) if is_integer(x) else _shift_gelu(x, inverse)


def _shift_gelu(x: Array, inverse: Array) -> Array:
    top = x.max(-1, keepdims=True)
    shifts = jnp.minimum(GELU_SHIFTS, 31 - _bit_length(inverse))
    numerator = shift_exp(_below_the_largest(x), inverse, shifts)
    other = shift_exp(-top, inverse, shifts)
    if not is_integer(x):
        total = jnp.minimum(numerator + other, DIVIDEND)
        return x * jnp.floor(numerator * jnp.floor(DIVIDEND / total) / 2.0 ** (32 - GELU_BITS))
    total = jnp.clip(numerator + other, 1, int64.INT32_MAX)
    return x * ((numerator * (jnp.uint32(DIVIDEND) // total)) >> (32 - GELU_BITS)).astype(jnp.int32)


def _below_the_largest(x: Array) -> Array:
    """x less the largest of its row; of integers the difference may not fit int32, and is far."""
    difference = x - x.max(-1, keepdims=True)
    return jnp.where(difference > 0, -_FAR, difference) if is_integer(x) else difference


def _within_24_bits(x: Array) -> Array:
    limit = 2**24
    if not isinstance(x, Tracer) and x.size and bool((x >= limit).any() | (x <= -limit).any()):
        raise InputError(
            "shift_gelu: expected whole numbers below 2**24, whose products with 8-bit numbers fit "
            f"int32, found {x.min()} to {x.max()}; requantize them."
        )
    return jnp.clip(x, 1 - limit, limit - 1)


def gelu_shadow(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The real function whose gradient ShiftGELU takes: x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(GELU_SLOPE * x)


def requantize_units(
    branches: list[tuple[Real[Array, "*#shape"], Float[Array, "*#shape"]]],
    scale_out: Float[Array, ""],
    bits: int,
) -> Real[Array, "*shape"]:
    """The sum of whole numbers (x, scale_in) at scale_out and clamped: int32 by dyadic numbers,
    exactly; float32 by float32 ratios.

    Raises:
      InputError: no branches.
    """
    if not branches:
        raise InputError("requantize: expected at least one branch (x, scale), found none.")
    if is_integer(branches[0][0]):
        return requantize_int([(x, *int64.dyadic(scale, scale_out)) for x, scale in branches], bits)
    return clamp(
        sum((jnp.round(x * (scale / scale_out)) for x, scale in branches), jnp.float32(0)), bits
    )


def requantize_int(
    branches: list[tuple[Int[Array, "*#shape"], Int[Array, "*#shape"], Int[Array, "*#shape"]]],
    bits: int,
) -> Int32[Array, "*shape"]:
    """The sum of round(x * multiplier / 2**shift) over (x int32, multiplier int32, shift int32),
    clamped to `bits` bits: int32.

    Raises:
      InputError: no branches.
    """
    if not branches:
        raise InputError("requantize: expected at least one branch, found none.")
    flat = [array for branch in branches for array in branch]
    return no_fusion(functools.partial(_requantize, bits), *flat)


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers of a shape
def _requantize(bits: int, *flat: Array) -> Array:
    branches = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    # Each branch is clamped before the sum, far outside the result's range, so that the sum cannot
    # overflow.
    return clamp(
        sum((jnp.clip(int64.multiply_shift(*b), -(2**29), 2**29) for b in branches), jnp.int32(0)),
        bits,
    )


def clamp(x_int: Real[Array, "*shape"], bits: int) -> Real[Array, "*shape"]:
    """Clips whole numbers to the range of `bits`-bit integers."""
    _check_bits("clamp", bits)
    return jnp.clip(x_int, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def clip_shadow(
    x: Float[Array, "*shape"], scale: Float[Array, "*#shape"], bits: int
) -> Float[Array, "*shape"]:
    """Clips real x, which then has no gradient where a `bits`-bit integer of that scale would be
    clamped.
    """
    return jnp.clip(x, -(2 ** (bits - 1)) * scale, (2 ** (bits - 1) - 1) * scale)


def _bit_length(x: Array) -> Array:
    """The number of bits of a positive int32, as int32."""
    return 32 - jax.lax.clz(jnp.asarray(x, jnp.int32))
