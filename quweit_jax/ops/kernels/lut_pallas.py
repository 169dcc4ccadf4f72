"""Look-ups of real tables by kernels for TPUs, divided over devices.

Dimensions: F input bits, T tokens, L tables, n inputs a table, A = 2**n entries, R = A / 2.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, Int32, Shaped

from quweit_jax.ops.kernels import choice, dividing
from quweit_jax.ops.kernels.choice import Division
from quweit_jax.ops.kernels.tpu import lut, lut_gradients

# Below that the registers of a TPU, of 1,024 tokens and 8 tables, are mostly empty.
_FEW_TOKENS, _FEW_TABLES = 1024, 128


def hindrance(num_inputs: int, tokens: int, num_luts: int, sizes_known: bool) -> choice.Hindrance:
    """What hinders the kernels, on a platform, for so many input bits."""
    on = choice.kernels_for("tpu", "gpu")  # a GPU has its own

    def hinders(at: str) -> str | None:
        if not sizes_known:
            return "needs sizes that are numbers"
        if not lut_gradients.sums_that_fit(num_inputs):
            return f"has not enough fast memory for {num_inputs} inputs"
        return on(at)

    return hinders


def is_worth(tokens: int, num_luts: int) -> bool:
    """Whether there is enough work, so that by the compiler's estimates XLA is slower."""
    told = choice.division()
    here = tokens // told.parts if told and tokens % told.parts == 0 else tokens
    return here >= _FEW_TOKENS and num_luts >= _FEW_TABLES


def forward(
    bits_FT: Shaped[Array, "F T"],
    mapping_Ln: Int[Array, "L n"],
    tables_LA: Float[Array, "L A"],
    division: Division | None = None,
) -> tuple[Float[Array, "L T"], Int32[Array, "chunks Lp 1024"]]:
    """The addressed entries, and words of addresses for the gradients; no dimension is 0."""

    def here(bits_FT: Array, mapping_Ln: Array, tables_LA: Array) -> tuple[Array, Array]:
        tokens = bits_FT.shape[1]
        cut = lut.chunks(tokens, mapping_Ln.shape[1])
        words = lut.pack(bits_FT.astype(jnp.float32), cut)
        return lut.look_up(words, mapping_Ln, tables_LA, tokens, cut)

    axes = (1, None, None)
    divided = dividing.over_devices(here, division, bits_FT.shape[1], axes, (1, 0))
    values, addresses = divided(bits_FT, mapping_Ln, tables_LA.astype(jnp.float32))
    return values.astype(tables_LA.dtype), addresses


def table_gradient(
    addresses: Int32[Array, "chunks Lp 1024"],
    mapping_Ln: Int[Array, "L n"],
    grad_LT: Float32[Array, "L T"],
    division: Division | None = None,
) -> Float32[Array, "L A"]:
    """Gradients added to the entries that were addressed."""
    tokens, bits = grad_LT.shape[1], mapping_Ln.shape[1]

    def here(addresses: Array, grad_LT: Array) -> Array:
        cut = lut.chunks(grad_LT.shape[1], bits)
        added = lut_gradients.table_gradient(addresses, grad_LT, cut)
        return dividing.total(added, division, tokens)

    return dividing.over_devices(here, division, tokens, (0, 1), None)(addresses, grad_LT)


def bit_gradient(
    addresses: Int32[Array, "chunks Lp 1024"],
    mapping_Ln: Int[Array, "L n"],
    inverse_FK: Int[Array, "F K"] | None,
    differences_nLR: Float32[Array, "n L R"],
    grad_LT: Float32[Array, "L T"],
    num_inputs: int,
    division: Division | None = None,
) -> Float32[Array, "F T"]:
    """For each input, the gradients of the tables that read it times their finite differences;
    `inverse_FK` isn't needed.
    """

    def here(addresses: Array, mapping_Ln: Array, differences: Array, grad_LT: Array) -> Array:
        cut = lut.chunks(grad_LT.shape[1], mapping_Ln.shape[1])
        return lut_gradients.bit_gradient(
            addresses, mapping_Ln, differences, grad_LT, num_inputs, cut
        )

    axes = (0, None, None, 1)
    divided = dividing.over_devices(here, division, grad_LT.shape[1], axes, 1)
    return divided(addresses, mapping_Ln, differences_nLR, grad_LT)
