"""Whether the other processes of a run still live: each one tells so at the coordinator's, and
looks when the others last did.

JAX does the same and ends a process whose neighbor is silent, but with a message of its own; this
is sooner. A process that is stopped (SIGSTOP), swapped out or cut off is silent; one that was
killed is missed at once, by what is sent next.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

_KEY = "quweit_jax/alive/"
_LONGEST = 10.0  # seconds from one sign of life to the next


class Watch:
    """Two threads of a process: one tells that it lives and asks about the others, which may have
    to wait for an answer, and one that never waits judges by what is known.

    Args:
      client: JAX's to its coordinator, process 0: `key_value_set`, `key_value_dir_get`.
      own, count: this process's number, and how many there are. timeout: seconds after which one is
        dead. ends: called once with what is wrong. in_use: whether the client is still JAX's.
    """

    def __init__(
        self,
        client: Any,
        own: int,
        count: int,
        timeout: float,
        ends: Callable[[str], None],
        in_use: Callable[[], bool] = lambda: True,
    ):
        self.client, self.own, self.timeout, self.ends = client, own, timeout, ends
        self._in_use, self._every = in_use, min(_LONGEST, timeout / 8)
        now = time.monotonic()
        self._values: dict[int, str] = {}
        self._seen = {i: now for i in range(count) if i != own}
        self._answered = self._judged = now
        for work in (self._tell, self._judge):
            threading.Thread(target=work, name=f"quweit_jax {work.__name__}", daemon=True).start()

    def _tell(self) -> None:
        number = 0
        while self._in_use():
            # One that does not answer, or no longer does, is judged by how long that lasts.
            with contextlib.suppress(Exception):
                number += 1
                self.client.key_value_set(f"{_KEY}{self.own}", str(number), allow_overwrite=True)
                self._look(dict(self.client.key_value_dir_get(_KEY)))
            time.sleep(self._every)

    def _look(self, found: Mapping[str, str]) -> None:
        self._answered = time.monotonic()
        for key, value in found.items():
            process = int(key.rpartition("/")[2])
            if self._values.get(process) != value:
                self._values[process], self._seen[process] = value, self._answered

    def _judge(self) -> None:
        while self._in_use():
            time.sleep(self._every)
            now = time.monotonic()
            if now - self._judged > self.timeout / 2:  # it was this process that was stopped
                self._answered = now
                self._seen = dict.fromkeys(self._seen, now)
            self._judged = now
            silent = [i for i, seen in self._seen.items() if now - seen > self.timeout]
            if now - self._answered > self.timeout:  # then nothing is known of the others
                silent = [0]
            if silent and self.own not in silent and self._in_use():
                named = ", ".join(map(str, silent[:8]))
                self.ends(f"process {named} was silent for {self.timeout:.0f} s")
                return


def watch(timeout: int, sentence: str) -> bool:
    """Ends this process with status 1 once another is silent for so many seconds; False where JAX
    gives no access to its coordinator.

    sentence: what is said then, with a place {reason}.
    """
    try:
        from jax._src import distributed

        state = distributed.global_state
        client, own, count = state.client, state.process_id, state.num_processes
    except (ImportError, AttributeError):  # another JAX keeps it elsewhere
        return False
    if client is None or not count or count == 1:
        return False

    def ends(reason: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {sentence.format(reason=reason)}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(1)  # the other thread waits for what will never come

    Watch(client, own, count, timeout, ends, lambda: distributed.global_state.client is client)
    return True
