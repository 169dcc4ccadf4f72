"""Where rows of metrics go besides metrics.jsonl: TensorBoard, if it is installed, and what
`config.track` names.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from quweit_jax.config import Config, to_dict
from quweit_jax.errors import InputError, check_choice, first_line, require
from quweit_jax.training import files

TRACKERS = ("", "wandb")


class Tracker(Protocol):
    """Takes rows {'step', 'split', name: number}."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


def check(config: Config, *, installed: bool = False) -> None:
    """Raises InputError if `track` names no tracker, or (`installed`) one that is not there."""
    check_choice("track", name := config.get("track", ""), TRACKERS)
    if name and installed:
        require(name, f"for --config.track={name}")


def trackers(config: Config, workdir: Path) -> list[Tracker]:
    """Those of a run; InputError if one cannot begin."""
    found: list[Tracker] = []
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]

        found.append(_TensorBoard(SummaryWriter(str(workdir / "tensorboard"))))
    except ImportError:
        pass
    if config.get("track", "") == "wandb":
        found.append(_WandB(config, workdir))
    return found


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, each named 'SPLIT/NAME'."""
    return {
        f"{row['split']}/{name}": value
        for name, value in row.items()
        if name not in ("step", "split") and isinstance(value, (int, float))
    }


class _TensorBoard:
    def __init__(self, writer: Any):
        self._writer = writer

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """One run of Weights & Biases for a run directory, however often it goes on: its id is kept in
    wandb/id.txt. Mode, project and account are those of wandb's own environment variables.
    """

    def __init__(self, config: Config, workdir: Path):
        wandb = require("wandb", "for --config.track=wandb")
        kept = workdir / "wandb" / "id.txt"
        kept.parent.mkdir(exist_ok=True)
        if not kept.is_file():
            files.replace_text(kept, secrets.token_hex(6) + "\n")
        try:
            self._run = wandb.init(
                dir=str(workdir),
                name=workdir.name,
                id=kept.read_text(encoding="utf-8").strip(),
                resume="allow",
                config=to_dict(config),
            )
        except Exception as error:
            raise InputError(
                f"track: wandb cannot begin ({first_line(error)}); run `wandb login`, set "
                "WANDB_MODE=offline, or leave --config.track out."
            ) from None

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()
