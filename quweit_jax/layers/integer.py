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

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from quweit_jax.layers.costs import Call
from quweit_jax.layers.lookup import packing
from quweit_jax.layers.norms import Initializer, normal
from quweit_jax.layers.weightless import WeightlessBlock
from quweit_jax.ops import int64 as wide
from quweit_jax.ops import integer, packed_lut, thermometer
from quweit_jax.ops import sums as reductions
from quweit_jax.ops.counts import BYTES, FLOAT, INT, Elementwise, LayerCosts
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

    @property
    def packed(self) -> bool:
        """Whether there are only integers."""
        return self.real is None

    def map(self, move: Callable[[Array], Array]) -> Quantized:
        """The same function, one that only moves values about, of integers and reals."""
        return Quantized(
            move(self.ints), self.scale, None if self.real is None else move(self.real)
        )


class IntegerModule(nn.Module):
    """What the layers share: constants that are computed once, written down in `packed`, and later
    read from there.
    """

    def constant(self, name: str, value: Array) -> None:
        """Writes a constant of the packed form down, if it is being made."""
        if packing(self):
            self.put_variable("packed", name, value)

    def read(self, *names: str) -> list[Array]:
        """Constants of the packed form."""
        return [jnp.asarray(self.get_variable("packed", name)) for name in names]


class ActivationQuantizer(IntegerModule):
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
        names = (
            ("multiplier", "shift")
            if identity is None
            else ("multiplier", "shift", "identity_multiplier", "identity_shift")
        )
        branches = [x] if identity is None else [x, identity]
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
        if packing(self):
            for name, factor in zip(
                names, [factor for s in scales for factor in wide.dyadic(s, scale)]
            ):
                self.constant(name, factor)
        out = integer.requantize_units(
            [(b.ints, s) for b, s in zip(branches, scales)], scale, self.bits
        )
        return Quantized(
            out,
            scale,
            integer.straight_through(out * scale, integer.clip_shadow(real, scale, self.bits)),
        )

    @nn.compact
    def from_real(self, x: Array, *, train: bool = False) -> Quantized:
        """Rounds real values. In packed form the scale is the one number that is read."""
        if self.has_variable("packed", "scale") and not packing(self):
            out = integer.quantize(x, self.read("scale")[0], self.bits)
            return Quantized(out.astype(jnp.int8) if self.bits <= 8 else out)
        scale = self.running_scale(x, train)
        self.constant("scale", scale)
        out = integer.quantize(jax.lax.stop_gradient(x), scale, self.bits).astype(jnp.float32)
        return Quantized(
            out,
            scale,
            integer.straight_through(out * scale, integer.clip_shadow(x, scale, self.bits)),
        )

    def running_scale(self, x: Array, train: bool) -> Array:
        """The scale of the running range, which training moves on first. A range never set is that
        of x.
        """
        x = jax.lax.stop_gradient(x)
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

    def costs(self, call: Call) -> list[LayerCosts]:
        """`from_real`: one rounding and clamping of a value; else see `requantize_costs`."""
        values = math.prod(call.shape)
        if call.method == "from_real":
            moved = values * (BYTES[FLOAT] + self.bits // 8)
            return [
                LayerCosts(
                    call.at(),
                    "requantize",
                    elementwise=Elementwise({FLOAT: values}),
                    comparisons=2 * values,
                    bytes_moved={"weights": BYTES[FLOAT], "activations": moved},
                    bytes_stored={FLOAT: BYTES[FLOAT]},
                )
            ]
        scales = [branch.scale.size for branch in call.args if isinstance(branch, Quantized)]
        reads = values * RESIDUAL_BITS // 8 * (len(scales) - 1)
        return [requantize_costs(call.at(), values, scales, reads=reads)]


class IntegerDense(IntegerModule):
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
        self.constant("kernel", kernel_int.astype(jnp.int8))
        self.constant("bias", bias_int)
        out = integer.matmul_units(x.ints, kernel_int) + bias_int
        shadow = x.real @ integer.straight_through(kernel_int * kernel_scale, kernel) + bias
        return Quantized(out, scale, integer.straight_through(out * scale, shadow))

    def costs(self, call: Call) -> list[LayerCosts]:
        """int8 times int8 into int32, an int32 bias. A quantizer that follows makes its results
        smaller on the way to memory.
        """
        count, outputs = call.rows * call.width * self.features, call.rows * self.features
        stored = {"int8": call.width * self.features, INT: self.features * BYTES[INT]}
        follows = call.following.layer if call.following else None
        out = follows.bits // 8 if isinstance(follows, ActivationQuantizer) else BYTES[INT]
        return [
            LayerCosts(
                call.at(),
                call.kind,
                multiplications={"int8": count},
                additions={INT: count},
                bytes_moved={
                    "weights": sum(stored.values()),
                    "activations": call.rows * call.width + outputs * out,
                },
                bytes_stored=stored,
                parameters=call.width * self.features + self.features,
            )
        ]


class _NormParameters(nn.Module):
    """`scale` and `bias` under the name the float LayerNorm gives them, so that either model reads
    the other's parameters.
    """

    @nn.compact
    def __call__(self, width: int) -> tuple[Array, Array]:
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        return scale, self.param("bias", nn.initializers.zeros, (width,), jnp.float32)


class IntegerLayerNorm(IntegerModule):
    """I-LayerNorm over the last axis."""

    @nn.compact
    def __call__(self, x: Quantized) -> Quantized:
        """x (..., d) at 16 bits -> (..., d) int32, a scale a feature."""
        if x.packed:
            return Quantized(integer.layer_norm_units(x.ints, *self.read("bias", "halvings")))
        weight, bias = _NormParameters(name="norm")(x.ints.shape[-1])
        bias_int, halvings, scale = integer.layer_norm_constants(weight, bias)
        self.constant("bias", bias_int)
        self.constant("halvings", halvings)
        out = integer.layer_norm_units(x.ints, bias_int, halvings)
        return Quantized(
            out,
            scale,
            integer.straight_through(out * scale, integer.layer_norm_shadow(x.real, weight, bias)),
        )

    def costs(self, call: Call) -> list[LayerCosts]:
        """Integer mean, sum of squares, Newton's square root, one factor a token; 16 bits in, 8 out
        after requantization.
        """
        rows, width, steps = call.rows, call.width, integer.LAYER_NORM_ITERATIONS
        stored = 2 * width * BYTES[INT]
        counts = Elementwise(
            multiplications={INT: rows * 2 * width},
            additions={INT: rows * (4 * width + steps)},
            divisions={INT: rows * (2 + steps)},
            shifts={INT: rows * (width + steps)},
        )
        return [
            LayerCosts(
                call.at(),
                "norm",
                elementwise=counts,
                bytes_moved={"weights": stored, "activations": rows * width * (2 + 1)},
                bytes_stored={INT: stored},
                parameters=2 * width,
            )
        ]


class Shiftmax(IntegerModule):
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
        self.constant("inverse", inverse)
        out, scale = (
            integer.shiftmax_units(x.ints, inverse, bits=ATTENTION_BITS),
            jnp.float32(2.0 ** (1 - ATTENTION_BITS)),
        )
        return Quantized(
            out, scale, integer.straight_through(out * scale, jax.nn.softmax(x.real, axis=-1))
        )

    def costs(self, call: Call) -> list[LayerCosts]:
        """Less the largest; x + x / 2 - x / 16; quotient and rest by the constant for 1; shifted,
        summed, times the sum's inverse, shifted.
        """
        scores = math.prod(call.shape)
        counts = Elementwise(
            multiplications={INT: 2 * scores},
            additions={INT: 6 * scores},
            divisions={INT: scores + call.rows},
            shifts={INT: 6 * scores},
        )
        return [
            LayerCosts(
                call.at(),
                "attention",
                elementwise=counts,
                comparisons=4 * scores,
                comparison_type=INT,
                bytes_moved={"weights": BYTES[INT], "activations": scores * (1 + 2)},
                bytes_stored={INT: BYTES[INT]},
            )
        ]


class ShiftGELU(IntegerModule):
    """x * sigmoid(1.702 x) by shifts, 8 bits of sigmoid."""

    @nn.compact
    def __call__(self, x: Quantized) -> Quantized:
        """x (..., d) at 8 bits -> (..., d) int32, scale x.scale / 128."""
        if x.packed:
            return Quantized(
                integer.shift_gelu_units(x.ints.astype(jnp.int32), self.read("inverse")[0])
            )
        inverse = integer.inverse_scale(x.scale * integer.GELU_SLOPE)
        self.constant("inverse", inverse)
        out, scale = (
            integer.shift_gelu_units(x.ints, inverse),
            x.scale * 2.0 ** (1 - integer.GELU_BITS),
        )
        return Quantized(
            out, scale, integer.straight_through(out * scale, integer.gelu_shadow(x.real))
        )

    def costs(self, call: Call) -> list[LayerCosts]:
        """An exponential of each value and of each token's largest, a division, two products."""
        values, tokens = math.prod(call.shape), call.rows
        counts = Elementwise(
            multiplications={INT: 3 * values + tokens},
            additions={INT: 6 * values + 4 * tokens},
            divisions={INT: 2 * values + tokens},
            shifts={INT: 5 * values + 4 * tokens},
        )
        return [
            LayerCosts(
                call.at(),
                "activation",
                elementwise=counts,
                comparisons=4 * values + 3 * tokens,
                comparison_type=INT,
                bytes_moved={"weights": BYTES[INT]},
                bytes_stored={INT: BYTES[INT]},
            )
        ]


def requantize_costs(
    name: str, values: int, scales: Sequence[int], *, reads: int = 0
) -> LayerCosts:
    """A dyadic multiplication (32 bits by 31, 64 bits of product), a shift and a rounding addition
    a value and branch; clamped.

    scales: for each branch how many it has, one or one a feature; two branches are added. reads:
      bytes of the second branch.
    """
    branches, stored = len(scales), sum(scales) * 2 * BYTES[INT]  # a multiplier and a shift each
    counts = Elementwise(
        multiplications={INT: branches * values},
        additions={INT: (2 * branches - 1) * values},
        shifts={INT: branches * values},
    )
    return LayerCosts(
        name,
        "requantize",
        elementwise=counts,
        comparisons=(2 * branches + 2) * values,
        comparison_type=INT,
        bytes_moved={"weights": stored, "activations": reads},
        bytes_stored={INT: stored},
    )


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
    return Quantized(
        ints,
        scale,
        integer.straight_through(ints * scale, jnp.einsum(subscripts, a.real, b.real) * factor),
    )


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

    def costs(self, call: Call) -> list[LayerCosts]:
        """8-bit queries, keys and scores; 16-bit weights times 8-bit values, or both of 8 bits
        where that precision is asked for.
        """
        values, scores = call.rows * call.width, call.rows * self.num_heads * call.shape[-2]
        count = scores * (call.width // self.num_heads)

        def product(part: str, operands: str, moved: int) -> list[LayerCosts]:
            moving = {"activations": moved}
            sums = {operands: count}, {INT: count}
            return [LayerCosts(call.at(part), "attention", *sums, bytes_moved=moving)]

        mixed = "int8" if call.precision else "int16xint8"
        after = {
            "quant_qkv": product("scores", "int8", 2 * values + scores),
            "shiftmax": product("mix", mixed, 2 * scores + 2 * values),
        }
        return call.inner("projection", after=after)


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

    def costs(self, call: Call) -> list[LayerCosts]:
        """Those of the layers inside."""
        return call.inner("mlp")


class IntegerWeightlessBlock(WeightlessBlock, IntegerModule):
    """A weightless block on integers (QuWeiT on I-ViT): 8-bit integers are compared, 1-bit tables
    read, int8 vectors added in int32.

    From the integers that come in to the int32 sums that go out there is no multiplication in
    packed form. Takes the arguments of `WeightlessBlock`; the norm and the requantization of its
    sums, with the residual, are the caller's.
    """

    @nn.compact
    def __call__(self, x: Quantized) -> Quantized:  # type: ignore[override]
        """x (..., d_in) at 8 bits -> (..., features) int32, a scale a feature."""
        self._layers()
        lead, width = x.ints.shape[:-1], x.ints.shape[-1]
        flat = x.map(lambda a: a.reshape(-1, width).T)
        if x.packed:
            thresholds, vectors, bias = self.read("thresholds", "vectors", "bias")
            bits_FT = _above(flat.ints, thresholds).reshape(-1, flat.ints.shape[1])
            return Quantized(
                (self._add(self._look_up(bits_FT), vectors) + bias).reshape(*lead, self.features)
            )
        real = self._thresholds(width)
        thresholds = integer.saturate(jnp.floor(jax.lax.stop_gradient(real) / x.scale))
        bits = no_fusion(_above, flat.ints, thresholds).astype(
            jnp.float32
        )  # or each of a table's reads repeats what made the integers
        bits = integer.straight_through(
            bits,
            thermometer.step_ste(
                flat.real[:, None, :], real[:, :, None], self.window, self.window_shape
            ),
        )
        bits_LT = self._look_up(bits.reshape(width * self.thermometer_bits, -1))
        vectors, bias = self._vectors(bits_LT.shape[0])
        out, scale = self._integer_sum(bits_LT, vectors, bias)
        out = out.astype(x.ints.dtype)
        self.constant("thresholds", jnp.clip(thresholds, -129, 127).astype(jnp.int16))
        shadow = self._sum(bits_LT, vectors, bias)
        return Quantized(out, scale, integer.straight_through(out * scale, shadow)).map(
            lambda a: a.reshape(*lead, self.features)
        )

    def _integer_sum(self, bits_LT: Array, vectors: Array, bias: Array) -> tuple[Array, Array]:
        """The conditional sum in whole numbers, (T, d) float32, and its scales (d,). Exact: 2**16
        vectors would still fit 24 bits.
        """
        bits_LT, vectors, bias = (jax.lax.stop_gradient(a) for a in (bits_LT, vectors, bias))
        vectors_int, scale = reductions.quantize_int8(
            vectors if self.sum == "dense" else vectors[:, None], axis=0
        )
        scale = jnp.broadcast_to(scale.reshape(-1), (self.features,))
        bias_int = integer.quantize_bias(bias, scale)
        if self.signed:  # sum (2 bit - 1) v = sum bit 2v - sum v
            bias_int = bias_int - self._per_feature(vectors_int.astype(jnp.int32)).sum(0)
        self.constant("vectors", vectors_int)
        self.constant("bias", bias_int)
        if self.sum == "dense":
            total = reductions.conditional_sum_feature_major(
                bits_LT, vectors_int.astype(jnp.float32)
            )
        else:
            total = reductions.conditional_sum(
                bits_LT.T, vectors_int.reshape(-1).astype(jnp.float32), jnp.zeros_like(scale)
            )
        return (1 + self.signed) * total + bias_int, scale

    def _per_feature(self, vectors: Array) -> Array:
        """Grouped vectors (L, 1) as (L / d, d); dense ones (L, d) as they are."""
        return vectors if self.sum == "dense" else vectors.reshape(self.features, -1).T

    def _add(self, bits_LT: Array, vectors: Array) -> Array:
        """Adds what is selected, twice where bits are signed: bool (L, T), int8 (L, d) or (L, 1) ->
        int32 (T, d).
        """
        if self.sum == "dense":
            total = packed_lut.add_vectors(bits_LT, vectors)
        else:
            chosen = jnp.where(bits_LT, vectors.astype(jnp.int32), 0)
            total = chosen.reshape(self.features, -1, chosen.shape[1]).sum(1, dtype=jnp.int32).T
        return total << int(self.signed)

    def costs(self, call: Call) -> list[LayerCosts]:
        """8-bit integers compared, one-bit tables read, int8 vectors added in int32 (and doubled
        where bits are signed): no multiplication.
        """
        values = call.rows * self.features
        stored = {"int8": self._count_vectors(), INT: self.features * BYTES[INT]}
        doubled = Elementwise(shifts={INT: values} if self.signed else {})
        return [
            self._thermometer_costs(call, "int8", "int16"),
            *call.inner(),
            self._sum_costs(call, stored, doubled, values * RESIDUAL_BITS // 8),
        ]


def _above(x: Array, thresholds: Array) -> Array:
    """x (d, T) and thresholds (d, z) -> (d, z, T), whether x is above each threshold."""
    return x[:, None, :] > thresholds[:, :, None]
