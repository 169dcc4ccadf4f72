"""Normalization over the last axis, with statistics in float32.

Dimensions: d features.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from quweit_jax.layers.costs import Call, rms_norm
from quweit_jax.ops import ternary
from quweit_jax.ops.counts import LayerCosts

Initializer = nn.initializers.Initializer


def normal(std: float) -> Initializer:
    """Normal initializer with the given standard deviation."""
    return nn.initializers.normal(std)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    epsilon: float = ternary.EPSILON
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens d"]) -> Float[Array, "*tokens d"]:
        """x (..., d) -> the same shape, in `dtype`."""
        return ternary.rms_norm(
            x,
            self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32),
            eps=self.epsilon,
        ).astype(self.dtype)

    def costs(self, call: Call) -> list[LayerCosts]:
        """See `layers.costs.rms_norm`."""
        return [rms_norm(call, call.types.activations)]
