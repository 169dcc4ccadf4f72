"""What follows the last look-up layer: group sums, conditional sums, and the spectral penalty on
tables.

Dimensions: L bits, d outputs, n inputs a table.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float, Int8, Shaped

from quweit_jax.errors import InputError
from quweit_jax.ops.int64 import INT32_MAX


def _summable(vectors: ArrayLike) -> Array:
    """Vectors (L, ...) as they are summed over L: real ones as they are, whole ones in int32.

    Raises:
      InputError: int32 cannot hold the sum of whole ones: for their number, or (of 32 bits and
        more, where they are known) for their values.
    """
    if jnp.issubdtype(jnp.result_type(vectors), jnp.inexact):
        return jnp.asarray(vectors)
    known = None if isinstance(vectors, Tracer) else np.asarray(vectors)
    dtype = np.dtype(jnp.result_type(vectors) if known is None else known.dtype)
    length, largest = np.shape(vectors)[:1], 1
    if dtype.itemsize < 4 and dtype.kind in "iu":
        largest = max(-int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    total = largest * (length[0] if length else 1)
    if dtype.itemsize >= 4 and known is not None and known.size:
        total = np.abs(known.astype(np.float64)).sum(0).max()
    if total > INT32_MAX:
        raise InputError(
            f"conditional_sum: expected whole vectors whose sums int32 holds, at most "
            f"{INT32_MAX:,}, found {dtype}{list(np.shape(vectors))} with sums of up to "
            f"{int(total):,}; give floats."
        )
    return jnp.asarray(vectors).astype(jnp.int32)


def _real(x: ArrayLike) -> Array:
    """Numbers in float32 at least, which has room for their sums."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def group_sum(
    bits: Shaped[ArrayLike, "*tokens L"], num_groups: int, *, tau: float = 1.0
) -> Float[Array, "*tokens groups"]:
    """Sums contiguous groups of bits (zero-padded to a whole number of groups) and divides by tau:
    (..., L) -> (..., num_groups), float32 of whole numbers, else in the bits' dtype.

    Raises:
      InputError: no groups, or a tau that nothing can be divided by.
    """
    bits = jnp.asarray(bits)
    if num_groups < 1 or bits.ndim < 1:
        raise InputError(
            f"group_sum: expected bits (..., L) and num_groups >= 1, found {list(bits.shape)} and "
            f"{num_groups}."
        )
    if not float(np.finfo(np.float32).tiny) <= tau < math.inf:
        raise InputError(
            f"group_sum: tau is a temperature and must be positive and finite, found {tau}."
        )
    size = -(-bits.shape[-1] // num_groups)
    padded = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, size * num_groups - bits.shape[-1])])
    wide = jnp.promote_types(bits.dtype, jnp.float32)
    dtype = bits.dtype if jnp.issubdtype(bits.dtype, jnp.floating) else wide
    total = padded.reshape(*bits.shape[:-1], num_groups, size).sum(-1, dtype=wide)
    return (total / tau).astype(dtype)


def conditional_sum(
    bits: Shaped[ArrayLike, "*tokens L"],
    vectors: Float[ArrayLike, "L d"] | Float[ArrayLike, " L"],
    bias: Float[ArrayLike, " d"] | None = None,
) -> Float[Array, "*tokens d"]:
    """`bias + sum_i bits_i * vectors_i`: each vector is added only where its bit is set (arXiv
    2411.01818).

    Args:
      bits: (..., L) in {0, 1} (or -1/+1: the same family, the constant folded into the bias).
      vectors: (L, d), dense: every bit adds a vector; or (L,), grouped: bit i serves output i // (L
        / d) alone.
      bias: (d,); may be None for dense vectors.

    Returns:
      (..., d) in the vectors' dtype; of whole numbers in int32, with a real bias in its dtype.

    Raises:
      InputError: shapes that do not fit, or whole vectors whose sums int32 may not hold.
    """
    bits, vectors = jnp.asarray(bits), _summable(vectors)
    if bits.ndim < 1 or vectors.ndim not in (1, 2) or bits.shape[-1] != vectors.shape[0]:
        raise InputError(
            "conditional_sum: expected bits (..., L) with vectors (L, d), or (L,) for the grouped "
            f"form; found {list(bits.shape)} and {list(vectors.shape)}."
        )
    if vectors.ndim == 1 and bias is None:
        raise InputError(
            "conditional_sum: grouped vectors (L,) need a bias (d,), which tells the number of "
            "outputs; pass jnp.zeros(d)."
        )
    bias = None if bias is None else jnp.asarray(bias)
    bits = bits.astype(vectors.dtype)
    if vectors.ndim == 2:
        if bias is not None and bias.shape != vectors.shape[1:]:
            raise InputError(
                f"conditional_sum: bias must be {list(vectors.shape[1:])} for vectors "
                f"{list(vectors.shape)}, found {list(bias.shape)}."
            )
        total = bits @ vectors
    else:
        assert bias is not None
        if bias.ndim != 1 or not bias.shape[0] or vectors.shape[0] % bias.shape[0]:
            raise InputError(
                f"conditional_sum: {vectors.shape[0]} grouped bits cannot be shared equally by the "
                f"{list(bias.shape)} outputs of the bias."
            )
        each = vectors.shape[0] // bias.shape[0]
        total = (bits * vectors).reshape(*bits.shape[:-1], bias.shape[0], each).sum(-1)
    if bias is None:
        return total
    whole = jnp.issubdtype(total.dtype, jnp.integer) and jnp.issubdtype(bias.dtype, jnp.inexact)
    return total + (bias if whole else bias.astype(total.dtype))


def conditional_sum_feature_major(
    bits_LT: Shaped[Array, "L T"], vectors: Float[Array, "L d"]
) -> Float[Array, "T d"]:
    """The dense `conditional_sum` without bias for bits that are (L, T): returns (T, d)."""
    vectors = _summable(vectors)
    return jnp.einsum("lt,ld->td", bits_LT.astype(vectors.dtype), vectors)


def walsh_hadamard(tables: Float[Array, "*L A"]) -> Float[Array, "*L A"]:
    """Walsh-Hadamard coefficients `2**-n sum_a tables[..., a] (-1)**popcount(a & s)`: same shape;
    bit l of s means input l takes part. Tables of whole numbers and half precision give float32.

    Raises:
      InputError: tables that are not (..., 2**n).
    """
    tables = _real(tables)
    _check_tables("walsh_hadamard", tables)
    size = tables.shape[-1]
    lead = tables.shape[:-1]
    for l in range(size.bit_length() - 1):
        pairs = tables.reshape(*lead, size >> (l + 1), 2, 1 << l)
        tables = jnp.stack(
            [pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2
        ).reshape(*lead, size)
    return tables / size


def _check_tables(name: str, tables: Array) -> int:
    """A = 2**n; raises InputError if the tables have another number of entries."""
    size = tables.shape[-1] if tables.ndim else 0
    if size < 1 or size & (size - 1):
        raise InputError(f"{name}: tables must be (..., 2**n), found {list(tables.shape)}.")
    return size


def spectral_penalty(
    tables: Float[ArrayLike, "*L A"], degree_weights: Float[ArrayLike, " degrees"] | None = None
) -> Float[Array, ""]:
    """Squared norm of the tables' Walsh-Hadamard coefficients, optionally weighted by degree (how
    many inputs take part).

    Without weights it is `sum(tables**2) / 2**n` (Parseval). degree_weights: (n + 1,), one for each
    degree 0..n. Returns a scalar.
    """
    tables = _real(tables)
    size = _check_tables("spectral_penalty", tables)
    if degree_weights is None:
        return jnp.sum(jnp.square(tables)) / size
    degrees = np.bitwise_count(np.arange(size, dtype=np.uint32))
    weights = jnp.asarray(degree_weights, tables.dtype)
    if weights.shape != (int(degrees.max()) + 1,):
        raise InputError(
            f"spectral_penalty: expected {int(degrees.max()) + 1} degree weights (0..n) for tables "
            f"of {size} entries, found {list(weights.shape)}."
        )
    return jnp.sum(weights[degrees] * jnp.square(walsh_hadamard(tables)))


def fake_quantize_int8(
    x: Float[Array, "*shape"], axis: int | tuple[int, ...]
) -> Float[Array, "*shape"]:
    """Rounds to the values int8 can hold with one scale per slice over `axis` (max|x| / 127);
    straight-through gradient.
    """
    x = jnp.asarray(x)
    real = _real(x)
    quantized, scale = quantize_int8(real, axis)
    fake = real + jax.lax.stop_gradient(quantized.astype(real.dtype) * scale - real)
    return fake.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else fake


def quantize_int8(
    x: Float[Array, "*shape"], axis: int | tuple[int, ...]
) -> tuple[Int8[Array, "*shape"], Float[Array, "..."]]:
    """Symmetric int8: (int8 values, scales with `axis` kept as size 1, float32 of half precision,
    which has too few steps for them, else in x's dtype); an all-zero slice has scale 1 / 127.
    """
    x = _real(x)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0)
    scale = jnp.where(largest > 0, largest, 1.0) / 127.0
    return jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8), scale
