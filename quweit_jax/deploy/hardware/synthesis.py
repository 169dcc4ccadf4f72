"""Synthesis by yosys: physical tables, flip-flops and depth of each module of a circuit."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quweit_jax.deploy.hardware import tools
from quweit_jax.deploy.hardware.circuit import MODULES, Circuit
from quweit_jax.deploy.hardware.folder import NAME
from quweit_jax.deploy.hardware.verilog import verilog
from quweit_jax.errors import InputError, RunError

SIZES = (6, 4)  # inputs of the physical tables that are asked for
_FLIP_FLOP = re.compile(r"\$_S?DFFE?_\w+_")
# Tables are drawn for 6 inputs and kept as they are; for 4 all of them are drawn anew by ABC.
_SCRIPT = """read_verilog -icells {file}
hierarchy -check -top {top}
proc
opt
{cut}
opt
abc -lut {size}
opt_merge
opt_lut
opt_clean -purge
check -assert
write_json {out}
"""
_CUT = {6: "simplemap t:* t:$lut %d", 4: "simplemap"}


@dataclasses.dataclass(frozen=True)
class Synthesized:
    """A module after synthesis. luts: physical tables. depth: the most of them one behind another
    within the module.
    """

    luts: int
    flip_flops: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Report:
    """tool: name and version. modules: by size of the physical tables and by module; 'valid' is
    the top level's own chain of registers.
    """

    tool: str
    modules: dict[int, dict[str, Synthesized]]


def synthesize(circuit: Circuit) -> Report:
    """What a circuit takes by yosys, for tables of 6 and of 4 inputs, module by module.

    Raises:
      InputError: yosys isn't installed. RunError: it fails, or leaves cells unmapped.
    """
    tool = yosys()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "circuit.v").write_text(as_cells(verilog(circuit, NAME)), encoding="utf-8")
        found = {size: _modules(_run(tool, folder, size)) for size in SIZES}
    return Report(version(tool), found)


def yosys() -> str:
    """The command that runs yosys; InputError where there is none."""
    tool = tools.installed("yosys")
    if tool is None:
        raise InputError(
            f"--synthesize: expected yosys, found none; install it ({tools.PACKAGES['yosys']})."
        )
    return tool


def version(tool: str) -> str:
    """A yosys's name and version."""
    said = subprocess.run([tool, "-V"], capture_output=True, text=True).stdout
    return " ".join(said.split()[:2])


def as_cells(text: str, name: str = NAME) -> str:
    """The same source with each table as yosys's own cell, so that it stays one."""
    text = re.sub(r"// A table of 2\*\*N.*?endmodule\n", "", text, flags=re.DOTALL)
    for old, new in (
        (f"  {name}_lookup #(.N(", "  \\$lut #(.WIDTH("),
        (".TABLE(", ".LUT("),
        ("(.i({", "(.A({"),
        (".o(", ".Y("),
    ):
        text = text.replace(old, new)
    return text


def _run(tool: str, folder: Path, size: int) -> dict[str, Any]:
    """The netlist, as yosys writes it."""
    names = {"file": "circuit.v", "top": NAME, "out": f"lut{size}.json"}
    script = _SCRIPT.format(cut=_CUT[size], size=size, **names)
    return netlist(tool, folder, script, names["out"])


def netlist(tool: str, folder: Path, script: str, name: str) -> dict[str, Any]:
    """What a script of yosys, run in a folder, writes into the file `name` there.

    Raises:
      RunError: it fails.
    """
    out = folder / name
    out.with_suffix(".ys").write_text(script, encoding="utf-8")
    said = subprocess.run(
        [tool, "-q", "-s", out.with_suffix(".ys").name], cwd=folder, capture_output=True, text=True
    )
    if said.returncode or not out.exists():
        raise RunError(f"--synthesize: {tool} failed: {(said.stdout + said.stderr)[-1500:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def _modules(netlist: Mapping[str, Any]) -> dict[str, Synthesized]:
    """What each module takes, in the circuit's order."""
    found = {}
    for module in (*MODULES, ""):
        name = f"{NAME}_{module}" if module else NAME
        cells = netlist["modules"].get(name, {}).get("cells", {})
        found[module or "valid"] = _count(name, cells, netlist["modules"])
    return found


def _count(name: str, cells: Mapping[str, Any], modules: Mapping[str, Any]) -> Synthesized:
    tables = [cell for cell in cells.values() if cell["type"] == "$lut"]
    flip_flops = [cell for cell in cells.values() if _FLIP_FLOP.fullmatch(cell["type"])]
    others = {cell["type"] for cell in cells.values()} - set(modules)
    left = {kind for kind in others if kind != "$lut" and not _FLIP_FLOP.fullmatch(kind)}
    if left:
        raise RunError(
            f"--synthesize: {name} has cells that were not mapped ({', '.join(sorted(left))}), so "
            "its counts would be too low; use another version of yosys."
        )
    return Synthesized(len(tables), len(flip_flops), _depth(tables))


def _depth(tables: list[Any]) -> int:
    """The longest chain of tables."""
    makers = {cell["connections"]["Y"][0]: (cell["connections"]["A"], 1) for cell in tables}
    return longest(makers)


def longest(makers: Mapping[Any, tuple[Sequence[Any], int]]) -> int:
    """The longest way through logic. makers: of each bit, what it is made of and what that adds."""
    depths: dict[object, int] = {}
    for root in makers:
        stack = [root]
        while stack:
            bit = stack[-1]
            sources, own = makers[bit]
            inputs = [source for source in sources if source in makers]
            if waiting := [source for source in inputs if source not in depths]:
                stack += waiting
                continue
            depths[bit] = own + max((depths[source] for source in inputs), default=0)
            stack.pop()
    return max(depths.values(), default=0)


def rows(report: Report, circuit: Circuit) -> tuple[list[str], list[list[str]]]:
    """A header and rows for a table: modules, and their sum."""
    drawn = circuit.area()
    header = ["module", "comparators", "drawn LUT6", "drawn FF"]
    for size in report.modules:
        header += [f"LUT{size}", f"FF ({size})", f"depth ({size})"]
    lines = []
    for module in (*MODULES, "valid"):
        own = drawn.get(module)
        row = [own.comparators, own.luts, own.flip_flops] if own else [0, 0, circuit.latency]
        for modules in report.modules.values():
            m = modules[module]
            row += [m.luts, m.flip_flops, m.depth]
        lines.append(row)
    total = [sum(column) for column in zip(*lines)]
    for place in range(5, len(total), 3):
        total[place] = 0  # depths of modules do not add up
    names = [*MODULES, "valid", "total"]
    texts = [[name, *(f"{n:,}" for n in row)] for name, row in zip(names, [*lines, total])]
    for place in range(6, len(header), 3):
        texts[-1][place] = ""
    return header, texts
