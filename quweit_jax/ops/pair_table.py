"""Tables read by a pair of codes: two small integers address one entry, which can be any function
of two numbers, such as the gate silu(a) b of a gated linear unit.

Trained by the extended finite difference rule (arXiv 2410.11112) carried over from bits to codes:
the gradient to a code is the difference of the entries beside the one that was read.

Dimensions: C codes of a side, 2**bits of them; G tables; H units, each reads the table of its
group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from quweit_jax.errors import InputError
from quweit_jax.ops.integer import straight_through

MAX_CODE_BITS = 6
_LARGEST = 127  # of an int8 entry


def check_code_bits(code_bits: int, where: str) -> None:
    """Raises InputError for a number of bits that codes cannot have."""
    if not 1 <= code_bits <= MAX_CODE_BITS:
        raise InputError(
            f"{where}code_bits: codes have 1 to {MAX_CODE_BITS} bits (a table has "
            f"2**(2 code_bits) entries), found {code_bits}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def codes(sums: Float[Array, "*shape"], step: int, code_bits: int) -> Float[Array, "*shape"]:
    """Whole numbers in steps of `step`: the nearest multiple, halves up, from -C / 2 to C / 2 - 1.

    It is what comparisons with the C - 1 numbers halfway between the multiples count. The gradient
    passes straight through (1 / step) inside the range and is 0 beyond it.

    Args:
      sums: whole numbers below 2**23.

    Raises:
      InputError: a step that is not positive, or a number of bits that codes cannot have.
    """
    if not step > 0:
        raise InputError(f"codes: expected a positive step, found {step}.")
    check_code_bits(code_bits, "codes: ")
    return _codes_forward(sums, step, code_bits)[0]


def _codes_forward(sums: Array, step: int, code_bits: int) -> tuple[Array, Array]:
    half = 2 ** (code_bits - 1)
    # The half added to a whole number keeps the quotient off whole numbers, so that a division
    # that is right to a few bits only (TPU) has the same floor.
    nearest = jnp.floor((2 * sums + (step + 0.5)) / (2 * step))
    inside = (nearest >= -half) & (nearest <= half - 1)
    return jnp.clip(nearest, -half, half - 1), inside


def _codes_backward(step: int, code_bits: int, inside: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where(inside, gradient / step, 0),)


codes.defvjp(_codes_forward, _codes_backward)


def silu_gate(code_bits: int, step: float) -> Float[np.ndarray, "C C"]:
    """The gate silu(2 a) b at a = step * first code, b = step * second code: the table that gated
    units begin with (`entry_scale` tells the scale of its int8 form).
    """
    check_code_bits(code_bits, "silu_gate: ")
    if not 0 < step < 2.0**40:
        raise InputError(f"silu_gate: expected a positive step, below 2**40, found {step}.")
    half = 2 ** (code_bits - 1)
    a = step * np.arange(-half, half, dtype=np.float64)
    return ((2 * a / (1 + np.exp(-2 * a)))[:, None] * a[None, :]).astype(np.float32)


def entry_scale(table: Float[np.ndarray, "C C"]) -> float:
    """The power of two that a table's entries are multiplied with before they are rounded to int8:
    the largest one with which all fit; 1 for a table of zeros.
    """
    largest = np.abs(table).max(initial=0.0)
    return float(2.0 ** np.floor(np.log2(_LARGEST / largest))) if largest else 1.0


def round_entries(tables: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Entries as int8 holds them, whole numbers of at most 127; the gradient passes straight
    through.
    """
    return straight_through(jnp.clip(jnp.round(tables), -_LARGEST, _LARGEST), tables)


def pair_lookup(
    first: Float[Array, "*tokens H"],
    second: Float[Array, "*tokens H"],
    tables: Shaped[Array, "G C C"],
) -> Shaped[Array, "*tokens H"]:
    """Each unit's entry `tables[group, first, second]`; unit j reads table j // (H / G).

    Gradients: exact to the entries that were read; to a code, half the difference of the entries
    on its two sides (the whole difference to the one side there is, at the ends of the table).

    Args:
      first, second: codes, whole numbers from -C / 2 to C / 2 - 1.
      tables: float, or int8 where no gradient is asked for.

    Raises:
      InputError: the shapes do not belong together.
    """
    _check(first, second, tables)
    return _lookup(first, second, tables)


def gated(
    first: Float[Array, "*tokens H"], second: Float[Array, "*tokens H"], code_bits: int, step: float
) -> Float[Array, "*tokens H"]:
    """`pair_lookup` in the one table that `silu_gate` gives, its entries as int8 holds them.

    The same values and gradients; but where gathers are slow, so anywhere but on a CPU, the entries
    are computed from the codes.

    Raises:
      InputError: as of `silu_gate`.
    """
    return _gated(first, second, code_bits, float(step))


def read_pairs(
    codes: Float[Array, "*tokens two_H"],
    tables: Shaped[Array, "G C C"],
    silu_step: float | None = None,
) -> Shaped[Array, "*tokens H"]:
    """The entries that units read: code j of the first half and of the second one are unit j's
    pair.

    silu_step: where the one table is that of `silu_gate` and isn't trained, its step; `gated` then.

    Raises:
      InputError: as of `pair_lookup` and `silu_gate`.
    """
    first, second = jnp.split(codes, 2, axis=-1)
    if silu_step is None:
        return pair_lookup(first, second, tables)
    return gated(first, second, (tables.shape[-1] - 1).bit_length(), silu_step)


def _whole_gate(code_bits: int, step: float) -> tuple[np.ndarray, float]:
    """The table in whole numbers, (1, C, C), and its scale."""
    gate = silu_gate(code_bits, step)
    scale = entry_scale(gate)
    return np.clip(np.round(gate * scale), -_LARGEST, _LARGEST)[None].astype(np.float32), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated(first: Array, second: Array, code_bits: int, step: float) -> Array:
    table, scale = _whole_gate(code_bits, step)

    def computed(first: Array, second: Array) -> Array:
        return _entries(first, second, step, scale)

    def read(first: Array, second: Array) -> Array:
        return _lookup(first, second, jnp.asarray(table, first.dtype))

    return jax.lax.platform_dependent(first, second, cpu=read, default=computed)


def _entries(first: Array, second: Array, step: float, scale: float) -> Array:
    """What `_whole_gate` holds for these codes; no entry is so near a half that the last bits of
    the function could matter.
    """
    entries = jnp.round(jax.nn.silu(2 * step * first) * (step * scale * second))
    return jnp.clip(entries, -_LARGEST, _LARGEST)


def _gated_forward(first: Array, second: Array, code_bits: int, step: float):
    return _gated(first, second, code_bits, step), (first, second)


def _gated_backward(
    code_bits: int, step: float, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    table, scale = _whole_gate(code_bits, step)
    low, high = -(2 ** (code_bits - 1)), 2 ** (code_bits - 1) - 1

    def computed(first: Array, second: Array) -> tuple[Array, Array]:
        def slope(code: Array, entries: Callable[[Array], Array]) -> Array:
            above, below = jnp.minimum(code + 1, high), jnp.maximum(code - 1, low)
            return (entries(above) - entries(below)) / (above - below)

        return (
            slope(first, lambda code: _entries(code, second, step, scale)),
            slope(second, lambda code: _entries(first, code, step, scale)),
        )

    def read(first: Array, second: Array) -> tuple[Array, Array]:
        address, _ = _addresses(first, second, 1, 2**code_bits)
        tables = jnp.asarray(table, first.dtype)
        return _slopes(tables, address)

    slopes = jax.lax.platform_dependent(*kept, cpu=read, default=computed)
    return gradient * slopes[0], gradient * slopes[1]


_gated.defvjp(_gated_forward, _gated_backward)


def _check(first: Array, second: Array, tables: Array) -> None:
    groups, side = tables.shape[0] if tables.ndim else 0, tables.shape[-1] if tables.ndim else 0
    fits = tables.ndim == 3 and groups and side == tables.shape[1] and side >= 2
    if not fits or first.shape != second.shape or not first.ndim or first.shape[-1] % groups:
        raise InputError(
            "pair_lookup: expected codes (..., H), twice, and tables (G, C, C) with H a multiple "
            f"of G, found {list(first.shape)}, {list(second.shape)} and {list(tables.shape)}."
        )


def _addresses(first: Array, second: Array, groups: int, side: int) -> tuple[Array, Array]:
    """Of the entries in the flattened tables, and of each unit's table: int32."""
    units = first.shape[-1]
    table = jnp.arange(units, dtype=jnp.int32) // max(1, units // groups) * side**2
    codes = [code.astype(jnp.int32) + side // 2 for code in (first, second)]
    return table + codes[0] * side + codes[1], table


def _at(flat: Array, address: Array) -> Array:
    return flat.at[address].get(mode="promise_in_bounds")


def _slopes(tables: Array, address: Array) -> tuple[Array, Array]:
    """Along each code, half the difference of the entries on both sides of the one at an address;
    at the ends, the difference to the one side.
    """
    along: Any = [jnp.gradient(tables, axis=axis) for axis in (1, 2)]
    return _at(along[0].reshape(-1), address), _at(along[1].reshape(-1), address)


@jax.custom_vjp
def _lookup(first: Array, second: Array, tables: Array) -> Array:
    address, _ = _addresses(first, second, *tables.shape[:2])
    return _at(tables.reshape(-1), address)


def _lookup_forward(first: Array, second: Array, tables: Array):
    return _lookup(first, second, tables), (first, second, tables)


def _lookup_backward(
    kept: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    first, second, tables = kept
    address, _ = _addresses(first, second, *tables.shape[:2])
    slopes = _slopes(tables, address)
    entries = (
        jnp.zeros(tables.size, gradient.dtype).at[address].add(gradient, mode="promise_in_bounds")
    )
    to_tables = entries.reshape(tables.shape).astype(tables.dtype)
    to_codes = [(gradient * slope).astype(first.dtype) for slope in slopes]
    return to_codes[0], to_codes[1], to_tables


_lookup.defvjp(_lookup_forward, _lookup_backward)


def count_codes(
    sums: Int[Array, "*tokens H"], halfway: Int[Array, " K"]
) -> Int[Array, "*tokens H"]:
    """`codes` of integers by comparisons alone: how many of the numbers `halfway` a sum reaches,
    less half the codes.
    """
    codes = jnp.full(sums.shape, -(len(halfway) + 1) // 2, jnp.int32)
    for bound in halfway:
        codes = codes + (sums >= bound).astype(jnp.int32)
    return codes


def halfway_points(step: Int[ArrayLike, ""], code_bits: int) -> Int[Array, " K"]:
    """The smallest whole numbers of each code but the lowest, C - 1 of them; see `codes`."""
    half = 2 ** (code_bits - 1)
    odd = 2 * jnp.arange(1 - half, half, dtype=jnp.int32) - 1
    return -((-odd * step) // 2)
