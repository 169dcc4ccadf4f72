"""Weightless layers: thin Linen modules over `quweit_jax.ops`.

Dimensions: T tokens (all leading dimensions), F input bits, L look-up tables, n inputs a table, z
thermometer bits, d features.

Trainable values are in `params` under the names the optimizer groups by: `tables`, `scores`,
`thresholds`, `vectors`. What is drawn once and never trained (wiring, candidates, fitted
thresholds) is in the `wiring` collection, saved with the model. What an integer-only model needs at
inference is in `packed` (see `layers.integer`): given that collection, look-up layers read 1-bit
tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Real

from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers import groups
from quweit_jax.layers.costs import Call, layer_norm
from quweit_jax.layers.lookup import (
    LookupOptions,
    LUTLayer,
    VectorLUTLayer,
    check_lookup,
    check_shared,
)
from quweit_jax.layers.packing import Packable
from quweit_jax.ops import bit_models, packed_lut, sums, thermometer
from quweit_jax.ops.counts import BYTES, FLOAT, Elementwise, LayerCosts, packed_bits
from quweit_jax.ops.lut import DECAYS
from quweit_jax.ops.packed_lut import Bits

SUMS = ("dense", "grouped", "vector")
groups.declare("thresholds", "thresholds")
groups.declare("vectors", "vectors")


class WeightlessBlock(Packable):
    """LayerNorm -> thermometer bits -> look-up layers -> conditional sum (QuWeiT, arXiv
    2411.01818). Takes the place of an MLP.

    `WeightlessBlock(features=d)` maps (..., d_in) to (..., d) and, like an MLP, leaves the residual
    addition to the caller.

    Args:
      features: d, the width of the output.
      num_luts: L of each look-up layer, one number for one layer (the default; more layers are
        harder to train).
      lut_inputs: n. thermometer_bits: z thresholds a feature, starting at the gaussian quantiles of
        N(0, 1).
      learn_thresholds: train the thresholds through the surrogate gradient.
      window, window_shape: half-width and shape of that surrogate, see
        `ops.thermometer.encode_ste`.
      sum: 'dense', every bit adds its vector of d; 'grouped', each bit serves one output; or
        'vector' (ours), the last layer's tables have vectors for entries, and those are added.
      signed: bits count as -1/+1 in the sum instead of 0/1 (trains better; at inference the
        constant folds into the bias); nothing to sum='vector'.
      int8_sums: round the vectors to int8 (one scale an output) in the forward pass, so that what
        is trained is what is deployed; sum='vector' always does.
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
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens inputs"]) -> Float[Array, "*tokens d"]:
        """x (..., d_in) floating -> (..., features)."""
        self._layers()
        if self.use_norm:
            x = nn.LayerNorm(epsilon=1e-5, use_bias=self.norm_bias, dtype=jnp.float32, name="norm")(
                x
            )
        lead, width = x.shape[:-1], x.shape[-1]
        x_DT = x.reshape(math.prod(lead), width).T
        if self.sum == "vector":
            out = self._vector_tables(x_DT)
        else:
            out = self._packed(x_DT) if self.is_packed else self._trained(x_DT)
        return out.reshape(*lead, self.features)

    def _trained(self, x_DT: Array) -> Array:
        bits_LT = self._look_up(self._encode(x_DT), self._layers())
        vectors, bias = self._vectors(bits_LT.shape[0])
        if self.is_packing:
            vectors_int, scale = sums.quantize_int8(vectors, axis=0)
            self.write(vectors=vectors_int, scale=scale.reshape(-1), bias=bias)
        return self._sum(bits_LT, vectors, bias)

    def _packed(self, x_DT: Array) -> Array:
        """Comparisons, table reads and int32 sums; floats only around them.

        A block from which tables were pruned has an `offset`, int32 (d,), where its sums begin.
        """
        thresholds, vectors, scale, bias = self.read("thresholds", "vectors", "scale", "bias")
        if vectors.ndim == 2 and not self.is_showing:
            tables = [layer.held() for layer in self._luts(self._layers())]
            total = bit_models.bit_sums(x_DT.T, thresholds, tables, vectors, by_product=True)
        else:
            bits = packed_lut.pack_above(x_DT, thresholds)
            total = self._add(self._look_up_packed(bits, self._layers()), vectors, by_product=True)
        if self.signed:  # sum (2 bit - 1) v = 2 sum bit v - sum v
            total = 2 * total - self._per_feature(vectors.astype(jnp.int32)).sum(0)
        if self.has_variable("packed", "offset"):
            total = total + self.read("offset")[0]
        return (total * scale + bias).astype(self.dtype)

    def _add(self, bits: Bits, vectors: Array, *, by_product: bool = False) -> Array:
        """Adds what is selected: bits (L, T), int8 vectors (L, d) or (L,) -> int32 (T, d)."""
        if vectors.ndim == 2:
            return packed_lut.add_vectors(bits, vectors, by_product=by_product)
        chosen = jnp.where(bits.unpack(), vectors[:, None].astype(jnp.int32), 0)
        return chosen.reshape(self.features, -1, chosen.shape[1]).sum(1, dtype=jnp.int32).T

    def _per_feature(self, vectors: Array) -> Array:
        """Grouped vectors (L,) as (L / d, d); dense ones (L, d) as they are."""
        return vectors if vectors.ndim == 2 else vectors.reshape(self.features, -1).T

    def _vector_tables(self, x_DT: Array) -> Array:
        """The block whose last layer gives vectors, in either form."""
        *below, last = self._layers()
        if self.is_packed:
            thresholds, bias = self.read("thresholds", "bias")
            bits = packed_lut.pack_above(x_DT, thresholds)
            bits_LT = self._look_up_packed(bits, below).unpack()
        else:
            bits_FT, bias = self._encode(x_DT), self._bias()
            self.write(bias=bias)
            bits_LT = self._look_up(bits_FT, below)
        tables = VectorLUTLayer(
            last,
            features=self.features,
            vector_init=self.vector_init,
            name="vectors",
            **self._wiring(),
        )
        out = tables.feature_major(bits_LT) + bias
        return out.astype(self.dtype)

    def _wiring(self) -> dict[str, Any]:
        """The fields of a look-up layer that are about its wiring."""
        names = ("lut_inputs", "mapping", "candidates", "tau")
        return {name: getattr(self, name) for name in names}

    def _layers(self) -> tuple[int, ...]:
        """The number of tables of each look-up layer, checked."""
        check_options(self, "WeightlessBlock: ")
        layers = (self.num_luts,) if isinstance(self.num_luts, int) else tuple(self.num_luts)
        if not layers or min(layers) < 1:
            raise InputError(
                "WeightlessBlock: num_luts must be a positive number, or several for several "
                f"layers, found {self.num_luts}."
            )
        if self.sum == "grouped":
            what = "WeightlessBlock: num_luts of the last layer of a grouped sum"
            check_shared(what, layers[-1], self.features, ", or sum='dense'")
        return layers

    def _look_up(self, bits_FT: Array, layers: Sequence[int]) -> Array:
        """Look-up layers, one after another: bits (F, T) -> (L, T)."""
        self.show(thermometer=bits_FT)
        for layer in self._luts(layers):
            bits_FT = layer.feature_major(bits_FT)
        return bits_FT

    def _look_up_packed(self, bits: Bits, layers: Sequence[int]) -> Bits:
        """The same of packed layers, between which bits stay packed."""
        self.show(thermometer=bits)
        for layer in self._luts(layers):
            bits = layer.packed_bits(bits)
        return bits

    def _luts(self, layers: Sequence[int]) -> Iterator[LUTLayer]:
        for i, num_luts in enumerate(layers):
            yield LUTLayer(
                num_luts,
                **self._wiring(),
                decay=self.decay,
                alpha=self.alpha,
                beta=self.beta,
                table_init=self.table_init,
                table_scale=self.table_scale,
                name=f"luts_{i}",
            )

    def _encode(self, x_DT: Array) -> Array:
        thresholds = self._thresholds(x_DT.shape[0])
        self.write(thresholds=thresholds)
        return thermometer.encode_feature_major(
            x_DT, thresholds, window=self.window, shape=self.window_shape
        )

    def _vectors(self, num_luts: int) -> tuple[Array, Array]:
        """The conditional sum's parameters: vectors (L, d), or (L,) if grouped, and bias (d,)."""
        shape = (num_luts, self.features) if self.sum == "dense" else (num_luts,)
        vectors = self.param(
            "vectors", nn.initializers.normal(self.vector_init), shape, jnp.float32
        )
        return vectors, self._bias()

    def _bias(self) -> Array:
        return self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)

    def _thresholds(self, width: int) -> Array:
        """The thermometer's thresholds (d, z), trained or not."""

        def start(*_: object) -> Array:
            return jnp.broadcast_to(
                thermometer.normal_quantiles(self.thermometer_bits), (width, self.thermometer_bits)
            )

        return (
            self.param("thresholds", start)
            if self.learn_thresholds
            else self.variable("wiring", "thresholds", start).value
        )

    def _sum(self, bits_LT: Array, vectors: Array, bias: Array) -> Array:
        if self.int8_sums:
            vectors = sums.fake_quantize_int8(vectors, axis=0)
        if self.signed:
            bits_LT = 2 * bits_LT - 1
        vectors, bias = vectors.astype(self.dtype), bias.astype(self.dtype)
        if self.sum == "dense":
            return sums.conditional_sum_feature_major(bits_LT, vectors) + bias
        return sums.conditional_sum(bits_LT.T, vectors, bias)

    def costs(self, call: Call) -> list[LayerCosts]:
        """As deployed: float32 thresholds, tables of one bit an entry, int8 vectors added in int32,
        a float32 scale and bias an output.
        """
        norm = [layer_norm(call, FLOAT, "norm", bias=self.norm_bias)] if self.use_norm else []
        values, scales = call.rows * self.features, self.features if self.sum == "dense" else 1
        return [
            *norm,
            *self._costs(
                call,
                (FLOAT, FLOAT),
                {FLOAT: (scales + self.features) * BYTES[FLOAT]},
                Elementwise.of(FLOAT, values, values),  # scale and bias
                values * BYTES[call.types.activations],
            ),
        ]

    def _costs(
        self,
        call: Call,
        compared: tuple[str, str],
        scales: dict[str, int],
        elementwise: Elementwise,
        wrote: int,
    ) -> list[LayerCosts]:
        """Thermometer, tables and sum. compared: the types of values and of stored thresholds.
        scales: bytes beside the vectors. elementwise, wrote: of the sum.
        """
        bits, last = call.width * self.thermometer_bits, self._layers()[-1]
        vectors = last * (self.features if self.sum == "dense" else 1)
        thermometer = call.row(
            "thermometer",
            "thermometer",
            comparisons=call.rows * bits,
            comparison_type=compared[0],
            stored={compared[1]: bits * BYTES[compared[1]]},
            activations=call.size * BYTES[compared[0]] + call.rows * packed_bits(bits),
            parameters=bits * self.learn_thresholds,
        )
        if self.sum == "vector":
            total = call.row(
                "conditional_sum",
                "bias",
                elementwise=Elementwise.of(FLOAT, additions=call.rows * self.features),
                stored={FLOAT: self.features * BYTES[FLOAT]},
                parameters=self.features,
            )
            return [thermometer, *call.inner(instead={"norm": []}), total]
        total = call.row(  # all vectors added, as if every bit were set
            "conditional_sum",
            "conditional_sum",
            additions={"int32": call.rows * vectors},
            elementwise=elementwise,
            stored={"int8": vectors, **scales},
            activations=call.rows * packed_bits(last) + wrote,
            parameters=vectors + self.features,
        )
        return [thermometer, *call.inner(instead={"norm": []}), total]


def above(x_DT: Real[Array, "d T"], thresholds: Real[Array, "d z"]) -> Bool[Array, "bits T"]:
    """Thermometer bits: x (d, T) and thresholds (d, z) -> bool (d * z, T)."""
    return (x_DT[:, None, :] > thresholds[:, :, None]).reshape(-1, x_DT.shape[1])


class BlockOptions(LookupOptions, Protocol):
    """What decides a weightless block beside its tables; see `WeightlessBlock`."""

    @property
    def window_shape(self) -> str:
        """One of `ops.thermometer.WINDOWS`."""
        ...

    @property
    def sum(self) -> str:
        """One of SUMS."""
        ...

    @property
    def decay(self) -> str:
        """One of `ops.lut.DECAYS`."""
        ...

    @property
    def thermometer_bits(self) -> int:
        """Thresholds a feature."""
        ...


def check_options(options: BlockOptions, where: str) -> None:
    """Raises InputError for a value that a block's field of that name cannot have.

    options: a WeightlessBlock, or what has its fields. where: is put before the field's name.
    """
    check_choice(f"{where}window_shape", options.window_shape, thermometer.WINDOWS)
    check_choice(f"{where}sum", options.sum, SUMS)
    check_choice(f"{where}decay", options.decay, DECAYS)
    check_lookup(options, where)
    if options.thermometer_bits < 1:
        raise InputError(
            f"{where}thermometer_bits: expected at least 1, found {options.thermometer_bits}."
        )
