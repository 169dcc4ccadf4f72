"""The native library of this process: loaded and registered with XLA at its first use.

QUWEIT_NATIVE=0 leaves it alone; 'portable', 'avx2' and 'avx512' limit the instructions it uses, by
default the widest that the processor has.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from quweit_jax.errors import InputError
from quweit_jax.ops.kernels.native import build

LEVELS = ("portable", "avx2", "avx512")
HANDLERS = (
    "ternary",
    "glu",
    "vectors",
    "digits",
    "glu_forward",
    "glu_backward",
    "bit_sums",
    "bit_counts",
    "lut_forward",
    "lut_backward",
    "turn",
)
VARIABLE = "QUWEIT_NATIVE"
_OFF, _ON = ("0", "off", "false", "no"), ("", "1", "on", "true", "yes")
_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Library:
    """A loaded library. name: of the hash in its handlers' names, so that no program compiled for
    one library is run with another.
    """

    path: Path
    name: str
    code: ctypes.CDLL

    def target(self, handler: str) -> str:
        """The name that XLA knows a handler by."""
        return f"quweit_{handler}_{self.name}"

    def use(self, level: str) -> str:
        """Limits the instructions to one of LEVELS; returns the one in use, which is lower on a
        processor that lacks them.
        """
        return LEVELS[self.code.quweit_use(LEVELS.index(level))]


def hindrance(_: str = "cpu") -> str | None:
    """Why there is no native code here; None: there is, compiled by now."""
    asked = os.environ.get(VARIABLE, "").lower()
    if asked in _OFF:
        return f"is turned off ({VARIABLE}={asked})"
    if asked not in (*_ON, *LEVELS):
        raise InputError(
            f"{VARIABLE}: expected 0, 1, or the widest instructions to use ({', '.join(LEVELS)}), "
            f"found '{asked}'."
        )
    with _lock:
        found = _loaded()
    return found if isinstance(found, str) else None


def loaded() -> Library:
    """The library, where `hindrance` is None.

    Raises:
      InputError: there is none.
    """
    why = hindrance()
    found = why or _loaded()
    if isinstance(found, str):
        raise InputError(f"native code: {found}.")
    return found


@contextmanager
def using(level: str) -> Iterator[str]:
    """Within it the library uses no wider instructions than one of LEVELS; gives those in use."""
    library = loaded()
    try:
        yield library.use(level)
    finally:
        library.use(_asked())


def _asked() -> str:
    asked = os.environ.get(VARIABLE, "").lower()
    return asked if asked in LEVELS else LEVELS[-1]


@functools.cache
def _loaded() -> Library | str:
    """The library, or why there is none, which is said here and so once a process."""
    if sys.byteorder != "little":
        return "needs a little-endian processor"
    try:
        return _register(*build.library())
    except build.NoCompilerError as error:
        _log.warning("%s: XLA computes what native code would (docs/howto/kernels.md).", error)
        return f"needs a compiler ({error})"
    except (build.CompileError, OSError, AttributeError) as error:
        _log.warning("native code could not be compiled, XLA computes instead: %s", error)
        return f"could not be compiled ({error})"


def _register(path: Path, name: str) -> Library:
    library = Library(path, name, ctypes.CDLL(str(path)))
    library.use(_asked())
    for handler in HANDLERS:
        call = getattr(library.code, f"quweit_{handler}")
        jax.ffi.register_ffi_target(library.target(handler), jax.ffi.pycapsule(call), "cpu")
    return library
