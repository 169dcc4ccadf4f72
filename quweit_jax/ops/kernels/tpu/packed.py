"""Look-ups of packed bits in 1-bit tables on a TPU: rows of words, whose numbers lie in scalar
memory, are copied beside each other, eight tables a register, and go through a tree of
multiplexers.

Dimensions: F input bits, L tables, n inputs a table, A = 2**n entries, W words of 32 tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int32, UInt8, UInt32

from quweit_jax.ops.kernels import choice, dividing
from quweit_jax.ops.kernels.choice import Division
from quweit_jax.ops.kernels.multiplexer import multiplex
from quweit_jax.ops.kernels.tpu import common
from quweit_jax.ops.kernels.tpu.common import LANES, ROWS
from quweit_jax.ops.kernels.tpu.lut import pad_to, row_of, scalar, scalars, table_block

_WORDS = 512  # of a block: a tree of four registers a value


def hindrance(num_inputs: int, words: int, num_luts: int, sizes_known: bool) -> choice.Hindrance:
    """What hinders the kernel, on a platform, for so many input bits."""
    on = choice.kernels_for("tpu", "gpu")  # a GPU has its own

    def hinders(at: str) -> str | None:
        if not sizes_known:
            return "needs sizes that are numbers"
        if 8 * num_inputs * min(words, _WORDS) > common.FAST_MEMORY:
            return f"has not enough fast memory for {num_inputs} inputs"
        return on(at)

    return hinders


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
    (num_luts, lut_inputs), length = wiring.shape, words.shape[1]
    block = table_block(num_luts)
    padded = dividing.round_up(num_luts, block)
    width = common.even_block(length, _WORDS, LANES)
    columns = dividing.round_up(length, width)
    features = dividing.round_up(words.shape[0], ROWS)
    words = pad_to(jax.lax.bitcast_convert_type(words, jnp.int32), features, columns)
    bits = jnp.unpackbits(packed, axis=1, count=2**lut_inputs, bitorder="little")
    entries = pad_to(
        -bits.astype(jnp.int32), padded, dividing.round_up(2**lut_inputs, LANES)
    )  # 0 or ~0

    def kernel(wiring_ref, words_ref, entries_ref, out_ref, slots_ref):
        @pl.loop(0, block // ROWS)
        def _(i):
            for l in range(lut_inputs):
                for j in range(ROWS):
                    feature = scalar(wiring_ref, l, i * ROWS + j)
                    slots_ref[pl.ds(l * ROWS + j, 1)] = words_ref[pl.ds(feature, 1)]
            rows = row_of(i)

            def entry(address: int) -> Array:
                return jnp.broadcast_to(entries_ref[rows, pl.ds(address, 1)], (ROWS, width))

            slots = [slots_ref[pl.ds(l * ROWS, ROWS)] for l in range(lut_inputs)]
            out_ref[rows] = multiplex(entry, slots)

    found = common.call(
        kernel,
        grid=(columns // width, padded // block),
        in_specs=[
            pl.BlockSpec((lut_inputs, block), lambda w, j: (0, j), memory_space=pltpu.SMEM),
            pl.BlockSpec((features, width), lambda w, j: (0, w)),
            pl.BlockSpec((block, entries.shape[1]), lambda w, j: (j, 0)),
        ],
        out_specs=pl.BlockSpec((block, width), lambda w, j: (j, w)),
        out_shape=jax.ShapeDtypeStruct((padded, columns), jnp.int32),
        scratch=[pltpu.VMEM((lut_inputs * ROWS, width), jnp.int32)],
        semantics=("parallel", "parallel"),
        name="packed_look_up",
    )(scalars(wiring, block), words, entries)
    return jax.lax.bitcast_convert_type(found[:num_luts, :length], jnp.uint32)
