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

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Real

from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers.costs import Call
from quweit_jax.layers.norms import Initializer, normal
from quweit_jax.layers.packing import Packable
from quweit_jax.ops import int64, integer, integer_norm
from quweit_jax.ops.counts import BYTES, FLOAT, INT, Elementwise, LayerCosts

ROUNDINGS = ("exact", "published")
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

    ints: Real[Array, "..."]
    scale: Any = None
    real: Any = None

    @classmethod
    def of(
        cls,
        ints: Float[Array, "*shape"],
        scale: Float[Array, "*#shape"],
        surrogate: Float[Array, "*shape"],
    ) -> Quantized:
        """Integers and their scale, with the gradient of `surrogate`, the real function."""
        return cls(ints, scale, integer.straight_through(ints * scale, surrogate))

    @property
    def packed(self) -> bool:
        """Whether there are only integers."""
        return self.real is None

    def map(self, move: Callable[[Array], Array]) -> Quantized:
        """Applies a function that only moves values about to the integers and to the reals."""
        return Quantized(
            move(self.ints), self.scale, None if self.real is None else move(self.real)
        )


class ActivationQuantizer(Packable):
    """Requantizes to `bits` bits with a running symmetric range (momentum 0.95), adding a residual
    branch if there is one.

    `from_real` does the same for a real array (the image, the positional embedding), which is
    rounded. rounding: see `Shiftmax`; 'published' has the exact ratio of scales also in training.
    """

    bits: int = ACTIVATION_BITS
    rounding: str = "exact"

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
        pairs = [(_grid(b, self.rounding), s) for b, s in zip(branches, scales)]
        if self.rounding == "published":  # whole again, and multiplied in 64 bits
            pairs = [(_nearest(ints), s) for ints, s in pairs]
        out = integer.requantize_units(pairs, scale, self.bits).astype(jnp.float32)
        return Quantized.of(out, scale, integer.clip_shadow(real, scale, self.bits))

    @nn.compact
    def from_real(self, x: Float[Array, "..."], *, train: bool = False) -> Quantized:
        """Rounds real values. In packed form the scale is the one number that is read."""
        if self.is_packed:
            out = integer.quantize(x, self.read("scale")[0], self.bits)
            return Quantized(out.astype(jnp.int8) if self.bits <= 8 else out)
        scale = self.running_scale(x, train)
        self.write(scale=scale)
        out = integer.quantize(jax.lax.stop_gradient(x), scale, self.bits).astype(jnp.float32)
        return Quantized.of(out, scale, integer.clip_shadow(x, scale, self.bits))

    def running_scale(self, x: Float[Array, "..."], train: bool) -> Float[Array, ""]:
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
        if call.method != "from_real":
            scales = [branch.scale.size for branch in call.args if isinstance(branch, Quantized)]
            reads = call.size * RESIDUAL_BITS // 8 * (len(scales) - 1)
            return [requantize_costs(call, call.size, scales, reads)]
        row = call.row(
            "requantize",
            elementwise=Elementwise.of(FLOAT, call.size),
            comparisons=2 * call.size,
            stored={FLOAT: BYTES[FLOAT]},
            activations=call.size * (BYTES[FLOAT] + self.bits // 8),
        )
        return [row]


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
        kernel, bias = self.parameters(x.ints.shape[-1])
        kernel_int, kernel_scale = integer.quantize_weights(kernel)
        scale = kernel_scale * x.scale
        bias_int = integer.quantize_bias(bias, scale)
        self.write(kernel=kernel_int.astype(jnp.int8), bias=bias_int)
        out = integer.matmul_units(x.ints, kernel_int) + bias_int
        shadow = x.real @ integer.straight_through(kernel_int * kernel_scale, kernel) + bias
        return Quantized.of(out, scale, shadow)

    def parameters(self, width: int) -> tuple[Array, Array]:
        """kernel (I, features) and bias (features,), float32."""
        shape = (width, self.features)
        return (
            self.param("kernel", self.kernel_init, shape, jnp.float32),
            self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32),
        )

    def moved(self, call: Call) -> int:
        """Bytes of the results; a quantizer that follows makes them smaller on the way
        to memory.
        """
        follows = call.following and call.following.layer
        out = follows.bits // 8 if isinstance(follows, ActivationQuantizer) else BYTES[INT]
        return call.rows * self.features * out

    def costs(self, call: Call) -> list[LayerCosts]:
        """int8 times int8 into int32, an int32 bias."""
        count, weights = call.size * self.features, call.width * self.features
        row = call.row(
            call.kind,
            multiplications={"int8": count},
            additions={INT: count},
            stored={"int8": weights, INT: self.features * BYTES[INT]},
            activations=call.size + self.moved(call),
            parameters=weights + self.features,
        )
        return [row]


class IntegerLayerNorm(Packable):
    """I-LayerNorm over the last axis, with the parameters of a float LayerNorm."""

    @nn.compact
    def __call__(self, x: Quantized) -> Quantized:
        """x (..., d) at 16 bits -> (..., d) int32, a scale a feature."""
        if x.packed:
            return Quantized(integer_norm.layer_norm_units(x.ints, *self.read("bias", "halvings")))
        width = x.ints.shape[-1]
        weight = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        bias_int, halvings, scale = integer_norm.layer_norm_constants(weight, bias)
        self.write(bias=bias_int, halvings=halvings)
        out = integer_norm.layer_norm_units(x.ints, bias_int, halvings)
        return Quantized.of(out, scale, integer_norm.layer_norm_shadow(x.real, weight, bias))

    def costs(self, call: Call) -> list[LayerCosts]:
        """Integer mean, sum of squares, Newton's square root, one factor a token; 16 bits in, 8 out
        after requantization.
        """
        n, rows, steps = call.size, call.rows, call.rows * integer_norm.LAYER_NORM_ITERATIONS
        counts = Elementwise.of(INT, 2 * n, 4 * n + steps, 2 * rows + steps, shifts=n + steps)
        row = call.row(
            "norm",
            elementwise=counts,
            stored={INT: 2 * call.width * BYTES[INT]},
            activations=n * (2 + 1),
            parameters=2 * call.width,
        )
        return [row]


class Shiftmax(Packable):
    """Softmax over the last axis by shifts: 16 bits.

    rounding: 'exact' integers, or 'published': of x * scale / scale in float32, as I-ViT's program
      does, whose floors then fall one lower here and there. The packed form is exact.
    """

    rounding: str = "exact"

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
            integer.shiftmax_units(_grid(x, self.rounding), inverse, bits=ATTENTION_BITS),
            jnp.float32(2.0 ** (1 - ATTENTION_BITS)),
        )
        return Quantized.of(out, scale, jax.nn.softmax(x.real, axis=-1))

    def costs(self, call: Call) -> list[LayerCosts]:
        """The largest subtracted; x + x / 2 - x / 16; quotient and rest by the constant for 1;
        shifted, summed, times the sum's inverse, shifted.
        """
        n = call.size
        row = call.row(
            "attention",
            elementwise=Elementwise.of(INT, 2 * n, 6 * n, n + call.rows, shifts=6 * n),
            comparisons=4 * n,
            comparison_type=INT,
            stored={INT: BYTES[INT]},
            activations=n * (1 + 2),
        )
        return [row]


class ShiftGELU(Packable):
    """x * sigmoid(1.702 x) by shifts, 8 bits of sigmoid. rounding: see `Shiftmax`."""

    rounding: str = "exact"

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
            integer.shift_gelu_units(_grid(x, self.rounding), inverse),
            x.scale * 2.0 ** (1 - integer.GELU_BITS),
        )
        return Quantized.of(out, scale, integer.gelu_shadow(x.real))

    def costs(self, call: Call) -> list[LayerCosts]:
        """An exponential of each value and of each token's largest, a division, two products."""
        n, t = call.size, call.rows
        row = call.row(
            "activation",
            elementwise=Elementwise.of(
                INT, 3 * n + t, 6 * n + 4 * t, 2 * n + t, shifts=5 * n + 4 * t
            ),
            comparisons=4 * n + 3 * t,
            comparison_type=INT,
            stored={INT: BYTES[INT]},
        )
        return [row]


def _grid(x: Quantized, rounding: str) -> Array:
    """The whole numbers, or what the published program has in their place."""
    check_choice("rounding", rounding, ROUNDINGS)
    return x.ints if rounding == "exact" else integer.published_grid(x.ints, x.scale)


def _nearest(x: Array) -> Array:
    """Float to the nearest int32, ties to even; what lies beyond stays at the largest."""
    return jnp.clip(jnp.round(x), -(2.0**31), 2.0**31 - 128).astype(jnp.int32)


def requantize_costs(
    call: Call, values: int, scales: Sequence[int], reads: int, *part: str
) -> LayerCosts:
    """The costs of requantizing: a dyadic multiplication (32 bits by 31, 64 bits of product), a
    shift and a rounding addition a value and branch; clamped.

    scales: for each branch how many it has, one or one a feature; two branches are added. reads:
      bytes of the second branch.
    """
    n = len(scales) * values
    return call.row(
        "requantize",
        *part,
        elementwise=Elementwise.of(INT, n, 2 * n - values, shifts=n),
        comparisons=2 * n + 2 * values,
        comparison_type=INT,
        stored={INT: sum(scales) * 2 * BYTES[INT]},  # multipliers and shifts
        activations=reads,
    )


def mean_of_tokens(x: Quantized) -> Quantized:
    """The mean over the tokens: x (B, T, d) at 8 bits -> (B, d) int32, the sums; that they are T
    times the means is the scale's affair.
    """
    if x.packed:
        return Quantized(x.ints.sum(1, dtype=jnp.int32))
    return Quantized(x.ints.sum(1), x.scale / x.ints.shape[1], x.real.mean(1))
