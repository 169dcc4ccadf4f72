"""Integer-only blocks made of the layers in `layers.integer`: attention, MLP and weightless block.

Dimensions: B batch, T tokens, d width, H heads, K width of a head, L look-up tables, z thermometer
bits.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from quweit_jax.errors import InputError
from quweit_jax.layers.costs import Call
from quweit_jax.layers.integer import (
    RESIDUAL_BITS,
    ActivationQuantizer,
    IntegerDense,
    Quantized,
    ShiftGELU,
    Shiftmax,
)
from quweit_jax.layers.integer_ternary import IntegerTernary
from quweit_jax.layers.norms import Initializer, normal
from quweit_jax.layers.weightless import WeightlessBlock, above
from quweit_jax.ops import integer, packed_lut, sums, thermometer
from quweit_jax.ops.counts import BYTES, INT, Elementwise, LayerCosts
from quweit_jax.ops.fusion import no_fusion


def _product(subscripts: str, a: Quantized, b: Quantized, factor: float = 1.0) -> Quantized:
    """An einsum of two quantized arrays, times a real factor that only the scale takes."""
    ints = integer.einsum_units(subscripts, a.ints, b.ints)
    if a.packed:
        return Quantized(ints)
    scale = a.scale * b.scale * factor
    return Quantized.of(ints, scale, jnp.einsum(subscripts, a.real, b.real) * factor)


def prepend(first: Quantized, x: Quantized) -> Quantized:
    """A class token (1, 1, d) in front of tokens (B, N, d) of the same scale, or of a scale a
    feature.
    """

    def join(token: Array, tokens: Array) -> Array:
        return jnp.concatenate(
            [
                jnp.broadcast_to(token, (tokens.shape[0], 1, tokens.shape[2])).astype(tokens.dtype),
                tokens,
            ],
            1,
        )

    return Quantized(
        join(first.ints, x.ints), x.scale, None if x.real is None else join(first.real, x.real)
    )


class IntegerAttention(nn.Module):
    """I-ViT's attention: 8-bit queries, keys, values and scores, Shiftmax at 16 bits, 16 bits out.

    Args:
      num_heads: H. kernel_init, output_init: of the queries, keys and values, and of the output
        projection.
      linear: both projections are 'dense' or 'ternary'.
    """

    num_heads: int
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)
    rounding: str = "exact"
    linear: str = "dense"

    @nn.compact
    def __call__(self, x: Quantized, *, train: bool = False) -> Quantized:
        """x (B, T, d) at 8 bits -> (B, T, d) at 16 bits."""
        batch, tokens, width = x.ints.shape
        head = width // self.num_heads
        project = IntegerTernary if self.linear == "ternary" else IntegerDense
        qkv = ActivationQuantizer(rounding=self.rounding, name="quant_qkv")(
            project(3 * width, self.kernel_init, name="qkv")(x), train=train
        )
        q, k, v = (
            qkv.map(lambda a, i=i: a.reshape(batch, tokens, 3, self.num_heads, head)[:, :, i])
            for i in range(3)
        )
        scores = _product("bqhk,bshk->bhqs", q, k, head**-0.5)
        weights = Shiftmax(self.rounding, name="shiftmax")(
            ActivationQuantizer(rounding=self.rounding, name="quant_scores")(scores, train=train)
        )
        mixed = _product("bhqs,bshk->bqhk", weights, v)
        mixed = ActivationQuantizer(rounding=self.rounding, name="quant_mixed")(
            mixed.map(lambda a: a.reshape(batch, tokens, width)), train=train
        )
        out = project(width, self.output_init, name="proj")(mixed)
        return ActivationQuantizer(RESIDUAL_BITS, self.rounding, name="quant_proj")(
            out, train=train
        )

    def costs(self, call: Call) -> list[LayerCosts]:
        """8-bit queries, keys and scores; 16-bit weights times 8-bit values, or both of 8 bits
        where that precision is asked for.
        """
        scores = call.rows * self.num_heads * call.shape[-2]
        count = scores * (call.width // self.num_heads)

        def product(part: str, operands: str, moved: int) -> list[LayerCosts]:
            many, sums = {operands: count}, {INT: count}
            row = call.row(
                "attention", part, multiplications=many, additions=sums, activations=moved
            )
            return [row]

        mixed = "int8" if call.precision else "int16xint8"
        after = {
            "quant_qkv": product("scores", "int8", 2 * call.size + scores),
            "shiftmax": product("mix", mixed, 2 * scores + 2 * call.size),
        }
        return call.inner("projection", after=after)


class IntegerMLP(nn.Module):
    """Linear, ShiftGELU, linear: 8 bits in, 16 bits out; the hidden layer `ratio` times wider."""

    ratio: int = 4
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)
    rounding: str = "exact"

    @nn.compact
    def __call__(self, x: Quantized, *, train: bool = False) -> Quantized:
        """x (..., d) at 8 bits -> (..., d) at 16 bits."""
        width = x.ints.shape[-1]
        hidden = ActivationQuantizer(rounding=self.rounding, name="quant_up")(
            IntegerDense(self.ratio * width, self.kernel_init, name="up")(x), train=train
        )
        hidden = ActivationQuantizer(rounding=self.rounding, name="quant_gelu")(
            ShiftGELU(self.rounding, name="gelu")(hidden), train=train
        )
        out = IntegerDense(width, self.output_init, name="down")(hidden)
        return ActivationQuantizer(RESIDUAL_BITS, self.rounding, name="quant_down")(
            out, train=train
        )

    def costs(self, call: Call) -> list[LayerCosts]:
        """The costs of the layers inside."""
        return call.inner("mlp")


class IntegerWeightlessBlock(WeightlessBlock):
    """A weightless block on integers (QuWeiT on I-ViT): 8-bit integers are compared, 1-bit tables
    read, int8 vectors added in int32.

    From the integers that come in to the int32 sums that go out there is no multiplication in
    packed form. Takes the arguments of `WeightlessBlock`; the norm and the requantization of its
    sums, with the residual, are the caller's.
    """

    @nn.compact
    def __call__(self, x: Quantized, *, train: bool = False) -> Quantized:  # type: ignore[override]
        """x (..., d_in) at 8 bits -> (..., features) int32, a scale a feature; `train` changes
        nothing.
        """
        if self.sum == "vector":
            raise InputError(
                "WeightlessBlock: sum='vector' has no integer-only form; use sum='dense' or "
                "'grouped', or a model with integer=False."
            )
        layers = self._layers()
        lead, width = x.ints.shape[:-1], x.ints.shape[-1]
        flat = x.map(lambda a: a.reshape(-1, width).T)
        if x.packed:
            thresholds, vectors, bias = self.read("thresholds", "vectors", "bias")
            bits = packed_lut.pack_above(flat.ints, thresholds)
            # signed bits count twice; what makes them -1 and 1 is in the bias
            total = (
                self._add(self._look_up_packed(bits, layers), vectors) << int(self.signed)
            ) + bias
            return Quantized(total.reshape(*lead, self.features))
        real = self._thresholds(width)
        thresholds = integer.saturate(jnp.floor(jax.lax.stop_gradient(real) / x.scale))
        # without no_fusion each of a table's reads would repeat what made the integers
        bits = no_fusion(above, flat.ints, thresholds).astype(jnp.float32)
        surrogate: Array = thermometer.step_ste(
            flat.real[:, None, :], real[:, :, None], self.window, self.window_shape
        )
        bits_FT = integer.straight_through(bits, surrogate.reshape(bits.shape))
        bits_LT = self._look_up(bits_FT, layers)
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

    def costs(self, call: Call) -> list[LayerCosts]:
        """8-bit integers compared, one-bit tables read, int8 vectors added in int32 (and doubled
        where bits are signed): no multiplication.
        """
        values, bias = call.rows * self.features, {INT: self.features * BYTES[INT]}
        doubled = Elementwise.of(INT, shifts=values * self.signed)
        return self._costs(call, ("int8", "int16"), bias, doubled, values * RESIDUAL_BITS // 8)
