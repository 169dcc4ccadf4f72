"""The folder of an exported circuit: its source, golden vectors, benches, how to scale inputs, and
a README.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quweit_jax.deploy.hardware import benches, c_source, vectors, verilog
from quweit_jax.deploy.hardware.circuit import Circuit
from quweit_jax.deploy.hardware.description import Fit
from quweit_jax.errors import InputError
from quweit_jax.reading import check_local

KINDS = ("verilog", "c")
NAME = "dwn"  # of the top level and of the C functions


@dataclasses.dataclass(frozen=True)
class Export:
    """What is written. kind: one of KINDS. words: of the golden examples (N, F), of which the first
    `real` are examples of the data. shape: of an example. about: further facts for
    input_scaling.json. word: examples that the C file's bit-sliced form takes at a time.
    """

    kind: str
    circuit: Circuit
    fit: Fit
    words: np.ndarray
    real: int
    shape: tuple[int, ...]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    word: int = 64


def check_target(out: Path, overwrite: bool = False) -> None:
    """Raises InputError unless `out` is a new or an empty folder, or may be written over."""
    check_local(out, "--out", "write it here, and copy it")
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"--out: expected a folder, found the file {out}; give another name.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"--out: {out} is not empty; give another name, or --overwrite.")


def write(export: Export, out: Path, *, overwrite: bool = False) -> list[str]:
    """Writes the folder; the names of its files.

    Raises:
      InputError: there is something at `out` already, or nothing can be written there.
    """
    check_target(out, overwrite)
    given, expected = vectors.text(export.circuit, export.words)
    files = {
        benches.INPUTS: given,
        benches.EXPECTED: expected,
        "input_scaling.json": json.dumps(scaling(export), indent=2, ensure_ascii=False) + "\n",
        **_sources(export),
        "README.md": readme(export),
    }
    return write_files(files, out)


def write_files(files: Mapping[str, str], out: Path) -> list[str]:
    """Writes texts by name into a folder, which is made; their names.

    Raises:
      InputError: nothing can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--out: cannot write to {out} ({error.strerror}); give a folder you can write to."
        ) from None
    return list(files)


def _sources(export: Export) -> dict[str, str]:
    circuit, count = export.circuit, len(export.words)
    if export.kind == "c":
        source = c_source.source(circuit.classifier, circuit.ports(), NAME, export.word)
        return {f"{NAME}.c": source, "bench.c": c_source.bench(circuit, count, NAME, export.word)}
    return {
        f"{NAME}.v": verilog.verilog(circuit, NAME),
        "bench.v": benches.verilog_bench(circuit, count, NAME),
        "bench.cpp": benches.cpp_bench(circuit, count, NAME),
    }


def scaling(export: Export) -> dict[str, Any]:
    """What input_scaling.json says: how numbers become words, which of them go where, and what
    comes out.
    """
    circuit = export.circuit
    c = circuit.classifier
    ports = [
        {
            "port": f"x_{f}",
            "feature": f,
            "index": [int(i) for i in np.unravel_index(f, export.shape)],
        }
        for f in circuit.ports()
    ]
    return {
        "formula": "q = clip(round((x - offset) / step), low, high), in float64, halves to even",
        **dataclasses.asdict(c.scaling),
        "low": c.scaling.low,
        "high": c.scaling.high,
        "inputs": ports,
        "outputs": {
            "decision": {
                "bits": c.decision_bits,
                "meaning": "the class of the largest count, the lowest of equals",
            },
            "score": {"bits": c.score_bits, "meaning": "that count"},
        },
        **(
            {"latency": circuit.latency, "stages": list(circuit.stages)}
            if export.kind == "verilog"
            else {}
        ),
        "training": dataclasses.asdict(export.fit),
        "golden_vectors": {"examples": export.real, "mixed": len(export.words) - export.real},
        **export.about,
    }


def readme(export: Export) -> str:
    """The folder's README: files, ports, how to check it, and what it takes."""
    circuit = export.circuit
    c, area = circuit.classifier, circuit.area()
    exact = (
        "no comparator changes" if export.fit.exact else f"{export.fit.changed} decisions change"
    )
    sign = "two's complement" if c.scaling.signed else "unsigned"
    lines = [
        f"# A classifier of {c.classes} classes, made of look-up tables",
        "",
        f"{len(c.feature)} comparators, layers of "
        f"{', '.join(str(len(l.tables)) for l in c.layers)} tables of "
        f"{', '.join(str(l.wiring.shape[1]) for l in c.layers)} inputs. Inputs are words of "
        f"{c.scaling.bits} bits, {sign}; "
        "`input_scaling.json` says how numbers become words and which of them go into which port. "
        f"Of {export.fit.examples:,} training examples {exact} by that.",
        "",
        f"`{benches.INPUTS}` and `{benches.EXPECTED}` are golden vectors: {export.real} examples "
        f"of the data and {len(export.words) - export.real} of mixed and extreme words. A line of "
        "the first has the words that are read, in the order of the ports, one of the second "
        "decision and score, all in hexadecimal.",
        "",
        *(_c_lines(export) if export.kind == "c" else _verilog_lines(export)),
    ]
    if export.kind == "verilog":
        lines += ["", "As drawn, in tables of 6 inputs:", "", "| module | tables | flip-flops |"]
        lines += ["|---|---|---|"]
        lines += [f"| {module} | {a.luts:,} | {a.flip_flops:,} |" for module, a in area.items()]
    return "\n".join([*lines, ""])


def _verilog_lines(export: Export) -> list[str]:
    circuit = export.circuit
    ports = [f"    {port}" for port in verilog.words(circuit)]
    shown = ports if len(ports) < 20 else [*ports[:8], "    ...", *ports[-4:]]
    timing = (
        f"An example enters at every edge of `clk` at which `valid_in` is high; its outputs are "
        f"there {circuit.latency} edges later, with `valid_out`. `rst` is synchronous and clears "
        "`valid_out` alone."
        if circuit.latency
        else "All is combinational: `valid_out` is `valid_in`, and `clk` and `rst` are not used."
    )
    return [
        f"`{NAME}.v` is Verilog-2001, top level `{NAME}`:",
        "",
        *shown,
        "",
        timing,
        "",
        "Two benches compare every output bit with the golden vectors, and the latency:",
        "",
        f"    iverilog -g2001 -o bench bench.v {NAME}.v && vvp -n bench",
        f"    verilator --cc --exe --build -Wno-fatal --top-module {NAME} {NAME}.v bench.cpp",
        f"    obj_dir/V{NAME}",
    ]


def _c_lines(export: Export) -> list[str]:
    return [
        f"`{NAME}.c` is C99 without libraries or allocation. `{NAME}_one` classifies one example, "
        f"`{NAME}_many` {export.word} at a time, a bit of a word each. The bench compares both "
        "with the golden vectors:",
        "",
        f"    gcc -std=c99 -O3 -Wall -Wextra -Werror -o bench bench.c {NAME}.c && ./bench",
    ]
