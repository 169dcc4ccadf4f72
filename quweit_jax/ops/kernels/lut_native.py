"""Look-ups of real tables by native code.

Dimensions: F input bits, T tokens, L tables, n inputs a table, A = 2**n entries, R = A / 2.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int, UInt8

from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.native import calls, library


def hindrance(tables: DTypeLike, sizes_known: bool) -> choice.Hindrance:
    """What hinders native code, on a platform, for tables of a dtype."""

    def hinders(at: str) -> str | None:
        if not sizes_known:
            return "needs sizes that are numbers"
        if jnp.dtype(tables).itemsize > 4:
            return f"needs tables of at most 32 bits an entry, not {jnp.dtype(tables)}"
        return library.hindrance(at)

    return choice.native(choice.undivided(hinders))


def is_worth(tokens: int) -> bool:
    """Whether there is a whole block of tokens: with fewer XLA was as fast."""
    return tokens >= calls.LUT_TOKENS


def forward(
    bits_FT: Bool[Array, "F T"], mapping_Ln: Int[Array, "L n"], tables_LA: Float[Array, "L A"]
) -> tuple[Float[Array, "L T"], UInt8[Array, "L blocks 64"]]:
    """The addressed entries, and addresses for the gradients; no dimension is 0."""
    wiring, tables = mapping_Ln.astype(jnp.int32), tables_LA.astype(jnp.float32)
    values, addresses = calls.lut_forward(bits_FT, wiring, tables)
    return values.astype(tables_LA.dtype), addresses


def gradients(
    addresses: UInt8[Array, "L blocks 64"],
    mapping_Ln: Int[Array, "L n"],
    differences_nLR: Float32[Array, "n L R"] | None,
    grad_LT: Float32[Array, "L T"],
    num_inputs: int,
) -> tuple[Float32[Array, "L A"], Float32[Array, "F T"] | None]:
    """Gradients added to the entries that were addressed; and for each input, the gradients of the
    tables that read it times their finite differences, if those are given.
    """
    wiring = mapping_Ln.astype(jnp.int32)
    if differences_nLR is None:
        none, _ = calls.varying_alike(jnp.zeros((0, 0, 0), jnp.float32), grad_LT)
        return calls.lut_backward(addresses, wiring, none, grad_LT, 0)[0], None
    return calls.lut_backward(addresses, wiring, differences_nLR, grad_LT, num_inputs)
