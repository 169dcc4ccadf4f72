"""Vision transformer in DeiT's architecture: each block's MLP dense, weightless or absent, in
floats or in integers only (I-ViT).

The float and the integer form have the same parameters, so that one is fine-tuned from the other.

Dimensions: B batch, H x W pixels, C channels, P patch size, T tokens with the class token, d width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from quweit_jax.errors import InputError, check_above_zero, check_choice
from quweit_jax.layers import groups, mlp
from quweit_jax.layers import integer as layers
from quweit_jax.layers import integer_blocks as blocks
from quweit_jax.layers.attention import ATTENTIONS, LINEARS, SelfAttention
from quweit_jax.layers.costs import Call, layer_norm, residuals
from quweit_jax.layers.drop_path import DropPath
from quweit_jax.layers.integer import ActivationQuantizer, Quantized
from quweit_jax.layers.norms import Initializer
from quweit_jax.layers.packing import Packable
from quweit_jax.layers.placement import hand_over
from quweit_jax.models.options import DTYPES, ChannelMixers, check_positive, kinds_of_mlp
from quweit_jax.ops.counts import BYTES, FLOAT, INT, Elementwise, LayerCosts
from quweit_jax.ops.integer import straight_through
from quweit_jax.ops.patches import cut_patches, resample_positions

# Width, depth and heads, as DeiT and ViT papers name them ('mu' and 'Mi' are small ones for tests
# and for two cores).
SIZES = {
    "mu": (32, 1, 2),
    "Mi": (128, 4, 4),
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "M": (512, 12, 8),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}
POOLS = ("cls", "mean")
# As timm and DeiT train: neither the class token nor positions (1, T, d) decay. Those of a GPT,
# (C, d), do, as in nanoGPT.
groups.declare("no_decay", "cls_token")
groups.declare("no_decay", "position_embedding", rank=3)
groups.declare("no_decay", "position_embedding", rank=4)  # of models under vmap
# Kernels start at the scale their number of inputs asks for: DeiT's 0.02 for all, made for wide
# models and long training, keeps small ones from learning for hundreds of steps. The outputs of
# residual branches start smaller, so that their sum has the branches' scale.
KERNEL_INIT = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class ViTConfig(ChannelMixers):
    """What decides a ViT's shape; the image size comes with the images.

    variant: size and patch, 'Ti/16'; sizes: mu, Mi, Ti, S, M, B, L. width, depth, heads: other than
      the variant's (0: its own).
    mlp: 'dense', 'weightless' or 'none' for every block, or one for each block joined by '+'.
    integer: I-ViT's integer-only arithmetic instead of floats.
    rounding: of an integer model, 'exact' or 'published', see `layers.integer.Shiftmax`; imported
      I-ViTs have the latter.
    pool: what the head reads, the 'cls' token or the 'mean' of the patches.
    drop_path: the share of examples whose last block's branches are left out in training, rising to
    it linearly with depth.
    linear: attention's projections, 'dense' or 'ternary', see `layers.attention.SelfAttention`.
    epsilon: of the norms of a float model.
    """

    num_classes: int
    variant: str = "Ti/16"
    width: int = 0
    depth: int = 0
    heads: int = 0
    mlp_ratio: int = 4
    integer: bool = False
    rounding: str = "exact"
    pool: str = "cls"
    drop_path: float = 0.0
    remat: bool = False
    dtype: str = "float32"
    attention: str = "auto"
    linear: str = "dense"
    epsilon: float = 1e-6

    def __post_init__(self):
        match = re.fullmatch(r"([A-Za-z]+)/([1-9][0-9]*)", self.variant)
        if not match or match[1] not in SIZES:
            raise InputError(
                "model.variant: expected SIZE/PATCH such as Ti/16, with SIZE one of "
                f"{', '.join(SIZES)}; found '{self.variant}'."
            )
        check_positive(self, "width", "depth", "heads", zero="the variant's own")
        check_positive(self, "num_classes", "mlp_ratio")
        width, _, heads = self.sizes()
        if width % heads:
            raise InputError(
                f"model.width: {width} is not a multiple of the {heads} heads; use "
                f"{heads * -(-width // heads)}, or other --config.model.heads."
            )
        if not 0 <= self.drop_path < 1:
            raise InputError(
                f"model.drop_path: expected 0 <= drop_path < 1, found {self.drop_path}."
            )
        if self.integer and self.dtype != "float32":
            raise InputError(
                f"model.dtype: an integer model trains beside float32, found {self.dtype}; leave "
                "it at float32."
            )
        check_choice("model.rounding", self.rounding, layers.ROUNDINGS)
        if self.rounding != "exact" and not self.integer:
            raise InputError(
                f"model.rounding: only an integer model rounds, found '{self.rounding}'; leave it "
                "at exact, or set --config.model.integer=true."
            )
        known = {"pool": POOLS, "dtype": DTYPES, "attention": ATTENTIONS, "linear": LINEARS}
        for name, choices in known.items():
            check_choice(f"model.{name}", getattr(self, name), choices)
        check_above_zero("model.epsilon", self.epsilon)
        self.mlps()

    def sizes(self) -> tuple[int, int, int]:
        """Width, depth and heads."""
        return tuple(
            own or of
            for own, of in zip(
                (self.width, self.depth, self.heads), SIZES[self.variant.split("/")[0]]
            )
        )  # type: ignore[return-value]

    @property
    def patch(self) -> int:
        """Pixels along a patch's side."""
        return int(self.variant.split("/")[1])

    def mlps(self) -> tuple[str, ...]:
        """The kind of each block's MLP."""
        return kinds_of_mlp(self.mlp, self.sizes()[1], self.integer)

    def initializers(self) -> Initializers:
        """Of the kernels within a block: `kernel_init`, and of those whose results are added to the
        residual stream `output_init`.
        """
        output_init = nn.initializers.variance_scaling(
            1 / (2 * self.sizes()[1]), "fan_in", "truncated_normal"
        )
        return {"kernel_init": KERNEL_INIT, "output_init": output_init}

    def drop_paths(self) -> list[float]:
        """The share each block leaves out."""
        depth = self.sizes()[1]
        return [self.drop_path * i / max(1, depth - 1) for i in range(depth)]


class Initializers(TypedDict):
    """Of the kernels within a block, as its layers' fields are called."""

    kernel_init: Initializer
    output_init: Initializer


class ViTBlock(nn.Module):
    """Pre-norm attention and, unless `mlp` is 'none', a dense or weightless MLP; each added to its
    input.
    """

    config: ViTConfig
    mlp: str
    drop_path: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T d"], train: bool = False) -> Float[Array, "B T d"]:
        """x (B, T, d) -> (B, T, d)."""
        c, dtype, heads = self.config, jnp.dtype(self.config.dtype), self.config.sizes()[2]
        norm = functools.partial(nn.LayerNorm, epsilon=c.epsilon, dtype=dtype)
        drop = DropPath(self.drop_path, name="drop_path")
        options = {"implementation": c.attention, "linear": c.linear, **c.initializers()}
        attention = SelfAttention(heads, dtype=dtype, name="attention", **options)
        x = x + drop(attention(norm(name="attention_norm")(x)), train)
        mixer = mlp.make(
            self.mlp,
            x.shape[-1],
            c,
            lambda: mlp.MLP(c.mlp_ratio, True, dtype=dtype, name="mlp", **c.initializers()),
            use_norm=False,
            dtype=dtype,
            **c.initializers(),
        )
        if mixer is None:
            return x
        return x + drop(mixer(norm(name="mlp_norm")(x)), train)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Those of the layers inside, and the additions to the stream."""
        return call.inner("mlp", after=residuals(call, "attention", "mlp"))


class IntegerViTBlock(nn.Module):
    """The same on integers: the residual stream at 16 bits, what goes into products at 8."""

    config: ViTConfig
    mlp: str
    drop_path: float

    @nn.compact
    def __call__(self, x: Quantized, train: bool = False) -> Quantized:
        """x (B, T, d) at 16 bits -> (B, T, d) at 16 bits."""
        drop = DropPath(self.drop_path, name="drop_path")
        y = ActivationQuantizer(rounding=self.config.rounding, name="quant_attention_norm")(
            layers.IntegerLayerNorm(name="attention_norm")(x), train=train
        )
        c = self.config
        shared = {"rounding": c.rounding, **c.initializers()}
        y = blocks.IntegerAttention(c.sizes()[2], linear=c.linear, name="attention", **shared)(
            y, train=train
        )
        x = ActivationQuantizer(layers.RESIDUAL_BITS, self.config.rounding, name="quant_attention")(
            drop(y, train), x, train=train
        )
        mixer = mlp.make(
            self.mlp,
            x.ints.shape[-1],
            c,
            lambda: blocks.IntegerMLP(c.mlp_ratio, name="mlp", **shared),
            integer=True,
            use_norm=False,
        )
        if mixer is None:
            return x
        y = layers.IntegerLayerNorm(name="mlp_norm")(x)
        y = mixer(
            ActivationQuantizer(rounding=self.config.rounding, name="quant_mlp_norm")(
                y, train=train
            )
        )
        residual = ActivationQuantizer(layers.RESIDUAL_BITS, self.config.rounding, name="quant_mlp")
        return residual(drop(y, train), x, train=train)


class ViT(Packable):
    """A vision transformer: images (B, H, W, C) -> logits (B, num_classes).

    In integer form, what `quweit_jax.deploy.pack` makes of the variables is evaluated without
    floats between the image and the logits.
    """

    config: ViTConfig

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool = False
    ) -> Float32[Array, "B classes"]:
        """images (B, H, W, C) float, normalized -> logits (B, num_classes) float32."""
        c, width = self.config, self.config.sizes()[0]
        if images.ndim != 4 or any(s == 0 or s % c.patch for s in images.shape[1:3]):
            raise InputError(
                "ViT: expected images (batch, height, width, channels) whose sides are multiples "
                f"of the patch size {c.patch}, found "
                f"{list(images.shape)}; change --config.data.image_size or the model's variant."
            )
        patches = cut_patches(images, c.patch)
        if c.integer:
            return self._integer(patches, images.shape, train)
        dtype = jnp.dtype(c.dtype)
        x = nn.Dense(width, kernel_init=KERNEL_INIT, dtype=dtype, name="patch_embed")(patches)
        if c.pool == "cls":
            cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, width), jnp.float32)
            x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, width)).astype(dtype), x], 1)
        x = x + self._positions(images.shape, width).astype(dtype)
        block = nn.remat(ViTBlock, static_argnums=(2,)) if c.remat else ViTBlock
        x = hand_over(x)
        for i, (kind, drop_path) in enumerate(zip(c.mlps(), c.drop_paths())):
            x = hand_over(block(c, kind, drop_path, name=f"block_{i}")(x, train))
        x = nn.LayerNorm(c.epsilon, dtype=dtype, name="final_norm")(x)
        x = x[:, 0] if c.pool == "cls" else x.mean(1)
        return nn.Dense(c.num_classes, kernel_init=KERNEL_INIT, dtype=dtype, name="head")(x).astype(
            jnp.float32
        )

    def _integer(self, patches: Array, shape: Sequence[int], train: bool) -> Array:
        c, width = self.config, self.config.sizes()[0]
        x = ActivationQuantizer(name="quant_input").from_real(patches, train=train)
        x = ActivationQuantizer(layers.RESIDUAL_BITS, self.config.rounding, name="quant_patches")(
            layers.IntegerDense(width, KERNEL_INIT, name="patch_embed")(x), train=train
        )
        if c.pool == "cls":
            x = self._with_class_token(x)
        if x.packed:
            position = Quantized(self.read("position_embedding")[0])
        else:
            quantizer = ActivationQuantizer(layers.RESIDUAL_BITS, name="quant_position")
            position = quantizer.from_real(self._positions(shape, width), train=train)
            self.write(position_embedding=position.ints.astype(jnp.int32))
        position = position.map(lambda a: jnp.broadcast_to(a, x.ints.shape))
        x = ActivationQuantizer(layers.RESIDUAL_BITS, self.config.rounding, name="quant_embedding")(
            x, position, train=train
        )
        block = nn.remat(IntegerViTBlock, static_argnums=(2,)) if c.remat else IntegerViTBlock
        for i, (kind, drop_path) in enumerate(zip(c.mlps(), c.drop_paths())):
            x = hand_over(block(c, kind, drop_path, name=f"block_{i}")(hand_over(x), train))
        if c.pool == "cls":
            x = x.map(lambda a: a[:, 0])
        x = ActivationQuantizer(rounding=self.config.rounding, name="quant_final")(
            layers.IntegerLayerNorm(name="final_norm")(x), train=train
        )
        if c.pool == "mean":
            x = ActivationQuantizer(rounding=self.config.rounding, name="quant_pool")(
                layers.mean_of_tokens(x), train=train
            )
        logits = layers.IntegerDense(c.num_classes, KERNEL_INIT, name="head")(x)
        if logits.packed:
            return logits.ints * self.read("logit_scale")[0]
        self.write(logit_scale=logits.scale)
        return logits.real

    def _with_class_token(self, x: Quantized) -> Quantized:
        """The class token in front of the patches, in their scale."""
        if x.packed:
            return blocks.prepend(Quantized(self.read("cls_token")[0]), x)
        token = self.param(
            "cls_token", nn.initializers.normal(0.02), (1, 1, x.ints.shape[-1]), jnp.float32
        )
        ints = jnp.round(jax.lax.stop_gradient(token) / x.scale).astype(x.ints.dtype)
        self.write(cls_token=ints.astype(jnp.int32))
        return blocks.prepend(Quantized(ints, x.scale, straight_through(ints * x.scale, token)), x)

    def _positions(self, shape: Sequence[int], width: int) -> Array:
        """The positional embedding for images of this shape, resampled from another."""
        grid, extra = (
            (shape[1] // self.config.patch, shape[2] // self.config.patch),
            int(self.config.pool == "cls"),
        )
        if self.has_variable("params", "position_embedding"):
            return resample_positions(
                self.get_variable("params", "position_embedding"), grid, extra
            )
        return self.param(
            "position_embedding",
            nn.initializers.normal(width**-0.5),
            (1, math.prod(grid) + extra, width),
            jnp.float32,
        )

    def costs(self, call: Call) -> list[LayerCosts]:
        """Those of the layers inside, and positions and the class token in front, or the mean.

        The last norm is that of the class token alone where only that is read.
        """
        c, images, width, cls = self.config, call.shape[0], self.config.sizes()[0], self.config.pool
        count = sum(leaf.size for leaf in call.params.values())  # positions and the class token
        values = images * (count - width * (cls == "cls"))
        act = INT if c.integer else call.types_of(c.dtype).activations
        kinds = {"patch_embed": "embedding", "head": "head"}
        divided = 0 if c.integer else images * width  # of integers the scale is
        pool = call.row(
            "activation",
            "pool",
            elementwise=Elementwise.of(act, additions=values, divisions=divided),
            activations=(values + images * width) * (1 if c.integer else BYTES[act]),
        )
        pooled = [pool] if c.pool == "mean" else []
        positions = call.row(
            "embedding",
            "position_embedding",
            elementwise=Elementwise.of(act, additions=0 if c.integer else values),
            weights=count * BYTES[act],
            # beside integers the scale that they were rounded with
            stored={act: count * BYTES[act]} | ({FLOAT: BYTES[FLOAT]} if c.integer else {}),
            parameters=count,
        )
        if not c.integer:
            shape = (values // width if pooled else images, width)
            norm = layer_norm(call, act, "final_norm", bias=True, shape=shape)
            instead = {"final_norm": [norm, *pooled]}
            return call.inner(kinds, after={"patch_embed": [positions]}, instead=instead)
        check_choice("precision of an integer model", call.precision or "int8", ("int8",))
        scaled = call.row(
            "requantize",
            "logit_scale",
            elementwise=Elementwise.of(FLOAT, images * c.num_classes),
            stored={FLOAT: c.num_classes * BYTES[FLOAT]},
        )
        added = layers.requantize_costs(call, values, [1, 1], 0, "quant_embedding")
        return call.inner(
            kinds,
            after={"quant_final": pooled, "head": [scaled]},
            instead={"quant_position": [positions], "quant_embedding": [added]},
        )
