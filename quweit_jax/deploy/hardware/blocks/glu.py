"""The parts of a LookupGLU's circuit: ternary sums by trees of additions, codes by comparisons that
halve those left, a read-only memory of the table, and accumulators of the entries.

A weight is two bits, whether it counts and whether it is negative. A negative word is added as its
bits turned over, and what is missing, one for each, is in the offset, or where a sum begins.

Dimensions: d features, H units, of which `parallel` are made a cycle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quweit_jax.deploy.hardware.blocks.description import GLUBlock
from quweit_jax.deploy.hardware.blocks.parts import (
    Levels,
    Memory,
    Parts,
    accumulators,
    constant,
    index_bits,
    instance,
    module,
    piece,
    trees,
)
from quweit_jax.deploy.hardware.blocks.schedule import Schedule, glu_registers, levels, signed_bits
from quweit_jax.layers.integer import ACTIVATION_BITS

_BITS = ACTIVATION_BITS  # of a word and of an entry


def parts(block: GLUBlock, schedule: Schedule, pipeline: int, name: str) -> Parts:
    """The parts of a LookupGLU's circuit."""
    return _GLU(block, schedule, pipeline, name).parts()


def ternary_row(weights: np.ndarray) -> int:
    """Ternary weights (n,) as two bits each, the first lowest."""
    return sum((1 | (int(w < 0) << 1)) << (2 * i) for i, w in enumerate(weights) if w)


def _joined(values: Sequence[tuple[int, int]]) -> int:
    """(value, bits) side by side, the first lowest."""
    row, place = 0, 0
    for value, bits in values:
        row |= (value & ((1 << bits) - 1)) << place
        place += bits
    return row


class _GLU:
    def __init__(self, block: GLUBlock, schedule: Schedule, pipeline: int, name: str):
        self.block, self.schedule, self.name = block, schedule, name
        self.pipeline = pipeline
        self.depth = levels(block.features)
        self.registers = glu_registers(block, pipeline)
        self.row_bits = index_bits(schedule.rows)
        # of units: those of the last row that there are not count nothing
        self.rows = [
            [j if j < block.units else None for j in range(i, i + schedule.parallel)]
            for i in range(0, schedule.rows * schedule.parallel, schedule.parallel)
        ]
        self.mixes = [block.mix[:, : block.units].T, block.mix[:, block.units :].T]
        negative = (block.mix < 0).sum(0)
        self.offsets = block.offsets - negative  # less what turned-over words lack
        self.offset_bits = signed_bits(int(self.offsets.min()), int(self.offsets.max()))
        self.group_bits = index_bits(len(block.tables)) if len(block.tables) > 1 else 0
        tree_bits = _BITS + self.depth
        largest = int(np.abs(self.offsets).max()) + (1 << (tree_bits - 1))
        largest = max(largest, int(np.abs(block.halfway).max()))
        self.value_bits = signed_bits(-largest, largest)
        self.memories = {memory.name: memory for memory in self._memories()}

    def parts(self) -> Parts:
        block, u = self.block, self.schedule.parallel
        what = (
            f"A LookupGLU of {block.units} units, {u} a cycle, {len(block.tables)} table(s) of two "
            f"codes of {block.code_bits} bits."
        )
        modules = [self._mix(), self._codes(), self._gate(), self._sum()]
        names = ("mix", "codes", "gate", "sum")
        return Parts(what, modules, names, [*self.memories.values()], self._lines())

    def _memories(self) -> list[Memory]:
        block, u, d = self.block, self.schedule.parallel, self.block.features
        mix, offsets, total = [], [], []
        groups = block.groups()
        for row in self.rows:
            own: list[tuple[int, int]] = []
            constants: list[tuple[int, int]] = []
            added: list[tuple[int, int]] = []
            for j in row:
                for side in range(2):
                    weights = 0 if j is None else ternary_row(self.mixes[side][j])
                    own.append((weights, 2 * d))
                    offset = 0 if j is None else int(self.offsets[side * block.units + j])
                    constants.append((offset, self.offset_bits))
                constants.append((0 if j is None else int(groups[j]), self.group_bits))
                added.append((0 if j is None else ternary_row(block.total[j]), 2 * d))
            mix.append(_joined(own))
            offsets.append(_joined(constants))
            total.append(_joined(added))
        entries = [int(entry) for entry in block.tables.reshape(-1)]
        return [
            Memory("mix", mix, 4 * d * u),
            Memory("offsets", offsets, (2 * self.offset_bits + self.group_bits) * u),
            Memory("gate", entries, _BITS),
            Memory("sum", total, 2 * d * u),
        ]

    def _values(self) -> list[str]:
        """The sums of a cycle's units, first and second code's in turn."""
        return [f"v_{i}" for i in range(2 * self.schedule.parallel)]

    def _mix(self) -> str:
        d, steps = self.block.features, Levels(self.pipeline)
        lines = self.memories["mix"].lines("row", "weights")
        terms = {}
        for i in range(len(self._values())):
            terms[f"s_{i}"] = [
                self._term(f"x_{k}", "weights", i * d + k, lines, f"t_{i}_{k}") for k in range(d)
            ]
        sums = trees(steps, terms, _BITS, self.depth)
        lines += steps.lines
        lines += [f"assign {v} = {s};" for v, s in zip(self._values(), sums)]
        ports = ["input clk", f"input [{self.row_bits - 1}:0] row"]
        ports += [f"input signed [{_BITS - 1}:0] x_{i}" for i in range(d)]
        ports += [f"output signed [{_BITS + self.depth - 1}:0] {v}" for v in self._values()]
        return module(f"{self.name}_mix", ports, lines)

    def _term(self, word: str, weights: str, place: int, lines: list[str], name: str) -> str:
        """A word times a weight, but for the one that a negative one lacks."""
        counts, negative = (piece(weights, 2 * place + i, 1) for i in range(2))
        lines.append(
            f"wire signed [{_BITS - 1}:0] {name} = {{{_BITS}{{{counts}}}}} & ({word} ^ "
            f"{{{_BITS}{{{negative}}}}});"
        )
        return name

    def _codes(self) -> str:
        """The offsets taken away, and codes from their highest bit down."""
        steps = Levels(self.pipeline)
        steps.count = self.depth  # goes on where the trees ended
        lines = self.memories["offsets"].lines("row", "constants")
        width, bits, each = self.value_bits, self.block.code_bits, 2 * self.offset_bits
        now: list[tuple[str, list[str]]] = []
        for i, value in enumerate(self._values()):
            place = i // 2 * (each + self.group_bits) + i % 2 * self.offset_bits
            part = f"constants[{place + self.offset_bits - 1}:{place}]"
            now.append((steps.add(f"a_{i}", width, f"{value} - $signed({part})"), []))
        groups = [
            [
                f"constants[{i * (each + self.group_bits) + each + b}]"
                for b in range(self.group_bits)
            ]
            for i in range(self.schedule.parallel)
        ]
        groups = self._carried(steps, groups, 0)
        steps.end()
        for level in range(bits):
            found = []
            for i, (value, known) in enumerate(now):
                bound = self._bound(known, level)
                bit = steps.add(f"c_{i}_{level}", 1, f"{value} >= {bound}", signed=False)
                kept = [
                    steps.add(f"k_{i}_{level}_{b}", 1, old, signed=False)
                    for b, old in enumerate(known)
                ]
                carried = value
                if level + 1 < bits:
                    carried = steps.add(f"a_{i}_{level}", width, value)
                found.append((carried, [*kept, bit]))
            now = found
            groups = self._carried(steps, groups, level + 1)
            steps.end()
        lines += steps.lines
        for i, (_, known) in enumerate(now):
            lines.append(f"assign code_{i} = {{{', '.join(known)}}};")
        lines += [
            f"assign group_{i} = {{{', '.join(reversed(own))}}};"
            for i, own in enumerate(groups)
            if own
        ]
        ports = ["input clk", f"input [{self.row_bits - 1}:0] row"]
        ports += [f"input signed [{_BITS + self.depth - 1}:0] {v}" for v in self._values()]
        ports += [f"output [{bits - 1}:0] code_{i}" for i in range(len(now))]
        ports += self._group_ports("output")
        return module(f"{self.name}_codes", ports, lines)

    def _group_ports(self, direction: str) -> list[str]:
        if not self.group_bits:
            return []
        width = f"[{self.group_bits - 1}:0]"
        return [f"{direction} {width} group_{i}" for i in range(self.schedule.parallel)]

    @staticmethod
    def _carried(steps: Levels, groups: list[list[str]], level: int) -> list[list[str]]:
        return [
            [steps.add(f"g_{i}_{level}_{b}", 1, bit, signed=False) for b, bit in enumerate(own)]
            for i, own in enumerate(groups)
        ]

    def _bound(self, known: Sequence[str], level: int) -> str:
        """The number that decides the next bit, by the higher ones."""
        span = 1 << (self.block.code_bits - level)
        bounds = [
            constant(int(self.block.halfway[prefix * span + span // 2 - 1]), self.value_bits)
            for prefix in range(1 << level)
        ]
        for bit in reversed(known):  # the lowest known bit chooses first
            bounds = [f"({bit} ? {b} : {a})" for a, b in zip(bounds[::2], bounds[1::2])]
        return bounds[0]

    def _gate(self) -> str:
        bits, memory, lines = self.block.code_bits, self.memories["gate"], []
        ports = ["input clk"]
        for i in range(self.schedule.parallel):
            ports += [
                f"input [{bits - 1}:0] code_{2 * i}",
                f"input [{bits - 1}:0] code_{2 * i + 1}",
            ]
            group = f"group_{i}, " if self.group_bits else ""
            address = f"{{{group}code_{2 * i}, code_{2 * i + 1}}}"
            lines += memory.lines(address, f"read_{i}", f"_{i}")
            lines.append(f"assign entry_{i} = read_{i};")
        ports += self._group_ports("input")
        ports += [f"output signed [{_BITS - 1}:0] entry_{i}" for i in range(self.schedule.parallel)]
        return module(f"{self.name}_gate", ports, lines)

    def _sum(self) -> str:
        block, u, d = self.block, self.schedule.parallel, self.block.features
        bits = self.schedule.sum_bits
        lines = self.memories["sum"].lines("row", "weights")
        terms = [
            [self._term(f"entry_{j}", "weights", j * d + i, lines, f"t_{j}_{i}") for j in range(u)]
            for i in range(d)
        ]
        begin = block.bias + (block.total < 0).sum(0)
        lines += accumulators(terms, [int(value) for value in begin], bits)
        ports = ["input clk", "input clear", "input add", "input shift"]
        ports += [f"input [{self.row_bits - 1}:0] row"]
        ports += [f"input signed [{_BITS - 1}:0] entry_{j}" for j in range(u)]
        ports += [f"output signed [{bits - 1}:0] sum"]
        return module(f"{self.name}_sum", ports, lines)

    def _lines(self) -> list[str]:
        """Of the top level: addresses that wait for what is made meanwhile, and the modules."""
        tree, every = self.registers
        width, u, bits = f"[{self.row_bits - 1}:0]", self.schedule.parallel, self.block.code_bits
        lines, delayed = [], ["row"]
        for i in range(every + 1):
            lines += [f"reg {width} row_{i};", f"always @(posedge clk) row_{i} <= {delayed[-1]};"]
            delayed.append(f"row_{i}")
        sums = [(v, v) for v in self._values()]
        codes = [(f"code_{i}", f"code_{i}") for i in range(2 * u)]
        codes += [(f"group_{i}", f"group_{i}") for i in range(u) if self.group_bits]
        entries = [(f"entry_{i}", f"entry_{i}") for i in range(u)]
        lines += [f"wire signed [{_BITS + self.depth - 1}:0] {v};" for v in self._values()]
        lines += [
            f"wire [{(bits if code.startswith('code') else self.group_bits) - 1}:0] {code};"
            for code, _ in codes
        ]
        lines += [f"wire signed [{_BITS - 1}:0] {entry};" for entry, _ in entries]
        words = [(f"x_{i}", f"x_{i}") for i in range(self.block.features)]
        lines += instance(
            f"{self.name}_mix", "mix", [("clk", "clk"), ("row", "row"), *words, *sums]
        )
        lines += instance(
            f"{self.name}_codes", "codes", [("clk", "clk"), ("row", delayed[tree]), *sums, *codes]
        )
        lines += instance(f"{self.name}_gate", "gate", [("clk", "clk"), *codes, *entries])
        control = [
            ("clk", "clk"),
            ("clear", "begun"),
            ("add", f"went[{self.schedule.depth - 1}]"),
            ("shift", "issue"),
        ]
        return lines + instance(
            f"{self.name}_sum",
            "sum_up",
            [*control, ("row", delayed[every + 1]), *entries, ("sum", "sum")],
        )
