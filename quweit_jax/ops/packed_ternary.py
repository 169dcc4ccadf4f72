"""Ternary matrices as deployed: two bits a weight, sixteen weights a word.

Matrices are (inputs, outputs), as Flax keeps them. Packed they lie in tiles of up to 128 outputs,
each from its first input to its last, so that a product reads memory once and in order: a lane, of
a CPU's vector register, a TPU's or a GPU's, is an output.

Dimensions: I inputs, O outputs, leading dimensions (...) are tokens.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Float32, Int, Int8, Int32, UInt32

from quweit_jax.errors import InputError
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.native import calls, library
from quweit_jax.ops.ternary import int_matmul

WEIGHTS_PER_WORD = 16
MAX_LANES = 128  # outputs of a tile
_LANES = 16  # whose multiples tiles have
# Of the weight of input 16 k + 4 j + b in its word: neighbors are in neighboring bytes.
_SHIFTS = tuple(8 * b + 2 * j for j in range(4) for b in range(4))
_OFFERED = choice.with_native(library.hindrance)

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def packed_shape(num_inputs: int, num_outputs: int) -> tuple[int, int, int]:
    """(tiles, rows, lanes) of a packed matrix: a row of words holds 16 inputs, a lane an output.

    Tiles are as few as 128 lanes allow and all have one width, a multiple of 16.
    """
    tiles = -(-num_outputs // MAX_LANES)
    lanes = -(-num_outputs // (max(tiles, 1) * _LANES)) * _LANES
    return tiles, -(-num_inputs // WEIGHTS_PER_WORD), lanes


def packed_bytes(num_inputs: int, num_outputs: int) -> int:
    """Bytes of a packed matrix."""
    return 4 * math.prod(packed_shape(num_inputs, num_outputs))


def _numpy_of(array: Array | np.ndarray) -> ModuleType:
    return np if isinstance(array, np.ndarray) else jnp


def pack_ternary(w_int: Int[AnyArray, "I O"]) -> UInt32[AnyArray, "tiles rows lanes"]:
    """Packs a ternary matrix (I, O) into uint32 `packed_shape(I, O)`, sixteen weights a word.

    Word [t, k, l] is about output t * lanes + l and inputs 16 k to 16 k + 15: the weight of input
    16 k + 4 j + b, as weight + 1 (0, 1 or 2), is in its bits 8 b + 2 j and 8 b + 2 j + 1. What is
    past the end are weights of 0. Takes numpy arrays (and then works on the host) or JAX arrays.

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
        signed = w_int.astype(jnp.promote_types(w_int.dtype, jnp.uint8))
        w_int = jnp.clip(signed, 0 if jnp.issubdtype(signed.dtype, jnp.unsignedinteger) else -1, 1)
    elif w_int.size and not ((w_int == 0) | (w_int == 1) | ((w_int < 0) & (w_int == -1))).all():
        raise InputError(
            f"pack_ternary: expected weights of -1, 0 and 1, found {w_int.min()} to {w_int.max()}; "
            "quantize_weights makes them."
        )
    tiles, rows, lanes = packed_shape(*w_int.shape)
    spare = (rows * WEIGHTS_PER_WORD - w_int.shape[0], tiles * lanes - w_int.shape[1])
    codes = xp.pad(
        (w_int.astype(xp.int8) + 1).astype(xp.uint8), [(0, n) for n in spare], constant_values=1
    )
    codes = codes.reshape(rows, WEIGHTS_PER_WORD, tiles, lanes)
    words = xp.zeros((rows, tiles, lanes), xp.uint32)
    for i, shift in enumerate(_SHIFTS):
        words = words | (codes[:, i].astype(xp.uint32) << xp.uint32(shift))
    return words.transpose(1, 0, 2)


def unpack_ternary(
    packed: UInt32[AnyArray, "tiles rows lanes"],
    num_inputs: int | None = None,
    num_outputs: int | None = None,
) -> Int8[AnyArray, "I O"]:
    """The inverse of `pack_ternary`: uint32 (tiles, rows, lanes) -> int8 (I, O). num_inputs: I;
    None for sixteen times the rows. num_outputs: O; None for all lanes.

    Raises:
      InputError: packed is no packed matrix, not of that many inputs or outputs, or (where its
        values are known) holds something that is no ternary weight.
    """
    if packed.ndim != 3:
        raise InputError(
            f"unpack_ternary: expected words (tiles, inputs / 16, lanes), found "
            f"{list(packed.shape)}."
        )
    tiles, rows, lanes = packed.shape
    inputs = rows * WEIGHTS_PER_WORD if num_inputs is None else num_inputs
    outputs = tiles * lanes if num_outputs is None else num_outputs
    check_packed("unpack_ternary", packed, inputs, outputs)
    if not isinstance(packed, Tracer) and (packed & (packed >> 1) & 0x55555555).any():
        raise InputError(
            "unpack_ternary: expected words of pack_ternary, found the code 3, which is no weight; "
            "is the file damaged?"
        )
    xp = _numpy_of(packed)
    shifts = xp.asarray(_SHIFTS, xp.uint32)
    codes = (packed[:, :, None, :] >> shifts[:, None]) & 3  # (tiles, rows, 16, lanes)
    codes = (codes.astype(xp.int8) - 1).reshape(tiles, rows * WEIGHTS_PER_WORD, lanes)
    whole = codes.transpose(1, 0, 2).reshape(rows * WEIGHTS_PER_WORD, tiles * lanes)
    return whole[:inputs, :outputs]


def check_packed(
    where: str,
    packed: UInt32[Array, "tiles rows lanes"] | UInt32[np.ndarray, "tiles rows lanes"],
    inputs: int,
    outputs: int,
) -> None:
    """Raises InputError, which begins with `where`, for a packed matrix of another shape than
    (inputs, outputs).
    """
    tiles, rows, lanes = packed.shape
    fits = lanes % _LANES == 0 and rows == -(-inputs // WEIGHTS_PER_WORD)
    holds = (tiles - 1) * lanes < outputs <= tiles * lanes or not (outputs or packed.size)
    if not fits or not holds:
        raise InputError(
            f"{where}: {inputs} inputs and {outputs} outputs are words of shape "
            f"{list(packed_shape(inputs, outputs))}, found {list(packed.shape)}."
        )


def packed_matmul(
    x_int8: Int8[Array, "*tokens I"],
    packed: UInt32[Array, "tiles rows lanes"],
    scale: Float[Array, "*#tokens 1"] | Float[Array, ""] | float = 1.0,
    *,
    num_outputs: int | None = None,
    implementation: str | None = None,
) -> Float32[Array, "*tokens O"]:
    """Multiplies int8 (..., I) by a packed ternary matrix and a scale, into float32 (..., O). The
    sums are exact.

    Args:
      num_outputs, implementation: see `packed_sums`.

    Raises:
      InputError: as of `packed_sums`.
    """
    sums = packed_sums(x_int8, packed, num_outputs=num_outputs, implementation=implementation)
    return sums.astype(jnp.float32) * scale


def packed_sums(
    x_int8: Int8[Array, "*tokens I"],
    packed: UInt32[Array, "tiles rows lanes"],
    *,
    num_outputs: int | None = None,
    implementation: str | None = None,
) -> Int32[Array, "*tokens O"]:
    """int8 (..., I) times a packed ternary matrix: exact int32 sums (..., O), no gradient.

    The unpacked matrix never exists: XLA adds up the words' codes for a single token and multiplies
    more of them by tiles unpacked one after another; native code unpacks in registers.

    Args:
      num_outputs: O; None for all the lanes. implementation: None, 'native', 'pallas' (a kernel for
        TPUs and GPUs), 'xla' or 'reference' (which unpacks all of it), see `ops.kernels`.

    Raises:
      InputError: the shapes don't belong together, or there is no such implementation here.
    """
    if packed.ndim != 3:
        raise InputError(
            "packed_matmul: expected words (tiles, inputs / 16, lanes), found "
            f"{list(packed.shape)}."
        )
    if x_int8.dtype != jnp.int8:
        raise InputError(
            f"packed_matmul: expected activations in int8, found {x_int8.dtype}; "
            "quantize_activations makes them."
        )
    num_inputs = x_int8.shape[-1]
    outputs = packed.shape[0] * packed.shape[2] if num_outputs is None else num_outputs
    check_packed("packed_matmul", packed, num_inputs, outputs)
    chosen = _choose(implementation, x_int8.shape, packed.shape)
    lead = x_int8.shape[:-1]
    x = x_int8.reshape(math.prod(lead), num_inputs)
    if not num_inputs or not outputs:
        sums = jnp.zeros((x.shape[0], outputs), jnp.int32)
    elif chosen == "native":
        sums = calls.ternary_sums(x, packed, outputs)
    elif chosen == "pallas" and x.shape[0]:
        kernels = _kernels(choice.kernels_at())
        sums = kernels.ternary_sums(x, packed, choice.division())[:, :outputs]
    elif chosen in ("xla", "pallas"):
        sums = _sums_by_tiles(x, packed)[:, :outputs]
    else:
        sums = int_matmul(x, unpack_ternary(packed, num_inputs, outputs)).astype(jnp.int32)
    return sums.reshape(*lead, outputs)


def _choose(asked: str | None, inputs: tuple[Any, ...], packed: tuple[int, ...]) -> str:
    """The implementation for inputs (..., I) and words (tiles, rows, lanes)."""
    offered = _OFFERED
    if asked == "pallas" or (asked is None and choice.platform() in ("tpu", "gpu")):
        kernels = _kernels(choice.kernels_at())
        known = not any(map(jax.export.is_symbolic_dim, inputs))
        if asked or (known and kernels.is_worth(math.prod(inputs[:-1]), packed)):
            offered = {"pallas": kernels.hindrance(packed, known)} | offered
    return choice.choose("packed_matmul", asked, offered)


def _kernels(at: str) -> ModuleType:
    if at == "gpu":  # importing Pallas takes half a second
        from quweit_jax.ops.kernels.gpu import ternary
    else:
        from quweit_jax.ops.kernels.tpu import ternary
    return ternary


def _sums_by_tiles(x: Array, packed: Array) -> Array:
    """x (T, I) -> (T, tiles * lanes), a tile at a time."""
    tokens = x.shape[0]
    one = not jax.export.is_symbolic_dim(tokens) and tokens == 1

    def of_tile(words: Array) -> Array:
        if one:
            return _sums_of_one(x, words)
        return int_matmul(x, unpack_ternary(words[None], x.shape[1])).astype(jnp.int32)

    tiles, _, lanes = packed.shape
    sums = jax.lax.map(of_tile, packed)  # (tiles, T, lanes)
    return sums.transpose(1, 0, 2).reshape(tokens, tiles * lanes)


def _sums_of_one(x: Array, words: Array) -> Array:
    """The sum of one token (1, I) times words (rows, lanes), without unpacking them: (1, lanes)."""
    spare = words.shape[0] * WEIGHTS_PER_WORD - x.shape[1]
    inputs = jnp.pad(x[0].astype(jnp.int32), (0, spare)).reshape(-1, WEIGHTS_PER_WORD)
    codes = words.astype(jnp.int32)
    # One pass over the words: a sum for each of the sixteen would be sixteen (3.5 times slower).
    products = (inputs[:, i, None] * ((codes >> s) & 3) for i, s in enumerate(_SHIFTS))
    total = sum(products, jnp.int32(0)).sum(0) - inputs.sum()
    return total[None]
