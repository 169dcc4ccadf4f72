"""Look-ups of real tables on a TPU, forward.

Bits are packed (`pack`): a register of words then holds one input's bits of some thousand tokens,
so that following the wiring is reading registers whose numbers lie in scalar memory. Words of a
table's inputs, each moved by a bit, add up to words of addresses (`Addresses`), which the backward
pass reads again. Tables lie in a register's rows, their entries in its lanes: a look-up is a gather
along lanes.

Dimensions: F input bits, T tokens, L tables, n inputs a table, A = 2**n entries. A *group* is a
register of tokens, 8 rows of 128; a chunk is so many groups as a word has room for n bits of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float32, Int, Int32, Shaped

from quweit_jax.ops.kernels import dividing
from quweit_jax.ops.kernels.tpu import common
from quweit_jax.ops.kernels.tpu.common import LANES, ROWS

GROUP = ROWS * LANES
SQUARE = ROWS * ROWS
Step = Callable[[Int32[Array, ""], int], None]
_MOST_GROUPS = 8  # of a chunk: blocks of (tables, tokens) then have 4 MB
_TABLES = 128  # of a block
_FEATURES = 64  # of a block that is packed


class Chunks(NamedTuple):
    """How tokens are cut: `count` chunks of `groups` groups; token t is bit n * k of the words of
    its chunk, k its group in it.
    """

    count: int
    groups: int
    bits: int

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return self.groups * GROUP


def chunks(tokens: int, lut_inputs: int) -> Chunks:
    """As few chunks as words have room for, all of one size."""
    groups = max(1, -(-tokens // GROUP))
    count = -(-groups // min(_MOST_GROUPS, 32 // lut_inputs))
    return Chunks(count, -(-groups // count), lut_inputs)


def table_block(num_luts: int) -> int:
    """Tables of a block."""
    return min(_TABLES, dividing.round_up(num_luts, ROWS))


def pad_to(x: Shaped[Array, "rows columns"], rows: int, columns: int) -> Shaped[Array, "r c"]:
    """With zeros behind, up to a size."""
    ends = (0, rows - x.shape[0]), (0, columns - x.shape[1])
    return jnp.pad(x, ends) if any(end for _, end in ends) else x


def scalars(wiring_Ln: Int[Array, "L n"], block: int) -> Int32[Array, "n Lp"]:
    """The wiring for scalar memory; tables that fill up the last block read input 0."""
    wiring_nL = wiring_Ln.T.astype(jnp.int32)
    return pad_to(wiring_nL, wiring_nL.shape[0], dividing.round_up(wiring_nL.shape[1], block))


def pack(bits_FT: Float32[Array, "F T"], cut: Chunks) -> Int32[Array, "chunks F8 8 128"]:
    """Words of bits, 1 where they are not 0."""
    features = bits_FT.shape[0]
    bits_FT = pad_to(bits_FT, features, cut.count * cut.tokens)
    block = min(_FEATURES, dividing.round_up(features, ROWS))

    def kernel(bits_ref, words_ref, turned_ref):
        @pl.loop(0, block // ROWS)
        def _(i):
            rows = row_of(i)

            @common.each(ROWS)
            def _(s):
                words = jnp.zeros((ROWS, LANES), jnp.int32)
                for k in range(cut.groups):
                    bits = bits_ref[rows, pl.ds(k * GROUP + s * LANES, LANES)]
                    words = words | jnp.where(bits != 0, 1 << (k * cut.bits), 0)
                turned_ref[aligned(0, s)] = words

            @common.each(ROWS)
            def _(f):
                words_ref[i * ROWS + f] = turned_ref[crosswise(0, f)]

    return common.call(
        kernel,
        grid=(cut.count, -(-features // block)),
        in_specs=[pl.BlockSpec((block, cut.tokens), lambda c, f: (f, c))],
        out_specs=pl.BlockSpec((None, block, ROWS, LANES), lambda c, f: (c, f, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(
            (cut.count, dividing.round_up(features, ROWS), ROWS, LANES), jnp.int32
        ),
        scratch=[pltpu.VMEM((SQUARE, LANES), jnp.int32)],
        semantics=("parallel", "parallel"),
        name="lut_pack",
    )(bits_FT)


def look_up(
    words: Int32[Array, "chunks F8 8 128"],
    wiring_Ln: Int[Array, "L n"],
    tables_LA: Float32[Array, "L A"],
    tokens: int,
    cut: Chunks,
) -> tuple[Float32[Array, "L T"], Int32[Array, "chunks Lp 1024"]]:
    """The addressed entries, and words of addresses: that of table j, group k of a chunk and token
    s * 128 + i of it in bits n k to n k + n - 1 of word [chunk, j, s * 128 + i].
    """
    num_luts, entries = tables_LA.shape
    block = table_block(num_luts)
    padded = dividing.round_up(num_luts, block)
    width = dividing.round_up(entries, LANES)
    grid = (cut.count, padded // block)

    def kernel(wiring_ref, words_ref, tables_ref, values_ref, addresses_ref, turned_ref):
        def wire(i, g):
            @common.each(ROWS)
            def _(j):
                address = words_ref[scalar(wiring_ref, 0, i * ROWS + j)]
                for l in range(1, cut.bits):
                    words = words_ref[scalar(wiring_ref, l, i * ROWS + j)]
                    address = address | (words << l)
                turned_ref[aligned(g, j)] = address

        def read(i, g):
            rows = row_of(i)
            tables = [tables_ref[rows, pl.ds(a, LANES)] for a in range(0, width, LANES)]

            @common.each(ROWS)
            def _(s):
                addresses = turned_ref[crosswise(g, s)]
                addresses_ref[rows, pl.ds(s * LANES, LANES)] = addresses
                for k in range(cut.groups):
                    values = gather(tables, address_of(addresses, k, cut.bits))
                    values_ref[rows, pl.ds(k * GROUP + s * LANES, LANES)] = values

        in_pairs(block // ROWS, wire, read)

    return common.call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((cut.bits, block), lambda c, j: (0, j), memory_space=pltpu.SMEM),
            pl.BlockSpec((None, *words.shape[1:]), lambda c, j: (c, 0, 0, 0)),
            pl.BlockSpec((block, width), lambda c, j: (j, 0)),
        ],
        out_specs=[
            pl.BlockSpec((block, cut.tokens), lambda c, j: (j, c)),
            pl.BlockSpec((None, block, GROUP), lambda c, j: (c, j, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((num_luts, tokens), jnp.float32),
            jax.ShapeDtypeStruct((cut.count, padded, GROUP), jnp.int32),
        ],
        scratch=[pltpu.VMEM((2 * SQUARE, LANES), jnp.int32)],
        semantics=("parallel", "parallel"),
        name="lut_look_up",
    )(scalars(wiring_Ln, block), words, pad_to(tables_LA, padded, width))


def row_of(register: Int32[Array, ""]) -> Any:
    """The rows of a register."""
    return pl.ds(pl.multiple_of(register * ROWS, ROWS), ROWS)


def aligned(square: int, register: int) -> Any:
    """In memory of squares, each of eight registers: the rows of a register."""
    return pl.ds(square * SQUARE + register * ROWS, ROWS)


def crosswise(square: int, row: int) -> Any:
    """The same row of all registers of a square, which reads as a register: rows are tables in one
    and 128 tokens in the other.
    """
    return pl.ds(square * SQUARE + row, ROWS, stride=ROWS)


def scalar(ref: jax.Ref, row: int, column: Int32[Array, ""]) -> Int32[Array, ""]:
    """A number from scalar memory."""
    return ref[jnp.int32(row), column]  # a Python number beside an array is refused


def in_pairs(count: int, first: Step, then: Step) -> None:
    """Calls first(i, place) and then(i, place) for every i, two at a time (places 0 and 1), so that
    what waits for memory in one goes on beside the other.
    """
    together = 2 - count % 2

    @pl.loop(0, count // together)
    def _(turn):
        for step in (first, then):
            for place in range(together):
                step(turn * together + place, place)


def address_of(addresses: Int32[Array, "8 128"], group: int, bits: int) -> Int32[Array, "8 128"]:
    """The addresses of a group."""
    return (addresses >> (group * bits)) & ((1 << bits) - 1)


def gather(
    tables: list[Float32[Array, "8 128"]], address: Int32[Array, "8 128"]
) -> Float32[Array, "8 128"]:
    """Entries of tables whose rows are rows of one register, or of several one after another."""
    inside = address if len(tables) == 1 else address & (LANES - 1)
    found = [jnp.take_along_axis(t, inside, axis=1, mode="promise_in_bounds") for t in tables]
    value = found[0]
    for i, other in enumerate(found[1:], 1):
        value = jnp.where(address < i * LANES, value, other)
    return value
