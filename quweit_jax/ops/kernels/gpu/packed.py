"""Look-ups of packed bits in 1-bit tables on a GPU: a tree of multiplexers in registers.

Dimensions: F input bits, L tables, n inputs a table, A = 2**n entries, W words of 32 tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32, UInt8, UInt32

from quweit_jax.ops.kernels import choice, dividing
from quweit_jax.ops.kernels.choice import Division
from quweit_jax.ops.kernels.gpu import common
from quweit_jax.ops.kernels.multiplexer import multiplex

_BLOCK, _WORDS = 1024, 128  # of a block: tables times words, and words


def hindrance(num_inputs: int, words: int, num_luts: int, sizes_known: bool) -> choice.Hindrance:
    """What hinders the kernel, on a platform, for so many input bits."""
    elements = words * max(num_inputs, num_luts) if sizes_known else 0
    return common.hindrance(sizes_known, elements)


def look_up(
    words: UInt32[Array, "F W"],
    wiring: Int32[Array, "L n"],
    packed: UInt8[Array, "L bytes"],
    division: Division | None = None,
) -> UInt32[Array, "L W"]:
    """The tables' bits; no dimension is 0."""
    divided = dividing.over_devices(_look_up, division, words.shape[1], (1, None, None), 1)
    return divided(words, wiring, packed)


def _look_up(words: Array, wiring: Array, packed: Array) -> Array:
    (num_luts, lut_inputs), length, tables_bytes = wiring.shape, words.shape[1], packed.shape[1]
    width = min(common.power_above(length), _WORDS)
    height = min(common.power_above(num_luts), _BLOCK // width)

    def packed_look_up(words_ref, wiring_ref, packed_ref, out_ref):
        table = common.span(common.program(0), height)
        word = common.span(common.program(1), width)[None, :]
        is_table = table < num_luts
        inside = is_table[:, None] & (word < length)
        slots = []
        for l in range(lut_inputs):
            row = common.load(wiring_ref, table * lut_inputs + l, is_table)
            slots.append(common.load(words_ref, row[:, None] * length + word, inside))
        loaded = [
            common.load(packed_ref, table * tables_bytes + i, is_table).astype(jnp.int32)
            for i in range(tables_bytes)
        ]

        def entry(address: int) -> Array:
            bit = (loaded[address >> 3] << (31 - (address & 7))) >> 31  # 0 or ~0
            return jnp.broadcast_to(bit.astype(jnp.uint32)[:, None], (height, width))

        values = multiplex(entry, slots)
        common.store(out_ref, table[:, None] * length + word, values, inside)

    bits = common.call(
        packed_look_up,
        grid=(-(-num_luts // height), -(-length // width)),
        out_shape=jax.ShapeDtypeStruct((num_luts * length,), jnp.uint32),
        warps=4,
    )(words, wiring, packed)
    return bits.reshape(num_luts, length)
