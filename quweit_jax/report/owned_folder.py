"""A folder of files that may be written again, but never over anything else.

A list of what was written, `report.json`, lies beside the files. A folder that has one may be
written to again: the files it lists are replaced, or removed if the new report has no such file.
Other files are left alone, and stop the writing if they are in the way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from quweit_jax.errors import InputError
from quweit_jax.reading import read_json, why
from quweit_jax.training.files import is_empty

LIST = "report.json"
_AUTHOR = "quweit_jax.report"


def check(folder: Path) -> list[str]:
    """The names of the files that an earlier report wrote to a folder; call it before the work.

    Raises:
      InputError: it is a file, holds files but no report's list, or that list cannot be read.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise InputError(f"--out: {folder} is a file; give a folder.")
    path = folder / LIST
    if not os.path.lexists(path):
        if os.path.isdir(folder) and _is_filled(folder):
            raise InputError(
                f"--out: {folder} holds files and no {LIST}, so no report wrote them; give a new "
                "or empty folder."
            )
        return []
    try:
        written = read_json(path, "--out")
    except InputError:
        written = {}
    names = written.get("files") if written.get("written_by") == _AUTHOR else None
    if not isinstance(names, list) or not all(
        isinstance(name, str) and "\0" not in name and Path(name).name == name for name in names
    ):
        raise InputError(
            f"--out: {path} is not the list of an earlier report's files; give a new or empty "
            "folder, or remove that file."
        )
    return names


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files in the place of those an earlier report wrote.

    Raises:
      InputError: see `check`; or a file that no report wrote has the name of one of these.
    """
    before = check(folder)
    for name in files:
        # Reports write plain files; what a link leads to is another's.
        plain = os.path.isfile(folder / name) and not os.path.islink(folder / name)
        if os.path.lexists(folder / name) and not (name in before and plain):
            raise InputError(
                f"--out: {folder / name} is there, and no report wrote it; move it away, or give "
                "another folder."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First the list, of old and new: wherever this is stopped, the next report may go on.
        _list(folder, [*dict.fromkeys([*before, *files])])
        for name, content in files.items():
            (folder / name).write_bytes(content)
        for name in set(before) - set(files):
            (folder / name).unlink(missing_ok=True)
        _list(folder, [*files])
    except OSError as error:
        raise InputError(
            f"--out: cannot write to {folder} ({why(error)}); give a folder you can write to."
        ) from None


def _is_filled(folder: Path) -> bool:
    try:
        return not is_empty(folder)
    except OSError as error:
        raise InputError(f"--out: cannot read {folder} ({why(error)}); give another.") from None


def _list(folder: Path, names: list[str]) -> None:
    text = json.dumps({"written_by": _AUTHOR, "files": names}, indent=1)
    (folder / LIST).write_text(text + "\n", encoding="utf-8")
