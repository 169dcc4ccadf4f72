"""Look-up tables as deployed: one bit an entry, bits in and bits out.

Bits stay packed, 32 tokens a word (`Bits`), from the comparisons that make them to the sums that
count them: a table is then a tree of multiplexers over words, and no address is ever made.

Dimensions: F input bits, L tables, n inputs a table, A = 2**n entries, T tokens, W = ceil(T / 32)
words, d features.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Int, Int8, Int32, Integer, Real, Shaped, UInt8, UInt32

from quweit_jax.errors import InputError
from quweit_jax.ops.fusion import no_fusion
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.choice import Hindrance, anywhere, choose
from quweit_jax.ops.kernels.packed_sums import (
    product_of_bits,
    select_and_add,
    subset_sums,
    worth_subsets,
)

WORD = 32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["tokens"])
@dataclasses.dataclass(frozen=True)
class Bits:
    """Bits (F, T), 32 tokens a word.

    words: uint32 (F, W); token t is bit t // W of word t % W, so that packing and unpacking move
    whole rows. What lies past the last token is undefined. tokens: T, a number or its name.
    """

    words: UInt32[Array, "F W"]
    tokens: Any

    @property
    def shape(self) -> tuple[int, Any]:
        """(F, T)."""
        return self.words.shape[0], self.tokens

    def unpack(self) -> Bool[Array, "F T"]:
        """The bits themselves: bool (F, T)."""
        if not self.words.size:
            return jnp.zeros(self.shape, bool)
        return no_fusion(lambda words: _unpack(words, self.tokens), self.words)


def _unpack(words: Array, tokens: Any) -> Array:
    rows = [((words >> k) & 1).astype(bool) for k in range(WORD)]
    return jnp.concatenate(rows, axis=1)[:, :tokens]


def pack_bits(bits_FT: Shaped[Array, "F T"]) -> Bits:
    """Packs bits (F, T), bool or 0/1."""
    features, tokens = bits_FT.shape
    bits_FT = bits_FT if bits_FT.dtype == bool else bits_FT != 0
    if not bits_FT.size:
        return Bits(jnp.zeros((features, -(-tokens // WORD)), jnp.uint32), tokens)
    return Bits(no_fusion(_pack, bits_FT), tokens)


def _pack(bits_FT: Array) -> Array:
    words = _words_of(bits_FT)
    packed = words[:, 0].astype(jnp.uint32)
    for k in range(1, WORD):
        packed = packed | (words[:, k].astype(jnp.uint32) << k)
    return packed


def _words_of(x_FT: Array) -> Array:
    """(F, T) as (F, 32, W): what of each token goes to which bit of which word."""
    features, tokens = x_FT.shape
    words = -(-tokens // WORD)
    past_the_end: Any = words * WORD - tokens  # a number, or an expression in the name of one
    return jnp.pad(x_FT, ((0, 0), (0, past_the_end))).reshape(features, WORD, words)


def pack_above(
    x_DT: Real[Array, "D T"], thresholds: Real[Array, "#D z"] | Real[Array, " z"]
) -> Bits:
    """Packed thermometer bits, `x > threshold`: x (D, T) and thresholds (D, z), or (1, z) or
    (z,) for all D, -> (D * z, T). Floats are compared in float32.
    """
    thresholds = thresholds[None] if thresholds.ndim == 1 else thresholds
    (width, tokens), steps = x_DT.shape, thresholds.shape[1]
    if not (x_DT.size and steps):
        return Bits(jnp.zeros((width * steps, -(-tokens // WORD)), jnp.uint32), tokens)
    if not jnp.issubdtype(x_DT.dtype, jnp.floating):
        return Bits(no_fusion(_compare, x_DT, thresholds), tokens)

    def compare(pattern: Array, thresholds: Array) -> Array:
        return _compare(jax.lax.bitcast_convert_type(pattern, jnp.float32), thresholds)

    # what `no_fusion` branches on is a whole number
    pattern = jax.lax.bitcast_convert_type(x_DT.astype(jnp.float32), jnp.int32)
    return Bits(no_fusion(compare, pattern, thresholds), tokens)


def _compare(x_DT: Array, thresholds: Array) -> Array:
    words = _words_of(x_DT)[:, None]  # (D, 1, 32, W)
    packed = jnp.uint32(0)
    for k in range(WORD):
        packed = packed | ((words[:, :, k] > thresholds[:, :, None]).astype(jnp.uint32) << k)
    return packed.reshape(x_DT.shape[0] * thresholds.shape[1], words.shape[-1])


def pack_tables(tables: Shaped[ArrayLike, "L A"]) -> UInt8[Array, "L bytes"]:
    """Packs the signs of tables (L, A), 8 entries a byte, entry 0 in the lowest bit: uint8 (L,
    ceil(A / 8)).

    Raises:
      InputError: A is no power of two.
    """
    shape = np.shape(tables)
    if len(shape) != 2 or shape[1] < 1 or shape[1] & (shape[1] - 1):
        raise InputError(f"pack_tables: expected tables (L, 2**n), found {list(shape)}.")
    return jnp.packbits(jnp.asarray(tables) > 0, axis=1, bitorder="little")


def read_packed(packed: UInt8[Array, "L bytes"], address: Int[Array, "L T"]) -> Bool[Array, "L T"]:
    """Reads entry address[j, t] of packed table j: bool (L, T)."""
    byte = jnp.take_along_axis(packed, address >> 3, axis=1, mode="clip")
    return ((byte >> (address & 7).astype(jnp.uint8)) & 1).astype(bool)


def look_up(
    bits_FT: Shaped[Array, "F T"],
    wiring: Integer[ArrayLike, "L n"],
    packed: UInt8[ArrayLike, "L bytes"],
    *,
    implementation: str | None = None,
) -> Bool[Array, "L T"]:
    """Bits (F, T), bool or 0/1, through tables `packed` that read inputs `wiring` (L, n): bool (L,
    T).

    Args:
      implementation: 'xla' and 'pallas' (kernels for TPUs and GPUs) pack the bits and unpack what
        comes out, 'reference' reads the table at an address for every token; see `ops.kernels`.

    Raises:
      InputError: tables that read nothing, or read bits that aren't there.
    """
    _check("look_up", bits_FT.shape, jnp.shape(wiring))
    if implementation != "reference":
        bits = pack_bits(bits_FT)
        return look_up_words(bits, wiring, packed, implementation=implementation).unpack()
    if not jnp.shape(wiring)[0]:
        return jnp.zeros((0, bits_FT.shape[1]), bool)
    return no_fusion(_read_tables, bits_FT, jnp.asarray(wiring, jnp.int32), jnp.asarray(packed))


def look_up_words(
    bits: Bits,
    wiring: Integer[ArrayLike, "L n"],
    packed: UInt8[ArrayLike, "L bytes"],
    *,
    implementation: str | None = None,
) -> Bits:
    """`look_up` of bits that are packed: the tables' bits (L, T), packed.

    Args:
      implementation: 'xla' or 'pallas' (kernels for TPUs and GPUs), see `ops.kernels`.

    Raises:
      InputError: see `look_up`; or an implementation that the platform lacks.
    """
    _check("look_up_words", bits.shape, jnp.shape(wiring))
    chosen = _choose(implementation, (*bits.words.shape, jnp.shape(wiring)[0]))
    if not jnp.shape(wiring)[0] or not bits.words.size:
        return Bits(jnp.zeros((jnp.shape(wiring)[0], bits.words.shape[1]), jnp.uint32), bits.tokens)
    wiring, packed = jnp.asarray(wiring, jnp.int32), jnp.asarray(packed)
    if chosen == "pallas":
        kernel = _kernel(choice.kernels_at())
        return Bits(kernel.look_up(bits.words, wiring, packed, choice.division()), bits.tokens)
    return Bits(no_fusion(_multiplex, bits.words, wiring, packed), bits.tokens)


def _choose(asked: str | None, sizes: tuple[Any, ...]) -> str:
    """How to look up F bits in L tables, W words: sizes (F, W, L). The kernels have not been timed:
    they are taken where they are asked for.
    """
    offered: dict[str, Hindrance] = {"xla": anywhere}
    if asked == "pallas":
        known = not any(map(jax.export.is_symbolic_dim, sizes))
        kernel = _kernel(choice.kernels_at())
        offered = {"pallas": kernel.hindrance(*sizes, known)} | offered
    return choose("packed_lut.look_up", asked, offered)


def _kernel(at: str) -> ModuleType:
    if at == "gpu":  # importing Pallas takes half a second
        from quweit_jax.ops.kernels.gpu import packed
    else:
        from quweit_jax.ops.kernels.tpu import packed
    return packed


def _check(function: str, bits: tuple[Any, ...], slots: tuple[int, ...]) -> None:
    if len(bits) != 2 or len(slots) != 2 or slots[1] < 1 or (slots[0] and not bits[0]):
        raise InputError(
            f"{function}: expected bits (F, T) and wiring (L, n), n >= 1, into them, found "
            f"{list(bits)} and {list(slots)}."
        )


def _read_tables(bits_FT: Array, wiring: Array, packed: Array) -> Array:
    wired = jnp.take(bits_FT.astype(jnp.int32), wiring, axis=0, mode="clip")
    address = wired[:, 0]
    for l in range(1, wired.shape[1]):
        address = address | (wired[:, l] << l)
    return read_packed(packed, address)


def _multiplex(words: Array, wiring: Array, packed: Array) -> Array:
    """A tree of multiplexers: each slot's words choose between halves of what is left."""
    lut_inputs = wiring.shape[1]
    # 0 or ~0 for every entry: 0 less its bit
    values = [
        (0 - ((packed[:, a >> 3] >> (a & 7)) & 1).astype(jnp.int32)).astype(jnp.uint32)[:, None]
        for a in range(2**lut_inputs)
    ]
    for l in range(lut_inputs):
        slot = jnp.take(words, wiring[:, l], axis=0, mode="clip")
        pairs = zip(values[::2], values[1::2])
        values = [zero ^ ((zero ^ one) & slot) for zero, one in pairs]
    return values[0]


def add_vectors(
    bits: Bits | Bool[Array, "L T"],
    vectors: Int8[Array, "L d"],
    *,
    by_product: bool = False,
    implementation: str | None = None,
) -> Int32[Array, "T d"]:
    """The sum of vectors[j] (int8, (L, d)) over the set bits (L, T), packed or bool: int32 (T, d).

    Args:
      by_product: elsewhere than on a CPU multiply by the bits, in int8, as matrix units do fast;
        else there is nothing but selecting, reading and adding.
      implementation: 'reference' adds a vector at a time; 'xla' adds, on a CPU, sums of the
        vectors of several bits, read from tables made of them (Arlazarov, Dinic, Kronrod &
        Faradzhev, 1970); see `ops.kernels`.
    """
    offered = {"xla": anywhere, "reference": anywhere}
    chosen = choose("packed_lut.add_vectors", implementation, offered)
    if chosen == "reference":
        return select_and_add(bits.unpack() if isinstance(bits, Bits) else bits, vectors)
    bits = bits if isinstance(bits, Bits) else pack_bits(bits)
    if not (bits.words.size and vectors.size):
        return jnp.zeros((bits.tokens, vectors.shape[1]), jnp.int32)
    return _add_words(bits, vectors, by_product)


def _add_words(bits: Bits, vectors: Array, by_product: bool) -> Array:
    tokens = bits.tokens

    def one_by_one(words: Array, vectors: Array) -> Array:
        return select_and_add(_unpack(words, tokens), vectors)

    def multiply(words: Array, vectors: Array) -> Array:
        return product_of_bits(_unpack(words, tokens), vectors)

    def by_subsets(words: Array, vectors: Array) -> Array:
        return no_fusion(lambda w, v: subset_sums(w, v, tokens), words, vectors)

    return jax.lax.platform_dependent(
        bits.words,
        vectors,
        cpu=by_subsets if worth_subsets(tokens) else one_by_one,
        default=multiply if by_product else one_by_one,
    )
