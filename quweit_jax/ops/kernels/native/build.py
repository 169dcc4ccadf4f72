"""Compiling the native library: once a source, jaxlib and compiler, into the user's cache folder.

A library is written beside its place and moved there, so that it is whole or absent whoever else
compiles it at the same moment. Beside it lies the hash of its bytes: what does not fit is compiled
again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax.ffi
import jaxlib.version

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("g++", "clang++")
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")
_SECONDS = 600  # that a compiler may take


class NoCompilerError(Exception):
    """There is no C++ compiler."""


class CompileError(Exception):
    """The compiler failed, or its result could not be kept anywhere."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/quweit_jax, by default ~/.cache/quweit_jax."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base) / "quweit_jax"


def find_compiler() -> str:
    """The path of $CXX, or of the first of COMPILERS there is.

    Raises:
      NoCompilerError: there is none.
    """
    asked = os.environ.get("CXX", "")
    for name in (asked,) if asked else COMPILERS:
        if path := shutil.which(name):
            return path
    raise NoCompilerError(f"no C++ compiler ({asked or ' or '.join(COMPILERS)})")


def library() -> tuple[Path, str]:
    """The compiled library and the hash of what it was made of, compiled if it is not there.

    Where the cache folder cannot be written to, it is compiled into a temporary one, which is left
    to the system to clear.

    Raises:
      NoCompilerError: there is no compiler.
      CompileError: it failed.
    """
    compiler = find_compiler()
    made_of = _made_of(compiler)
    name = f"native-{made_of}.so"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_whole(folder / name):
            _compile(compiler, folder / name)
    except (OSError, RuntimeError):  # no such home, read-only, full
        folder = Path(tempfile.mkdtemp(prefix="quweit_jax-"))
        _compile(compiler, folder / name)
    return folder / name, made_of


@functools.cache
def _version(compiler: str) -> str:
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{compiler} does not run ({error})") from None
    return said.stdout


def _made_of(compiler: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    facts = (jaxlib.version.__version__, _version(compiler), platform.machine(), *OPTIONS)
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    try:
        return path.with_suffix(".sha256").read_text().strip() == _sum(path)
    except (OSError, UnicodeDecodeError):
        return False


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compile(compiler: str, target: Path) -> None:
    """Compiles the sources into `target`, whoever else does so, too."""
    # In a folder of its own, and gone with it, however this ends.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="compiling-") as place:
        made = Path(place) / target.name
        command = [compiler, *OPTIONS, f"-isystem{jax.ffi.include_dir()}"]
        try:
            done = subprocess.run(
                [*command, str(SOURCES / "handlers.cc"), "-o", str(made)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                env={**os.environ, "LC_ALL": "C", "TMPDIR": place},
            )
        except subprocess.TimeoutExpired:
            raise CompileError(f"{compiler} took more than {_SECONDS} s") from None
        if done.returncode or not made.exists():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in said if "error" in line] or said or ["no message"]
            raise CompileError(f"{compiler} failed: {errors[0].strip()}")
        made.with_suffix(".sha256").write_text(_sum(made))
        # Where two did so at once and their bytes differ, the hash may be the other's: the library
        # is then compiled once more, by the next process.
        os.replace(made, target)
        os.replace(made.with_suffix(".sha256"), target.with_suffix(".sha256"))
