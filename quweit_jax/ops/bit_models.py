"""Deployed models of bits, from their inputs to their sums: thresholds, layers of one-bit tables,
and then the vectors of set bits added, or the set bits of each class counted.

What `ops.packed_lut` does step by step; native code does it 256 tokens at a time.

Dimensions: T tokens, D inputs, z thresholds an input, L tables of the last layer, d features.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int8, Int32, Integer, Real, UInt8

from quweit_jax.errors import InputError
from quweit_jax.ops import packed_lut
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.native import calls, library
from quweit_jax.ops.lut import MAX_LUT_INPUTS

# Wiring (tables, n) and packed tables (tables, bytes), see `packed_lut.look_up`.
Layer = tuple[Integer[Array, "_ _"], UInt8[Array, "_ _"]]


def bit_sums(
    x: Real[Array, "T D"],
    thresholds: Real[Array, "#D z"],
    layers: Sequence[Layer],
    vectors: Int8[Array, "L d"],
    *,
    by_product: bool = False,
    implementation: str | None = None,
) -> Int32[Array, "T d"]:
    """The sum of the vectors of the set bits: x (T, D) -> int32 (T, d).

    Args:
      thresholds: (D, z), or (1, z) for all D; a bit is `x > threshold`. layers: those of tables,
        one after another. by_product: see `packed_lut.add_vectors`. implementation: None, 'native'
        (for floats, at most 127 thresholds an input and 8 inputs a table), 'xla' or 'reference',
        see `ops.kernels`.

    Raises:
      InputError: the shapes don't belong together, or there is no such implementation here.
    """
    bits = _check("bit_sums", x, thresholds, layers)
    if vectors.ndim != 2 or vectors.shape[0] != bits:
        raise InputError(
            f"bit_sums: expected vectors ({bits}, d) for as many bits, found {list(vectors.shape)}."
        )
    if _is_native("bit_sums", implementation, x, thresholds, layers) and vectors.size:
        return calls.bit_sums(*_floats(x, thresholds), vectors, _held(layers))
    read = _look_up(x, thresholds, layers)
    asked = "reference" if implementation == "reference" else None
    return packed_lut.add_vectors(read, vectors, by_product=by_product, implementation=asked)


def bit_counts(
    x: Real[Array, "T D"],
    thresholds: Real[Array, "#D z"],
    layers: Sequence[Layer],
    num_classes: int,
    *,
    implementation: str | None = None,
) -> Int32[Array, "T classes"]:
    """How many bits of each class are set, neighbors in equal parts: x (T, D) -> int32 (T,
    classes).

    Args:
      thresholds, layers, implementation: as of `bit_sums`.

    Raises:
      InputError: as of `bit_sums`; or classes cannot share the bits equally.
    """
    bits = _check("bit_counts", x, thresholds, layers)
    if num_classes < 1 or bits % num_classes:
        raise InputError(
            f"bit_counts: {num_classes} classes cannot share {bits} bits equally; use a divisor of "
            f"{bits}."
        )
    if _is_native("bit_counts", implementation, x, thresholds, layers) and bits:
        return calls.bit_counts(*_floats(x, thresholds), _held(layers), num_classes)
    read = _look_up(x, thresholds, layers).unpack()
    return read.reshape(num_classes, -1, x.shape[0]).sum(1, dtype=jnp.int32).T


def _check(function: str, x: Array, thresholds: Array, layers: Sequence[Layer]) -> int:
    """The number of bits that the last layer gives."""
    if x.ndim != 2 or thresholds.ndim != 2 or thresholds.shape[0] not in (1, x.shape[1]):
        raise InputError(
            f"{function}: expected x (T, D) and thresholds (D, z) or (1, z), found {list(x.shape)} "
            f"and {list(thresholds.shape)}."
        )
    bits = x.shape[1] * thresholds.shape[1]
    for wiring, tables in layers:
        if wiring.ndim != 2 or tables.ndim != 2 or wiring.shape[0] != tables.shape[0]:
            raise InputError(
                f"{function}: expected wiring (tables, n) and tables (tables, bytes), found "
                f"{list(wiring.shape)} and {list(tables.shape)}."
            )
        bits = wiring.shape[0]
    return bits


def _is_native(
    function: str, implementation: str | None, x: Array, thresholds: Array, layers: Sequence[Layer]
) -> bool:
    def hindrance(at: str) -> str | None:
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        few = 0 < thresholds.shape[1] < 128
        small = all(1 <= wiring.shape[1] <= MAX_LUT_INPUTS for wiring, _ in layers)
        if not (floats and few and small):
            return f"needs floats, 1 to 127 thresholds and 1 to {MAX_LUT_INPUTS} inputs a table"
        return library.hindrance(at)

    chosen = choice.choose(function, implementation, choice.with_native(hindrance))
    known = x.size and all(wiring.size for wiring, _ in layers)
    return chosen == "native" and bool(known)


def _floats(x: Array, thresholds: Array) -> tuple[Array, Array]:
    return x.astype(jnp.float32), thresholds.astype(jnp.float32)


def _held(layers: Sequence[Layer]) -> list[Array]:
    return [a for wiring, tables in layers for a in (wiring.astype(jnp.int32), tables)]


def _look_up(x: Array, thresholds: Array, layers: Sequence[Layer]) -> packed_lut.Bits:
    bits = packed_lut.pack_above(x.T, thresholds)
    for wiring, tables in layers:
        bits = packed_lut.look_up_words(bits, wiring, tables)
    return bits
