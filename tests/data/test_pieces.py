"""`data.pieces`: long texts are cut where that changes no token,
long words so that learning ends.
"""

import random
import time

import numpy as np
import pytest

from quweit_jax.data import pieces, tokenizers

WORDS = random.Random(0)
SPACED = "".join(
    "".join(WORDS.choices("abcé数1_-'", k=WORDS.randint(1, 9)))
    + WORDS.choice([" ", "\n", "  ", "\t", " \n"])
    for _ in range(2000)
)


@pytest.mark.parametrize("longest", [600, 5000])
def test_tokens_are_those_of_the_whole(longest, monkeypatch):
    made = tokenizers.train("bpe", SPACED, bpe_vocab_size=400)
    whole = made.encode(SPACED)
    monkeypatch.setattr(pieces, "LONGEST_TEXT", longest)
    assert len(list(pieces.cut(SPACED))) > 2
    np.testing.assert_array_equal(made.encode(SPACED), whole)


@pytest.mark.parametrize("text", ["", "ab", "x" * 5000, SPACED, " " * 5000])
def test_nothing_is_lost(text, monkeypatch):
    monkeypatch.setattr(pieces, "LONGEST_TEXT", 1000)
    assert "".join(pieces.cut(text)) == text and "".join(pieces.short_words(text)) == text
    assert max(map(len, pieces.cut(text))) <= 1000


def test_short_words_are_learned_as_before(caplog):
    assert list(pieces.short_words(SPACED)) == SPACED.splitlines(keepends=True)
    assert not caplog.records


@pytest.mark.parametrize("letters", ["ACGT", "0123456789", " ", "#-!*"])
def test_a_long_line_without_blanks_is_learned_in_parts(letters, caplog):
    line = "".join(WORDS.choices(letters, k=200_000))
    begin = time.process_time()
    made = tokenizers.train("bpe", f"ordinary {line} words\n", bpe_vocab_size=300)
    assert time.process_time() - begin < 30  # it would take minutes
    assert made.decode(made.encode(line)) == line
    assert "data.tokenizer" in caplog.text
