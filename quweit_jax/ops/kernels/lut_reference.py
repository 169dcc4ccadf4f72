"""Look-ups of real tables as their definition says: an address for every table and token, an entry
gathered, gradients scattered.

Dimensions: F input bits, T tokens, L tables, n inputs a table, A = 2**n entries, R = A / 2.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int


def _addresses(bits_FT: Array, mapping_Ln: Array) -> Array:
    """The entry that each table's bits spell, (L, T)."""
    places = jnp.left_shift(1, jnp.arange(mapping_Ln.shape[1], dtype=jnp.int32))
    shape = (*mapping_Ln.shape, bits_FT.shape[1])
    wired = bits_FT[mapping_Ln] if bits_FT.size else jnp.zeros(shape, bool)
    return (wired * places[:, None]).sum(1)


def forward(
    bits_FT: Bool[Array, "F T"], mapping_Ln: Int[Array, "L n"], tables_LA: Float[Array, "L A"]
) -> Float[Array, "L T"]:
    """The addressed entries."""
    return jnp.take_along_axis(tables_LA, _addresses(bits_FT, mapping_Ln), axis=1)


def table_gradient(
    bits_FT: Bool[Array, "F T"], mapping_Ln: Int[Array, "L n"], grad_LT: Float32[Array, "L T"]
) -> Float32[Array, "L A"]:
    """Gradients added to the entries that were addressed."""
    address = _addresses(bits_FT, mapping_Ln)
    tables = jnp.broadcast_to(jnp.arange(address.shape[0])[:, None], address.shape)
    start = jnp.zeros((address.shape[0], 2 ** mapping_Ln.shape[1]), jnp.float32)
    return start.at[tables, address].add(grad_LT)


def bit_gradient(
    bits_FT: Bool[Array, "F T"],
    mapping_Ln: Int[Array, "L n"],
    inverse_FK: Int[Array, "F K"] | None,
    differences_nLR: Float32[Array, "n L R"],
    grad_LT: Float32[Array, "L T"],
) -> Float32[Array, "F T"]:
    """For each input, the gradients of the tables that read it times their finite differences;
    `inverse_FK` isn't needed.
    """
    address = _addresses(bits_FT, mapping_Ln)
    total = jnp.zeros(bits_FT.shape, jnp.float32)
    for l in range(mapping_Ln.shape[1]):
        rest = (address & ((1 << l) - 1)) | ((address >> (l + 1)) << l)
        slope = jnp.take_along_axis(differences_nLR[l], rest, axis=1)
        total = total.at[mapping_Ln[:, l]].add(grad_LT * slope)
    return total
