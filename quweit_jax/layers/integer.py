"""Integer-only layers (I-ViT, Li & Gu, ICCV 2023) and the weightless block between them.

What flows between these layers is `Quantized`: the integers, their scale, and a real shadow that
carries gradients. Activation quantizers keep running ranges in the `ranges` collection, updated
while training if it is mutable, and frozen otherwise.

Each layer has two forms of the same arithmetic:
- from `params` and `ranges`, for training and its evaluations: whole numbers held in float32, which
  every platform does fast. With a mutable `packed` collection it also writes down what the next
  form needs.
- from `packed` alone: int8 weights, int32 biases, integer multipliers and shifts, packed tables;
  exact, with no float in between and no scales. It differs from the first only where float32 rounds
  a product or a sum of more than 24 bits.

Dimensions: B batch, T tokens, d width, H heads, K width of a head, L look-up tables, z thermometer
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from quweit_jax.errors import InputError
from quweit_jax.layers.norms import Initializer, normal
from quweit_jax.layers.packing import Packable
from quweit_jax.layers.weightless import WeightlessBlock, above
from quweit_jax.ops import int64, integer, packed_lut, sums, thermometer
from quweit_jax.ops.fusion import no_fusion

MOMENTUM = 0.95
ACTIVATION_BITS = 8
RESIDUAL_BITS = 16
ATTENTION_BITS = 16


@flax.struct.dataclass
class Quantized:
    """Real values x = ints * scale. In packed form there are only the integers.

    ints: whole numbers held in float32; packed int8 or int32. scale: float32, one number or one a
    feature. real: float32, ints * scale with gradients.
    """

    ints: Array
    scale: Any = None
    real: Any = None

    @classmethod
    def of(cls, ints: Array, scale: Array, surrogate: Array) -> Quantized:
        """Integers and their scale, with the gradient of `surrogate`, the real function."""
        return cls(ints, scale, integer.straight_through(ints * scale, surrogate))

    @property
    def packed(self) -> bool:
        """Whether there are only integers."""
        return self.real is None

    def map(self, move: Callable[[Array], Array]) -> Quantized:
        """The same function, one that only moves values about, of integers and reals."""
        return Quantized(
            move(self.ints), self.scale, None if self.real is None else move(self.real)
        )


class ActivationQuantizer(Packable):
    """Requantizes to `bits` bits with a running symmetric range (momentum 0.95), adding a residual
    branch if there is one.

    `from_real` does the same for a real array (the image, the positional embedding), which is
    rounded.
    """

    bits: int = ACTIVATION_BITS

    @nn.compact
    def __call__(
        self, x: Quantized, identity: Quantized | None = None, *, train: bool = False
    ) -> Quantized:
        """x (..., d) [and identity of the same shape] -> the same shape at `bits` bits."""
        branches = [x] if identity is None else [x, identity]
        names = ["multiplier", "shift", "identity_multiplier", "identity_shift"][
            : 2 * len(branches)
        ]
        if x.packed:
            factors = self.read(*names)
            pairs = zip(branches, factors[::2], factors[1::2])
            out = integer.requantize_int(
                [(b.ints.astype(jnp.int32), multiplier, shift) for b, multiplier, shift in pairs],
                self.bits,
            )
            return Quantized(out.astype(jnp.int8) if self.bits <= 8 else out)
        real = x.real if identity is None else x.real + identity.real
        scale = self.running_scale(real, train)
        scales = [jax.lax.stop_gradient(b.scale) for b in branches]
        if self.is_packing:
            factors = [factor for s in scales for factor in int64.dyadic(s, scale)]
            self.write(**dict(zip(names, factors)))
        out = integer.requantize_units(
            [(b.ints, s) for b, s in zip(branches, scales)], scale, self.bits
        )
        return Quantized.of(out, scale, integer.clip_shadow(real, scale, self.bits))

    @nn.compact
    def from_real(self, x: Array, *, train: bool = False) -> Quantized:
        """Rounds real values. In packed form the scale is the one number that is read."""
        if self.is_packed:
            out = integer.quantize(x, self.read("scale")[0], self.bits)
            return Quantized(out.astype(jnp.int8) if self.bits <= 8 else out)
        scale = self.running_scale(x, train)
        self.write(scale=scale)
        out = integer.quantize(jax.lax.stop_gradient(x), scale, self.bits).astype(jnp.float32)
        return Quantized.of(out, scale, integer.clip_shadow(x, scale, self.bits))

    def running_scale(self, x: Array, train: bool) -> Array:
        """The scale of the running range, which training moves on first. A range never set is that
        of x.
        """
        x = jax.lax.stop_gradient(x)
        if not self.has_variable("ranges", "min") and not self.is_mutable_collection("ranges"):
            raise InputError(
                f"{'/'.join(self.path)}: its activation range was never set; train a few steps, or "
                "calibrate the model with pretrained.calibrate(model, variables, batches)."
            )
        low = self.variable("ranges", "min", lambda: jnp.zeros((), jnp.float32))
        high = self.variable("ranges", "max", lambda: jnp.zeros((), jnp.float32))
        found = (x.min().astype(jnp.float32), x.max().astype(jnp.float32))
        unset = low.value == high.value
        new = [
            jnp.where(unset, f, MOMENTUM * v.value + (1 - MOMENTUM) * f if train else v.value)
            for v, f in zip((low, high), found)
        ]
        if self.is_mutable_collection("ranges") and not self.is_initializing():
            low.value, high.value = new
        return integer.symmetric_scale(new[0], new[1], self.bits)


class IntegerDense(Packable):
    """A linear layer with int8 weights (a scale an output) and an int32 bias; `scale` is that of
    its int32 results.
    """

    features: int
    kernel_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, x: Quantized) -> Quantized:
        """x (..., I) at 8 bits -> (..., features) int32."""
        if x.packed:
            kernel, bias = self.read("kernel", "bias")
            return Quantized(integer.matmul_units(x.ints, kernel) + bias)
        kernel = self.param(
            "kernel", self.kernel_init, (x.ints.shape[-1], self.features), jnp.float32
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel_int, kernel_scale = integer.quantize_weights(kernel)
        scale = kernel_scale * x.scale
        bias_int = integer.quantize_bias(bias, scale)
        self.write(kernel=kernel_int.astype(jnp.int8), bias=bias_int)
        out = integer.matmul_units(x.ints, kernel_int) + bias_int
        shadow = x.real @ integer.straight_through(kernel_int * kernel_scale, kernel) + bias
        return Quantized.of(out, scale, shadow)


class IntegerLayerNorm(Packable):
    """I-LayerNorm over the last axis, with the parameters of a float LayerNorm."""

    @nn.compact
    def __call__(self, x: Quantized) -> Quantized:
        """x (..., d) at 16 bits -> (..., d) int32, a scale a feature."""
        if x.packed:
            return Quantized(integer.layer_norm_units(x.ints, *self.read("bias", "halvings")))
        width = x.ints.shape[-1]
        weight = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        bias_int, halvings, scale = integer.layer_norm_constants(weight, bias)
        self.write(bias=bias_int, halvings=halvings)
        out = integer.layer_norm_units(x.ints, bias_int, halvings)
        return Quantized.of(out, scale, integer.layer_norm_shadow(x.real, weight, bias))


class Shiftmax(Packable):
    """Softmax over the last axis by shifts: 16 bits."""

    @nn.compact
    def __call__(self, x: Quantized) -> Quantized:
        """x (..., d) at 8 bits -> (..., d) at 16 bits, scale 2**-15."""
        if x.packed:
            return Quantized(
                integer.shiftmax_units(
                    x.ints.astype(jnp.int32), self.read("inverse")[0], bits=ATTENTION_BITS
                )
            )
        inverse = integer.inverse_scale(x.scale)
        self.write(inverse=inverse)
        out, scale = (
            integer.shiftmax_units(x.ints, inverse, bits=ATTENTION_BITS),
            jnp.float32(2.0 ** (1 - ATTENTION_BITS)),
        )
        return Quantized.of(out, scale, jax.nn.softmax(x.real, axis=-1))


class ShiftGELU(Packable):
    """x * sigmoid(1.702 x) by shifts, 8 bits of sigmoid."""

    @nn.compact
    def __call__(self, x: Quantized) -> Quantized:
        """x (..., d) at 8 bits -> (..., d) int32, scale x.scale / 128."""
        if x.packed:
            return Quantized(
                integer.shift_gelu_units(x.ints.astype(jnp.int32), self.read("inverse")[0])
            )
        inverse = integer.inverse_scale(x.scale * integer.GELU_SLOPE)
        self.write(inverse=inverse)
        out, scale = (
            integer.shift_gelu_units(x.ints, inverse),
            x.scale * 2.0 ** (1 - integer.GELU_BITS),
        )
        return Quantized.of(out, scale, integer.gelu_shadow(x.real))


def mean_of_tokens(x: Quantized) -> Quantized:
    """The mean over the tokens: x (B, T, d) at 8 bits -> (B, d) int32, the sums; that they are T
    times the means is the scale's affair.
    """
    if x.packed:
        return Quantized(x.ints.sum(1, dtype=jnp.int32))
    return Quantized(x.ints.sum(1), x.scale / x.ints.shape[1], x.real.mean(1))


def _product(subscripts: str, a: Quantized, b: Quantized, factor: float = 1.0) -> Quantized:
    """An einsum of two quantized arrays, times a real factor that only the scale takes."""
    ints = integer.einsum_units(subscripts, a.ints, b.ints)
    if a.packed:
        return Quantized(ints)
    scale = a.scale * b.scale * factor
    return Quantized.of(ints, scale, jnp.einsum(subscripts, a.real, b.real) * factor)


class IntegerAttention(nn.Module):
    """I-ViT's attention: 8-bit queries, keys, values and scores, Shiftmax at 16 bits, 16 bits out.

    Args:
      num_heads: H. kernel_init, output_init: of the queries, keys and values, and of the output
        projection.
    """

    num_heads: int
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, x: Quantized, *, train: bool = False) -> Quantized:
        """x (B, T, d) at 8 bits -> (B, T, d) at 16 bits."""
        batch, tokens, width = x.ints.shape
        head = width // self.num_heads
        qkv = ActivationQuantizer(name="quant_qkv")(
            IntegerDense(3 * width, self.kernel_init, name="qkv")(x), train=train
        )
        q, k, v = (
            qkv.map(lambda a, i=i: a.reshape(batch, tokens, 3, self.num_heads, head)[:, :, i])
            for i in range(3)
        )
        scores = _product("bqhk,bshk->bhqs", q, k, head**-0.5)
        weights = Shiftmax(name="shiftmax")(
            ActivationQuantizer(name="quant_scores")(scores, train=train)
        )
        mixed = _product("bhqs,bshk->bqhk", weights, v)
        mixed = ActivationQuantizer(name="quant_mixed")(
            mixed.map(lambda a: a.reshape(batch, tokens, width)), train=train
        )
        out = IntegerDense(width, self.output_init, name="proj")(mixed)
        return ActivationQuantizer(RESIDUAL_BITS, name="quant_proj")(out, train=train)


class IntegerMLP(nn.Module):
    """Linear, ShiftGELU, linear: 8 bits in, 16 bits out; the hidden layer `ratio` times wider."""

    ratio: int = 4
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, x: Quantized, *, train: bool = False) -> Quantized:
        """x (..., d) at 8 bits -> (..., d) at 16 bits."""
        width = x.ints.shape[-1]
        hidden = ActivationQuantizer(name="quant_up")(
            IntegerDense(self.ratio * width, self.kernel_init, name="up")(x), train=train
        )
        hidden = ActivationQuantizer(name="quant_gelu")(ShiftGELU(name="gelu")(hidden), train=train)
        out = IntegerDense(width, self.output_init, name="down")(hidden)
        return ActivationQuantizer(RESIDUAL_BITS, name="quant_down")(out, train=train)


class IntegerWeightlessBlock(WeightlessBlock):
    """A weightless block on integers (QuWeiT on I-ViT): 8-bit integers are compared, 1-bit tables
    read, int8 vectors added in int32.

    From the integers that come in to the int32 sums that go out there is no multiplication in
    packed form. Takes the arguments of `WeightlessBlock`; the norm and the requantization of its
    sums, with the residual, are the caller's.
    """

    @nn.compact
    def __call__(self, x: Quantized, *, train: bool = False) -> Quantized:  # type: ignore[override]
        """x (..., d_in) at 8 bits -> (..., features) int32, a scale a feature; `train` changes nothing."""
        self._layers()
        lead, width = x.ints.shape[:-1], x.ints.shape[-1]
        flat = x.map(lambda a: a.reshape(-1, width).T)
        if x.packed:
            thresholds, vectors, bias = self.read("thresholds", "vectors", "bias")
            total = self._add(self._look_up(above(flat.ints, thresholds)), vectors) + bias
            return Quantized(total.reshape(*lead, self.features))
        real = self._thresholds(width)
        thresholds = integer.saturate(jnp.floor(jax.lax.stop_gradient(real) / x.scale))
        # without no_fusion each of a table's reads would repeat what made the integers
        bits = no_fusion(above, flat.ints, thresholds).astype(jnp.float32)
        surrogate = thermometer.step_ste(
            flat.real[:, None, :], real[:, :, None], self.window, self.window_shape
        )
        bits_LT = self._look_up(integer.straight_through(bits, surrogate.reshape(bits.shape)))
        vectors, bias = self._vectors(bits_LT.shape[0])
        out, scale = self._integer_sum(bits_LT, vectors, bias)
        out = out.astype(x.ints.dtype)
        self.write(thresholds=jnp.clip(thresholds, -129, 127).astype(jnp.int16))
        shadow = self._sum(bits_LT, vectors, bias)
        return Quantized.of(out, scale, shadow).map(lambda a: a.reshape(*lead, self.features))

    def _integer_sum(self, bits_LT: Array, vectors: Array, bias: Array) -> tuple[Array, Array]:
        """The conditional sum in whole numbers, (T, d) float32, and its scales (d,). Exact: 2**16
        vectors would still fit 24 bits.
        """
        bits_LT, vectors, bias = (jax.lax.stop_gradient(a) for a in (bits_LT, vectors, bias))
        vectors_int, scale = sums.quantize_int8(vectors, axis=0)
        scale = jnp.broadcast_to(scale.reshape(-1), (self.features,))
        bias_int = integer.quantize_bias(bias, scale)
        if self.signed:  # sum (2 bit - 1) v = sum bit 2v - sum v
            bias_int = bias_int - self._per_feature(vectors_int.astype(jnp.int32)).sum(0)
        self.write(vectors=vectors_int, bias=bias_int)
        if self.sum == "dense":
            total = sums.conditional_sum_feature_major(bits_LT, vectors_int.astype(jnp.float32))
        else:
            total = sums.conditional_sum(
                bits_LT.T, vectors_int.astype(jnp.float32), jnp.zeros_like(scale)
            )
        return (1 + self.signed) * total + bias_int, scale

    def _per_feature(self, vectors: Array) -> Array:
        """Grouped vectors (L,) as (L / d, d); dense ones (L, d) as they are."""
        return vectors if vectors.ndim == 2 else vectors.reshape(self.features, -1).T

    def _add(self, bits_LT: Array, vectors: Array) -> Array:
        """Adds what is selected, twice where bits are signed: bool (L, T), int8 (L, d) or (L,) ->
        int32 (T, d).
        """
        if vectors.ndim == 2:
            total = packed_lut.add_vectors(bits_LT, vectors)
        else:
            chosen = jnp.where(bits_LT, vectors[:, None].astype(jnp.int32), 0)
            total = chosen.reshape(self.features, -1, chosen.shape[1]).sum(1, dtype=jnp.int32).T
        return total << int(self.signed)
