"""Run directories and files in stores of objects, gs://BUCKET/... and s3://BUCKET/..., by their
copies on this machine: what is there is brought here first, and what a run saves is taken there
whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from quweit_jax.errors import InputError, RunError, first_line, require
from quweit_jax.ops.kernels.native.build import cache_folder
from quweit_jax.reading import read_json
from quweit_jax.training import files

# The package that serves a scheme, by fsspec.
_SERVED = {"gs": "gcsfs", "s3": "s3fs"}
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://[^/]+/.")
# Without these nobody takes what lies beside them for whole; they are the last to be written.
_LAST = ("checksums", "model.json")
_FOREVER = -1.0  # what another process brings is waited for
_KNOWN = ".store.json"  # what the store held when both were last alike: {name: [size, tag]}


def is_address(path: str) -> bool:
    """Whether a path names something in a store that may be served."""
    found = _ADDRESS.match(path)
    return found is not None and found[1] in _SERVED


def place_of(address: str, purpose: str = "read") -> Path:
    """Where the copy of what is at an address lies on this machine."""
    address = address.rstrip("/")
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9_.=+-]", "-", address.rpartition("/")[2])[:100]
    return cache_folder() / "copies" / digest / purpose / name


class Copy:
    """A folder or file in a store and its copy on this machine, in the user's cache folder.

    what: the option that names it, for messages. purpose: copies for another are apart.

    Raises:
      InputError: the package that serves the store is not there.
    """

    def __init__(self, address: str, what: str, purpose: str):
        self.address, self.what = address.rstrip("/"), what
        package = _SERVED[address.partition(":")[0]]
        require(package, f"for {what}={address}")
        fsspec: Any = require("fsspec", f"for {what}={address}")
        with self._told(InputError):
            self._store, self._root = fsspec.core.url_to_fs(self.address)
        self.local = place_of(address, purpose)

    def _told(self, kind: type[Exception]) -> _Told:
        return _Told(self, kind)

    def _there(self) -> dict[str, list[object]]:
        """{name below the address: [size, a tag that differs for other content]}."""
        self._store.invalidate_cache()
        found = self._store.find(self._root, detail=True)
        tags = ("etag", "ETag", "md5Hash", "generation", "mtime", "created")
        return {
            path[len(self._root) :].lstrip("/"): [
                info["size"],
                str(next((info[tag] for tag in tags if info.get(tag)), "")),
            ]
            for path, info in found.items()
            if info.get("type", "file") == "file"
        }

    def pull(self) -> Path:
        """Makes the copy here what is in the store; where that is.

        Raises:
          InputError: the store cannot be read.
        """
        with self._told(InputError):
            there = self._there()
            if "" in there:  # a file, not a folder
                self.pull_file(self.local)
                return self.local
            self.local.mkdir(parents=True, exist_ok=True)
            for name, path in self._here():
                if not self._same(name, path, there):
                    path.unlink()
            for name in there:
                path = self.local / name
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    part = path.with_name(f"{path.name}.part")  # whole or not at all
                    self._store.get_file(f"{self._root}/{name}", str(part))
                    part.replace(path)
            self._remove_empty()
            if there:
                files.replace_json(self.local / _KNOWN, there)
            else:
                (self.local / _KNOWN).unlink(missing_ok=True)
        return self.local

    def pull_file(self, path: Path) -> bool:
        """Brings the file beside the address that has this path's suffix, if there is one."""
        with self._told(InputError):
            name = self._beside(path)
            self._store.invalidate_cache()
            if not self._store.isfile(name):
                path.unlink(missing_ok=True)
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part")  # whole or not at all
            self._store.get_file(name, str(part))
            part.replace(path)
        return True

    def push_file(self, path: Path) -> None:
        """Takes a file there, beside the address with this path's suffix."""
        with self._told(RunError):
            self._store.put_file(str(path), self._beside(path))

    def _beside(self, path: Path) -> str:
        return self._root if path == self.local else str(Path(self._root).with_suffix(path.suffix))

    def push(self) -> None:
        """Makes the store hold what is here: a run's own files, then its checkpoints, and only then
        the checksums by which a checkpoint counts as whole; what is gone here goes last.

        Raises:
          RunError: the store cannot be written to; all is still here.
        """
        with self._told(RunError):
            there, here = self._there(), dict(self._here())
            for name in sorted(here, key=_order):
                if not self._same(name, here[name], there):
                    self._store.put_file(str(here[name]), f"{self._root}/{name}")
            for name in sorted(there.keys() - here.keys(), key=_order, reverse=True):
                self._store.rm_file(f"{self._root}/{name}")
            files.replace_json(self.local / _KNOWN, self._there())

    def _same(self, name: str, path: Path, there: dict[str, list[object]]) -> bool:
        """Whether neither side of a file has changed since both were alike."""
        noted = self.local / _KNOWN
        try:
            known = read_json(noted, self.what).get(name)
            changed = path.stat().st_mtime_ns >= noted.stat().st_mtime_ns
        except (InputError, OSError):
            return False
        return known is not None and known == there.get(name) and not changed

    def names(self) -> list[str]:
        """The files here, by their paths below the folder."""
        return [name for name, _ in self._here()]

    def _here(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self.local.rglob("*")):
            if path.is_file() and path.name not in (_KNOWN, files.LOCK):
                yield path.relative_to(self.local).as_posix(), path

    def _remove_empty(self) -> None:
        """Folders of checkpoints that are gone; a store has no empty ones."""
        for folder in sorted((p for p in self.local.rglob("*") if p.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()


def _order(name: str) -> tuple[int, str]:
    top = name.partition("/")[0]
    return (2 if top in _LAST else int(top == "checkpoints"), name)


class _Told:
    """A context manager: what a store refuses is an error that names the address."""

    def __init__(self, copy: Copy, kind: type[Exception]):
        self.copy, self.kind = copy, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: Any, *_: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        kept = "" if self.kind is InputError else f"; what was written is in {self.copy.local}"
        raise self.kind(
            f"{self.copy.what}: {self.copy.address} cannot be "
            f"{'read' if self.kind is InputError else 'written'} ({type(error).__name__}: "
            f"{first_line(error)}){kept}. Check the address, the credentials and the connection."
        ) from error


def fetched(path: str, what: str = "--workdir") -> Path:
    """A path as it is, and of an address a copy of what is there.

    Raises:
      InputError: there is nothing, or it cannot be read.
    """
    if not is_address(path):
        return Path(path)
    copy = Copy(path, what, "read")
    files.make_workdir(copy.local.parent)
    with files.exclusive(copy.local.parent, patience=_FOREVER):
        found = copy.pull()
    if found.is_dir() and not any(copy.names()):
        raise InputError(f"{what}: nothing at {path}; check the address.")
    return found


@contextlib.contextmanager
def written(path: str, beside: Sequence[str] | None = None, what: str = "--out") -> Iterator[Path]:
    """Where to write what is to be at a path: that path, and of an address a copy of what is there,
    which is taken there once the block has ended well.

    beside: None for a folder; of a file the suffixes of those that belong to it, to be written
      after it.

    Raises:
      InputError: the store cannot be read. RunError: it cannot be written to.
    """
    if not is_address(path):
        yield Path(path)
        return
    copy = Copy(path, what, "write")
    files.make_workdir(copy.local.parent)
    with files.exclusive(copy.local.parent, patience=_FOREVER):
        if beside is None:
            copy.pull()
            copy.local.mkdir(exist_ok=True)
            yield copy.local
            copy.push()
        else:
            each = [copy.local, *(copy.local.with_suffix(suffix) for suffix in beside)]
            for file in each:
                copy.pull_file(file)
            yield copy.local
            for file in each:
                copy.push_file(file)


def brought(data: Mapping[str, Any], *, reads: bool) -> dict[str, Any]:
    """The section `data` of a config with paths of this machine in the place of addresses; what is
    there is brought here, if it is to be read.

    Raises:
      InputError: see `fetched`.
    """
    found = dict(data)
    for key in ("path", "tokenizer_path"):
        address = found.get(key)
        if isinstance(address, str) and is_address(address):
            place = fetched(address, f"data.{key}") if reads else place_of(address)
            found[key] = str(place)
    return found


@contextlib.contextmanager
def mirrored(address: str) -> Iterator[Copy]:
    """A run directory in a store to train in, its copy here brought up to date; other trainers of
    this machine are kept out of it. Of several processes each has a copy of its own.

    Raises:
      InputError: the store cannot be read.
    """
    number = jax.process_index()
    copy = Copy(address, "--workdir", f"train-{number}" if number else "train")
    files.make_workdir(copy.local.parent)
    with files.exclusive(copy.local.parent):
        copy.pull()
        yield copy
