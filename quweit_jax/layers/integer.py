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

from quweit_jax.errors import InputError
from quweit_jax.layers.costs import Call
from quweit_jax.layers.norms import Initializer, normal
from quweit_jax.layers.packing import Packable
from quweit_jax.ops import int64, integer
from quweit_jax.ops.counts import BYTES, FLOAT, INT, Elementwise, LayerCosts

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
