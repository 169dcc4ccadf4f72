"""Parts of a block's circuit as Verilog-2001: read-only memories, trees of additions, and what
requantizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from quweit_jax.deploy.hardware.blocks.description import BRANCH_LIMIT
from quweit_jax.deploy.hardware.blocks.schedule import Schedule
from quweit_jax.layers.integer import RESIDUAL_BITS

PIECE = 64  # bits of the pieces that a wide register is read in


def index_bits(count: int) -> int:
    """Bits of an address among so many, at least 1."""
    return max(1, (count - 1).bit_length())


def constant(value: int, bits: int) -> str:
    """A signed constant."""
    return f"{bits}'sh{value & ((1 << bits) - 1):x}"


def module(name: str, ports: Sequence[str], body: Sequence[str]) -> str:
    """A module's text; ports are declarations, body lines without indentation."""
    lines = [f"module {name} ("]
    lines += [f"  {port}{',' * (i < len(ports) - 1)}" for i, port in enumerate(ports)]
    return "\n".join([*lines, ");", *(f"  {line}" for line in body), "endmodule", ""])


def instance(kind: str, name: str, wires: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of an instance; wires: (port, what it is connected to)."""
    ends = [
        f"  .{port}({wire}){',' * (i < len(wires) - 1)}" for i, (port, wire) in enumerate(wires)
    ]
    return [f"{kind} {name} (", *ends, ");"]


def piece(register: str, low: int, bits: int) -> str:
    """Bits of a register that a memory was read into, none of which lie in two pieces."""
    inside = low % PIECE
    chosen = f"{inside + bits - 1}:{inside}" if bits > 1 else str(inside)
    return f"{register}_{low // PIECE}[{chosen}]"


@dataclasses.dataclass(frozen=True)
class Memory:
    """A read-only memory. rows: its words, each of `bits` bits; file: beside the source."""

    name: str
    rows: Sequence[int]
    bits: int

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.hex"

    @property
    def address_bits(self) -> int:
        """Bits of an address."""
        return index_bits(len(self.rows))

    def text(self) -> str:
        """What its file holds, a row a line."""
        mask = (1 << self.bits) - 1
        return "".join(f"{row & mask:x}\n" for row in self.rows)

    def lines(self, address: str, out: str, suffix: str = "") -> list[str]:
        """Reads it into a register `out` at every edge of clk; of a wide one there are pieces, see
        `piece`: what selects from a wide register is slow to simulate.
        """
        rom = f"{self.name}{suffix}_rom"
        pieces = [
            f"wire [{high - low - 1}:0] {out}_{low // PIECE} = {out}[{high - 1}:{low}];"
            for low in range(0, self.bits, PIECE)
            for high in (min(low + PIECE, self.bits),)
        ]
        return [
            f"reg [{self.bits - 1}:0] {rom} [0:{len(self.rows) - 1}];",
            f"reg [{self.bits - 1}:0] {out};",
            f'initial $readmemh("{self.file}", {rom});',
            f"always @(posedge clk) {out} <= {rom}[{address}];",
            *pieces,
        ]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a kind of block adds to the top level. what: the first line of the source. modules: text
    of its modules, names: theirs. lines: of the top level.
    """

    what: str
    modules: list[str]
    names: tuple[str, ...]
    memories: list[Memory]
    lines: list[str]


class Levels:
    """Lines of levels of logic with a register after every so many of them (0: none)."""

    def __init__(self, every: int):
        self.every, self.count = every, 0
        self.lines: list[str] = []
        self._clocked: list[str] = []

    def add(self, name: str, bits: int, expression: str, signed: bool = True) -> str:
        """A number of the level; its name."""
        kind = "signed " * signed + f"[{bits - 1}:0] {name}"
        if self.every and not (self.count + 1) % self.every:
            self.lines.append(f"reg {kind};")
            self._clocked.append(f"  {name} <= {expression};")
        else:
            self.lines.append(f"wire {kind} = {expression};")
        return name

    def end(self) -> None:
        """The level is complete."""
        self.count += 1
        if self._clocked:
            self.lines += ["always @(posedge clk) begin", *self._clocked, "end"]
            self._clocked = []


def trees(levels: Levels, terms: dict[str, Sequence[str]], bits: int, depth: int) -> list[str]:
    """Trees of additions side by side, all of the same depth; the names of the sums."""
    now = {name: list(own) for name, own in terms.items()}
    for level in range(depth):
        for name, own in now.items():
            pairs = [own[i : i + 2] for i in range(0, len(own), 2)]
            now[name] = [
                levels.add(f"{name}_{level}_{i}", bits + level + 1, " + ".join(pair))
                for i, pair in enumerate(pairs)
            ]
        levels.end()
    return [own[0] for own in now.values()]


def accumulators(terms: Sequence[Sequence[str]], begin: Sequence[int], bits: int) -> list[str]:
    """Lines of a sum a feature that `clear` begins, `add` adds its terms to, and `shift` moves down
    by one; `sum` is the first.
    """
    features = len(terms)
    lines = [f"reg signed [{bits - 1}:0] sum_{i};" for i in range(features)]
    lines += ["assign sum = sum_0;", "always @(posedge clk)", "  if (clear) begin"]
    lines += [f"    sum_{i} <= {constant(value, bits)};" for i, value in enumerate(begin)]
    lines += ["  end else if (add) begin"]
    lines += [f"    sum_{i} <= sum_{i} + {' + '.join(own)};" for i, own in enumerate(terms)]
    lines += ["  end else if (shift) begin"]
    lines += [f"    sum_{i} <= sum_{i + 1};" for i in range(features - 1)]
    return [*lines, "  end"]


def requantizer(name: str, schedule: Schedule) -> tuple[str, list[Memory]]:
    """The modules that requantize a sum and a word of the stream and add them, and the memory of
    multipliers that differ from feature to feature.
    """
    bits, memories, factors = schedule.multiplier_bits, [], []
    lines = []
    for which, multipliers in zip(("sums", "stream"), schedule.multipliers):
        if len(set(multipliers)) == 1:
            factors.append(f"{bits}'h{multipliers[0]:x}")
            continue
        memory = Memory(f"multipliers_of_{which}", multipliers, bits)
        memories.append(memory)
        lines += memory.lines("place", f"of_{which}")
        factors.append(f"of_{which}")
    lanes, lane_bits = schedule.lanes, index_bits(schedule.lanes)
    lines += [
        f"reg [{lane_bits - 1}:0] turn;",
        "always @(posedge clk)",
        "  if (rst) turn <= 0;",
        f"  else if (issue) turn <= turn == {lanes - 1} ? 0 : turn + 1;",
    ]
    for i in range(lanes):
        lines += [f"wire valid_{i};", f"wire [{RESIDUAL_BITS - 1}:0] y_{i};"]
        lines += instance(
            f"{name}_lane",
            f"lane_{i}",
            [
                ("clk", "clk"),
                ("rst", "rst"),
                ("start", f"issue && turn == {i}"),
                ("sum", "sum"),
                ("stream", "stream"),
                ("of_sum", factors[0]),
                ("of_stream", factors[1]),
                ("valid", f"valid_{i}"),
                ("y", f"y_{i}"),
            ],
        )
    lines.append(f"assign valid = {' | '.join(f'valid_{i}' for i in range(lanes))};")
    chosen = " | ".join(f"({{{RESIDUAL_BITS}{{valid_{i}}}}} & y_{i})" for i in range(lanes))
    lines.append(f"assign y = {chosen};")
    ports = [
        "input clk",
        "input rst",
        "input issue",
        f"input [{index_bits(schedule.features) - 1}:0] place",
        f"input signed [{schedule.sum_bits - 1}:0] sum",
        f"input signed [{RESIDUAL_BITS - 1}:0] stream",
        "output valid",
        f"output [{RESIDUAL_BITS - 1}:0] y",
    ]
    whole = module(f"{name}_requantize", ports, lines)
    return whole + "\n" + _lane(name, schedule), memories


def _lane(name: str, schedule: Schedule) -> str:
    """One multiplication by shifts and additions of both branches at a time."""
    bits, count = schedule.multiplier_bits, index_bits(schedule.multiplier_bits + 1)
    left = [
        f"reg [{count - 1}:0] left;  // bits of the multipliers to go",
        "reg done, rounded, added;",
        "always @(posedge clk) begin",
        "  if (rst) left <= 0;",
        f"  else if (start) left <= {bits};",
        "  else if (left != 0) left <= left - 1;",
        "  done <= !rst && left == 1;",
        "  rounded <= !rst && done;",
        "  added <= !rst && rounded;",
        "  valid <= !rst && added;",
        "end",
    ]
    ours, our_bits = _product("a", "sum", schedule.sum_bits, bits, schedule.shifts[0])
    stream, stream_bits = _product("b", "stream", RESIDUAL_BITS, bits, schedule.shifts[1])
    wide = max(
        min(max(our_bits, stream_bits), BRANCH_LIMIT.bit_length() + 1) + 1, RESIDUAL_BITS + 1
    )
    high = (1 << (RESIDUAL_BITS - 1)) - 1
    low = -high - 1
    joined = [
        f"reg signed [{wide - 1}:0] both;",
        "always @(posedge clk) begin",
        f"  both <= {_clamped('a_rounded', our_bits)} + {_clamped('b_rounded', stream_bits)};",
        f"  y <= both > {constant(high, wide)} ? {RESIDUAL_BITS}'h{high:x} :",
        f"    both < {constant(low, wide)} ? {RESIDUAL_BITS}'h{high + 1:x} : "
        f"both[{RESIDUAL_BITS - 1}:0];",
        "end",
    ]
    ports = [
        "input clk",
        "input rst",
        "input start",
        f"input signed [{schedule.sum_bits - 1}:0] sum",
        f"input signed [{RESIDUAL_BITS - 1}:0] stream",
        f"input [{bits - 1}:0] of_sum",
        f"input [{bits - 1}:0] of_stream",
        "output reg valid",
        f"output reg [{RESIDUAL_BITS - 1}:0] y",
    ]
    return module(f"{name}_lane", ports, [*left, *ours, *stream, *joined])


def _product(name: str, source: str, width: int, bits: int, shift: int) -> tuple[list[str], int]:
    """Lines that multiply, shift and round half to even, and the bits of the result."""
    total = max(width + bits, shift + 2)
    result = total - shift + 1
    lines = [
        f"reg signed [{width - 1}:0] {name}, {name}_high;",
        f"reg [{bits - 1}:0] {name}_low;",
        f"wire signed [{width}:0] {name}_next = {name}_high + ({name}_low[0] ? {name} : "
        f"{constant(0, width)});",
        f"wire signed [{total - 1}:0] {name}_product = $signed({{{name}_high, {name}_low}});",
        f"reg signed [{result - 1}:0] {name}_rounded;",
        "always @(posedge clk) begin",
        "  if (start) begin",
        f"    {name} <= {source};",
        f"    {name}_high <= 0;",
        f"    {name}_low <= of_{source};",
        "  end else if (left != 0) begin",
        f"    {name}_high <= {name}_next[{width}:1];",
        f"    {name}_low <= {{{name}_next[0], {name}_low}} >> 1;",
        "  end",
    ]
    if not shift:
        lines += [f"  {name}_rounded <= {name}_product;", "end"]
        return lines, result
    kept = f"$signed({name}_product[{total - 1}:{shift}])"
    odd = f"{name}_product[{shift}]"
    sticky = f"{odd} | (|{name}_product[{shift - 2}:0])" if shift > 1 else odd
    up = f"{name}_product[{shift - 1}] & ({sticky})"
    lines += [f"  {name}_rounded <= {kept} + $signed({{1'b0, {up}}});", "end"]
    return lines, result


def _clamped(name: str, bits: int) -> str:
    """A branch within +-BRANCH_LIMIT."""
    if bits <= BRANCH_LIMIT.bit_length():
        return name
    limit = [constant(value, bits) for value in (BRANCH_LIMIT, -BRANCH_LIMIT)]
    return f"({name} > {limit[0]} ? {limit[0]} : {name} < {limit[1]} ? {limit[1]} : {name})"
