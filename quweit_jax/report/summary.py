"""What a report knows of a run: plain data, read from run directories elsewhere and shown by
`analysis.plots` and `analysis.page`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from quweit_jax.costs.energy import Energy
from quweit_jax.ops.counts import Costs
from quweit_jax.report.insight import Insight

# 'older version': written by another version of this program than can be read.
STATES = ("finished", "unfinished", "older version", "damaged")


@dataclasses.dataclass(frozen=True)
class ClassifiedImage:
    """One validation image: pixels uint8 (H, W) or (H, W, C), its class and what the model takes it
    for, with the probability it gives.
    """

    pixels: np.ndarray
    expected: str
    predicted: str
    probability: float


@dataclasses.dataclass
class Record:
    """A run, as far as it could be read.

    number: in the report, from 1. name: the part of its path that tells it from the others. state:
    one of STATES; reason: why it is not 'finished'. notes: what else a reader should know. rows: of
    metrics.jsonl. language: whether it models text (None: unknown).
    data: what it learned from, in words; fingerprint: of that data's content. text: a prompt and
    what the model wrote after it.
    """

    number: int
    name: str
    path: str
    state: str = "finished"
    reason: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    language: bool | None = None
    data: str = ""
    fingerprint: str = ""
    costs: Costs | None = None
    energy: Energy | None = None
    replaced: float | None = None
    text: tuple[str, str] | None = None
    images: list[ClassifiedImage] = dataclasses.field(default_factory=list)
    insight: Insight | None = None

    @property
    def label(self) -> str:
        """Number and name."""
        return f"{self.number} {self.name}"

    @property
    def model(self) -> str:
        """The model's name, and 'integer' for integer-only ones."""
        values = self.config.get("model") or {}
        return f"{values.get('name', '')}{', integer-only' if values.get('integer') else ''}"

    @property
    def mlp(self) -> str:
        """The kind of its MLPs."""
        return str((self.config.get("model") or {}).get("mlp", ""))

    @property
    def step(self) -> int:
        """The last step it noted."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of lowest validation loss, {'step', 'loss', 'accuracy', ...}."""
        scored = (
            row
            for row in self.rows
            if row["split"] == "validation" and math.isfinite(row["loss"]) and "accuracy" in row
        )
        return min(scored, key=lambda row: row["loss"], default=None)

    @property
    def bytes_deployed(self) -> int | None:
        """Of the deployed form, everything that is stored."""
        return None if self.costs is None else sum(self.costs.bytes_stored.values())


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs whose losses can be compared, for they learned from the same data."""

    title: str
    language: bool
    records: tuple[Record, ...]

    @property
    def unit(self) -> str:
        """What one inference is for."""
        return "token" if self.language else "image"


def group(records: list[Record]) -> list[Group]:
    """Runs of the same data together, in the order of their first run; those of which the data is
    unknown are in none.
    """
    keys = list(
        dict.fromkeys(
            (r.language, r.data, r.fingerprint) for r in records if r.language is not None
        )
    )
    titles = [data for _, data, _ in keys]
    groups = []
    for language, data, fingerprint in keys:
        title = f"{data} ({fingerprint or 'content unknown'})" if titles.count(data) > 1 else data
        members = (
            r
            for r in records
            if (r.language, r.data, r.fingerprint) == (language, data, fingerprint)
        )
        groups.append(Group(title, bool(language), tuple(members)))
    return groups
