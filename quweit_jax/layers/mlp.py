"""Dense channel mixers: the MLP of GPT and ViT, and the gated one of Llama.

Dimensions: d model width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from quweit_jax.layers.costs import Call, activation
from quweit_jax.layers.norms import Initializer, normal
from quweit_jax.ops.counts import LayerCosts

GELUS = ("exact", "tanh")


class MLP(nn.Module):
    """Dense -> GELU -> Dense, the hidden layer `ratio` times wider; gelu is 'exact' or the 'tanh'
    approximation.

    kernel_init, output_init: of the first and the second kernel.
    """

    ratio: int = 4
    dropout: float = 0.0
    use_bias: bool = False
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)
    gelu: str = "exact"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """x (..., d) -> (..., d)."""
        dense = {"use_bias": self.use_bias, "dtype": self.dtype}
        hidden = nn.gelu(
            nn.Dense(self.ratio * x.shape[-1], kernel_init=self.kernel_init, name="up", **dense)(x),
            approximate=self.gelu == "tanh",
        )
        out = nn.Dense(x.shape[-1], kernel_init=self.output_init, name="down", **dense)(hidden)
        return nn.Dropout(self.dropout, deterministic=not train)(out)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Two dense layers and a GELU of what is between them."""
        gelu = activation(call.at("gelu"), call.rows * self.ratio * call.width, self.gelu)
        return call.inner("mlp", after={"up": [gelu]})


class SwiGLU(nn.Module):
    """down(silu(a) * b) with [a, b] = gate(x), without biases (Shazeer 2020, arXiv 2002.05202)."""

    hidden: int
    output_init: Initializer = normal(0.02)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (..., d) -> (..., d)."""
        both = nn.Dense(
            2 * self.hidden, use_bias=False, kernel_init=normal(0.02), dtype=self.dtype, name="gate"
        )(x)
        gate, up = jnp.split(both, 2, axis=-1)
        return nn.Dense(
            x.shape[-1], use_bias=False, kernel_init=self.output_init, dtype=self.dtype, name="down"
        )(jax.nn.silu(gate) * up)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Two dense layers and a SiLU, times the other branch, of what is between them."""
        silu = activation(call.at("silu"), call.rows * self.hidden, "gated_silu")
        return call.inner("mlp", after={"gate": [silu]})
