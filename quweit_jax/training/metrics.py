"""What a run writes down: metrics.jsonl, TensorBoard if it is installed, the progress bar, and the
loss plot.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quweit_jax.training import files

Row = dict[str, Any]


def read_values(path: Path) -> list[Any]:
    """The JSON values of a metrics.jsonl, rows or not; a last line cut short by a kill is left
    out.
    """
    values = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values.append(json.loads(line))
            except ValueError:
                continue
    return values


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; whatever else a damaged file holds is left out."""
    return [value for value in read_values(path) if is_row(value)]


def is_row(value: object) -> bool:
    """Whether a JSON value is a row of metrics: of a step, a split, and a loss."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("step"), int)
        and value.get("split") in ("train", "validation")
        and isinstance(value.get("loss"), int | float)
        and not isinstance(value["loss"], bool)
    )


def evaluations(workdir: Path) -> list[Row]:
    """A run's evaluations on the validation split, in order."""
    return [row for row in read_rows(workdir / "metrics.jsonl") if row["split"] == "validation"]


class MetricsWriter:
    """Appends rows {"step", "split", ...} to metrics.jsonl; opening it drops every row after
    `step`, so a resume repeats none.
    """

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= step]
        files.replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(workdir)

    def write(self, row: Row) -> None:
        """One line, at once; floats at full precision."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                if key not in ("step", "split") and isinstance(value, (int, float)):
                    self._board.add_scalar(f"{row['split']}/{key}", value, row["step"])

    def sync(self) -> None:
        """Forces the rows to disk: call before a checkpoint that counts on them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(workdir: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
    except ImportError:
        return None
    return SummaryWriter(str(workdir / "tensorboard"))


class NoMetrics(MetricsWriter):
    """For the processes that don't write."""

    def __init__(self):
        pass

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


def plot_losses(
    runs: dict[str, Sequence[Row]], path: Path, title: str = "", unit: str = "nats per token"
) -> None:
    """Loss curves of one run (training and validation) or several (validation, labelled by name) as
    a PNG.
    """
    from matplotlib.figure import (
        Figure,
    )  # without pyplot, whose figures belong to the caller: a notebook shows its own

    figure = Figure(figsize=(7, 4.2), dpi=130)
    axes = figure.subplots()
    for i, (name, rows) in enumerate(runs.items()):
        color = f"C{i}"
        steps, values = curve(rows, "validation")
        if len(runs) == 1:
            axes.plot(*curve(rows, "train"), color=color, alpha=0.45, linewidth=1, label="training")
            color = "C1"
        axes.plot(
            steps,
            values,
            color=color,
            marker="o",
            markersize=3,
            label=name if len(runs) > 1 else "validation",
        )
        if values and len(runs) == 1:
            axes.annotate(
                f"{values[-1]:.3f}",
                (steps[-1], values[-1]),
                textcoords="offset points",
                xytext=(0, 8),
                ha="right",
                color=color,
            )
    finite = [
        v
        for rows in runs.values()
        for split in ("train", "validation")
        for v in curve(rows, split)[1]
        if math.isfinite(v)
    ]
    if finite and len(runs) > 1:
        lows = [curve(rows, "validation")[1] for rows in runs.values()]
        axes.set_ylim(
            min(map(min, filter(None, lows))) * 0.98,
            sorted(v for low in lows for v in low)[int(0.97 * sum(map(len, lows)))] * 1.02,
        )
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
