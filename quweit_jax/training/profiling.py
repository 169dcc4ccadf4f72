"""Traces of a few steps, `--config.profile_steps=10:15`, for Perfetto, TensorBoard or XProf."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from quweit_jax.errors import InputError, first_line


def parse(steps: str) -> tuple[int, int] | None:
    """(first, last) of '10:15', None of ''.

    Raises:
      InputError: it is neither.
    """
    if not steps:
        return None
    found = re.fullmatch(r"([1-9]\d{0,17}):([1-9]\d{0,17})", steps)
    if not found or int(found[1]) > int(found[2]):
        raise InputError(
            "profile_steps: expected the first and the last step to trace, such as 10:15, found "
            f"'{steps}'."
        )
    return int(found[1]), int(found[2])


class Profile:
    """A context manager that traces the steps of a range into WORKDIR/profile, once; a run that
    goes on inside of the range traces the rest of it.
    """

    def __init__(self, steps: str, workdir: Path):
        self._steps, self._folder = parse(steps), workdir / "profile"
        self._running = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the call of a step."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        if not self._running:
            self._running = True
            jax.profiler.start_trace(self._folder)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, values: Any) -> None:
        """Ends the trace if that was its last step, once the step is done."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(values)
            self._stop()

    def _stop(self) -> None:
        if not self._running:
            return
        self._running, self._steps = False, None
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:  # a full disk should not end the run
            logging.warning("the trace could not be written (%s).", first_line(error))
