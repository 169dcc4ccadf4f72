"""The energy of one inference from its counts, arithmetic and memory apart, with every assumption
said.

An estimate of this kind is as good as its tables: it says what the operations cost by themselves,
not what a chip around them does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from quweit_jax.costs.technologies import Technology, technology_of
from quweit_jax.errors import InputError, check_choice
from quweit_jax.ops.counts import Costs, LayerCosts

LUT_MODELS = ("multiplexer", "fpga")
# Transistors in static CMOS: the mirror full adder (24, and inverters of sum and carry), and a
# two-to-one multiplexer as standard cells have it (two tristate inverters, 8, and inverters of the
# select and the output, 4). See Weste and Harris, CMOS VLSI Design.
FULL_ADDER_TRANSISTORS = 28
MULTIPLEXER_TRANSISTORS = 12
# How much more dynamic power logic takes in an FPGA's tables and routing than in gates (Kuon and
# Rose, IEEE TCAD 26(2), 2007).
FPGA_FACTOR = 14.0
FPGA_INPUTS = 6  # of a physical table
# exp, sigmoid, 1 / sqrt, ...: a polynomial or table with interpolation of about so many
# multiplications and additions; a division likewise.
FUNCTION_OPERATIONS = 8
# Multiplications and additions that each elementwise operation costs.
_ELEMENTWISE = {
    "multiplications": (1, 0),
    "additions": (0, 1),
    "shifts": (0, 1),
    "divisions": (FUNCTION_OPERATIONS, FUNCTION_OPERATIONS),
    "functions": (FUNCTION_OPERATIONS, FUNCTION_OPERATIONS),
}
DEFAULT_LEVELS = {"weights": "dram", "activations": "sram_1mb", "state": "dram"}
_ACCESS_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Energy:
    """Picojoules of one inference.

    arithmetic_by_kind, memory_by_kind: by kind of layer. matrix_pj: of matrix products, sums of
      vectors, look-ups and thermometers alone, the part of the arithmetic that papers count.
    assumptions: all that the numbers rest on, in sentences.
    """

    technology: str
    lut_model: str
    arithmetic_by_kind: dict[str, float]
    memory_by_kind: dict[str, float]
    memory_by_traffic: dict[str, float]
    matrix_pj: float
    assumptions: list[str]

    @property
    def arithmetic_pj(self) -> float:
        """Of all operations, look-ups and comparisons."""
        return sum(self.arithmetic_by_kind.values())

    @property
    def memory_pj(self) -> float:
        """Of all bytes moved."""
        return sum(self.memory_by_kind.values())

    @property
    def total_pj(self) -> float:
        """Arithmetic and memory."""
        return self.arithmetic_pj + self.memory_pj

    @property
    def by_kind(self) -> dict[str, float]:
        """Arithmetic and memory by kind of layer."""
        memory = self.memory_by_kind
        return {kind: value + memory[kind] for kind, value in self.arithmetic_by_kind.items()}


def lut_energy(inputs: int, technology: Technology, lut_model: str = "multiplexer") -> float:
    """Picojoules of reading one bit from a table of 2**inputs bits.

    'multiplexer': a tree of 2**n - 1 two-to-one multiplexers that all switch, each at the energy of
    a full adder (an eighth of an int8 addition) in proportion to their transistors. 'fpga':
    physical tables of six inputs, whatever of them is used (above six, 2**(n - 6) of them and
    multiplexers between), times what an FPGA's logic and routing take more than gates.
    """
    check_choice("lut_model", lut_model, LUT_MODELS)
    multiplexer = technology.adding("int8") / 8 * MULTIPLEXER_TRANSISTORS / FULL_ADDER_TRANSISTORS
    if lut_model == "multiplexer":
        return (2**inputs - 1) * multiplexer
    return (2 ** max(inputs, FPGA_INPUTS) - 1) * multiplexer * FPGA_FACTOR


def estimate(
    costs: Costs,
    technology: str | Path | Technology = "45nm",
    *,
    lut_model: str = "multiplexer",
    levels: Mapping[str, str] | None = None,
    active_bits: float = 1.0,
    tables_in_place: bool = False,
) -> Energy:
    """The energy of counted costs.

    Args:
      technology: '45nm', '7nm', or a JSON file (see `costs.technologies`).
      lut_model: 'multiplexer' or 'fpga', see `lut_energy`.
      levels: where 'weights', 'activations' and 'state' lie, by the technology's memory levels;
        what is left out lies in DEFAULT_LEVELS.
      active_bits: the share of a conditional sum's bits that are set, whose vectors are added; 1
        counts all of them.
      tables_in_place: tables and wiring are part of the circuit and never move; else they are read
        once per inference like other weights.

    Raises:
      InputError: an unknown technology, level or model; a share outside 0 to 1.
    """
    table = technology_of(technology)
    check_choice("lut_model", lut_model, LUT_MODELS)
    if not 0 <= active_bits <= 1:
        raise InputError(f"active_bits: expected a share from 0 to 1, found {active_bits}.")
    places = _levels(table, levels or {})
    arithmetic, memory = (dict.fromkeys(costs.kinds(), 0.0) for _ in range(2))
    traffic: dict[str, float] = {}
    matrix = 0.0
    for layer in costs.layers:
        main, rest = _operations(layer, table, lut_model, active_bits), _elementwise(layer, table)
        matrix += main + (rest if layer.kind == "thermometer" else 0)
        arithmetic[layer.kind] += main + rest
        for what, moved in layer.bytes_moved.items():
            if tables_in_place and layer.kind == "lookup" and what == "weights":
                continue
            energy = moved / _ACCESS_BYTES * table.memory[places[what]]
            memory[layer.kind] += energy
            traffic[what] = traffic.get(what, 0.0) + energy
    said = _assumptions(costs, table, lut_model, places, active_bits, tables_in_place)
    return Energy(table.name, lut_model, arithmetic, memory, traffic, matrix, said)


def _levels(table: Technology, levels: Mapping[str, str]) -> dict[str, str]:
    for what, level in levels.items():
        check_choice("levels", what, DEFAULT_LEVELS)
        check_choice(f"level of {what} at {table.name}", level, table.memory)
    places = DEFAULT_LEVELS | dict(levels)
    # A user's table may have levels of other names: then its dearest for weights and state, its
    # cheapest for activations.
    for what, level in places.items():
        if level not in table.memory:
            pick = min if what == "activations" else max
            places[what] = pick(table.memory, key=table.memory.__getitem__)
    return places


def _operations(layer: LayerCosts, table: Technology, lut_model: str, active_bits: float) -> float:
    share = active_bits if layer.kind == "conditional_sum" else 1.0
    products = sum(n * table.multiplying(kind) for kind, n in layer.multiplications.items())
    sums = sum(n * table.adding(kind) for kind, n in layer.additions.items())
    reads = sum(n * lut_energy(inputs, table, lut_model) for inputs, n in layer.lookups.items())
    return products + share * sums + reads


def _elementwise(layer: LayerCosts, table: Technology) -> float:
    total = layer.comparisons * table.adding(layer.comparison_type)
    for field, (multiplications, additions) in _ELEMENTWISE.items():
        for kind, count in getattr(layer.elementwise, field).items():
            each = multiplications * table.multiplying(kind) + additions * table.adding(kind)
            total += count * each
    return total


def _assumptions(
    costs: Costs,
    table: Technology,
    lut_model: str,
    places: Mapping[str, str],
    active_bits: float,
    tables_in_place: bool,
) -> list[str]:
    said = [
        *costs.assumptions,
        f"operations at {table.name} ({table.source}); nothing for control, clocks, idle units "
        "and leakage",
        "sums of integer products in int32, of float products in float32; comparisons and shifts "
        "cost what additions of their type do",
        f"a division or function (exp, sigmoid, 1 / sqrt, ...) costs {FUNCTION_OPERATIONS} "
        "multiplications and additions of its type",
        ", ".join(
            f"{what} in {level} ({table.memory[level]:g} pJ for 64 bits)"
            for what, level in places.items()
            if what in costs.bytes_moved
        ),
        f"batch of one: each weight is read once for one {costs.unit}; results go to memory once, "
        "operations of one value at a time on the way",
    ]
    used = {kind for layer in costs.layers for kind in (*layer.multiplications, *layer.additions)}
    if "bfloat16" in used and "bfloat16" not in table.multiply:
        said.append("bfloat16 costs what float16 does")
    if any("int16" in kind for kind in used):
        said.append(
            "integers between the table's 8 and 32 bits: a power of the width through both; "
            "operands of two widths a and b: as of sqrt(a b) bits, "
            f"so 16 by 8 bits {table.multiplying('int16xint8'):.3g} pJ"
        )
    for inputs in costs.lookups:
        how = (
            f"a tree of {2**inputs - 1} two-to-one multiplexers, all of which switch, each "
            f"{MULTIPLEXER_TRANSISTORS}/{FULL_ADDER_TRANSISTORS} of a full "
            "adder (an eighth of an int8 addition) by its transistors"
            if lut_model == "multiplexer"
            else f"physical FPGA tables of {FPGA_INPUTS} inputs at {FPGA_FACTOR:g} times the "
            "energy of gates (Kuon and Rose 2007), other units as in the table"
        )
        read = lut_energy(inputs, table, lut_model)
        said.append(f"a table of {inputs} inputs: {read:.3g} pJ a read, {how}")
    if costs.lookups:
        said.append(
            "tables and wiring are part of the circuit and don't move"
            if tables_in_place
            else "tables and wiring are read like other weights"
        )
        share = (
            "all vectors of a conditional sum are added, as if every bit were set"
            if active_bits == 1
            else f"{active_bits:g} of the bits are set"
        )
        said.append(share)
    elif "int32" in costs.additions and not costs.multiplications:
        said.append("one addition for every ternary weight, also where it is zero")
    return said
