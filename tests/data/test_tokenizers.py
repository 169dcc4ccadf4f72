"""`data.tokenizers`: text to ids and back."""

import json

import numpy as np
import pytest

from quweit_jax.data import tokenizers
from quweit_jax.errors import InputError

TEXT = "The quick brown fox; größe, 数据, 🦊!\n\tIndented  twice.\r\nNäive café — “quoted”\n" * 3


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_round_trip(kind, tmp_path):
    tokenizer = tokenizers.train(kind, TEXT, bpe_vocab_size=300)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.ndim == 1 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT and tokenizer.decode(list(map(int, ids))) == TEXT
    assert tokenizer.decode([]) == "" and tokenizer.encode("").shape == (0,) and tokenizer.encode("").dtype == np.int32
    tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
    again = tokenizers.load(tmp_path / "tokenizer.json")
    assert again.kind == kind and again.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(again.encode(TEXT), ids)
    assert again.decode(ids) == TEXT and again.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_any_text_can_be_spelled(kind):
    tokenizer = tokenizers.train(kind, "plain letters alone\n", bpe_vocab_size=260)
    for text in ("Ωmega ñ 🦊\x00\x7f", "  leading spaces", "\n\n", "e\u0301", "\u2028line\u2029"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_char_ids_are_in_code_point_order():
    tokenizer = tokenizers.CharTokenizer.train("banana é")
    assert tokenizer.vocabulary == " abné" and tokenizer.vocab_size == 5
    np.testing.assert_array_equal(tokenizer.encode("ban"), [2, 1, 3])


def test_byte_ids_are_utf8():
    tokenizer = tokenizers.ByteTokenizer()
    np.testing.assert_array_equal(tokenizer.encode("aé"), [97, 0xC3, 0xA9])
    assert tokenizer.vocab_size == 256 and tokenizer.decode([97, 0xC3]) == "a\ufffd"


def test_bpe_joins_what_is_frequent_and_is_deterministic():
    text = "the cat and the dog and the bird\n" * 20
    tokenizer = tokenizers.train("bpe", text, bpe_vocab_size=280)
    assert 256 < tokenizer.vocab_size <= 280
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert tokenizer.to_json() == tokenizers.train("bpe", text, bpe_vocab_size=280).to_json()


def test_unknown_characters():
    tokenizer = tokenizers.CharTokenizer.train("abc")
    with pytest.raises(InputError, match=r"vocabulary mismatch: the text has 'x', 'é', which the 3 characters .*tokenizer=byte"):
        tokenizer.encode("axbé")
    with pytest.raises(InputError, match="'d', 'e', 'f', 'g', 'h' and 2 more"):
        tokenizer.encode("abcdefghij")


def test_errors(tmp_path):
    with pytest.raises(InputError, match=r"data\.tokenizer: .*Did you mean 'char'\?"):
        tokenizers.train("chars", "abc")
    with pytest.raises(InputError, match=r"data\.bpe_vocab_size: byte-level BPE starts from 256 bytes, found 100"):
        tokenizers.train("bpe", "abc", bpe_vocab_size=100)
    with pytest.raises(InputError, match=r"no tokenizer at .*is this the run directory of a language model"):
        tokenizers.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "word"}))
    with pytest.raises(InputError, match=r"tokenizer\.json: kind: expected one of .*found 'word'"):
        tokenizers.load(tmp_path / "tokenizer.json")
