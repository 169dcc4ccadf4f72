"""LookupGLU on integers, for integer-only models.

Dimensions: d model width, H units, C codes.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from quweit_jax.errors import InputError
from quweit_jax.layers.costs import Call
from quweit_jax.layers.integer import RESIDUAL_BITS, Quantized
from quweit_jax.layers.lookup_glu import LookupGLU, check_glu
from quweit_jax.ops import integer, packed_ternary, pair_table, ternary
from quweit_jax.ops.counts import BYTES, INT, LayerCosts


class IntegerLookupGLU(LookupGLU):
    """A LookupGLU on 8-bit integers: additions, comparisons and table reads, nothing else.

    Takes the arguments and has the parameters of `LookupGLU`. The norm, which gives its inputs
    about unit variance, and the requantization of its sums are the caller's.
    """

    @nn.compact
    def __call__(self, x: Quantized, *, train: bool = False) -> Quantized:  # type: ignore[override]
        """x (..., d_in) at 8 bits -> (..., features) int32; `train` changes nothing."""
        check_glu(self, "LookupGLU: ")
        if self.sum != "ternary":
            raise InputError(
                f"LookupGLU: sum='{self.sum}' has no integer-only form; use sum='ternary', or a "
                "model with integer=False."
            )
        if self.output_norm:
            raise InputError(
                "LookupGLU: output_norm has no integer-only form; use output_norm=0, or a model "
                "with integer=False."
            )
        width = x.ints.shape[-1]
        if x.packed:
            mix, offsets, halfway, tables, total, bias = self.read(
                "mix", "offsets", "halfway", "tables", "sum", "bias"
            )
            ternary_mix = packed_ternary.unpack_ternary(mix, width, offsets.shape[0])
            sums = integer.matmul_units(x.ints, ternary_mix) - offsets
            read = pair_table.read_pairs(pair_table.count_codes(sums, halfway), tables)
            whole = packed_ternary.unpack_ternary(total, read.shape[-1], self.features)
            return Quantized(integer.matmul_units(read, whole) + bias)
        mix, total, offsets, bias = self._parameters(width)
        tables, entries = self._tables(width)
        self._write_weights(mix, total, tables)
        # In units of the sums: their standard deviation, from that of the inputs, which is about 1.
        deviation = math.sqrt(2 * width / 3) / jax.lax.stop_gradient(x.scale)
        step = jnp.maximum(1, jnp.round(self.code_step * deviation))
        shift = integer.saturate(jnp.round(jax.lax.stop_gradient(offsets) * deviation))
        sums = integer.matmul_units(x.ints, ternary.quantize_weights(mix)[0]) - shift
        shadow = x.real @ ternary.ternary_weights(mix) / math.sqrt(2 * width / 3) - offsets
        codes = _codes(sums, shadow / self.code_step, step, self.code_bits)
        silu_step = None if self.train_tables else self.code_step
        read = pair_table.read_pairs(codes, tables, silu_step)
        whole, scale = ternary.quantize_weights(total)
        scale = scale / entries
        bias_int = integer.quantize_bias(bias, scale)
        halfway = pair_table.halfway_points(step.astype(jnp.int32), self.code_bits)
        self.write(offsets=shift, halfway=halfway, bias=bias_int)
        out = integer.matmul_units(jax.lax.stop_gradient(read), whole) + bias_int
        real = ternary.ternary_product(read, total, jnp.dtype(self.dtype).name) * scale + bias
        return Quantized.of(out, jnp.broadcast_to(scale, (self.features,)), real)

    def costs(self, call: Call) -> list[LayerCosts]:
        """int8 added into int32, compared with the numbers halfway between codes; int8 entries read
        and added. No multiplication.
        """
        offsets = 2 * self.units(call.width) + 2**self.code_bits - 1
        return self._costs(
            call,
            {INT: offsets * BYTES[INT]},
            {INT: self.features * BYTES[INT]},
            call.rows * self.features * RESIDUAL_BITS // 8,
        )


def _codes(sums: Array, shadow: Array, step: Array, code_bits: int) -> Array:
    """Codes of whole sums with a step that is known only while running; the gradient goes to
    `shadow`, inside the range.
    """
    half = 2 ** (code_bits - 1)
    nearest = jnp.floor((2 * jax.lax.stop_gradient(sums) + step + 0.5) / (2 * step))
    whole = jnp.clip(nearest, -half, half - 1)
    return integer.straight_through(whole, jnp.where(nearest == whole, shadow, 0))
