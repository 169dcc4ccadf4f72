"""The deployed LookupGLU between its norm and its scale: ternary sums, codes, a table read by two
codes, ternary sums. Whole numbers throughout, and no gradient.

Dimensions: I inputs, H units, C codes, G tables, O outputs, leading dimensions (...) are tokens.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Int8, Int32, UInt32

from quweit_jax.errors import InputError
from quweit_jax.ops import pair_table
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.native import calls, library
from quweit_jax.ops.packed_ternary import check_packed, packed_sums

_UNITS = 16  # whose multiples native code takes


def packed_glu(
    x_int8: Int8[Array, "*tokens I"],
    mix: UInt32[Array, "mix_tiles mix_rows mix_lanes"],
    offsets: Int[Array, " two_H"],
    tables: Int8[Array, "G C C"],
    total: UInt32[Array, "tiles rows lanes"],
    *,
    step: int,
    num_outputs: int,
    implementation: str | None = None,
) -> Int32[Array, "*tokens O"]:
    """int8 (..., I) -> the int32 sums (..., O) of the entries that the units read.

    Args:
      mix: packed ternary (I, 2 H), the first codes' sums before the second ones'. offsets: taken
        from those sums. tables: see `ops.pair_table.pair_lookup`. total: packed ternary (H, O).
      step: of `ops.pair_table.codes`. implementation: None, 'native' (for H a multiple of 16 and a
        step below 2**15), 'xla' or 'reference', see `ops.kernels`.

    Raises:
      InputError: the shapes don't belong together, or there is no such implementation here.
    """
    if x_int8.dtype != jnp.int8 or tables.dtype != jnp.int8:
        raise InputError(
            f"packed_glu: expected activations and tables in int8, found {x_int8.dtype} and "
            f"{tables.dtype}."
        )
    units, code_bits = offsets.shape[0] // 2, _code_bits(tables)
    if not units or units % max(1, tables.shape[0]):
        raise InputError(
            f"packed_glu: {offsets.shape[0]} offsets are those of {units} units, which cannot "
            f"share {tables.shape[0]} tables equally."
        )

    def hindrance(at: str) -> str | None:
        if units % _UNITS or step >= calls.MAX_STEP:
            return f"needs units in multiples of {_UNITS} and a step below {calls.MAX_STEP}"
        return library.hindrance(at)

    chosen = choice.choose("packed_glu", implementation, choice.with_native(hindrance))
    if chosen == "native" and x_int8.shape[-1]:
        _check(x_int8, mix, total, units, num_outputs)
        lead = x_int8.shape[:-1]
        x = x_int8.reshape(math.prod(lead), x_int8.shape[-1])
        held = mix, offsets.astype(jnp.int32), tables, total
        return calls.glu_sums(x, *held, num_outputs, step).reshape(*lead, num_outputs)
    sums = packed_sums(x_int8, mix, num_outputs=2 * units, implementation=implementation)
    codes: Array = pair_table.codes(
        (sums - offsets.astype(jnp.int32)).astype(jnp.float32), step, code_bits
    )
    read = pair_table.read_pairs(codes, tables)
    return packed_sums(read, total, num_outputs=num_outputs, implementation=implementation)


def _code_bits(tables: Array) -> int:
    bits = (tables.shape[-1] - 1).bit_length() if tables.ndim == 3 else 0
    if tables.ndim != 3 or tables.shape[1:] != (2**bits, 2**bits) or not bits:
        raise InputError(
            f"packed_glu: expected tables (G, 2**bits, 2**bits), found {list(tables.shape)}."
        )
    return bits


def _check(x: Array, mix: Array, total: Array, units: int, num_outputs: int) -> None:
    """What `packed_sums` would check."""
    check_packed("packed_glu", mix, x.shape[-1], 2 * units)
    check_packed("packed_glu", total, units, num_outputs)
