"""Files from outside, read with care: only regular ones, so that nothing hangs on a pipe; text as
Unicode that every later step can write; JSON whose damage is told in a sentence.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from quweit_jax.errors import InputError, first_line

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# What programs put beside a user's files: file systems, macOS's archives, Windows and Synology's
# and QNAP's servers.
_CLUTTER = ("lost+found", "__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "#recycle") + (
    "System Volume Information",
    "@eaDir",
    "@Recycle",
)
_SCHEMES = [
    f"{name}:" for name in ("gs", "s3", "az", "hf", "abfs", "file", "hdfs", "http", "https")
]
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # with which UTF-32 begins too, or almost
_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = bytes({*range(32)} - {*b"\t\n\f\r\x1b"})
# Our own files have a depth below ten; writing and comparing deeper values would end in recursion.
_DEPTH = 100
_LARGEST = 1e39  # somewhat above float32's


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading its bytes; never waits.

    Raises:
      OSError: it cannot be read, or is no file: a folder, a pipe, a device, a loop of links.
    """
    try:
        _check_regular(os.stat(path).st_mode)
        # What has become a pipe in the meantime doesn't wait for a writer either.
        number = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
    except ValueError as error:  # a name with a null character
        raise OSError(None, str(error)) from None
    try:
        _check_regular(os.fstat(number).st_mode)
    except OSError:
        os.close(number)
        raise
    return os.fdopen(number, "rb")


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        found = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise OSError(None, f"{found}, not a file")


def place(path: str) -> Path:
    """A path given by a person, with their home folder for '~'. Ask `os.path` about it: unlike
    `Path`, it has an answer for every name.
    """
    return Path(os.path.expanduser(path))


def check_local(path: Path | str, what: str, advice: str) -> None:
    """Raises InputError, `advice` at its end, for what is the address of a store and no path of a
    file system, such as gs://bucket/run.
    """
    if scheme := next((part for part in Path(path).parts if part in _SCHEMES), None):
        raise InputError(
            f"{what}: expected a file or folder of this machine, found {scheme}//...; {advice}."
        )


def why(error: OSError) -> str:
    """What the system says is wrong with a file, without its name."""
    return error.strerror or first_line(error) or type(error).__name__


def read_bytes(path: Path, what: str) -> bytes:
    """The content of a regular file; `what` begins the message.

    Raises:
      InputError: it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{what}: {shown(path)} cannot be read ({why(error)}).") from None


def shown(path: object) -> str:
    """A path for a message: on one line, in letters that can be written anywhere."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(path))


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, which no encoding can write."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def clean_text(text: str) -> str:
    """A text as every source gives it: line ends are '\\n', no byte order mark stands at its
    beginning, and what is no character is U+FFFD.
    """
    text = without_surrogates(text.removeprefix("\ufeff"))
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decode_text(data: bytes, where: str, *, strict: bool = False, whole: bool = True) -> str:
    """Bytes of UTF-8 as clean text.

    where: names the text in messages. strict: refuse bytes that are not UTF-8, which else become
      U+FFFD. whole: False for the beginning of a longer text, whose last character may be cut.

    Raises:
      InputError: `strict`, and it is another encoding.
    """
    if strict:
        check_encoding(data, where)
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if strict else "replace")
    try:
        return clean_text(decoder.decode(data, final=whole))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error.start) from None


def check_encoding(data: bytes, where: str) -> None:
    """Raises InputError if a text begins as UTF-16 does, as one of the old encodings of eight bits,
    or as no text at all.
    """
    begin = data[:4096]
    decoded = codecs.getincrementaldecoder("utf-8")("replace").decode(begin)
    odd = len(begin) - len(begin.translate(None, _CONTROLS)) + decoded.count("\ufffd")
    if begin.startswith(_WIDE) or odd > max(4, 0.3 * len(begin)):
        raise _not_utf8(where, 0)


def _not_utf8(where: str, byte: int) -> InputError:
    return InputError(
        f"{where} is not UTF-8 text (byte {byte}); convert it first, if it is a text (UTF-16?)."
    )


def parse_json(data: bytes | str) -> Any:
    """A JSON value, its texts without halves of surrogate pairs.

    Raises:
      ValueError: it is none, is nested too deeply, or holds a number of absurd length.
    """
    try:
        text = data if isinstance(data, str) else decode_text(data, "its text", strict=True)
        return _checked(json.loads(text), _DEPTH)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _checked(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, dict | list) and not depth:
        raise ValueError(f"it is nested more than {_DEPTH} deep")
    if isinstance(value, dict):
        return {without_surrogates(k): _checked(v, depth - 1) for k, v in value.items()}
    return [_checked(v, depth - 1) for v in value] if isinstance(value, list) else value


def read_json(path: Path, what: str, advice: str = "mend it, or put a whole copy there") -> Any:
    """The JSON object in a file, {names: values}; `what` begins the message, `advice` ends it.

    Raises:
      InputError: it cannot be read, is no JSON, or another value than an object.
    """
    data = read_bytes(path, what)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise InputError(
            f"{what}: {shown(path)} is damaged, {shown(path.name)} is not JSON "
            f"({first_line(error)}); {advice}."
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{what}: {shown(path)} is damaged: expected an object of names and values, found "
            f"{kind_of(value)}; {advice}."
        )
    return value


def kind_of(value: object) -> str:
    """What a JSON value is, for messages: 'a list', 'the number 3'."""
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return "nothing (null)" if value is None else str(value).lower()
    return f"the number {value:.6g}" if is_number(value) else "a number out of range"


def is_number(value: object) -> bool:
    """Whether a JSON value is a number, infinite or none (NaN) perhaps, but no absurd one."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_LARGEST < value < _LARGEST or (isinstance(value, float) and not math.isfinite(value))


def is_whole(value: object) -> bool:
    """Whether a JSON value is a whole number from 0 that every array can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's data: '.ipynb_checkpoints', '._photo.jpg', and
    what archives, desktops and file servers add: '__MACOSX', '@eaDir' with its thumbnails.
    """
    return name.startswith(".") or name in _CLUTTER


def walk(
    root: Path, suffixes: Collection[str], what: str, *, lower: bool = False
) -> Iterator[tuple[str, bool]]:
    """The files below a folder whose names end so: (path below it with '/', whether it is a regular
    file), in an order that depends on names alone.

    Hidden names are left out at every depth. Links are followed; a folder is entered once, so links
    that lead back end there. lower: 'X.JPG' ends in '.jpg'.

    Raises:
      InputError: a folder cannot be read.
    """
    ends, seen = tuple(suffixes), set()

    def below(folder: Path, prefix: str) -> Iterator[tuple[str, bool]]:
        entries = list_folder(folder, what)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if _is(entry.is_dir):
                yield from below(Path(entry.path), f"{prefix}{entry.name}/")
            elif (entry.name.lower() if lower else entry.name).endswith(ends):
                yield prefix + entry.name, _is(entry.is_file)

    yield from below(root, "")


def check_readable(folder: Path, what: str) -> None:
    """Raises InputError for a folder whose content may not be looked at, which seems empty else."""
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{what}: {shown(folder)} cannot be read (Permission denied).")


def list_folder(folder: Path, what: str) -> list[os.DirEntry[str]]:
    """A folder's entries by name, without the hidden ones.

    Raises:
      InputError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: e.name)
    except OSError as error:
        raise InputError(f"{what}: {shown(folder)} cannot be read ({why(error)}).") from None


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a loop of links
        return False
