"""GPT in nanoGPT's architecture, each block's MLP dense, weightless or absent.

Dimensions: B batch, T tokens, V vocabulary, d model width.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Integer

from quweit_jax.errors import InputError, check_above_zero, check_choice
from quweit_jax.layers import mlp
from quweit_jax.layers.attention import ATTENTIONS, LINEARS, CausalSelfAttention, token_positions
from quweit_jax.layers.costs import Call, residuals
from quweit_jax.layers.mlp import GELUS
from quweit_jax.layers.norms import normal
from quweit_jax.layers.readout import Pieces, read_out
from quweit_jax.models.options import (
    DTYPES,
    ChannelMixers,
    check_init,
    check_positive,
    first_init,
    kinds_of_mlp,
)
from quweit_jax.models.stack import Depth, run_blocks
from quweit_jax.ops.counts import BYTES, Elementwise, LayerCosts


@dataclasses.dataclass(frozen=True)
class GPTConfig(ChannelMixers, Depth):
    """What decides a GPT's shape; the defaults are nanoGPT's for characters.

    mlp: 'dense', 'weightless' or 'none' for every block, or one for each block joined by '+':
    'dense+weightless'. mlp_init: standard deviation of the first kernel of an MLP or gated unit at
      the start, nanoGPT's 0.02; 0 for 1 / sqrt(d), which gives what it computes unit variance and
      trains better at small widths. epsilon: of the norms outside weightless blocks.
    linear: attention's projections, 'dense' or 'ternary' (`layers.ternary.BitLinear`).
    """

    vocab_size: int
    context: int = 256
    layers: int = 6
    heads: int = 6
    width: int = 384
    mlp_init: float = 0.02
    dropout: float = 0.0
    bias: bool = False
    gelu: str = "exact"
    epsilon: float = 1e-5
    tie_embeddings: bool = True
    dtype: str = "float32"
    attention: str = "auto"
    linear: str = "dense"

    def __post_init__(self):
        check_positive(self, "vocab_size", "context", "layers", "heads", "width")
        if self.width % self.heads:
            raise InputError(
                f"model.width: {self.width} is not a multiple of model.heads = {self.heads}; use "
                f"{self.heads * -(-self.width // self.heads)}."
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout: expected 0 <= dropout < 1, found {self.dropout}.")
        check_init(self)
        check_above_zero("model.epsilon", self.epsilon)
        self.check_depth()
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.gelu", self.gelu, GELUS)
        check_choice("model.attention", self.attention, ATTENTIONS)
        check_choice("model.linear", self.linear, LINEARS)
        self.mlps()

    def mlps(self) -> tuple[str, ...]:
        """The kind of each block's MLP."""
        return kinds_of_mlp(self.mlp, self.layers)


class GPTBlock(nn.Module):
    """Pre-norm attention and, unless `mlp` is 'none', a dense or weightless MLP; each added to its
    input.
    """

    config: GPTConfig
    mlp: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T d"],
        valid: Bool[Array, "B T"] | None = None,
        train: bool = False,
        decode: bool = False,
    ) -> Float[Array, "B T d"]:
        """x (B, T, d), valid (B, T) bool -> (B, T, d)."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        shared = {"use_bias": c.bias, "output_init": normal(0.02 / math.sqrt(2 * c.layers))}
        norm = {"use_bias": c.bias, "epsilon": c.epsilon, "dtype": dtype}
        attention = CausalSelfAttention(
            c.heads,
            c.context,
            c.dropout,
            implementation=c.attention,
            linear=c.linear,
            dtype=dtype,
            name="attention",
            **shared,
        )
        y = nn.LayerNorm(name="attention_norm", **norm)(x)
        x = x + attention(y, valid, train=train, decode=decode)
        first = first_init(c, c.width)
        mixer = mlp.make(
            self.mlp,
            c.width,
            c,
            lambda: mlp.MLP(gelu=c.gelu, kernel_init=first, dtype=dtype, name="mlp", **shared),
            norm_bias=c.bias,
            kernel_init=first,
            output_init=shared["output_init"],
            dtype=dtype,
        )
        if mixer is None:
            return x
        y = x if mlp.brings_norm(mixer) else nn.LayerNorm(name="mlp_norm", **norm)(x)
        return x + nn.Dropout(c.dropout, deterministic=not train)(mixer(y))

    def costs(self, call: Call) -> list[LayerCosts]:
        """Those of the layers inside, and the additions to the stream."""
        return call.inner("mlp", after=residuals(call, "attention", "mlp"))


class GPT(nn.Module):
    """A decoder-only transformer language model: token ids -> logits."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        tokens: Integer[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        *,
        train: bool = False,
        decode: bool = False,
        pieces: Pieces | None = None,
    ) -> Float32[Array, "B T V"] | dict[str, Float32[Array, ""]]:
        """tokens (B, T) int, valid (B, T) bool: those that are not padding (None: all) -> logits
        (B, T, V) float32, or what `pieces` wants of them.

        With decode=True and a mutable 'cache' collection, T new tokens are read behind what the
        cache holds.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        if tokens.shape[1] > c.context:
            raise InputError(
                f"GPT: {tokens.shape[1]} tokens do not fit its context of {c.context}; pass the "
                f"last {c.context}."
            )
        embed = nn.Embed(
            c.vocab_size, c.width, embedding_init=normal(0.02), dtype=dtype, name="token_embedding"
        )
        positions = self.param(
            "position_embedding", normal(0.02), (c.context, c.width), jnp.float32
        )
        if decode or valid is not None:
            positions = jnp.take(
                positions, token_positions(self, tokens.shape, valid, decode), axis=0, mode="clip"
            )
        else:
            positions = jax.lax.slice_in_dim(
                positions, 0, tokens.shape[1]
            )  # unlike [:T], also of a T that is only a name (export)
        x = embed(tokens) + positions.astype(dtype)
        x = nn.Dropout(c.dropout, deterministic=not train)(x)
        x = run_blocks(
            lambda kind, name: GPTBlock(c, kind, name=name),
            c.mlps(),
            x,
            (valid, train, decode),
            depth=c,
            decode=decode,
        )
        x = nn.LayerNorm(epsilon=c.epsilon, use_bias=c.bias, dtype=dtype, name="final_norm")(x)
        if c.tie_embeddings:
            return read_out(embed, lambda head, x: head.attend(x), x, pieces)
        head = nn.Dense(
            c.vocab_size, use_bias=False, kernel_init=normal(0.02), dtype=dtype, name="head"
        )
        return read_out(head, lambda head, x: head(x), x, pieces)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Those of the layers inside, and a row of the positions a token, added."""
        act, values = call.types_of(self.config.dtype).activations, call.size * self.config.width
        positions = call.row(
            "embedding",
            "position_embedding",
            elementwise=Elementwise.of(act, additions=values),
            weights=values * BYTES[act],
            stored={act: call.params["position_embedding"].size * BYTES[act]},
            parameters=call.params["position_embedding"].size,
        )
        return call.inner({"head": "head"}, after={"token_embedding": [positions]})
