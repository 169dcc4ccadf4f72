"""Stochastic depth (Huang et al. 2016): whole residual branches left out in training."""

from __future__ import annotations

from typing import overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

from quweit_jax.layers.costs import Call
from quweit_jax.layers.integer import Quantized
from quweit_jax.ops.counts import LayerCosts


class DropPath(nn.Module):
    """Leaves a branch out for a share `rate` of the examples while training, and scales up the
    others; whole numbers stay whole.
    """

    rate: float

    @overload
    def __call__(self, x: Shaped[Array, "B *rest"], train: bool) -> Shaped[Array, "B *rest"]: ...
    @overload
    def __call__(self, x: Quantized, train: bool) -> Quantized: ...
    @nn.compact
    def __call__(
        self, x: Shaped[Array, "B *rest"] | Quantized, train: bool
    ) -> Shaped[Array, "B *rest"] | Quantized:
        """x, an array (B, ...) or Quantized -> the same."""
        if not train or self.rate == 0:
            return x
        shape = x.ints.shape if isinstance(x, Quantized) else x.shape
        kept = jax.random.bernoulli(
            self.make_rng("dropout"), 1 - self.rate, (shape[0],) + (1,) * (len(shape) - 1)
        )
        if isinstance(x, Quantized):
            return Quantized(
                jnp.where(kept, jnp.round(x.ints / (1 - self.rate)), 0),
                x.scale,
                jnp.where(kept, x.real / (1 - self.rate), 0),
            )
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)

    def costs(self, call: Call) -> list[LayerCosts]:
        """It costs nothing: nothing is left out at inference."""
        return []
