"""Gradients of look-ups of real tables on a TPU, from the words of addresses that looking up made.

Dimensions: as in `tpu.lut`; R = A / 2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float32, Int, Int32

from quweit_jax.ops.kernels import dividing
from quweit_jax.ops.kernels.tpu import common
from quweit_jax.ops.kernels.tpu.common import LANES, ROWS
from quweit_jax.ops.kernels.tpu.lut import (
    GROUP,
    SQUARE,
    Chunks,
    address_of,
    aligned,
    crosswise,
    gather,
    in_pairs,
    pad_to,
    row_of,
    scalar,
    scalars,
    table_block,
)

# Of an address's bits, so many choose a column of the product that adds table gradients: with the 8
# tables of a register a matrix unit's 128 columns.
_LOW = 4
# Inputs' sums are kept in up to so many parts, so that one addition need not wait for another.
_MOST_PARTS = 4
_OTHER_BLOCKS = 6 * 2**20


def table_gradient(
    addresses: Int32[Array, "chunks Lp 1024"], grad_LT: Float32[Array, "L T"], cut: Chunks
) -> Float32[Array, "L A"]:
    """Gradients added to the entries that were addressed, by matrix units: 0 where none was."""
    num_luts, entries = grad_LT.shape[0], 2**cut.bits
    padded = addresses.shape[1]
    block = table_block(num_luts)
    width = dividing.round_up(entries, LANES)
    grad_LT = pad_to(grad_LT, padded, cut.count * cut.tokens)
    low = min(cut.bits, _LOW)
    high = cut.bits - low

    def kernel(addresses_ref, grad_ref, out_ref):
        @pl.when(pl.program_id(1) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        @pl.loop(0, block // ROWS)
        def _(i):
            rows = row_of(i)

            def of_column(s: Any) -> Array:
                words = addresses_ref[rows, pl.ds(s * LANES, LANES)]

                def of_group(k: Any) -> Array:
                    grad = grad_ref[rows, pl.ds(k * GROUP + s * LANES, LANES)]
                    return _added(address_of(words, k, cut.bits), grad, high, low)

                return common.added(cut.groups, of_group)

            total = common.added(ROWS, of_column)
            for first in range(0, width, LANES):
                out_ref[rows, pl.ds(first, LANES)] += _diagonal(total, first, high, low)

    added = common.call(
        kernel,
        grid=(padded // block, cut.count),
        in_specs=[
            pl.BlockSpec((None, block, GROUP), lambda j, c: (c, j, 0)),
            pl.BlockSpec((block, cut.tokens), lambda j, c: (j, c)),
        ],
        out_specs=pl.BlockSpec((block, width), lambda j, c: (j, 0)),
        out_shape=jax.ShapeDtypeStruct((padded, width), jnp.float32),
        semantics=("parallel", "arbitrary"),
        name="lut_table_gradient",
    )(addresses, grad_LT)
    return added[:num_luts, :entries]


def _added(address: Array, grad: Array, high: int, low: int) -> Array:
    """What a register of tokens adds: the product of gradients, in the rows of their high address
    bits, and of ones in the rows of their low bits; (part, high, table) x (low, table).
    """
    column = address & ((1 << low) - 1)
    ones = [jnp.where(column == c, 1.0, 0.0) for c in range(1 << low)]
    parts = _parts(grad)
    if high:
        row = address >> low
        parts = [jnp.where(row == r, part, 0.0) for part in parts for r in range(1 << high)]
    return jax.lax.dot_general(
        jnp.concatenate(parts, 0).astype(jnp.bfloat16),
        jnp.concatenate(ones, 0).astype(jnp.bfloat16),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _parts(grad: Array) -> list[Array]:
    """Three numbers of 8 bits each whose sum is a float32."""
    parts = []
    for _ in range(2):
        part = pltpu.bitcast(pltpu.bitcast(grad, jnp.int32) & -(1 << 16), jnp.float32)
        parts.append(part)
        grad = grad - part
    return [*parts, grad]


def _diagonal(total: Array, first: int, high: int, low: int) -> Array:
    """Of each table the entries from `first` on, a register's: what its own gradients added."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    table = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
    own = (lane & ((1 << low) - 1)) * ROWS + table
    part = ROWS << high
    added = total[:part] + total[part : 2 * part] + total[2 * part :]
    found = jnp.zeros((ROWS, LANES), jnp.float32)
    for r in range(1 << high):
        here = (lane + first) >> low == r
        if first <= r << low < first + LANES:
            rows = pad_to(added[r * ROWS : (r + 1) * ROWS], ROWS, LANES)
            values = jnp.take_along_axis(rows, own, axis=1, mode="promise_in_bounds")
            found = jnp.where(here, values, found)
    return found


def bit_gradient(
    addresses: Int32[Array, "chunks Lp 1024"],
    wiring_Ln: Int[Array, "L n"],
    differences_nLR: Float32[Array, "n L R"],
    grad_LT: Float32[Array, "L T"],
    num_inputs: int,
    cut: Chunks,
) -> Float32[Array, "F T"]:
    """For each input, the gradients of the tables that read it times their finite differences.

    A group of tokens at a time, the inputs' sums are in fast memory.
    """
    tokens = grad_LT.shape[1]
    bits, padded, features = cut.bits, addresses.shape[1], dividing.round_up(num_inputs, ROWS)
    block = table_block(grad_LT.shape[0])
    slopes = _slopes(differences_nLR, padded)
    grad_LT = pad_to(grad_LT, padded, cut.count * cut.tokens)
    blocks, parts = padded // block, min(bits, _MOST_PARTS, sums_that_fit(num_inputs))

    def kernel(wiring_ref, addresses_ref, grad_ref, slopes_ref, out_ref, *scratch):
        turned_ref, *sums = scratch
        group, table = pl.program_id(1), pl.program_id(2)

        @pl.when(table == 0)
        def _():
            @pl.loop(0, features)
            def _(f):
                for part in sums:
                    part[f] = jnp.zeros((ROWS, LANES), jnp.float32)

        def multiply(i, g):
            rows = row_of(i)

            @common.each(ROWS)
            def _(s):
                words = addresses_ref[rows, pl.ds(s * LANES, LANES)]
                address = (words >> (group * bits)) & ((1 << bits) - 1)
                grad = grad_ref[rows, pl.ds(s * LANES, LANES)]
                for l in range(bits):
                    slope = gather(*_entries_of(slopes_ref, rows, address, l, bits))
                    turned_ref[aligned(g * bits + l, s)] = slope * grad

        def add(i, g):
            @common.each(ROWS)
            def _(j):
                for l in range(bits):
                    part, feature = sums[l % parts], scalar(wiring_ref, l, i * ROWS + j)
                    part[feature] += turned_ref[crosswise(g * bits + l, j)]

        in_pairs(block // ROWS, multiply, add)

        @pl.when(table == blocks - 1)
        def _():
            @pl.loop(0, features // ROWS)
            def _(i):
                rows = row_of(i)

                @common.each(ROWS)
                def _(f):
                    total = sum(part[i * ROWS + f] for part in sums)
                    turned_ref[aligned(0, f)] = total

                @common.each(ROWS)
                def _(s):
                    out_ref[rows, pl.ds(s * LANES, LANES)] = turned_ref[crosswise(0, s)]

    total = common.call(
        kernel,
        grid=(cut.count, cut.groups, blocks),
        in_specs=[
            pl.BlockSpec((bits, block), lambda c, k, j: (0, j), memory_space=pltpu.SMEM),
            pl.BlockSpec((None, block, GROUP), lambda c, k, j: (c, j, 0)),
            pl.BlockSpec((block, GROUP), lambda c, k, j: (j, c * cut.groups + k)),
            pl.BlockSpec((block, slopes.shape[1]), lambda c, k, j: (j, 0)),
        ],
        out_specs=pl.BlockSpec((features, GROUP), lambda c, k, j: (0, c * cut.groups + k)),
        out_shape=jax.ShapeDtypeStruct((features, cut.count * cut.tokens), jnp.float32),
        scratch=[
            pltpu.VMEM((2 * bits * SQUARE, LANES), jnp.float32),
            *[pltpu.VMEM((features, ROWS, LANES), jnp.float32)] * parts,
        ],
        semantics=("parallel", "parallel", "arbitrary"),
        name="lut_bit_gradient",
    )(scalars(wiring_Ln, block), addresses, grad_LT, slopes)
    return total[:num_inputs, :tokens]


def sums_that_fit(num_inputs: int) -> int:
    """How many parts of the inputs' sums fit into fast memory beside two blocks of output and two
    of everything else; 0: too many inputs.
    """
    one = dividing.round_up(num_inputs, ROWS) * GROUP * 4
    return max(0, (common.FAST_MEMORY - _OTHER_BLOCKS) // one - 2)


def _slopes(differences_nLR: Array, rows: int) -> Array:
    """What an input's gradient is multiplied by, for every address, input after input: (L, n A)."""
    lut_inputs, num_luts, half = differences_nLR.shape
    inputs = []
    for l, differences_LR in enumerate(differences_nLR):
        parts = differences_LR.reshape(num_luts, half >> l, 1, 1 << l)  # bit l between the others
        whole = jnp.broadcast_to(parts, (num_luts, half >> l, 2, 1 << l))
        inputs.append(whole.reshape(num_luts, 2 * half))
    return pad_to(jnp.concatenate(inputs, 1), rows, dividing.round_up(2 * half * lut_inputs, LANES))


def _entries_of(
    slopes_ref: Array, rows: object, address: Array, l: int, bits: int
) -> tuple[list[Array], Array]:
    """The registers that hold input l's slopes, and where in them an address is."""
    register, offset = divmod(l << bits, LANES)
    count = max(1, (1 << bits) // LANES)
    found = [slopes_ref[rows, pl.ds((register + r) * LANES, LANES)] for r in range(count)]
    return found, address + offset if offset else address
