"""Transformer++: Llama's decoder (RMSNorm, rotary positions, SwiGLU, no biases), the baseline of
MatMul-free language models; with ternary projections, norms inside attention and gated unit and a
squared ReLU it is BitNet b1.58's (arXiv 2402.17764, 2504.12285).

Dimensions: B batch, T tokens, V vocabulary, d model width, H heads.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Integer

from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers import mlp
from quweit_jax.layers.attention import ATTENTIONS, LINEARS, CausalSelfAttention, token_positions
from quweit_jax.layers.costs import Call, residuals
from quweit_jax.layers.delta import GatedDelta
from quweit_jax.layers.norms import RMSNorm, normal
from quweit_jax.layers.readout import Pieces, read_out
from quweit_jax.layers.rotary import RopeScaling
from quweit_jax.models.options import (
    DTYPES,
    ChannelMixers,
    check_init,
    check_positive,
    first_init,
    glu_width,
    kinds_of_mlp,
    repeated,
    size_of,
)
from quweit_jax.models.stack import Depth, run_blocks
from quweit_jax.ops.counts import LayerCosts

BIASES = ("none", "qkv", "attention")
MIXERS = ("attention", "gated_delta")


@dataclasses.dataclass(frozen=True)
class TransformerPPConfig(ChannelMixers, Depth):
    """What decides the shape; sizes are those of `MatMulFreeConfig`.

    size, width, layers, mlp, hidden, mlp_init: as there. heads: 0 for the size's own. kv_heads:
      fewer heads of keys and values (0: as many); head_width: 0 for d / heads.
    context: tokens of a training example and the most it can attend to.
    rope_theta: of the rotary positions; rope: how they are scaled.
    biases: 'none'; 'qkv', of queries, keys and values alone, as Qwen2 has them; or 'attention', of
      the output projection too. tie_embeddings: whether the head is the embedding's transpose.
    linear: the projections of attention and gated unit, 'dense' or 'ternary', of which each has a
      scale of its own (`layers.ternary.BitLinear` without norm); embedding and head stay dense.
    sub_norms: an RMSNorm before the last matrix of attention and of the gated unit.
    activation: of the gated unit, 'silu' or 'relu2', a squared ReLU.
    mixer: of tokens: 'attention', 'gated_delta' (`layers.delta`, of the same heads), or several
      joined by '+', a pattern that is repeated: 'gated_delta+gated_delta+gated_delta+attention'.
    """

    vocab_size: int
    size: str = "tiny"
    width: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_width: int = 0
    context: int = 256
    hidden: int = 0
    mlp_init: float = 0.02
    epsilon: float = 1e-6
    rope_theta: float = 10000.0
    rope: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    biases: str = "none"
    tie_embeddings: bool = False
    linear: str = "dense"
    sub_norms: bool = False
    activation: str = "silu"
    mixer: str = "attention"
    dtype: str = "float32"
    attention: str = "auto"

    def __post_init__(self):
        check_positive(self, "vocab_size", "context")
        check_positive(
            self,
            "width",
            "layers",
            "heads",
            "kv_heads",
            "head_width",
            "hidden",
            zero="the size's own",
        )
        self.check_depth()
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.attention", self.attention, ATTENTIONS)
        check_choice("model.linear", self.linear, LINEARS)
        check_choice("model.activation", self.activation, mlp.ACTIVATIONS)
        check_init(self)
        check_choice("model.biases", self.biases, BIASES)
        if self.linear == "ternary" and self.biases != "none":
            raise InputError(
                f"model.biases: expected 'none' with model.linear=ternary, found '{self.biases}'; "
                "ternary projections have no biases."
            )
        for name in ("epsilon", "rope_theta"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"model.{name}: expected a positive number, found {getattr(self, name)}."
                )
        width, _, heads = self.sizes()
        if not self.head_width and (width % heads or (width // heads) % 2):
            raise InputError(
                f"model.width: expected a multiple of twice the {heads} heads (rotary positions "
                f"turn pairs), found {width}."
            )
        if self.head_width % 2:
            raise InputError(
                "model.head_width: expected an even number (rotary positions turn pairs), found "
                f"{self.head_width}."
            )
        if self.kv_heads and heads % self.kv_heads:
            raise InputError(
                f"model.kv_heads: {heads} heads cannot share {self.kv_heads} heads of keys and "
                "values equally."
            )
        self.blocks()

    def mlps(self) -> tuple[str, ...]:
        """The kind of each block's channel mixer."""
        return kinds_of_mlp(self.mlp, self.sizes()[1])

    def mixers(self) -> tuple[str, ...]:
        """The kind of each block's token mixer."""
        return repeated("model.mixer", self.mixer, MIXERS, self.sizes()[1])

    def blocks(self) -> tuple[str, ...]:
        """'mixer/mlp' of each block."""
        return tuple(f"{mixer}/{kind}" for mixer, kind in zip(self.mixers(), self.mlps()))

    def sizes(self) -> tuple[int, int, int]:
        """Width, number of layers and heads."""
        width, layers, heads = size_of(self.size)
        return self.width or width, self.layers or layers, self.heads or heads

    def hidden_width(self) -> int:
        """Of the gated MLP."""
        return self.hidden or glu_width(self.sizes()[0])

    def norm(self, name: str) -> nn.Module:
        """An RMSNorm; before ternary layers one whose sums do not depend on a text's length, which
        their rounding would otherwise show.
        """
        kind = RMSNorm if self.linear == "ternary" else nn.RMSNorm
        return kind(self.epsilon, dtype=jnp.dtype(self.dtype), name=name)


class TransformerPPBlock(nn.Module):
    """Pre-norm attention (or another token mixer) and, unless `mlp` is 'none', a SwiGLU or a
    weightless block; each added to its input.
    """

    config: TransformerPPConfig
    mlp: str
    mixer: str = "attention"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T d"],
        positions: Int[Array, "#B T"],
        valid: Bool[Array, "B T"] | None = None,
        decode: bool = False,
    ) -> Float[Array, "B T d"]:
        """x (B, T, d), positions (B or 1, T), valid (B, T) bool -> (B, T, d)."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        width, layers, heads = c.sizes()
        first, output_init = first_init(c, width), normal(0.02 / math.sqrt(2 * layers))
        sub_norm = c.epsilon if c.sub_norms else 0.0
        normed = c.norm("mixer_norm")(x)
        if self.mixer == "gated_delta":
            delta = GatedDelta(
                heads,
                c.head_width,
                c.linear,
                output_init=output_init,
                epsilon=c.epsilon,
                dtype=dtype,
                name="mixer",
            )
            x = x + delta(normed, valid, decode=decode)
        else:
            attention = CausalSelfAttention(
                heads,
                c.context,
                output_init=output_init,
                implementation=c.attention,
                dtype=dtype,
                num_kv_heads=c.kv_heads,
                head_width=c.head_width,
                rotary=c.rope_theta,
                rope=c.rope,
                use_bias=c.biases != "none",
                output_bias=c.biases == "attention",
                linear=c.linear,
                own_norms=False,
                sub_norm=sub_norm,
                name="mixer",
            )
            x = x + attention(normed, valid, positions=positions, decode=decode)
        mixer = mlp.make(
            self.mlp,
            width,
            c,
            lambda: mlp.SwiGLU(
                width,
                c.hidden_width(),
                kernel_init=first,
                output_init=output_init,
                dtype=dtype,
                activation=c.activation,
                linear=c.linear,
                sub_norm=sub_norm,
                name="mlp",
            ),
            kernel_init=first,
            output_init=output_init,
            dtype=dtype,
        )
        if mixer is None:
            return x
        if not mlp.brings_norm(mixer):
            return x + mixer(c.norm("mlp_norm")(x))
        return x + mixer(x)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Those of the layers inside, and the additions to the stream."""
        return call.inner("mlp", after=residuals(call, "mixer", "mlp"))


class TransformerPP(nn.Module):
    """A Llama-like language model: token ids -> logits."""

    config: TransformerPPConfig

    @property
    def limited_context(self) -> bool:
        """Whether it reads at most `context` tokens: attention does, a state has no limit."""
        return "attention" in self.config.mixers()

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
        width = c.sizes()[0]
        if self.limited_context and tokens.shape[1] > c.context:
            raise InputError(
                f"TransformerPP: {tokens.shape[1]} tokens do not fit its context of {c.context}; "
                f"pass the last {c.context}."
            )
        embed = nn.Embed(
            c.vocab_size, width, embedding_init=normal(0.02), dtype=dtype, name="token_embedding"
        )
        positions = token_positions(self, tokens.shape, valid, decode)
        x = run_blocks(
            lambda kind, name: TransformerPPBlock(c, *kind.split("/")[::-1], name=name),
            c.blocks(),
            embed(tokens),
            (positions, valid, decode),
            depth=c,
            decode=decode,
        )
        x = c.norm("final_norm")(x)
        if c.tie_embeddings:
            return read_out(embed, lambda head, x: head.attend(x), x, pieces)
        head = nn.Dense(
            c.vocab_size, use_bias=False, kernel_init=normal(0.02), dtype=dtype, name="head"
        )
        return read_out(head, lambda head, x: head(x), x, pieces)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Those of the layers inside."""
        return call.inner({"head": "head"})
