"""Ternary weights and 8-bit activations (BitLinear of MatMul-free LM, arXiv 2406.02528, section
3.2), fused, packed and plain.

A weight matrix is an integer matrix of -1, 0, 1 times one scale; a token's activations are int8
times one scale. Matrices are (inputs, outputs), as Flax keeps them.

Dimensions: I inputs, O outputs, leading dimensions (...) are tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from quweit_jax.errors import InputError

EPSILON = 1e-6
WEIGHTS_PER_BYTE = 4
_SMALLEST = 1e-5  # of a token's largest activation and of a matrix's mean weight, as published
_TILE_BYTES = 2**20  # of a packed matrix that are unpacked at a time


def quantize_activations(x: Array) -> tuple[Array, Array]:
    """One scale a token: x (..., I) floating -> (int8 (..., I), scale (..., 1) float32) with x
    close to int * scale.

    scale is max|x| / 127, not below 1e-5 / 127; ties round to even. No gradient.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    inverse = 127 / jnp.maximum(jnp.abs(x).max(-1, keepdims=True, initial=0.0), _SMALLEST)
    return jnp.clip(jnp.round(x * inverse), -128, 127).astype(jnp.int8), 1 / inverse


def quantize_weights(weight: Array) -> tuple[Array, Array]:
    """One scale a matrix: weight (I, O) floating -> (int8 of -1, 0, 1 (I, O), scale () float32 =
    mean|weight|). No gradient.
    """
    weight = jax.lax.stop_gradient(weight).astype(jnp.float32)
    inverse = 1 / jnp.maximum(jnp.abs(weight).mean() if weight.size else jnp.float32(0), _SMALLEST)
    return jnp.clip(jnp.round(weight * inverse), -1, 1).astype(jnp.int8), 1 / inverse


def rms_norm(x: Array, scale: Array, *, eps: float = EPSILON) -> Array:
    """x / sqrt(mean(x**2) + eps) * scale over the last axis, computed in float32: x (..., I), scale
    (I,) -> x's dtype.
    """
    wide = x.astype(jnp.float32)
    inverse: Any = _inverse_rms(wide, eps)
    return (wide * inverse * scale).astype(x.dtype)


def mean_square(x: Array) -> Array:
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
def _inverse_rms(x: Array, eps: float) -> Any:
    return jax.lax.rsqrt(mean_square(x) + eps)


def _inverse_rms_forward(x: Array, eps: float) -> Any:
    inverse: Any = _inverse_rms(x, eps)
    return inverse, (x, inverse)


def _inverse_rms_backward(eps: float, kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    x, inverse = kept
    return (gradient * -(inverse**3) * x / x.shape[-1],)


_inverse_rms.defvjp(_inverse_rms_forward, _inverse_rms_backward)


def int_matmul(x_int: Array, weight_int: Array) -> Array:
    """int8 (..., I) @ int8 (I, O) -> float32 (..., O), exact: int8 products where units take them,
    float32 ones on a CPU.

    float32 is exact there as no partial sum of ternary weights exceeds 128 I, below 2**24 for I <
    131,072.
    """
    dims = (((x_int.ndim - 1,), (0,)), ((), ()))

    def in_int8(x: Array, w: Array) -> Array:
        return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.int32).astype(jnp.float32)

    def in_float32(x: Array, w: Array) -> Array:
        return jax.lax.dot_general(x.astype(jnp.float32), w.astype(jnp.float32), dims)

    return jax.lax.platform_dependent(
        x_int, weight_int, cpu=in_float32 if x_int.shape[-1] < 2**17 else in_int8, default=in_int8
    )


def bit_linear(x: Array, weight: Array, norm_scale: Array, *, eps: float = EPSILON) -> Array:
    """BitLinear, fused: quantize(rms_norm(x)) @ quantize(weight), gradients straight through both
    quantizers.

    Between forward and backward pass only x and 1 / rms are kept (one number a token); the backward
    pass quantizes again.

    Args:
      x: (..., I) floating. weight: (I, O) floating. norm_scale: (I,) of the RMSNorm. eps: under its
        root.

    Returns:
      (..., O) in x's dtype. Gradients have the dtypes of what they belong to.
    """
    check_shapes(x, weight, norm_scale)
    return _bit_linear(x, weight, norm_scale, eps)


def check_shapes(x: Array, weight: Array, norm_scale: Array) -> None:
    """Raises InputError unless x (..., I), weight (I, O) and norm_scale (I,) belong together."""
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[:1] or norm_scale.shape != weight.shape[:1]:
        raise InputError(
            "bit_linear: expected x (..., inputs), weight (inputs, outputs) and norm_scale "
            f"(inputs,), found {list(x.shape)}, "
            f"{list(weight.shape)} and {list(norm_scale.shape)}; published weights are (outputs, "
            "inputs), so transpose them."
        )


def bit_linear_reference(
    x: Array, weight: Array, norm_scale: Array, *, eps: float = EPSILON
) -> Array:
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _bit_linear(x: Array, weight: Array, norm_scale: Array, eps: float) -> Array:
    return _bit_linear_forward(x, weight, norm_scale, eps)[0]


def _bit_linear_forward(x: Array, weight: Array, norm_scale: Array, eps: float):
    inverse_rms: Any = _inverse_rms(x.astype(jnp.float32), eps)
    y_int, y_scale = quantize_activations(_normalized(x, inverse_rms, norm_scale))
    w_int, w_scale = quantize_weights(weight)
    out = (int_matmul(y_int, w_int) * (y_scale * w_scale)).astype(x.dtype)
    return out, (x, inverse_rms, weight, norm_scale)


def _bit_linear_backward(
    eps: float, kept: tuple[Array, Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    x, inverse_rms, weight, norm_scale = kept
    # The barrier keeps XLA from finding that these were computed in the forward pass, and from
    # keeping them after all.
    x, inverse_rms, weight, gradient = jax.lax.optimization_barrier(
        (x, inverse_rms, weight, gradient)
    )
    y_int, y_scale = quantize_activations(_normalized(x, inverse_rms, norm_scale))
    w_int, w_scale = quantize_weights(weight)
    dtype, axes = gradient.dtype, tuple(range(x.ndim - 1))
    quantized = (y_int * y_scale).astype(dtype)
    d_weight = jax.lax.dot_general(
        quantized, gradient, ((axes, axes), ((), ())), preferred_element_type=jnp.float32
    )
    d_y = (
        jax.lax.dot_general(
            gradient,
            w_int.astype(dtype),
            (((x.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        * w_scale
    )
    unit = x.astype(jnp.float32) * inverse_rms
    d_scale = (d_y * unit).sum(axes)
    d_unit = d_y * norm_scale
    d_x = inverse_rms * (d_unit - unit * (d_unit * unit).mean(-1, keepdims=True))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype), d_scale.astype(norm_scale.dtype)


_bit_linear.defvjp(_bit_linear_forward, _bit_linear_backward)


def pack_ternary(w_int: Array) -> Array:
    """Ternary (I, O) -> uint8 (ceil(I / 4), O), four weights a byte.

    Byte [k, o] holds weights [4 k + j, o] for j = 0..3 in its bits 2 j and 2 j + 1, as weight + 1:
    0, 1 or 2. Rows past the end are weights of 0. Takes numpy arrays (and then works on the host)
    or JAX arrays.

    Raises:
      InputError: not two-dimensional, or another value than -1, 0, 1; while it is traced, where
        values aren't known, others count as the nearest of these.
    """
    if w_int.ndim != 2:
        raise InputError(
            f"pack_ternary: expected a matrix (inputs, outputs), found shape {list(w_int.shape)}."
        )
    xp: Any = np if isinstance(w_int, np.ndarray) else jnp
    if isinstance(w_int, Tracer):
        w_int = jnp.clip(w_int, -1, 1)
    elif w_int.size and not xp.isin(w_int, xp.asarray((-1, 0, 1), w_int.dtype)).all():
        raise InputError(
            f"pack_ternary: expected weights of -1, 0 and 1, found {w_int.min()} to {w_int.max()}; "
            "quantize_weights makes them."
        )
    spare = -w_int.shape[0] % WEIGHTS_PER_BYTE
    codes = xp.pad(w_int + 1, ((0, spare), (0, 0)), constant_values=1).astype(xp.uint8)
    codes = codes.reshape(codes.shape[0] // WEIGHTS_PER_BYTE, WEIGHTS_PER_BYTE, w_int.shape[1])
    return codes[:, 0] | (codes[:, 1] << 2) | (codes[:, 2] << 4) | (codes[:, 3] << 6)


def unpack_ternary(packed: Array, num_inputs: int | None = None) -> Array:
    """The inverse of `pack_ternary`: uint8 (ceil(I / 4), O) -> int8 (I, O). num_inputs: I; None for
    four times the rows.

    Raises:
      InputError: packed is no matrix, doesn't hold that many inputs, or (where its values are
        known) holds something that is no ternary weight.
    """
    if packed.ndim != 2:
        raise InputError(
            f"unpack_ternary: expected bytes (inputs / 4, outputs), found {list(packed.shape)}."
        )
    rows, outputs = packed.shape
    num_inputs = rows * WEIGHTS_PER_BYTE if num_inputs is None else num_inputs
    if -(-num_inputs // WEIGHTS_PER_BYTE) != rows:
        raise InputError(
            f"unpack_ternary: {num_inputs} inputs take {-(-num_inputs // WEIGHTS_PER_BYTE)} rows "
            f"of bytes, found {rows}."
        )
    if not isinstance(packed, Tracer) and (packed & (packed >> 1) & 0b01010101).any():
        raise InputError(
            "unpack_ternary: expected bytes of pack_ternary, found the code 3, which is no weight; "
            "is the file damaged?"
        )
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    codes = (packed[:, None, :] >> xp.arange(0, 8, 2, dtype=xp.uint8)[None, :, None]) & 3
    return (codes.astype(xp.int8) - 1).reshape(rows * WEIGHTS_PER_BYTE, outputs)[:num_inputs]


def packed_matmul(x_int8: Array, packed: Array, scale: Array | float = 1.0) -> Array:
    """int8 (..., I) @ packed ternary (ceil(I / 4), O), times a scale: float32 (..., O). The sums
    are exact.

    The unpacked matrix never exists: a single token adds up the bytes' codes, more tokens multiply
      by tiles of columns unpacked one after another.

    Raises:
      InputError: the shapes don't belong together.
    """
    num_inputs, (rows, outputs) = x_int8.shape[-1], packed.shape
    if -(-num_inputs // WEIGHTS_PER_BYTE) != rows:
        raise InputError(
            f"packed_matmul: activations of {num_inputs} inputs need "
            f"{-(-num_inputs // WEIGHTS_PER_BYTE)} rows of packed weights, found {rows}."
        )
    lead = x_int8.shape[:-1]
    if not rows or not outputs:
        return jnp.zeros((*lead, outputs), jnp.float32) * scale
    x = x_int8.reshape(math.prod(lead), num_inputs)
    tokens = x.shape[0]
    product = (
        _product_by_tiles if jax.export.is_symbolic_dim(tokens) or tokens > 1 else _product_of_one
    )
    return product(x, packed).reshape(*lead, outputs) * scale


def _product_of_one(x: Array, packed: Array) -> Array:
    rows = packed.shape[0]
    if not len(x):
        return jnp.zeros((0, packed.shape[1]), jnp.float32)
    quads = jnp.pad(x[0].astype(jnp.int32), (0, rows * WEIGHTS_PER_BYTE - x.shape[1])).reshape(
        rows, WEIGHTS_PER_BYTE
    )
    total = jax.lax.platform_dependent(quads, packed, cpu=_sum_by_rows, default=_sum_of_codes)
    return (total - quads.sum())[None].astype(jnp.float32)


def _sum_of_codes(quads: Array, packed: Array) -> Array:
    """The sum of quads (K, 4) int32 times the codes 0, 1, 2 of packed (K, O): (O,) int32."""
    codes = packed.astype(jnp.int32)
    return sum(
        (quads[:, j, None] * ((codes >> (2 * j)) & 3) for j in range(WEIGHTS_PER_BYTE)),
        jnp.int32(0),
    ).sum(0)


def _sum_by_rows(quads: Array, packed: Array) -> Array:
    """The same a few rows at a time: XLA on a CPU would write the whole of `codes` to memory first
    (measured: 4 times slower).
    """
    tile = max(1, min(packed.shape[0], _TILE_BYTES // max(1, packed.shape[1])))
    count = packed.shape[0] // tile

    def add(total: Array, i: Array) -> tuple[Array, None]:
        piece = (jax.lax.dynamic_slice_in_dim(a, i * tile, tile, 0) for a in (quads, packed))
        return total + _sum_of_codes(*piece), None

    total, _ = jax.lax.scan(add, jnp.zeros(packed.shape[1], jnp.int32), jnp.arange(count))
    return total + _sum_of_codes(quads[count * tile :], packed[count * tile :])


def _product_by_tiles(x: Array, packed: Array) -> Array:
    outputs = packed.shape[1]
    columns = max(1, min(outputs, _TILE_BYTES // max(1, x.shape[1])))
    count = -(-outputs // columns)

    def tile(i: Array) -> Array:
        # The last tile begins early enough to be whole.
        piece = jax.lax.dynamic_slice_in_dim(
            packed, jnp.minimum(i * columns, outputs - columns), columns, 1
        )
        return int_matmul(x, unpack_ternary(piece, x.shape[1]))

    tiles = jax.lax.map(tile, jnp.arange(count))  # (N, T, columns)
    whole = tiles[:-1].transpose(1, 0, 2).reshape(x.shape[0], (count - 1) * columns)
    return jnp.concatenate([whole, tiles[-1][:, count * columns - outputs :]], 1)
