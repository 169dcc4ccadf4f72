"""The LookupGLU between its norm and its scale, as it is trained: ternary sums, codes, a table read
by two codes, ternary sums, and their gradients straight through the rounding. `packed_glu` is its
deployed form.

Dimensions: I inputs, H units, C codes, G tables, O outputs, leading dimensions (...) are tokens, T
of them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from quweit_jax.errors import InputError
from quweit_jax.ops import pair_table, ternary
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.native import calls, library

# Offsets beyond it are as good as it: no sum comes near it.
_FAR = 2.0**24


def ternary_glu(
    x: Float[Array, "*tokens I"],
    mix: Float[Array, "I two_H"],
    shift: Float[Array, " two_H"],
    tables: Float[Array, "G C C"],
    total: Float[Array, "H O"],
    *,
    step: int,
    silu_step: float | None = None,
    dtype: str = "float32",
    implementation: str | None = None,
) -> Float32[Array, "*tokens O"]:
    """x (..., I), whole numbers of an int8 -> the sums (..., O) of the entries that units read, in
    units of the scale of `total`.

    Gradients are those of `ops.ternary.ternary_weights`, `ops.pair_table.codes` and `pair_lookup`.

    Args:
      mix, total: float kernels, made ternary. shift: whole numbers, taken from the sums of `mix`,
        the first codes' before the second ones'. tables: entries, whole numbers of an int8. step:
        of the codes.
      silu_step: where the one table is that of `ops.pair_table.silu_gate` and isn't trained, its
        step: no gradient goes to it.
      dtype: the name of that of XLA's products' operands.
      implementation: None, 'native' (on one device, or inside `jax.shard_map`, for a step below
        2**15; backward sums are in another order) or 'xla', see `ops.kernels`.

    Raises:
      InputError: the shapes don't belong together, or there is no such implementation here.
    """
    code_bits = _check(x, mix, shift, tables, total)

    def hindrance(at: str) -> str | None:
        if step >= calls.MAX_STEP:
            return f"needs a step below {calls.MAX_STEP}"
        return library.hindrance(at)

    offered = {"native": choice.native(choice.undivided(hindrance)), "xla": choice.anywhere}
    chosen = choice.choose("ternary_glu", implementation, offered)
    if chosen == "xla" or not (x.size and total.size):
        sums = ternary.ternary_product(x, mix, dtype) - shift
        codes: Array = pair_table.codes(sums, step, code_bits)
        read = pair_table.read_pairs(codes, tables, silu_step)
        return ternary.ternary_product(read, total, dtype)
    lead = x.shape[:-1]
    flat = x.reshape(math.prod(lead), x.shape[-1]).astype(jnp.float32)
    arguments = calls.varying_alike(flat, mix, shift, tables, total)
    out: Array = _native(*arguments, step, silu_step is None)
    return out.reshape(*lead, total.shape[1])


def _check(x: Array, mix: Array, shift: Array, tables: Array, total: Array) -> int:
    """The bits of the codes."""
    units = shift.shape[0] // 2
    bits = (tables.shape[-1] - 1).bit_length() if tables.ndim == 3 else 0
    if (
        mix.shape != (x.shape[-1], 2 * units)
        or shift.shape != (2 * units,)
        or total.shape[:1] != (units,)
        or not bits
        or tables.shape[1:] != (2**bits, 2**bits)
        or not units
        or units % max(1, tables.shape[0])
    ):
        raise InputError(
            "ternary_glu: expected x (..., I), mix (I, 2 H), shift (2 H,), tables (G, C, C) with H "
            f"a multiple of G and C a power of two, and total (H, O), found {list(x.shape)}, "
            f"{list(mix.shape)}, {list(shift.shape)}, {list(tables.shape)} and "
            f"{list(total.shape)}."
        )
    return bits


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _native(
    x: Array, mix: Array, shift: Array, tables: Array, total: Array, step: int, trained: bool
) -> Array:
    return _forward(x, mix, shift, tables, total, step, trained)[0]


def _forward(
    x: Array, mix: Array, shift: Array, tables: Array, total: Array, step: int, trained: bool
):
    inverses = ternary.inverse_scale(mix), ternary.inverse_scale(total)
    mix_digits, mix_transposed = calls.ternary_digits(mix.astype(jnp.float32), inverses[0])
    total_digits, total_transposed = calls.ternary_digits(total.astype(jnp.float32), inverses[1])
    offsets = jnp.clip(shift, -_FAR, _FAR).astype(jnp.int32)
    out, addresses, read = calls.glu_forward(
        x, mix_digits, offsets, tables.astype(jnp.int8), total_digits, step
    )
    like = [jnp.zeros((0,), a.dtype) for a in (mix, shift, total)]
    kept = x, addresses, read, tables, mix_transposed, total_transposed, inverses, like
    return out, kept


def _backward(step: int, trained: bool, kept, gradient: Array):
    x, addresses, read, tables, mix_transposed, total_transposed, inverses, like = kept
    slopes = _slopes_of_addresses(tables, step)
    to_x, *to_weights, to_read = calls.glu_backward(
        gradient.astype(jnp.float32),
        x,
        addresses,
        read,
        slopes,
        total_transposed,
        mix_transposed,
        jnp.stack(inverses),
        to_entries=trained,
    )
    if trained:
        to_tables = _to_tables(addresses, to_read, tables)
    else:
        to_tables, _ = calls.varying_alike(jnp.zeros_like(tables), x)
    to_mix, to_shift, to_total = [g.astype(a.dtype) for g, a in zip(to_weights, like)]
    return to_x, to_mix, to_shift, to_tables, to_total


def _slopes_of_addresses(tables: Array, step: int) -> Array:
    """What `calls.glu_backward` takes: 0 along a sum that is outside."""
    steps = [jnp.asarray(jnp.gradient(tables, axis=axis)) for axis in (1, 2)]
    entries = [along.reshape(len(tables), -1) / step for along in steps]
    both = jnp.stack(entries, -1)  # (G, C * C, 2)
    inside = jnp.asarray([[0, 0], [1, 0], [0, 1], [1, 1]], both.dtype)
    return (inside[:, None] * both[:, None]).reshape(len(tables), -1, 2).astype(jnp.float32)


def _to_tables(addresses: Array, to_read: Array, tables: Array) -> Array:
    """The gradients to the entries: of each, the sum of those that read it."""
    (groups, side, _), (_, units, _) = tables.shape, addresses.shape
    group = jnp.arange(units, dtype=jnp.int32)[:, None] // (units // groups)
    at = group * side**2 + (addresses & (side**2 - 1)).astype(jnp.int32)
    entries = jnp.zeros(tables.size, jnp.float32).at[at].add(to_read, mode="promise_in_bounds")
    return entries.reshape(tables.shape).astype(tables.dtype)


_native.defvjp(_forward, _backward)
