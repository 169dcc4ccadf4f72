"""What can be read, by name: a source is a function of a DataConfig, decorated with `source(name)`.

No source needs TensorFlow at run time.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

from quweit_jax.config import SECTIONS
from quweit_jax.data.augment import check_number
from quweit_jax.data.documents import DocumentSplits
from quweit_jax.data.images import Example, ImageConfig
from quweit_jax.data.tokenizers import CharTokenizer
from quweit_jax.errors import InputError, check_choice
from quweit_jax.reading import check_local

# The modules whose sources are known; a new source is one more function in one of them.
_MODULES = ("text", "tfds", "image_sources", "recall")


@dataclasses.dataclass(frozen=True)
class DataConfig(ImageConfig):
    """What to read; of images, how (see ImageConfig).

    source: 'python_stdlib', 'text_file' (path), 'document_folder' (path; see
    `text.document_folder`), 'tfds' (name, data_dir), 'digits', 'image_folder' (path) or 'recall'
    (see `data.recall`).
    text_column: of JSON lines, Parquet files and sets that Hugging Face's `datasets` saved, the key
      or column that holds the text.
    limit_bytes: of python_stdlib and text_file, 0 for all; of documents, what a 'bpe' tokenizer is
      trained on, 0 for 20 MB.
    validation_fraction: the end of a text, or the share of an image folder, without splits of its
      own; of documents, at most that share.
    validation_split: TFDS splits to validate on, joined by '+', or the folder of images or
    documents; '' for 'validation' (of folders also 'val') or else 'test'. validation_tokens: of the
    first validation documents; without a validation split, of the last documents, which are then
    not trained on.
    tokenizer: 'char', 'byte', 'bpe' (bpe_vocab_size pieces) or 'file' (tokenizer_path: a
    tokenizer.json of Hugging Face's tokenizers, or its folder; needed only to begin a run).
    download: let TFDS fetch and prepare a set that isn't there.
    split_seed: of the stratified split of digits and of image folders; test_fraction: its share of
    digits.
    recall_pairs: keys and values in a text of 'recall'; recall_symbols: of its vocabulary;
    recall_texts: to train on.
    """

    source: str = "python_stdlib"
    name: str = ""
    data_dir: str | None = None
    path: str = ""
    text_column: str = "text"
    limit_bytes: int = 2_000_000
    validation_fraction: float = 0.1
    validation_split: str = ""
    validation_tokens: int = 1_000_000
    tokenizer: str = "char"
    tokenizer_path: str = ""
    bpe_vocab_size: int = 4096
    download: bool = True
    split_seed: int = 0
    test_fraction: float = 0.2
    recall_pairs: int = 4
    recall_symbols: int = 256
    recall_texts: int = 100_000

    def __post_init__(self):
        super().__post_init__()
        check_choice("data.source", self.source, names())
        check_number("data.limit_bytes", self.limit_bytes, 0, whole=True)
        check_number("data.validation_tokens", self.validation_tokens, 2, whole=True)
        for key in ("recall_pairs", "recall_symbols", "recall_texts"):
            check_number(f"data.{key}", getattr(self, key), 1, whole=True)
        for key in ("path", "data_dir", "tokenizer_path"):
            advice = "mount it, or copy it to a folder"
            check_local(getattr(self, key) or "", f"data.{key}", advice)
        if not 0 < self.validation_fraction < 1:
            raise InputError(
                "data.validation_fraction: expected a share between 0 and 1, found "
                f"{self.validation_fraction}."
            )


SECTIONS["data"] = lambda _: DataConfig


@dataclasses.dataclass(frozen=True)
class TextSplits:
    """A corpus of text, one string a split."""

    train: str
    validation: str
    test: str = ""


@dataclasses.dataclass(frozen=True)
class LabelledSplits:
    """Labelled examples: `train[i]` is {'inputs': array, 'targets': int}; likewise the others."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    num_classes: int
    labels: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class RecallSplits:
    """Texts made for a model's context: functions of it."""

    train: Callable[[int], Sequence[Example]]
    validation: Callable[[int], Sequence[Example]]
    tokenizer: CharTokenizer


Splits: TypeAlias = TextSplits | DocumentSplits | LabelledSplits | RecallSplits
# A source gives splits or, of a single text, the whole string.
Source: TypeAlias = Callable[[DataConfig], Splits | str]
_SOURCES: dict[str, Source] = {}


def source(name: str) -> Callable[[Source], Source]:
    """A decorator that makes a function known as `data.source=name`."""

    def add(function: Source) -> Source:
        _SOURCES[name] = function
        return function

    return add


def names() -> tuple[str, ...]:
    """The names of all sources."""
    for module in _MODULES:
        importlib.import_module(f"quweit_jax.data.{module}")
    return tuple(_SOURCES)


def load(config: DataConfig) -> Splits:
    """Reads the configured source; documents and images are not read yet."""
    found = _SOURCES[config.source](config)
    if not isinstance(found, str):
        return found
    end = int(len(found) * (1 - config.validation_fraction))
    return TextSplits(found[:end], found[end:])
