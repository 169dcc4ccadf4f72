"""Files of torch.save read without torch: every layout of a tensor, both formats, and files that
are damaged or mean harm.
"""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.pretrained.torch_files import read_torch
from tests.pretrained.vit_files import BFLOAT16, Parameter, save_torch


def tensors():
    base = np.arange(24, dtype=np.float32).reshape(4, 6).copy()
    return {
        "whole": base,
        "turned": base.T,
        "part": base[1:, 2:5],
        "every_other": base[::2, ::3],
        "repeated": np.lib.stride_tricks.as_strided(base, (3, 6), (0, 4)),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "double": np.linspace(0, 1, 5),
        "half": np.array([0.5, -2], np.float16),
        "brain": np.array([1.5, -3], BFLOAT16),
        "long": np.array([-1, 2**40]),
        "int": np.array([-1, 2**30], np.int32),
        "byte": np.array([[1, 255]], np.uint8),
        "bool": np.array([True, False]),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_layout_and_type(tmp_path, legacy, big_endian):
    path = save_torch(tmp_path / "a.pth", OrderedDict(tensors()), legacy, big_endian)
    assert_same(read_torch(path), tensors())


@pytest.mark.parametrize("legacy", [False, True])
def test_training_checkpoints(tmp_path, legacy):
    """The state dict under a name, and beside it what training programs save; parameters are
    tensors.
    """
    state = OrderedDict(
        a=Parameter(np.ones((2, 3), np.float32)), b=np.arange(3.0, dtype=np.float32)
    )
    state._metadata = {"": {"version": 1}}
    args = argparse.Namespace(lr=1e-3, model="deit_tiny")
    beside = {
        "optimizer": {"state": {0: np.zeros(7, np.float32)}},
        "args": args,
        "epoch": 3,
        "best": np.float64(81.2),
    }
    expected = {"a": np.ones((2, 3), np.float32), "b": np.arange(3.0, dtype=np.float32)}
    for content in (
        {"model": state} | beside,
        beside | {"state_dict": state},
        {"state_dict": {"model": state}},
    ):
        assert_same(read_torch(save_torch(tmp_path / "a.pt", content, legacy)), expected)


class Harm:
    """Runs something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_harm_is_refused(tmp_path, legacy):
    victim = tmp_path / "victim"
    for harm, name in (
        (Harm(os.system, f"touch {victim}"), rf"{os.name}\.system"),
        (Harm(eval, "1 + 1"), "__builtin__.eval"),
    ):
        content = {"model": OrderedDict(a=np.ones(2, np.float32)), "args": harm}
        with pytest.raises(
            InputError, match=rf"a\.pth wants to run {name}; this is no plain state dict; refused"
        ):
            read_torch(save_torch(tmp_path / "a.pth", content, legacy))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harm(os.system, f"touch {victim}")))
    with pytest.raises(InputError, match="refused"):
        read_torch(tmp_path / "plain.pth")
    assert not victim.exists()


def archive_of(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
    return path


def test_what_is_allowed_cannot_be_changed(tmp_path):
    """A pickle that sets attributes of the functions and classes it gets changes nothing that
    outlives the file.
    """
    attribute = b"}X\x05\x00\x00\x00stateK\x01s"
    for found in (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"cargparse\nNamespace\n",
        b"ctorch\nSize\n",
    ):
        for state in (attribute, b"N" + attribute + b"\x86"):
            with pytest.raises(InputError, match="damaged"):
                read_torch(archive_of(tmp_path / "a.pth", found + state + b"b"))


def test_few_bytes_take_little_memory(tmp_path):
    """Sizes and indices a pickle only claims are not allocated."""
    for pickled in (b"}r\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 6 + b"\x00\x00"):
        with pytest.raises(InputError):
            read_torch(archive_of(tmp_path / "a.pth", pickled))


@pytest.mark.parametrize("legacy", [False, True])
def test_cut_short_anywhere(tmp_path, legacy):
    path = save_torch(tmp_path / "a.pth", OrderedDict(tensors()), legacy)
    whole = path.read_bytes()
    for end in [*range(1, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"a\.pth"):
            read_torch(path)


def edit_archive(path, changes, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in parts.items():
            if value is not None:
                archive.writestr(name, value)


def test_damaged_archives(tmp_path):
    def fresh():
        return save_torch(tmp_path / "a.pth", OrderedDict(a=np.arange(6.0)))

    for name, value in (
        ("data/0", b"\0" * 40),
        ("data/0", None),
        ("data.pkl", b"\x80\x02N"),
        ("data.pkl", b"nonsense"),
    ):
        edit_archive(fresh(), {f"archive/{name}": value})
        with pytest.raises(InputError, match="damaged or cut short"):
            read_torch(tmp_path / "a.pth")
    edit_archive(fresh(), {"archive/data.pkl": None})
    with pytest.raises(InputError, match=r"holds no data\.pkl"):
        read_torch(tmp_path / "a.pth")
    edit_archive(fresh(), {}, zipfile.ZIP_DEFLATED)  # a small file must not unpack to a large one
    with pytest.raises(InputError, match="damaged or cut short"):
        read_torch(tmp_path / "a.pth")
    whole = bytearray(fresh().read_bytes())
    whole[whole.index(np.float64(5).tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(whole)
    with pytest.raises(InputError, match="CRC-32"):
        read_torch(tmp_path / "a.pth")


def test_tensors_must_lie_in_their_storage(tmp_path):
    path = save_torch(tmp_path / "a.pth", OrderedDict(a=np.arange(6.0).reshape(2, 3)))
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    place = pickled.index(b"K\x00K\x02K\x03\x86")  # offset 0, shape (2, 3)
    for wrong in (b"K\x01", b"J\xff\xff\xff\xff"):
        edit_archive(path, {"archive/data.pkl": pickled[:place] + wrong + pickled[place + 2 :]})
        with pytest.raises(InputError, match=r"damaged.*(beyond its storage of 6|offset -1)"):
            read_torch(path)


def test_other_files(tmp_path):
    with pytest.raises(InputError, match="found no such file"):
        read_torch(tmp_path / "nowhere.pth")
    for content in (b"", b"<html>", b"PK\x03\x04"):
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(InputError, match=r"in no format of torch\.save|damaged or cut short"):
            read_torch(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(InputError, match=r"is a pickle, but not one of torch\.save"):
        read_torch(tmp_path / "a.pth")
    for content, found in (
        ({"epoch": 3, "lr": 0.1}, "the keys epoch, lr"),
        ([1, 2], "list"),
        ({}, "the keys"),
    ):
        with pytest.raises(InputError, match=f"expected a state dict .* found {found}"):
            read_torch(save_torch(tmp_path / "a.pth", content))
