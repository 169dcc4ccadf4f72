"""How fast a run is: steps, what they wait for, what share of the devices' peak they use, and the
memory they take. Compiling, evaluations and checkpoints count as no part of a step.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from quweit_jax.training import compiled
from quweit_jax.training.chips import peak_of
from quweit_jax.training.setup import Setup


def model_flops(setup: Setup) -> int:
    """Operations of a training step's matrix products, two a multiply-add: those of the forward
    pass three times, as the backward pass has two for each. What remat repeats, a teacher, and
    what is no product of matrices, such as look-ups, do not count.
    """
    state, batch = setup.abstract_state(), setup.abstract_batch()
    program = jax.make_jaxpr(setup.model.apply)(state.variables(), batch["inputs"])
    return 3 * compiled.flops(program)


def memory_peak(devices: Sequence[Any]) -> int | None:
    """The most bytes that any of these devices has had in use; None where the backend doesn't
    tell.
    """
    told = [device.memory_stats() or {} for device in devices]
    peaks = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return max(peaks, default=None)


class Meter:
    """The time of a run's steps.

    unit, units: what a step trains on ('tokens'), and how many of them. compiling: seconds that
    first calls of compiled functions took.
    """

    def __init__(self, setup: Setup):
        self.unit = "tokens" if setup.tokenizer is not None else "examples"
        self.unit = "images" if setup.data.image_shape is not None else self.unit
        self.units = setup.config.batch_size
        self.units *= setup.config.model.context if setup.tokenizer is not None else 1
        devices = setup.mesh.devices.flatten()
        self._local = [d for d in devices if d.process_index == jax.process_index()]
        peak = peak_of(devices[0].device_kind)
        # Tracing the model costs seconds: only where there is something to compare it with.
        self._share = None if peak is None else model_flops(setup) / (peak * len(devices))
        self.compiling = 0.0
        self._compiled = self._compiled_before = False  # since the last lap; since last asked
        self._mark: float | None = None
        self._steps, self._seconds, self._wait = 0, 0.0, 0.0

    def compiles(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled function whose first call counts as compiling."""
        called = False

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            nonlocal called
            if called:
                return function(*args)
            since, called = time.monotonic(), True
            result = function(*args)
            self.compiling += time.monotonic() - since
            self._compiled = self._compiled_before = True
            return result

        return call

    def take_compiled(self) -> bool:
        """Whether something was compiled since this was last asked."""
        found, self._compiled_before = self._compiled_before, False
        return found

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While a step's batch is waited for."""
        since = time.monotonic()
        self._mark = since if self._mark is None else self._mark
        yield
        self._wait += time.monotonic() - since

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """While something is done that is no part of a step; those before have been read."""
        yield
        self._mark, self._compiled = time.monotonic(), False

    def lap(self) -> None:
        """A step is known to be done; one in whose time something was compiled is left out."""
        now = time.monotonic()
        if self._compiled or self._mark is None:
            self._wait, self._compiled = 0.0, False
        else:
            self._steps, self._seconds = self._steps + 1, self._seconds + now - self._mark
        self._mark = now

    def take(self) -> dict[str, float]:
        """Means over the steps since this was last asked, {} if there were none: step_seconds,
        data_wait_seconds (of a step), UNIT_per_second (of all devices), mfu (where the devices'
        peak is known), device_bytes (the most so far, where the backend tells).
        """
        steps, seconds, wait = self._steps, self._seconds, self._wait
        self._steps, self._seconds, self._wait = 0, 0.0, 0.0
        if not steps:
            return {}
        step = max(seconds, 1e-9) / steps
        found = {"step_seconds": step, "data_wait_seconds": wait / steps}
        found[f"{self.unit}_per_second"] = self.units / step
        if self._share is not None:
            found["mfu"] = self._share / step
        if (peak := memory_peak(self._local)) is not None:
            found["device_bytes"] = peak
        return found
