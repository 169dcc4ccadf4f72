"""Sums of int8 vectors over set bits, in three ways that give the same integers.

Dimensions: L bits, T tokens, W = ceil(T / 32) words, d features, G groups of g bits, S = 2**g
subsets of a group.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int8, Int32, Shaped, UInt32

WORD = 32
# Vectors added in one pass over the sums: measured 30 times faster on CPU than one reduction over
# all of them.
_CHUNK = 32
# Groups whose subsets are added in one pass. XLA on a CPU makes vector code of 16 and more reads
# in one loop, and none of 12 and fewer (measured, 6 times slower).
_READS = 16
# Sums of 16 groups of at most 6 int8 numbers stay below 2**15.
_PARTIAL = jnp.int16
_FEW, _MANY = 4, 6
_MANY_TOKENS = 1024
_WORTH_TOKENS = 16


def select_and_add(bits_LT: Bool[Array, "L T"], vectors: Int8[Array, "L d"]) -> Int32[Array, "T d"]:
    """One vector after another, selected and added."""
    count = bits_LT.shape[0]
    chunks = -(-count // _CHUNK)
    bits, vectors = (
        jnp.pad(x, ((0, chunks * _CHUNK - count), (0, 0))).reshape(chunks, _CHUNK, x.shape[1])
        for x in (bits_LT, vectors)
    )

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        for bit_T, vector_d in zip(*chunk):
            total = total + jnp.where(bit_T[:, None], vector_d[None, :].astype(jnp.int32), 0)
        return total, None

    return jax.lax.scan(
        add, jnp.zeros((bits_LT.shape[1], vectors.shape[2]), jnp.int32), (bits, vectors)
    )[0]


def product_of_bits(
    bits_LT: Bool[Array, "L T"], vectors: Int8[Array, "L d"]
) -> Int32[Array, "T d"]:
    """A product of int8 matrices, for matrix units."""
    contract = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(
        bits_LT.astype(jnp.int8), vectors, contract, preferred_element_type=jnp.int32
    )


def worth_subsets(tokens: Any) -> bool:
    """Whether there are enough tokens to make tables of subsets for; tokens: a number or a name."""
    return jax.export.is_symbolic_dim(tokens) or tokens >= _WORTH_TOKENS


def subset_sums(
    words: UInt32[Array, "L W"], vectors: Int8[Array, "L d"], tokens: Any
) -> Int32[Array, "T d"]:
    """Makes the sum of every subset of a few vectors, then reads and adds one row a group and
    token.

    Args:
      words: as in `packed_lut.Bits`. tokens: T, a number or its name.
    """
    many = not jax.export.is_symbolic_dim(tokens) and tokens >= _MANY_TOKENS
    size = _MANY if many else _FEW
    end = -words.shape[0] % size
    words, vectors = (jnp.pad(x, ((0, end), (0, 0))) for x in (words, vectors))
    subsets = _subsets(vectors.reshape(-1, size, vectors.shape[1]).astype(_PARTIAL))
    return add_rows(subsets, _chosen(words.reshape(-1, size, words.shape[1]), tokens))


def add_rows(rows: Shaped[Array, "G S d"], chosen: Int32[Array, "G T"]) -> Int32[Array, "T d"]:
    """`sum_g rows[g, chosen[g]]` in int32, for rows of whole numbers of which 16 add up to less
    than 2**15.
    """
    end = -rows.shape[0] % _READS
    rows = jnp.pad(rows, ((0, end), (0, 0), (0, 0)))
    chosen = jnp.pad(chosen, ((0, end), (0, 0)))

    def add(total: Array, groups: tuple[Array, Array]) -> tuple[Array, None]:
        read = [r.at[c].get(mode="promise_in_bounds").astype(_PARTIAL) for r, c in zip(*groups)]
        return total + functools.reduce(jnp.add, read).astype(jnp.int32), None

    start = jnp.zeros((chosen.shape[1], rows.shape[2]), jnp.int32)
    count = rows.shape[0] // _READS  # not -1: there may be no tokens
    passes = (
        rows.reshape(count, _READS, *rows.shape[1:]),
        chosen.reshape(count, _READS, chosen.shape[1]),
    )
    return jax.lax.scan(add, start, passes)[0]


def _subsets(vectors: Array) -> Array:
    """(G, g, d) -> (G, S, d): the sum of the vectors whose bit is set in the subset's number."""
    sums = jnp.zeros_like(vectors[:, :1])
    for i in range(vectors.shape[1]):
        sums = jnp.concatenate([sums, sums + vectors[:, i : i + 1]], axis=1)
    return sums


def _chosen(words: Array, tokens: Any) -> Array:
    """Each token's subset of each group: words (G, g, W) -> int32 (G, T)."""

    def of(k: int) -> Array:
        number = (words[:, 0] >> k) & 1
        for i in range(1, words.shape[1]):
            number = number | (((words[:, i] >> k) & 1) << i)
        return number

    return jnp.concatenate([of(k) for k in range(WORD)], axis=1)[:, :tokens].astype(jnp.int32)
