"""The folder of an exported block: its source, the files of its memories, golden vectors, benches,
`block.json`, and a README.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quweit_jax.deploy.hardware import benches as classifier_benches
from quweit_jax.deploy.hardware.blocks import benches, c_source
from quweit_jax.deploy.hardware.blocks.activations import Tokens
from quweit_jax.deploy.hardware.blocks.description import GLUBlock
from quweit_jax.deploy.hardware.blocks.verilog import NAME, PORTS, Circuit
from quweit_jax.deploy.hardware.folder import check_target, write_files


@dataclasses.dataclass(frozen=True)
class Export:
    """What is written. kind: 'verilog' or 'c'. number: of the block in its model. about: further
    facts for block.json.
    """

    kind: str
    circuit: Circuit
    tokens: Tokens
    number: int
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write(export: Export, out: Path, *, overwrite: bool = False) -> list[str]:
    """Writes the folder; the names of its files.

    Raises:
      InputError: there is something at `out` already, or nothing can be written there.
    """
    check_target(out, overwrite)
    inputs, expected = benches.vectors(export.tokens)
    files = {
        classifier_benches.INPUTS: inputs,
        classifier_benches.EXPECTED: expected,
        "block.json": json.dumps(facts(export), indent=2, ensure_ascii=False) + "\n",
        **_sources(export),
        "README.md": readme(export),
    }
    return write_files(files, out)


def _sources(export: Export) -> dict[str, str]:
    circuit, count = export.circuit, len(export.tokens.x)
    block = circuit.block
    if export.kind == "c":
        bench = c_source.bench(block.features, count, NAME)
        return {f"{NAME}.c": c_source.source(block, NAME), "bench.c": bench}
    return {
        f"{NAME}.v": circuit.text,
        **{memory.file: memory.text() for memory in circuit.memories},
        "bench.v": benches.verilog_bench(circuit.schedule, count, NAME),
        "bench.cpp": benches.cpp_bench(circuit.schedule, count, NAME),
    }


def facts(export: Export) -> dict[str, Any]:
    """What block.json says."""
    schedule, tokens = export.circuit.schedule, export.tokens
    timing = {
        "latency": schedule.latency,
        "cycles_between_results": schedule.every,
        "cycles_a_token": schedule.interval,
        "parallel": schedule.parallel,
        "requantizers": schedule.lanes,
        "memory_bits": export.circuit.memory_bits,
    }
    return {
        "block": export.number,
        "kind": kind(export),
        "features": schedule.features,
        "golden_vectors": {"activations": tokens.real, "extremes": len(tokens.x) - tokens.real},
        **(timing if export.kind == "verilog" else {}),
        **export.about,
    }


def kind(export: Export) -> str:
    """What the block's model calls it."""
    return "lookup_glu" if isinstance(export.circuit.block, GLUBlock) else "weightless"


def readme(export: Export) -> str:
    """The folder's README: files, ports, timing and how to check it."""
    tokens = export.tokens
    lines = [
        f"# Block {export.number} of an integer-only ViT ({kind(export)})",
        "",
        "A token's words go in, those behind the norm (`x`, 8 bits) and those of the residual "
        "stream (`stream`, 16 bits); the stream's words behind the block come out (`y`, 16 bits): "
        "sums, requantized and added. All are in two's complement.",
        "",
        f"`{classifier_benches.INPUTS}` and `{classifier_benches.EXPECTED}` are golden vectors: "
        f"{tokens.real:,} tokens of validation images, as the packed model computes them, and "
        f"{len(tokens.x) - tokens.real} of extreme and random words. A line is a token: pairs of "
        "`x` and `stream`, feature by feature, and results `y`, in hexadecimal.",
        "",
        *(_c_lines() if export.kind == "c" else _verilog_lines(export)),
    ]
    return "\n".join([*lines, ""])


def _verilog_lines(export: Export) -> list[str]:
    circuit, schedule = export.circuit, export.circuit.schedule
    files = ", ".join(f"`{memory.file}`" for memory in circuit.memories)
    return [
        f"`{NAME}.v` is Verilog-2001, top level `{NAME}`; its read-only memories "
        f"({circuit.memory_bits:,} bits) are in {files}:",
        "",
        *(f"    {port}" for port in PORTS),
        "",
        f"Words come in one feature a cycle, at edges of `clk` with `valid_in` while `ready` is "
        f"high. The first result comes {schedule.latency} cycles behind a token's last word, then "
        f"one every {schedule.every} cycles; the next token may begin {schedule.busy} cycles "
        f"behind that word, so that a token takes {schedule.interval} cycles. `rst` is "
        "synchronous.",
        "",
        "Two benches compare every bit with the golden vectors, and count the cycles:",
        "",
        f"    iverilog -g2001 -o bench bench.v {NAME}.v && vvp -n bench",
        f"    verilator --cc --exe --build -Wno-fatal --top-module {NAME} {NAME}.v bench.cpp",
        f"    obj_dir/V{NAME}",
    ]


def _c_lines() -> list[str]:
    return [
        f"`{NAME}.c` is C99 without libraries or allocation, a token at a time. The bench compares "
        "it with the golden vectors:",
        "",
        f"    gcc -std=c99 -O2 -Wall -Wextra -Werror -o bench bench.c {NAME}.c && ./bench",
    ]
