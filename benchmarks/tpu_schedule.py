"""What the TPU's compiler says of a program that it compiles ahead of time: its estimates of XLA's
operations, and the instruction schedules of Pallas kernels, for which it has none.
"""

from __future__ import annotations

import collections
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Clock, memory bandwidth (as the vendor publishes it) and a topology to compile for."""

    hertz: float
    bytes_per_second: float
    topology: str


CHIPS = {
    "v5e": Chip(1.5e9, 819e9, "v5e:2x2"),
    "v5p": Chip(1.75e9, 2765e9, "v5p:2x2x1"),
    "v6e": Chip(1.75e9, 1640e9, "v6e:2x2"),
}
_KERNEL = re.compile(r"(lut|recurrence|ternary|thermometer|packed)_[a-z_]*[a-z]")
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z: ]*):\s*((?:> ?)*)\s*\{")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %s\w+, (\d+)\s*/\* loop exit test")


def dump_schedules() -> Path:
    """The folder in which libtpu writes schedules; to be called before libtpu is loaded."""
    folder = Path(tempfile.mkdtemp(prefix="tpu_schedules_"))
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        + os.environ.get("LIBTPU_INIT_ARGS", "")
    )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return folder


def schedule_cycles(text: str, seldom: Mapping[int, int] | None = None) -> int:
    """Cycles in which a kernel's instructions are issued, of a file `*-final_bundles.txt`.

    A bundle of instructions is a cycle, as often as the loops around it turn; nothing waits. What
    is run conditionally counts as if it always were.

    Args:
      seldom: turns of a loop that is inside a condition -> how often in all that loop begins.
    """
    bundles = [
        ("LB" in found[1], found[2].count(">"), line)
        for line in text.splitlines()
        if (found := _BUNDLE.match(line))
    ]
    loops = [_loop(bundles, i) for i, (begins, _, _) in enumerate(bundles) if begins]
    turns = {loop: _turns(bundles, loop, loops) for loop in loops}
    total = 0
    for i in range(len(bundles)):
        around = [loop for loop in loops if loop[0] <= i <= loop[1]]
        times = 1
        for loop in around:
            times = turns[loop] * (seldom or {}).get(turns[loop], times)
        total += times
    return total


def _loop(bundles: list[tuple[bool, int, str]], start: int) -> tuple[int, int]:
    """The first and the last bundle of the loop that starts at one."""
    depth, end = bundles[start][1], start
    for i in range(start + 1, len(bundles)):
        if bundles[i][0] and bundles[i][1] <= depth:
            break
        if bundles[i][1] >= depth:
            end = i
    return start, end


def _turns(
    bundles: list[tuple[bool, int, str]], loop: tuple[int, int], loops: list[tuple[int, int]]
) -> int:
    within = [other for other in loops if loop[0] < other[0] <= loop[1]]
    for i in range(loop[1], loop[0] - 1, -1):
        if any(start <= i <= end for start, end in within):
            continue
        if found := _EXIT.search(bundles[i][2]):
            return int(found[1])
    raise ValueError("the schedule has a loop whose number of turns is not known")


def compile_for(function: Callable[..., Any], shapes: Any, device: Any) -> Any:
    """A function compiled for one device that isn't there, with the kernels for it."""
    import jax

    from quweit_jax.ops.kernels.choice import compiling_for, divided

    where = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes)
    mesh = jax.sharding.Mesh([device], ("data",))
    with compiling_for("tpu", portable=True), divided(mesh, "data"):
        return jax.jit(function).lower(*placed).compile()


def xla_cycles(compiled: Any) -> int:
    """The sum of the estimates of a compiled program's operations; loops count once."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())))


def kernel_calls(compiled: Any) -> collections.Counter[str]:
    """How often a compiled program calls each kernel; loops count once."""
    calls = [
        line.partition("=")[0]
        for line in compiled.as_text().splitlines()
        if 'custom_call_target="tpu_custom_call"' in line
    ]
    return collections.Counter(found[0] for call in calls if (found := _KERNEL.search(call)))


def kernel_cycles(folder: Path, seldom: Mapping[int, int] | None = None) -> list[tuple[str, int]]:
    """Kernels compiled since this was asked last, those that are alike once: the name and the
    cycles of a call.
    """
    found = []
    for file in sorted(folder.glob("*-final_bundles.txt")):
        name = _KERNEL.search(file.name)  # transformations put words around a kernel's name
        if name and "schedule" not in file.name:
            found.append((name[0], schedule_cycles(file.read_text(), seldom)))
    for file in folder.iterdir():
        file.unlink()
    return found
