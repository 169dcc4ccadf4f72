"""The native functions, as JAX calls them: none of them has a gradient of its own.

They may be traced, compiled, mapped (`jax.vmap`), scanned and used inside `jax.shard_map`, where
each device computes with what it has. More tokens by `vmap` are more tokens of one call; mapped
weights are one call after another.

Dimensions: T tokens, I inputs, O outputs, H units, C codes, G groups, L tables, A entries, d
outputs; of look-ups of real tables F input bits, n inputs a table, R = A / 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap
from jaxtyping import Bool, Float32, Int8, Int32, Shaped, UInt8, UInt16, UInt32

from quweit_jax.ops.kernels.native.library import loaded

MAX_STEP = 2**15  # of the codes of a gate; below it
LUT_TOKENS = 64  # of a block of addresses


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
    digits, transposed = made(weights, inverse)
    return digits, transposed


def glu_forward(
    x: Float32[Array, "T I"],
    mix: UInt16[Array, "mix_rows two_H 4"],
    offsets: Int32[Array, " two_H"],
    tables: Int8[Array, "G C C"],
    total: UInt16[Array, "total_rows O 4"],
    step: int,
) -> tuple[Float32[Array, "T O"], UInt16[Array, "blocks H 16"], Int8[Array, "blocks H 16"]]:
    """`glu_sums` of whole numbers and of weights in `ternary_digits`: the sums, the addresses that
    `glu_backward` takes, and the entries that were read; token t is number t % 16 of block t // 16.
    """
    units, tokens = offsets.shape[0] // 2, x.shape[0]
    kept = (-(-tokens // 16), units, 16)
    out = [
        jax.ShapeDtypeStruct((tokens, total.shape[1]), jnp.float32),
        jax.ShapeDtypeStruct(kept, jnp.uint16),
        jax.ShapeDtypeStruct(kept, jnp.int8),
    ]
    call = _call("glu_forward", out)
    sums, addresses, read = call(x, mix, offsets, tables, total, step=np.int32(step))
    return sums, addresses, read


def glu_backward(
    gradient: Float32[Array, "T O"],
    x: Float32[Array, "T I"],
    addresses: UInt16[Array, "blocks H 16"],
    read: Int8[Array, "blocks H 16"],
    slopes: Float32[Array, "G addresses 2"],
    total: UInt16[Array, "total_rows H 4"],
    mix: UInt16[Array, "mix_rows I 4"],
    scales: Float32[Array, " 2"],
    *,
    to_entries: bool,
) -> tuple[Float32[Array, "..."], ...]:
    """The gradients to x (T, I), to mix (I, 2 H), to the offsets (2 H,), to total (H, O) and, if
    asked for, to the entries that were read, (blocks, H, 16).

    Args:
      slopes: along the first and the second sum, by addresses: the number of an entry, plus C * C
        where the first sum is inside its codes' range, plus 2 C * C where the second one is.
      total, mix: transposed. scales: that the gradients to mix and total are multiplied with.
    """
    (tokens, inputs), units = x.shape, addresses.shape[1]
    shapes = (
        (tokens, inputs),
        (inputs, 2 * units),
        (2 * units,),
        (units, gradient.shape[1]),
        addresses.shape if to_entries else (0, 0, 0),
    )
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    arguments = gradient, x, addresses, read, slopes, total, mix, scales
    return tuple(_call("glu_backward", out)(*arguments))


def bit_sums(
    x: Float32[Array, "T D"],
    thresholds: Float32[Array, "#D z"],
    vectors: Int8[Array, "L d"],
    layers: Sequence[Array],
) -> Int32[Array, "T d"]:
    """See `ops.bit_models.bit_sums`; layers: wiring, int32, and tables, in turn."""
    out = jax.ShapeDtypeStruct((x.shape[0], vectors.shape[1]), jnp.int32)
    return _call("bit_sums", [out])(x, thresholds, vectors, *layers)[0]


def bit_counts(
    x: Float32[Array, "T D"],
    thresholds: Float32[Array, "#D z"],
    layers: Sequence[Array],
    num_classes: int,
) -> Int32[Array, "T classes"]:
    """See `ops.bit_models.bit_counts`; layers as of `bit_sums`."""
    out = jax.ShapeDtypeStruct((x.shape[0], num_classes), jnp.int32)
    return _call("bit_counts", [out])(x, thresholds, *layers)[0]


def lut_forward(
    bits: Bool[Array, "F T"], wiring: Int32[Array, "L n"], tables: Float32[Array, "L A"]
) -> tuple[Float32[Array, "L T"], UInt8[Array, "L blocks 64"]]:
    """The entries that the bits spell, and their addresses as `lut_backward` takes them: that of
    token 16 k + i of a block is byte 4 i + k of it. Wiring to a bit that isn't there reads the
    nearest one.
    """
    luts, tokens = wiring.shape[0], bits.shape[1]
    out = [
        jax.ShapeDtypeStruct((luts, tokens), jnp.float32),
        jax.ShapeDtypeStruct((luts, -(-tokens // LUT_TOKENS), LUT_TOKENS), jnp.uint8),
    ]
    read, addresses = _call("lut_forward", out)(bits, wiring, tables)
    return read, addresses


def lut_backward(
    addresses: UInt8[Array, "L blocks 64"],
    wiring: Int32[Array, "L n"],
    differences: Float32[Array, "n L R"],
    gradient: Float32[Array, "L T"],
    num_inputs: int,
) -> tuple[Float32[Array, "L A"], Float32[Array, "F T"]]:
    """The gradients to the tables and to the bits; num_inputs: F, 0 for none to the bits.

    That of an entry is 16 sums, each of every sixteenth token in their order, whose halves are
    added to each other. That of a bit adds up its readers' in the order of their slots l * L + j,
    on processors with AVX2 with one rounding for a product and its addition.
    """
    luts, lut_inputs = wiring.shape
    out = [
        jax.ShapeDtypeStruct((luts, 2**lut_inputs), jnp.float32),
        jax.ShapeDtypeStruct((num_inputs, gradient.shape[1]), jnp.float32),
    ]
    call = _call("lut_backward", out)
    to_tables, to_bits = call(addresses, wiring, differences, gradient)
    return to_tables, to_bits


def turned(x: Shaped[Array, "rows columns"]) -> Shaped[Array, "columns rows"]:
    """The transpose of numbers of 1, 2, 4 or 8 bytes, in memory: XLA walks along columns."""
    rows, columns = x.shape
    return _call("turn", [jax.ShapeDtypeStruct((columns, rows), x.dtype)])(x)[0]


def varying_alike(*arrays: Array) -> tuple[Array, ...]:
    """Inside `jax.shard_map`, what is the same on all devices becomes each one's own where one of
    the arrays is, so that gradients to it are added up.
    """
    every = frozenset().union(*map(_varies, arrays))
    return tuple(_varying(a, every) for a in arrays)


def _varies(array: Array) -> frozenset[str]:
    """The axes of the mesh along which an array is not the same."""
    of = jax.typeof(array)
    of_mesh = getattr(of, "mat", None)  # jax 0.10's name
    return frozenset(getattr(of, "vma", ()) if of_mesh is None else of_mesh.varying)


def _varying(array: Array, axes: frozenset[str]) -> Array:
    missing = tuple(axes - _varies(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def _call(handler: str, out: Sequence[jax.ShapeDtypeStruct]) -> Callable[..., Sequence[Array]]:
    """A handler as a function of arrays; mapped, it is one call after another."""
    run = jax.ffi.ffi_call(loaded().target(handler), out, vmap_method="sequential")

    def call(*arrays: Array, **attributes: np.int32) -> Sequence[Array]:
        every = frozenset().union(*map(_varies, arrays))
        return [_varying(a, every) for a in run(*arrays, **attributes)]

    return call


@functools.cache
def _by_tokens(handler: str, num_outputs: int, step: int | None = None) -> Callable[..., Array]:
    """A handler as a function of tokens (T, ...) and of weights, to (T, num_outputs)."""
    attributes = {} if step is None else {"step": np.int32(step)}

    @custom_vmap
    def call(tokens: Array, *weights: Array) -> Array:
        out = jax.ShapeDtypeStruct((tokens.shape[0], num_outputs), jnp.int32)
        return _call(handler, [out])(tokens, *weights, **attributes)[0]

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
