"""The gated linear recurrence h_t = f_t * h_{t-1} + c_t, the token mixer of MatMul-free language
models (arXiv 2406.02528, equation 6).

Every implementation computes the same function. Its gradient is the same recurrence run backwards,
so it takes the same implementation, and what is kept for it is the gates and the states: memory
grows with T whatever the implementation.

Dimensions: B batch, T time steps, D features, S steps of a chunk, N chunks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from quweit_jax.errors import InputError, check_choice
from quweit_jax.ops.kernels import choice

IMPLEMENTATIONS = ("auto", "sequential", "associative", "chunked", "pallas")
# See benchmarks/recurrence.py and its results.
_SHORT = 16
# Steps of a chunk where T is only a name, as in an exported program.
_CHUNK = 32


def gated_recurrence(
    forget_gate: Float[Array, "B T D"],
    candidate: Float[Array, "B T D"],
    initial_state: Float[Array, "B D"] | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """All states of h_t = forget_gate_t * h_{t-1} + candidate_t.

    Args:
      forget_gate, candidate: (B, T, D) floating, T may be 0. initial_state: (B, D), h before the
        first step; None for zeros.
      implementation: 'sequential' (a loop over time), 'associative' (a parallel prefix sum),
        'chunked' (chunks of about sqrt(T) steps side by side, then a loop over chunks), 'pallas' (a
        kernel for TPUs and GPUs, float32) or 'auto', by platform and length.

    Returns:
      (states (B, T, D) in candidate's dtype, final_state (B, D) float32), exact in the sense that
      no implementation divides: gates of 0 are fine. Sums are in float32 (float64 for float64
      inputs), and all arguments have exact gradients.

    Raises:
      InputError: shapes that don't belong together, or an unknown implementation, or one that the
        platform or the dtype lacks.
    """
    check_choice("gated_recurrence: implementation", implementation, IMPLEMENTATIONS)
    if forget_gate.ndim != 3 or forget_gate.shape != candidate.shape:
        raise InputError(
            "gated_recurrence: expected forget_gate and candidate of one shape (batch, time, "
            f"features), found {list(forget_gate.shape)} "
            f"and {list(candidate.shape)}."
        )
    batch, _, features = candidate.shape
    if initial_state is not None and initial_state.shape != (batch, features):
        raise InputError(
            f"gated_recurrence: expected initial_state {[batch, features]}, found "
            f"{list(initial_state.shape)}."
        )
    exact = jnp.promote_types(jnp.promote_types(forget_gate.dtype, candidate.dtype), jnp.float32)
    start = (
        jnp.zeros((batch, features), exact)
        if initial_state is None
        else initial_state.astype(exact)
    )
    if candidate.shape[1] == 0:
        return candidate, start
    implementation = _choose(implementation, candidate.shape, exact)
    if not candidate.size:
        implementation = "sequential"
    division = choice.division() if implementation == "pallas" else None
    how = _How(implementation, division, choice.kernels_at())
    states: Array = _recurrence(forget_gate.astype(exact), candidate.astype(exact), start, how)
    return states.astype(candidate.dtype), states[:, -1]


def gated_recurrence_step(
    forget_gate: Float[Array, "B D"], candidate: Float[Array, "B D"], state: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """One step, for decoding: forget_gate, candidate (B, D) and state (B, D) -> the next state, in
    state's dtype.
    """
    return (forget_gate * state + candidate).astype(state.dtype)


def pick_implementation(
    steps: int, implementation: str = "auto", platform: str | None = None
) -> str:
    """The implementation 'auto' stands for: a loop where its overhead a step is small, else one
    whose depth doesn't grow with T."""
    if implementation != "auto":
        return implementation
    platform = jax.default_backend() if platform is None else platform
    short = not jax.export.is_symbolic_dim(steps) and steps <= _SHORT
    return "sequential" if platform == "cpu" or short else "chunked"


class _How(NamedTuple):
    """What of a recurrence is no array."""

    implementation: str
    division: choice.Division | None
    kernels: str  # 'tpu' or 'gpu', whose kernels 'pallas' are


def _choose(asked: str, shape: tuple[Any, ...], dtype: Any) -> str:
    """What was asked for, if it is there; of 'auto' what is decided when it is traced."""
    symbolic = any(map(jax.export.is_symbolic_dim, shape))
    if asked != "pallas" and (asked != "auto" or symbolic or shape[1] <= _SHORT):
        return asked
    fits = choice.kernels_for("tpu", "gpu")
    if choice.kernels_at() == "gpu":
        fits = choice.not_exported(fits)

    def hindrance(at: str) -> str | None:
        if dtype != jnp.float32:
            return f"computes in float32, not {jnp.dtype(dtype).name}"
        if symbolic:
            return "needs sizes that are numbers"
        return fits(at)

    offered = {"pallas": hindrance} | dict.fromkeys(("auto", *_FORMS), choice.anywhere)
    return choice.choose("gated_recurrence", None if asked == "auto" else asked, offered)


def _kernel(at: str) -> ModuleType:
    if at == "gpu":  # importing Pallas takes half a second
        from quweit_jax.ops.kernels.gpu import recurrence
    else:
        from quweit_jax.ops.kernels.tpu import recurrence
    return recurrence


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recurrence(forget_gate: Array, candidate: Array, start: Array, how: _How) -> Array:
    if how.implementation == "pallas":
        return _kernel(how.kernels).forward(forget_gate, candidate, start, how.division)
    return _FORMS[how.implementation](forget_gate, candidate, start)


def _forward(
    forget_gate: Array, candidate: Array, start: Array, how: _How
) -> tuple[Array, tuple[Array, Array, Array]]:
    states: Array = _recurrence(forget_gate, candidate, start, how)
    return states, (forget_gate, states, start)


def _backward(
    how: _How, kept: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    # d_t = gradient_t + f_{t+1} d_{t+1}: the recurrence from the end, with the gates one step
    # later.
    forget_gate, states, start = kept
    if how.implementation == "pallas":
        return _kernel(how.kernels).backward(forget_gate, states, start, gradient, how.division)
    gates = jnp.concatenate([forget_gate[:, 1:], jnp.zeros_like(forget_gate[:, :1])], 1)
    towards = _FORMS[how.implementation](gates[:, ::-1], gradient[:, ::-1], jnp.zeros_like(start))[
        :, ::-1
    ]
    before = jnp.concatenate([start[:, None], states[:, :-1]], 1)
    return towards * before, towards, forget_gate[:, 0] * towards[:, 0]


_recurrence.defvjp(_forward, _backward)


def _sequential(forget_gate: Array, candidate: Array, start: Array) -> Array:
    def step(state: Array, gates: tuple[Array, Array]) -> tuple[Array, Array]:
        state = gates[0] * state + gates[1]
        return state, state

    _, states = jax.lax.scan(step, start, (forget_gate.swapaxes(0, 1), candidate.swapaxes(0, 1)))
    return states.swapaxes(0, 1)


def _associative(forget_gate: Array, candidate: Array, start: Array) -> Array:
    def combine(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    candidate = candidate.at[:, 0].add(forget_gate[:, 0] * start)
    return jax.lax.associative_scan(combine, (forget_gate, candidate), axis=1)[1]


def _chunked(forget_gate: Array, candidate: Array, start: Array) -> Array:
    batch, steps, features = candidate.shape
    size = _CHUNK if jax.export.is_symbolic_dim(steps) else 1 << max(0, round(math.log2(steps) / 2))
    count = -(-steps // size)

    def cut(x: Array) -> Array:  # (B, T, D) -> (S, N, B, D); steps past the end add nothing
        end: Any = count * size - steps  # a number, or an expression in the name of one
        padded = jnp.pad(x, ((0, 0), (0, end), (0, 0)))
        return padded.reshape(batch, count, size, features).transpose(2, 1, 0, 3)

    def within(
        carry: tuple[Array, Array], gates: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        state, product = gates[0] * carry[0] + gates[1], gates[0] * carry[1]
        return (state, product), (state, product)

    def across(state: Array, last: tuple[Array, Array]) -> tuple[Array, Array]:
        return last[1] * state + last[0], state

    shape = (count, batch, features)
    ends, (local, products) = jax.lax.scan(
        within,
        (jnp.zeros(shape, start.dtype), jnp.ones(shape, start.dtype)),
        (cut(forget_gate), cut(candidate)),
    )
    _, before = jax.lax.scan(across, start, ends)
    states = local + products * before
    return states.transpose(2, 1, 0, 3).reshape(batch, count * size, features)[:, :steps]


def _by_platform(forget_gate: Array, candidate: Array, start: Array) -> Array:
    # Decided when it is compiled, not by the machine it is written down on: programs are compiled
    # ahead for others.
    on_cpu, elsewhere = (
        _FORMS[pick_implementation(candidate.shape[1], platform=platform)]
        for platform in ("cpu", "tpu")
    )
    return jax.lax.platform_dependent(forget_gate, candidate, start, cpu=on_cpu, default=elsewhere)


_FORMS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "auto": _by_platform,
    "sequential": _sequential,
    "associative": _associative,
    "chunked": _chunked,
}
