"""A gated linear unit without multiplications: ternary sums, comparisons, and a table that gates.

Dimensions: d model width, H units, C = 2**code_bits codes, G tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from quweit_jax.errors import InputError, check_above_zero, check_choice
from quweit_jax.layers import groups
from quweit_jax.layers.costs import Call, layer_norm, rms_norm
from quweit_jax.layers.norms import Initializer, normal
from quweit_jax.layers.packing import Packable
from quweit_jax.layers.weightless import WeightlessBlock
from quweit_jax.ops import packed_ternary, pair_table, ternary
from quweit_jax.ops.counts import BYTES, FLOAT, INT, Elementwise, LayerCosts
from quweit_jax.ops.integer import straight_through
from quweit_jax.ops.packed_glu import packed_glu
from quweit_jax.ops.ternary_glu import ternary_glu

SUMS = ("ternary", "vector", "int8")
groups.declare("no_decay", "gates", "offsets")
OUTPUT_EPSILON = 1.0  # of the norm of outputs, which are whole numbers
INPUT_SCALE = 32  # of a normalized input, in units of the int8 it is rounded to


def _nearest_divisors(units: int, groups: int) -> str:
    fit = [count for count in range(1, units + 1) if units % count == 0]
    below, above = [d for d in fit if d < groups], [d for d in fit if d > groups]
    return " or ".join(map(str, below[-1:] + above[:1]))


class LookupGLU(Packable):
    """LayerNorm -> int8 -> ternary sums -> codes -> a table read by two codes -> ternary sum.

    Takes the place of an MLP or a gated one: (..., d_in) -> (..., features), the residual addition
    left to the caller. The table begins as the gate silu(2 a) b and can be trained. Not a published
    block; `docs/maths/lookup-glu.md` derives it.

    Two variants keep the ternary sums and read bits instead of codes, [sum > its threshold], for
    `hidden` sums: sum='vector', tables of `lut_inputs` bits whose entries are vectors, and
    sum='int8', the published one-bit tables and int8 vectors (see `WeightlessBlock`).

    Args:
      features: d. hidden: H, units; 0 for 4 d_in. sum: 'ternary' as above, or a variant.
      num_luts, lut_inputs: of a variant's tables, wired at random; 0 tables for H.
      code_bits: of each of the two codes that address a table.
      code_step: the distance of neighboring codes, in standard deviations of what they divide.
      train_tables: the tables are trained, too. table_groups: G tables, each for H / G units; 0 for
        one a unit.
      mix_init, sum_init: standard deviations of the ternary layers' float kernels at the start.
        What is computed does not depend on that of `mix`: it decides how much of itself a weight
        changes in a step of Adam's. 0 for 2 / sqrt(d_in).
      output_norm: an RMSNorm of the outputs takes the place of their one scale; its own scales, one
        a feature, begin at this. 0 for none. For sum='ternary', not in integer-only models.
      use_norm: the LayerNorm; without it the caller's x should have about unit variance.
      dtype: of the output and of the products' operands; all of them are whole numbers that
        bfloat16 holds.
    """

    features: int
    hidden: int = 0
    sum: str = "ternary"
    num_luts: int = 0
    lut_inputs: int = 4
    code_bits: int = 4
    code_step: float = 0.25
    train_tables: bool = False
    table_groups: int = 1
    mix_init: float = 0.0
    sum_init: float = 0.02
    output_norm: float = 0.0
    use_norm: bool = True
    norm_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens d_in"]) -> Float[Array, "*tokens features"]:
        """x (..., d_in) -> (..., features)."""
        check_glu(self, "LookupGLU: ")
        if self.use_norm:
            x = nn.LayerNorm(1e-5, jnp.float32, use_bias=self.norm_bias, name="norm")(x)
        x = to_int8(x.astype(jnp.float32))
        if self.sum != "ternary":
            return self._bits(x)
        return self._packed(x) if self.is_packed else self._trained(x)

    def units(self, width: int) -> int:
        """H for inputs of a width."""
        return self.hidden or 4 * width

    def groups(self, width: int) -> int:
        """G for inputs of a width."""
        units = self.units(width)
        groups = self.table_groups or units
        if units % groups:
            raise InputError(
                f"LookupGLU: table_groups: {units} units cannot share {groups} tables equally; use "
                f"a divisor of {units}, such as {_nearest_divisors(units, groups)}."
            )
        return groups

    def step(self, width: int) -> int:
        """The distance of neighboring codes in whole numbers of the sums, for inputs of a width."""
        return max(1, round(self.code_step * whole_numbers(width)))

    def _trained(self, x: Array) -> Array:
        width = x.shape[-1]
        mix, total, offsets, bias = self._parameters(width)
        tables, entries = self._tables(width)
        # An offset is a whole number of the sums' unit, and one that its integer type holds.
        largest = jnp.iinfo(_offset_type(width)).max
        shift = offsets * whole_numbers(width)
        shift = straight_through(jnp.clip(jnp.round(shift), -largest, largest), shift)
        if self.output_norm:
            start = nn.initializers.constant(self.output_norm)
            scale = self.param("norm_scale", start, (self.features,), jnp.float32)
        else:
            scale = ternary.quantize_weights(total)[1] / entries
        self._write_weights(mix, total, tables)
        self.write(offsets=shift.astype(_offset_type(width)), scale=scale, bias=bias)
        sums = ternary_glu(
            x,
            mix,
            shift,
            tables,
            total,
            step=self.step(width),
            silu_step=None if self.train_tables else self.code_step,
            dtype=jnp.dtype(self.dtype).name,
        )
        return self._scaled(sums, scale, bias)

    def _scaled(self, sums: Array, scale: Array, bias: Array) -> Array:
        """Whole numbers (..., features) as what the layer returns."""
        if self.output_norm:
            scaled = ternary.rms_norm(sums, scale, eps=OUTPUT_EPSILON)
        else:
            scaled = sums * scale
        return (scaled + bias).astype(self.dtype)

    def _parameters(self, width: int) -> tuple[Array, Array, Array, Array]:
        """mix (d_in, 2 H), sum (H, d), offsets (2 H,) in standard deviations, bias (d,)."""
        units, zeros = self.units(width), nn.initializers.zeros
        return (
            self.param("mix", self._start(width), (width, 2 * units), jnp.float32),
            self.param("sum", normal(self.sum_init), (units, self.features), jnp.float32),
            self.param("offsets", zeros, (2 * units,), jnp.float32),
            self.param("bias", zeros, (self.features,), jnp.float32),
        )

    def _start(self, width: int) -> Initializer:
        return normal(self.mix_init or 2 * width**-0.5)

    def _tables(self, width: int) -> tuple[Array, float]:
        """Entries as int8 holds them, (G, C, C) float32, and what 1 is in their units."""
        gate = pair_table.silu_gate(self.code_bits, self.code_step)
        entries = pair_table.entry_scale(gate)
        tables = jnp.broadcast_to(jnp.asarray(gate), (self.groups(width), *gate.shape))
        if self.train_tables:
            tables = self.param("gates", lambda _, start=tables: start)
        return pair_table.round_entries(tables * entries), entries

    def _write_weights(self, mix: Array, total: Array, tables: Array) -> None:
        if self.is_packing:
            packed = [
                packed_ternary.pack_ternary(ternary.quantize_weights(w)[0]) for w in (mix, total)
            ]
            self.write(mix=packed[0], sum=packed[1], tables=tables.astype(jnp.int8))

    def _packed(self, x: Array) -> Array:
        """Sums of int8, comparisons and table reads; floats only around them."""
        mix, offsets, tables, total, scale, bias = self.read(
            "mix", "offsets", "tables", "sum", "scale", "bias"
        )
        step, x = self.step(x.shape[-1]), x.astype(jnp.int8)
        out = packed_glu(x, mix, offsets, tables, total, step=step, num_outputs=self.features)
        return self._scaled(out.astype(jnp.float32), scale, bias)

    def _bits(self, x: Array) -> Array:
        """The variants: ternary sums into tables of bits."""
        width = x.shape[-1]
        if self.is_packed:
            sums = packed_ternary.packed_matmul(
                x.astype(jnp.int8), *self.read("mix"), num_outputs=self.units(width)
            )
        else:
            shape = (width, self.units(width))
            mix = self.param("mix", self._start(width), shape, jnp.float32)
            self.write(mix=packed_ternary.pack_ternary(ternary.quantize_weights(mix)[0]))
            sums = ternary.ternary_product(x, mix, jnp.dtype(self.dtype).name)
        tables = WeightlessBlock(
            self.features,
            self.num_luts or self.units(width),
            self.lut_inputs,
            thermometer_bits=1,
            sum="vector" if self.sum == "vector" else "dense",
            use_norm=False,
            dtype=self.dtype,
            name="luts",
        )
        return tables(sums / whole_numbers(width))

    def costs(self, call: Call) -> list[LayerCosts]:
        """As deployed: additions of int8 into int32 (at most one a weight), comparisons that halve
        the codes left, int8 entries read, one rescaling an output.
        """
        norm = [layer_norm(call, FLOAT, "norm", bias=self.norm_bias)] if self.use_norm else []
        rounding = call.row(
            "requantize",
            "round",
            elementwise=Elementwise.of(FLOAT, call.size),
            comparisons=2 * call.size,
        )
        if self.sum != "ternary":
            mix = self._sums_row(call, "mix", call.width, self.units(call.width))
            return [*norm, rounding, mix, *call.inner(instead={"norm": []})]
        offsets, values = _offset_type(call.width), call.rows * self.features
        scales, activations = 0 if self.output_norm else 1, call.types.activations
        *rows, total = self._costs(
            call,
            {offsets: 2 * self.units(call.width) * BYTES[offsets]},
            {FLOAT: (scales + self.features) * BYTES[FLOAT]},
            values * BYTES[activations],
        )
        scaled = Elementwise.of(FLOAT, scales * values, values)
        rows += [dataclasses.replace(total, elementwise=scaled)]
        if self.output_norm:
            shape = (call.rows, self.features)
            rows += [rms_norm(call, activations, "output_norm", shape=shape)]
        return [*norm, rounding, *rows]

    def _costs(
        self, call: Call, offsets: dict[str, int], scales: dict[str, int], wrote: int
    ) -> list[LayerCosts]:
        """Sums, codes, table, sum. offsets, scales: bytes beside the weights. wrote: bytes."""
        width, units = call.width, self.units(call.width)
        inner, entries = call.rows * units, self.groups(width) * 4**self.code_bits
        codes = call.row(
            "thermometer",
            "codes",
            comparisons=2 * inner * self.code_bits,
            comparison_type=INT,
            stored=offsets,
            activations=2 * inner,
            parameters=2 * units,
        )
        table = call.row(
            "lookup",
            "gate",
            lookups={2 * self.code_bits: 8 * inner},
            stored={"int8": entries},
            activations=3 * inner,
            parameters=entries * self.train_tables,
        )
        mix = self._sums_row(call, "mix", width, 2 * units)
        total = self._sums_row(call, "sum", units, self.features, scales, wrote, self.features)
        return [mix, codes, table, total]

    def _sums_row(
        self,
        call: Call,
        part: str,
        inputs: int,
        outputs: int,
        scales: Mapping[str, int] = {},
        wrote: int = 0,
        biases: int = 0,
    ) -> LayerCosts:
        """Ternary sums, added in int32. scales: bytes beside the weights. wrote: bytes."""
        return call.row(
            call.kind,
            part,
            additions={INT: call.rows * inputs * outputs},
            stored={"2-bit": packed_ternary.packed_bytes(inputs, outputs), **scales},
            activations=call.rows * inputs + wrote,
            parameters=inputs * outputs + biases,
        )


def to_int8(x: Float[Array, "*tokens d"]) -> Float[Array, "*tokens d"]:
    """Normalized values in whole numbers of 1 / 32, at most 127; no gradient beyond."""
    scaled = x * INPUT_SCALE
    limited = jnp.clip(scaled, -127, 127)
    return straight_through(jnp.round(limited), limited)


def whole_numbers(width: int) -> float:
    """How many whole numbers of a ternary sum make a standard deviation of such sums: two of three
    weights are -1 or 1, and inputs have unit variance.
    """
    return INPUT_SCALE * math.sqrt(2 * width / 3)


def _offset_type(width: int) -> str:
    """The smallest integers that hold all sums of a width."""
    return "int16" if 127 * width < 2**15 else INT


def check_glu(options: Any, where: str) -> None:
    """Raises InputError for a value that a LookupGLU's field of that name cannot have."""
    pair_table.check_code_bits(options.code_bits, where)
    check_choice(f"{where}sum", options.sum, SUMS)
    for name in ("hidden", "num_luts", "table_groups"):
        if getattr(options, name) < 0:
            raise InputError(
                f"{where}{name}: expected a positive number, or 0 for its default, found "
                f"{getattr(options, name)}."
            )
    zeros = {"code_step": "", "mix_init": "2 / sqrt(width)", "sum_init": "", "output_norm": "none"}
    for name, zero in zeros.items():
        check_above_zero(f"{where}{name}", getattr(options, name), zero)
    if options.output_norm and options.sum != "ternary":
        raise InputError(
            f"{where}output_norm: expected 0 with sum='{options.sum}', whose outputs have a scale "
            f"each, found {options.output_norm}."
        )
