"""I-ViT's functions as its program has them: integers or floats in, (results, their scale) out.

Composed of what `ops.integer` offers, for the golden cases and the tests of gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from quweit_jax.errors import InputError
from quweit_jax.ops import integer, integer_norm


def int_linear(
    x_int: Array, scale: Array, weight: Array, bias: Array | None = None, *, bits: int = 8
) -> tuple[Array, Array]:
    """A linear layer on integers: x_int @ quantized weight + quantized bias.

    Args:
      x_int: (..., I), integers of an integer or a floating dtype. scale: theirs, one number (or
        shape (1,)).
      weight: (I, O) float, quantized here to `bits` with a scale an output. bias: (O,) float,
        quantized to int32 at scale * weight scale.

    Returns:
      (out (..., O), out_scale (O,)): int32, or for floating x_int the real values with gradients to
      x_int, weight and bias.
    """
    weight_int, weight_scale = integer.quantize_weights(weight, bits=bits)
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
    out_scale = weight_scale * scale
    total = integer.matmul_units(
        x_int if integer.is_integer(x_int) else jnp.round(jax.lax.stop_gradient(x_int)), weight_int
    )
    if bias is not None:
        total = total + integer.quantize_bias(bias, out_scale)

    def shadow() -> Array:
        return jnp.matmul(
            x_int * scale, integer.straight_through(weight_int * weight_scale, weight)
        ) + (0.0 if bias is None else bias)

    return _out(x_int, total, out_scale, shadow)


def shiftmax(x_int: Array, scale: Array, *, bits: int = 16) -> tuple[Array, Array]:
    """Softmax over the last axis in integers (I-ViT, equations 8 to 10).

    Args:
      x_int: (..., d), integers of an integer or a floating dtype. scale: theirs. bits: of the
        result, 2 to 31.

    Returns:
      (out (..., d), out_scale = 2**-(bits-1)): int32, or for floating x_int the real probabilities
      with softmax's gradient.
    """
    if not 2 <= bits <= 31:
        raise InputError(f"shiftmax: bits must be 2 to 31, found {bits}.")
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
    out_scale = jnp.full((1,), 2.0 ** (1 - bits))
    out = integer.shiftmax_units(
        _published_grid(x_int, scale), integer.inverse_scale(scale), bits=bits
    )
    return _out(x_int, out, out_scale, lambda: jax.nn.softmax(x_int * scale, axis=-1))


def shift_gelu(x_int: Array, scale: Array) -> tuple[Array, Array]:
    """x * sigmoid(1.702 x) in integers, the sigmoid from two shift-exponentials taken from the
    largest x of the last axis (I-ViT, equation 12).

    Args:
      x_int: (..., d), integers of an integer or a floating dtype, 8-bit in I-ViT. scale: theirs.

    Returns:
      (out (..., d), out_scale = scale / 128): int32, or for floating x_int the real values with the
      function's gradient.
    """
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
    out_scale = jnp.reshape(scale * 2.0 ** (1 - integer.GELU_BITS), (-1,))
    out = integer.shift_gelu_units(
        _published_grid(x_int, scale), integer.inverse_scale(scale * integer.GELU_SLOPE)
    )
    return _out(x_int, out, out_scale, lambda: integer.gelu_shadow(x_int * scale))


def int_layer_norm(x_int: Array, scale: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """LayerNorm over the last axis in integers; the square root by ten Newton steps from 2**16
    (I-ViT, equation 13).

    Args:
      x_int: (..., d), |x_int| < 2**16, integers of an integer or a floating dtype. scale: theirs,
        one number: it only matters to gradients.
      weight, bias: (d,) float.

    Returns:
      (out (..., d), out_scale (d,) = sqrt(d) / 2**30 * weight): int32, or for floating x_int the
      real values with gradients to x_int, weight and bias (the reference program's bias gets none).
    """
    bias_int, halvings, out_scale = integer_norm.layer_norm_constants(weight, bias)
    out = integer_norm.layer_norm_units(_as_int(x_int), bias_int, halvings)
    return _out(
        x_int,
        out,
        out_scale,
        lambda: integer_norm.layer_norm_shadow(x_int * jax.lax.stop_gradient(scale), weight, bias),
    )


def requantize(
    x: Array,
    scale_in: Array,
    scale_out: Array,
    *,
    bits: int,
    identity: Array | None = None,
    identity_scale: Array | None = None,
) -> Array:
    """To another scale by an integer multiplication and a shift: round(x_int * M / 2**e), each
    branch rounded by itself, added, clamped.

    Args:
      x: int32, or floating real values on the grid of scale_in. scale_in: one number or one a
        feature, of either sign.
      scale_out: one number. bits: of the result, clamped to [-2**(bits-1), 2**(bits-1) - 1].
      identity, identity_scale: a second branch of the same kind (a residual connection).

    Returns:
      int32, or for floating x the real values on the grid of scale_out, with the identity's
      gradient inside the clamp and 0 outside.

    M / 2**e is the ratio of the scales to 31 bits and the product is exact in 64 (I-ViT's dyadic
    numbers; no float64 is needed).
    """
    if (identity is None) != (identity_scale is None):
        raise InputError(
            "requantize: identity and identity_scale belong together; give both or neither."
        )
    scale_in, scale_out = (
        jnp.asarray(scale_in, jnp.float32),
        jax.lax.stop_gradient(jnp.asarray(scale_out, jnp.float32)),
    )
    branches = [(x, scale_in)] + (
        [] if identity is None else [(identity, jnp.asarray(identity_scale, jnp.float32))]
    )
    out = integer.requantize_units(
        [(_as_int(v if integer.is_integer(v) else v / scale), scale) for v, scale in branches],
        scale_out,
        bits,
    )
    return (
        out
        if integer.is_integer(x)
        else integer.straight_through(
            out * scale_out,
            integer.clip_shadow(x if identity is None else x + identity, scale_out, bits),
        )
    )


def _published_grid(x_int: Array, scale: Array) -> Array:
    """Integers as they are; of floats, x / scale for the real x = x_int * scale, each rounded to
    float32 as the published program does.
    """
    if integer.is_integer(x_int):
        return x_int.astype(jnp.int32)
    return integer.published_grid(x_int, scale)


def _out(
    x_int: Array, out: Array, out_scale: Array, shadow: Callable[[], Array]
) -> tuple[Array, Array]:
    """Integers for integers; for floats the real values, with the gradient of `shadow`."""
    return (
        (out, out_scale)
        if integer.is_integer(x_int)
        else (integer.straight_through(out * out_scale, shadow()), out_scale)
    )


def _as_int(x: Array) -> Array:
    return (
        x.astype(jnp.int32)
        if integer.is_integer(x)
        else jnp.round(jax.lax.stop_gradient(x)).astype(jnp.int32)
    )
