"""Look-up table layers: thin Linen modules over `quweit_jax.ops`.

Dimensions: T tokens (all leading dimensions), F input bits, L look-up tables, n inputs a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers import groups
from quweit_jax.layers.costs import Call
from quweit_jax.layers.norms import Initializer
from quweit_jax.layers.packing import Packable
from quweit_jax.ops import lut, packed_lut, sums, vector_lut
from quweit_jax.ops.counts import BYTES, FLOAT, Elementwise, LayerCosts, packed_bits
from quweit_jax.ops.integer import straight_through
from quweit_jax.ops.packed_lut import Bits
from quweit_jax.ops.wiring import (
    arange_wiring,
    invert_wiring,
    learnable_wiring,
    random_candidates,
    random_wiring,
    sparse_wiring_feature_major,
    strongest,
)

MAPPINGS = ("random", "arange", "learnable", "candidates")


TABLE_INITS = ("uniform", "residual")
groups.declare("tables", "tables")
groups.declare("scores", "scores")


def symmetric_uniform(scale: float = 1.0) -> Initializer:
    """An initializer with U(-scale, scale), the published initialization of tables at scale 1."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -scale, scale
    )


def residual_tables(scale: float = 1.0) -> Initializer:
    """An initializer of tables that start by passing on their first input, with magnitudes U(0,
    scale).
    """

    def init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        sign = 2 * (jnp.arange(shape[-1]) & 1) - 1
        return sign.astype(dtype) * jax.random.uniform(key, shape, dtype, 0.0, scale)

    return init


class LookupOptions(Protocol):
    """What decides the tables of a look-up layer; see `LUTLayer`."""

    @property
    def mapping(self) -> str:
        """One of MAPPINGS."""
        ...

    @property
    def table_init(self) -> str:
        """One of TABLE_INITS."""
        ...

    @property
    def lut_inputs(self) -> int:
        """Inputs of a table."""
        ...


def check_shared(what: str, tables: int, outputs: int, otherwise: str = "") -> None:
    """Raises InputError unless tables can be shared equally by outputs; names the two nearest
    numbers that can. otherwise: what else helps.
    """
    if outputs < 1:
        raise InputError(f"{what}: expected at least one output, found {outputs}.")
    if tables % outputs:
        below = tables // outputs * outputs
        nearest = f"{below} or {below + outputs}" if below else f"{outputs}"
        raise InputError(
            f"{what}: {outputs} outputs cannot share {tables} tables equally, so that the last "
            f"would have fewer or none; use {nearest}{otherwise}."
        )


def check_lookup(options: LookupOptions, where: str) -> None:
    """Raises InputError for a mapping, table_init or lut_inputs that tables cannot have."""
    check_choice(f"{where}mapping", options.mapping, MAPPINGS)
    check_choice(f"{where}table_init", options.table_init, TABLE_INITS)
    if not 1 <= options.lut_inputs <= lut.MAX_LUT_INPUTS:
        raise InputError(
            f"{where}lut_inputs: a table can have 1 to {lut.MAX_LUT_INPUTS} inputs, found "
            f"{options.lut_inputs}; use more, smaller tables."
        )


class LUTLayer(Packable):
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

    def __call__(self, bits: Shaped[Array, "*tokens F"]) -> Shaped[Array, "*tokens L"]:
        """bits (..., F), 0 or 1 -> (..., num_luts) float."""
        out_LT = self.feature_major(bits.reshape(math.prod(bits.shape[:-1]), bits.shape[-1]).T)
        return out_LT.T.reshape(*bits.shape[:-1], out_LT.shape[0])

    @nn.compact
    def feature_major(self, bits_FT: Shaped[Array, "F T"]) -> Shaped[Array, "L T"]:
        """Reads the tables for bits that are (F, T): (num_luts, T), bool in packed form.

        The bits that come out are in the collection `intermediates`, if that is mutable.
        """
        if not self.is_packed:
            out_LT = self._trained(bits_FT)
            if self.binary:
                self.show(bits=out_LT)
            return out_LT
        if self.binary:
            return self.packed_bits(packed_lut.pack_bits(bits_FT)).unpack()
        wiring, tables = self.read("wiring", "tables")
        wiring = wiring.astype(jnp.int32)
        return lut.lut_lookup_feature_major(bits_FT.astype(jnp.float32), wiring, tables)

    def packed_bits(self, bits: Bits) -> Bits:
        """The packed form of a layer of bits, for bits that stay packed:
        (F, T) -> (num_luts, T)."""
        wiring, tables = self.read("wiring", "tables")
        out = packed_lut.look_up_words(bits, wiring, tables)
        self.show(bits=out)
        return out

    def held(self) -> tuple[Array, Array]:
        """The packed form's wiring (L, n) and tables."""
        wiring, tables = self.read("wiring", "tables")
        return wiring, tables

    def _trained(self, bits_FT: Array) -> Array:
        check_lookup(self, "LUTLayer: ")
        init = symmetric_uniform if self.table_init == "uniform" else residual_tables
        shape = (self.num_luts, 2**self.lut_inputs)
        tables = self.param("tables", init(self.table_scale), shape, jnp.float32)
        bits_FT, wiring, inverse = self._wire(bits_FT)
        self.write(tables=packed_lut.pack_tables(tables) if self.binary else tables)
        weighting = {"decay": self.decay, "alpha": self.alpha, "beta": self.beta}
        values = lut.lut_lookup_feature_major(bits_FT, wiring, tables, inverse=inverse, **weighting)
        return lut.binarize(values) if self.binary else values

    def _wire(self, bits_FT: Array) -> tuple[Array, Array, Array | None]:
        """The bits to read, the wiring into them, and its inverse."""
        num_inputs, slots = bits_FT.shape[0], self.num_luts * self.lut_inputs
        shape = (num_inputs, self.num_luts, self.lut_inputs)
        if self.mapping in ("random", "arange"):
            wiring = self.variable("wiring", "mapping", lambda: self._fixed_wiring(shape)).value
            inverse = self.variable(
                "wiring", "inverse", lambda: invert_wiring(wiring, num_inputs)
            ).value
            self._write_wiring(wiring, num_inputs)
            return bits_FT, wiring, inverse
        uniform, candidates = nn.initializers.uniform(1.0), None
        if self.mapping == "learnable":
            scores = self.param("scores", uniform, (num_inputs, slots), jnp.float32)
            chosen_MT = learnable_wiring(bits_FT.T, scores, tau=self.tau).T
        else:
            choices = min(self.candidates, num_inputs)
            candidates = self.variable(
                "wiring",
                "candidates",
                lambda: random_candidates(self.make_rng("params"), num_inputs, slots, choices),
            ).value
            scores = self.param("scores", uniform, (slots, choices), jnp.float32)
            chosen_MT = sparse_wiring_feature_major(bits_FT, scores, candidates, tau=self.tau)
        self._write_wiring(strongest(scores, candidates), num_inputs)
        straight = arange_wiring(slots, self.num_luts, self.lut_inputs)
        return chosen_MT, straight, invert_wiring(straight, slots)

    def _wired(self, bits_FT: Array) -> Array:
        """What each slot of each table reads: (L, n, T)."""
        bits_MT, wiring, _ = self._wire(bits_FT)
        return bits_MT[jnp.asarray(wiring)]

    def _fixed_wiring(self, shape: tuple[int, int, int]) -> Array:
        if self.mapping == "random":
            return random_wiring(self.make_rng("params"), *shape)
        return arange_wiring(*shape)

    def _write_wiring(self, wiring: Array, num_inputs: int) -> None:
        """Writes the input of each slot, (L, n), in the smallest integers that hold them all."""
        fits = [d for d in (jnp.uint8, jnp.uint16, jnp.int32) if num_inputs - 1 <= jnp.iinfo(d).max]
        self.write(
            wiring=jnp.asarray(wiring).reshape(self.num_luts, self.lut_inputs).astype(fits[0])
        )

    def costs(self, call: Call) -> list[LayerCosts]:
        """A read a table and token. Tables of bits are stored as such, of real values in float32; a
        learned wiring has a score for every choice.
        """
        bits, rows = call.shape if call.method == "feature_major" else (call.width, call.rows)
        count, entries = self.num_luts, 2**self.lut_inputs
        stored, scores = self._wiring_costs(bits)
        if self.binary:
            stored["1-bit"], wrote = count * packed_bits(entries), packed_bits(count)
        else:
            stored[FLOAT], wrote = count * entries * BYTES[FLOAT], count * BYTES[FLOAT]
        row = call.row(
            "lookup",
            lookups={self.lut_inputs: rows * count * (1 if self.binary else 32)},
            stored=stored,
            activations=rows * (packed_bits(bits) + wrote),
            parameters=count * entries + scores,
        )
        return [row]

    def _wiring_costs(self, num_inputs: int) -> tuple[dict[str, int], int]:
        """Of the wiring: bytes stored, and scores trained."""
        slots = self.num_luts * self.lut_inputs
        choices = {"learnable": num_inputs, "candidates": min(self.candidates, num_inputs)}
        size = 1 if num_inputs <= 2**8 else 2 if num_inputs <= 2**16 else 4
        return {"wiring": slots * size}, choices.get(self.mapping, 0) * slots


class VectorLUTLayer(LUTLayer):
    """Look-up tables whose entries are vectors, added: bits (..., F) -> (..., features).

    One read and `features` additions a table, whatever its number of entries. Entries are rounded
    to int8, one scale an output, also while training. Of LUTLayer's fields those of the wiring
    count.

    Args:
      features: d. vector_init: standard deviation of the entries at the start.
    """

    features: int = 1
    vector_init: float = 0.006

    def __call__(self, bits: Shaped[Array, "*tokens F"]) -> Float[Array, "*tokens features"]:
        """bits (..., F), 0 or 1 -> (..., features) float."""
        out = self.feature_major(bits.reshape(math.prod(bits.shape[:-1]), bits.shape[-1]).T)
        return out.reshape(*bits.shape[:-1], self.features)

    @nn.compact
    def feature_major(self, bits_FT: Shaped[Array, "F T"]) -> Float[Array, "T features"]:
        """The same for bits (F, T): (T, features)."""
        if self.is_packed:
            wiring, vectors, scale = self.read("wiring", "vectors", "scale")
            total = vector_lut.packed_vector_lookup(bits_FT[wiring.astype(jnp.int32)], vectors)
            return total * scale
        check_lookup(self, "VectorLUTLayer: ")
        shape = (self.num_luts, 2**self.lut_inputs, self.features)
        init = nn.initializers.normal(self.vector_init)
        vectors = self.param("vectors", init, shape, jnp.float32)
        rounded, scale = sums.quantize_int8(vectors, axis=(0, 1))
        wired = self._wired(bits_FT)
        self.write(vectors=rounded, scale=scale.reshape(-1))
        shadow = vectors / jax.lax.stop_gradient(scale)
        rounded = straight_through(rounded.astype(jnp.float32), shadow)
        return vector_lut.vector_lookup(wired, rounded) * scale.reshape(-1)

    def costs(self, call: Call) -> list[LayerCosts]:
        """A read of int8 vectors and their addition in int32 a table and token; only what is read
        is moved.
        """
        bits, rows = call.shape if call.method == "feature_major" else (call.width, call.rows)
        wiring = self._wiring_costs(bits)
        values, read = self.num_luts * 2**self.lut_inputs * self.features, rows * self.num_luts
        scales = self.features * BYTES[FLOAT]
        row = call.row(
            "conditional_sum",
            additions={"int32": read * self.features},
            lookups={self.lut_inputs: 8 * read * self.features},
            elementwise=Elementwise.of(FLOAT, rows * self.features),
            stored={"int8": values, FLOAT: scales, **wiring[0]},
            weights=read * self.features + scales + sum(wiring[0].values()),
            activations=rows * (packed_bits(bits) + self.features * BYTES[FLOAT]),
            parameters=values + wiring[1],
        )
        return [row]


class GroupSum(Packable):
    """Sums contiguous groups of bits and divides by tau: (..., L) -> (..., num_groups), L a
    multiple of num_groups. See `ops.sums.group_sum`.

    In a packed form from which tables were pruned the groups are no longer equal: there `vectors`,
    int8 (L, num_groups), say what each bit adds, and `offset`, int32 (num_groups,), where sums
    begin.
    """

    num_groups: int
    tau: float = 1.0

    @nn.compact
    def __call__(self, bits: Shaped[Array, "*tokens L"]) -> Float[Array, "*tokens groups"]:
        """bits (..., L) -> (..., num_groups)."""
        if self.is_packed:
            vectors, offset = self.read("vectors", "offset")
            total = jnp.matmul(bits.astype(jnp.int8), vectors, preferred_element_type=jnp.int32)
            return (total + offset).astype(jnp.float32) / jnp.float32(self.tau)
        if self.num_groups > 0:
            check_shared("GroupSum: num_groups", bits.shape[-1], self.num_groups)
        return sums.group_sum(bits, self.num_groups, tau=self.tau)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Bits counted in the smallest integers that hold a group's count; the scores divided by
        tau, a constant, in float32.
        """
        scores = call.rows * self.num_groups
        row = call.row(
            "head",
            additions={"int8" if -(-call.width // self.num_groups) < 2**8 else "int16": call.size},
            elementwise=Elementwise.of(FLOAT, scores),
            activations=call.rows * packed_bits(call.width) + scores * BYTES[FLOAT],
        )
        return [row]


class LearnableReduction(Packable):
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
        """The layers' widths from the bottom to the top.

        Raises:
          InputError: no outputs, or tables of one input, with which no layer is narrower.
        """
        if self.num_outputs < 1 or (self.lut_inputs < 2 and self.num_outputs < num_inputs):
            raise InputError(
                "LearnableReduction: expected at least 1 output and tables of 2 inputs or more, "
                f"which make layers narrower, found {self.num_outputs} and {self.lut_inputs}."
            )
        if not 0 < self.tau < math.inf:
            raise InputError(
                f"LearnableReduction: tau must be positive and finite, found {self.tau}."
            )
        widths = [self.num_outputs]
        while widths[0] * self.lut_inputs < num_inputs:
            widths.insert(0, widths[0] * self.lut_inputs)
        return widths

    @nn.compact
    def __call__(self, bits: Shaped[Array, "*tokens L"]) -> Float[Array, "*tokens outputs"]:
        """bits (..., L) -> (..., num_outputs)."""
        # a packed form from which tables were pruned has its own widths, but as many layers
        held = {} if self.is_packing else self.variables.get("packed", {})
        widths = [self.num_outputs] * len(held) or self.widths(bits.shape[-1])
        for i, width in enumerate(widths):
            top = i == len(widths) - 1
            options: dict[str, Any] = {"mapping": "arange", **(self.lut or {})}
            bits = LUTLayer(width, self.lut_inputs, binary=not top, name=f"luts_{i}", **options)(
                bits
            )
        return bits / self.tau
