"""Where examples come from: the standard library's text, a user's file, TFDS, scikit-learn's digits.

A text source gives one string a split; a labelled source gives random-access examples. No TensorFlow at run time.
"""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quweit_jax.errors import InputError, check_choice

SOURCES = ("python_stdlib", "text_file", "tfds", "digits")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read.

    source: 'python_stdlib', 'text_file' (path), 'tfds' (name, data_dir) or 'digits'.
    limit_bytes: of python_stdlib and text_file, 0 for all. validation_fraction: the end of a text without splits of its own.
    validation_split: TFDS splits to validate on, joined by '+'; '' for 'validation' or else 'test'.
    tokenizer: 'char', 'byte' or 'bpe' (bpe_vocab_size pieces). download: let TFDS fetch and prepare a set that isn't there.
    split_seed: of the stratified split of digits; test_fraction: its share.
    """

    source: str = "python_stdlib"
    name: str = ""
    data_dir: str | None = None
    path: str = ""
    limit_bytes: int = 2_000_000
    validation_fraction: float = 0.1
    validation_split: str = ""
    tokenizer: str = "char"
    bpe_vocab_size: int = 4096
    download: bool = True
    split_seed: int = 0
    test_fraction: float = 0.2

    def __post_init__(self):
        check_choice("data.source", self.source, SOURCES)
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"data.validation_fraction: expected a share between 0 and 1, found {self.validation_fraction}.")


@dataclasses.dataclass(frozen=True)
class TextSplits:
    """A corpus: one string a split."""

    train: str
    validation: str
    test: str = ""


@dataclasses.dataclass(frozen=True)
class LabelledSplits:
    """Classification: `train[i]` is {'inputs': array, 'targets': int}; likewise the others."""

    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]
    num_classes: int
    labels: tuple[str, ...] = ()


def load(config: DataConfig) -> TextSplits | LabelledSplits:
    """Reads the configured source."""
    if config.source == "digits":
        return digits(config.split_seed, config.test_fraction)
    if config.source == "tfds":
        return tfds_splits(config)
    text = python_stdlib(config.limit_bytes) if config.source == "python_stdlib" else text_file(config.path, config.limit_bytes)
    cut = int(len(text) * (1 - config.validation_fraction))
    return TextSplits(text[:cut], text[cut:])


def python_stdlib(limit_bytes: int = 2_000_000) -> str:
    """The .py files of the running interpreter's standard library, in sorted order, up to a byte limit (0: all of them)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces, total = [], 0
    for path in _python_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few of CPython's own tests are deliberately in other encodings
        pieces.append(text)
        total += len(text.encode("utf-8"))
        if limit_bytes and total >= limit_bytes:
            break
    if not pieces:
        raise InputError(f"python_stdlib: no .py files under {root} (a frozen interpreter?); use --config.data.source=text_file with a path.")
    return _cut("".join(pieces), limit_bytes)


def _python_files(folder: Path) -> Iterator[Path]:
    """The .py files below a folder, but for installed packages, in the order of their paths; walked only as far as they are asked for."""
    for entry in sorted(os.scandir(folder), key=lambda e: f"{e.name}/" if e.is_dir() else e.name):
        if entry.is_dir():
            if entry.name not in ("site-packages", "dist-packages"):
                yield from _python_files(Path(entry.path))
        elif entry.name.endswith(".py"):
            yield Path(entry.path)


def text_file(path: str, limit_bytes: int = 0) -> str:
    """A user's own UTF-8 text."""
    if not path:
        raise InputError("data.path: expected the path of a text file for data.source=text_file, found nothing; add --config.data.path=FILE.")
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"data.path: no file at {path}; check the path.")
    try:
        return _cut(file.read_text(encoding="utf-8"), limit_bytes)
    except UnicodeDecodeError as error:
        raise InputError(f"data.path: {path} is not UTF-8 text (byte {error.start}); convert it first.") from None


def _cut(text: str, limit_bytes: int) -> str:
    return text.encode("utf-8")[:limit_bytes].decode("utf-8", errors="ignore") if limit_bytes else text


class ArrayExamples(Sequence):
    """Labelled examples held in two arrays."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray):
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index):  # type: ignore[override]
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


def digits(split_seed: int = 0, test_fraction: float = 0.2) -> LabelledSplits:
    """scikit-learn's 1,797 handwritten digits, 64 pixels of 0..16 each; a stratified split, the test share also for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    split = train_test_split(x.astype(np.float32), y.astype(np.int32), test_size=test_fraction, random_state=split_seed, stratify=y)
    x_train, x_test, y_train, y_test = (np.asarray(part) for part in split)
    test = ArrayExamples(x_test, y_test)
    return LabelledSplits(ArrayExamples(x_train, y_train), test, test, 10, tuple("0123456789"))


class TFDSImages(Sequence):
    """Labelled images of a TFDS random-access source: inputs float32 in [0, 1], decoded when asked for."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):  # type: ignore[override]
        example = self.source[int(index)]
        return {"inputs": np.asarray(example["image"], np.float32) / 255.0, "targets": np.int32(example["label"])}


def tfds_splits(config: DataConfig) -> TextSplits | LabelledSplits:
    """A TFDS set by name, read with `tfds.data_source`: text sets give their text, sets with image and label are classified."""
    import tensorflow_datasets as tfds

    if not config.name:
        raise InputError("data.name: expected a TFDS name such as tiny_shakespeare for data.source=tfds; add --config.data.name=NAME.")
    if config.data_dir is not None and not Path(config.data_dir).expanduser().is_dir():
        raise InputError(f"data.data_dir: no directory at {config.data_dir}; give the folder that holds {config.name}/VERSION/, or leave it out.")
    builder = _tfds_builder(tfds, config)
    splits = list(builder.info.splits)
    features = builder.info.features or {}
    validation = config.validation_split or ("validation" if "validation" in splits else "test")
    wanted = {"train": ["train"], "validation": validation.split("+")}
    for split in [*wanted["train"], *wanted["validation"]]:
        if split not in splits:
            raise InputError(f"data.validation_split: {config.name} has no split '{split}'; it has {', '.join(splits)}.")
    read = {split: builder.as_data_source(split=split) for group in wanted.values() for split in group}
    if "text" in features:
        joined = {k: "".join(_text(x["text"]) for split in group for x in read[split]) for k, group in wanted.items()}
        return TextSplits(joined["train"], joined["validation"])
    if "image" in features and "label" in features:
        if len(wanted["validation"]) != 1:
            raise InputError("data.validation_split: give one split for an image set.")
        held_out = TFDSImages(read[wanted["validation"][0]])
        test = TFDSImages(builder.as_data_source(split="test")) if "test" in splits else held_out
        label = features["label"]
        return LabelledSplits(TFDSImages(read["train"]), held_out, test, label.num_classes, tuple(label.names))
    raise InputError(f"data.name: {config.name} has features {sorted(features)}; expected 'text', or 'image' and 'label'.")


def _tfds_builder(tfds: Any, config: DataConfig) -> Any:
    where = config.data_dir or "TFDS's default folder"
    kwargs = {} if config.data_dir is None else {"data_dir": str(Path(config.data_dir).expanduser())}
    try:
        builder = tfds.builder(config.name, file_format="array_record", try_gcs=False, **kwargs)
    except Exception as error:
        try:  # a set that is prepared on disk but unknown to this TFDS
            builder = tfds.builder_from_directory(_prepared_folder(config))
        except Exception:
            raise InputError(f"data.name: TFDS cannot open '{config.name}' in {where} ({type(error).__name__}: {_first_line(error)}).") from None
    if builder.info.splits:
        return builder
    if config.data_dir is not None or not config.download:
        raise InputError(
            f"data.data_dir: {where} holds no prepared '{config.name}'. Prepare it there (tfds build {config.name} --file_format=array_record), "
            "give another folder, or leave data_dir out and let TFDS download it."
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise InputError(
            f"data.name: '{config.name}' is not prepared in {where} and could not be downloaded ({type(error).__name__}: {_first_line(error)}). "
            f"Give the folder that holds it with --config.data.data_dir=FOLDER, or prepare it with: tfds build {config.name} --file_format=array_record"
        ) from None
    return builder


def _prepared_folder(config: DataConfig) -> str:
    versions = sorted(p for p in (Path(config.data_dir or "~/tensorflow_datasets").expanduser() / config.name).glob("*.*.*") if p.is_dir())
    return str(versions[-1])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
