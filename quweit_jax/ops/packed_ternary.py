"""Ternary matrices as deployed: four weights a byte.

Matrices are (inputs, outputs), as Flax keeps them.

Dimensions: I inputs, O outputs, leading dimensions (...) are tokens.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Float32, Int, Int8, UInt8

from quweit_jax.errors import InputError
from quweit_jax.ops.ternary import int_matmul

WEIGHTS_PER_BYTE = 4
_TILE_BYTES = 2**20  # of a packed matrix that are unpacked at a time

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def _numpy_of(array: Array | np.ndarray) -> ModuleType:
    return np if isinstance(array, np.ndarray) else jnp


def pack_ternary(w_int: Int[AnyArray, "I O"]) -> UInt8[AnyArray, "(I+3)//4 O"]:
    """Packs a ternary matrix (I, O) into uint8 (ceil(I / 4), O), four weights a byte.

    Byte [k, o] holds weights [4 k + j, o] for j = 0..3 in its bits 2 j and 2 j + 1, as weight + 1:
    0, 1 or 2. Rows past the end are weights of 0. Takes numpy arrays (and then works on the host)
    or JAX arrays.

    Raises:
      InputError: not two-dimensional, or another value than -1, 0, 1; while it is traced, where
        values aren't known, others count as the nearest of these.
    """
    if w_int.ndim != 2:
        raise InputError(
            f"pack_ternary: expected a matrix (inputs, outputs), found shape {list(w_int.shape)}."
        )
    xp = _numpy_of(w_int)
    if isinstance(w_int, Tracer):
        w_int = jnp.clip(w_int, -1, 1)
    elif w_int.size and not xp.isin(w_int, xp.asarray((-1, 0, 1), w_int.dtype)).all():
        raise InputError(
            f"pack_ternary: expected weights of -1, 0 and 1, found {w_int.min()} to {w_int.max()}; "
            "quantize_weights makes them."
        )
    spare = -w_int.shape[0] % WEIGHTS_PER_BYTE
    codes = xp.pad(w_int + 1, ((0, spare), (0, 0)), constant_values=1).astype(xp.uint8)
    codes = codes.reshape(codes.shape[0] // WEIGHTS_PER_BYTE, WEIGHTS_PER_BYTE, w_int.shape[1])
    return codes[:, 0] | (codes[:, 1] << 2) | (codes[:, 2] << 4) | (codes[:, 3] << 6)


def unpack_ternary(
    packed: UInt8[AnyArray, "rows O"], num_inputs: int | None = None
) -> Int8[AnyArray, "I O"]:
    """The inverse of `pack_ternary`: uint8 (ceil(I / 4), O) -> int8 (I, O). num_inputs: I; None for
    four times the rows.

    Raises:
      InputError: packed is no matrix, doesn't hold that many inputs, or (where its values are
        known) holds something that is no ternary weight.
    """
    if packed.ndim != 2:
        raise InputError(
            f"unpack_ternary: expected bytes (inputs / 4, outputs), found {list(packed.shape)}."
        )
    rows, outputs = packed.shape
    inputs = rows * WEIGHTS_PER_BYTE if num_inputs is None else num_inputs
    if -(-inputs // WEIGHTS_PER_BYTE) != rows:
        raise InputError(
            f"unpack_ternary: {inputs} inputs take {-(-inputs // WEIGHTS_PER_BYTE)} rows "
            f"of bytes, found {rows}."
        )
    if not isinstance(packed, Tracer) and (packed & (packed >> 1) & 0b01010101).any():
        raise InputError(
            "unpack_ternary: expected bytes of pack_ternary, found the code 3, which is no weight; "
            "is the file damaged?"
        )
    xp = _numpy_of(packed)
    codes = (packed[:, None, :] >> xp.arange(0, 8, 2, dtype=xp.uint8)[None, :, None]) & 3
    return (codes.astype(xp.int8) - 1).reshape(rows * WEIGHTS_PER_BYTE, outputs)[:inputs]


def packed_matmul(
    x_int8: Int8[Array, "*tokens I"],
    packed: UInt8[Array, "(I+3)//4 O"],
    scale: Float[Array, "*#tokens 1"] | Float[Array, ""] | float = 1.0,
) -> Float32[Array, "*tokens O"]:
    """Multiplies int8 (..., I) by a packed ternary matrix (ceil(I / 4), O) and a scale, into
    float32 (..., O). The sums are exact.

    The unpacked matrix never exists: a single token adds up the bytes' codes, more tokens multiply
    by tiles of columns unpacked one after another.

    Raises:
      InputError: the shapes don't belong together.
    """
    num_inputs, (rows, outputs) = x_int8.shape[-1], packed.shape
    if -(-num_inputs // WEIGHTS_PER_BYTE) != rows:
        raise InputError(
            f"packed_matmul: activations of {num_inputs} inputs need "
            f"{-(-num_inputs // WEIGHTS_PER_BYTE)} rows of packed weights, found {rows}."
        )
    lead = x_int8.shape[:-1]
    if not rows or not outputs:
        return jnp.zeros((*lead, outputs), jnp.float32) * scale
    x = x_int8.reshape(math.prod(lead), num_inputs)
    tokens = x.shape[0]
    product = (
        _product_by_tiles if jax.export.is_symbolic_dim(tokens) or tokens > 1 else _product_of_one
    )
    return product(x, packed).reshape(*lead, outputs) * scale


def _product_of_one(x: Array, packed: Array) -> Array:
    rows = packed.shape[0]
    if not len(x):
        return jnp.zeros((0, packed.shape[1]), jnp.float32)
    quads = jnp.pad(x[0].astype(jnp.int32), (0, rows * WEIGHTS_PER_BYTE - x.shape[1])).reshape(
        rows, WEIGHTS_PER_BYTE
    )
    total = jax.lax.platform_dependent(quads, packed, cpu=_sum_by_rows, default=_sum_of_codes)
    return (total - quads.sum())[None].astype(jnp.float32)


def _sum_of_codes(quads: Array, packed: Array) -> Array:
    """The sum of quads (K, 4) int32 times the codes 0, 1, 2 of packed (K, O): (O,) int32."""
    codes = packed.astype(jnp.int32)
    return sum(
        (quads[:, j, None] * ((codes >> (2 * j)) & 3) for j in range(WEIGHTS_PER_BYTE)),
        jnp.int32(0),
    ).sum(0)


def _sum_by_rows(quads: Array, packed: Array) -> Array:
    """The same a few rows at a time: XLA on a CPU would write the whole of `codes` to memory first
    (measured: 4 times slower).
    """
    tile = max(1, min(packed.shape[0], _TILE_BYTES // max(1, packed.shape[1])))
    count = packed.shape[0] // tile

    def add(total: Array, i: Array) -> tuple[Array, None]:
        piece = (jax.lax.dynamic_slice_in_dim(a, i * tile, tile, 0) for a in (quads, packed))
        return total + _sum_of_codes(*piece), None

    total, _ = jax.lax.scan(add, jnp.zeros(packed.shape[1], jnp.int32), jnp.arange(count))
    return total + _sum_of_codes(quads[count * tile :], packed[count * tile :])


def _product_by_tiles(x: Array, packed: Array) -> Array:
    outputs = packed.shape[1]
    columns = max(1, min(outputs, _TILE_BYTES // max(1, x.shape[1])))
    count = -(-outputs // columns)

    def tile(i: Array) -> Array:
        # The last tile begins early enough to be whole.
        piece = jax.lax.dynamic_slice_in_dim(
            packed, jnp.minimum(i * columns, outputs - columns), columns, 1
        )
        return int_matmul(x, unpack_ternary(piece, x.shape[1]))

    tiles = jax.lax.map(tile, jnp.arange(count))  # (N, T, columns)
    whole = tiles[:-1].transpose(1, 0, 2).reshape(x.shape[0], (count - 1) * columns)
    return jnp.concatenate([whole, tiles[-1][:, count * columns - outputs :]], 1)
