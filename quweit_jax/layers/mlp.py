"""Channel mixers: the MLP of GPT and ViT, the gated one of Llama, and `make`, which picks what
takes their place.

Dimensions: d model width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from quweit_jax.errors import check_choice
from quweit_jax.layers.costs import Call, activation
from quweit_jax.layers.integer_blocks import IntegerWeightlessBlock
from quweit_jax.layers.integer_glu import IntegerLookupGLU
from quweit_jax.layers.lookup_glu import LookupGLU
from quweit_jax.layers.norms import Initializer, RMSNorm, normal
from quweit_jax.layers.ternary import BitGLU, BitLinear, gated_width
from quweit_jax.layers.weightless import WeightlessBlock
from quweit_jax.ops.counts import LayerCosts

GELUS = ("exact", "tanh")
ACTIVATIONS = {"silu": jax.nn.silu, "relu2": lambda x: jnp.square(jax.nn.relu(x))}


class MLP(nn.Module):
    """Dense -> GELU -> Dense, the hidden layer `ratio` times wider; gelu is 'exact' or the 'tanh'
    approximation.

    kernel_init, output_init: of the first and the second kernel.
    """

    ratio: int = 4
    use_bias: bool = False
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)
    gelu: str = "exact"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens d"]) -> Float[Array, "*tokens d"]:
        """x (..., d) -> (..., d)."""
        dense = {"use_bias": self.use_bias, "dtype": self.dtype}
        hidden = nn.gelu(
            nn.Dense(self.ratio * x.shape[-1], kernel_init=self.kernel_init, name="up", **dense)(x),
            approximate=self.gelu == "tanh",
        )
        return nn.Dense(x.shape[-1], kernel_init=self.output_init, name="down", **dense)(hidden)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Two dense layers and a GELU of what is between them."""
        gelu = activation(call, self.gelu, self.ratio * call.width)
        return call.inner("mlp", after={"up": [gelu]})


class SwiGLU(nn.Module):
    """down(silu(a) * b) with [a, b] = gate(x), without biases (Shazeer 2020, arXiv 2002.05202).

    hidden: 0 for 8 d / 3 in multiples of 8, as many parameters as an MLP of 4 d.
    activation: 'silu', or 'relu2', a squared ReLU in its place. linear: 'dense', or 'ternary'
      without norms of its own: a and b then have a matrix each, gate and up, as in BitNet b1.58.
    sub_norm: epsilon of an RMSNorm before the last matrix, 0 for none.
    """

    features: int
    hidden: int = 0
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)
    dtype: DTypeLike = jnp.float32
    activation: str = "silu"
    linear: str = "dense"
    sub_norm: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens d"]) -> Float[Array, "*tokens features"]:
        """x (..., d) -> (..., features)."""
        check_choice("SwiGLU: activation", self.activation, ACTIVATIONS)
        hidden = gated_width(self.hidden, x.shape[-1])
        if self.linear == "ternary":
            ternary = functools.partial(BitLinear, dtype=self.dtype, use_norm=False)
            gate = ternary(hidden, self.kernel_init, name="gate")(x)
            up = ternary(hidden, self.kernel_init, name="up")(x)
            down = ternary(self.features, self.output_init, name="down")
        else:
            dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
            both = dense(2 * hidden, kernel_init=self.kernel_init, name="gate")(x)
            gate, up = jnp.split(both, 2, axis=-1)
            down = dense(self.features, kernel_init=self.output_init, name="down")
        inner = ACTIVATIONS[self.activation](gate) * up
        if self.sub_norm:
            inner = RMSNorm(self.sub_norm, self.dtype, name="sub_norm")(inner)
        return down(inner)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Its layers and an activation, times the other branch, of what is between them."""
        hidden = gated_width(self.hidden, call.width)
        last = "up" if self.linear == "ternary" else "gate"
        return call.inner("mlp", after={last: [activation(call, self.activation, hidden)]})


# What any model can have in the place of its own MLP: kind -> (block, its integer-only form or
# None). A kind's options are the section of that name in the model's config. A block that brings a
# norm of its own says so by a field `use_norm`.
BLOCKS: dict[str, tuple[type[nn.Module], type[nn.Module] | None]] = {
    "weightless": (WeightlessBlock, IntegerWeightlessBlock),
    "lookup_glu": (LookupGLU, IntegerLookupGLU),
    "swiglu": (SwiGLU, None),
    "bitglu": (BitGLU, None),
}


def kinds(integer: bool = False) -> tuple[str, ...]:
    """What `make` knows: the model's own MLP, the blocks (with an integer form), and none."""
    return ("dense", *(kind for kind, forms in BLOCKS.items() if forms[1] or not integer), "none")


def brings_norm(mixer: nn.Module) -> bool:
    """Whether a mixer normalizes what it reads itself, so that the model does not."""
    return getattr(mixer, "use_norm", False)


def make(
    kind: str,
    features: int,
    config: Any,
    dense: Callable[[], nn.Module],
    *,
    integer: bool = False,
    name: str = "mlp",
    **fields: Any,
) -> nn.Module | None:
    """The channel mixer of one block, (..., d) -> (..., d), or None for 'none'.

    Args:
      kind: one of `kinds`. features: d. config: the model's, whose section `kind` has the options.
      dense: makes the model's own MLP. integer: the integer-only form.
      fields: of the block beside its options, such as dtype or use_norm; a block without such a
        field goes without.

    Raises:
      InputError: an unknown kind.
    """
    check_choice("model.mlp", kind, kinds(integer))
    if kind == "none":
        return None
    if kind == "dense":
        return dense()
    options = dataclasses.asdict(getattr(config, kind))
    block: Any = BLOCKS[kind][integer]
    has = {field.name for field in dataclasses.fields(block)}
    fields = {name: value for name, value in fields.items() if name in has}
    return block(features, name=name, **fields, **options)
