"""Look-up table layers: thin Linen modules over `quweit_jax.ops`.

Dimensions: T tokens (all leading dimensions), F input bits, L look-up tables, n inputs a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers.costs import Call
from quweit_jax.ops import lut, packed_lut
from quweit_jax.ops import sums as reductions
from quweit_jax.ops import wiring as mapping
from quweit_jax.ops.counts import BYTES, FLOAT, Elementwise, LayerCosts, packed_bits

MAPPINGS = ("random", "arange", "learnable", "candidates")


TABLE_INITS = ("uniform", "residual")


def symmetric_uniform(scale: float = 1.0) -> Callable[..., Array]:
    """U(-scale, scale), the published initialization of tables at scale 1."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -scale, scale
    )


def residual_tables(scale: float = 1.0) -> Callable[..., Array]:
    """Tables that start by passing on their first input, with magnitudes U(0, scale)."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        sign = 2 * (jnp.arange(shape[-1]) & 1) - 1
        return sign.astype(dtype) * jax.random.uniform(key, shape, dtype, 0.0, scale)

    return init


def packing(module: nn.Module) -> bool:
    """Whether the constants of the packed form are being written down: `model.apply(variables, ...,
    mutable=['packed'])`.
    """
    return module.is_mutable_collection("packed") and not module.is_initializing()


def wiring_of(params: Mapping[str, Any], constants: Mapping[str, Any]) -> Array:
    """The input each slot of a look-up layer reads, (L, n), whatever the kind of mapping, from its
    `params` and its `wiring`.
    """
    num_luts, entries = params["tables"].shape
    wiring = (
        constants["mapping"]
        if "mapping" in constants
        else mapping.strongest(params["scores"], constants.get("candidates"))
    )
    return jnp.asarray(wiring).reshape(num_luts, entries.bit_length() - 1)


class LUTLayer(nn.Module):
    """One layer of learned look-up tables: bits (..., F) -> bits (..., num_luts), in {0, 1}.

    Args:
      num_luts: L. lut_inputs: n, 1 to 8.
      mapping: 'random' or 'arange' (fixed), 'learnable' (a score for every input and slot) or
        'candidates' (among a few).
      candidates: how many inputs each slot chooses among, for mapping='candidates'.
      tau: temperature of a learnable mapping's gradient to the bits.
      decay, alpha, beta: the EFD weighting, see `ops.lut.lut_lookup`.
      table_init: 'uniform' (published) or 'residual'. table_scale: the largest magnitude at the
        start.
      binary: False returns the tables' real values instead of bits.
    """

    num_luts: int
    lut_inputs: int = 6
    mapping: str = "random"
    candidates: int = 16
    tau: float = 0.001
    decay: str = "exponential"
    alpha: float | None = None
    beta: float | None = None
    table_init: str = "uniform"
    table_scale: float = 1.0
    binary: bool = True

    def __call__(self, bits: Array) -> Array:
        """bits (..., F), 0 or 1 -> (..., num_luts) float."""
        out_LT = self.feature_major(bits.reshape(math.prod(bits.shape[:-1]), bits.shape[-1]).T)
        return out_LT.T.reshape(*bits.shape[:-1], self.num_luts)

    @nn.compact
    def feature_major(self, bits_FT: Array) -> Array:
        """The same for bits (F, T): (num_luts, T)."""
        check_choice("LUTLayer: mapping", self.mapping, MAPPINGS)
        check_choice("LUTLayer: table_init", self.table_init, TABLE_INITS)
        if not 1 <= self.lut_inputs <= lut.MAX_LUT_INPUTS:
            raise InputError(
                f"LUTLayer: lut_inputs must be 1 to {lut.MAX_LUT_INPUTS}, found {self.lut_inputs}; "
                "use more, smaller tables."
            )
        if self.has_variable("packed", "tables") and not packing(self):
            return packed_lut.look_up(
                bits_FT,
                self.get_variable("packed", "wiring"),
                self.get_variable("packed", "tables"),
            )
        num_inputs, slots = bits_FT.shape[0], self.num_luts * self.lut_inputs
        init = symmetric_uniform if self.table_init == "uniform" else residual_tables
        tables = self.param(
            "tables", init(self.table_scale), (self.num_luts, 2**self.lut_inputs), jnp.float32
        )
        bits_FT, wiring, inverse = self._wire(bits_FT, num_inputs, slots)
        if packing(self):
            self.put_variable("packed", "tables", packed_lut.pack_tables(tables))
            dtype = (
                jnp.uint8
                if num_inputs <= 2**8
                else jnp.uint16
                if num_inputs <= 2**16
                else jnp.int32
            )
            self.put_variable(
                "packed",
                "wiring",
                wiring_of(self.variables["params"], self.variables.get("wiring", {})).astype(dtype),
            )
        values = lut.lut_lookup_feature_major(
            bits_FT,
            wiring,
            tables,
            decay=self.decay,
            alpha=self.alpha,
            beta=self.beta,
            inverse=inverse,
        )
        return lut.binarize(values) if self.binary else values

    def _wire(
        self, bits_FT: Array, num_inputs: int, slots: int
    ) -> tuple[Array, Array, Array | None]:
        """The bits to read, the mapping into them, and its inverse."""
        shape = (num_inputs, self.num_luts, self.lut_inputs)
        if self.mapping in ("random", "arange"):
            wiring = self.variable("wiring", "mapping", lambda: self._fixed_mapping(shape)).value
            inverse = self.variable(
                "wiring", "inverse", lambda: mapping.invert_mapping(wiring, num_inputs)
            ).value
            return bits_FT, wiring, inverse
        if self.mapping == "learnable":
            scores = self.param(
                "scores", nn.initializers.uniform(1.0), (num_inputs, slots), jnp.float32
            )
            chosen_MT = mapping.learnable_mapping(bits_FT.T, scores, tau=self.tau).T
        else:
            choices = min(self.candidates, num_inputs)
            candidates = self.variable(
                "wiring",
                "candidates",
                lambda: mapping.random_candidates(
                    self.make_rng("params"), num_inputs, slots, choices
                ),
            ).value
            scores = self.param(
                "scores", nn.initializers.uniform(1.0), (slots, choices), jnp.float32
            )
            chosen_MT = mapping.sparse_mapping_feature_major(
                bits_FT, scores, candidates, tau=self.tau
            )
        straight = mapping.arange_mapping(slots, self.num_luts, self.lut_inputs)
        return chosen_MT, straight, mapping.invert_mapping(straight, slots)

    def _fixed_mapping(self, shape: tuple[int, int, int]) -> Array:
        return (
            mapping.random_mapping(self.make_rng("params"), *shape)
            if self.mapping == "random"
            else mapping.arange_mapping(*shape)
        )

    def costs(self, call: Call) -> list[LayerCosts]:
        """A read a table and token. Tables of bits are stored as such, of real values in float32; a
        learned wiring has a score for every choice.
        """
        bits, rows = call.shape if call.method == "feature_major" else (call.width, call.rows)
        count, slots, entries = self.num_luts, self.num_luts * self.lut_inputs, 2**self.lut_inputs
        choices = {"learnable": bits, "candidates": min(self.candidates, bits)}
        stored = {"wiring": slots * (1 if bits <= 2**8 else 2 if bits <= 2**16 else 4)}
        if self.binary:
            stored["1-bit"], wrote = count * packed_bits(entries), packed_bits(count)
        else:
            stored[FLOAT], wrote = count * entries * BYTES[FLOAT], count * BYTES[FLOAT]
        return [
            LayerCosts(
                call.at(),
                "lookup",
                lookups={self.lut_inputs: rows * count * (1 if self.binary else 32)},
                bytes_moved={
                    "weights": sum(stored.values()),
                    "activations": rows * (packed_bits(bits) + wrote),
                },
                bytes_stored=stored,
                parameters=count * entries + choices.get(self.mapping, 0) * slots,
            )
        ]


class GroupSum(nn.Module):
    """Sums contiguous groups of bits and divides by tau: (..., L) -> (..., num_groups). See
    `ops.reductions.group_sum`.
    """

    num_groups: int
    tau: float = 1.0

    def __call__(self, bits: Array) -> Array:
        """bits (..., L) -> (..., num_groups)."""
        return reductions.group_sum(bits, self.num_groups, tau=self.tau)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Bits counted in the smallest integers that hold a group's count; the scores divided by
        tau, a constant, in float32.
        """
        bits, scores = call.width, call.rows * self.num_groups
        integer = "int8" if -(-bits // self.num_groups) < 2**8 else "int16"
        return [
            LayerCosts(
                call.at(),
                "head",
                additions={integer: call.rows * bits},
                elementwise=Elementwise({FLOAT: scores}),
                bytes_moved={"activations": call.rows * packed_bits(bits) + scores * BYTES[FLOAT]},
            )
        ]


class LearnableReduction(nn.Module):
    """A pyramid of look-up layers, each about `lut_inputs` times narrower, down to `num_outputs`
    real scores.

    Args:
      num_outputs: width of the top; the top layer returns its tables' values divided by tau, the
        layers below return bits.
      lut_inputs: n. tau: divides the scores; small values sharpen them. lut: further `LUTLayer`
        fields, by name.
    """

    num_outputs: int
    lut_inputs: int = 6
    tau: float = 1.0
    lut: dict[str, Any] | None = None

    def widths(self, num_inputs: int) -> list[int]:
        """The layers' widths from the bottom to the top."""
        widths = [self.num_outputs]
        while widths[0] * self.lut_inputs < num_inputs:
            widths.insert(0, widths[0] * self.lut_inputs)
        return widths

    @nn.compact
    def __call__(self, bits: Array) -> Array:
        """bits (..., L) -> (..., num_outputs)."""
        widths = self.widths(bits.shape[-1])
        for i, width in enumerate(widths):
            top = i == len(widths) - 1
            options: dict[str, Any] = {"mapping": "arange", **(self.lut or {})}
            bits = LUTLayer(width, self.lut_inputs, binary=not top, name=f"luts_{i}", **options)(
                bits
            )
        return bits / self.tau
