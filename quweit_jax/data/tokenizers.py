"""Text <-> token ids: characters, bytes, byte-pair encoding trained on the corpus, or a file of
Hugging Face's `tokenizers`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from quweit_jax.data import pieces
from quweit_jax.errors import InputError, check_choice, first_line, require
from quweit_jax.reading import (
    decode_text,
    is_whole,
    kind_of,
    place,
    read_bytes,
    read_json,
    shown,
    without_surrogates,
)

KINDS = ("char", "byte", "bpe")  # made from a corpus
CHOICES = (*KINDS, "file")
_EXPECTED = "expected a tokenizer of Hugging Face's tokenizers"
_END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>")


class Tokenizer(Protocol):
    """What every tokenizer offers. Ids are int32, 0 <= id < vocab_size."""

    kind: str

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document; None where there is none. No text is encoded as it."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The text's ids, (N,) int32; InputError for text the vocabulary cannot spell."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids."""
        ...

    def to_json(self) -> dict:
        """What `from_json` needs to make the same tokenizer."""
        ...


class CharTokenizer:
    """One id a character, in code-point order."""

    kind = "char"
    end_of_text = None

    def __init__(self, vocabulary: str):
        self.vocabulary = vocabulary
        self._ids = {character: i for i, character in enumerate(vocabulary)}

    @classmethod
    def train(cls, text: str) -> CharTokenizer:
        """The vocabulary is every character of `text`."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """The number of characters."""
        return len(self.vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """(N,) int32; InputError for characters outside the vocabulary."""
        text = without_surrogates(text)
        try:
            return np.fromiter((self._ids[c] for c in text), np.int32, len(text))
        except KeyError:
            unknown = sorted(set(text) - set(self.vocabulary))
            shown = ", ".join(repr(c) for c in unknown[:5]) + (
                f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            )
            raise InputError(
                f"vocabulary mismatch: the text has {shown}, which the {self.vocab_size} "
                "characters this model was trained on do not include. "
                "Use text of the same alphabet, or train with --config.data.tokenizer=byte."
            ) from None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids."""
        return "".join(self.vocabulary[int(i)] for i in ids)

    def to_json(self) -> dict:
        """The kind and the vocabulary."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class ByteTokenizer:
    """The 256 bytes of UTF-8: spells any text."""

    kind = "byte"
    vocab_size = 256
    end_of_text = None

    def encode(self, text: str) -> np.ndarray:
        """(N,) int32, one id a byte."""
        return np.frombuffer(without_surrogates(text).encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def to_json(self) -> dict:
        """The kind, which tells everything."""
        return {"kind": self.kind}


class _HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, from its own serialization."""

    kind = ""

    def __init__(self, serialized: str, end_of_text: int | None = None):
        require("tokenizers", "for trained tokenizers")
        self._serialized, self.end_of_text = serialized, end_of_text
        self._tokenizer = _opened(serialized)
        # A document that happens to hold "</s>" (a closing tag, say) has not ended there: text
        # never becomes a special token.
        self._tokenizer.encode_special_tokens = True
        self._vocab_size = 1 + max(
            self._tokenizer.get_vocab().values(), default=-1
        )  # ids may have gaps

    @classmethod
    def _of(cls, serialized: str, end_of_text: int | None, where: str) -> Self:
        """The tokenizer of a serialization that may be damaged; `where` begins the message."""
        require("tokenizers", "for trained tokenizers")
        try:
            return cls(serialized, end_of_text)
        except BaseException as error:  # the library's own are plain Exceptions, or worse
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{where}, found another file ({first_line(error)[:200]}).") from None

    @property
    def vocab_size(self) -> int:
        """The highest id and one."""
        return self._vocab_size

    def encode(self, text: str) -> np.ndarray:
        """(N,) int32."""
        # Unlike `encode`, `encode_batch_fast` lets other threads run: the one that trains, and
        # others that read.
        encode = self._tokenizer.encode_batch_fast
        found = [
            np.asarray(encode([piece], add_special_tokens=False)[0].ids, np.int32)
            for piece in self._pieces(without_surrogates(text))
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def _pieces(self, text: str) -> Iterator[str]:
        """The parts of a text that are encoded one by one."""
        yield text  # where the words of an unknown tokenizer end, only it can say

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def to_json(self) -> dict:
        """Kind and the library's own serialization."""
        return {"kind": self.kind, "tokenizer": json.loads(self._serialized)}


class BPETokenizer(_HuggingFaceTokenizer):
    """Byte-level byte-pair encoding: spells any text."""

    kind = "bpe"

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BPETokenizer:
        """Learns `vocab_size` (at least 256) pieces from `text`; the same text gives the same
        pieces.
        """
        require("tokenizers", "for trained tokenizers")
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 256:
            raise InputError(
                f"data.bpe_vocab_size: byte-level BPE starts from 256 bytes, found {vocab_size}."
            )
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
        )
        bpe.train_from_iterator(pieces.short_words(without_surrogates(text)), trainer)
        return cls(bpe.to_str())

    def _pieces(self, text: str) -> Iterator[str]:
        yield from pieces.cut(text)


class FileTokenizer(_HuggingFaceTokenizer):
    """A tokenizer that someone else has trained. Whether it spells any text, and gives it back
    unchanged, is the file's own affair.
    """

    kind = "file"

    @classmethod
    def read(cls, path: str) -> FileTokenizer:
        """Reads a tokenizer.json, or a folder that holds one.

        Its end of text is the `eos_token` of a tokenizer_config.json beside it or, without that, a
        special token named </s>, <|endoftext|> or <|end_of_text|>.

        Raises:
          InputError: no such file, or one that is no tokenizer; an eos_token that the tokenizer has
            not.
        """
        if not path:
            raise InputError(
                "data.tokenizer_path: expected a tokenizer.json or its folder for "
                "data.tokenizer=file, found nothing; "
                "add --config.data.tokenizer_path=FOLDER."
            )
        file = place(path)
        file = file / "tokenizer.json" if os.path.isdir(file) else file
        if not os.path.exists(file):
            raise InputError(
                f"data.tokenizer_path: no file at {shown(file)}; give a tokenizer.json of Hugging "
                "Face's tokenizers, or its folder."
            )
        found = cls._of(_text_of(file), None, f"data.tokenizer_path: {_EXPECTED} in {shown(file)}")
        found.end_of_text = found._find_end_of_text(file.with_name("tokenizer_config.json"))
        return found

    def special_id(self, text: str) -> int | None:
        """The id of a token of this text, special or not; None where there is none."""
        return self._tokenizer.token_to_id(text)

    def before_a_text(self) -> list[int]:
        """The ids that the file puts before every text, such as one that begins a document."""
        found = self._tokenizer.encode("a", add_special_tokens=True)
        mask = found.special_tokens_mask
        return list(found.ids[: mask.index(0)]) if 0 in mask else []

    def encode_marked(self, text: str) -> np.ndarray:
        """(N,) int32 of a text in which names of special tokens, such as </s>, mean these tokens;
        nothing is put around it.
        """
        found = self._marked.encode(without_surrogates(text), add_special_tokens=False)
        return np.asarray(found.ids, np.int32)

    @functools.cached_property
    def _marked(self) -> Any:
        return _opened(self._serialized)

    def _find_end_of_text(self, config: Path) -> int | None:
        where = "data.tokenizer_path"
        name = read_json(config, where).get("eos_token") if os.path.exists(config) else None
        if name is not None and not isinstance(name := _content(name), str):
            raise InputError(
                f"{where}: {config}: expected a text for the eos_token, found {kind_of(name)}; "
                "mend it or take it away."
            )
        if name:
            if (token := self._tokenizer.token_to_id(name)) is None:
                raise InputError(
                    f"data.tokenizer_path: {config} names the eos_token {name!r}, which the "
                    "tokenizer.json beside it has not; mend one of them."
                )
            return token
        special = {
            token.content: i
            for i, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        return next((special[name] for name in _END_OF_TEXT if name in special), None)

    def to_json(self) -> dict:
        """The kind, the file's content and the end of text."""
        return super().to_json() | {"end_of_text": self.end_of_text}


def _opened(serialized: str) -> Any:
    """The library's tokenizer. Files may ask for texts to be cut or filled up to a length; here
    every text is wanted whole, and no longer.
    """
    import tokenizers

    made = tokenizers.Tokenizer.from_str(serialized)
    made.no_truncation()
    made.no_padding()
    return made


def _content(token: Any) -> Any:
    """The text of a token that may be given as an object with a 'content'."""
    return token.get("content") if isinstance(token, dict) else token


def _text_of(file: Path) -> str:
    where = f"data.tokenizer_path: {shown(file)}"
    return decode_text(read_bytes(file, "data.tokenizer_path"), where, strict=True)


def train(kind: str, text: str, *, bpe_vocab_size: int = 4096, path: str = "") -> Tokenizer:
    """Makes the tokenizer of a kind for a corpus; a 'file' is read from `path`."""
    check_choice("data.tokenizer", kind, CHOICES)
    if kind == "char":
        return CharTokenizer.train(text)
    if kind == "file":
        return FileTokenizer.read(path)
    return ByteTokenizer() if kind == "byte" else BPETokenizer.train(text, bpe_vocab_size)


def from_json(saved: dict) -> Tokenizer:
    """The inverse of `to_json`.

    Raises:
      InputError: it is no such value.
    """
    kind, where = saved.get("kind"), "tokenizer.json"
    check_choice(f"{where}: kind", kind, CHOICES)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        vocabulary = saved.get("vocabulary")
        if not isinstance(vocabulary, str) or len(set(vocabulary)) != len(vocabulary):
            raise InputError(
                f"{where}: expected under 'vocabulary' a text of different characters, found "
                f"{kind_of(vocabulary)}; put the run's own tokenizer.json there."
            )
        return CharTokenizer(vocabulary)
    serialized, end = json.dumps(saved.get("tokenizer")), saved.get("end_of_text")
    made = (BPETokenizer if kind == "bpe" else FileTokenizer)._of(
        serialized, end, f"{where}: {_EXPECTED}"
    )
    if end is not None and not (is_whole(end) and end < made.vocab_size):
        raise InputError(
            f"{where}: expected under 'end_of_text' a token below {made.vocab_size}, found "
            f"{kind_of(end)}; put the run's own tokenizer.json there."
        )
    return made


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Writes a tokenizer to the file at `path`, a `tokenizer.json`."""
    path.write_text(json.dumps(tokenizer.to_json(), ensure_ascii=False), encoding="utf-8")


def load(path: Path) -> Tokenizer:
    """Reads `tokenizer.json`."""
    if not os.path.lexists(path):
        raise InputError(f"no tokenizer at {path}: is this the run directory of a language model?")
    saved = read_json(path, "--workdir")
    try:
        return from_json(saved)
    except InputError as error:
        raise InputError(f"--workdir: {path} is damaged: {error}") from None
