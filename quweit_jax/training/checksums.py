"""Which checkpoints of a run directory are whole: `checksums/STEP.json` notes what each file of
`checkpoints/STEP/` held when it had been saved.

Only files are read here, with neither Orbax nor devices.
"""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path

from absl import logging

from quweit_jax.reading import is_number, open_regular, parse_json
from quweit_jax.training import files

# Reading back more than this after every save would cost more than it protects; larger files are
# checked by size alone.
_LARGEST = 2**28


def steps(workdir: Path) -> list[int]:
    """The steps of which there are checkpoints, whole or not, ascending."""
    folder = workdir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    named = (p for p in found if p.name.isascii() and p.name.isdecimal())
    return sorted(int(path.name) for path in named if path.is_dir())


def score(workdir: Path, step: int) -> float | None:
    """The validation loss saved with a checkpoint, None where it was not evaluated.

    Raises:
      OSError, ValueError: it cannot be read, or is not what was saved; or Orbax could not read what
        it keeps beside it.
    """
    _check_description(workdir, step)
    name = "metrics/metrics"
    path = workdir / "checkpoints" / str(step) / name
    try:
        noted = _noted(workdir, step).get(name)
    except (OSError, ValueError):
        noted = None
    if noted is None and not os.path.lexists(path):
        return None
    content = _read(path)
    if noted not in (None, [len(content), zlib.crc32(content)]):
        raise OSError(f"the content of {name} has changed")
    saved = parse_json(content)
    loss = saved.get("loss") if isinstance(saved, dict) else None
    if loss is None or not (is_number(loss) and math.isfinite(loss)):
        raise ValueError(f"{name} holds no loss but {str(saved)[:80]}")
    return float(loss)


def _check_description(workdir: Path, step: int) -> None:
    """Raises ValueError for a description of a checkpoint that is JSON, but no object: Orbax ends
    at one when it is opened, while it does without one that is missing or no JSON.
    """
    path = workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    try:
        described = parse_json(_read(path))
    except (OSError, ValueError):
        return
    if not isinstance(described, dict):
        raise ValueError(f"{path.name} holds no object but {str(described)[:80]}")


def note(workdir: Path, step: int) -> None:
    """Notes what a checkpoint's files hold, once that is on disk; forgets checkpoints that are
    gone.
    """
    folder = workdir / "checksums"
    folder.mkdir(exist_ok=True)
    kept = set(map(str, steps(workdir)))
    for stale in folder.glob("*.json"):
        if stale.stem not in kept:
            stale.unlink()
    root = workdir / "checkpoints" / str(step)
    for path in (root, *root.rglob("*")):
        files.sync(path)
    files.replace_json(_place(workdir, step), _contents(root))


def forget(workdir: Path, step: int) -> None:
    """Removes what was noted of a checkpoint."""
    _place(workdir, step).unlink(missing_ok=True)


def were_noted(workdir: Path) -> bool:
    """Whether this run has ever had a whole checkpoint."""
    return any((workdir / "checksums").glob("*.json"))


def verify(workdir: Path, step: int) -> bool:
    """Whether every file of a checkpoint is known to hold what was saved; False where nothing is
    known of some, as where the checksums cannot be read, which is told.

    Raises:
      OSError: a file is missing or not as it was written.
    """
    try:
        noted = _noted(workdir, step)
    except FileNotFoundError:  # killed between the save and its checksums
        return False
    except (OSError, ValueError) as error:
        logging.warning(
            "%s cannot be read (%s); the checkpoint of step %s is tried without it.",
            _place(workdir, step),
            error,
            step,
        )
        return False
    found = _contents(workdir / "checkpoints" / str(step))
    for name, (size, checksum) in noted.items():
        if name not in found:
            raise OSError(f"{name} is missing")
        if found[name][0] != size:
            raise OSError(f"{name} has {found[name][0]} bytes instead of {size}")
        if found[name][1] != checksum:
            raise OSError(f"the content of {name} has changed")
    return all(size <= _LARGEST for size, _ in noted.values())


def is_whole(workdir: Path, step: int) -> bool:
    """Whether there is a checkpoint of a step, and its files are as they were written."""
    try:
        _noted(workdir, step)
        verify(workdir, step)
    except (OSError, ValueError):
        return False
    return step in steps(workdir)


def describe_kept(workdir: Path) -> str:
    """'the checkpoint of step 10 is whole' of the newest that is, or that there is none yet."""
    try:
        whole = (step for step in reversed(steps(workdir)) if is_whole(workdir, step))
        newest = next(whole, None)
    except OSError:  # the folder itself, of which another error is being told
        return "its checkpoints cannot be looked at now"
    if newest is None:
        return "there is no whole checkpoint yet"
    return f"the checkpoint of step {newest} is whole"


def _place(workdir: Path, step: int) -> Path:
    return workdir / "checksums" / f"{step}.json"


def _noted(workdir: Path, step: int) -> dict[str, list[int]]:
    """{file: [bytes, checksum]}; OSError or ValueError where that cannot be read."""
    noted = parse_json(_read(_place(workdir, step)))
    if not isinstance(noted, dict) or not noted:
        raise ValueError("expected the sizes and checksums of files")
    for pair in noted.values():
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)):
            raise ValueError("expected a size and a checksum of each file")
    return noted


def _contents(root: Path) -> dict[str, list[int]]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): _sums(path) for path in paths}


def _sums(path: Path) -> list[int]:
    size = path.stat().st_size
    return [size, zlib.crc32(_read(path)) if size <= _LARGEST else 0]


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()
