"""The plain weightless classifier: thermometer -> look-up layers -> group sum (DWN, arXiv
2410.11112).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers.costs import Call
from quweit_jax.layers.lookup import MAPPINGS, GroupSum, LearnableReduction, LUTLayer, check_shared
from quweit_jax.layers.packing import Packable
from quweit_jax.ops import bit_models, packed_lut, thermometer
from quweit_jax.ops.counts import BYTES, FLOAT, LayerCosts, packed_bits
from quweit_jax.ops.lut import DECAYS, MAX_LUT_INPUTS
from quweit_jax.ops.packed_lut import Bits

REDUCTIONS = ("group_sum", "learnable")


@dataclasses.dataclass(frozen=True)
class DWNConfig:
    """What decides a classifier's shape.

    num_luts: look-up tables of each layer; the last's are shared equally by the classes. mapping:
      the wiring of the first layer (later layers are wired at random).
    thermometer: 'distributive', 'gaussian' or 'uniform', fitted to the inputs the model is
      initialized on.
    tau: divides the group sums; about the square root of the tables per class trains well. A
      learnable reduction's scores lie in [-1, 1] and are multiplied by it.
    """

    num_classes: int
    num_luts: tuple[int, ...] = (500,)
    lut_inputs: int = 6
    mapping: str = "learnable"
    candidates: int = 16
    mapping_tau: float = 0.001
    thermometer: str = "distributive"
    thermometer_bits: int = 8
    per_feature: bool = True
    reduction: str = "group_sum"
    tau: float = 3.3
    decay: str = "exponential"
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self):
        check_choice("model.mapping", self.mapping, MAPPINGS)
        check_choice("model.thermometer", self.thermometer, thermometer.FITS)
        check_choice("model.reduction", self.reduction, REDUCTIONS)
        check_choice("model.decay", self.decay, DECAYS)
        if not 1 <= self.lut_inputs <= MAX_LUT_INPUTS:
            raise InputError(
                f"model.lut_inputs: a table can have 1 to {MAX_LUT_INPUTS} inputs, found "
                f"{self.lut_inputs}; use more, smaller tables."
            )
        if isinstance(self.num_luts, int):
            object.__setattr__(self, "num_luts", (self.num_luts,))
        if not self.num_luts or min(self.num_luts) < 1:
            raise InputError(
                "model.num_luts: expected a positive number of tables for each layer, found "
                f"{self.num_luts}."
            )
        if self.num_classes < 1:
            raise InputError(f"model.num_classes: expected at least 1, found {self.num_classes}.")
        if not 1e-30 <= self.tau <= 1e30:
            raise InputError(f"model.tau: expected 1e-30 to 1e30, found {self.tau}.")
        if self.reduction == "learnable" and self.lut_inputs < 2:
            raise InputError(
                "model.lut_inputs: expected 2 or more for --config.model.reduction=learnable, "
                f"whose layers become narrower, found {self.lut_inputs}."
            )
        if self.reduction == "group_sum":
            otherwise = ", or --config.model.reduction=learnable"
            check_shared("model.num_luts", self.num_luts[-1], self.num_classes, otherwise)


class DWN(Packable):
    """Inputs (B, ...) of any shape -> class scores (B, num_classes). Initializing it fits the
    thermometer to the given inputs.
    """

    config: DWNConfig
    fits_inputs = True  # initialize it on a good share of the training inputs

    @nn.compact
    def __call__(
        self, inputs: Shaped[Array, "B ..."], *, train: bool = False
    ) -> Float[Array, "B classes"]:
        """inputs (B, ...) real -> (B, num_classes) float32."""
        c = self.config
        features = inputs.reshape(inputs.shape[0], math.prod(inputs.shape[1:]))
        thresholds = self._thresholds(features)
        if self.is_packed and self._has_equal_groups():
            tables = [layer.held() for layer in self._luts()]
            rows = jnp.atleast_2d(thresholds)
            counts = bit_models.bit_counts(features, rows, tables, c.num_classes)
            return counts.astype(jnp.float32) / c.tau
        if self.is_packed:
            bits = self._look_up_packed(features.T, thresholds).unpack().T
        else:
            bits = thermometer.encode(features, thresholds).reshape(inputs.shape[0], -1)
            self.show(thermometer=bits.T)
            for layer in self._luts():
                bits = layer(bits)
        if c.reduction == "group_sum":
            return GroupSum(c.num_classes, c.tau, name="reduction")(bits)
        return LearnableReduction(c.num_classes, c.lut_inputs, 1.0 / c.tau, name="reduction")(bits)

    def _has_equal_groups(self) -> bool:
        """Whether nothing but its classes' bits are counted: a reduction from which tables were
        pruned has vectors, and bits that are shown are needed themselves.
        """
        pruned = self.variables.get("packed", {}).get("reduction")
        return self.config.reduction == "group_sum" and not pruned and not self.is_showing

    def _look_up_packed(self, features_FB: Array, thresholds: Array) -> Bits:
        """Packed layers, between which bits stay packed: features (F, B) -> bits (L, B)."""
        bits = packed_lut.pack_above(features_FB, thresholds)
        self.show(thermometer=bits)
        for layer in self._luts():
            bits = layer.packed_bits(bits)
        return bits

    def _luts(self) -> Iterator[LUTLayer]:
        c = self.config
        shared = {"lut_inputs": c.lut_inputs, "decay": c.decay, "alpha": c.alpha, "beta": c.beta}
        first = {"mapping": c.mapping, "candidates": c.candidates, "tau": c.mapping_tau}
        for i, width in enumerate(c.num_luts):
            yield LUTLayer(width, name=f"luts_{i}", **shared, **({} if i else first))

    def _thresholds(self, features: Array) -> Array:
        """The thermometer's (features, z), or (z,) for all, fitted to the first inputs."""
        if self.is_packed:
            thresholds = self.read("thresholds")[0]
            if thresholds.ndim == 2 and len(thresholds) != features.shape[1]:
                raise InputError(
                    f"DWN: expected examples (B, ...) of {len(thresholds)} numbers each, found "
                    f"{features.shape[0]} of {features.shape[1]}; give as many as it was trained "
                    "on, and of a single example x[None]."
                )
            return thresholds
        c, fit = self.config, thermometer.FITS[self.config.thermometer]
        thresholds = self.variable(
            "wiring",
            "thresholds",
            lambda: fit(features, c.thermometer_bits, per_feature=c.per_feature),
        ).value
        self.write(thresholds=thresholds)
        return thresholds

    def costs(self, call: Call) -> list[LayerCosts]:
        """The thermometer of float32 inputs, and those of the layers inside."""
        c, features = self.config, math.prod(call.shape[1:])
        bits = features * c.thermometer_bits
        held = (features if c.per_feature else 1) * c.thermometer_bits
        thermometer = call.row(
            "thermometer",
            "thermometer",
            comparisons=call.shape[0] * bits,
            stored={FLOAT: held * BYTES[FLOAT]},
            activations=call.size * BYTES[FLOAT] + call.shape[0] * packed_bits(bits),
        )
        return [thermometer, *call.inner()]
