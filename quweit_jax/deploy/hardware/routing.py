"""Place and route by nextpnr for the FPGAs it knows: logic cells, and the frequency that it
estimates for the placed and routed circuit.

A circuit has more ports than a package has pins, so words come in through a chain of registers, a
bit at a clock edge, and what comes out is held in registers at the pins. The frequency is of the
slowest way between registers, those ones counted, under nextpnr's model of the part.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quweit_jax.deploy.hardware import synthesis, tools
from quweit_jax.deploy.hardware.circuit import Circuit
from quweit_jax.deploy.hardware.folder import NAME
from quweit_jax.deploy.hardware.verilog import verilog, words
from quweit_jax.errors import RunError


@dataclasses.dataclass(frozen=True)
class Part:
    """An FPGA. name: for people. tool, options: the nextpnr that knows it. synthesis: yosys's
    command for it. cells: what its report calls logic cells; all of them: how many there are.
    """

    name: str
    tool: str
    options: tuple[str, ...]
    synthesis: str
    cells: str


PARTS = (
    Part(
        "iCE40 HX8K",
        "nextpnr-ice40",
        ("--hx8k", "--package", "ct256", "--pcf-allow-unconstrained"),
        "synth_ice40 -abc2",
        "ICESTORM_LC",
    ),
    Part("ECP5 85K", "nextpnr-ecp5", ("--85k",), "synth_ecp5", "TRELLIS_COMB"),
)
_PORT = re.compile(r"(input|output) (?:\[(\d+):0\] )?(\w+)")


@dataclasses.dataclass(frozen=True)
class Routed:
    """A placed and routed circuit. tool: name and version. cells: logic cells taken, of
    `available`, those of the registers at its edges among them. megahertz: what nextpnr estimates;
    None where the circuit does not fit.
    """

    part: str
    tool: str
    cells: int
    available: int
    megahertz: float | None


def route(circuit: Circuit, parts: Sequence[Part] = PARTS) -> list[Routed]:
    """The circuit in every part whose nextpnr is installed; none is an empty list.

    Raises:
      InputError: yosys is not installed. RunError: a tool fails.
    """
    found = []
    for part in parts:
        if tool := tools.installed(part.tool):
            with tempfile.TemporaryDirectory() as place:
                found.append(_route(circuit, part, tool, Path(place)))
    return found


def missing() -> list[str]:
    """What is not installed of nextpnr, with what installs it."""
    names = [part.tool for part in PARTS if tools.installed(part.tool) is None]
    return [f"{name} ({tools.PACKAGES[name]})" for name in names]


def pins(ports: Sequence[str], name: str = NAME) -> str:
    """A top level `pins` in Verilog around a module: its inputs from a chain of registers that
    `bit_in` fills, its outputs held in registers.

    ports: the module's declarations; clk is the clock.
    """
    found = [match for port in ports if (match := _PORT.fullmatch(port)) and match[3] != "clk"]
    sizes = [(match[1], match[3], int(match[2] or 0) + 1) for match in found]
    inputs = [(port, size) for way, port, size in sizes if way == "input"]
    outputs = [(port, size) for way, port, size in sizes if way == "output"]
    total, out_bits = sum(size for _, size in inputs), sum(size for _, size in outputs)
    wires, low = [".clk(clk)"], 0
    for port, size in inputs:
        wires.append(f".{port}(held[{low + size - 1}:{low}])")
        low += size
    low = 0
    for port, size in outputs:
        wires.append(f".{port}(found[{low + size - 1}:{low}])")
        low += size
    joined = ",\n    ".join(wires)
    return f"""module pins (input clk, input bit_in, output reg [{out_bits - 1}:0] out);
  reg [{total}:0] held;
  wire [{out_bits - 1}:0] found;
  always @(posedge clk) begin
    held <= {{held[{total - 1}:0], bit_in}};
    out <= found;
  end
  {name} inside (
    {joined}
  );
endmodule
"""


def _route(circuit: Circuit, part: Part, tool: str, folder: Path) -> Routed:
    text = verilog(circuit, NAME) + pins(words(circuit, NAME))
    (folder / "circuit.v").write_text(text, encoding="utf-8")
    script = f"read_verilog circuit.v\n{part.synthesis} -top pins -json netlist.json\n"
    synthesis.netlist(synthesis.yosys(), folder, script, "netlist.json")
    said = subprocess.run(
        [
            *(tool, *part.options, "--json", "netlist.json", "--report", "report.json"),
            *("--timing-allow-fail", "--seed", "1"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    version = subprocess.run([tool, "--version"], capture_output=True, text=True)
    name = " ".join(re.findall(r"nextpnr-\w+|Version [\w.+~-]+", version.stdout + version.stderr))
    report = folder / "report.json"
    if said.returncode or not report.exists():
        if sizes := _too_large(said.stdout + said.stderr, part):
            return Routed(part.name, name, *sizes, None)
        raise RunError(f"--synthesize: {tool} failed: {(said.stdout + said.stderr)[-1500:]}")
    facts: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    cells = facts["utilization"][part.cells]
    clocks = [clock["achieved"] for clock in facts["fmax"].values()]
    return Routed(
        part.name, name, int(cells["used"]), int(cells["available"]), min(clocks, default=None)
    )


def _too_large(said: str, part: Part) -> tuple[int, int] | None:
    """Cells needed and available, where that is why a nextpnr ended."""
    found = re.search(rf"{part.cells}:\s*(\d+)/\s*(\d+)", said)
    if found and int(found[1]) > int(found[2]):
        return int(found[1]), int(found[2])
    return None


def lines(found: Sequence[Routed]) -> list[str]:
    """What was found, a line a part."""
    return [
        f"{r.part}: {r.cells:,} of {r.available:,} logic cells, "
        + (f"{r.megahertz:.1f} MHz" if r.megahertz else "does not fit")
        + f" as {r.tool} estimates"
        for r in found
    ]
