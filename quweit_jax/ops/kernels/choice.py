"""Choosing between the implementations of a function."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from quweit_jax.errors import InputError

IMPLEMENTATIONS = ("reference", "xla", "native", "pallas")

# Why an implementation can't be used on a platform ('cpu', 'gpu', 'tpu'); None: it can.
Hindrance = Callable[[str], str | None]

_log = logging.getLogger(__name__)
_told: set[tuple[str, str, str]] = set()
# What is traced here is meant for this platform; '': for the one it runs on.
_target = jax.make_user_context(default_value="")
# What is traced here leaves this process (an exported program): nothing compiled into it is there.
_portable = jax.make_user_context(default_value=False)
# Kernels of Pallas are interpreted, on any platform.
_interpreted = jax.make_user_context(default_value=False)


class Division(NamedTuple):
    """How a program's tokens are divided over devices."""

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def parts(self) -> int:
        """The number of parts."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)


_division = jax.make_user_context(default_value=None)


@contextmanager
def compiling_for(platform: str, *, portable: bool = False) -> Iterator[None]:
    """Implementations are chosen for a platform that may not be the one at hand.

    Args:
      platform: 'cpu', 'gpu' or 'tpu'; '' for the one at hand. portable: the compiled program is
        run by another process, which has no native code of ours.
    """
    with _target(platform), _portable(portable):
        yield


@contextmanager
def interpreted() -> Iterator[None]:
    """Pallas kernels work on every platform, interpreted: slow, for tests."""
    with _interpreted(True):
        yield


def is_interpreted() -> bool:
    """Whether Pallas kernels are interpreted."""
    return bool(_interpreted.value)


@contextmanager
def divided(mesh: Mesh, *axes: str) -> Iterator[None]:
    """What is traced is compiled for the devices of a mesh, whose `axes` divide the tokens: the
    compiler cannot divide kernels itself.
    """
    with _division(Division(mesh, axes)):
        yield


def division() -> Division | None:
    """How kernels are divided over devices; None where there is one device, or where the program
    divides itself (`jax.shard_map`).
    """
    told = _division.value
    return None if told is None or told.mesh.size == 1 or _inside_shard_map() else told


def _inside_shard_map() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)


def platform() -> str:
    """The platform that functions are traced for: 'cpu', 'gpu' or 'tpu'."""
    return _target.value or jax.default_backend()


def kernels_at() -> str:
    """Whose Pallas kernels are taken: a GPU's for a GPU, else a TPU's, also where they are
    interpreted.
    """
    return "gpu" if platform() == "gpu" else "tpu"


def anywhere(_: str) -> None:
    """The hindrance of an implementation that works on every platform: none."""


def only_on(*platforms: str) -> Hindrance:
    """The hindrance of an implementation for some platforms."""

    def hindrance(at: str) -> str | None:
        return None if at in platforms else f"needs a {' or '.join(platforms)}"

    return hindrance


def native(hindrance: Hindrance) -> Hindrance:
    """The hindrance of native code: what `hindrance` says, and programs that leave the process."""

    def checked(at: str) -> str | None:
        if at != "cpu":
            return "needs a cpu"
        if _portable.value:
            return "cannot be exported"
        return hindrance(at)

    return checked


def not_exported(hindrance: Hindrance) -> Hindrance:
    """The hindrance of kernels that programs cannot take along to another process, as those for
    GPUs: what `hindrance` says, and such programs.
    """

    def checked(at: str) -> str | None:
        return "cannot be exported" if _portable.value else hindrance(at)

    return checked


def undivided(hindrance: Hindrance) -> Hindrance:
    """The hindrance of native code in programs for several devices: what `hindrance` says, and
    that the compiler cannot divide it.
    """

    def checked(at: str) -> str | None:
        told = _division.value
        alone = told.mesh.size == 1 if told else jax.device_count() == 1
        if not alone and not _inside_shard_map():
            return "cannot be divided over devices by the compiler (call it inside jax.shard_map)"
        return hindrance(at)

    return checked


def kernels_for(*platforms: str) -> Hindrance:
    """The hindrance of Pallas kernels for some platforms: others, and several devices between which
    nothing says how to divide them.
    """

    def hindrance(at: str) -> str | None:
        if _interpreted.value:
            return None
        if at not in platforms:
            return f"needs a {' or '.join(platforms)}"
        if _division.value is None and jax.device_count() > 1 and not _inside_shard_map():
            return (
                f"cannot be divided over {jax.device_count()} devices by the compiler (call it "
                "inside jax.shard_map)"
            )
        return None

    return hindrance


def with_native(hindrance: Hindrance) -> dict[str, Hindrance]:
    """What a function offers that has native code, XLA's and a reference, the fastest first."""
    return {"native": native(hindrance), "xla": anywhere, "reference": anywhere}


def choose(function: str, asked: str | None, offered: Mapping[str, Hindrance]) -> str:
    """The implementation of a function to take.

    What is chosen is logged once a function and platform, at level INFO of this module's logger.

    Args:
      function: its name, for errors and the log. asked: an implementation, or None for the first
        that works. offered: implementation -> what hinders it, the fastest first.

    Raises:
      InputError: an unknown implementation, or one that the function or the platform lacks.
    """
    at = platform()
    # Asking what hinders native code compiles it, so nothing is asked that need not be known.
    if asked is None:
        chosen = next(name for name, hindrance in offered.items() if hindrance(at) is None)
    else:
        why = offered[asked](at) if asked in offered else "does not exist"
        if why is not None:
            works = [name for name, hindrance in offered.items() if hindrance(at) is None]
            raise InputError(
                f"{function}: implementation={asked!r} {why}; on this {at} there are "
                f"{', '.join(works)}, and None for the fastest of them."
            )
        chosen = asked
    if (function, at, chosen) not in _told:
        _told.add((function, at, chosen))
        _log.info("%s on %s: %s", function, at, chosen)
    return chosen
