"""The parts of a published weightless block's circuit: comparators and tables, all at once, and
the conditional sum of vectors: dense ones are added a few bits' a cycle, grouped ones feature by
feature as their results are due.
"""

from __future__ import annotations

import numpy as np

from quweit_jax.deploy.hardware.blocks.description import TableBlock
from quweit_jax.deploy.hardware.blocks.parts import (
    Memory,
    Parts,
    accumulators,
    index_bits,
    instance,
    module,
    piece,
)
from quweit_jax.deploy.hardware.blocks.schedule import Schedule
from quweit_jax.deploy.hardware.circuit import lookups
from quweit_jax.deploy.hardware.verilog import Modules
from quweit_jax.layers.integer import ACTIVATION_BITS

_BITS = ACTIVATION_BITS  # of a vector's entry


def parts(block: TableBlock, schedule: Schedule, pipeline: int, name: str) -> Parts:
    """The parts of a weightless block's circuit; its look-ups have no registers to be moved."""
    network, bits = lookups(block.encoder)
    printed = Modules(network, bits, name)
    dense = block.vectors.ndim == 2
    memory, text = _dense(block, schedule, name) if dense else _grouped(block, schedule, name)
    what = (
        f"{len(block.encoder.feature)} comparators, {len(block.vectors)} tables in the last of "
        f"{len(block.encoder.layers)} layer(s), "
        + (f"the vectors of {schedule.parallel} added a cycle." if dense else "a grouped sum.")
    )
    wires = [("clk", "clk"), ("load", "begun"), ("shift", "issue")]
    if dense:
        wires += [("step", "running"), ("add", f"went[{schedule.depth - 1}]"), ("row", "row")]
    else:
        wires += [("row", "place")]
    joined = (
        f"wire [{len(bits) - 1}:0] found = {{{', '.join(map(printed.outside, reversed(bits)))}}};"
    )
    lines = [*(line[2:] for line in printed.instances()), joined]
    lines += instance(f"{name}_sum", "sum_up", [*wires, ("found", "found"), ("sum", "sum")])
    names = tuple(m for m in ("encoder", "tables") if printed.has(m))
    return Parts(what, [*printed.modules(), text], (*names, "sum"), [memory], lines)


def _ports(block: TableBlock, schedule: Schedule, rows: int) -> list[str]:
    return [
        "input clk",
        "input load",
        "input shift",
        f"input [{index_bits(rows) - 1}:0] row",
        f"input [{len(block.vectors) - 1}:0] found",
        f"output signed [{schedule.sum_bits - 1}:0] sum",
    ]


def _row(values: list[int]) -> int:
    """Entries side by side, the first lowest."""
    mask = (1 << _BITS) - 1
    return int.from_bytes(bytes(value & mask for value in values), "little")


def _entry(place: int) -> str:
    return f"$signed({piece('vectors', place * _BITS, _BITS)})"


def _term(bit: str, place: int, signed: bool) -> str:
    """A vector's entry where its bit is set, once or twice."""
    twice = f"({_entry(place)} <<< 1)" if signed else _entry(place)
    return f"({bit} ? {twice} : {_BITS + 1}'sh0)"


def _dense(block: TableBlock, schedule: Schedule, name: str) -> tuple[Memory, str]:
    tables, d = block.vectors.shape
    u, bits = schedule.parallel, schedule.sum_bits
    padded = np.zeros((schedule.rows, u * d), np.int64)
    padded.reshape(-1)[: tables * d] = block.vectors.reshape(-1)
    rows = [_row(row.tolist()) for row in padded]
    memory = Memory("vectors", rows, _BITS * d * u)
    lines = [
        *memory.lines("row", "vectors"),
        f"reg [{tables - 1}:0] held;",
        f"reg [{u - 1}:0] bits;",
        "always @(posedge clk) begin",
        "  if (load) held <= found;",
        f"  else if (step) held <= held >> {u};",
        f"  bits <= held[{u - 1}:0];",
        "end",
        "wire clear = load;",
    ]
    terms = []
    for i in range(d):
        own = []
        for j in range(u):
            term = f"t_{i}_{j}"
            value = _term(f"bits[{j}]", j * d + i, block.signed)
            lines.append(f"wire signed [{_BITS}:0] {term} = {value};")
            own.append(term)
        terms.append(own)
    lines += accumulators(terms, [int(value) for value in block.bias], bits)
    ports = [*_ports(block, schedule, schedule.rows), "input step", "input add"]
    return memory, module(f"{name}_sum", ports, lines)


def _grouped(block: TableBlock, schedule: Schedule, name: str) -> tuple[Memory, str]:
    """A row has a feature's entries and, behind them, where its sum begins."""
    tables, d, bits = len(block.vectors), block.features, schedule.sum_bits
    each = tables // d
    mask = (1 << bits) - 1
    rows = [
        _row([int(v) for v in block.vectors[i * each : (i + 1) * each]])
        | (int(block.bias[i]) & mask) << (_BITS * each)
        for i in range(d)
    ]
    memory = Memory("vectors", rows, _BITS * each + bits)
    lines = [
        *memory.lines("row", "vectors"),
        f"reg [{tables - 1}:0] held;",
        "always @(posedge clk)",
        "  if (load) held <= found;",
        f"  else if (shift) held <= held >> {each};",
        f"wire signed [{bits - 1}:0] begin_at = vectors[{_BITS * each + bits - 1}:{_BITS * each}];",
    ]
    terms = []
    for j in range(each):
        lines.append(f"wire signed [{_BITS}:0] t_{j} = {_term(f'held[{j}]', j, block.signed)};")
        terms.append(f"t_{j}")
    lines += [
        f"reg signed [{bits - 1}:0] total;",
        f"always @(posedge clk) total <= begin_at + {' + '.join(terms)};",
        "assign sum = total;",
    ]
    return memory, module(f"{name}_sum", _ports(block, schedule, d), lines)
