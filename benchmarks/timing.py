"""Side-by-side timing in one process: each contender in turn, round after round, medians."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def parser(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser of --out and, unless None, of --rounds."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--out", type=Path, help="a file for what is printed")
    return made


def write(out: Path | None, lines: Sequence[str], mode: str = "w") -> None:
    """Writes lines to a file, if one is given."""
    if out:
        with out.open(mode) as file:
            file.write("\n".join(lines) + "\n")


def side_by_side(
    contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of one call of each contender; a call returns only when its work is done."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(medians: dict[str, float], baseline: str) -> str:
    """One line a contender: median milliseconds and the ratio to the baseline."""
    width = max(map(len, medians))
    lines = [f"{'':{width}}  median ms   ratio to {baseline}"]
    lines += [
        f"{name:{width}}  {1e3 * value:9.2f}   {value / medians[baseline]:.3f}"
        for name, value in medians.items()
    ]
    return "\n".join(lines)


def machine(packages: Sequence[str] = ("jax", "jaxlib", "flax", "optax", "numpy")) -> str:
    """Processor, cores and versions, for the record."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{os.cpu_count()} x {model}, Python {platform.python_version()}, {versions}"


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.readlines()
    except OSError:
        return []
