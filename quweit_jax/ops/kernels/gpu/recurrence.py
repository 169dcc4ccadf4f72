"""The gated linear recurrence h_t = f_t * h_{t-1} + c_t on a GPU: a thread goes through time with
its own feature's state, reading the next steps while it computes some.

Where there are too few features to fill a GPU, time is cut into chunks that go side by side, after
a pass that finds what each chunk makes of the state before it.

Dimensions: B batch, T time steps, D features, N chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from quweit_jax.ops.kernels import dividing
from quweit_jax.ops.kernels.choice import Division
from quweit_jax.ops.kernels.gpu import common

_FEATURES = 64  # of a block
_TOGETHER = 8  # steps that are read together
# Chunks read their gates twice, so there are some only where a quarter of these threads is more
# than there are; and the fewest steps of a chunk.
_THREADS, _FEWEST_STEPS = 2**15, 64


class _Cut(NamedTuple):
    """How the work is cut: features of a block, the chunks, and turns of `_TOGETHER` steps."""

    batch: int
    steps: int
    features: int
    block: int
    chunks: int
    turns: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of features, chunks, sequences."""
        return -(-self.features // self.block), self.chunks, self.batch

    @property
    def warps(self) -> int:
        """Warps of a program: a feature a thread."""
        return max(1, self.block // common.WARP)


def _cut(shape: tuple[int, ...]) -> _Cut:
    batch, steps, features = shape
    block = min(common.power_above(features), _FEATURES)
    threads = batch * features
    wanted = _THREADS // threads if 4 * threads <= _THREADS else 1
    chunks = max(1, min(wanted, steps // _FEWEST_STEPS))
    turns = -(-steps // (chunks * _TOGETHER))
    return _Cut(batch, steps, features, block, -(-steps // (turns * _TOGETHER)), turns)


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


class _Place:
    """Where a program is: its sequence, chunk and features."""

    def __init__(self, cut: _Cut):
        self.cut = cut
        self.chunk, self.sequence = common.program(1), common.program(2)
        self.feature = common.span(common.program(0), cut.block)
        self.is_feature = self.feature < cut.features
        self.row = self.sequence * cut.features + self.feature  # of (B, D)

    def reads(self, *refs: Any, towards: int) -> Callable[[Any], list[list[Array]]]:
        """What reads the steps of a turn, of each array, in the order in which they are taken; past
        the end, and in turns that there aren't, 0."""

        def read(turn: Any) -> list[list[Array]]:
            return [
                [common.load(ref, *self.step(turn, i, towards)) for ref in refs]
                for i in range(_TOGETHER)
            ]

        return read

    def step(self, turn: Any, i: int, towards: int) -> tuple[Array, Array]:
        """The places of a step's features, and which of them there are."""
        time = self.time(turn, i, towards)
        at = (self.sequence * self.cut.steps + time) * self.cut.features + self.feature
        return at, self.is_feature & (time >= 0) & (time < self.cut.steps)

    def time(self, turn: Any, i: int, towards: int) -> Array:
        """The time of the i-th step of a turn, which go on with time or against it (-1)."""
        turn = turn if towards > 0 else self.cut.turns - 1 - turn
        i = i if towards > 0 else _TOGETHER - 1 - i
        return (self.chunk * self.cut.turns + turn) * _TOGETHER + i

    def after(self, ends: tuple[Any, ...], carry: Array, towards: int) -> Array:
        """The carry after the chunks that are taken before this one, of what each makes of it."""
        if not ends:
            return carry
        products_ref, sums_ref = ends
        before = self.chunk if towards > 0 else self.cut.chunks - 1 - self.chunk

        def through(k: Array, carry: Array) -> Array:
            chunk = k if towards > 0 else self.cut.chunks - 1 - k
            at = self.end(chunk)
            product = common.load(products_ref, at, self.is_feature)
            return product * carry + common.load(sums_ref, at, self.is_feature)

        return jax.lax.fori_loop(0, before, through, carry)

    def end(self, chunk: Any) -> Array:
        """A chunk's places in arrays (B, N, D)."""
        at = self.sequence * self.cut.chunks + chunk
        return at * self.cut.features + self.feature


def _walk(
    turns: int,
    read: Callable[[Any], list[list[Array]]],
    compute: Callable[[Any, list[list[Array]], Any], Any],
    carry: Any,
) -> Any:
    """compute(turn, what was read, carry) for all turns; each turn reads what the next takes."""

    def step(turn: Any, held: tuple[Any, list[list[Array]]]) -> tuple[Any, list[list[Array]]]:
        carry, here = held
        coming = read(turn + 1)
        return compute(turn, here, carry), coming

    return jax.lax.fori_loop(0, turns, step, (carry, read(0)))[0]


def _ends(cut: _Cut, gates: Array, added: Array, towards: int) -> tuple[Array, ...]:
    """What each chunk makes of a carry, product * carry + sum: two arrays (B, N, D); none where
    there is one chunk. Against time, each step adds before it multiplies.
    """
    if cut.chunks == 1:
        return ()

    def recurrence_ends(f_ref, c_ref, products_ref, sums_ref):
        place = _Place(cut)

        def compute(turn, read, carry):
            product, total = carry
            for i, (f, c) in enumerate(read):
                # a step that there isn't changes nothing
                _, there = place.step(turn, i, towards)
                f = jnp.where(there, f, 1.0)
                product = product * f
                total = f * total + c if towards > 0 else f * (total + c)
            return product, total

        none = jnp.zeros((cut.block,), jnp.float32)
        read = place.reads(f_ref, c_ref, towards=towards)
        product, total = _walk(cut.turns, read, compute, (none + 1, none))
        common.store(products_ref, place.end(place.chunk), product, place.is_feature)
        common.store(sums_ref, place.end(place.chunk), total, place.is_feature)

    shape = jax.ShapeDtypeStruct((cut.batch * cut.chunks * cut.features,), jnp.float32)
    run = common.call(recurrence_ends, grid=cut.grid, out_shape=[shape] * 2, warps=cut.warps)
    return tuple(run(gates, added))


def _forward(gates: Array, candidate: Array, start: Array) -> Array:
    cut = _cut(gates.shape)
    ends = _ends(cut, gates, candidate, 1)

    def recurrence_forward(f_ref, c_ref, start_ref, *others):
        *ends, states_ref = others
        place = _Place(cut)

        def compute(turn, read, state):
            for i, (f, c) in enumerate(read):
                state = f * state + c
                at, there = place.step(turn, i, 1)
                common.store(states_ref, at, state, there)
            return state

        first = common.load(start_ref, place.row, place.is_feature)
        read = place.reads(f_ref, c_ref, towards=1)
        _walk(cut.turns, read, compute, place.after(tuple(ends), first, 1))

    states = common.call(
        recurrence_forward,
        grid=cut.grid,
        out_shape=jax.ShapeDtypeStruct((gates.size,), jnp.float32),
        warps=cut.warps,
    )(gates, candidate, start, *ends)
    return states.reshape(gates.shape)


def _backward(
    gates: Array, states: Array, start: Array, gradient: Array
) -> tuple[Array, Array, Array]:
    """d_t = g_t + f_{t+1} d_{t+1} is candidate's gradient; f_t d_t is carried to the
    step before.
    """
    cut = _cut(gates.shape)
    ends = _ends(cut, gates, gradient, -1)

    def recurrence_backward(f_ref, g_ref, states_ref, start_ref, *others):
        *ends, to_f_ref, to_c_ref, to_start_ref = others
        place = _Place(cut)
        first = common.load(start_ref, place.row, place.is_feature)

        def read(turn):
            steps = place.reads(f_ref, g_ref, towards=-1)(turn)
            for i, step in enumerate(steps):
                at, there = place.step(turn, i, -1)
                time = place.time(turn, i, -1)
                before = common.load(states_ref, at - cut.features, there & (time > 0))
                step.append(jnp.where(time == 0, first, before))
            return steps

        def compute(turn, read, carry):
            for i, (f, g, before) in enumerate(read):
                towards = g + carry
                carry = f * towards
                at, there = place.step(turn, i, -1)
                common.store(to_c_ref, at, towards, there)
                common.store(to_f_ref, at, towards * before, there)
            return carry

        none = jnp.zeros((cut.block,), jnp.float32)
        carry = place.after(tuple(ends), none, -1)
        carry = _walk(cut.turns, read, compute, carry)
        common.store(to_start_ref, place.row, carry, place.is_feature & (place.chunk == 0))

    like = jax.ShapeDtypeStruct((gates.size,), jnp.float32)
    to_gates, to_candidate, to_start = common.call(
        recurrence_backward,
        grid=cut.grid,
        out_shape=[like, like, jax.ShapeDtypeStruct((start.size,), jnp.float32)],
        warps=cut.warps,
    )(gates, gradient, states, start, *ends)
    return (
        to_gates.reshape(gates.shape),
        to_candidate.reshape(gates.shape),
        to_start.reshape(start.shape),
    )
