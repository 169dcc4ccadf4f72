"""Losses: one cross-entropy serves language models and classifiers.

Dimensions: B batch, T tokens (absent for classifiers), V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jax import Array


def cross_entropy(logits: Array, targets: Array, weights: Array | None = None) -> dict[str, Array]:
    """Sums over the batch, in float32: 'loss' (nats), 'correct' (arg-max hits) and 'count'
    (targets), for the caller to divide.

    Args:
      logits: (B, ..., V). targets: (B, ...) int, of which negative ones are left out, or (B, ...,
        V) probabilities, whose largest counts as right.
      weights: (B,), 0 leaves an example out; all 1 if None.
    """
    if targets.ndim == logits.ndim:
        losses, targets = (
            optax.softmax_cross_entropy(logits.astype(jnp.float32), targets),
            targets.argmax(-1),
        )
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), jnp.maximum(targets, 0)
        )
    correct = (logits.argmax(-1) == targets).astype(jnp.float32)
    weights = jnp.ones(targets.shape[:1]) if weights is None else weights
    weights = jnp.where(
        targets >= 0, weights.reshape(-1, *[1] * (targets.ndim - 1)).astype(jnp.float32), 0
    )
    return {
        "loss": jnp.sum(losses * weights),
        "correct": jnp.sum(correct * weights),
        "count": jnp.sum(weights),
    }


def means(logits: Array, targets: Array) -> dict[str, Array]:
    """The means over the batch, float32 scalars: 'loss' and 'accuracy'; arguments as above."""
    return means_of(cross_entropy(logits, targets))


def means_of(sums: Mapping[str, Array]) -> dict[str, Array]:
    """'loss' and 'accuracy' of the sums of `cross_entropy`."""
    return {"loss": sums["loss"] / sums["count"], "accuracy": sums["correct"] / sums["count"]}
