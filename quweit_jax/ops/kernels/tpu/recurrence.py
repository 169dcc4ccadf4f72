"""The gated linear recurrence h_t = f_t * h_{t-1} + c_t on a TPU: states go through fast memory
once, eight steps a register, in a prefix sum of three rounds (Hillis & Steele, 1986).

Dimensions: B batch, T time steps, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float32

from quweit_jax.ops.kernels import dividing
from quweit_jax.ops.kernels.choice import Division
from quweit_jax.ops.kernels.tpu import common
from quweit_jax.ops.kernels.tpu.common import ROWS

# Of a block: time steps, features. Five blocks, twice, are 5 MB of fast memory.
_STEPS, _FEATURES = 256, 512


def forward(
    gates: Float32[Array, "B T D"],
    candidate: Float32[Array, "B T D"],
    start: Float32[Array, "B D"],
    division: Division | None = None,
) -> Float32[Array, "B T D"]:
    """All states of B sequences, divided over devices as told; no dimension is 0."""
    divided = dividing.over_devices(_forward, division, start.shape[0], (0, 0, 0), 0)
    return divided(gates, candidate, start)


def backward(
    gates: Float32[Array, "B T D"],
    states: Float32[Array, "B T D"],
    start: Float32[Array, "B D"],
    gradient: Float32[Array, "B T D"],
    division: Division | None = None,
) -> tuple[Float32[Array, "B T D"], Float32[Array, "B T D"], Float32[Array, "B D"]]:
    """The gradients to gates, candidate and start, from that to the states."""
    divided = dividing.over_devices(_backward, division, start.shape[0], (0, 0, 0, 0), (0, 0, 0))
    return divided(gates, states, start, gradient)


def _forward(gates: Array, candidate: Array, start: Array) -> Array:
    steps = gates.shape[1]
    gates, candidate = _padded(gates), _padded(candidate)
    grid, block = _blocks(gates.shape)
    time = pl.BlockSpec(block, lambda b, d, t: (b, t, d))
    states = common.call(
        _forward_kernel,
        grid=grid,
        in_specs=[time, time, pl.BlockSpec((1, 1, block[2]), lambda b, d, t: (b, 0, d))],
        out_specs=time,
        out_shape=jax.ShapeDtypeStruct(gates.shape, gates.dtype),
        scratch=[pltpu.VMEM((ROWS, block[2]), gates.dtype)],
        semantics=("parallel", "parallel", "arbitrary"),
        name="recurrence_forward",
    )(gates, candidate, start[:, None])
    return states[:, :steps]


def _backward(
    gates: Array, states: Array, start: Array, gradient: Array
) -> tuple[Array, Array, Array]:
    steps = gates.shape[1]
    gates, states, gradient = _padded(gates), _padded(states), _padded(gradient)
    grid, block = _blocks(gates.shape)
    last, tiles = grid[2] - 1, block[1] // ROWS
    time = pl.BlockSpec(block, lambda b, d, t: (b, last - t, d))  # from the end
    before = pl.BlockSpec(  # the eight states before the block's
        (1, ROWS, block[2]), lambda b, d, t: (b, jnp.maximum((last - t) * tiles - 1, 0), d)
    )
    row = pl.BlockSpec((1, 1, block[2]), lambda b, d, t: (b, 0, d))
    like = jax.ShapeDtypeStruct(gates.shape, gates.dtype)
    to_gates, to_candidate, to_start = common.call(
        _backward_kernel,
        grid=grid,
        in_specs=[time, time, before, row, time],
        out_specs=[time, time, row],
        out_shape=[like, like, jax.ShapeDtypeStruct(start[:, None].shape, start.dtype)],
        scratch=[pltpu.VMEM((ROWS, block[2]), gates.dtype)],
        semantics=("parallel", "parallel", "arbitrary"),
        name="recurrence_backward",
    )(gates, states, states, start[:, None], gradient)
    return to_gates[:, :steps], to_candidate[:, :steps], to_start[:, 0]


def _padded(x: Array) -> Array:
    """With whole blocks of steps: what comes after the last step is 0."""
    steps = x.shape[1]
    end = dividing.round_up(steps, common.even_block(steps, _STEPS, ROWS)) - steps
    return jnp.pad(x, ((0, 0), (0, end), (0, 0))) if end else x


def _blocks(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    batch, steps, features = shape
    block = 1, common.even_block(steps, _STEPS, ROWS), min(features, _FEATURES)
    return (batch, -(-features // block[2]), steps // block[1]), block


def _scan(a: Array, b: Array, row: Array, towards: int) -> tuple[Array, Array]:
    """Of x -> a x + b, a row each, the compositions from the first row on (towards=1) or from the
    last back (-1): eight rows in three rounds.
    """
    for step in (1, 2, 4):
        inside = row >= step if towards > 0 else row < ROWS - step
        shift = step if towards > 0 else ROWS - step
        other_a = jnp.where(inside, pltpu.roll(a, shift, 0), 1)
        other_b = jnp.where(inside, pltpu.roll(b, shift, 0), 0)
        a, b = a * other_a, a * other_b + b
    return a, b


def _tiles(
    count: int, tile: Callable[[int | Array, Array], Array], carry: Array, *, towards: int
) -> Array:
    """Goes through a block's tiles of eight rows, two in a turn, as the second hides what the first
    waits for.
    """
    together = 2 - count % 2

    def step(turn: Array, carry: Array) -> Array:
        for k in range(together):
            i = turn * together + k
            carry = tile(i if towards > 0 else count - 1 - i, carry)
        return carry

    return jax.lax.fori_loop(0, count // together, step, carry)


def _rows(tile: Any) -> Any:
    return pl.ds(pl.multiple_of(tile * ROWS, ROWS), ROWS)


def _row_numbers(like: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, like.shape, 0)


def _forward_kernel(f_ref, c_ref, start_ref, h_ref, carry_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        carry_ref[...] = jnp.broadcast_to(start_ref[0], carry_ref.shape)

    row = _row_numbers(carry_ref)

    def tile(i, carry):
        a, b = _scan(f_ref[0, _rows(i)], c_ref[0, _rows(i)], row, 1)
        states = a * carry + b
        h_ref[0, _rows(i)] = states
        return jnp.broadcast_to(states[ROWS - 1 :], states.shape)

    carry_ref[...] = _tiles(f_ref.shape[1] // ROWS, tile, carry_ref[...], towards=1)


def _backward_kernel(
    f_ref, h_ref, before_ref, start_ref, g_ref, to_f_ref, to_c_ref, to_start_ref, carry_ref
):
    """d_t = g_t + f_{t+1} d_{t+1} is candidate's gradient; the carry is f_t d_t of the row
    below.
    """
    block, blocks = pl.program_id(2), pl.num_programs(2)

    @pl.when(block == 0)
    def _():
        carry_ref[...] = jnp.zeros_like(carry_ref)

    row = _row_numbers(carry_ref)
    first = jnp.where(block == blocks - 1, start_ref[0], before_ref[0, ROWS - 1 :])

    def tile(i, carry):
        f = f_ref[0, _rows(i)]
        next_f = jnp.where(row < ROWS - 1, pltpu.roll(f, ROWS - 1, 0), 1)
        a, b = _scan(next_f, g_ref[0, _rows(i)], row, -1)
        towards = a * carry + b
        last_before = h_ref[0, _rows(jnp.maximum(i - 1, 0))][ROWS - 1 :]
        previous = jnp.where(i == 0, first, last_before)
        before = jnp.where(row == 0, previous, pltpu.roll(h_ref[0, _rows(i)], 1, 0))
        to_c_ref[0, _rows(i)] = towards
        to_f_ref[0, _rows(i)] = towards * before
        return jnp.broadcast_to((f * towards)[:1], towards.shape)

    carry = _tiles(f_ref.shape[1] // ROWS, tile, carry_ref[...], towards=-1)
    carry_ref[...] = carry
    to_start_ref[0] = carry[:1]
