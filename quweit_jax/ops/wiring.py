"""Which input each slot of each look-up table reads: random, arange and learnable wiring (arXiv
2410.11112, section 3.3).

Dimensions: F inputs, L tables, n inputs a table, M = n * L slots, C candidates a slot, T tokens.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float, Int, PRNGKeyArray, Shaped, UInt32

from quweit_jax.errors import InputError

_SMALLEST_TAU = 1e-30  # scores divided by less may leave float32
Key = PRNGKeyArray | UInt32[Array, "2"]


def _check_sizes(name: str, num_inputs: int, num_luts: int, lut_inputs: int) -> None:
    if num_inputs < 1 or num_luts < 0 or lut_inputs < 1:
        raise InputError(
            f"{name}: expected num_inputs >= 1, num_luts >= 0 and lut_inputs >= 1, found "
            f"{num_inputs}, {num_luts} and {lut_inputs}."
        )


def random_wiring(key: Key, num_inputs: int, num_luts: int, lut_inputs: int) -> Int[Array, "L n"]:
    """Concatenated random permutations of the inputs, cut at n * L: every input is used equally
    often, give or take one.

    Returns (L, n) int32.
    """
    _check_sizes("random_wiring", num_inputs, num_luts, lut_inputs)
    slots = num_luts * lut_inputs
    rounds = -(-slots // num_inputs)
    keys = jax.random.split(key, rounds)
    permutations = (
        jax.vmap(lambda k: jax.random.permutation(k, num_inputs))(keys)
        if rounds
        else jnp.zeros((0,))
    )
    return permutations.reshape(-1)[:slots].reshape(num_luts, lut_inputs).astype(jnp.int32)


def arange_wiring(num_inputs: int, num_luts: int, lut_inputs: int) -> Int[Array, "L n"]:
    """The inputs in order, round and round: (L, n) int32, `wiring[j, l] = (j * n + l) mod F`."""
    _check_sizes("arange_wiring", num_inputs, num_luts, lut_inputs)
    slots = jnp.arange(num_luts * lut_inputs, dtype=jnp.int32)
    return (slots % num_inputs).reshape(num_luts, lut_inputs)


def invert_wiring(wiring: Int[ArrayLike, "L n"], num_inputs: int) -> Int[Array, "F K"]:
    """The slots that read each input, for a wiring that uses every input equally often: (F, ceil(M
    / F)) int32.

    Slots are numbered input-major, l * L + j; an empty place holds M. With it `lut_lookup` gathers
    its gradient to the bits.

    Raises:
      InputError: a wiring known at trace time that uses some input more often than ceil(M / F),
        leave the inverse out then; or one that refers to an input that isn't there.
    """
    num_luts, lut_inputs = jnp.shape(wiring)
    _check_sizes("invert_wiring", num_inputs, num_luts, lut_inputs)
    slots = num_luts * lut_inputs
    fan_out = -(-slots // num_inputs)
    if not isinstance(wiring, Tracer) and slots:
        known = np.asarray(wiring).reshape(-1)
        if known.min() < 0 or known.max() >= num_inputs:
            raise InputError(
                f"invert_wiring: wiring refers to inputs {known.min()}..{known.max()}, of "
                f"{num_inputs} (valid: 0..{num_inputs - 1})."
            )
        uses = np.bincount(known, minlength=num_inputs)
        if uses.max() > fan_out:
            raise InputError(
                f"invert_wiring: input {int(uses.argmax())} is read {int(uses.max())} times, more "
                f"than ceil(M / F) = {fan_out}; "
                "only an evenly used wiring has an inverse of this form. Call lut_lookup without "
                "one."
            )
    return even_inverse(jnp.asarray(wiring), num_inputs)


def even_inverse(wiring_Ln: Int[Array, "L n"], num_inputs: int) -> Int[Array, "F K"]:
    """The slots (l * L + j) that read each input, for a wiring that uses none more than ceil(M / F)
    times: (F, ceil(M / F)), M if empty.
    """
    _check_sizes("even_inverse", num_inputs, *wiring_Ln.shape)
    slots = math.prod(wiring_Ln.shape)
    reads = wiring_Ln.T.reshape(-1)
    order = jnp.argsort(reads, stable=True).astype(jnp.int32)
    ordered = reads[order]
    place = jnp.arange(slots) - jnp.searchsorted(ordered, jnp.arange(num_inputs))[ordered]
    return (
        jnp.full((num_inputs, -(-slots // num_inputs)), slots, jnp.int32)
        .at[ordered, place]
        .set(order, mode="drop")
    )


def random_candidates(
    key: Key, num_inputs: int, num_slots: int, num_candidates: int
) -> Int[Array, "M C"]:
    """Fixed random candidates for each slot, column by column an even wiring: (M, C) int32."""
    return random_wiring(key, num_inputs, num_candidates, num_slots).T


def strongest(
    scores: Float[ArrayLike, "rows columns"],
    candidates: Int[ArrayLike, "rows columns"] | None = None,
) -> Int[Array, " M"]:
    """The input each slot of a learnable wiring reads: scores (F, M), or (M, C) with candidates
    (M, C) -> int (M,).

    Raises:
      InputError: there is nothing to choose from.
    """
    if not jnp.shape(scores)[candidates is not None]:
        raise InputError(
            "strongest: expected scores for at least one input or candidate, found "
            f"{list(jnp.shape(scores))}."
        )
    if candidates is None:
        return _argmax_of_columns(jnp.asarray(scores))
    return jnp.take_along_axis(
        jnp.asarray(candidates), jnp.argmax(jnp.asarray(scores), axis=1)[:, None], axis=1
    )[:, 0]


def _argmax_of_columns(scores: Float[Array, "F M"]) -> Int[Array, " M"]:
    """`jnp.argmax(scores, axis=0)`, which on CPUs is no vector code and was half of a training
    step: two reductions take a sixth of its time. In a column with NaN: the last row.
    """
    rows = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    largest = jnp.max(scores, axis=0)
    return jnp.min(jnp.where(scores == largest, rows, scores.shape[0] - 1), axis=0)


def marginal_inputs(
    scores: Float[ArrayLike, "rows columns"],
    candidates: Int[ArrayLike, "rows columns"] | None = None,
    *,
    tau: float = 1.0,
) -> Float[Array, ""]:
    """The expected number of inputs that a slot of a learnable wiring reads alone: `sum_m sum_f
    softmax_f(scores / tau)[f, m] * (no slot but m reads f)`, others reading what they read now.

    Each such input costs a comparator in hardware. The gradient moves slots to inputs that are read
    already.

    Args:
      scores: (F, M), or (M, C) with candidates (M, C) int.
      tau: how soft the expectation is.

    Returns:
      A float32 scalar, 0 to M.
    """
    tau = _temperature("marginal_inputs", tau)
    scores, axis = jnp.asarray(scores, jnp.float32), int(candidates is not None)
    reads = strongest(scores, candidates)
    choices = jnp.arange(scores.shape[0])[:, None] if candidates is None else candidates
    own = reads if candidates is None else reads[:, None]
    ordered, choices = jnp.sort(reads), jnp.asarray(choices)
    readers = jnp.searchsorted(ordered, choices, side="right") - jnp.searchsorted(ordered, choices)
    alone = readers == (choices == own)
    return jnp.sum(jax.nn.softmax(scores / tau, axis=axis) * alone)


def _inexact(bits: ArrayLike, like: Array) -> Array:
    bits = jnp.asarray(bits)
    return bits if jnp.issubdtype(bits.dtype, jnp.floating) else bits.astype(like.dtype)


def _temperature(name: str, tau: float) -> float:
    """tau, if a gradient can be divided by it."""
    if not _SMALLEST_TAU <= tau < math.inf:
        raise InputError(
            f"{name}: tau is a temperature, expected {_SMALLEST_TAU:g} or more, found {tau}."
        )
    return float(tau)


def learnable_wiring(
    bits: Shaped[ArrayLike, "*tokens F"], scores: Float[ArrayLike, "F M"], *, tau: float = 0.001
) -> Float[Array, "*tokens M"]:
    """Each slot reads the input with the largest score: `y[..., m] = bits[..., argmax_f scores[f,
    m]]`.

    Gradients: `dscores = (2 bits - 1)^T g` (no softmax Jacobian), `dbits = g softmax(scores / tau,
      axis=0)^T`.

    Args:
      bits: (..., F) in {0, 1}. scores: (F, M). tau: temperature of the gradient to the bits.

    Returns:
      (..., M), the bits' dtype (the scores' if the bits are not floating). Ties go to the lowest
      input.
    """
    scores = jnp.asarray(scores)
    bits = _inexact(bits, scores)
    if scores.ndim != 2 or bits.ndim < 1 or bits.shape[-1] != scores.shape[0]:
        raise InputError(
            "learnable_wiring: expected bits (..., F) and scores (F, M), found "
            f"{list(bits.shape)} and {list(scores.shape)}."
        )
    return _learnable(bits, scores, _temperature("learnable_wiring", tau))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _learnable(bits, scores, tau):
    return jnp.take(bits, strongest(scores), axis=-1, mode="clip")


def _learnable_forward(bits, scores, tau):
    return _learnable(bits, scores, tau), (bits, scores)


def _learnable_backward(tau, saved, grad):
    bits, scores = saved
    tokens = math.prod(bits.shape[:-1])
    bits_TF, grad_TM = (a.reshape(tokens, a.shape[-1]) for a in (bits, grad))
    grad_scores = (2 * bits_TF - 1).T @ grad_TM
    weights = jax.nn.softmax(scores.astype(jnp.float32) / tau, axis=0).astype(grad.dtype)
    grad_bits = (grad_TM @ weights.T).reshape(bits.shape)
    return grad_bits.astype(bits.dtype), grad_scores.astype(scores.dtype)


_learnable.defvjp(_learnable_forward, _learnable_backward)


def sparse_learnable_wiring(
    bits: Shaped[ArrayLike, "*tokens F"],
    scores: Float[ArrayLike, "M C"],
    candidates: Int[ArrayLike, "M C"],
    *,
    tau: float = 0.001,
) -> Float[Array, "*tokens M"]:
    """`learnable_wiring` among C candidates a slot: what a transformer can afford.

    Args:
      bits: (..., F) in {0, 1}. scores: (M, C). candidates: (M, C) int, the inputs among which each
        slot chooses.
      tau: temperature of the gradient to the bits.

    Returns:
      (..., M), the bits' dtype (the scores' if the bits are not floating).
    """
    scores = jnp.asarray(scores)
    bits = _inexact(bits, scores)
    if scores.ndim != 2 or jnp.shape(candidates) != scores.shape:
        raise InputError(
            "sparse_learnable_wiring: scores and candidates must both be (M, C), found "
            f"{list(scores.shape)} and {list(jnp.shape(candidates))}."
        )
    if not isinstance(candidates, Tracer) and np.size(candidates):
        low, high = int(np.min(np.asarray(candidates))), int(np.max(np.asarray(candidates)))
        if low < 0 or high >= bits.shape[-1]:
            raise InputError(
                f"sparse_learnable_wiring: candidates refer to inputs {low}..{high} but bits has "
                f"{bits.shape[-1]} (valid: 0..{bits.shape[-1] - 1})."
            )
    tokens_FT = bits.reshape(math.prod(bits.shape[:-1]), bits.shape[-1]).T
    chosen = sparse_wiring_feature_major(tokens_FT, scores, jnp.asarray(candidates), tau=tau)
    return chosen.T.reshape(*bits.shape[:-1], scores.shape[0])


def sparse_wiring_feature_major(
    bits_FT: Float[Array, "F T"],
    scores: Float[Array, "M C"],
    candidates: Int[Array, "M C"],
    *,
    tau: float = 0.001,
) -> Float[Array, "M T"]:
    """`sparse_learnable_wiring` for floating bits that are (F, T) already; returns (M, T)."""
    if not bits_FT.shape[0]:
        raise InputError(
            f"sparse_learnable_wiring: expected at least one bit, found {list(bits_FT.shape)}."
        )
    return _sparse(bits_FT, scores, candidates, _temperature("sparse_learnable_wiring", tau))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sparse(bits_FT, scores, candidates, tau):
    chosen = strongest(scores, candidates)
    return jnp.take(bits_FT, chosen, axis=0, mode="clip")


def _sparse_forward(bits_FT, scores, candidates, tau):
    return _sparse(bits_FT, scores, candidates, tau), (bits_FT, scores, candidates)


def _sparse_backward(tau, saved, grad_MT):
    bits_FT, scores, candidates = saved
    weights = jax.nn.softmax(scores.astype(jnp.float32) / tau, axis=1).astype(grad_MT.dtype)
    signed_FT = 2 * bits_FT - 1

    def one_candidate(grad_bits, column):
        inputs, weight = column
        grad_scores = jnp.einsum(
            "mt,mt->m", jnp.take(signed_FT, inputs, axis=0, mode="clip"), grad_MT
        )
        return grad_bits.at[inputs].add(
            (weight[:, None] * grad_MT).astype(grad_bits.dtype), mode="drop"
        ), grad_scores

    grad_bits, grad_scores = jax.lax.scan(
        one_candidate, jnp.zeros_like(bits_FT), (candidates.T, weights.T)
    )
    return grad_bits, grad_scores.T.astype(scores.dtype), None


_sparse.defvjp(_sparse_forward, _sparse_backward)
