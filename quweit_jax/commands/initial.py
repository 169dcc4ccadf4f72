"""`init_from`: beginning a run with other variables than freshly drawn ones, for fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from quweit_jax.errors import InputError
from quweit_jax.pretrained import transfer
from quweit_jax.training import run


def reader(path: str, workdir: Path) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """A function from a new run's variables to those it begins with: what fits is taken from
    `path`, the rest stays, and both are told.

    path: a run directory (its best checkpoint is taken), or a published checkpoint (see
      `pretrained.transfer.read_source`); '' for none.
    workdir: of the run; one that already has checkpoints goes on from those, and the source need
      not be there any more.

    Raises:
      InputError: there is nothing at `path`, and the run is a new one.
    """
    if not path:
        return None
    place = Path(path).expanduser()
    if not place.exists() and not run.has_checkpoints(workdir):
        raise InputError(
            f"init_from: nothing at {path}; give a run directory, a folder with a published "
            "checkpoint, or its weights file."
        )

    def initial(fresh: dict[str, Any]) -> dict[str, Any]:
        if (place / "environment.json").is_file():
            source = jax.device_get(run.open_run(place).variables)
        else:
            source = transfer.read_source(place)
        merged, report = transfer.merge(jax.device_get(fresh), source)
        if jax.process_index() == 0:
            print(report.describe(), flush=True)
        return merged

    return initial
