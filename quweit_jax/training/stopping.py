"""Stopping in order: what a signal asks for, and whether several processes agree on it."""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType
from typing import Any

import jax
import numpy as np

from quweit_jax.training import hosts


class StopRequest:
    """A context manager that notes SIGTERM and SIGINT, and says so at once, for saving may take a
    while; a second one ends the program at once.

    Where there are several processes, JAX notes SIGTERM, which is how schedulers give notice.
    """

    def __init__(self):
        self.signal: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        ours = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        for number in ours:
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: a notebook's own business
                return self
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, self._before[number])
        # The program may be in the middle of writing: nothing may go wrong here.
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            text = f"{self.signal}: what is under way is saved first; a second one ends it at once"
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, step: int, every: int) -> bool:
        """Whether to stop now, after a step; several processes decide together: within a few steps
        of a SIGTERM to any of them, and every few steps about an interrupt from a terminal.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        if hosts.preempted(step):
            self.signal = "SIGTERM"
            if jax.process_index() == 0:
                print(f"SIGTERM: all processes save step {step}", file=sys.stderr, flush=True)
            return True
        return not step % every and agree(self.signal is not None)


def agree(wanted: bool) -> bool:
    """Whether any process wants it; all must ask."""
    if jax.process_count() == 1:
        return wanted
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(wanted))))
