"""Where labelled images come from: folders of class folders, and TFDS sets."""

import os
import re

import numpy as np
import pytest
from PIL import Image

from quweit_jax.data import pipeline, registry
from quweit_jax.data.augment import AugmentConfig
from quweit_jax.data.images import ImageExamples
from quweit_jax.data.registry import DataConfig
from quweit_jax.data.tfds import TFDSImages
from quweit_jax.errors import InputError
from tests.pictures import picture

# Folders.


def write_folder(root, classes=("cat", "dog"), count=3, size=(8, 8), kind="png"):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(*size, seed=10 * c + i)).save(root / name / f"{i}.{kind}")
    return root


def folder(path, **config):
    return pipeline.load(DataConfig("image_folder", path=str(path), **config))


def test_image_folder(tmp_path):
    write_folder(tmp_path / "train", ("zebra", "ant", "cat"))
    write_folder(tmp_path / "val", ("ant", "zebra"), count=2)  # no cat to validate on
    write_folder(tmp_path / "train" / "cat" / "deeper", ("a",), count=1, kind="JPEG")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    data = folder(tmp_path)
    assert (
        data.labels == ("ant", "cat", "zebra")
        and data.outputs == 3
        and data.image_shape == (8, 8, 3)
        and data.tokenizer is None
    )
    assert (len(data.train), len(data.validation)) == (10, 4)
    assert [int(x["targets"]) for x in data.train] == [0] * 3 + [1] * 4 + [2] * 3 and [
        int(x["targets"]) for x in data.validation
    ] == [0, 0, 2, 2]
    np.testing.assert_array_equal(
        data.train[0]["inputs"], picture(seed=10).astype(np.float32) / np.float32(255)
    )
    assert data.fit_batch().shape == (10, 8, 8, 3)
    assert data.fingerprint == folder(tmp_path).fingerprint
    write_folder(tmp_path / "test", ("cat",), count=5)
    splits = registry.load(DataConfig("image_folder", path=str(tmp_path)))
    assert (len(splits.validation), len(splits.test)) == (4, 5)
    assert len(folder(tmp_path, validation_split="test").validation) == 5
    os.remove(tmp_path / "train" / "ant" / "2.png")
    assert data.fingerprint != folder(tmp_path).fingerprint


def test_image_folder_without_splits(tmp_path):
    write_folder(tmp_path, ("a", "b", "c"), count=10)
    data = folder(tmp_path, validation_fraction=0.2)
    held_out = {file for file, _ in data.validation.source.files}
    assert (len(data.train), len(data.validation)) == (24, 6) and not held_out & {
        file for file, _ in data.train.source.files
    }
    assert [int(x["targets"]) for x in data.validation] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]  # a share of each class
    assert held_out == {
        file for file, _ in folder(tmp_path, validation_fraction=0.2).validation.source.files
    }
    assert held_out != {
        file
        for file, _ in folder(
            tmp_path, validation_fraction=0.2, split_seed=1
        ).validation.source.files
    }
    assert (
        len(folder(tmp_path, validation_fraction=0.01).validation) == 3
        and len(folder(tmp_path, validation_fraction=0.99).train) == 3
    )


def test_bad_files_are_named(tmp_path):
    write_folder(tmp_path, count=8)
    (tmp_path / "dog" / "3.png").write_bytes(b"")
    data = folder(tmp_path)
    every = [data.train, data.validation]
    with pytest.raises(
        InputError,
        match=rf"data: {re.escape(str(tmp_path))}, split \w+, image \d+ \(dog/3\.png\): .*found an "
        r"empty file",
    ):
        [list(examples) for examples in every]
    (tmp_path / "dog" / "3.png").unlink()
    with pytest.raises(
        InputError,
        match=r"\(dog/3\.png\): .*found an unreadable file \(No such file or directory\)",
    ):
        [list(examples) for examples in every]


def test_folder_errors(tmp_path):
    def fails(message, path=tmp_path, **config):
        with pytest.raises(InputError, match=message):
            folder(path, **config)

    fails(
        r"data\.path: expected a folder of images .*, found nothing; add "
        r"--config\.data\.path=FOLDER",
        "",
    )
    fails(r"data\.path: no folder at .*nowhere; check the path", tmp_path / "nowhere")
    fails(r"data\.path: expected a folder for each of two or more classes in .*, found none")
    write_folder(tmp_path / "train", ("cat",))
    fails(r"two or more classes in .*train, found cat")
    write_folder(tmp_path / "train", ("dog",), count=0)
    fails(r"data\.path: the class 'dog' in .*train has no images \(files ending in \.jpg, ")
    write_folder(tmp_path / "train" / "dog", ("deeper",))
    fails(
        r"data\.validation_split: no folder 'dev' in .*; leave it out for validation, val, test",
        validation_split="dev",
    )
    (tmp_path / "val").mkdir()
    fails(r"data\.path: no images to validate on in .*val; add some")
    write_folder(tmp_path / "val", ("cats",))
    fails(r"data\.path: .*val has a class 'cats' that train has not\. Did you mean 'cat'\?")
    os.rename(tmp_path / "train", tmp_path / "training")
    fails(r"data\.path: .* has a folder 'val' but none named 'train'")


# TFDS.


def cifar10(shared, **config):
    if not (shared / "tfds" / "cifar10").is_dir():
        pytest.skip("CIFAR-10 is not there")
    return pipeline.load(
        DataConfig("tfds", name="cifar10", data_dir=str(shared / "tfds"), **config)
    )


def test_cifar10(shared):
    data = cifar10(
        shared,
        normalize="cifar10",
        augment=AugmentConfig(crop="pad", flip=True, randaugment_layers=1, erasing=0.2),
    )
    assert data.image_shape == (32, 32, 3) and data.outputs == 10 and data.labels[-1] == "truck"
    assert (len(data.train), len(data.validation)) == (50_000, 10_000)
    assert data.fingerprint == cifar10(shared).fingerprint
    batch = next(pipeline.train_batches(data.train, 64, 0))
    assert (
        batch["inputs"].shape == (64, 32, 32, 3)
        and abs(batch["inputs"].mean()) < 0.5
        and 0.7 < batch["inputs"].std() < 1.4
    )
    held_out = next(pipeline.eval_batches(data.validation, 50, limit=1))
    np.testing.assert_allclose(held_out["inputs"].mean(), 0, atol=0.2)
    assert len(set(held_out["targets"])) > 5 and held_out["weights"].all()
    record, target = data.train.source.read(3)
    assert record.startswith(b"\xff\xd8") and data.train[3]["targets"] == target  # JPEG


def test_cifar10_at_another_size(shared):
    data = cifar10(shared, image_size=48, crop_fraction=0.75)
    assert data.image_shape == (48, 48, 3) and data.train[0]["inputs"].shape == (48, 48, 3)


def test_a_cifar100_like_set_with_arrays(tmp_path):
    """A set whose images TFDS keeps as arrays of numbers, and whose labels have more classes."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8),
        "label": tfds.features.ClassLabel(num_classes=100),
    }
    pixels = picture(seed=4)

    class Builder:
        class info:
            full_name = "small/1.0.0"

        def as_data_source(self, split, decoders):
            assert decoders is None
            return [{"image": pixels, "label": 99}] * 4

    Builder.info.features = features
    source = TFDSImages(Builder(), "small", "train")
    examples = ImageExamples(source, DataConfig())
    assert source.channels == 3 and source.num_classes == 100 and examples[2]["targets"] == 99
    np.testing.assert_array_equal(
        examples[2]["inputs"], pixels.astype(np.float32) / np.float32(255)
    )
    Builder.info.features = features | {"label": tfds.features.Tensor(shape=(), dtype=np.int64)}
    with pytest.raises(
        InputError, match=r"data\.name: expected classes as the label of small, found "
    ):
        TFDSImages(Builder(), "small", "train")
