"""Several processes of one run: joining them, agreeing on what is wrong before the first step, and
ending where one of them has died.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from quweit_jax.errors import InputError, RunError, first_line
from quweit_jax.training import alive

TIMEOUT = "QUWEIT_HEARTBEAT_TIMEOUT"  # seconds after which a silent process counts as dead
_TIMEOUT_SECONDS = 100  # JAX's own
_PATIENCE = 15.0  # seconds in which a file system on a network shows a new file
_PIECE = 2**28  # bytes of an array that are gathered at a time
_LONGEST = 4000  # bytes of a message that all are told
# How JAX's errors begin where a device or a process no longer answers; not that of full memory.
_LOST = re.compile("UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED")
_DEAD = (
    "another process of this run has died, or cannot be reached ({reason}); see what it said last. "
    "Start all of them again: they go on from the newest checkpoint."
)


class SharedError(InputError):
    """What was wrong on one process, raised on all of them at the same place."""


def join(address: str | None = None, count: int | None = None, number: int | None = None) -> None:
    """`jax.distributed.initialize`; without arguments JAX finds the others by itself. Where a
    process is silent for $QUWEIT_HEARTBEAT_TIMEOUT seconds (100), the others end and say so.

    Raises:
      InputError: the time is no whole number of seconds.
    """
    text = os.environ.get(TIMEOUT, str(_TIMEOUT_SECONDS))
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise InputError(f"{TIMEOUT}: expected a whole number of seconds, found '{text}'.")
    timeout = int(text)
    jax.distributed.initialize(
        address,
        count,
        number,
        # JAX ends a process as abruptly, with a message of its own: only where we could not.
        heartbeat_timeout_seconds=min(2 * timeout + 20, 2**31 - 1),
        shutdown_timeout_seconds=timeout,
    )
    alive.watch(timeout, _DEAD)


def leave(error: BaseException, status: int) -> None:
    """Ends a process that alone has failed, at once: those that wait for it then know. Does nothing
    where all have failed, or where there is only one.
    """
    if jax.process_count() > 1 and not isinstance(error, SharedError):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that every process runs; an InputError on any of them is one on all (the first
    one's). Nothing inside may wait for the others.
    """
    if jax.process_count() == 1:
        yield
        return
    message = ""
    try:
        yield
    except InputError as error:
        message = str(error)
    if told := next(filter(None, _gather(message)), ""):
        raise SharedError(told)


def _gather(message: str) -> list[str]:
    """The messages of all processes, in their order."""
    from jax.experimental import multihost_utils

    data = message.encode()[:_LONGEST]
    padded = np.frombuffer(data.ljust(_LONGEST, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode("utf-8", "ignore") for row in rows]


def gathered(tree: PyTree) -> PyTree:
    """Arrays that are divided over processes, whole in the first one's memory, as NumPy's; the
    others, which all have to ask, get None in the place of each. Larger ones come in pieces, of
    which no device ever holds more than one.
    """

    def whole(leaf: jax.Array) -> np.ndarray | None:
        if leaf.is_fully_replicated or leaf.is_fully_addressable:
            return np.asarray(leaf.addressable_data(0) if leaf.is_fully_replicated else leaf)
        rows = max(1, len(leaf) * _PIECE // max(1, leaf.nbytes))
        pieces = []
        for start in range(0, len(leaf), rows):
            piece = multihost_utils.process_allgather(leaf[start : start + rows], tiled=True)
            pieces += [np.asarray(piece)] * (jax.process_index() == 0)
        return np.concatenate(pieces) if pieces else None

    from jax.experimental import multihost_utils

    return jax.tree.map(whole, tree)


def wait_for_all(what: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def check_same(what: str, value: int, advice: str) -> None:
    """Raises InputError on all processes unless they have the same number."""
    if jax.process_count() > 1 and len(found := set(_gather(str(value)))) > 1:
        raise SharedError(f"{what}: found {', '.join(sorted(found))} on different hosts; {advice}.")


def check_shared(workdir: Path) -> None:
    """Checks that every process finds in `workdir` a file that the first one has just made there.

    Raises:
      InputError: on all processes, if one does not.
    """
    if jax.process_count() == 1:
        return
    token = _gather(f".shared-{secrets.token_hex(8)}")[0]
    file = workdir / token
    if jax.process_index() == 0:
        file.touch()
    try:
        # Only once the file is there it is looked for: that it isn't may be remembered for a while.
        _gather("")
        missing = [i for i, found in enumerate(_gather("yes" * _appears(file))) if not found]
    finally:
        if jax.process_index() == 0:
            file.unlink(missing_ok=True)
    if missing:
        raise SharedError(
            f"--workdir: process {', '.join(map(str, missing))} of {jax.process_count()} does not "
            f"see at {workdir} what process 0 wrote there; give a folder that all hosts reach "
            "under the same path."
        )


def _appears(file: Path) -> bool:
    end = time.monotonic() + _PATIENCE
    while not (found := file.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """A block that needs all processes; RunError if one of them has died."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1 or not _LOST.match(str(error)):
            raise
        raise RunError(_DEAD.format(reason=first_line(error, 160))) from error


def preempted(step: int) -> bool:
    """Whether a process was given notice (SIGTERM) and this is the step, the same for all, after
    which they save; every process asks after every step.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
