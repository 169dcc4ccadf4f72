"""Gradients of look-ups of real tables on a GPU, from the addresses that looking up kept. What is
added up is added in an order that is always the same.

Dimensions: as in `gpu.lut`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int, Int32, UInt8

from quweit_jax.ops.kernels.gpu import common

# Of a table gradient's program: entries, a sum each in every thread, and threads.
_ENTRIES, _THREADS = 64, 64
_TURNS = 8  # in which a program reads tokens at least, if there are so many
_TOKENS = 512  # of a block of bit gradients


def table_gradient(
    addresses: UInt8[Array, "L T"], grad_LT: Float32[Array, "L T"], entries: int
) -> Float32[Array, "L A"]:
    """Gradients added to the entries that were addressed: 0 where none was.

    A thread has a sum for each of some entries, of its own tokens; to them it adds the product of
    gradients, in the row of their high address bits, and of ones in the column of their low bits.
    Where there are few tables, several programs have some of a table's tokens each.
    """
    num_luts, tokens = grad_LT.shape
    sums = min(entries, _ENTRIES)
    low = sums.bit_length() // 2
    columns, rows = 1 << low, sums >> low
    width = min(common.power_above(tokens), _THREADS)
    blocks = -(-tokens // width)
    parts = max(1, min(-(-common.PROGRAMS // num_luts), blocks // _TURNS))
    turns = -(-blocks // parts)

    def lut_table_gradient(addresses_ref, grad_ref, sums_ref):
        table, group, part = (common.program(i) for i in range(3))
        row = common.span(group, rows)[:, None]
        column = common.span(0, columns)[:, None]

        def add(turn, total):
            token = common.span(part * turns + turn, width)
            inside = token < tokens
            address = common.load(addresses_ref, table * tokens + token, inside)
            address = address.astype(jnp.int32)[None, :]
            grad = common.load(grad_ref, table * tokens + token, inside)[None, :]
            grads = jnp.where(address >> low == row, grad, 0.0)
            ones = jnp.where((address & (columns - 1)) == column, 1.0, 0.0)
            return total + grads[:, None, :] * ones[None, :, :]

        none = jnp.zeros((rows, columns, width), jnp.float32)
        total = jax.lax.fori_loop(0, turns, add, none).sum(2)
        place = common.span(group, rows)[:, None] * columns + common.span(0, columns)[None, :]
        common.store(sums_ref, (part * num_luts + table) * entries + place, total)

    added = common.call(
        lut_table_gradient,
        grid=(num_luts, entries // sums, parts),
        out_shape=jax.ShapeDtypeStruct((parts * num_luts * entries,), jnp.float32),
        warps=max(1, width // common.WARP),
    )(addresses, grad_LT)
    return added.reshape(parts, num_luts, entries).sum(0)


def readers(
    wiring_Ln: Int[Array, "L n"], inverse_FK: Int[Array, "F K"] | None, num_inputs: int
) -> tuple[Int32[Array, " slots"], Int32[Array, " F"], Int32[Array, " F"]]:
    """The slots (l * L + j) that read each input, one input after another: the slots, where each
    input's begin, and where they end.

    inverse_FK: of `wiring.invert_wiring`, which has empty places; without it slots are sorted.
    """
    slots = wiring_Ln.size
    if inverse_FK is not None:
        places = inverse_FK.shape[1]
        begin = places * jnp.arange(num_inputs, dtype=jnp.int32)
        used = (inverse_FK < slots).sum(1, dtype=jnp.int32)
        return inverse_FK.astype(jnp.int32).reshape(-1), begin, begin + used
    reads = wiring_Ln.T.reshape(-1).astype(jnp.int32)
    ordered, order = jax.lax.sort_key_val(reads, jnp.arange(slots, dtype=jnp.int32))
    bounds = jnp.searchsorted(ordered, jnp.arange(num_inputs + 1, dtype=jnp.int32))
    bounds = bounds.astype(jnp.int32)
    return order, bounds[:-1], bounds[1:]


def bit_gradient(
    addresses: UInt8[Array, "L T"],
    grad_LT: Float32[Array, "L T"],
    differences_nLR: Float32[Array, "n L R"],
    slots: Int32[Array, " slots"],
    begin: Int32[Array, " F"],
    end: Int32[Array, " F"],
) -> Float32[Array, "F T"]:
    """For each input, the gradients of the tables that read it times their finite differences: a
    program goes through an input's `readers`.
    """
    num_luts, tokens = grad_LT.shape
    half, num_inputs = differences_nLR.shape[2], begin.shape[0]
    width = min(common.power_above(tokens), _TOKENS)

    def lut_bit_gradient(
        addresses_ref, grad_ref, differences_ref, slots_ref, begin_ref, end_ref, out_ref
    ):
        feature = common.program(0)
        token = common.span(common.program(1), width)
        inside = token < tokens

        def add(place, total):
            slot = slots_ref[place]
            l = slot // num_luts
            at = (slot - l * num_luts) * tokens + token
            address = common.load(addresses_ref, at, inside).astype(jnp.int32)
            low = (1 << l) - 1
            rest = (address & low) | ((address >> 1) & ~low)  # the address without bit l
            slope = common.load(differences_ref, slot * half + rest, inside)
            return total + common.load(grad_ref, at, inside) * slope

        none = jnp.zeros((width,), jnp.float32)
        total = jax.lax.fori_loop(begin_ref[feature], end_ref[feature], add, none)
        common.store(out_ref, feature * tokens + token, total, inside)

    total = common.call(
        lut_bit_gradient,
        grid=(num_inputs, -(-tokens // width)),
        out_shape=jax.ShapeDtypeStruct((num_inputs * tokens,), jnp.float32),
        warps=max(1, min(4, width // common.WARP)),
    )(addresses, grad_LT, differences_nLR, slots, begin, end)
    return total.reshape(num_inputs, tokens)
