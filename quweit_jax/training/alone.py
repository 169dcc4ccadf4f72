"""Orbax for the one of several processes that saves what all have: where they reach no common
folder, nothing may wait for the others.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from quweit_jax.errors import needed

with needed("for checkpoints"):
    import orbax.checkpoint
    from orbax.checkpoint import v1

before: Any = orbax.checkpoint  # v1 asks all processes whether they save at the same path
now: Any = v1


def by_itself() -> contextlib.AbstractContextManager[object]:
    """A block in which Orbax reads for this process alone."""
    own, context = jax.process_index(), now.Context()
    context.multiprocessing.primary_host = own
    context.multiprocessing.active_processes = {own}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{own}"
    return context


class LoneCheckpointer:
    """What `Checkpoints` needs of Orbax's own, which knows no process without the others.

    directory: of the checkpoints, each in a folder of its step's name. keeps: asked after a save,
    the steps of those that stay.
    """

    def __init__(self, directory: Path, keeps: Callable[[], Collection[int | None]]):
        self._directory, self._keeps = directory, keeps

    def save_checkpointables_async(
        self, step: int, items: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves, which has been done when this returns, and removes what is no longer kept."""
        self._directory.mkdir(parents=True, exist_ok=True)
        folder = self._directory / str(step)
        own = jax.process_index()
        options = before.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
        )
        kinds = {
            name: before.PyTreeCheckpointHandler(multiprocessing_options=options) for name in items
        }
        together = before.CompositeOptions(multiprocessing_options=options)
        handler = before.CompositeCheckpointHandler(composite_options=together, **kinds)
        given = {name: before.args.PyTreeSave(item) for name, item in items.items()}
        with before.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            checkpointer.save(folder, args=before.args.Composite(**given))
        if metrics is not None:  # where Orbax's own has them, which reads them without a word
            (folder / "metrics").mkdir()
            (folder / "metrics" / "metrics").write_text(json.dumps(dict(metrics)))
        kept = {str(step) for step in self._keeps()}
        for folder in self._directory.iterdir():
            if folder.name.isdecimal() and folder.name not in kept:
                shutil.rmtree(folder)

    def wait(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""
