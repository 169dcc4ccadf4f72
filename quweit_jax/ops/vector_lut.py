"""Look-up tables whose entries are vectors: n bits address one vector of d, and the vectors that
all tables give are added.

The gradient to a bit is exact: what the sum would be with the bit set, less what it would be
without, along the gradient that arrives.

Dimensions: L tables, n bits a table, A = 2**n entries, T tokens, d outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int8, Int32, Shaped

from quweit_jax.errors import InputError
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.native import calls, library
from quweit_jax.ops.kernels.packed_sums import add_rows


def vector_lookup(
    bits: Float[Array, "L n T"], vectors: Float[Array, "L A d"]
) -> Float[Array, "T d"]:
    """`sum_j vectors[j, address of bits[j]]`, bit 0 the least significant.

    Args:
      bits: 0 or 1.

    Raises:
      InputError: the shapes do not belong together.
    """
    _check(bits, vectors)
    return _lookup(bits, vectors)


def _check(bits: Array, vectors: Array) -> None:
    fits = bits.ndim == 3 and vectors.ndim == 3 and bits.shape[0] == vectors.shape[0]
    if not fits or vectors.shape[1] != 2 ** bits.shape[1]:
        raise InputError(
            "vector_lookup: expected bits (L, n, T) and vectors (L, 2**n, d), found "
            f"{list(bits.shape)} and {list(vectors.shape)}."
        )


def addresses(bits: Shaped[Array, "L n T"]) -> Int[Array, "L T"]:
    """The entry that each table's bits spell."""
    places = jnp.left_shift(1, jnp.arange(bits.shape[1], dtype=jnp.int32))
    return (bits.astype(jnp.int32) * places[:, None]).sum(1)


def _chosen(bits: Array, vectors: Array) -> Array:
    """1 at the entry that is read, 0 at the others: (L, A, T)."""
    entries = jnp.arange(vectors.shape[1], dtype=jnp.int32)
    return (addresses(bits)[:, None] == entries[:, None]).astype(vectors.dtype)


@jax.custom_vjp
def _lookup(bits: Array, vectors: Array) -> Array:
    return jnp.einsum("lat,lad->td", _chosen(bits, vectors), vectors)


def _lookup_forward(bits: Array, vectors: Array) -> tuple[Array, tuple[Array, Array]]:
    return _lookup(bits, vectors), (bits, vectors)


def _lookup_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    bits, vectors = kept
    chosen = _chosen(bits, vectors)
    along = jnp.einsum("lad,td->lat", vectors, gradient)  # of each entry, with the gradient
    here, entries = (along * chosen).sum(1), jnp.arange(vectors.shape[1])
    slopes = []
    for l in range(bits.shape[1]):
        there = (along[:, entries ^ (1 << l)] * chosen).sum(1)
        slopes.append(jnp.where(bits[:, l] > 0, here - there, there - here))
    to_vectors = jnp.einsum("lat,td->lad", chosen, gradient)
    return jnp.stack(slopes, 1).astype(bits.dtype), to_vectors.astype(vectors.dtype)


_lookup.defvjp(_lookup_forward, _lookup_backward)


def packed_vector_lookup(
    bits: Shaped[Array, "L n T"],
    vectors: Int8[Array, "L A d"],
    *,
    implementation: str | None = None,
) -> Int32[Array, "T d"]:
    """`vector_lookup` of int8 vectors, added in int32: one row read a table and token.

    implementation: None, 'native' (for tables of at most 8 bits), 'xla' or 'reference', see
      `ops.kernels`.

    Raises:
      InputError: the shapes do not belong together, or there is no such implementation here.
    """
    _check(bits, vectors)
    if vectors.dtype != jnp.int8:
        raise InputError(
            f"packed_vector_lookup: expected vectors in int8, found {vectors.dtype}; "
            "sums.quantize_int8 makes them."
        )

    def hindrance(at: str) -> str | None:
        return "needs tables of at most 8 bits" if bits.shape[1] > 8 else library.hindrance(at)

    chosen = choice.choose("packed_vector_lookup", implementation, choice.with_native(hindrance))
    if chosen == "native":
        return calls.vector_sums(addresses(bits).astype(jnp.uint8).T, vectors)
    if chosen == "xla":
        return add_rows(vectors, addresses(bits))

    def add(total: Array, table: tuple[Array, Array]) -> tuple[Array, None]:
        address_T, vectors_Ad = table
        return total + vectors_Ad[address_T].astype(jnp.int32), None

    start = jnp.zeros((bits.shape[2], vectors.shape[2]), jnp.int32)
    return jax.lax.scan(add, start, (addresses(bits), vectors))[0]
