"""Labelled sources: scikit-learn's digits and a user's folder of images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quweit_jax.data.documents import VALIDATION_FOLDERS
from quweit_jax.data.images import ImageConfig, ImageExamples, ImageSource
from quweit_jax.data.registry import DataConfig, LabelledSplits, source
from quweit_jax.errors import InputError, nearest, require
from quweit_jax.reading import list_folder, open_regular, place, shown, walk, without_surrogates

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


class ArrayExamples(Sequence):
    """Labelled examples held in two arrays."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray):
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index):  # type: ignore[override]
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


@source("digits")
def digits(config: DataConfig) -> LabelledSplits:
    """scikit-learn's 1,797 handwritten digits, 64 pixels of 0..16 each; a stratified split, the
    test share also for validation.
    """
    require("sklearn", "for data.source=digits")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    split = train_test_split(
        x.astype(np.float32),
        y.astype(np.int32),
        test_size=config.test_fraction,
        random_state=config.split_seed,
        stratify=y,
    )
    x_train, x_test, y_train, y_test = (np.asarray(part) for part in split)
    test = ArrayExamples(x_test, y_test)
    return LabelledSplits(ArrayExamples(x_train, y_train), test, test, 10, tuple("0123456789"))


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
        with open_regular(self.root / file) as opened:
            return opened.read(), target

    def describe(self, index: int) -> str:
        """See ImageSource."""
        file = shown(self.files[index][0])
        return f"{shown(self.root)}, split {self.split}, image {index} ({file})"

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


@source("image_folder")
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
    root = place(config.path)
    if not os.path.isdir(root):
        raise InputError(f"data.path: no folder at {shown(config.path)}; check the path.")
    top = "train" if os.path.isdir(root / "train") else ""
    candidates = (config.validation_split,) if config.validation_split else VALIDATION_FOLDERS
    beside = [name for name in candidates if os.path.isdir(root / name)]
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
    labels, train = _class_files(root, top, config.skip_bad)
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
        validation = _class_files(root, beside[0], config.skip_bad, labels)[1]
        if "test" not in beside[:1] and os.path.isdir(root / "test"):
            test = _class_files(root, "test", config.skip_bad, labels)[1]
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
    tested = images("test", test) if test else None
    names = tuple(map(without_surrogates, labels))
    return image_splits(images("train", train), held_out, tested, names, config)


def _class_files(
    root: Path, split: str, skip_bad: bool, labels: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The classes (or those given) below root/split, sorted, and their images: (path below root,
    class), sorted.

    Hidden files and folders are left out. skip_bad: keep what is no file, to be left out later.
    """
    folder = root / split
    found = tuple(e.name for e in list_folder(folder, "data.path") if os.path.isdir(e.path))
    labels = found if labels is None else labels
    files = []
    for name in found:
        if name not in labels:
            raise InputError(
                f"data.path: {shown(folder)} has a class '{shown(name)}' that train has "
                f"not.{nearest(name, labels)}"
            )
        images = []
        for image, is_file in walk(folder / name, _IMAGE_SUFFIXES, "data.path", lower=True):
            if not is_file and not skip_bad:
                raise InputError(
                    f"data.path: expected an image at {shown(folder / name / image)}, found a "
                    "pipe, a device or a link to nothing; take it away, or leave such images out "
                    "with --config.data.skip_bad=True."
                )
            images.append(image)
        # A folder's own images stand before those of the folders in it.
        images.sort(key=lambda path: [(1, part) for part in path.split("/")[:-1]] + [(0, path)])
        above = (Path(split) / name).as_posix()
        files += [(f"{above}/{image}", labels.index(name)) for image in images]
    return labels, files


def _held_out(
    files: list[tuple[str, int]], num_classes: int, fraction: float, seed: int
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Files to train on and files to validate on, a share of each class."""
    chosen = set()
    for target in range(num_classes):
        mine = sorted(
            (f for f, t in files if t == target),
            key=lambda file: hashlib.sha256(os.fsencode(f"{seed}/{file}")).digest(),
        )
        chosen.update(mine[: min(max(1, round(len(mine) * fraction)), len(mine) - 1)])
    return [f for f in files if f[0] not in chosen], [f for f in files if f[0] in chosen]
