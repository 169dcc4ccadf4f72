"""Files that are whole or not there, whenever the program is killed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from quweit_jax.errors import InputError

LOCK = ".lock"


def replace_text(path: Path, text: str) -> None:
    """Writes UTF-8 text beside the file, then puts it in its place."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def replace_json(path: Path, value: object) -> None:
    """Writes a JSON value as `replace_text` does."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def exclusive(folder: Path, patience: float = 20.0) -> Iterator[None]:
    """Keeps other processes of this machine out of a folder that exists, by a lock that ends with
    this process; does nothing where folders cannot be locked.

    patience: seconds to wait for a process that is just ending.

    Raises:
      InputError: another process is still using it.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=patience, poll_interval=0.2)
    if not os.access(folder, os.W_OK):
        yield
        return
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"--workdir: another process is training in {folder}; wait for it to end, or give "
            "another folder."
        ) from None
    except (OSError, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()
