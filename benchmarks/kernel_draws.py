"""Drawn shapes over every implementation of every function of `ops` that has several, against its
reference: values, gradients and final states. `python benchmarks/kernel_draws.py --draws=300`

Draws go to the functions in turn. Sizes are odd ones, those beside the bounds of blocks, and now
and then 0. Native code runs with every level of instructions this processor has, Pallas kernels are
interpreted. A difference is relative to the largest number of what is compared, where that is above
1; what is exact must be equal. Exits with 1 if there is any failure.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
import timing
from kernel_cases import FUNCTIONS, Drawn

from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.native import library


def ways(others: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """(what it is called, implementation, context) of all, native code at every level."""
    for name in others:
        if name != "native":
            yield name, name, choice.interpreted() if name == "pallas" else nullcontext()
        elif library.hindrance() is None:
            for level in library.LEVELS:
                with library.using(level) as used:
                    pass
                if used == level:
                    yield f"native, {level}", name, library.using(level)


def by_name(out: Any) -> dict[str, Any]:
    """What a call gave, by name."""
    return out if isinstance(out, dict) else {"values": out}


def difference(found: Any, expected: Any) -> float:
    """The largest, relative to the largest expected number where that is above 1; infinite where
    shapes differ or something is no number.
    """
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(abs(a - b).max() / max(1.0, abs(b).max())) if a.size else 0.0


class Table:
    """What was found of every function and implementation."""

    def __init__(self) -> None:
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.largest: dict[tuple[str, str], float] = collections.defaultdict(float)
        self.failures: dict[tuple[str, str], list[str]] = collections.defaultdict(list)

    def add(self, function: str, name: str, off: float, why: str) -> None:
        """One draw's difference, and what is wrong with it, if anything is."""
        key = function, name
        self.counts[key] += 1
        self.largest[key] = max(self.largest[key], off)
        if why:
            self.failures[key].append(why)
            print(function, name, why, flush=True)

    def lines(self) -> list[str]:
        """A line for each, and one for each failure."""
        width, wide = (max(len(key[i]) for key in self.counts) for i in range(2))
        lines = [f"{'':{width}}  {'':{wide}}  draws  largest difference  failures"]
        for key in sorted(self.counts, key=lambda key: list(FUNCTIONS).index(key[0])):
            lines.append(
                f"{key[0]:{width}}  {key[1]:{wide}}  {self.counts[key]:5}  "
                f"{self.largest[key]:18.2e}  {len(self.failures[key]):8}"
            )
        return lines + [
            f"{', '.join(key)}: {one}" for key, of in self.failures.items() for one in of
        ]


def compare(drawn: Drawn, table: Table, function: str, draw: int) -> None:
    """Every implementation with the reference."""
    of = drawn.reference
    expected = by_name(jax.device_get(drawn.make(of)())) if isinstance(of, str) else of
    calls = {}
    for name, implementation, context in ways(drawn.others):
        off, why = 0.0, ""
        try:
            with context:
                if implementation not in calls:
                    calls[implementation] = drawn.make(implementation)
                found = by_name(jax.device_get(calls[implementation]()))
            off = max(difference(found.get(k, np.nan), expected[k]) for k in expected)
            why = "" if off <= drawn.tolerance else f"off by {off:.3g}"
        except Exception as error:  # a failure of a kernel is what is looked for
            why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        table.add(function, name, off, why and f"draw {draw}, {drawn.sizes}: {why}")


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table, start, lines = Table(), time.process_time(), []
    for draw in range(args.draws):
        function = list(FUNCTIONS)[draw % len(FUNCTIONS)]
        drawn = FUNCTIONS[function](np.random.default_rng([args.seed, draw]))
        compare(drawn, table, function, draw)
        lines = [
            f"{draw + 1} of {args.draws} drawn shapes, seed {args.seed}, {jax.default_backend()}, "
            "Pallas interpreted",
            timing.machine(),
            *table.lines(),
            f"{time.process_time() - start:.0f} s of CPU time",
        ]
        timing.write(args.out, lines)  # as far as it has come
    print("\n".join(lines))
    raise SystemExit(1 if any(table.failures.values()) else 0)


if __name__ == "__main__":
    main()
