"""Text <-> token ids: characters, bytes, or byte-pair encoding trained on the corpus (Hugging Face `tokenizers`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from quweit_jax.errors import InputError, check_choice

KINDS = ("char", "byte", "bpe")


class Tokenizer(Protocol):
    """What every tokenizer offers. Ids are int32, 0 <= id < vocab_size."""

    kind: str

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """(N,) int32; InputError for text the vocabulary cannot spell."""
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
        try:
            return np.fromiter((self._ids[c] for c in text), np.int32, len(text))
        except KeyError:
            unknown = sorted(set(text) - set(self.vocabulary))
            shown = ", ".join(repr(c) for c in unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            raise InputError(
                f"vocabulary mismatch: the text has {shown}, which the {self.vocab_size} characters this model was trained on do not include. "
                "Use text of the same alphabet, or train with --config.data.tokenizer=byte."
            ) from None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids."""
        return "".join(self.vocabulary[int(i)] for i in ids)

    def to_json(self) -> dict:
        """Kind and vocabulary."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class ByteTokenizer:
    """The 256 bytes of UTF-8: spells any text."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """(N,) int32, one id a byte."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def to_json(self) -> dict:
        """Kind alone."""
        return {"kind": self.kind}


class BPETokenizer:
    """Byte-level byte-pair encoding: spells any text."""

    kind = "bpe"

    def __init__(self, serialized: str):
        import tokenizers

        self._serialized = serialized
        self._bpe = tokenizers.Tokenizer.from_str(serialized)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BPETokenizer:
        """Learns `vocab_size` (at least 256) pieces from `text`; the same text gives the same pieces."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 256:
            raise InputError(f"data.bpe_vocab_size: byte-level BPE starts from 256 bytes, found {vocab_size}.")
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
        )
        bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(bpe.to_str())

    @property
    def vocab_size(self) -> int:
        """The number of pieces."""
        return self._bpe.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """(N,) int32."""
        return np.asarray(self._bpe.encode(text).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids."""
        return self._bpe.decode([int(i) for i in ids], skip_special_tokens=False)

    def to_json(self) -> dict:
        """Kind and the library's own serialisation."""
        return {"kind": self.kind, "tokenizer": json.loads(self._serialized)}


def train(kind: str, text: str, *, bpe_vocab_size: int = 4096) -> Tokenizer:
    """Makes the tokenizer of a kind for a corpus."""
    check_choice("data.tokenizer", kind, KINDS)
    if kind == "char":
        return CharTokenizer.train(text)
    return ByteTokenizer() if kind == "byte" else BPETokenizer.train(text, bpe_vocab_size)


def from_json(saved: dict) -> Tokenizer:
    """The inverse of `to_json`."""
    check_choice("tokenizer.json: kind", saved.get("kind"), KINDS)
    if saved["kind"] == "char":
        return CharTokenizer(saved["vocabulary"])
    return ByteTokenizer() if saved["kind"] == "byte" else BPETokenizer(json.dumps(saved["tokenizer"]))


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Writes `tokenizer.json`."""
    path.write_text(json.dumps(tokenizer.to_json(), ensure_ascii=False), encoding="utf-8")


def load(path: Path) -> Tokenizer:
    """Reads `tokenizer.json`."""
    if not path.exists():
        raise InputError(f"no tokenizer at {path}: is this the run directory of a language model?")
    return from_json(json.loads(path.read_text(encoding="utf-8")))
