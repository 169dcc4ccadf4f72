"""`data.registry` and `data.text`: the same text or examples every time,
or an error that says what to do.
"""

import numpy as np
import pytest

from quweit_jax.data import image_sources, registry
from quweit_jax.data.registry import DataConfig
from quweit_jax.data.text import python_stdlib, text_file
from quweit_jax.errors import InputError


def test_python_stdlib_is_deterministic_and_limited():
    text = python_stdlib(DataConfig(limit_bytes=50_000))
    assert 49_996 <= len(text.encode("utf-8")) <= 50_000  # a character is never cut
    assert python_stdlib(DataConfig(limit_bytes=200_000)).startswith(text)
    assert "import " in text and "def " in text


def test_text_splits_are_its_two_ends(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("0123456789" * 10, encoding="utf-8")
    splits = registry.load(
        DataConfig("text_file", path=str(file), limit_bytes=0, validation_fraction=0.25)
    )
    assert isinstance(splits, registry.TextSplits)
    assert len(splits.train) == 75 and splits.train + splits.validation == "0123456789" * 10


def test_a_limit_never_cuts_a_character(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("aé🦊", encoding="utf-8")
    assert [
        text_file(DataConfig("text_file", path=str(file), limit_bytes=limit)) for limit in range(8)
    ] == ["aé🦊", "a", "a", "aé", "aé", "aé", "aé", "aé🦊"]


def test_digits_are_stratified_and_fixed():
    splits = registry.load(DataConfig("digits"))
    assert isinstance(splits, registry.LabelledSplits)
    assert (len(splits.train), len(splits.validation), splits.num_classes) == (1437, 360, 10)
    example = splits.train[0]
    assert example["inputs"].shape == (64,) and example["inputs"].dtype == np.float32
    train, test = ([s[i]["targets"] for i in range(len(s))] for s in (splits.train, splits.test))
    shares = np.bincount(test, minlength=10) / (
        np.bincount(train, minlength=10) + np.bincount(test, minlength=10)
    )
    np.testing.assert_allclose(shares, 0.2, atol=0.005)
    again, other = (
        image_sources.digits(DataConfig()),
        image_sources.digits(DataConfig(split_seed=1)),
    )
    np.testing.assert_array_equal(again.train.inputs, splits.train.inputs)
    assert (other.train.inputs != splits.train.inputs).any()
    both = {row.tobytes() for row in splits.train.inputs} & {
        row.tobytes() for row in splits.test.inputs
    }
    assert not both  # no image is in both


def test_tiny_shakespeare(shared):
    config = DataConfig(
        "tfds",
        name="tiny_shakespeare",
        data_dir=str(shared / "tfds"),
        validation_split="validation+test",
    )
    splits = registry.load(config)
    assert isinstance(splits, registry.TextSplits)
    assert splits.train.startswith("First Citizen:\nBefore we proceed any further")
    assert (len(splits.train), len(splits.validation)) == (1_003_854, 111_540)
    assert len(set(splits.train + splits.validation)) == 65
    alone = registry.load(
        DataConfig("tfds", name="tiny_shakespeare", data_dir=str(shared / "tfds"))
    )
    assert splits.validation.startswith(alone.validation) and len(alone.validation) == 55_770


def test_cifar10(shared):
    splits = registry.load(DataConfig("tfds", name="cifar10", data_dir=str(shared / "tfds")))
    assert isinstance(splits, registry.LabelledSplits)
    assert splits.num_classes == 10 and splits.labels[:2] == ("airplane", "automobile")
    assert len(splits.train) > 0 and len(splits.validation) == len(splits.test) > 0
    example = splits.train[0]
    assert (
        example["inputs"].shape == (32, 32, 3)
        and example["inputs"].dtype == np.float32
        and example["targets"].dtype == np.int32
    )
    assert example["inputs"].min() >= 0 and 0.1 < example["inputs"].max() <= 1
    np.testing.assert_array_equal(splits.train[0]["inputs"], example["inputs"])


def test_errors(tmp_path):
    def fails(message, **config):
        with pytest.raises(InputError, match=message):
            registry.load(DataConfig(**config))

    fails(r"data\.source: .*Did you mean 'digits'\?", source="digit")
    fails(
        r"data\.validation_fraction: expected a share between 0 and 1, found 1\.0",
        validation_fraction=1.0,
    )
    fails(r"data\.path: expected the path of a text file", source="text_file")
    fails(
        r"data\.path: no file at .*nowhere\.txt",
        source="text_file",
        path=str(tmp_path / "nowhere.txt"),
    )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    fails(
        r"data\.path: .*latin\.txt is not UTF-8 text \(byte 3\)",
        source="text_file",
        path=str(tmp_path / "latin.txt"),
    )
    fails(r"data\.name: expected a TFDS name", source="tfds")
    fails(
        r"data\.data_dir: no directory at ",
        source="tfds",
        name="tiny_shakespeare",
        data_dir=str(tmp_path / "nowhere"),
    )
    fails(
        r"data\.data_dir: .* holds no prepared 'tiny_shakespeare'",
        source="tfds",
        name="tiny_shakespeare",
        data_dir=str(tmp_path),
    )
    fails(
        r"data\.name: TFDS cannot open 'tiny_shakespear' in ",
        source="tfds",
        name="tiny_shakespear",
        data_dir=str(tmp_path),
    )


def test_unknown_splits(shared):
    with pytest.raises(
        InputError,
        match=r"data\.validation_split: tiny_shakespeare has no split 'dev'; it has train, "
        r"validation, test",
    ):
        registry.load(
            DataConfig(
                "tfds",
                name="tiny_shakespeare",
                data_dir=str(shared / "tfds"),
                validation_split="dev",
            )
        )


def test_a_set_that_is_nowhere_is_told_before_it_is_downloaded(tmp_path, monkeypatch, caplog):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    monkeypatch.setattr("quweit_jax.data.tfds.getproxies", dict)
    asked, downloads = [], []

    def none_answers(place, timeout):
        asked.append(place)
        raise OSError("Name or service not known")

    def cut_off(*args, **options):
        downloads.append(options)
        raise OSError("cut off")

    monkeypatch.setattr("socket.create_connection", none_answers)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", cut_off)
    config = DataConfig("tfds", name="tiny_shakespeare")
    said = (
        r"data\.data_dir: .*cannot be downloaded \(.*not known\).*--config\.data\.data_dir=FOLDER"
    )
    with pytest.raises(InputError, match=said):
        registry.load(config)
    assert asked == [("raw.githubusercontent.com", 443)] and not downloads
    # behind a proxy, and where files were downloaded before, TFDS tries, and one is told of it
    monkeypatch.setattr("quweit_jax.data.tfds.getproxies", lambda: {"https": "http://proxy"})
    with pytest.raises(InputError, match=r"could not be downloaded .*cut off"):
        registry.load(config)
    monkeypatch.setattr("quweit_jax.data.tfds.getproxies", dict)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "input.txt").write_text("there")
    with pytest.raises(InputError, match=r"could not be downloaded .*cut off"):
        registry.load(config)
    assert len(asked) == 1 and len(downloads) == 2
    assert "--config.data.data_dir=FOLDER" in caplog.text
