"""Products of few tokens with packed ternary matrices on a GPU: two bits a weight go through memory
once, and four weights are multiplied and added by one instruction.

Dimensions: T tokens, I inputs, O outputs; packed matrices as in `packed_ternary`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Int8, Int32, UInt32

from quweit_jax.ops.kernels import choice, dividing
from quweit_jax.ops.kernels.choice import Division
from quweit_jax.ops.kernels.gpu import common

# Inputs of a word come in four rounds of four neighbors, one a byte.
_ROUNDS = _BYTES = 4
_CODES = 0x03030303
_ROWS = 8  # of words, of a block
_TOKENS = 8  # of a block: a sum a word and token is in registers
# Above that products by matrix units, which XLA's form has, read weights less often.
_FEW_TOKENS = 32


def hindrance(packed: tuple[int, ...], sizes_known: bool) -> choice.Hindrance:
    """What hinders the kernel, on a platform, for words (tiles, rows, lanes)."""
    tiles, rows, lanes = packed
    return common.hindrance(sizes_known, tiles * rows * lanes)


def is_worth(tokens: int, packed: tuple[int, ...]) -> bool:
    """Whether there are so few tokens that reading the matrix is what takes time."""
    return tokens <= _FEW_TOKENS


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
    width, height = common.power_above(lanes), min(common.power_above(rows), _ROWS)
    together = min(common.power_above(tokens), _TOKENS)
    token_blocks, blocks = -(-tokens // together), -(-rows // height)
    parts = max(1, min(blocks, -(-common.PROGRAMS // (tiles * token_blocks))))
    turns = -(-blocks // parts)

    def ternary_sums(inputs_ref, words_ref, sums_ref):
        tile, part, token_block = (common.program(i) for i in range(3))
        lane = common.span(0, width)
        is_lane = lane < lanes

        def add(turn, totals):
            row = common.span(part * turns + turn, height)
            inside = (row < rows)[:, None] & is_lane[None, :]
            at = (tile * rows + row)[:, None] * lanes + lane[None, :]
            words = common.load(words_ref, at, inside).astype(jnp.int32)
            totals = list(totals)
            for j in range(_ROUNDS):
                codes = (words >> (2 * j)) & _CODES
                for k in range(together):
                    token = token_block * together + k
                    place = (token * rows + row) * _ROUNDS + j
                    inputs = common.load(inputs_ref, place, (row < rows) & (token < tokens))
                    totals[k] = _dot4(inputs[:, None], codes, totals[k])
            return tuple(totals)

        none = jnp.zeros((height, width), jnp.int32)
        totals = jax.lax.fori_loop(0, turns, add, (none,) * together)
        for k, total in enumerate(totals):
            token = token_block * together + k
            at = ((part * tokens + token) * tiles + tile) * lanes + lane
            common.store(sums_ref, at, total.sum(0), is_lane & (token < tokens))

    shape = (parts, tokens, tiles * lanes)
    codes_sums = common.call(
        ternary_sums,
        grid=(tiles, parts, token_blocks),
        out_shape=jax.ShapeDtypeStruct((parts * tokens * tiles * lanes,), jnp.int32),
        warps=4,
    )(_words_of(x, rows), packed)
    # a code is its weight + 1
    return codes_sums.reshape(shape).sum(0) - x.astype(jnp.int32).sum(1, keepdims=True)


def _words_of(x: Array, rows: int) -> Array:
    """Inputs, four a word in the order of a word's rounds: int32 (tokens, rows, 4)."""
    inputs = rows * _ROUNDS * _BYTES
    x = jnp.pad(x, ((0, 0), (0, inputs - x.shape[1])))
    return jax.lax.bitcast_convert_type(x.reshape(x.shape[0], rows, _ROUNDS, _BYTES), jnp.int32)


def _dot4(
    inputs: Int32[Array, "rows 1"], codes: Int32[Array, "rows lanes"], total: Int32[Array, "r l"]
) -> Int32[Array, "rows lanes"]:
    """total + the sum of four products of bytes with a sign."""
    inputs = jnp.broadcast_to(inputs, codes.shape)
    if choice.is_interpreted():
        for shift in (24, 16, 8, 0):
            total = total + ((inputs << shift) >> 24) * ((codes << shift) >> 24)
        return total
    [total] = plgpu.elementwise_inline_asm(
        "dp4a.s32.s32 $0, $1, $2, $3;",
        args=[inputs, codes, total],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int32)],
    )
    return total
