"""What a report knows of a run: plain data, read by `collect` and shown by `plots` and `page`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from quweit_jax.costs.energy import Energy
from quweit_jax.ops.counts import Costs
from quweit_jax.report.insight import Insight

Json: TypeAlias = dict[str, Any]  # a JSON object: what it holds has no static type
# From the mildest; 'older version': written by another version of this program than can be read.
_STATES = ("finished", "unfinished", "older version", "damaged")


@dataclasses.dataclass(frozen=True)
class ClassifiedImage:
    """A validation image: pixels uint8 (H, W) or (H, W, C), its class, and the class and
    probability that the model gives it.
    """

    pixels: np.ndarray
    expected: str
    predicted: str
    probability: float


@dataclasses.dataclass
class RunSummary:
    """A run, as far as it could be read.

    number: in the report, from 1. name: the part of its path that tells it from the others.
    state: 'finished', 'unfinished', 'older version' (of this program, not readable) or 'damaged';
      reason: why it is not 'finished'. notes: what else a reader should know.
    rows: of metrics.jsonl. language: whether it models text (None: unknown). data: what it learned
      from, in words; fingerprint: of that data's content.
    dense, dense_energy, dense_precision: the costs of the dense model that it is compared with, and
      the operands of that one's products; replaced: the share of its multiplications that this one
      does without.
    text: a prompt and what the model wrote after it.
    """

    number: int
    name: str
    path: str
    state: str = "finished"
    reason: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    config: Json = dataclasses.field(default_factory=dict)
    environment: Json = dataclasses.field(default_factory=dict)
    rows: list[Json] = dataclasses.field(default_factory=list)
    language: bool | None = None
    data: str = ""
    fingerprint: str = ""
    costs: Costs | None = None
    energy: Energy | None = None
    dense: Costs | None = None
    dense_energy: Energy | None = None
    dense_precision: str = ""
    replaced: float | None = None
    text: tuple[str, str] | None = None
    images: list[ClassifiedImage] = dataclasses.field(default_factory=list)
    insight: Insight | None = None

    def mark(self, state: str, reason: str) -> None:
        """Sets the state unless there is a graver one already, and adds the reason."""
        self.state = max(self.state, state, key=_STATES.index)
        self.reason = "; ".join(filter(None, (self.reason, reason)))

    @property
    def label(self) -> str:
        """Number and name."""
        return f"{self.number} {self.name}"

    @property
    def model(self) -> str:
        """The model's name, and 'integer-only' where it is."""
        values = self.config.get("model") or {}
        return f"{values.get('name', '')}{', integer-only' if values.get('integer') else ''}"

    @property
    def mlp(self) -> str:
        """The kind of its MLPs."""
        return str((self.config.get("model") or {}).get("mlp", ""))

    @property
    def step(self) -> int:
        """The last step in its metrics."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def best(self) -> Json | None:
        """The evaluation of lowest validation loss, {'step', 'loss', 'accuracy', ...}."""
        scored = (
            row
            for row in self.rows
            if row["split"] == "validation" and math.isfinite(row["loss"]) and "accuracy" in row
        )
        return min(scored, key=lambda row: row["loss"], default=None)

    @property
    def bytes_deployed(self) -> int | None:
        """All bytes that the deployed form stores."""
        return bytes_stored(self.costs)

    @property
    def dense_bytes(self) -> int | None:
        """And those of the dense model beside it."""
        return bytes_stored(self.dense)


def bytes_stored(costs: Costs | None) -> int | None:
    """All bytes that a deployed form stores."""
    return None if costs is None else sum(costs.bytes_stored.values())


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs whose losses can be compared, because they learned from the same data."""

    title: str
    language: bool
    runs: tuple[RunSummary, ...]

    @property
    def unit(self) -> str:
        """What one inference is for."""
        return "token" if self.language else "image"


def group(runs: Sequence[RunSummary]) -> list[Group]:
    """Runs of the same data together, in the order of their first run; without those of unknown
    data.
    """
    members: dict[tuple[bool, str, str], list[RunSummary]] = {}
    for run in runs:
        if run.language is not None:
            members.setdefault((run.language, run.data, run.fingerprint), []).append(run)
    titles = [data for _, data, _ in members]
    return [
        Group(
            f"{data} ({fingerprint or 'content unknown'})" if titles.count(data) > 1 else data,
            language,
            tuple(found),
        )
        for (language, data, fingerprint), found in members.items()
    ]
