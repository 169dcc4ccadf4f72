"""Tokens that come one after another, as text: whole characters alone, and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quweit_jax.data.tokenizers import Tokenizer

_KNOWN = 16  # tokens before a piece that are decoded with it


class Speller:
    """Decodes tokens as they come, holding back pieces that aren't whole characters yet.

    after: ids before them (the prompt's), without which some tokenizers take the first token for
    the beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] | np.ndarray = ()):
        self._tokenizer = tokenizer
        self._begin([int(i) for i in after][-_KNOWN:])

    def _begin(self, known: list[int]) -> None:
        self._known, self._ids, self._shown = known, list[int](), ""
        self._before = self._tokenizer.decode(known) if known else ""

    def feed(self, token: int) -> str:
        """What a token adds to the text, '' for nothing whole."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._known + self._ids)[len(self._before) :]
        # Only the last U+FFFD can be a character that isn't whole yet.
        whole = text[:-1] if text.endswith("\ufffd") else text
        new = whole[len(self._shown) :]
        self._shown = max(self._shown, whole, key=len)
        if whole == text:
            self._begin(self._ids[-_KNOWN:])
        return new

    def rest(self) -> str:
        """What was held back, once there are no more tokens."""
        if not self._ids:
            return ""
        text = self._tokenizer.decode(self._known + self._ids)
        return text[len(self._before) + len(self._shown) :]


class Stops:
    """Lets a text through up to the first of the stop strings, which is left out; what could be the
    beginning of one is held back until it is known. Empty stops don't count.

    found: whether one was met, after which there is no more text.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = [stop for stop in stops if stop], ""
        self.found = False

    def feed(self, piece: str) -> str:
        """What is known to be text, with this piece."""
        if self.found:
            return ""
        held = self._held + piece
        places = [held.index(stop) for stop in self._stops if stop in held]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        begun = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - begun :]
        return held[: len(held) - begun]

    def rest(self) -> str:
        """What was held back, once there is no more text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that a stop begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
