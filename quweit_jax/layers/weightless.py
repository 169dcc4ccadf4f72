"""Weightless layers: thin Linen modules over `quweit_jax.ops`.

Dimensions: T tokens (all leading dimensions), F input bits, L look-up tables, n inputs a table, z thermometer bits, d features.

Trainable values are in `params` under the names the optimizer groups by: `tables`, `scores`, `thresholds`, `vectors`. What is
drawn once and never trained (wiring, candidates, fitted thresholds) is in the `wiring` collection, saved with the model. What an
integer-only model needs at inference is in `packed` (see `layers.integer`): given that collection, look-up layers read 1-bit tables.
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
from quweit_jax.ops import lut, mapping, packed_lut, reductions, thermometer

MAPPINGS = ("random", "arange", "learnable", "candidates")
SUMS = ("dense", "grouped")
TABLE_INITS = ("uniform", "residual")


def symmetric_uniform(scale: float = 1.0) -> Callable[..., Array]:
    """U(-scale, scale), the published initialisation of tables at scale 1."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -scale, scale)


def residual_tables(scale: float = 1.0) -> Callable[..., Array]:
    """Tables that start by passing on their first input, with magnitudes U(0, scale)."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        sign = 2 * (jnp.arange(shape[-1]) & 1) - 1
        return sign.astype(dtype) * jax.random.uniform(key, shape, dtype, 0.0, scale)

    return init


def packing(module: nn.Module) -> bool:
    """Whether the constants of the packed form are being written down: `model.apply(variables, ..., mutable=['packed'])`."""
    return module.is_mutable_collection("packed") and not module.is_initializing()


def wiring_of(params: Mapping[str, Any], constants: Mapping[str, Any]) -> Array:
    """The input each slot of a look-up layer reads, (L, n), whatever the kind of mapping, from its `params` and its `wiring`."""
    num_luts, entries = params["tables"].shape
    wiring = constants["mapping"] if "mapping" in constants else mapping.strongest(params["scores"], constants.get("candidates"))
    return jnp.asarray(wiring).reshape(num_luts, entries.bit_length() - 1)


class LUTLayer(nn.Module):
    """One layer of learned look-up tables: bits (..., F) -> bits (..., num_luts), in {0, 1}.

    Args:
      num_luts: L. lut_inputs: n, 1 to 8.
      mapping: 'random' or 'arange' (fixed), 'learnable' (a score for every input and slot) or 'candidates' (among a few).
      candidates: how many inputs each slot chooses among, for mapping='candidates'.
      tau: temperature of a learnable mapping's gradient to the bits.
      decay, alpha, beta: the EFD weighting, see `ops.lut.lut_lookup`.
      table_init: 'uniform' (published) or 'residual'. table_scale: the largest magnitude at the start.
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
            raise InputError(f"LUTLayer: lut_inputs must be 1 to {lut.MAX_LUT_INPUTS}, found {self.lut_inputs}; use more, smaller tables.")
        if self.has_variable("packed", "tables") and not packing(self):
            return packed_lut.look_up(bits_FT, self.get_variable("packed", "wiring"), self.get_variable("packed", "tables"))
        num_inputs, slots = bits_FT.shape[0], self.num_luts * self.lut_inputs
        init = symmetric_uniform if self.table_init == "uniform" else residual_tables
        tables = self.param("tables", init(self.table_scale), (self.num_luts, 2**self.lut_inputs), jnp.float32)
        bits_FT, wiring, inverse = self._wire(bits_FT, num_inputs, slots)
        if packing(self):
            self.put_variable("packed", "tables", packed_lut.pack_tables(tables))
            dtype = jnp.uint8 if num_inputs <= 2**8 else jnp.uint16 if num_inputs <= 2**16 else jnp.int32
            self.put_variable("packed", "wiring", wiring_of(self.variables["params"], self.variables.get("wiring", {})).astype(dtype))
        values = lut.lut_lookup_feature_major(bits_FT, wiring, tables, decay=self.decay, alpha=self.alpha, beta=self.beta, inverse=inverse)
        return lut.binarize(values) if self.binary else values

    def _wire(self, bits_FT: Array, num_inputs: int, slots: int) -> tuple[Array, Array, Array | None]:
        """The bits to read, the mapping into them, and its inverse."""
        shape = (num_inputs, self.num_luts, self.lut_inputs)
        if self.mapping in ("random", "arange"):
            wiring = self.variable("wiring", "mapping", lambda: self._fixed_mapping(shape)).value
            inverse = self.variable("wiring", "inverse", lambda: mapping.invert_mapping(wiring, num_inputs)).value
            return bits_FT, wiring, inverse
        if self.mapping == "learnable":
            scores = self.param("scores", nn.initializers.uniform(1.0), (num_inputs, slots), jnp.float32)
            chosen_MT = mapping.learnable_mapping(bits_FT.T, scores, tau=self.tau).T
        else:
            choices = min(self.candidates, num_inputs)
            candidates = self.variable(
                "wiring", "candidates", lambda: mapping.random_candidates(self.make_rng("params"), num_inputs, slots, choices)
            ).value
            scores = self.param("scores", nn.initializers.uniform(1.0), (slots, choices), jnp.float32)
            chosen_MT = mapping.sparse_mapping_feature_major(bits_FT, scores, candidates, tau=self.tau)
        straight = mapping.arange_mapping(slots, self.num_luts, self.lut_inputs)
        return chosen_MT, straight, mapping.invert_mapping(straight, slots)

    def _fixed_mapping(self, shape: tuple[int, int, int]) -> Array:
        return mapping.random_mapping(self.make_rng("params"), *shape) if self.mapping == "random" else mapping.arange_mapping(*shape)


class WeightlessBlock(nn.Module):
    """LayerNorm -> thermometer bits -> look-up layers -> conditional sum (QuWeiT, arXiv 2411.01818). Takes the place of an MLP.

    `WeightlessBlock(features=d)` maps (..., d_in) to (..., d) and, like an MLP, leaves the residual addition to the caller.

    Args:
      features: d, the width of the output.
      num_luts: L of each look-up layer, one number for one layer (the default; more layers are harder to train).
      lut_inputs: n. thermometer_bits: z thresholds a feature, starting at the gaussian quantiles of N(0, 1).
      learn_thresholds: train the thresholds through the surrogate gradient.
      window, window_shape: half-width and shape of that surrogate, see `ops.thermometer.encode_ste`.
      sum: 'dense', every bit adds its vector of d, or 'grouped', each bit serves one output.
      signed: bits count as -1/+1 in the sum instead of 0/1 (trains better; at inference the constant folds into the bias).
      int8_sums: round the vectors to int8 (one scale an output) in the forward pass, so that what is trained is what is deployed.
      vector_init: standard deviation of the vectors at the start.
      use_norm: the LayerNorm; without it the caller's x should have about unit variance.
      mapping, candidates, tau, decay, alpha, beta, table_init, table_scale: see `LUTLayer`.
      dtype: of the sums; look-ups have none.
    """

    features: int
    num_luts: int | Sequence[int] = 896
    lut_inputs: int = 4
    thermometer_bits: int = 4
    learn_thresholds: bool = True
    window: float = 1.0
    window_shape: str = "triangular"
    sum: str = "dense"
    signed: bool = True
    int8_sums: bool = True
    vector_init: float = 0.006
    use_norm: bool = True
    norm_bias: bool = False
    mapping: str = "random"
    candidates: int = 16
    tau: float = 0.001
    decay: str = "exponential"
    alpha: float | None = 0.5
    beta: float | None = None
    table_init: str = "uniform"
    table_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (..., d_in) floating -> (..., features)."""
        self._layers()
        if self.use_norm:
            x = nn.LayerNorm(epsilon=1e-5, use_bias=self.norm_bias, dtype=jnp.float32, name="norm")(x)
        lead, width = x.shape[:-1], x.shape[-1]
        bits_FT = self._encode(x.reshape(math.prod(lead), width).T)
        bits_LT = self._look_up(bits_FT)
        return self._sum(bits_LT, *self._vectors(bits_LT.shape[0])).reshape(*lead, self.features)

    def _layers(self) -> tuple[int, ...]:
        """The number of tables of each look-up layer, checked."""
        check_choice("WeightlessBlock: sum", self.sum, SUMS)
        layers = (self.num_luts,) if isinstance(self.num_luts, int) else tuple(self.num_luts)
        if not layers or min(layers) < 1:
            raise InputError(f"WeightlessBlock: num_luts must be a positive number, or several for several layers, found {self.num_luts}.")
        if self.sum == "grouped" and layers[-1] % self.features:
            raise InputError(
                f"WeightlessBlock: a grouped sum shares the {layers[-1]} tables of the last layer equally among {self.features} features; "
                f"use a multiple of {self.features}, or sum='dense'."
            )
        return layers

    def _look_up(self, bits_FT: Array) -> Array:
        """All look-up layers, one after another: bits (F, T) -> (L, T)."""
        for i, num_luts in enumerate(self._layers()):
            bits_FT = LUTLayer(
                num_luts,
                self.lut_inputs,
                mapping=self.mapping,
                candidates=self.candidates,
                tau=self.tau,
                decay=self.decay,
                alpha=self.alpha,
                beta=self.beta,
                table_init=self.table_init,
                table_scale=self.table_scale,
                name=f"luts_{i}",
            ).feature_major(bits_FT)
        return bits_FT

    def _encode(self, x_DT: Array) -> Array:
        width, thresholds = x_DT.shape[0], self._thresholds(x_DT.shape[0])
        check_choice("WeightlessBlock: window_shape", self.window_shape, thermometer.WINDOWS)
        bits_DzT: Array = thermometer.step_ste(x_DT[:, None, :], thresholds[:, :, None], self.window, self.window_shape)
        return bits_DzT.reshape(width * self.thermometer_bits, x_DT.shape[1])

    def _vectors(self, num_luts: int) -> tuple[Array, Array]:
        """The conditional sum's parameters: vectors (L, d), or (L,) if grouped, and bias (d,)."""
        shape = (num_luts, self.features) if self.sum == "dense" else (num_luts,)
        vectors = self.param("vectors", nn.initializers.normal(self.vector_init), shape, jnp.float32)
        return vectors, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)

    def _thresholds(self, width: int) -> Array:
        """The thermometer's thresholds (d, z), trained or not."""

        def start(*_: Any) -> Array:
            return jnp.broadcast_to(thermometer.normal_quantiles(self.thermometer_bits), (width, self.thermometer_bits))

        return self.param("thresholds", start) if self.learn_thresholds else self.variable("wiring", "thresholds", start).value

    def _sum(self, bits_LT: Array, vectors: Array, bias: Array) -> Array:
        if self.int8_sums:
            vectors = reductions.fake_quantize_int8(vectors, axis=0)
        if self.signed:
            bits_LT = 2 * bits_LT - 1
        vectors, bias = vectors.astype(self.dtype), bias.astype(self.dtype)
        if self.sum == "dense":
            return reductions.conditional_sum_feature_major(bits_LT, vectors) + bias
        return reductions.conditional_sum(bits_LT.T, vectors, bias)


class GroupSum(nn.Module):
    """Sums contiguous groups of bits and divides by tau: (..., L) -> (..., num_groups). See `ops.reductions.group_sum`."""

    num_groups: int
    tau: float = 1.0

    def __call__(self, bits: Array) -> Array:
        """bits (..., L) -> (..., num_groups)."""
        return reductions.group_sum(bits, self.num_groups, tau=self.tau)


class LearnableReduction(nn.Module):
    """A pyramid of look-up layers, each about `lut_inputs` times narrower, down to `num_outputs` real scores.

    Args:
      num_outputs: width of the top; the top layer returns its tables' values divided by tau, the layers below return bits.
      lut_inputs: n. tau: divides the scores; small values sharpen them. lut: further `LUTLayer` fields, by name.
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
            bits = LUTLayer(width, self.lut_inputs, binary=not top, name=f"luts_{i}", **options)(bits)
        return bits / self.tau
