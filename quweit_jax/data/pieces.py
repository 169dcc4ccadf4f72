"""Texts cut small enough for byte-level byte-pair encoding, where that changes no token."""

from __future__ import annotations

import re
from collections.abc import Iterator

from absl import logging

# What byte-pair encoding learns from is cut into words of at most so many letters: the time that a
# word takes grows with the square of its length. No piece of text of more than so many letters is
# given to it at once: it takes up to two hundred bytes of memory a letter.
LONGEST_WORD = 512
LONGEST_TEXT = 1 << 20
# The words that byte-level BPE makes of a text, nearly.
_WORDS = re.compile(r"\d+|[^\W\d_]+|\s+|[^\w\s]+|_+")
_BETWEEN_WORDS = re.compile(r"(?<=\S)(?=[ \n]\S)")


def cut(text: str) -> Iterator[str]:
    """A text in parts of no more than LONGEST_TEXT letters, cut where byte-level BPE begins a word
    anyway, before a single blank, so that the tokens are those of the whole; where there is no such
    place, anywhere.
    """
    start = 0
    while len(text) - start > LONGEST_TEXT:
        end = start + LONGEST_TEXT
        ends = [m.start() for m in _BETWEEN_WORDS.finditer(text, end - 4096, end)]
        end = ends[-1] if ends else end
        yield text[start:end]
        start = end
    yield text[start:]


def short_words(text: str) -> Iterator[str]:
    """The lines of a text to learn pieces from; a word longer than LONGEST_WORD in several parts,
    which is said once.
    """
    said = False
    for piece in (piece for line in text.splitlines(keepends=True) for piece in cut(line)):
        begin = 0
        for word in _long_words(piece):
            if not said:
                logging.warning(
                    "data.tokenizer: the text has words of more than %d letters without a blank, "
                    "the first begins with %r; byte-pair encoding learns from them in parts.",
                    LONGEST_WORD,
                    word.group()[:20],
                )
            said = True
            yield piece[begin : word.start()]
            begin = word.end()
            for start in range(word.start(), begin, LONGEST_WORD):
                yield piece[start : min(start + LONGEST_WORD, begin)]
        yield piece[begin:]


def _long_words(text: str) -> Iterator[re.Match[str]]:
    if len(text) > LONGEST_WORD:
        yield from (m for m in _WORDS.finditer(text) if m.end() - m.start() > LONGEST_WORD)
