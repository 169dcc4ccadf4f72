"""Side-by-side timing in one process: each contender in turn, round after round, medians."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Summary = dict[str, dict[str, Any]]


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
    seconds = samples(contenders, rounds, warmup, time.perf_counter)
    return {name: statistics.median(values) for name, values in seconds.items()}


def samples(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of every call of each contender, in turn; by default of this process's own work,
    which a machine that is busy with something else disturbs little.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, call in contenders.items():
            start = clock()
            call()
            if i >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def summary(seconds: dict[str, list[float]]) -> Summary:
    """Milliseconds of each contender: the median, and the quartiles around it."""
    return {
        name: {
            "median_ms": 1e3 * statistics.median(values),
            "quartiles_ms": [1e3 * q for q in statistics.quantiles(values, n=4)[::2]],
        }
        for name, values in seconds.items()
    }


def spread_table(summarized: Summary, baseline: str) -> str:
    """One line a contender: median, quartiles, and how many times faster than the baseline."""
    width, base = max(map(len, summarized)), summarized[baseline]["median_ms"]
    lines = [f"{'':{width}}  median ms        quartiles   times faster than {baseline}"]
    for name, found in summarized.items():
        low, high = found["quartiles_ms"]
        spread = f"{low:.2f} to {high:.2f}"
        lines.append(
            f"{name:{width}}  {found['median_ms']:9.3f}  {spread:>15}   "
            f"{base / found['median_ms']:.2f}"
        )
    return "\n".join(lines)


def write_json(out: Path | None, facts: Mapping[str, object]) -> None:
    """Writes facts beside `out`, as .json, if it is given."""
    if out:
        out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


def cores() -> str:
    """On how many cores this process may run, and how it is timed: for the record."""
    return (
        f"process CPU time, contenders in turn in one process on {len(os.sched_getaffinity(0))} "
        "core(s) of a machine that may be busy"
    )


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


def native_level() -> str:
    """The instructions that native code uses here; 'none' without it."""
    from quweit_jax.ops.kernels.native import library

    if library.hindrance() is not None:
        return "none"
    with library.using(library.LEVELS[-1]) as level:
        return level


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.readlines()
    except OSError:
        return []
