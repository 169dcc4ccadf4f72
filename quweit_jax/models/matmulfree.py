"""MatMul-free language model (Zhu et al. 2024, arXiv 2406.02528): ternary BitLinear layers, an
MLGRU for tokens, a GLU for channels.

The channel mixer can also be a weightless block: `mlp='weightless'`.

Dimensions: B batch, T tokens, V vocabulary, d model width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Integer

from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers import groups, mlp
from quweit_jax.layers.costs import Call, residuals
from quweit_jax.layers.norms import RMSNorm, normal
from quweit_jax.layers.readout import Pieces, read_out
from quweit_jax.layers.ternary import GATES, MLGRU, BitGLU, BitLinear
from quweit_jax.models.options import (
    DTYPES,
    ChannelMixers,
    check_init,
    check_positive,
    first_init,
    glu_width,
    kinds_of_mlp,
    size_of,
)
from quweit_jax.models.stack import Depth, run_blocks
from quweit_jax.ops.counts import BYTES, FLOAT, LayerCosts
from quweit_jax.ops.recurrence import IMPLEMENTATIONS

groups.declare("no_decay", "lower_bounds")


@dataclasses.dataclass(frozen=True)
class MatMulFreeConfig(ChannelMixers, Depth):
    """What decides the shape; the published models are sizes '370m', '1.3b', '2.7b' with a
    vocabulary of 32,000.

    size: 'tiny', '370m', '1.3b', '2.7b' or '13b'. width, layers: other than the size's (0: its
    own). context: tokens of a training example; the model itself has no limit. mlp: 'dense' (the
    GLU), 'weightless' or 'none' for every block, or one for each joined by '+'.
    hidden: width of the GLU's hidden layer (0: 8 d / 3, rounded up to 256). mlp_init: standard
    deviation of a gated unit's first kernel at the start; 0 for 1 / sqrt(d). recurrence: how the
    MLGRU runs over time, see `ops.recurrence`. gates: of the MLGRU, 'exact' or, not published,
    'shift' (no products in the token mixer).
    """

    vocab_size: int
    size: str = "tiny"
    width: int = 0
    layers: int = 0
    context: int = 256
    hidden: int = 0
    mlp_init: float = 0.02
    epsilon: float = 1e-6
    recurrence: str = "auto"
    gates: str = "exact"
    dtype: str = "float32"

    def __post_init__(self):
        check_positive(self, "vocab_size", "context")
        check_positive(self, "width", "layers", "hidden", zero="the size's own")
        self.check_depth()
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.recurrence", self.recurrence, IMPLEMENTATIONS)
        check_choice("model.gates", self.gates, GATES)
        check_init(self)
        if not self.epsilon > 0:
            raise InputError(
                f"model.epsilon: expected a small positive number, found {self.epsilon}."
            )
        self.mlps()

    def mlps(self) -> tuple[str, ...]:
        """The kind of each block's channel mixer."""
        return kinds_of_mlp(self.mlp, self.sizes()[1])

    def sizes(self) -> tuple[int, int]:
        """Width and number of layers."""
        width, layers, _ = size_of(self.size)
        return self.width or width, self.layers or layers

    def hidden_width(self) -> int:
        """Of the GLU."""
        return self.hidden or glu_width(self.sizes()[0])


def lower_bounds(parameters: Float[Array, "layers d"]) -> Float32[Array, "layers d"]:
    """The forget gates' lower bounds from Gamma (layers, d): 0 in the first layer, rising with
    depth, below 1.
    """
    shares = jax.nn.softmax(parameters.astype(jnp.float32), axis=0)
    return jnp.cumsum(shares, 0) - shares[0]


class MatMulFreeBlock(nn.Module):
    """Pre-norm MLGRU and, unless `mlp` is 'none', a GLU or a weightless block; each added to its
    input.
    """

    config: MatMulFreeConfig
    mlp: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T d"],
        lower_bound: Float[Array, " d"],
        valid: Bool[Array, "B T"] | None = None,
        decode: bool = False,
    ) -> Float[Array, "B T d"]:
        """x (B, T, d), lower_bound (d,), valid (B, T) bool -> (B, T, d)."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        shared: dict[str, Any] = {"epsilon": c.epsilon, "dtype": dtype}
        mixer = MLGRU(implementation=c.recurrence, gates=c.gates, name="mixer", **shared)
        x = x + mixer(RMSNorm(name="mixer_norm", **shared)(x), lower_bound, valid, decode=decode)
        starts: dict[str, Any] = {
            "kernel_init": first_init(c, x.shape[-1]),
            "output_init": normal(0.02 / math.sqrt(2 * c.sizes()[1])),
        }
        mixer = mlp.make(
            self.mlp,
            x.shape[-1],
            c,
            lambda: BitGLU(x.shape[-1], c.hidden_width(), name="mlp", **starts, **shared),
            dtype=dtype,
            **starts,
        )
        if mixer is None:
            return x
        y = x if mlp.brings_norm(mixer) else RMSNorm(name="mlp_norm", **shared)(x)
        return x + mixer(y)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Those of the layers inside, and the additions to the stream."""
        return call.inner("mlp", after=residuals(call, "mixer", "mlp"))


class MatMulFree(nn.Module):
    """A MatMul-free language model: token ids -> logits."""

    config: MatMulFreeConfig
    # Of generation: what it has read is in a state of fixed size, so a text may be of any length.
    limited_context = False

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
        cache has seen.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        width, layers = c.sizes()
        x = nn.Embed(
            c.vocab_size, width, embedding_init=normal(0.02), dtype=dtype, name="token_embedding"
        )(tokens)
        bounds = lower_bounds(
            self.param("lower_bounds", nn.initializers.zeros, (layers, width), jnp.float32)
        )
        x = run_blocks(
            lambda kind, name: MatMulFreeBlock(c, kind, name=name),
            c.mlps(),
            x,
            (valid, decode),
            (bounds,),
            depth=c,
            decode=decode,
        )
        x = RMSNorm(c.epsilon, dtype, name="final_norm")(x)
        head = BitLinear(c.vocab_size, epsilon=c.epsilon, dtype=dtype, name="head")
        return read_out(head, lambda head, x: head(x), x, pieces)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Those of the layers inside, and the gates' bounds, which the mixers read."""
        count = call.params["lower_bounds"].size
        stored = {FLOAT: count * BYTES[FLOAT]}
        bounds = call.row("recurrence", "lower_bounds", weights=0, stored=stored, parameters=count)
        return [*call.inner({"head": "head"}), bounds]
