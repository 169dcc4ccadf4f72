"""Ternary weights and 8-bit activations (BitLinear of MatMul-free LM, arXiv 2406.02528, section
3.2), fused and plain; `packed_ternary` has the packed form.

A weight matrix is an integer matrix of -1, 0, 1 times one scale; a token's activations are int8
times one scale. Matrices are (inputs, outputs), as Flax keeps them.

Dimensions: I inputs, O outputs, leading dimensions (...) are tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Float32, Int8, Shaped, UInt8

from quweit_jax.errors import InputError

Gather = Callable[[Int8[Array, "I O"]], Int8[Array, "I O"]]
EPSILON = 1e-6
_MOST_INPUTS = (2**31 - 1) // 2**14  # of products of two int8 numbers
_SMALLEST = 1e-5  # of a token's largest activation and of a matrix's mean weight, as published


def quantize_activations(
    x: Float[Array, "*tokens I"],
) -> tuple[Int8[Array, "*tokens I"], Float32[Array, "*tokens 1"]]:
    """Rounds activations to int8 with one scale a token: x (..., I) floating -> (int8 (..., I),
    scale (..., 1) float32) with x close to int * scale.

    scale is max|x| / 127, not below 1e-5 / 127; ties round to even. No gradient.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    inverse = 127 / jnp.maximum(jnp.abs(x).max(-1, keepdims=True, initial=0.0), _SMALLEST)
    return jnp.clip(jnp.round(x * inverse), -128, 127).astype(jnp.int8), 1 / inverse


def quantize_weights(weight: Float[Array, "I O"]) -> tuple[Int8[Array, "I O"], Float32[Array, ""]]:
    """Rounds weights to -1, 0, 1 with one scale a matrix: weight (I, O) floating -> (int8 of -1, 0,
    1 (I, O), scale () float32 = mean|weight|). No gradient.
    """
    weight = jax.lax.stop_gradient(weight).astype(jnp.float32)
    inverse = inverse_scale(weight)
    return jnp.clip(jnp.round(weight * inverse), -1, 1).astype(jnp.int8), 1 / inverse


def inverse_scale(weight: Float[Array, "I O"]) -> Float32[Array, ""]:
    """What `quantize_weights` multiplies weights with before it rounds them: 1 / mean|weight|. No
    gradient.
    """
    weight = jax.lax.stop_gradient(weight).astype(jnp.float32)
    return 1 / jnp.maximum(jnp.abs(weight).mean() if weight.size else jnp.float32(0), _SMALLEST)


def ternary_product(
    x: Float[Array, "*tokens I"], kernel: Float[Array, "I O"], dtype: str = "float32"
) -> Float32[Array, "*tokens O"]:
    """x (..., I), whole numbers, times the `ternary_weights` of a float kernel (I, O), exact.

    dtype: the name of the operands'; sums are float32.
    """
    weights = ternary_weights(kernel).astype(dtype)
    return jnp.matmul(x.astype(dtype), weights, preferred_element_type=jnp.float32)


def to_bytes(weights: Int8[Array, "I O"]) -> UInt8[Array, "I//4 O"]:
    """Ternary weights -1, 0, 1 (I, O), I a multiple of 4, four a byte, for their way between
    devices; `packed_ternary` has the form that is computed with.
    """
    if weights.shape[0] % 4:
        raise InputError(
            f"to_bytes: expected inputs in multiples of 4, found {weights.shape[0]}; add zeros."
        )
    four = (weights + 1).astype(jnp.uint8).reshape(-1, 4, weights.shape[1])
    return four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6


def from_bytes(packed: UInt8[Array, "rows O"]) -> Int8[Array, "4*rows O"]:
    """The inverse of `to_bytes`."""
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]
    codes = (packed[:, None, :] >> shifts) & 3
    return codes.astype(jnp.int8).reshape(-1, packed.shape[1]) - 1


@jax.custom_vjp
def ternary_weights(weight: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """The whole numbers of `quantize_weights`, float32; their gradient passes straight through to
    the weights in units of the scale, mean|weight|.
    """
    return quantize_weights(weight)[0].astype(jnp.float32)


def _ternary_weights_forward(weight: Array) -> tuple[Array, tuple[Array, Array]]:
    whole, scale = quantize_weights(weight)
    return whole.astype(jnp.float32), (scale, jnp.zeros((0,), weight.dtype))


def _ternary_weights_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    return ((gradient / kept[0]).astype(kept[1].dtype),)


ternary_weights.defvjp(_ternary_weights_forward, _ternary_weights_backward)


def rms_norm(
    x: Float[Array, "*tokens I"], scale: Float[Array, " I"], *, eps: float = EPSILON
) -> Float[Array, "*tokens I"]:
    """Returns x / sqrt(mean(x**2) + eps) * scale over the last axis, computed in float32: x (...,
    I), scale (I,) -> x's dtype.
    """
    wide = x.astype(jnp.float32)
    inverse: Array = _inverse_rms(wide, eps)
    return (wide * inverse * scale).astype(x.dtype)


def mean_square(x: Float32[Array, "*tokens I"]) -> Float32[Array, "*tokens 1"]:
    """The mean of x**2 over the last axis, which is kept, the same to the last bit whatever the
    other axes: x float32. No gradient.

    Float sums depend on their order, which a compiler picks by the array's shape; the next rounding
    to int8 would turn a last bit into a whole step, and a text read at once would differ from the
    same text read token by token. So squares are summed as integers: each is rounded to 28 bits
    below the largest one's power of two, in two halves whose sums fit int32 up to 2**16 elements;
    of more, each 2**16 are summed by themselves, and then the halves of those sums.
    """
    x = jax.lax.stop_gradient(x)
    largest = jnp.maximum(jnp.abs(x).max(-1, keepdims=True, initial=0.0), 1e-15)
    above = 2 * jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32
    )
    squares = jnp.square(x / above) * 2.0**14  # x / above is exact and below 1
    high = jnp.floor(squares)
    low = jnp.round((squares - high) * 2.0**14)
    total = [_exact_sum(part.astype(jnp.int32)) for part in (high, low)]
    return (total[0] * 2.0**-14 + total[1] * 2.0**-28) / max(1, x.shape[-1]) * above * above


def _exact_sum(x: Array) -> Array:
    """The sum of int32 from 0 to 2**14 over the last axis, kept: float32 of a whole number, rounded
    once or twice, but always the same.
    """
    width, piece = x.shape[-1], 2**16
    if width <= piece:
        return x.sum(-1, keepdims=True).astype(jnp.float32)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % piece)])
    sums = padded.reshape(*x.shape[:-1], -1, piece).sum(-1)
    high, low = ((part).sum(-1, keepdims=True) for part in (sums >> 15, sums & (2**15 - 1)))
    return high.astype(jnp.float32) * 2.0**15 + low.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _inverse_rms(x: Array, eps: float) -> Array:
    return jax.lax.rsqrt(mean_square(x) + eps)


def _inverse_rms_forward(x: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    inverse: Array = _inverse_rms(x, eps)
    return inverse, (x, inverse)


def _inverse_rms_backward(eps: float, kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    x, inverse = kept
    return (gradient * -(inverse**3) * x / x.shape[-1],)


_inverse_rms.defvjp(_inverse_rms_forward, _inverse_rms_backward)


def int_matmul(
    x_int: Int8[Array, "*tokens I"], weight_int: Int8[Array, "I O"]
) -> Float32[Array, "*tokens O"]:
    """Multiplies int8 (..., I) by ternary int8 (I, O) into float32 (..., O), exactly: int8 products
    where units take them, float32 ones on a CPU.

    float32 is exact there as no partial sum of ternary weights exceeds 128 I, below 2**24 for I <
    131,072. Other weights, where they are known, are multiplied as integers and rounded once.

    Raises:
      InputError: other weights, and more inputs than int32 is sure to hold the sum of, 131,071.
    """
    inputs, ternary = weight_int.shape[0], True
    if not isinstance(weight_int, Tracer) and weight_int.size:
        ternary = bool((weight_int >= -1).all() & (weight_int <= 1).all())
    if not ternary and inputs > _MOST_INPUTS:
        raise InputError(
            f"int_matmul: expected at most {_MOST_INPUTS:,} inputs of weights beyond -1, 0 and 1, "
            f"whose sums int32 is sure to hold, found {inputs:,}; split the matrix."
        )
    dims = (((x_int.ndim - 1,), (0,)), ((), ()))

    def in_int8(x: Array, w: Array) -> Array:
        return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.int32).astype(jnp.float32)

    def in_float32(x: Array, w: Array) -> Array:
        return jax.lax.dot_general(x.astype(jnp.float32), w.astype(jnp.float32), dims)

    return jax.lax.platform_dependent(
        x_int,
        weight_int,
        cpu=in_float32 if ternary and inputs < 2**17 else in_int8,
        default=in_int8,
    )


def bit_linear(
    x: Float[Array, "*tokens I"],
    weight: Float[Array, "I O"],
    norm_scale: Float[Array, " I"],
    *,
    eps: float = EPSILON,
    gather: Gather | None = None,
) -> Float[Array, "*tokens O"]:
    """BitLinear, fused: quantize(rms_norm(x)) @ quantize(weight), gradients straight through both
    quantizers.

    Between forward and backward pass only x and 1 / rms are kept (one number a token); the backward
    pass quantizes again.

    Args:
      x: (..., I) floating. weight: (I, O) floating. norm_scale: (I,) of the RMSNorm. eps: under its
        root. gather: for weights that are divided over devices, int8 -1, 0, 1 (I, O) -> the same,
        whole on each.

    Returns:
      (..., O) in x's dtype. Gradients have the dtypes of what they belong to.
    """
    check_shapes(x, weight, norm_scale)
    return _bit_linear(x, weight, norm_scale, eps, gather)


def ternary_linear(
    x: Float[Array, "*tokens I"], weight: Float[Array, "I O"], *, gather: Gather | None = None
) -> Float[Array, "*tokens O"]:
    """`bit_linear` without its norm: quantize(x) @ quantize(weight), gradients straight through
    both quantizers (BitNet b1.58, arXiv 2402.17764, whose matrices share norms).

    Between forward and backward pass only x is kept. x (..., I) and weight (I, O) floating, gather
    as of `bit_linear` -> (..., O) in x's dtype.
    """
    check_shapes(x, weight, weight[:, 0] if weight.ndim == 2 else weight)
    return _ternary_linear(x, weight, gather)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ternary_linear(x: Array, weight: Array, gather: Gather | None) -> Array:
    x_int, x_scale = quantize_activations(x)
    w_int, w_scale = _whole_weights(weight, gather)
    return (int_matmul(x_int, w_int) * (x_scale * w_scale)).astype(x.dtype)


def _ternary_linear_forward(x: Array, weight: Array, gather: Gather | None):
    return _ternary_linear(x, weight, gather), (x, weight)


def _ternary_linear_backward(
    gather: Gather | None, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    # The barrier: as in `_bit_linear_backward`.
    x, weight, gradient = jax.lax.optimization_barrier((*kept, gradient))
    x_int, x_scale = quantize_activations(x)
    d_x, d_weight = _gradients(x_int * x_scale, *_whole_weights(weight, gather), gradient)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_ternary_linear.defvjp(_ternary_linear_forward, _ternary_linear_backward)


def _gradients(
    quantized: Array, w_int: Array, w_scale: Array, gradient: Array
) -> tuple[Array, Array]:
    """Of a product with ternary weights: for its inputs (..., I) and for the weights (I, O)."""
    dtype, axes = gradient.dtype, tuple(range(gradient.ndim - 1))
    d_weight = jax.lax.dot_general(
        quantized.astype(dtype),
        gradient,
        ((axes, axes), ((), ())),
        preferred_element_type=jnp.float32,
    )
    product = jax.lax.dot_general(
        gradient,
        w_int.astype(dtype),
        (((gradient.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return product * w_scale, d_weight


def check_shapes(
    x: Shaped[Array, "..."], weight: Shaped[Array, "..."], norm_scale: Shaped[Array, "..."]
) -> None:
    """Raises InputError unless x (..., I), weight (I, O) and norm_scale (I,) belong together."""
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[:1] or norm_scale.shape != weight.shape[:1]:
        raise InputError(
            "bit_linear: expected x (..., inputs), weight (inputs, outputs) and norm_scale "
            f"(inputs,), found {list(x.shape)}, "
            f"{list(weight.shape)} and {list(norm_scale.shape)}; published weights are (outputs, "
            "inputs), so transpose them."
        )


def bit_linear_reference(
    x: Float[Array, "*tokens I"],
    weight: Float[Array, "I O"],
    norm_scale: Float[Array, " I"],
    *,
    eps: float = EPSILON,
) -> Float[Array, "*tokens O"]:
    """`bit_linear` as a plain composition of differentiable steps: what the fused one is tested
    against and compared with.
    """

    def straight_through(real: Array, quantized: Array) -> Array:
        return real + jax.lax.stop_gradient(quantized - real)

    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * norm_scale
    y_int, y_scale = quantize_activations(y)
    w_int, w_scale = quantize_weights(weight)
    w = straight_through(weight.astype(jnp.float32), w_int * w_scale)
    return (straight_through(y, y_int * y_scale) @ w).astype(x.dtype)


def _normalized(x: Array, inverse_rms: Array, norm_scale: Array) -> Array:
    return x.astype(jnp.float32) * inverse_rms * norm_scale.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _bit_linear(
    x: Array, weight: Array, norm_scale: Array, eps: float, gather: Gather | None
) -> Array:
    return _bit_linear_forward(x, weight, norm_scale, eps, gather)[0]


def _whole_weights(weight: Array, gather: Gather | None) -> tuple[Array, Array]:
    w_int, scale = quantize_weights(weight)
    return w_int if gather is None else gather(w_int), scale


def _bit_linear_forward(
    x: Array, weight: Array, norm_scale: Array, eps: float, gather: Gather | None
):
    inverse_rms: Array = _inverse_rms(x.astype(jnp.float32), eps)
    y_int, y_scale = quantize_activations(_normalized(x, inverse_rms, norm_scale))
    w_int, w_scale = _whole_weights(weight, gather)
    out = (int_matmul(y_int, w_int) * (y_scale * w_scale)).astype(x.dtype)
    return out, (x, inverse_rms, weight, norm_scale)


def _bit_linear_backward(
    eps: float, gather: Gather | None, kept: tuple[Array, Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    x, inverse_rms, weight, norm_scale = kept
    # The barrier keeps XLA from finding that these were computed in the forward pass, and from
    # keeping them after all.
    x, inverse_rms, weight, gradient = jax.lax.optimization_barrier(
        (x, inverse_rms, weight, gradient)
    )
    y_int, y_scale = quantize_activations(_normalized(x, inverse_rms, norm_scale))
    w_int, w_scale = _whole_weights(weight, gather)
    d_y, d_weight = _gradients(y_int * y_scale, w_int, w_scale, gradient)
    unit = x.astype(jnp.float32) * inverse_rms
    d_scale = (d_y * unit).sum(tuple(range(x.ndim - 1)))
    d_unit = d_y * norm_scale
    d_x = inverse_rms * (d_unit - unit * (d_unit * unit).mean(-1, keepdims=True))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype), d_scale.astype(norm_scale.dtype)


_bit_linear.defvjp(_bit_linear_forward, _bit_linear_backward)
