"""How the next token is drawn from a language model's logits.

Dimensions: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from quweit_jax.errors import InputError

_FLOAT = np.finfo(np.float32)
_LARGEST = np.iinfo(np.int32).max
_LEAST = float(_FLOAT.tiny)  # of what is a float32 number as its inverse is


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings; the defaults of all but the temperature change nothing.

    temperature: by which logits are divided; 0: always the likeliest; infinite: each as often.
    top_k: only among the k likeliest (0: all).
    top_p: of these only the likeliest that are needed to reach this probability together, one at
      least (nucleus sampling, arXiv 1904.09751, section 3.1).
    min_p: of these only those at least this many times as probable as the likeliest
      (arXiv 2407.01082).
    repetition_penalty: what a logit above 0 of a token that the text has already is divided by, and
      one below 0 multiplied with (arXiv 1909.05858, section 4.1).
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise InputError(
                f"--temperature: expected 0 (always the likeliest) or more, found "
                f"{self.temperature}."
            )
        if self.top_k < 0:
            raise InputError(
                f"--top_k: expected 0 (all) or a number of tokens, found {self.top_k}."
            )
        if not 0 <= self.top_p <= 1:
            raise InputError(f"--top_p: expected a probability, 0 to 1 (all), found {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise InputError(
                f"--min_p: expected a share of the likeliest, 0 (all) to 1, found {self.min_p}."
            )
        if not _LEAST <= self.repetition_penalty <= 1 / _LEAST:
            raise InputError(
                f"--repetition_penalty: expected a positive number, {_LEAST:.1e} to "
                f"{1 / _LEAST:.1e}, 1 for none, found {self.repetition_penalty}."
            )

    def pick(self, key: Array, logits: Array, seen: Array | None = None) -> Array:
        """One token id (int32) from logits (V,). seen: bool (V,), the tokens that the text has.

        Raises:
          InputError: no logits.
        """
        if logits.ndim != 1 or not logits.size:
            raise InputError(
                f"Sampling.pick: expected logits (V,) of one token, found {list(logits.shape)}."
            )
        logits = logits.astype(jnp.float32)
        logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)  # the likeliest is a number
        if seen is not None and self.repetition_penalty != 1:
            lower = jnp.where(logits > 0, 1 / self.repetition_penalty, self.repetition_penalty)
            logits = jnp.where(seen, logits * lower, logits)
        if self.temperature < float(_FLOAT.tiny):  # what float32 would divide by as by 0
            return jnp.argmax(logits).astype(jnp.int32)
        return jax.random.categorical(key, self._kept(logits)).astype(jnp.int32)

    def _kept(self, logits: Array) -> Array:
        """Logits at the temperature, -inf where a token may not be drawn."""
        largest = logits.max()
        # below 0 by as much, so that no quotient is too large; equal ones, also infinite, are at 0
        below = jnp.where(logits == largest, 0.0, logits - largest)
        finite = self.temperature <= float(_FLOAT.max)
        scaled = below / self.temperature if finite else jnp.zeros_like(below)
        scaled = jnp.where(below == -jnp.inf, -jnp.inf, scaled)
        if 0 < self.top_k < logits.shape[-1]:
            kept = jax.lax.top_k(logits, self.top_k)[1]  # of equal ones the first
            scaled = jnp.full_like(scaled, -jnp.inf).at[kept].set(scaled[kept])
        if self.top_p < 1:
            scaled = _nucleus(scaled, self.top_p)
        if self.min_p > 0:  # the likeliest is at 0
            scaled = jnp.where(scaled < np.log(self.min_p), -jnp.inf, scaled)
        return scaled


@functools.partial(jax.jit, static_argnums=0)
def pick_batch(
    sampling: Sampling, keys: Array, step: Array | int, logits: Array, seen: Array | None
) -> Array:
    """A token id for each row of logits (B, V) by its own key (B,), folded with the step: (B,)
    int32. seen: bool (B, V) or None.
    """

    def one(key: Array, logits: Array, seen: Array | None) -> Array:
        return sampling.pick(jax.random.fold_in(key, step), logits, seen)

    return jax.vmap(one, in_axes=(0, 0, None if seen is None else 0))(keys, logits, seen)


def _nucleus(logits: Array, top_p: float | Array) -> Array:
    """Logits (V,) with -inf for all but the likeliest that reach top_p together."""
    order = jnp.argsort(logits, descending=True)
    probabilities = jax.nn.softmax(logits)[order]
    before = jnp.cumsum(probabilities) - probabilities
    kept = (before < top_p).at[0].set(True)
    return jnp.where(jnp.zeros_like(kept).at[order].set(kept), logits, -jnp.inf)


class Settings(NamedTuple):
    """The `Sampling` of several texts as arrays (B,), so that one program draws for all of them.

    inverse: of the temperature, float32. greedy: bool, always the likeliest. top_k: int32; top_p,
    log_min_p (-inf for none), penalty and its inverse: float32.
    """

    inverse: Array | np.ndarray
    greedy: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    log_min_p: Array | np.ndarray
    penalty: Array | np.ndarray
    inverse_penalty: Array | np.ndarray

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> Settings:
        """Those of `Sampling`s, rounded as a program that has them as constants rounds them."""
        temperatures = np.asarray([min(s.temperature, np.inf) for s in samplings], np.float64)
        greedy = temperatures < float(_FLOAT.tiny)
        finite = ~greedy & (temperatures <= float(_FLOAT.max))
        inverse = np.float32(1) / np.where(finite, temperatures, 1).astype(np.float32)
        min_p = np.asarray([s.min_p for s in samplings], np.float64)
        penalty = np.asarray([s.repetition_penalty for s in samplings], np.float64)
        return cls(
            np.where(finite, inverse, 0).astype(np.float32),
            greedy,
            np.asarray([min(s.top_k, _LARGEST) for s in samplings], np.int32),
            np.asarray([s.top_p for s in samplings], np.float32),
            np.log(min_p, where=min_p > 0, out=np.full_like(min_p, -np.inf)).astype(np.float32),
            penalty.astype(np.float32),
            (1 / penalty).astype(np.float32),
        )


def pick_each(settings: Settings, keys: Array, steps: Array, logits: Array, seen: Array) -> Array:
    """What `pick_batch` draws for each row of logits (B, V) with settings of its own: (B,) int32.
    Nothing is sorted while no row's settings ask for it.

    keys: (B,). steps: int (B,), that they are folded with. seen: bool (B, V).
    """
    logits = logits.astype(jnp.float32)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    of_row = jax.tree.map(lambda setting: jnp.asarray(setting)[:, None], settings)
    lower = jnp.where(logits > 0, of_row.inverse_penalty, of_row.penalty)
    logits = jnp.where(seen & (of_row.penalty != 1), logits * lower, logits)
    largest = logits.max(-1, keepdims=True)
    below = jnp.where(logits == largest, 0.0, logits - largest)
    scaled = jnp.where(below == -jnp.inf, -jnp.inf, below * of_row.inverse)
    top_k, top_p = jnp.asarray(settings.top_k), jnp.asarray(settings.top_p)
    few = (top_k > 0) & (top_k < logits.shape[-1])

    def among_the_top(logits: Array, scaled: Array, few: Array, k: Array, p: Array) -> Array:
        order = jnp.argsort(logits, descending=True)  # of equal ones the first
        rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
        scaled = jnp.where(few & (rank >= k), -jnp.inf, scaled)
        return jnp.where(p < 1, _nucleus(scaled, p), scaled)

    scaled = jax.lax.cond(
        (few | (top_p < 1)).any(),
        lambda: jax.vmap(among_the_top)(logits, scaled, few, top_k, top_p),
        lambda: scaled,
    )
    scaled = jnp.where(scaled < of_row.log_min_p, -jnp.inf, scaled)
    drawn = jax.vmap(
        lambda key, step, row: jax.random.categorical(jax.random.fold_in(key, step), row)
    )(keys, steps, scaled)
    return jnp.where(settings.greedy, jnp.argmax(logits, -1), drawn).astype(jnp.int32)
