"""Products with packed ternary matrices on a TPU: two bits a weight go through memory, and are
unpacked beside the matrix units.

Dimensions: T tokens, I inputs, O outputs; packed matrices as in `packed_ternary`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int8, Int32, UInt32

from quweit_jax.ops.kernels import choice, dividing
from quweit_jax.ops.kernels.choice import Division
from quweit_jax.ops.kernels.tpu import common
from quweit_jax.ops.kernels.tpu.common import LANES, ROWS

# Inputs of a word come in four rounds of four neighbors, one a byte.
_ROUNDS = _BYTES = 4
_CODES = 0x03030303
_TOKENS = 512  # of a block
_BYTE_ROWS = 32  # of a register of int8
_BLOCK_BYTES = 2**20  # of words: less is not read at full speed
_MOST_ROWS = 4096  # of a tile: 2 MB


def hindrance(packed: tuple[int, ...], sizes_known: bool) -> choice.Hindrance:
    """What hinders the kernel, on a platform, for words (tiles, rows, lanes)."""
    on, rows = choice.kernels_for("tpu", "gpu"), packed[1]  # a GPU has its own

    def hinders(at: str) -> str | None:
        if not sizes_known:
            return "needs sizes that are numbers"
        if rows > _MOST_ROWS:
            return f"has not enough fast memory for {rows} rows of words"
        return on(at)

    return hinders


def is_worth(tokens: int, packed: tuple[int, ...]) -> bool:
    """Whether a matrix fills whole registers, so that nothing is copied before it is read."""
    _, rows, lanes = packed
    return rows % ROWS == 0 and lanes == LANES


def ternary_sums(
    x: Int8[Array, "T I"],
    packed: UInt32[Array, "tiles rows lanes"],
    division: Division | None = None,
) -> Int32[Array, "T tiles_lanes"]:
    """The exact sums of all lanes; no dimension is 0."""
    return dividing.over_devices(_sums, division, x.shape[0], (0, None), 0)(x, packed)


def _sums(x: Array, packed: Array) -> Array:
    tokens = x.shape[0]
    tiles, rows, lanes = packed.shape
    block = common.even_block(tokens, _TOKENS, _BYTE_ROWS)
    blocks, whole_rows = -(-tokens // block), dividing.round_up(rows, ROWS)
    words = jax.lax.bitcast_convert_type(packed, jnp.int32)
    if whole_rows != rows:
        words = jnp.pad(words, ((0, 0), (0, whole_rows - rows), (0, 0)))
    together = max(1, min(tiles, _BLOCK_BYTES // (4 * whole_rows * lanes)))
    inputs = _in_rounds(x, blocks * block, whole_rows)

    def kernel(x_ref, words_ref, sums_ref):
        for tile in range(together):
            words, total = words_ref[tile], None
            for j in range(_ROUNDS):
                codes = pltpu.bitcast((words >> (2 * j)) & _CODES, jnp.int8)
                added = jnp.dot(x_ref[j], codes, preferred_element_type=jnp.int32)
                total = added if total is None else total + added
            sums_ref[tile] = total

    sums = common.call(
        kernel,
        grid=(-(-tiles // together), blocks),
        in_specs=[
            pl.BlockSpec((_ROUNDS, block, inputs.shape[2]), lambda o, t: (0, t, 0)),
            pl.BlockSpec((together, whole_rows, lanes), lambda o, t: (o, 0, 0)),
        ],
        out_specs=pl.BlockSpec((together, block, lanes), lambda o, t: (o, t, 0)),
        out_shape=jax.ShapeDtypeStruct((tiles, blocks * block, lanes), jnp.int32),
        semantics=("parallel", "parallel"),
        name="ternary_sums",
    )(inputs, words)
    codes_sums = sums.transpose(1, 0, 2).reshape(blocks * block, tiles * lanes)[:tokens]
    return codes_sums - x.astype(jnp.int32).sum(1, keepdims=True)  # a code is its weight + 1


def _in_rounds(x: Array, tokens: int, rows: int) -> Array:
    """The inputs of each round, in the order in which words' bytes come: (4, tokens, 4 rows)."""
    inputs = rows * _ROUNDS * _BYTES
    x = jnp.pad(x, ((0, tokens - x.shape[0]), (0, inputs - x.shape[1])))
    x = x.reshape(tokens, rows, _ROUNDS, _BYTES).transpose(2, 0, 1, 3)
    return x.reshape(_ROUNDS, tokens, rows * _BYTES)
