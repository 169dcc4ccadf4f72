"""Files of many documents, as corpora are published: JSON lines, plain or compressed, and Parquet,
read from their beginning; and Arrow files, as Hugging Face's `save_to_disk` writes them, read at
random. Needs no `datasets`; Zstandard, Parquet and Arrow need pyarrow.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quweit_jax.errors import InputError, first_line, require
from quweit_jax.reading import (
    check_encoding,
    clean_text,
    decode_text,
    open_regular,
    parse_json,
    read_json,
    shown,
)

# Of files that are read from their beginning alone.
STREAMED = (".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
_BUFFER = 1 << 20
_ROWS = 256  # of a Parquet file that are decoded together
_MEND = "mend it, or take it away"


def parse_line(line: bytes, column: str, where: str) -> str:
    """The text of a JSON line, {column: text, ...}; `where` names the line.

    Raises:
      InputError: it is none.
    """
    text = decode_text(line, f"data.path: {where}")
    try:
        document = parse_json(text)[column]
        if isinstance(document, str):
            return clean_text(document)
        raise TypeError
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f'data.path: expected {{"{column}": "..."}} at {where}, found {text.strip()[:60]!r}; '
            "mend that line, or name the key by --config.data.text_column."
        ) from None


class ShardedDocuments:
    """Files of documents that are read one after another, each from its beginning.

    names: paths below `root`, with '/'. column: the key or column that holds a document's text.

    Raises:
      InputError: a file cannot be read, pyarrow is not there, or a Parquet file has no such column.
    """

    def __init__(self, root: Path, names: Sequence[str], column: str):
        self.place, self._root = str(root), root
        self._names, self._column = tuple(names), column
        self._sizes = []
        for name in self._names:
            with _told(root / name), open_regular(root / name) as file:
                self._sizes.append(os.fstat(file.fileno()).st_size)
                if name.endswith((".txt", ".jsonl")):
                    check_encoding(file.read(4096), f"data.path: {shown(root / name)}")
                elif not name.endswith(".gz"):
                    require("pyarrow", f"to read {shown(name)}")
                if name.endswith(".parquet"):
                    _parquet(file, root / name, column)

    def __len__(self) -> int:
        """How many files."""
        return len(self._names)

    def part(self, files: slice) -> ShardedDocuments:
        """The same with some of the files."""
        return ShardedDocuments(self._root, self._names[files], self._column)

    def identity(self) -> str:
        """See DocumentSource."""
        return "\n".join(f"{name} {size}" for name, size in zip(self._names, self._sizes))

    def documents(self, number: int, start: int = 0) -> Iterator[str]:
        """The documents of a file, from one on; those before are hardly looked at.

        Raises:
          InputError: what is read of it is damaged, or a line is no JSON with a text.
        """
        path = self._root / self._names[number]
        with _told(path), open_regular(path) as file:
            if path.suffix == ".txt":
                texts = [decode_text(file.read(), f"data.path: {shown(path)}")]
                yield from texts[start:]
            elif path.suffix == ".parquet":
                yield from _rows(_parquet(file, path, self._column), self._column, start)
            else:
                lines = (line for line in _plain(file, path) if line.strip())
                for index, line in enumerate(itertools.islice(lines, start, None), start + 1):
                    yield parse_line(line, self._column, f"document {index} of {shown(path)}")

    def texts(self) -> Iterator[str]:
        """All documents in the order of the files."""
        for number in range(len(self)):
            yield from self.documents(number)


def _plain(file: BinaryIO, path: Path) -> BinaryIO:
    """What a file holds, decompressed while it is read."""
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER)
    if path.suffix == ".zst":
        pyarrow: Any = require("pyarrow", f"to read {shown(path)}")
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), _BUFFER)
    return file


def _parquet(file: BinaryIO, path: Path, column: str) -> Any:
    """A Parquet file that has a column of texts."""
    parquet: Any = require("pyarrow.parquet", f"to read {shown(path)}")
    found = parquet.ParquetFile(file)
    _check_column(found.schema_arrow, column, path)
    return found


def _check_column(schema: Any, column: str, path: Path) -> None:
    kinds = {field.name: str(field.type) for field in schema}
    if kinds.get(column) not in ("string", "large_string", "string_view"):
        named = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise InputError(
            f"data.text_column: expected a column of texts named '{column}' in {shown(path)}, "
            f"found {shown(named)[:300]}; name it by --config.data.text_column."
        )


def _rows(file: Any, column: str, start: int) -> Iterator[str]:
    """The texts of a Parquet file from a row on, '' where there is none; groups of rows before that
    are not decoded.
    """
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if start >= rows:
            start -= rows
            continue
        batches = file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False)
        for batch in batches:
            values = batch.column(0).slice(min(start, len(batch)))
            start = max(0, start - len(batch))
            yield from (clean_text(text or "") for text in values.to_pylist())


class ArrowDocuments:
    """A folder that `datasets.Dataset.save_to_disk` wrote, its rows read at random from mapped
    files.

    Raises:
      InputError: it is damaged, has no such column, or is empty.
    """

    def __init__(self, root: Path, column: str):
        pyarrow: Any = require("pyarrow", f"to read {shown(root)}")
        self.place, chunks, names = str(root), [], []
        for entry in read_json(root / "state.json", "data.path").get("_data_files") or []:
            name = entry.get("filename") if isinstance(entry, dict) else None
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(
                    f"data.path: {shown(root / 'state.json')} names no Arrow files; save the set "
                    "again (save_to_disk)."
                )
            path = root / name
            with _told(path):
                open_regular(path).close()
                table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
                _check_column(table.schema, column, path)
            chunks += table.column(column).chunks
            names.append(f"{name} {os.path.getsize(path)}")
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])
        self._identity = "\n".join([column, *names])
        if not self._chunks:
            raise InputError(f"data.path: expected documents in {shown(root)}, found none.")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> str:
        """See DocumentSource."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        chunk = self._chunks[number]
        return clean_text(chunk[int(index - self._ends[number]) + len(chunk)].as_py() or "")

    def identity(self) -> str:
        """See DocumentSource."""
        return self._identity


def is_saved_set(folder: Path) -> bool:
    """Whether `datasets` saved a set of one split there."""
    return os.path.isfile(folder / "state.json") and os.path.isfile(folder / "dataset_info.json")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What is wrong with a file that is being read is an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's are ValueErrors
        raise InputError(
            f"data.path: {shown(path)} cannot be read ({first_line(error)}); {_MEND}."
        ) from None
