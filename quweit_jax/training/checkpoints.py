"""Orbax v1 checkpoints of all a run needs to go on: asynchronous, checked before being trusted."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree

from quweit_jax.errors import InputError, RunError, first_line, needed
from quweit_jax.reading import check_local
from quweit_jax.training import alone, checksums, files, hosts
from quweit_jax.training.sharding import path_name

with needed("for checkpoints"):
    from orbax.checkpoint import v1 as ocp

# Orbax annotates its own types more narrowly than it accepts.
orbax: Any = ocp
policies: Any = ocp.training.preservation_policies
Leaves = dict[str, tuple[tuple[int, ...], np.dtype]]
# Orbax looks for its files by patterns that begin with the whole path, so these would make it find
# none there, or those of another folder; by a path with a backslash it reads nothing either.
_PATTERNS = "*?[\\"


def check_path(folder: Path, what: str = "--workdir", *, reading: bool = False) -> None:
    """Checks that checkpoints can be saved in a folder, or read where they are there already.

    Raises:
      InputError: they can't, because of its name or that of a folder above it.
    """
    try:
        folder.exists()
    except OSError as error:  # a name that is too long, say
        raise InputError(f"{what}: {error.strerror}: {folder}; give another folder.") from None
    path = str(folder.absolute())
    bad = [c for c in ("\\" if reading else _PATTERNS) if c in path]
    try:
        path.encode()
    except UnicodeEncodeError:
        bad.append("bytes that are no UTF-8")
    check_local(folder, what, "train in a local one or one that is mounted, and copy it")
    if bad:
        raise InputError(
            f"{what}: checkpoints cannot be {'read' if reading else 'saved'} in {path!r}, for its "
            f"{' and '.join(bad)}; expected a path without, so rename the folder or give a link to "
            "it that has another name."
        )


class _Damaged(Exception):
    """A checkpoint that is not, or cannot be known to be, what was saved; its cause says more."""


class Checkpoints:
    """The checkpoints of one run directory: `checkpoints/STEP/`, and `checksums/STEP.json` beside
    them.

    Args:
      workdir: the run directory. keep: how many of the newest to keep (the one of lowest validation
        loss is kept too).
      read_only: for evaluation: nothing is created, cleaned up or moved.
      apart: each process has a folder of its own in the place of one that all reach; the first one
        saves all there is, and each reads its own copy.

    Attributes:
      damaged: a sentence for each checkpoint that has been passed over.
    """

    def __init__(
        self, workdir: Path, keep: int = 2, *, read_only: bool = False, apart: bool = False
    ):
        if keep < 1:
            raise InputError(f"keep: expected at least 1 checkpoint, found {keep}.")
        self.workdir = workdir.absolute()  # Orbax reads nothing by a relative path
        self.directory, self.read_only = self.workdir / "checkpoints", read_only
        self.keep, self.apart = keep, apart and jax.process_count() > 1
        self.damaged: list[str] = []
        check_path(self.workdir, reading=read_only)
        if read_only and not self.directory.is_dir():
            raise InputError(
                f"no checkpoints in {workdir}: expected the run directory of python -m "
                "quweit_jax.train."
            )
        self._open_checkpointer: Any = None
        self._unchecked: tuple[int, Leaves] | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return checksums.steps(self.workdir)

    def best_step(self) -> int | None:
        """The step of lowest validation loss, the newest where none was evaluated, None without
        checkpoints.
        """
        scores = self._scores()
        known = [(score, step) for step, score in scores.items() if score is not None]
        return min(known)[1] if known else max(scores or self.steps(), default=None)

    def _scores(self) -> dict[int, float | None]:
        """The validation loss of each checkpoint; those are told, and left out, of which it cannot
        be read.
        """
        scores: dict[int, float | None] = {}
        for step in self.steps():
            try:
                scores[step] = checksums.score(self.workdir, step)
            except (OSError, ValueError) as error:
                self._tell_damaged(step, error, "it is left out")
        return scores

    def _checkpointer(self) -> Any:
        """Orbax's, which reads the scores of all checkpoints when it is opened."""
        if self._open_checkpointer is not None:
            return self._open_checkpointer
        there = self.steps()
        self._set_aside(set(there) - self._scores().keys())
        if self.apart:
            self._open_checkpointer = alone.LoneCheckpointer(self.directory, self._kept)
            return self._open_checkpointer
        best = policies.BestN(
            get_metric_fn=lambda m: m["loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        newest = policies.LatestN(self.keep)
        self._open_checkpointer = orbax.training.Checkpointer(
            self.directory,
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )
        return self._open_checkpointer

    def _kept(self) -> set[int | None]:
        return {self.best_step(), *self.steps()[-self.keep :]}

    def save(self, step: int, state: PyTree, loop: dict[str, Any], loss: float | None) -> None:
        """Starts saving in the background; an earlier save's failure shows here (RunError)."""
        self.wait()
        if self.apart:
            state = hosts.gathered(state)
            if jax.process_index():
                return
        noted = np.frombuffer(json.dumps(loop).encode(), np.uint8)
        items = {"state": state, "loop": {"json": noted}}
        scores = None if loss is None else {"loss": loss}
        begin = self._checkpointer().save_checkpointables_async
        self._guard(step, lambda: begin(step, items, metrics=scores))
        self._unchecked = step, _leaves(state)

    def wait(self) -> None:
        """Waits for the save under way, looks at what it wrote, and notes the checksums of that."""
        if self._unchecked is None:
            return
        (step, saved), self._unchecked = self._unchecked, None
        self._guard(step, self._checkpointer().wait)
        if jax.process_index() == 0:
            self._guard(step, lambda: self._find_again(step, saved))
            self._guard(step, lambda: checksums.note(self.workdir, step))

    def _find_again(self, step: int, saved: Leaves) -> None:
        """Raises OSError unless what was saved is there; the loop's bytes are the first
        process's.
        """
        folder = self.directory / str(step)
        for name in ("state/manifest.ocdbt", "loop/manifest.ocdbt"):
            if not (folder / name).is_file():
                raise OSError(f"{name} is missing")
        found = _leaves(orbax.checkpointables_metadata(folder).metadata["state"])
        if found != saved:
            raise OSError(f"{len(saved.keys() - found.keys())} of {len(saved)} arrays are missing")

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self.wait()
        if self._open_checkpointer is not None:
            self._open_checkpointer.close()

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
            raise RunError(
                f"the checkpoint of step {step} could not be written ({type(error).__name__}: "
                f"{_reason(error)}); {checksums.describe_kept(self.workdir)}. "
                "Free some space (or mend the folder) and run the same command again to go on from "
                "there."
            ) from error

    def restore(
        self, abstract_state: PyTree, step: int | None = None
    ) -> tuple[PyTree, dict[str, Any], int] | None:
        """(state, loop, step): the given step, or the newest that is whole; None when there has
        never been a checkpoint.

        A damaged checkpoint is reported and the one before is taken; once that is read, the damaged
        one is set aside in `damaged/` (unless read_only).

        Raises:
          InputError: the step does not exist, or the trees differ (names the first path, what was
            expected and what was found).
          RunError: the given or every checkpoint is damaged, or they are gone.
        """
        there = self.steps()
        if step is not None and step not in there:
            raise InputError(
                f"no checkpoint of step {step} in {self.workdir}; there are "
                f"{', '.join(map(str, there)) or 'none'}."
            )
        causes: dict[int, BaseException] = {}
        for candidate in there[::-1] if step is None else [step]:
            try:
                with alone.by_itself() if self.apart else contextlib.nullcontext():
                    loaded, noted = self._load(abstract_state, candidate)
            except _Damaged as error:
                causes[candidate] = error.__cause__ or error
                if step is None:
                    self._tell_damaged(candidate, causes[candidate], "trying the one before")
                continue
            self._set_aside(causes)
            if not self.read_only:
                self._checkpointer()
            return loaded, noted, candidate
        self._check_lost(step, causes)
        if not self.read_only:
            self._checkpointer()
        return None

    def _load(self, abstract_state: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """A checkpoint's state and loop; _Damaged if it may not be what was saved."""
        known, folder = False, self.directory / str(step)
        try:
            known = checksums.verify(self.workdir, step)
            checksums.score(self.workdir, step)
            found = orbax.checkpointables_metadata(folder).metadata["state"]
            if not _leaves(found):
                raise OSError("its arrays cannot be found")
            compare_trees(abstract_state, found, f"checkpoint of step {step}")
            loaded = orbax.load_checkpointables(folder, {"state": abstract_state, "loop": None})
            noted = json.loads(np.asarray(loaded["loop"]["json"]).tobytes())
        except Exception as error:
            if not known:
                raise _Damaged from error
            if isinstance(error, InputError):
                raise
            # its files are as they were written, so an older one would not help
            raise RunError(
                f"the checkpoint of step {step} is whole but cannot be loaded "
                f"({type(error).__name__}: {_reason(error)})."
            ) from error
        if not (known or self.read_only or (jax.process_index() and not self.apart)):
            checksums.note(self.workdir, step)
        return loaded["state"], noted

    def _tell_damaged(self, step: int, error: BaseException, then: str) -> None:
        self.damaged.append(f"the checkpoint of step {step} is damaged ({_reason(error)})")
        logging.warning("%s; %s.", self.damaged[-1], then)

    def _check_lost(self, step: int | None, causes: dict[int, BaseException]) -> None:
        """Raises what there is to say where no checkpoint could be read and some were there."""
        # All that could be read of it is of another model, and that is likelier than damage.
        for error in causes.values():
            if isinstance(error, InputError):
                raise error
        if step is not None:
            others = ", ".join(str(s) for s in self.steps() if s != step)
            hint = f"there are also {others}; choose one with --step"
            raise RunError(
                f"the checkpoint of step {step} is damaged ({_reason(causes[step])}); "
                f"{hint if others else 'there is no other'}."
            )
        if causes:
            raise RunError(
                f"every checkpoint in {self.directory} is damaged "
                f"({', '.join(map(str, sorted(causes)))}); start again in a new --workdir, or put "
                "whole ones there."
            )
        aside = self.workdir / "damaged"
        if checksums.were_noted(self.workdir) or (aside.is_dir() and not files.is_empty(aside)):
            raise RunError(
                f"the checkpoints that were in {self.directory} are gone; put them back there (a "
                f"damaged one is in {aside}), or start again in a new --workdir."
            )

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Moves checkpoints out of the way; every process calls this, and all wait."""
        if self.read_only:
            return
        hosts.wait_for_all("quweit_jax: checkpoints looked at")
        for step in steps if jax.process_index() == 0 or self.apart else ():
            target = self.workdir / "damaged" / str(step)
            while target.exists():
                target = target.with_name(target.name + "_")
            target.parent.mkdir(exist_ok=True)
            shutil.move(self.directory / str(step), target)
            checksums.forget(self.workdir, step)  # a later checkpoint of this step has its own
            logging.warning("set it aside in %s.", target)
        hosts.wait_for_all("quweit_jax: checkpoints set aside")


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


def _leaves(tree: PyTree) -> Leaves:
    """Shapes and dtypes by path, of arrays or of what Orbax tells about them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "dtype"))
    return {path_name(p): (tuple(x.shape), np.dtype(x.dtype)) for p, x in leaves}
