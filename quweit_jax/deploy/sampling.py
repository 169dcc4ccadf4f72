"""How the next token is drawn from a language model's logits.

Dimensions: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from quweit_jax.errors import InputError

_FLOAT = np.finfo(np.float32)


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
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(
                "--repetition_penalty: expected a positive number, 1 for none, found "
                f"{self.repetition_penalty}."
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


def _nucleus(logits: Array, top_p: float) -> Array:
    """Logits (V,) with -inf for all but the likeliest that reach top_p together."""
    order = jnp.argsort(logits, descending=True)
    probabilities = jax.nn.softmax(logits)[order]
    before = jnp.cumsum(probabilities) - probabilities
    kept = (before < top_p).at[0].set(True)
    return jnp.where(jnp.zeros_like(kept).at[order].set(kept), logits, -jnp.inf)
