"""Look-ups of real tables on a GPU, forward, divided over devices with their gradients.

A program reads the bits of some tables' slots, a byte each, for some tokens, and each thread then
reads the entries that it addresses: tables are small and stay in the fastest cache. Addresses,
which have 8 bits at most, are kept for the gradients, a byte each.

Dimensions: F input bits, T tokens, L tables, n inputs a table, A = 2**n entries, R = A / 2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, Shaped, UInt8

from quweit_jax.ops.kernels import choice, dividing
from quweit_jax.ops.kernels.choice import Division
from quweit_jax.ops.kernels.gpu import common, lut_gradients

# Of a block: tables times tokens, and tokens of it if there are enough.
_BLOCK = 1024
# Below that a GPU is mostly idle, and nothing is known of which form is faster.
_FEW_TOKENS, _FEW_TABLES = 1024, 128


def hindrance(num_inputs: Any, tokens: Any, num_luts: int, sizes_known: bool) -> choice.Hindrance:
    """What hinders the kernels, on a platform, for so many input bits."""
    elements = tokens * max(num_inputs, num_luts) if sizes_known else 0
    return common.hindrance(sizes_known, elements)


def is_worth(tokens: int, num_luts: int) -> bool:
    """Whether there is enough work to fill a GPU."""
    told = choice.division()
    here = tokens // told.parts if told and tokens % told.parts == 0 else tokens
    return here >= _FEW_TOKENS and num_luts >= _FEW_TABLES


def forward(
    bits_FT: Shaped[Array, "F T"],
    mapping_Ln: Int[Array, "L n"],
    tables_LA: Float[Array, "L A"],
    division: Division | None = None,
) -> tuple[Float[Array, "L T"], UInt8[Array, "L T"]]:
    """The addressed entries, and the addresses for the gradients; no dimension is 0."""
    divided = dividing.over_devices(_look_up, division, bits_FT.shape[1], (1, None, None), (1, 1))
    bits = (bits_FT != 0).astype(jnp.uint8)
    values, addresses = divided(bits, mapping_Ln.astype(jnp.int32), tables_LA.astype(jnp.float32))
    return values.astype(tables_LA.dtype), addresses


def table_gradient(
    addresses: UInt8[Array, "L T"],
    mapping_Ln: Int[Array, "L n"],
    grad_LT: Float32[Array, "L T"],
    division: Division | None = None,
) -> Float32[Array, "L A"]:
    """Gradients added to the entries that were addressed."""
    tokens, entries = grad_LT.shape[1], 2 ** mapping_Ln.shape[1]

    def here(addresses: Array, grad_LT: Array) -> Array:
        added = lut_gradients.table_gradient(addresses, grad_LT, entries)
        return dividing.total(added, division, tokens)

    return dividing.over_devices(here, division, tokens, (1, 1), None)(addresses, grad_LT)


def bit_gradient(
    addresses: UInt8[Array, "L T"],
    mapping_Ln: Int[Array, "L n"],
    inverse_FK: Int[Array, "F K"] | None,
    differences_nLR: Float32[Array, "n L R"],
    grad_LT: Float32[Array, "L T"],
    num_inputs: int,
    division: Division | None = None,
) -> Float32[Array, "F T"]:
    """For each input, the gradients of the tables that read it times their finite differences."""
    readers = lut_gradients.readers(mapping_Ln, inverse_FK, num_inputs)
    divided = dividing.over_devices(
        lut_gradients.bit_gradient,
        division,
        grad_LT.shape[1],
        (1, 1, None, *(None for _ in readers)),
        1,
    )
    return divided(addresses, grad_LT, differences_nLR, *readers)


def _look_up(bits_FT: Array, wiring_Ln: Array, tables_LA: Array) -> tuple[Array, Array]:
    (num_luts, lut_inputs), tokens = wiring_Ln.shape, bits_FT.shape[1]
    entries = tables_LA.shape[1]
    width = min(common.power_above(tokens), _BLOCK)
    height = min(common.power_above(num_luts), _BLOCK // width)

    def lut_look_up(bits_ref, wiring_ref, tables_ref, values_ref, addresses_ref):
        table = common.span(common.program(0), height)
        token = common.span(common.program(1), width)[None, :]
        is_table = table < num_luts
        inside = is_table[:, None] & (token < tokens)
        address = jnp.zeros((height, width), jnp.int32)
        for l in range(lut_inputs):
            row = common.load(wiring_ref, table * lut_inputs + l, is_table)
            bit = common.load(bits_ref, row[:, None] * tokens + token, inside)
            address = address | (bit.astype(jnp.int32) << l)
        values = common.load(tables_ref, table[:, None] * entries + address, inside)
        at = table[:, None] * tokens + token
        common.store(values_ref, at, values, inside)
        common.store(addresses_ref, at, address, inside)

    values, addresses = common.call(
        lut_look_up,
        grid=(-(-num_luts // height), -(-tokens // width)),
        out_shape=[
            jax.ShapeDtypeStruct((num_luts * tokens,), dtype) for dtype in (jnp.float32, jnp.uint8)
        ],
        warps=4,
    )(bits_FT, wiring_Ln, tables_LA)
    return values.reshape(num_luts, tokens), addresses.reshape(num_luts, tokens)
