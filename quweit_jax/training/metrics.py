"""What a run writes down: metrics.jsonl, trackers beside it, and the loss plot."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from quweit_jax.reading import is_number, is_whole, parse_json, read_bytes
from quweit_jax.training import files, looks
from quweit_jax.training.tracking import Tracker

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; lines that are none are left out."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[Row], int]:
    """The rows of a metrics.jsonl, and how many of its lines are none, but for a last one cut short
    by a kill.

    A row has a 'step', a 'split', 'train' or 'validation', and numbers: 'loss' and others. No file,
    no rows.

    Raises:
      InputError: the file is there and cannot be read.
    """
    if not os.path.lexists(path):
        return [], 0
    lines = read_bytes(path, "--workdir").decode("utf-8", "replace").split("\n")
    found = [_row(line) for line in lines]
    bad = sum(row is None and bool(line.strip()) for line, row in zip(lines[:-1], found))
    return [row for row in found if row is not None], bad


def _row(line: str) -> Row | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    numbers = {"loss", "accuracy", "grad_norm", "learning_rate", "seconds"}
    good = (
        isinstance(row, dict)
        and is_whole(row.get("step"))
        and row.get("split") in ("train", "validation")
        and "loss" in row
        and all(is_number(row[name]) for name in numbers & row.keys())
    )
    return row if good else None


def is_speed(name: str) -> bool:
    """Whether a name in a row tells of time or of the machine, and so differs in the same run."""
    return name.endswith(("seconds", "_per_second")) or name in ("mfu", "device_bytes")


def evaluations(workdir: Path) -> list[Row]:
    """A run's evaluations on the validation split, in order; the run is finished if the last one is
    of its last step.
    """
    rows = read_rows(workdir / "metrics.jsonl")
    return [row for row in rows if row["split"] == "validation" and "accuracy" in row]


class MetricsWriter:
    """Appends rows {"step", "split", ...} to metrics.jsonl, and gives them to the trackers; opening
    it drops every row after `step`, so a resume repeats none.
    """

    def __init__(self, workdir: Path, step: int, trackers: Sequence[Tracker] = ()):
        self.path = workdir / "metrics.jsonl"
        rows, bad = read_lines(self.path)
        if bad:
            logging.warning("%s: %d lines that are no rows of metrics are dropped.", self.path, bad)
        kept = [row for row in rows if row["step"] <= step]
        files.replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = trackers

    def has_evaluation(self, step: int) -> bool:
        """Whether there is a row of an evaluation at a step."""
        return any(row["step"] == step for row in evaluations(self.path.parent))

    def write(self, row: Row) -> None:
        """One line, at once; floats at full precision."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(row)

    def sync(self) -> None:
        """Forces the rows to disk: call before a checkpoint that counts on them.

        Raises:
          OSError: they cannot be written, or the file is no longer in the folder.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        os.stat(self.path)  # a file that was removed takes rows, too, but nobody will read them

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class NoMetrics(MetricsWriter):
    """For the processes that don't write."""

    def __init__(self):
        pass

    def has_evaluation(self, step: int) -> bool:
        """The process that writes knows."""
        return True

    def write(self, row: Row) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def curve(rows: Sequence[Row], split: str, key: str = "loss") -> tuple[list[int], list[float]]:
    """Steps and values of one split."""
    points = [
        (row["step"], row[key])
        for row in rows
        if row.get("split") == split and isinstance(row.get(key), (int, float))
    ]
    return [p[0] for p in points], [p[1] for p in points]


def draw_losses(axes: Any, runs: Sequence[tuple[str, Sequence[Row], Mapping[str, Any]]]) -> None:
    """Draws each run's training losses (thin) and validation losses (marked) into Matplotlib axes.

    runs: (label, rows, how Matplotlib draws the line, at least its `color`) of each. The limits
    leave out the first losses, which are far above all that matters, and what is not finite. Rows
    of validation with 'low' and 'high' have a band between them: that of several seeds.
    """
    seen: list[float] = []
    for label, rows, look in runs:
        steps, losses = curve(rows, "train")
        axes.plot(steps, losses, color=look["color"], linewidth=0.8, alpha=0.4)
        seen += losses[len(losses) // 20 :]
        steps, losses = curve(rows, "validation")
        shown = {"markersize": 3.5, "linewidth": 1.5, "markevery": max(1, len(steps) // 12)}
        axes.plot(steps, losses, label=label, **look, **shown)
        seen += losses
        bands = [r for r in rows if r.get("split") == "validation" and "low" in r and "high" in r]
        if bands:
            lows, highs = ([r[end] for r in bands] for end in ("low", "high"))
            at = [r["step"] for r in bands]
            axes.fill_between(at, lows, highs, color=look["color"], alpha=0.18, linewidth=0)
    finite = sorted(value for value in seen if math.isfinite(value))
    if finite:
        low, high = finite[0], finite[min(len(finite) - 1, int(0.97 * len(finite)))]
        axes.set_ylim(low - 0.04 * (high - low) - 1e-3, high + 0.04 * (high - low) + 1e-3)


def plot_losses(
    runs: dict[str, Sequence[Row]], path: Path, title: str = "", unit: str = "nats per token"
) -> None:
    """Loss curves of one run (training and validation) or several (labelled by name) as a PNG."""
    # Without pyplot, whose figures belong to the caller: a notebook shows its own.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=130)
    axes = figure.subplots()
    draw_losses(
        axes,
        [
            (name or "validation", rows, look)
            for (name, rows), look in zip(runs.items(), looks.styles(list(runs)))
        ],
    )
    if len(runs) == 1:
        axes.lines[0].set_label("training")
        for step, loss in list(zip(*curve(next(iter(runs.values())), "validation")))[-1:]:
            above = {"textcoords": "offset points", "xytext": (0, 8), "ha": "right"}
            axes.annotate(f"{loss:.3f}", (step, loss), **above)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
