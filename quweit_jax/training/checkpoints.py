"""Orbax v1 checkpoints of all a run needs to go on: asynchronous, checked before being trusted."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from quweit_jax.errors import InputError, RunError, first_line
from quweit_jax.training import files
from quweit_jax.training.sharding import path_name

# Orbax annotates its own types more narrowly than it accepts.
policies: Any = ocp.training.preservation_policies
# Reading back more than this after every save would cost more than it protects; larger files are
# checked by size alone.
_CHECKSUM_BYTES = 2**28


class Checkpoints:
    """The checkpoints of one run directory: `checkpoints/STEP/`, and `checksums/STEP.json` beside
    them.

    Args:
      workdir: the run directory. keep: how many of the newest to keep (the one of lowest validation
        loss is kept too).
      read_only: for evaluation: nothing is created, cleaned up or moved.
    """

    def __init__(self, workdir: Path, keep: int = 2, *, read_only: bool = False):
        if keep < 1:
            raise InputError(f"keep: expected at least 1 checkpoint, found {keep}.")
        self.workdir = workdir.absolute()  # Orbax reads nothing by a relative path
        self.directory, self.read_only = self.workdir / "checkpoints", read_only
        best = policies.BestN(
            get_metric_fn=lambda m: m["loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        checkpointer: Any = ocp.training.Checkpointer
        self._open = lambda: checkpointer(
            self.directory,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=not read_only,
        )
        if read_only and not self.directory.is_dir():
            raise InputError(
                f"no checkpoints in {workdir}: expected the run directory of python -m "
                "quweit_jax.train."
            )
        self._checkpointer = self._open()
        self._unchecked: int | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [c.step for c in self._checkpointer.checkpoints]

    def best_step(self) -> int | None:
        """The step of lowest validation loss, the newest where none was evaluated, None without
        checkpoints.
        """
        scored = [(c.metrics["loss"], c.step) for c in self._checkpointer.checkpoints if c.metrics]
        return min(scored)[1] if scored else (self.steps() or [None])[-1]

    def save(self, step: int, state: PyTree, loop: dict[str, Any], loss: float | None) -> None:
        """Starts saving in the background; an earlier save's failure shows here (RunError)."""
        self.wait()
        noted = np.frombuffer(json.dumps(loop).encode(), np.uint8)
        items = {"state": state, "loop": {"json": noted}}
        scores = None if loss is None else {"loss": loss}
        begin = self._checkpointer.save_checkpointables_async
        self._guard(step, lambda: begin(step, items, metrics=scores))
        self._unchecked = step

    def wait(self) -> None:
        """Waits for the save under way, then notes the checksums of what it wrote."""
        if self._unchecked is None:
            return
        step, self._unchecked = self._unchecked, None
        self._guard(step, self._checkpointer.wait)
        if jax.process_index() == 0:
            self._guard(step, lambda: self._write_checksums(step))

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self.wait()
        self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error that one is the one to tell; a save begun before it is still finished.
        with contextlib.suppress(*[Exception] * (kind is not None)):
            self.close()

    def _guard(self, step: int, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            whole = [s for s in self.steps() if s != step and (self.directory / str(s)).is_dir()]
            previous = "there is no earlier checkpoint"
            if whole:
                previous = f"the checkpoint of step {whole[-1]} is whole"
            raise RunError(
                f"the checkpoint of step {step} could not be written ({type(error).__name__}: "
                f"{_reason(error)}); {previous}. "
                "Free some space (or mend the folder) and run the same command again to go on from "
                "there."
            ) from error

    def restore(
        self, abstract_state: PyTree, step: int | None = None
    ) -> tuple[PyTree, dict[str, Any], int] | None:
        """(state, loop, step): the given step, or the newest that is whole; None when there are no
        checkpoints.

        A damaged newest checkpoint is reported and set aside in `damaged/` (unless read_only), and
        the one before is taken.

        Raises:
          InputError: the step does not exist, or the trees differ (names the first path, what was
            expected and what was found).
          RunError: every checkpoint is damaged.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise InputError(
                f"no checkpoint of step {step} in {self.workdir}; there are "
                f"{', '.join(map(str, steps)) or 'none'}."
            )
        for candidate in reversed(steps if step is None else [step]):
            whole = False
            try:
                whole = self._verify(candidate)
                found = self._checkpointer.checkpointables_metadata(candidate).metadata["state"]
                compare_trees(abstract_state, found, f"checkpoint of step {candidate}")
                loaded = self._checkpointer.load_checkpointables(
                    candidate, {"state": abstract_state, "loop": None}
                )
                noted = np.asarray(loaded["loop"]["json"]).tobytes().decode()
                return loaded["state"], json.loads(noted), candidate
            except InputError:
                raise
            except Exception as error:
                if whole:  # its files are as they were written, so an older one would not help
                    raise RunError(
                        f"the checkpoint of step {candidate} is whole but cannot be loaded "
                        f"({type(error).__name__}: {_reason(error)})."
                    ) from error
                if step is not None:
                    others = ", ".join(str(s) for s in steps if s != step)
                    hint = "there is no other"
                    if others:
                        hint = f"there are also {others}; choose one with --step"
                    raise RunError(
                        f"the checkpoint of step {step} is damaged ({_reason(error)}); {hint}."
                    ) from error
                logging.warning(
                    "the checkpoint of step %s is damaged (%s); trying the one before.",
                    candidate,
                    _reason(error),
                )
                self._set_aside(candidate)
        if steps:
            raise RunError(
                f"every checkpoint in {self.directory} is damaged ({', '.join(map(str, steps))}); "
                "start again in a new --workdir."
            )
        return None

    def _set_aside(self, step: int) -> None:
        if self.read_only:
            return
        if jax.process_index() == 0:
            target = self.workdir / "damaged" / str(step)
            while target.exists():
                target = target.with_name(target.name + "_")
            target.parent.mkdir(exist_ok=True)
            shutil.move(self.directory / str(step), target)
            # a later checkpoint of this step has its own
            self._checksum_path(step).unlink(missing_ok=True)
            logging.warning("set it aside in %s.", target)
        self._checkpointer.close()
        self._checkpointer = self._open()

    def _files(self, step: int) -> dict[str, list[int]]:
        root = self.directory / str(step)
        files = {}
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            size = path.stat().st_size
            files[path.relative_to(root).as_posix()] = [
                size,
                zlib.crc32(path.read_bytes()) if size <= _CHECKSUM_BYTES else 0,
            ]
        return files

    def _checksum_path(self, step: int) -> Path:
        return self.workdir / "checksums" / f"{step}.json"

    def _write_checksums(self, step: int) -> None:
        folder = self.workdir / "checksums"
        folder.mkdir(exist_ok=True)
        kept = {str(s) for s in self.steps()}
        for stale in folder.glob("*.json"):
            if stale.stem not in kept:
                stale.unlink()
        files.replace_json(self._checksum_path(step), self._files(step))

    def _verify(self, step: int) -> bool:
        """Raises OSError if a file isn't as it was written; True if every content was compared."""
        path = self._checksum_path(step)
        if not path.exists():
            return False  # killed between the save and its checksums: loading will tell
        noted, found = json.loads(path.read_text()), self._files(step)
        for name, (size, checksum) in noted.items():
            if name not in found:
                raise OSError(f"{name} is missing")
            if found[name][0] != size:
                raise OSError(f"{name} has {found[name][0]} bytes instead of {size}")
            if found[name][1] != checksum:
                raise OSError(f"the content of {name} has changed")
        return all(size <= _CHECKSUM_BYTES for size, _ in noted.values())


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def compare_trees(expected: PyTree, found: PyTree, what: str) -> None:
    """Raises InputError at the first path that is missing, extra or of another shape or dtype."""
    wanted, there = _leaves(expected), _leaves(found)
    for name in sorted(wanted.keys() | there.keys()):
        if name not in there:
            raise InputError(
                f"{what}: expected {name} {list(wanted[name][0])}, found nothing there; was it "
                "trained with another model config?"
            )
        if name not in wanted:
            raise InputError(
                f"{what}: found {name} {list(there[name][0])}, which this model does not have; was "
                "it trained with another model config?"
            )
        if wanted[name] != there[name]:
            (shape, dtype), (other_shape, other_dtype) = wanted[name], there[name]
            raise InputError(
                f"{what}: {name} expected {dtype}{list(shape)}, found "
                f"{other_dtype}{list(other_shape)}."
            )


def _leaves(tree: PyTree) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes by path, of arrays or of what Orbax tells about them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "dtype"))
    return {path_name(p): (tuple(x.shape), np.dtype(x.dtype)) for p, x in leaves}
