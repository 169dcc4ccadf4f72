"""Look-ups of real tables written for the compiler: trees of selects where a gather would miss, and
rows copied where single bits would be gathered.

Dimensions: F input bits, T tokens, L tables, n inputs a table, A = 2**n entries, R = A / 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from quweit_jax.ops.wiring import even_inverse

# Above this many inputs a select tree has more work than a gather has misses.
_MAX_SELECT_INPUTS = 6
# Of an address's bits, at most so many choose a column of the product that adds table gradients.
_COLUMN_BITS = 4
# Tables whose gradients are scattered at once (measured 4 times faster than all of 1,536).
_SCATTERED = 128


def forward(
    bits_FT: Bool[Array, "F T"], mapping_Ln: Int[Array, "L n"], tables_LA: Float[Array, "L A"]
) -> Float[Array, "L T"]:
    """The addressed entries."""
    return _read(tables_LA, list(_wire(bits_FT, mapping_Ln)))


def table_gradient(
    bits_FT: Bool[Array, "F T"], mapping_Ln: Int[Array, "L n"], grad_LT: Float32[Array, "L T"]
) -> Float32[Array, "L A"]:
    """Gradients added to the entries that were addressed."""
    address, entries = _address(list(_wire(bits_FT, mapping_Ln))), 2 ** mapping_Ln.shape[1]
    return jax.lax.platform_dependent(
        address,
        grad_LT,
        cpu=functools.partial(_table_grad_scatter, entries=entries),
        default=functools.partial(_table_grad_product, entries=entries),
    )


def bit_gradient(
    bits_FT: Bool[Array, "F T"],
    mapping_Ln: Int[Array, "L n"],
    inverse_FK: Int[Array, "F K"] | None,
    differences_nLR: Float32[Array, "n L R"],
    grad_LT: Float32[Array, "L T"],
) -> Float32[Array, "F T"]:
    """For each input, the gradients of the tables that read it times their finite differences."""
    slots = list(_wire(bits_FT, mapping_Ln))
    grads = [
        grad_LT * _read_rest(differences_nLR[l], slots[:l] + slots[l + 1 :], grad_LT)
        for l in range(len(slots))
    ]
    return _unwire(jnp.stack(grads), mapping_Ln, inverse_FK, bits_FT.shape[0])


def _select_tree(values: Sequence[Array], bits: Sequence[Array]) -> Array:
    """values[address] where bits spell the address, the first the least significant."""
    for bit in bits:
        values = [jnp.where(bit, values[2 * i + 1], values[2 * i]) for i in range(len(values) // 2)]
    return values[0]


def _address(bits_nLT: Array | Sequence[Array]) -> Array:
    address = jnp.int32(0)
    for l, bit in enumerate(bits_nLT):
        address = address | (bit.astype(jnp.int32) << l)
    return address


def _read(tables_LA: Array, bits_nLT: Sequence[Array]) -> Array:
    """tables[j, address[j, t]]: (L, T)."""
    if len(bits_nLT) <= _MAX_SELECT_INPUTS:
        columns = [tables_LA[:, a, None] for a in range(tables_LA.shape[1])]
        return _select_tree(columns, bits_nLT)
    return jnp.take_along_axis(tables_LA, _address(bits_nLT), axis=1, mode="clip")


def _wire(bits_FT: Array, mapping_Ln: Array) -> Array:
    """Follows the wiring: (n, L, T) booleans, a copy of whole rows."""
    if not mapping_Ln.size:
        return jnp.zeros((*mapping_Ln.shape[::-1], bits_FT.shape[1]), bits_FT.dtype)
    return jnp.take(bits_FT, mapping_Ln.T, axis=0, mode="clip")


def _unwire(
    grads_nLT: Array, mapping_Ln: Array, inverse_FK: Array | None, num_inputs: int
) -> Array:
    """The transpose of `_wire`: (F, T). A gather through the inverse index if there is one, else a
    scatter of rows.
    """
    slots = math.prod(mapping_Ln.shape)
    grads_MT = grads_nLT.reshape(slots, grads_nLT.shape[-1])
    if inverse_FK is None:
        return _unwire_any(grads_MT, mapping_Ln, num_inputs)
    # By the pigeonhole principle an inverse of exactly `slots` places has no empty one.
    mode = "clip" if inverse_FK.size == slots else "fill"
    total = jnp.zeros((num_inputs, grads_nLT.shape[-1]), grads_nLT.dtype)
    for k in range(inverse_FK.shape[1]):
        total = total + jnp.take(grads_MT, inverse_FK[:, k], axis=0, mode=mode, fill_value=0)
    return total


def _unwire_any(grads_MT: Array, mapping_Ln: Array, num_inputs: int) -> Array:
    """Without an inverse: make one if every input is read about equally often, as random and arange
    wirings do, else scatter.
    """
    reads, slots = mapping_Ln.T.reshape(-1), grads_MT.shape[0]

    def scatter(grads_MT: Array) -> Array:
        return jax.ops.segment_sum(grads_MT, reads, num_inputs)

    if not slots or not num_inputs:
        return jnp.zeros((num_inputs, grads_MT.shape[1]), grads_MT.dtype)
    uses = jnp.zeros(num_inputs, jnp.int32).at[reads].add(1)
    even = uses.max() <= -(-slots // num_inputs)
    return jax.lax.cond(
        even,
        lambda g: _unwire(g[None], mapping_Ln, even_inverse(mapping_Ln, num_inputs), num_inputs),
        scatter,
        grads_MT,
    )


def _table_grad_scatter(address_LT: Array, grad_LT: Array, entries: int) -> Array:
    """Some tables after another: what they scatter stays in the cache."""
    num_luts = address_LT.shape[0]
    tables = next((k for k in range(_SCATTERED, 7, -1) if num_luts % k == 0), num_luts)
    if tables == num_luts:
        return _scatter(address_LT, grad_LT, entries)
    parts = num_luts // tables
    cut = tuple(x.reshape(parts, tables, x.shape[1]) for x in (address_LT, grad_LT))
    added = jax.lax.map(lambda some: _scatter(some[0], some[1], entries), cut)
    return added.reshape(num_luts, entries)


def _scatter(address_LT: Array, grad_LT: Array, entries: int) -> Array:
    num_luts = address_LT.shape[0]
    flat = (address_LT + entries * jnp.arange(num_luts, dtype=jnp.int32)[:, None]).reshape(-1)
    return jax.ops.segment_sum(grad_LT.reshape(-1), flat, num_luts * entries).reshape(
        num_luts, entries
    )


def _table_grad_product(address_LT: Array, grad_LT: Array, entries: int) -> Array:
    """A product a table: tokens' gradients in the row of their high address bits, times ones in the
    column of their low bits. Compilers for matrix units make both factors as they go.
    """
    low = min(entries.bit_length() // 2, _COLUMN_BITS)
    columns, rows = 2**low, entries >> low
    row = address_LT[:, None, :] >> low == jnp.arange(rows, dtype=jnp.int32)[:, None]
    column = address_LT[:, None, :] & (columns - 1) == jnp.arange(columns, dtype=jnp.int32)[:, None]
    added = jnp.einsum(
        "lrt,lct->lrc",
        jnp.where(row, grad_LT[:, None, :], 0),
        column.astype(grad_LT.dtype),
        precision="highest",  # the gradients keep their 24 bits
    )
    return added.reshape(address_LT.shape[0], entries)


def _read_rest(differences_LR: Array, rest: Sequence[Array], like: Array) -> Array:
    if not rest:
        return jnp.broadcast_to(differences_LR, like.shape)
    return _read(differences_LR, rest)
