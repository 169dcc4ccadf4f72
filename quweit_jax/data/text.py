"""Text sources: the standard library's own, a user's file, and a folder of documents."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quweit_jax.data.documents import VALIDATION_FOLDERS, DocumentSplits
from quweit_jax.data.registry import DataConfig, source
from quweit_jax.errors import InputError

_SUFFIXES = (".txt", ".jsonl")


@source("python_stdlib")
def python_stdlib(config: DataConfig) -> str:
    """The .py files of the running interpreter's library, in sorted order, up to limit_bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    limit_bytes = config.limit_bytes
    pieces, total = [], 0
    for path in _python_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few of CPython's own tests are deliberately in other encodings
        pieces.append(text)
        total += len(text.encode("utf-8"))
        if limit_bytes and total >= limit_bytes:
            break
    if not pieces:
        raise InputError(
            f"python_stdlib: no .py files under {root} (a frozen interpreter?); use "
            "--config.data.source=text_file with a path."
        )
    return _cut("".join(pieces), limit_bytes)


def _python_files(folder: Path) -> Iterator[Path]:
    """The .py files below a folder, but for installed packages, in the order of their paths; walked
    only as far as they are asked for.
    """
    for entry in sorted(os.scandir(folder), key=lambda e: f"{e.name}/" if e.is_dir() else e.name):
        if entry.is_dir():
            if entry.name not in ("site-packages", "dist-packages"):
                yield from _python_files(Path(entry.path))
        elif entry.name.endswith(".py"):
            yield Path(entry.path)


@source("text_file")
def text_file(config: DataConfig) -> str:
    """A user's own UTF-8 text at `path`."""
    path = config.path
    if not path:
        raise InputError(
            "data.path: expected the path of a text file for data.source=text_file, found nothing; "
            "add --config.data.path=FILE."
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"data.path: no file at {path}; check the path.")
    try:
        return _cut(file.read_text(encoding="utf-8"), config.limit_bytes)
    except UnicodeDecodeError as error:
        raise InputError(
            f"data.path: {path} is not UTF-8 text (byte {error.start}); convert it first."
        ) from None


def _cut(text: str, limit_bytes: int) -> str:
    return (
        text.encode("utf-8")[:limit_bytes].decode("utf-8", errors="ignore") if limit_bytes else text
    )


class FolderDocuments:
    """A folder's .txt files (a document each) and .jsonl files (a document a line, {"text": ...}),
    in the order of their paths.

    Raises:
      InputError: there are none; a line is not JSON with a text (when it is read).
    """

    def __init__(self, root: Path):
        self.place, self._root = str(root), root
        self._files = sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        self._starts = [
            np.asarray([0] if path.suffix == ".txt" else list(_line_starts(path)), np.int64)
            for path in self._files
        ]
        self._ends = np.cumsum([len(starts) for starts in self._starts])
        if not len(self):
            raise InputError(
                f"data.path: expected documents (files ending in {' or '.join(_SUFFIXES)}) in "
                f"{root}, found none; check the folder."
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> str:
        """See DocumentSource."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        path, start = self._files[number], int(self._starts[number][index - self._ends[number]])
        with path.open("rb") as file:
            file.seek(start)
            data = file.read() if path.suffix == ".txt" else file.readline()
        text = data.decode("utf-8", errors="replace")
        if path.suffix == ".txt":
            return text
        try:
            document = json.loads(text)["text"]
            if isinstance(document, str):
                return document
            raise TypeError
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f'data.path: expected {{"text": "..."}} at byte {start} of {path}, found '
                f"{text.strip()[:60]!r}; mend that line."
            ) from None

    def identity(self) -> str:
        """See DocumentSource."""
        return "\n".join(
            f"{path.relative_to(self._root).as_posix()} {path.stat().st_size}"
            for path in self._files
        )


def _line_starts(path: Path) -> Iterator[int]:
    """Where the lines begin that are not empty."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield start
            start += len(line)


@source("document_folder")
def document_folder(config: DataConfig) -> DocumentSplits:
    """Documents of a folder: FOLDER/train beside FOLDER/validation (or val, or test), or FOLDER
    alone.
    """
    path, validation = config.path, config.validation_split
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise InputError(
            "data.path: expected a folder of documents for data.source=document_folder, found "
            f"{path or 'nothing'!r}; check the path."
        )
    if not (root / "train").is_dir():
        if validation:
            raise InputError(
                f"data.validation_split: {root} has no folder 'train' beside '{validation}'; give "
                "it one, or leave the split out."
            )
        return DocumentSplits(FolderDocuments(root), None)
    beside = [
        name
        for name in ([validation] if validation else VALIDATION_FOLDERS)
        if (root / name).is_dir()
    ]
    if validation and not beside:
        raise InputError(
            f"data.validation_split: no folder '{validation}' in {root}; leave it out for "
            f"{', '.join(VALIDATION_FOLDERS)}."
        )
    return DocumentSplits(
        FolderDocuments(root / "train"), FolderDocuments(root / beside[0]) if beside else None
    )
