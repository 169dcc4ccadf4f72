"""Signs of life between processes, by a coordinator that is made up."""

from __future__ import annotations

import queue
import threading
import time

from quweit_jax.training.alive import Watch


class Coordinator:
    """Keys and values; answers nobody while `frozen`."""

    def __init__(self):
        self.values, self.frozen = {}, threading.Event()

    def key_value_set(self, key, value, allow_overwrite=False):
        self._wait()
        self.values[key] = value

    def key_value_dir_get(self, key):
        self._wait()
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def _wait(self):
        while self.frozen.is_set():
            time.sleep(0.01)


def test_those_that_live_are_left_alone_and_one_that_is_silent_is_named():
    coordinator, said, alive = Coordinator(), queue.Queue(), [True] * 3
    for i in range(3):
        ends = lambda reason, i=i: said.put((i, reason))  # noqa: E731
        Watch(coordinator, i, 3, 1.0, ends, lambda i=i: alive[i])
    time.sleep(2.5)
    assert said.empty()
    alive[2] = False
    found = sorted(said.get(timeout=5) for _ in range(2))
    assert found == [(0, "process 2 was silent for 1 s"), (1, "process 2 was silent for 1 s")]
    alive[:] = [False] * 3


def test_a_coordinator_that_does_not_answer_is_process_0():
    coordinator, said, alive = Coordinator(), queue.Queue(), [True]
    Watch(coordinator, 1, 2, 1.0, said.put, lambda: alive[0])
    coordinator.frozen.set()
    assert said.get(timeout=5) == "process 0 was silent for 1 s"
    coordinator.frozen.clear()
    alive[0] = False
