"""A linear layer with ternary weights on integers."""

from __future__ import annotations

import flax.linen as nn

from quweit_jax.layers.costs import Call
from quweit_jax.layers.integer import IntegerDense, Quantized
from quweit_jax.ops import integer, packed_ternary, ternary
from quweit_jax.ops.counts import BYTES, INT, LayerCosts


class IntegerTernary(IntegerDense):
    """An `IntegerDense` whose weights are -1, 0 and 1 times one scale (BitLinear's, arXiv
    2406.02528), two bits each in packed form: additions of int8 into int32, no multiplication.

    It has the parameters of `IntegerDense`, and no norm of its own.
    """

    @nn.compact
    def __call__(self, x: Quantized) -> Quantized:
        """x (..., I) at 8 bits -> (..., features) int32."""
        width = x.ints.shape[-1]
        if x.packed:
            kernel, bias = self.read("kernel", "bias")
            whole = packed_ternary.unpack_ternary(kernel, width, self.features)
            return Quantized(integer.matmul_units(x.ints, whole) + bias)
        kernel, bias = self.parameters(width)
        whole, kernel_scale = ternary.quantize_weights(kernel)
        scale = kernel_scale * x.scale
        bias_int = integer.quantize_bias(bias, scale)
        self.write(kernel=packed_ternary.pack_ternary(whole), bias=bias_int)
        out = integer.matmul_units(x.ints, whole) + bias_int
        shadow = x.real @ ternary.ternary_weights(kernel) * kernel_scale + bias
        return Quantized.of(out, scale, shadow)

    def costs(self, call: Call) -> list[LayerCosts]:
        """At most one addition of int8 into int32 a weight, and an int32 bias."""
        packed = packed_ternary.packed_bytes(call.width, self.features)
        row = call.row(
            call.kind,
            additions={INT: call.size * self.features},
            stored={"2-bit": packed, INT: self.features * BYTES[INT]},
            activations=call.size + self.moved(call),
            parameters=(call.width + 1) * self.features,
        )
        return [row]
