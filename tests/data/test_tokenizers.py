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
    assert (
        ids.dtype == np.int32
        and ids.ndim == 1
        and ids.min() >= 0
        and ids.max() < tokenizer.vocab_size
    )
    assert tokenizer.decode(ids) == TEXT and tokenizer.decode(list(map(int, ids))) == TEXT
    assert (
        tokenizer.decode([]) == ""
        and tokenizer.encode("").shape == (0,)
        and tokenizer.encode("").dtype == np.int32
    )
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
    with pytest.raises(
        InputError,
        match=r"vocabulary mismatch: the text has 'x', 'é', which the 3 characters "
        r".*tokenizer=byte",
    ):
        tokenizer.encode("axbé")
    with pytest.raises(InputError, match="'d', 'e', 'f', 'g', 'h' and 2 more"):
        tokenizer.encode("abcdefghij")


@pytest.fixture
def published(tmp_path):
    """What lies beside a published model: byte-level pieces, a beginning of text before everything,
    texts cut and filled up to 4 tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>", "<|other|>"],
    )
    made.train_from_iterator(TEXT.split(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=4)
    folder = tmp_path / "published"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_from_a_folder(published, tmp_path):
    tokenizer = tokenizers.train("file", "", path=str(published))
    assert (tokenizer.kind, tokenizer.end_of_text, tokenizer.vocab_size) == ("file", 1, 270)
    tokenizers.save(tokenizer, tmp_path / "saved.json")
    (published / "tokenizer.json").unlink()  # the run has it now
    again = tokenizers.load(tmp_path / "saved.json")
    assert (again.kind, again.end_of_text, again.vocab_size) == (
        "file",
        1,
        270,
    ) and again.to_json() == tokenizer.to_json()
    for text in (TEXT, "", "</s>", "a </s> tag, <s> and <|other|> are text"):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32 and not {0, 1, 2} & set(
            tokens.tolist()
        )  # nothing before it, nor made of it, nor to fill it up
        np.testing.assert_array_equal(again.encode(text), tokens)
        assert again.decode(tokens) == text
    assert tokenizer.decode([1, *tokenizer.encode("next")]) == "</s>next"


@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        (None, 1),
        ("", 1),
        ("<|other|>", 2),
        ({"content": "<|other|>", "lstrip": False}, 2),
        ("<s>", 0),
    ],
)
def test_the_end_of_text_is_the_one_named(published, eos, expected):
    (published / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    for path in (published, published / "tokenizer.json"):
        assert tokenizers.FileTokenizer.read(str(path)).end_of_text == expected


def test_tokenizers_that_have_no_end_of_text(published):
    saved = json.loads((published / "tokenizer.json").read_text())
    for token in saved["added_tokens"]:
        token["special"] = False  # a piece that happens to be spelled </s>
    (published / "tokenizer.json").write_text(json.dumps(saved))
    assert tokenizers.FileTokenizer.read(str(published)).end_of_text is None
    assert (
        tokenizers.train("bpe", TEXT, bpe_vocab_size=260).end_of_text
        is tokenizers.ByteTokenizer().end_of_text
        is None
    )


def test_files_that_are_no_tokenizers(published):
    def fails(message, path=published):
        with pytest.raises(InputError, match=message):
            tokenizers.train("file", "", path=str(path))

    fails(
        r"data\.tokenizer_path: expected a tokenizer\.json or its folder .*found nothing; add "
        r"--config\.data\.tokenizer_path",
        path="",
    )
    fails(
        r"data\.tokenizer_path: no file at .*nowhere; give a tokenizer\.json",
        path=published / "nowhere",
    )
    (published / "tokenizer_config.json").write_text('{"eos_token": "<missing>"}')
    fails(
        r"tokenizer_config\.json names the eos_token '<missing>', which the tokenizer\.json beside "
        r"it has not"
    )
    for damaged in ("{", "[]"):
        (published / "tokenizer_config.json").write_text(damaged)
        fails(r"data\.tokenizer_path: .*tokenizer_config\.json is damaged")
    (published / "tokenizer.json").write_text("{}")
    fails(
        r"data\.tokenizer_path: expected a tokenizer of .* in .*tokenizer\.json, found another file"
    )


def test_errors(tmp_path):
    with pytest.raises(InputError, match=r"data\.tokenizer: .*Did you mean 'char'\?"):
        tokenizers.train("chars", "abc")
    with pytest.raises(
        InputError, match=r"data\.bpe_vocab_size: byte-level BPE starts from 256 bytes, found 100"
    ):
        tokenizers.train("bpe", "abc", bpe_vocab_size=100)
    with pytest.raises(
        InputError, match=r"no tokenizer at .*is this the run directory of a language model"
    ):
        tokenizers.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "word"}))
    with pytest.raises(InputError, match=r"tokenizer\.json: kind: expected one of .*found 'word'"):
        tokenizers.load(tmp_path / "tokenizer.json")
