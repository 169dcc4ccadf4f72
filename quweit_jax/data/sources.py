"""Where examples come from: the standard library's text, a user's file or folder of images, TFDS,
scikit-learn's digits.

A text source gives one string a split; large sets give documents, labelled sources examples, by
index. No TensorFlow at run time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quweit_jax.data.augment import check_number
from quweit_jax.data.documents import (
    VALIDATION_FOLDERS,
    DocumentSplits,
    TFDSDocuments,
    document_folder,
)
from quweit_jax.data.images import ImageConfig, ImageExamples, ImageSource
from quweit_jax.errors import InputError, check_choice, nearest

SOURCES = ("python_stdlib", "text_file", "document_folder", "tfds", "digits", "image_folder")
_IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)


@dataclasses.dataclass(frozen=True)
class DataConfig(ImageConfig):
    """What to read; of images, how (see ImageConfig).

    source: 'python_stdlib', 'text_file' (path), 'document_folder' (path; .txt and .jsonl files),
    'tfds' (name, data_dir), 'digits' or 'image_folder' (path).
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
    """

    source: str = "python_stdlib"
    name: str = ""
    data_dir: str | None = None
    path: str = ""
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

    def __post_init__(self):
        super().__post_init__()
        check_choice("data.source", self.source, SOURCES)
        check_number("data.limit_bytes", self.limit_bytes, 0, whole=True)
        check_number("data.validation_tokens", self.validation_tokens, 2, whole=True)
        if not 0 < self.validation_fraction < 1:
            raise InputError(
                "data.validation_fraction: expected a share between 0 and 1, found "
                f"{self.validation_fraction}."
            )


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
    image_shape: tuple[int, int, int] | None = None


def load(config: DataConfig) -> TextSplits | DocumentSplits | LabelledSplits:
    """Reads the configured source; documents and images are not read yet."""
    if config.source == "document_folder":
        return document_folder(config.path, config.validation_split)
    if config.source == "digits":
        return digits(config.split_seed, config.test_fraction)
    if config.source == "tfds":
        return tfds_splits(config)
    if config.source == "image_folder":
        return image_folder(config)
    text = (
        python_stdlib(config.limit_bytes)
        if config.source == "python_stdlib"
        else text_file(config.path, config.limit_bytes)
    )
    cut = int(len(text) * (1 - config.validation_fraction))
    return TextSplits(text[:cut], text[cut:])


def python_stdlib(limit_bytes: int = 2_000_000) -> str:
    """The .py files of the running interpreter's standard library, in sorted order, up to a byte
    limit (0: all of them).
    """
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
        raise InputError(
            f"python_stdlib: no .py files under {root} (a frozen interpreter?); use "
            "--config.data.source=text_file with a path."
        )
    return _cut("".join(pieces), limit_bytes)


def _python_files(folder: Path) -> Iterator[Path]:
    """The .py files below a folder, but for installed packages, in the order of their paths; walked
    only as far as they are asked for.
    """
    for entry in sorted(os.scandir(folder), key=lambda e: f"{e.name}/" if e.is_dir() else e.name):
        if entry.is_dir():
            if entry.name not in ("site-packages", "dist-packages"):
                yield from _python_files(Path(entry.path))
        elif entry.name.endswith(".py"):
            yield Path(entry.path)


def text_file(path: str, limit_bytes: int = 0) -> str:
    """A user's own UTF-8 text."""
    if not path:
        raise InputError(
            "data.path: expected the path of a text file for data.source=text_file, found nothing; "
            "add --config.data.path=FILE."
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"data.path: no file at {path}; check the path.")
    try:
        return _cut(file.read_text(encoding="utf-8"), limit_bytes)
    except UnicodeDecodeError as error:
        raise InputError(
            f"data.path: {path} is not UTF-8 text (byte {error.start}); convert it first."
        ) from None


def _cut(text: str, limit_bytes: int) -> str:
    return (
        text.encode("utf-8")[:limit_bytes].decode("utf-8", errors="ignore") if limit_bytes else text
    )


class ArrayExamples(Sequence):
    """Labelled examples held in two arrays."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray):
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index):  # type: ignore[override]
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


def digits(split_seed: int = 0, test_fraction: float = 0.2) -> LabelledSplits:
    """scikit-learn's 1,797 handwritten digits, 64 pixels of 0..16 each; a stratified split, the
    test share also for validation.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    split = train_test_split(
        x.astype(np.float32),
        y.astype(np.int32),
        test_size=test_fraction,
        random_state=split_seed,
        stratify=y,
    )
    x_train, x_test, y_train, y_test = (np.asarray(part) for part in split)
    test = ArrayExamples(x_test, y_test)
    return LabelledSplits(ArrayExamples(x_train, y_train), test, test, 10, tuple("0123456789"))


class TFDSImages:
    """Images and labels of a TFDS random-access source as they are stored: encoded bytes where
    `image` is one, arrays otherwise.
    """

    def __init__(self, builder: Any, name: str, split: str):
        import tensorflow_datasets as tfds

        image, label = builder.info.features["image"], builder.info.features["label"]
        if not getattr(label, "num_classes", None):
            raise InputError(
                f"data.name: expected classes as the label of {name}, found {label}; use another "
                "set."
            )
        shape = tuple(image.shape)
        self.channels = (
            shape[2] if len(shape) == 3 and shape[2] in (1, 3, 4) else 1 if len(shape) == 2 else 3
        )
        self.num_classes, self.labels = label.num_classes, tuple(label.names)
        self.place = f"{name}, split {split}"
        self._identity = f"{builder.info.full_name}, split {split}"
        # Encoded images are decoded here, which says what is wrong with a bad one, and needs
        # neither TensorFlow nor OpenCV.
        encoded = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
        self.records = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()} if encoded else None
        )

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """See ImageSource."""
        record = self.records[index]
        return record["image"], int(record["label"])

    def describe(self, index: int) -> str:
        """See ImageSource."""
        return f"{self.place}, image {index}"

    def identity(self) -> str:
        """See ImageSource."""
        return self._identity


class FolderImages:
    """Image files with their classes; `files` are (path below the root, class)."""

    channels = 3

    def __init__(self, root: Path, split: str, files: Sequence[tuple[str, int]], num_classes: int):
        self.root, self.split, self.files, self.num_classes = root, split, files, num_classes

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """See ImageSource."""
        file, target = self.files[index]
        return (self.root / file).read_bytes(), target

    def describe(self, index: int) -> str:
        """See ImageSource."""
        return f"{self.root}, split {self.split}, image {index} ({self.files[index][0]})"

    def identity(self) -> str:
        """See ImageSource."""
        return "\n".join(f"{file} {target}" for file, target in self.files)


def image_splits(
    train: ImageSource,
    validation: ImageSource,
    test: ImageSource | None,
    labels: tuple[str, ...],
    config: ImageConfig,
) -> LabelledSplits:
    """Examples of image sources, all of the training images' shape; without a test source,
    validation's is the test.
    """
    examples = ImageExamples(train, config)
    held_out = ImageExamples(validation, config, examples.shape)
    # An image that cannot be used may well be like all the others: say so now. Test splits may have
    # no classes, and may never be read.
    _ = examples.first, held_out.first
    tested = held_out if test is None else ImageExamples(test, config, examples.shape)
    return LabelledSplits(examples, held_out, tested, train.num_classes, labels, examples.shape)


def image_folder(config: DataConfig) -> LabelledSplits:
    """Images in folders named after their classes: FOLDER/train/CLASS/... beside FOLDER/validation,
    val or test, or FOLDER/CLASS/... alone.

    Classes are train's folders in sorted order; images may lie deeper. Without a validation folder,
    `validation_fraction` of each class is held out (at least one image, never all): those whose
    paths have the lowest SHA-256 with `split_seed`, so that the split depends neither on the
    machine nor on the order of the files.
    """
    if not config.path:
        raise InputError(
            "data.path: expected a folder of images for data.source=image_folder, found nothing; "
            "add --config.data.path=FOLDER."
        )
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise InputError(f"data.path: no folder at {config.path}; check the path.")
    top = "train" if (root / "train").is_dir() else ""
    candidates = (config.validation_split,) if config.validation_split else VALIDATION_FOLDERS
    beside = [name for name in candidates if (root / name).is_dir()]
    if beside and not top:
        raise InputError(
            f"data.path: {config.path} has a folder '{beside[0]}' but none named 'train'; give it "
            "one, with a folder for each class."
        )
    if config.validation_split and not beside:
        raise InputError(
            f"data.validation_split: no folder '{config.validation_split}' in {config.path}; leave "
            f"it out for {', '.join(VALIDATION_FOLDERS)}."
        )
    labels, train = _class_files(root, top)
    if len(labels) < 2:
        raise InputError(
            f"data.path: expected a folder for each of two or more classes in {root / top}, found "
            f"{', '.join(labels) or 'none'}."
        )
    filled = {target for _, target in train}
    if empty := [label for target, label in enumerate(labels) if target not in filled]:
        raise InputError(
            f"data.path: the class '{empty[0]}' in {root / top} has no images (files ending in "
            f"{', '.join(_IMAGE_SUFFIXES)}); "
            "add some, or take the folder away."
        )
    test = None
    if beside:
        validation = _class_files(root, beside[0], labels)[1]
        if "test" not in beside[:1] and (root / "test").is_dir():
            test = _class_files(root, "test", labels)[1]
    else:
        train, validation = _held_out(
            train, len(labels), config.validation_fraction, config.split_seed
        )
    if not validation:
        raise InputError(
            f"data.path: no images to validate on in {root / beside[0] if beside else root}; add "
            "some."
        )

    def images(split: str, files: list[tuple[str, int]]) -> FolderImages:
        return FolderImages(root, split, files, len(labels))

    held_out = images(beside[0] if beside else "validation", validation)
    return image_splits(
        images("train", train), held_out, images("test", test) if test else None, labels, config
    )


def _class_files(
    root: Path, split: str, labels: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The classes (or those given) below root/split, sorted, and their images: (path below root,
    class), sorted.
    """
    folder = root / split
    found = tuple(
        sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        )
    )
    labels = found if labels is None else labels
    files = []
    for name in found:
        if name not in labels:
            raise InputError(
                f"data.path: {folder} has a class '{name}' that train has "
                f"not.{nearest(name, labels)}"
            )
        for where, folders, names in os.walk(folder / name, followlinks=True):
            folders.sort()
            images = sorted(
                n for n in names if n.lower().endswith(_IMAGE_SUFFIXES) and not n.startswith(".")
            )
            files += [
                (Path(where, image).relative_to(root).as_posix(), labels.index(name))
                for image in images
            ]
    return labels, files


def _held_out(
    files: list[tuple[str, int]], num_classes: int, fraction: float, seed: int
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Files to train on and files to validate on, a share of each class."""
    chosen = set()
    for target in range(num_classes):
        mine = sorted(
            (f for f, t in files if t == target),
            key=lambda file: hashlib.sha256(f"{seed}/{file}".encode()).digest(),
        )
        chosen.update(mine[: min(max(1, round(len(mine) * fraction)), len(mine) - 1)])
    return [f for f in files if f[0] not in chosen], [f for f in files if f[0] in chosen]


def tfds_splits(config: DataConfig) -> TextSplits | DocumentSplits | LabelledSplits:
    """A TFDS set by name, read with `tfds.data_source`: sets with image and label are classified, a
    text set whose training split is one example is that text, and other text sets are documents.
    """
    import tensorflow_datasets as tfds

    if not config.name:
        raise InputError(
            "data.name: expected a TFDS name such as tiny_shakespeare for data.source=tfds; add "
            "--config.data.name=NAME."
        )
    if config.data_dir is not None and not Path(config.data_dir).expanduser().is_dir():
        raise InputError(
            f"data.data_dir: no directory at {config.data_dir}; give the folder that holds "
            f"{config.name}/VERSION/, or leave it out."
        )
    builder = _tfds_builder(tfds, config)
    splits = list(builder.info.splits)
    features = builder.info.features or {}
    validation = config.validation_split or ("validation" if "validation" in splits else "test")
    is_text = "text" in features and isinstance(features["text"], tfds.features.Text)
    documents = is_text and "train" in splits and builder.info.splits["train"].num_examples != 1
    if documents and not config.validation_split and validation not in splits:
        return DocumentSplits(TFDSDocuments(builder, config.name, "train"), None)
    wanted = {"train": ["train"], "validation": validation.split("+")}
    for split in [*wanted["train"], *wanted["validation"]]:
        if split not in splits:
            raise InputError(
                f"data.validation_split: {config.name} has no split '{split}'; it has "
                f"{', '.join(splits)}."
            )
    if documents:
        return DocumentSplits(
            *(TFDSDocuments(builder, config.name, split) for split in ("train", validation))
        )
    if is_text:
        read = {
            split: builder.as_data_source(split=split)
            for group in wanted.values()
            for split in group
        }
        joined = {
            k: "".join(_text(x["text"]) for split in group for x in read[split])
            for k, group in wanted.items()
        }
        return TextSplits(joined["train"], joined["validation"])
    if "image" in features and "label" in features:
        if len(wanted["validation"]) != 1:
            raise InputError("data.validation_split: give one split for an image set.")
        train, held_out = (
            TFDSImages(builder, config.name, split) for split in ("train", wanted["validation"][0])
        )
        test = (
            TFDSImages(builder, config.name, "test")
            if "test" in splits and wanted["validation"] != ["test"]
            else None
        )
        return image_splits(train, held_out, test, train.labels, config)
    raise InputError(
        f"data.name: {config.name} has features {sorted(features)}; expected a text named 'text', "
        "or 'image' and 'label'; use another set."
    )


def _tfds_builder(tfds: Any, config: DataConfig) -> Any:
    where = config.data_dir or "TFDS's default folder"
    kwargs = (
        {} if config.data_dir is None else {"data_dir": str(Path(config.data_dir).expanduser())}
    )
    try:
        builder = tfds.builder(config.name, file_format="array_record", try_gcs=False, **kwargs)
    except Exception as error:
        try:  # a set that is prepared on disk but unknown to this TFDS
            builder = tfds.builder_from_directory(_prepared_folder(config))
        except Exception:
            raise InputError(
                f"data.name: TFDS cannot open '{config.name}' in {where} ({type(error).__name__}: "
                f"{_first_line(error)})."
            ) from None
    if builder.info.splits:
        return builder
    if config.data_dir is not None or not config.download:
        raise InputError(
            f"data.data_dir: {where} holds no prepared '{config.name}'. Prepare it there (tfds "
            f"build {config.name} --file_format=array_record), "
            "give another folder, or leave data_dir out and let TFDS download it."
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise InputError(
            f"data.name: '{config.name}' is not prepared in {where} and could not be downloaded "
            f"({type(error).__name__}: {_first_line(error)}). "
            "Give the folder that holds it with --config.data.data_dir=FOLDER, or prepare it "
            f"with: tfds build {config.name} --file_format=array_record"
        ) from None
    return builder


def _prepared_folder(config: DataConfig) -> str:
    versions = sorted(
        p
        for p in (Path(config.data_dir or "~/tensorflow_datasets").expanduser() / config.name).glob(
            "*.*.*"
        )
        if p.is_dir()
    )
    return str(versions[-1])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
