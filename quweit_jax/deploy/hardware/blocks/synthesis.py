"""Synthesis of a block by yosys for Xilinx 7: tables of up to 6 inputs, carry chains, flip-flops,
memories and depth of each module.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quweit_jax.deploy.hardware.blocks.verilog import NAME, Circuit
from quweit_jax.deploy.hardware.folder import write_files
from quweit_jax.deploy.hardware.synthesis import as_cells, longest, netlist, version, yosys
from quweit_jax.errors import RunError

_SCRIPT = """read_verilog -icells {name}.v
hierarchy -check -top {name}
synth_xilinx -family xc7 -top {name} -noiopad -noclkbuf -nodsp -nosrl -nowidelut
check -assert
write_json netlist.json
"""
_LUT = re.compile(r"LUT[1-6]|INV")
_FLIP_FLOP = re.compile(r"FD[RSCP]E(_1)?")
_CARRY = "CARRY4"
# Tables that a memory of a few words takes, and memories of 18 kbit.
_SMALL = {
    "RAM32M": 4,
    "RAM64M": 4,
    "RAM32X1D": 2,
    "RAM64X1D": 2,
    "RAM128X1D": 4,
    "RAM32X1S": 1,
    "RAM64X1S": 1,
    "RAM128X1S": 2,
    "RAM256X1S": 4,
}
_LARGE = {"RAMB18E1": 1, "RAMB36E1": 2}
_FIXED = {"GND", "VCC", "$scopeinfo"}


@dataclasses.dataclass(frozen=True)
class Synthesized:
    """One instance of a module. luts: tables, those of small memories among them; carries: of four
    bits; memories: blocks of 18 kbit. depth: the most tables one behind another within the module,
    a chain of carries counted as one. count: its instances.
    """

    luts: int
    carries: int
    flip_flops: int
    memories: int
    depth: int
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Report:
    """tool: name and version. modules: by name, the top level's own part as 'control'."""

    tool: str
    modules: dict[str, Synthesized]

    def total(self) -> dict[str, int]:
        """What all modules take, and the deepest one's depth."""
        every = self.modules.values()
        added = ("luts", "carries", "flip_flops", "memories")
        sums = {name: sum(getattr(m, name) * m.count for m in every) for name in added}
        return {**sums, "depth": max(m.depth for m in every)}


def synthesize(circuit: Circuit, name: str = NAME) -> Report:
    """What a block takes by yosys, module by module.

    Raises:
      InputError: yosys isn't installed. RunError: it fails, or leaves cells unmapped.
    """
    tool = yosys()
    with tempfile.TemporaryDirectory() as place:
        files = {memory.file: memory.text() for memory in circuit.memories}
        write_files({**files, f"{name}.v": as_cells(circuit.text, name)}, Path(place))
        made = netlist(tool, Path(place), _SCRIPT.format(name=name), "netlist.json")["modules"]
    counts = {"lane": circuit.schedule.lanes}
    found = {}
    for module in circuit.modules:
        full = f"{name}_{module}" if module else name
        if full in made:
            own = _count(full, made[full]["cells"], made)
            found[module or "control"] = dataclasses.replace(own, count=counts.get(module, 1))
    return Report(version(tool), found)


def _count(name: str, cells: Mapping[str, Any], modules: Mapping[str, Any]) -> Synthesized:
    kinds = [cell["type"] for cell in cells.values()]
    ours = {kind for kind in modules if kind.startswith(NAME)}
    known = {_CARRY, *_SMALL, *_LARGE, *_FIXED, *ours}
    left = {k for k in kinds if not (k in known or _LUT.fullmatch(k) or _FLIP_FLOP.fullmatch(k))}
    if left:
        raise RunError(
            f"--synthesize: {name} has cells that were not mapped ({', '.join(sorted(left))}), so "
            "its counts would be too low; use another version of yosys."
        )
    logic = [cell for cell in cells.values() if _is_logic(cell["type"])]
    return Synthesized(
        sum(bool(_LUT.fullmatch(kind)) + _SMALL.get(kind, 0) for kind in kinds),
        kinds.count(_CARRY),
        sum(bool(_FLIP_FLOP.fullmatch(kind)) for kind in kinds),
        sum(_LARGE.get(kind, 0) for kind in kinds),
        _depth(logic),
    )


def _is_logic(kind: str) -> bool:
    """Whether what goes in comes out in the same cycle."""
    return bool(_LUT.fullmatch(kind)) or kind == _CARRY or kind in _SMALL


def _depth(cells: Sequence[Any]) -> int:
    chained = {bit for cell in cells if cell["type"] == _CARRY for bit in cell["connections"]["CO"]}
    makers: dict[Any, tuple[list[Any], int]] = {}
    for cell in cells:
        ways, wires = cell["port_directions"], cell["connections"]
        sources = [b for port, bits in wires.items() if ways[port] == "input" for b in bits]
        goes_on = cell["type"] == _CARRY and wires["CI"][0] in chained
        for port, bits in wires.items():
            if ways[port] == "output":
                makers |= {bit: (sources, 0 if goes_on else 1) for bit in bits}
    return longest(makers)


def rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """A header and rows for a table: modules, and their sum."""
    header = ["module", "LUT6", "CARRY4", "FF", "RAM18", "depth"]
    names = ("luts", "carries", "flip_flops", "memories")
    lines = []
    for name, m in report.modules.items():
        title = f"{name} x {m.count}" if m.count > 1 else name
        lines.append([title, *(f"{getattr(m, n) * m.count:,}" for n in names), str(m.depth)])
    total = report.total()
    lines.append(["total", *(f"{total[n]:,}" for n in names), ""])
    return header, lines
