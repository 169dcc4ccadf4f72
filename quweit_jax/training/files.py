"""Files that are whole or not there, whenever the program is killed, and folders that one process
at a time writes to.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from quweit_jax.errors import InputError, needed
from quweit_jax.reading import is_hidden, open_regular

with needed("to train"):
    import filelock

LOCK = ".lock"


def replace_text(path: Path, text: str) -> None:
    """Writes UTF-8 text beside the file, forces it to disk, then puts it in the file's place."""
    temporary = path.with_suffix(".tmp")
    # What an earlier program left there is never written to: it may be a pipe that waits, or a link
    # to another file.
    temporary.unlink(missing_ok=True)
    with temporary.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def replace_json(path: Path, value: object) -> None:
    """Writes a JSON value as `replace_text` does."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Forces to disk what a file holds, or the names in a folder where a system can do that."""
    try:
        # A pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if path.is_file():
            raise


def is_empty(folder: Path, besides: Collection[str] = ()) -> bool:
    """Whether a folder holds nothing that anybody put there: what `reading.is_hidden` names and the
    names in `besides` do not count.
    """
    return all(is_hidden(path.name) or path.name in besides for path in folder.iterdir())


def make_workdir(folder: Path) -> None:
    """Makes a folder, and those above it, if they are not there.

    Raises:
      InputError: that is not possible; calls it --workdir.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--workdir: cannot make {folder} ({error.strerror}); give a folder you can write to."
        ) from None


@contextlib.contextmanager
def exclusive(folder: Path, patience: float = 20.0) -> Iterator[None]:
    """Keeps other processes of this machine out of a folder that exists, by a lock that ends with
    this process; does nothing where folders cannot be locked.

    patience: seconds to wait for a process that is just ending.

    Raises:
      InputError: another process is still using it.
    """
    if not os.access(folder, os.W_OK):
        yield
        return
    # A lock that is only a file would outlive a process that is killed, and keep all others out.
    lock = filelock.FileLock(
        folder / LOCK, timeout=patience, poll_interval=0.2, fallback_to_soft=False
    )
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


def in_use(folder: Path) -> bool:
    """Whether a process of this machine holds `exclusive` of a folder; nothing is written there."""
    try:
        import fcntl

        with open_regular(folder / LOCK) as file:  # closing it gives back a lock that was free
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # no lock was ever made there, or none can be
        return False
    return False
