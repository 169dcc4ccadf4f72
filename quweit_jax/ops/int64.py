"""64-bit integer arithmetic in pairs of 32-bit words, which is what dyadic requantization needs and
JAX lacks by default.

Everything works on int32 and uint32 arrays of any broadcastable shapes, on every platform, without
float64. A 64-bit number is two uint32 arrays: its high words and its low words.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int32, UInt32

INT32_MAX = 2**31 - 1
_MANTISSA_BITS = 31

Word = UInt32[Array, "*#shape"]
Words = tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]


def magnitude(x: Int[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The absolute value of int32 numbers as uint32, which is right for -2**31 too."""
    unsigned = jax.lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32)
    return jnp.where(x < 0, jnp.uint32(0) - unsigned, unsigned)


def multiply(a: Word, b: Word) -> Words:
    """The 64-bit products of uint32 numbers, as (high word, low word)."""
    a, b = a.astype(jnp.uint32), b.astype(jnp.uint32)
    half = jnp.uint32(0xFFFF)
    a1, a0, b1, b0 = a >> 16, a & half, b >> 16, b & half
    low, cross, other, high = a0 * b0, a0 * b1, a1 * b0, a1 * b1
    middle = (low >> 16) + (cross & half) + (other & half)
    return high + (cross >> 16) + (other >> 16) + (middle >> 16), (low & half) | (middle << 16)


def dyadic(
    scale_in: Float[Array, "*#shape"], scale_out: Float[Array, "*#shape"]
) -> tuple[Int32[Array, "*shape"], Int32[Array, "*shape"]]:
    """The ratio of two float32 scales as multiplier / 2**shift: (int32 with a 31-bit magnitude,
    int32 from 0 to 63).

    The quotient of the two float32 numbers is exact to 31 bits, rounded half up, as float64
    division would give. A ratio below 2**-32 becomes 0; one of 2**31 or more becomes the largest
    there is.
    """
    scale_in, scale_out = jnp.broadcast_arrays(
        jnp.asarray(scale_in, jnp.float32), jnp.asarray(scale_out, jnp.float32)
    )
    mantissa_in, exponent_in = jnp.frexp(jnp.abs(scale_in))
    mantissa_out, exponent_out = jnp.frexp(jnp.abs(scale_out))
    rest = (mantissa_in * 2**24).astype(jnp.uint32)
    divisor = jnp.maximum((mantissa_out * 2**24).astype(jnp.uint32), 1)
    exponent = exponent_in - exponent_out
    large = rest >= divisor
    exponent, divisor = exponent + large, jnp.where(large, 2 * divisor, divisor)
    quotient = jnp.zeros_like(rest)
    for bits in (
        6,
        6,
        6,
        6,
        6,
        1,
    ):  # long division; the rest is below 2**25, so six more bits still fit a word
        rest = rest << bits
        digit = rest // divisor
        quotient, rest = (quotient << bits) | digit, rest - digit * divisor
    quotient = quotient + (2 * rest >= divisor)
    full = quotient > jnp.uint32(INT32_MAX)  # rounded up to the next power of two
    quotient, exponent = jnp.where(full, quotient >> 1, quotient), exponent + full
    shift = _MANTISSA_BITS - exponent
    endless = jnp.isinf(scale_in) | (scale_out == 0)
    shift = jnp.where(endless, -1, shift)
    none = (scale_in == 0) | (shift > 63) | jnp.isinf(scale_out)
    quotient = jnp.where(none, 0, jnp.where(shift < 0, INT32_MAX, quotient)).astype(jnp.int32)
    return jnp.where((scale_in < 0) != (scale_out < 0), -quotient, quotient), jnp.clip(
        shift, 0, 63
    ).astype(jnp.int32)


def multiply_shift(
    x: Int[Array, "*#shape"], multiplier: Int[Array, "*#shape"], shift: Int[Array, "*#shape"]
) -> Int32[Array, "*shape"]:
    """Returns round(x * multiplier / 2**shift) in exact 64-bit arithmetic, ties to even, saturated
    to +-(2**31 - 1).

    Args:
      x, multiplier: int32, broadcastable. shift: int32, 0 to 63.
    """
    x, multiplier = x.astype(jnp.int32), jnp.asarray(multiplier, jnp.int32)
    high, low = multiply(magnitude(x), magnitude(multiplier))
    shift = jnp.asarray(shift).astype(jnp.uint32)
    # Align so that the whole part is in `whole` and the fraction in `part`; shifts go in two steps
    # as 32 at once is undefined.
    right, left = jnp.where(shift >= 32, shift - 32, 0), jnp.where(shift >= 32, 0, 32 - shift)
    one = jnp.uint32(1)
    far = shift >= 32
    whole_far, part_far = (
        high >> right,
        jnp.where(right == 0, low, ((high << (31 - right)) << 1) | (low >> right)),
    )
    sticky = far & ((low & ((one << right) - 1)) != 0)
    before = jnp.minimum(shift, 31)
    half_left = jnp.where(left == 0, 0, left - 1)
    whole_near, part_near = (
        ((high << half_left) << 1) | (low >> before),
        jnp.where(shift == 0, 0, (low << half_left) << 1),
    )
    overflow = ~far & ((high >> before) != 0)
    whole, part = jnp.where(far, whole_far, whole_near), jnp.where(far, part_far, part_near)
    half = jnp.uint32(2**31)
    up = (part > half) | ((part == half) & (sticky | ((whole & 1) == 1)))
    whole = jnp.minimum(whole, INT32_MAX) + up
    result = jnp.where(overflow, INT32_MAX, jnp.minimum(whole, INT32_MAX)).astype(jnp.int32)
    return jnp.where((x < 0) != (multiplier < 0), -result, result)


def divide(high: Word, low: Word, divisor: Word) -> UInt32[Array, "*shape"]:
    """Returns floor((high * 2**32 + low) / divisor) for uint32 words with high < divisor < 2**31,
    so that the quotient fits: uint32.

    Long division in digits of 16 bits (Knuth, The Art of Computer Programming, 4.3.1, algorithm D).
    """
    high, low, divisor = jnp.broadcast_arrays(high, low, divisor)
    # Shifted so that the divisor's first bit is set: a digit's first guess is then at most 2 above.
    shift = jnp.clip(jax.lax.clz(divisor), 1, 31)
    divisor = divisor << shift
    rest, low = (high << shift) | (low >> (32 - shift)), low << shift
    first, second = _next_digit(rest, low >> 16, divisor)
    last, _ = _next_digit(second, low & jnp.uint32(0xFFFF), divisor)
    return (first << 16) | last


def _next_digit(rest: Array, following: Array, divisor: Array) -> tuple[Array, Array]:
    """The 16-bit digit floor((rest * 2**16 + following) / divisor) and the rest."""
    half, one = jnp.uint32(0xFFFF), jnp.uint32(1)
    upper, lower = divisor >> 16, divisor & half
    digit = rest // upper
    left = rest - digit * upper
    for _ in range(2):
        # beyond 16 bits of `left` the guess is right
        above = (digit > half) | (digit * lower > ((left << 16) | following))
        above &= left <= half
        digit, left = jnp.where(above, digit - one, digit), jnp.where(above, left + upper, left)
    return digit, ((rest << 16) | following) - digit * divisor


def add(a: tuple[Word, Word], b: tuple[Word, Word]) -> Words:
    """The sum of two 64-bit numbers given as (high word, low word)."""
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low
