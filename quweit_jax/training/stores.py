"""Run directories and files in stores of objects, gs://BUCKET/... and s3://BUCKET/..., by their
copies on this machine: what is there is brought here first, and what a run saves is taken there
whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from quweit_jax.errors import InputError, RunError, first_line, require
from quweit_jax.ops.kernels.native.build import cache_folder
from quweit_jax.reading import read_json
from quweit_jax.training import files
from quweit_jax.training.hosts import SharedError

# The package that serves a scheme, by fsspec.
_SERVED = {"gs": "gcsfs", "s3": "s3fs"}
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://[^/]+/.")
_KNOWN = ".store.json"  # what the store held when both were last alike: {name: [size, tag]}


def is_address(path: str) -> bool:
    """Whether a path names something in a store that may be served."""
    found = _ADDRESS.match(path)
    return found is not None and found[1] in _SERVED


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
        digest = hashlib.sha256(self.address.encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9_.=+-]", "-", self.address.rpartition("/")[2])[:100]
        self.local = cache_folder() / "copies" / digest / purpose / name

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
                self.local.parent.mkdir(parents=True, exist_ok=True)
                self._store.get_file(self._root, str(self.local))
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
            files.replace_json(self.local / _KNOWN, there)
        return self.local

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
    return ({"checkpoints": 1, "checksums": 2}.get(top, 0), name)


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
    with files.exclusive(copy.local.parent):
        found = copy.pull()
    if found.is_dir() and not any(copy.names()):
        raise InputError(f"{what}: nothing at {path}; check the address.")
    return found


@contextlib.contextmanager
def mirrored(address: str) -> Iterator[Copy]:
    """A run directory in a store to train in, its copy here brought up to date; other trainers of
    this machine are kept out of it.

    Raises:
      InputError: several processes train, which need one folder that all of them reach; or the
        store cannot be read.
    """
    if jax.process_count() > 1:
        raise SharedError(
            f"--workdir: expected a folder that all {jax.process_count()} processes reach, found "
            f"{address}; use a file system that is mounted on every host, and copy it."
        )
    copy = Copy(address, "--workdir", "train")
    files.make_workdir(copy.local.parent)
    with files.exclusive(copy.local.parent):
        copy.pull()
        yield copy
