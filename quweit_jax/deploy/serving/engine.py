"""Many answers at once: a thread that lets texts into free slots, goes on with all of them a token
at a time, and says what is new of each. Knows no HTTP.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.deploy.sampling import Sampling
from quweit_jax.deploy.serving.slots import Read, Slots
from quweit_jax.deploy.spelling import Speller, Stops
from quweit_jax.errors import InputError, first_line


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One answer: what `generate` would be given. prompt: ids (T,), checked.

    stops: texts before which it ends. seed: None for any.
    """

    prompt: np.ndarray
    max_tokens: int
    sampling: Sampling
    seed: int | None = None
    stops: tuple[str, ...] = ()


class Said(NamedTuple):
    """What is new of an answer. tokens: how many it has by now. finish: why it is over: 'stop' (the
    model's end of text, or a stop string), 'length', 'error'; None while it goes on.
    """

    text: str
    tokens: int
    finish: str | None = None


Deliver = Callable[[int, Said], None]


class FullError(Exception):
    """There is no place for so many answers more; the message says so."""


class ClosedError(Exception):
    """The engine takes no more work; the message says why."""


class Answer:
    """An answer under way. deliver is called with its number and what is new, by the engine's
    thread.
    """

    def __init__(self, wanted: Wanted, number: int, deliver: Deliver):
        self.wanted, self.number, self._deliver = wanted, number, deliver
        self.left = False  # nobody wants it any more

    def say(self, said: Said) -> None:
        """Delivers it, unless nobody listens."""
        if not self.left:
            self._deliver(self.number, said)


class Engine:
    """Answers of a language model, `count` at a time; at most `queue` more wait for a slot.

    An answer is the one of `generate.generate_batch`, whatever is answered beside it, but for what
    rounding changes: its prompt is read by the same program, and each slot has its own place, key,
    settings and text.

    ends: ids of tokens that end an answer.
    """

    def __init__(
        self, slots: Slots, tokenizer: Tokenizer, ends: Collection[int] = (), queue: int = 64
    ):
        if slots.count < 1 or queue < 0:
            raise InputError(
                "--slots, --queue: expected 1 or more and 0 or more, found "
                f"{slots.count} and {queue}."
            )
        self.slots, self.tokenizer, self.queue = slots, tokenizer, queue
        self._ends = frozenset(ends)
        self._waiting: collections.deque[Answer] = collections.deque()
        self._seats: list[_Seat | None] = [None] * slots.count
        self._reading: collections.deque[int] = collections.deque()  # slots, in turn
        self._changed = threading.Condition()
        self._closed = ""
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Compiles the programs and begins."""
        self.slots.compile()
        self._thread = threading.Thread(target=self._run, name="serving", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 10.0) -> None:
        """Ends the thread; what is under way ends with 'error'."""
        with self._changed:
            self._closed = self._closed or "the server is stopping"
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def places(self) -> int:
        """How many answers may be under way, waiting ones too."""
        return self.slots.count + self.queue

    def counts(self) -> dict[str, int]:
        """How many slots there are and are busy, and how many answers may wait and do."""
        with self._changed:
            busy = sum(seat is not None for seat in self._seats)
            waiting = len(self._waiting)
        return {"slots": self.slots.count, "busy": busy, "queue": self.queue, "waiting": waiting}

    def submit(self, wanted: Sequence[Wanted], deliver: Deliver) -> list[Answer]:
        """Takes all of these, or none.

        Raises:
          FullError: too many are under way. ClosedError: the engine has ended.
        """
        answers = [Answer(each, number, deliver) for number, each in enumerate(wanted)]
        with self._changed:
            if self._closed:
                raise ClosedError(f"{self._closed}; ask again later.")
            busy = sum(seat is not None for seat in self._seats) + len(self._waiting)
            if busy + len(answers) > self.places:
                raise FullError(
                    f"{busy} answers are under way, of at most {self.places}; ask again later."
                )
            self._waiting.extend(answers)
            self._changed.notify()
        return answers

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Nobody wants these any more: their slots are free at the next token."""
        with self._changed:
            for answer in answers:
                answer.left = True
            self._waiting = collections.deque(a for a in self._waiting if not a.left)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._seated():
                self._read_piece()
                self._advance()
        except BaseException as error:  # of the device: nothing that is under way can go on
            self.failure = error
            with self._changed:
                self._closed = f"the engine has failed ({first_line(error)})"
        finally:
            self._dismiss()
        if self.failure is not None:
            self.on_failure()

    def _dismiss(self) -> None:
        """Ends all that is under way."""
        with self._changed:
            seated = [seat.answer for seat in self._seats if seat is not None]
            answers = [*seated, *self._waiting]
            self._waiting.clear()
            self._seats = [None] * len(self._seats)
        for answer in answers:
            answer.say(Said("", 0, "error"))

    def _seated(self) -> bool:
        """Waits for work; who has left is out of its slot, and who waits is in, in turn. False when
        closed.
        """
        with self._changed:
            for slot, seat in enumerate(self._seats):
                if seat is not None and seat.answer.left:
                    self._free(slot)
            while not (self._closed or self._waiting or any(self._seats)):
                self._changed.wait()
            for slot, seat in enumerate(self._seats):
                if seat is None and self._waiting:
                    self._seats[slot] = _Seat(self._waiting.popleft(), self)
                    self._reading.append(slot)
            return not self._closed

    def _free(self, slot: int) -> None:
        self._seats[slot] = None
        if slot in self._reading:
            self._reading.remove(slot)

    def _read_piece(self) -> None:
        """One piece of the prompt whose turn it is, so that the others wait for no more."""
        if not self._reading:
            return
        slot = self._reading[0]
        seat = self._seats[slot]
        assert seat is not None
        if not seat.read_on(self.slots):
            return
        self._reading.popleft()
        self._take(slot, seat, seat.join(self.slots, slot))

    def _advance(self) -> None:
        """A token more for all texts whose prompt has been read."""
        active = np.asarray([seat is not None and seat.active for seat in self._seats])
        if not active.any():
            return
        picked = self.slots.advance(active)
        for slot in np.flatnonzero(active).tolist():
            seat = self._seats[slot]
            assert seat is not None
            seat.taken += 1
            self._take(slot, seat, picked[slot])

    def _take(self, slot: int, seat: _Seat, token: int) -> None:
        """What follows from a new token."""
        try:
            said = seat.hear(token, self._ends)
        except Exception as error:  # of the tokenizer: the other answers go on
            logging.getLogger(__name__).error("an answer has failed: %s", first_line(error))
            said = Said("", seat.made, "error")
        if said.finish is not None:
            with self._changed:
                self._free(slot)
        elif not seat.go_on(self.slots.context):
            self._reading.append(slot)
        if said.text or said.finish:
            seat.answer.say(said)


class _Seat:
    """A text in a slot.

    text: prompt and new tokens. held: of the newest tokens, how many the cache has or is to read.
    taken: the places of the cache that are. active: the cache is read up to the newest token.
    """

    def __init__(self, answer: Answer, engine: Engine):
        wanted = answer.wanted
        self.answer = answer
        self.text = wanted.prompt.tolist()
        self.held, self.taken, self.made, self.active = len(self.text), 0, 0, False
        self._seed = secrets.randbits(31) if wanted.seed is None else wanted.seed
        self._speller = Speller(engine.tokenizer, wanted.prompt)
        self._stops = Stops(wanted.stops)
        self._pieces: Iterator[Read] | None = None
        self._read: Read | None = None

    def read_on(self, slots: Slots) -> bool:
        """Reads a piece more; True when that was the last."""
        if self._pieces is None:
            self._pieces = slots.read(np.asarray(self.text[-self.held :], np.int32))
        self._read = next(self._pieces)
        return self._read[2] >= self.held

    def join(self, slots: Slots, slot: int) -> int:
        """Takes the slot with what was read, and gives the next token."""
        assert self._read is not None
        read, sampling = self._read, self.answer.wanted.sampling
        self.taken, self._pieces, self._read, self.active = read[2], None, None, True
        return slots.join(slot, read, self.text, self.made, self._seed, sampling)

    def hear(self, token: int, ends: Collection[int]) -> Said:
        """What a token says."""
        if token in ends:
            return self._over("", "stop")
        self.text.append(token)
        self.made += 1
        new = self._stops.feed(self._speller.feed(token))
        if self._stops.found:
            return Said(new, self.made, "stop")
        if self.made == self.answer.wanted.max_tokens:
            return self._over(new, "length")
        return Said(new, self.made)

    def _over(self, new: str, finish: str) -> Said:
        """With all that was held back, in which a stop may be found yet."""
        new += self._stops.feed(self._speller.rest())
        finish = "stop" if self._stops.found else finish
        return Said(new + self._stops.rest(), self.made, finish)

    def go_on(self, context: int | None) -> bool:
        """Whether the cache has room for the newest token; else the newer half is read again, as
        `generate.generate_batch` does it.
        """
        self.held += 1
        if context is not None and self.held > context:
            self.held = max(1, context // 2)
        self.active = self.taken != context
        return self.active
