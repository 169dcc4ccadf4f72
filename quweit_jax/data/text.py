"""Text sources: the standard library's own, a user's file, and a folder of documents."""

from __future__ import annotations

import io
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from quweit_jax.data.documents import VALIDATION_FOLDERS, DocumentSource, DocumentSplits
from quweit_jax.data.registry import DataConfig, source
from quweit_jax.data.shards import (
    STREAMED,
    ArrowDocuments,
    ShardedDocuments,
    is_saved_set,
    parse_line,
)
from quweit_jax.errors import InputError
from quweit_jax.reading import (
    check_encoding,
    decode_text,
    list_folder,
    open_regular,
    place,
    shown,
    walk,
    why,
)

_SUFFIXES = (".txt", ".jsonl", *STREAMED)


@source("python_stdlib")
def python_stdlib(config: DataConfig) -> str:
    """The .py files of the running interpreter's library, in sorted order, up to limit_bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    limit_bytes = config.limit_bytes
    pieces, total = [], 0
    for path in _python_files(root):
        try:
            # A byte order mark stays: runs that began with it go on with the same text.
            with io.TextIOWrapper(open_regular(path), encoding="utf-8") as file:
                text = file.read()
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
    found = list_folder(folder, "python_stdlib")
    for entry in sorted(found, key=lambda e: f"{e.name}/" if e.is_dir() else e.name):
        if entry.is_dir():
            if entry.name not in ("site-packages", "dist-packages"):
                yield from _python_files(Path(entry.path))
        elif entry.name.endswith(".py"):
            yield Path(entry.path)


@source("text_file")
def text_file(config: DataConfig) -> str:
    """A user's own UTF-8 text at `path`."""
    path, limit = config.path, config.limit_bytes
    if not path:
        raise InputError(
            "data.path: expected the path of a text file for data.source=text_file, found nothing; "
            "add --config.data.path=FILE."
        )
    try:
        with open_regular(place(path)) as file:
            # Two bytes of a line end become one; the last character may be cut.
            data = file.read(2 * limit + 8) if limit else file.read()
            whole = not file.read(1)
    except FileNotFoundError:
        raise InputError(f"data.path: no file at {shown(path)}; check the path.") from None
    except OSError as error:
        raise _unreadable(place(path), error) from None
    return _cut(decode_text(data, f"data.path: {shown(path)}", strict=True, whole=whole), limit)


def _cut(text: str, limit_bytes: int) -> str:
    return (
        text.encode("utf-8")[:limit_bytes].decode("utf-8", errors="ignore") if limit_bytes else text
    )


class FolderDocuments:
    """A folder's .txt files (a document each) and .jsonl files (a document a line, {column: text}),
    in the order of their paths.

    names: the files, by their paths below the folder.

    Raises:
      InputError: there are none, or one cannot be read; a line is not JSON with a text (when it is
        read).
    """

    def __init__(self, root: Path, names: Sequence[str], column: str = "text"):
        self.place, self._root = str(root), root
        self._names, self._column = names, column
        found = [_documents_of(root / name) for name in self._names]
        self._sizes, self._starts = [size for size, _ in found], [starts for _, starts in found]
        self._ends = np.cumsum([len(starts) for starts in self._starts])
        if not len(self):
            raise _no_documents(root)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> str:
        """See DocumentSource."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        path = self._root / self._names[number]
        start = int(self._starts[number][index - self._ends[number]])
        is_text = path.suffix == ".txt"
        try:
            with open_regular(path) as file:
                file.seek(start)
                data = file.read() if is_text else file.readline()
        except OSError as error:
            raise _unreadable(path, error) from None
        if is_text:
            return decode_text(data, f"data.path: {shown(path)}")
        return parse_line(data, self._column, f"byte {start} of {shown(path)}")

    def identity(self) -> str:
        """See DocumentSource."""
        return "\n".join(f"{name} {size}" for name, size in zip(self._names, self._sizes))


def _no_documents(root: Path) -> InputError:
    return InputError(
        f"data.path: expected documents (files ending in {', '.join(_SUFFIXES)}) in {shown(root)}, "
        "found none; check the folder."
    )


def _folder(root: Path, column: str) -> DocumentSource | ShardedDocuments:
    """What a folder holds: a set that `datasets` saved, files that are read at random, or, if one
    of them cannot be, files that are read from their beginning.
    """
    if is_saved_set(root):
        return ArrowDocuments(root, column)
    names = []
    for name, is_file in walk(root, _SUFFIXES, "data.path"):
        if not is_file:
            raise InputError(
                f"data.path: expected a file at {shown(root / name)}, found a pipe, a device "
                "or a link to nothing; take it away."
            )
        names.append(name)
    if not names:
        raise _no_documents(root)
    if any(name.endswith(STREAMED) for name in names):
        return ShardedDocuments(root, names, column)
    return FolderDocuments(root, names, column)


def _documents_of(path: Path) -> tuple[int, np.ndarray]:
    """A file's size in bytes, and where its documents begin."""
    try:
        with open_regular(path) as file:
            begin, size = file.read(4096), os.fstat(file.fileno()).st_size
            check_encoding(begin, f"data.path: {shown(path)}")
            if path.suffix == ".txt":
                return size, np.zeros(1, np.int64)
            file.seek(0)
            return size, np.fromiter(_line_starts(file), np.int64)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"data.path: {shown(path)} cannot be read ({why(error)}); mend it, or take it away."
    )


def _line_starts(file: BinaryIO) -> Iterator[int]:
    """Where the lines begin that are not empty."""
    start = 0
    for line in file:
        if line.strip():
            yield start
        start += len(line)


@source("document_folder")
def document_folder(config: DataConfig) -> DocumentSplits:
    """Documents of a folder: FOLDER/train beside FOLDER/validation (or val, or test), or FOLDER
    alone. In each: .txt files (a document each); JSON lines (.jsonl, .jsonl.gz, .json.gz,
    .jsonl.zst, .json.zst) and .parquet, a document a line or row; or what Hugging Face's `datasets`
    saved to disk.
    """
    path, validation = config.path, config.validation_split
    column = config.text_column
    root = place(path)
    if not path or not os.path.isdir(root):
        raise InputError(
            "data.path: expected a folder of documents for data.source=document_folder, found "
            f"'{shown(path) or 'nothing'}'; check the path."
        )
    if not os.path.isdir(root / "train"):
        if validation:
            raise InputError(
                f"data.validation_split: {root} has no folder 'train' beside '{validation}'; give "
                "it one, or leave the split out."
            )
        return DocumentSplits(_folder(root, column), None)
    beside = [
        name
        for name in ([validation] if validation else VALIDATION_FOLDERS)
        if os.path.isdir(root / name)
    ]
    if validation and not beside:
        raise InputError(
            f"data.validation_split: no folder '{validation}' in {root}; leave it out for "
            f"{', '.join(VALIDATION_FOLDERS)}."
        )
    held_out = _folder(root / beside[0], column) if beside else None
    return DocumentSplits(_folder(root / "train", column), held_out)
