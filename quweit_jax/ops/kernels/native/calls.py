"""The native functions, as JAX calls them: none of them has a gradient of its own.

They may be traced, compiled, mapped (`jax.vmap`), scanned and used inside `jax.shard_map`, where
each device computes with what it has. More tokens by `vmap` are more tokens of one call; mapped
weights are one call after another.

Dimensions: T tokens, I inputs, O outputs, H units, C codes, G groups, L tables, A entries, d
outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap
from jaxtyping import Float32, Int8, Int32, UInt8, UInt16, UInt32

from quweit_jax.ops.kernels.native.library import loaded

MAX_STEP = 2**15  # of the codes of a gate; below it


def ternary_sums(
    x: Int8[Array, "T I"], packed: UInt32[Array, "tiles rows lanes"], num_outputs: int
) -> Int32[Array, "T O"]:
    """int8 times the ternary matrix that `ops.packed_ternary.pack_ternary` made."""
    return _by_tokens("ternary", num_outputs)(x, packed)


def glu_sums(
    x: Int8[Array, "T I"],
    mix: UInt32[Array, "mix_tiles mix_rows mix_lanes"],
    offsets: Int32[Array, " two_H"],
    tables: Int8[Array, "G C C"],
    total: UInt32[Array, "tiles rows lanes"],
    num_outputs: int,
    step: int,
) -> Int32[Array, "T O"]:
    """A LookupGLU from its int8 inputs to its last sums.

    Args:
      offsets: taken from the sums of `mix`. step: of `ops.pair_table.codes`, below MAX_STEP. H is a
        multiple of 16.
    """
    return _by_tokens("glu", num_outputs, step)(x, mix, offsets, tables, total)


def vector_sums(
    addresses: UInt8[Array, "T L"], vectors: Int8[Array, "L A d"]
) -> Int32[Array, "T d"]:
    """`sum_l vectors[l, addresses[t, l]]`; addresses below A."""
    return _by_tokens("vectors", vectors.shape[2])(addresses, vectors)


def ternary_digits(
    weights: Float32[Array, "I O"], inverse: Float32[Array, ""]
) -> tuple[UInt16[Array, "rows O 4"], UInt16[Array, "transposed_rows I 4"]]:
    """The ternary weights round(weights * inverse), at most 1, as `glu_forward` takes them; and
    those of the transposed matrix.
    """
    inputs, outputs = weights.shape
    shapes = ((-(-inputs // 16), outputs, 4), (-(-outputs // 16), inputs, 4))
    made = _call("digits", [jax.ShapeDtypeStruct(shape, jnp.uint16) for shape in shapes])
    return tuple(made(weights, inverse))


def glu_forward(
    x: Int8[Array, "I T"],
    mix: UInt16[Array, "mix_rows two_H 4"],
    offsets: Int32[Array, " two_H"],
    tables: Int8[Array, "G C C"],
    total: UInt16[Array, "total_rows O 4"],
    step: int,
) -> tuple[Float32[Array, "O T"], UInt16[Array, "H T"], Int8[Array, "H T"]]:
    """`glu_sums` of weights in `ternary_digits`, tokens last: the sums, the addresses that
    `glu_backward` takes, and the entries that were read.
    """
    units, tokens = offsets.shape[0] // 2, x.shape[1]
    out = [
        jax.ShapeDtypeStruct((total.shape[1], tokens), jnp.float32),
        jax.ShapeDtypeStruct((units, tokens), jnp.uint16),
        jax.ShapeDtypeStruct((units, tokens), jnp.int8),
    ]
    return tuple(_call("glu_forward", out)(x, mix, offsets, tables, total, step=np.int32(step)))


def glu_backward(
    gradient: Float32[Array, "O T"],
    addresses: UInt16[Array, "H T"],
    slopes: Float32[Array, "G C C 2"],
    total: UInt16[Array, "total_rows H 4"],
    mix: UInt16[Array, "mix_rows I 4"],
    to_entries: bool,
) -> tuple[Float32[Array, "two_H T"], Float32[Array, "I T"], Float32[Array, "read T"]]:
    """The gradients to the sums of `mix`, to x and, if asked for, to the entries that were read.

    Args:
      slopes: of an entry along the first and the second sum. total, mix: transposed.
    """
    (units, tokens), inputs = addresses.shape, mix.shape[1]
    rows = (2 * units, inputs, units if to_entries else 0)
    out = [jax.ShapeDtypeStruct((count, tokens), jnp.float32) for count in rows]
    return tuple(_call("glu_backward", out)(gradient, addresses, slopes, total, mix))


def _call(handler: str, out: Sequence[jax.ShapeDtypeStruct]) -> Callable[..., Sequence[Array]]:
    """A handler as a function of arrays; mapped, it is one call after another."""
    return jax.ffi.ffi_call(loaded().target(handler), out, vmap_method="sequential")


@functools.cache
def _by_tokens(handler: str, num_outputs: int, step: int | None = None) -> Callable[..., Array]:
    """A handler as a function of tokens (T, ...) and of weights, to (T, num_outputs)."""
    attributes = {} if step is None else {"step": np.int32(step)}

    @custom_vmap
    def call(tokens: Array, *weights: Array) -> Array:
        out = jax.ShapeDtypeStruct((tokens.shape[0], num_outputs), jnp.int32)
        target = loaded().target(handler)
        return jax.ffi.ffi_call(target, out, vmap_method="sequential")(
            tokens, *weights, **attributes
        )

    @call.def_vmap
    def mapped(size: int, is_mapped: Sequence[bool], tokens: Array, *weights: Array):
        if not is_mapped[0] or any(is_mapped[1:]):
            several = [
                a if m else jnp.broadcast_to(a, (size, *a.shape))
                for a, m in zip((tokens, *weights), is_mapped)
            ]
            return jax.lax.map(lambda one: call(*one), tuple(several)), True
        flat = call(tokens.reshape(-1, tokens.shape[2]), *weights)
        return flat.reshape(size, tokens.shape[1], num_outputs), True

    return call
