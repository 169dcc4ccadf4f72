"""The gated delta rule, a linear recurrence over matrices (Yang, Kautz and Hatamizadeh 2024, Gated
Delta Networks, arXiv 2412.06464, equations 9 and 10; without gate Yang et al. 2024, arXiv
2406.06484).

A state S holds values under keys: S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T, and what
is read is o_t = S_t^T q_t. A step forgets by a_t and moves what is held under k_t a part b_t of the
way to v_t, so that keys can be overwritten, which a state without keys cannot.

In chunks of C steps (the WY form of both papers): with g the logarithms of the gates added up from
the chunk's beginning and D_ij = exp(g_i - g_j) for j <= i, the corrections u_i = b_i (v_i - a_i
S_{i-1}^T k_i) solve one triangular system for the whole chunk,

    (1 + strict(diag(b) (K K^T * D))) U = diag(b) (V - diag(exp g) K S),

which is linear in the state S before it: all chunks are solved at once, and a loop over chunks
carries S.

Dimensions: B batch, T time steps, H heads, K width of keys, V width of values, C steps of a chunk.
"""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from quweit_jax.errors import InputError, check_choice

IMPLEMENTATIONS = ("auto", "sequential", "chunked")
CHUNK = 64  # steps, as published


def gated_delta(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_gate: Float[Array, "B T H"],
    rate: Float[Array, "B T H"],
    initial_state: Float[Array, "B H K V"] | None = None,
    *,
    implementation: str = "auto",
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """What the gated delta rule reads at every step, and its last state.

    Args:
      q, k, v: queries, keys and values, floating; keys of length 1 keep the state bounded. T may be
        0. log_gate: ln a_t, at most 0. rate: b_t, from 0 to 1 (or 2). A step of log_gate 0 and rate
        0 leaves the state as it is.
      initial_state: S before the first step; None for zeros.
      implementation: 'sequential' (a loop over time), 'chunked' or 'auto' (the former up to 16
        steps). chunk: C, steps of a chunk.

    Returns:
      (read (B, T, H, V) in v's dtype, final state (B, H, K, V)). Sums are in float32 (float64 for
        float64 inputs); gradients of all arguments are those of these steps, exactly.

    Raises:
      InputError: shapes that don't belong together, an unknown implementation, or no chunk.
    """
    check_choice("gated_delta: implementation", implementation, IMPLEMENTATIONS)
    if chunk < 1:
        raise InputError(f"gated_delta: chunk: expected at least 1 step, found {chunk}.")
    _check(q, k, v, log_gate, rate, initial_state)
    batch, steps, heads, width = k.shape
    exact = jnp.promote_types(jnp.result_type(q, k, v, log_gate, rate), jnp.float32)
    state = jnp.zeros((batch, heads, width, v.shape[-1]), exact)
    if initial_state is not None:
        state = initial_state.astype(exact)
    if not jax.export.is_symbolic_dim(steps) and steps == 0:
        return v, state
    q, k, wide, log_gate, rate = (x.astype(exact) for x in (q, k, v, log_gate, rate))
    short = not jax.export.is_symbolic_dim(steps) and steps <= 16
    if implementation == "sequential" or (implementation == "auto" and short):
        read, state = _sequential(q, k, wide, log_gate, rate, state)
    else:
        read, state = _chunked(q, k, wide, log_gate, rate, state, chunk)
    return read.astype(v.dtype), state


def gated_delta_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    log_gate: Float[Array, "B H"],
    rate: Float[Array, "B H"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One step, for decoding: (what is read (B, H, V), the next state), in state's dtype."""
    faded = state * jnp.exp(log_gate)[..., None, None].astype(state.dtype)
    held = jnp.einsum("bhkv,bhk->bhv", faded, k)
    change = rate[..., None] * (v - held)
    state = (faded + k[..., None] * change[..., None, :]).astype(state.dtype)
    return jnp.einsum("bhkv,bhk->bhv", state, q).astype(state.dtype), state


def _check(
    q: Array, k: Array, v: Array, log_gate: Array, rate: Array, initial_state: Array | None
) -> None:
    fits = q.ndim == v.ndim == 4 and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    fits = fits and log_gate.shape == rate.shape == q.shape[:3]
    if fits and initial_state is not None:
        fits = initial_state.shape == (q.shape[0], *q.shape[2:], v.shape[-1])
    if not fits:
        shapes = [list(x.shape) for x in (q, k, v, log_gate, rate)]
        held = "" if initial_state is None else f" and a state {list(initial_state.shape)}"
        raise InputError(
            "gated_delta: expected q and k (batch, time, heads, key), v (batch, time, heads, "
            "value), log_gate and rate (batch, time, heads) and a state (batch, heads, key, "
            f"value), found {shapes}{held}."
        )


def _sequential(
    q: Array, k: Array, v: Array, log_gate: Array, rate: Array, state: Array
) -> tuple[Array, Array]:
    def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, log_gate, rate = now
        read, state = gated_delta_step(q, k, v, log_gate, rate, state)
        return state, read

    inputs = tuple(x.swapaxes(0, 1) for x in (q, k, v, log_gate, rate))
    state, read = jax.lax.scan(step, state, inputs)
    return read.swapaxes(0, 1), state


def _chunked(
    q: Array, k: Array, v: Array, log_gate: Array, rate: Array, state: Array, size: int
) -> tuple[Array, Array]:
    batch, steps = k.shape[:2]
    count = -(-steps // size)

    def cut(x: Array) -> Array:  # (B, T, H, ...) -> (N, B, H, C, ...); what is past the end is 0
        spare = [(0, 0)] * x.ndim
        spare[1] = (0, count * size - steps)
        cut = jnp.pad(x, spare).reshape(batch, count, size, *x.shape[2:])
        return jnp.moveaxis(cut, (1, 3), (0, 2))

    q, k, v, rate = cut(q), cut(k), cut(v), cut(rate)[..., None]
    gate = jnp.cumsum(cut(log_gate), -1)
    seen = jnp.tril(jnp.ones((size, size), bool))
    fade = jnp.where(seen, gate[..., :, None] - gate[..., None, :], 0)
    fade = jnp.where(seen, jnp.exp(fade), 0)  # exp of what is not seen could overflow
    alike = jnp.einsum("nbhik,nbhjk->nbhij", k, k) * fade * rate
    system = jnp.where(jnp.eye(size, dtype=bool), 1, alike)
    since = jnp.exp(gate)[..., None]  # the start of the chunk
    sides = jnp.concatenate([rate * v, rate * since * k], -1)
    solved = jax.lax.platform_dependent(system, sides, cpu=_substituted, default=_solved)
    own, of_state = jnp.split(solved, [v.shape[-1]], axis=-1)
    attended = jnp.einsum("nbhik,nbhjk->nbhij", q, k) * fade
    until = jnp.exp(gate[..., -1:] - gate)[..., None]  # the end of the chunk

    def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        own, of_state, attended, q_since, k_until, whole = now
        change = own - of_state @ state
        read = q_since @ state + attended @ change
        state = whole * state + jnp.swapaxes(k_until, -1, -2) @ change
        return state, read

    whole = jnp.exp(gate[..., -1])[..., None, None]
    state, read = jax.lax.scan(step, state, (own, of_state, attended, q * since, k * until, whole))
    read = jnp.moveaxis(read, (0, 2), (1, 3)).reshape(batch, count * size, *read.shape[2:3], -1)
    return read[:, :steps], state


def _solved(system: Array, sides: Array) -> Array:
    """X (..., C, W) of (unit lower triangular system (..., C, C)) X = sides."""
    return jax.scipy.linalg.solve_triangular(system, sides, lower=True, unit_diagonal=True)


@jax.custom_vjp
def _substituted(system: Array, sides: Array) -> Array:
    """The same, a row at a time: XLA's call of LAPACK can wait for itself where a step runs on
    several threads of a CPU.
    """
    return _substitute(jnp.tril(system, -1), sides, reverse=False)


def _substitute(strict: Array, sides: Array, *, reverse: bool) -> Array:
    def row(found: Array, i: Array) -> tuple[Array, None]:
        factors = jax.lax.dynamic_index_in_dim(strict, i, -2)
        side = jax.lax.dynamic_index_in_dim(sides, i, -2)
        new = side - factors @ found
        return jax.lax.dynamic_update_index_in_dim(found, new, i, -2), None

    order = jnp.arange(sides.shape[-2])
    return jax.lax.scan(row, jnp.zeros_like(sides), order, reverse=reverse)[0]


def _substituted_forward(system: Array, sides: Array) -> tuple[Array, tuple[Array, Array]]:
    found = _substituted(system, sides)
    return found, (system, found)


def _substituted_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    system, found = saved
    strict = jnp.swapaxes(jnp.tril(system, -1), -1, -2)
    sides = _substitute(strict, grad, reverse=True)
    return -jnp.tril(sides @ jnp.swapaxes(found, -1, -2), -1), sides


_substituted.defvjp(_substituted_forward, _substituted_backward)
