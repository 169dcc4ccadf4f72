"""Files that are whole or not there, whenever the program is killed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quweit_jax.errors import InputError


def replace_text(path: Path, text: str) -> None:
    """Writes UTF-8 text beside the file, then puts it in its place."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def replace_json(path: Path, value: Any) -> None:
    """The same for a JSON value."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def sole_user(folder: Path, patience: float = 20.0) -> Iterator[None]:
    """Keeps other processes of this machine out of a folder that exists; where folders cannot be
    locked, does nothing.

    patience: seconds to wait for one that is just ending.

    Raises:
      InputError: another process is still using it.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"--workdir: another process is training in {folder}; wait for it to end, "
                        "or give another folder."
                    ) from None
                time.sleep(0.2)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield
    finally:
        os.close(handle)
