"""Files of torch.save: every layout and type of a tensor, both formats, files that are damaged or
mean harm, and what is said where torch is missing.
"""

import argparse
import os
import pickle
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from quweit_jax import pretrained
from quweit_jax.errors import InputError
from quweit_jax.pretrained.torch_files import read_torch
from tests.pretrained.vit_files import BFLOAT16, NO_TORCH, Harm, save_torch

both_formats = pytest.mark.parametrize("legacy", [False, True])


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason=NO_TORCH)


def arrays():
    return {
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


def test_without_torch(tmp_path, monkeypatch):
    """What cannot be read here is told before the file is opened."""
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(
        InputError,
        match=r"expected the package torch to read a\.pth, found none; pip install "
        r"'quweit_jax\[pretrained\]', or convert the file to safetensors",
    ):
        read_torch(tmp_path / "a.pth")
    with pytest.raises(InputError, match="found no such file"):
        read_torch(tmp_path / "nowhere.pth")


@both_formats
def test_every_layout_and_type(tmp_path, legacy, torch):
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        "whole": base,
        "turned": base.T,
        "part": base[1:, 2:5],
        "every_other": base[::2, ::3],
        "repeated": base.as_strided((3, 6), (0, 1)),
        "turned_brain": base.bfloat16().T,
    }
    path = save_torch(tmp_path / "a.pth", OrderedDict(arrays() | views), legacy)
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "whole": numbers,
        "turned": numbers.T,
        "part": numbers[1:, 2:5],
        "every_other": numbers[::2, ::3],
        "repeated": np.stack([numbers[0]] * 3),
        "turned_brain": numbers.T.astype(BFLOAT16),
    }
    assert_same(read_torch(path), arrays() | expected)


def test_big_endian(tmp_path, torch):
    path = save_torch(tmp_path / "a.pth", OrderedDict(a=np.arange(6.0)))
    edit_archive(path, {"byteorder": b"big", "data/0": np.arange(6.0).byteswap().tobytes()})
    assert_same(read_torch(path), {"a": np.arange(6.0)})


@both_formats
def test_training_checkpoints(tmp_path, legacy, torch):
    """The state dict under a name, and beside it what training programs save; parameters are
    tensors.
    """
    state = OrderedDict(a=torch.nn.Parameter(torch.ones(2, 3)), b=torch.arange(3.0))
    state._metadata = {"": {"version": 1}}
    args = argparse.Namespace(lr=1e-3, model="deit_tiny")
    beside = {
        "optimizer": {"state": {0: np.zeros(7, np.float32)}},
        "args": args,
        "epoch": 3,
        "best": np.float64(81.2),
        "worst": np.float32(0.1),
    }
    expected = {"a": np.ones((2, 3), np.float32), "b": np.arange(3.0, dtype=np.float32)}
    for content in (
        {"model": state} | beside,
        beside | {"state_dict": state},
        {"state_dict": {"model": state}},
    ):
        assert_same(read_torch(save_torch(tmp_path / "a.pt", content, legacy)), expected)


@both_formats
def test_harm_is_refused(tmp_path, legacy, torch):
    victim = tmp_path / "victim"
    for harm, name in (
        (Harm(os.system, f"touch {victim}"), rf"{os.name}\.system"),
        (Harm(eval, "1 + 1"), "eval"),
        (Harm(np.load, "a.npy"), r"numpy\.load"),
    ):
        content = {"model": OrderedDict(a=np.ones(2, np.float32)), "args": harm}
        with pytest.raises(
            InputError, match=rf"a\.pth wants to run {name}; this is no plain state dict; refused"
        ):
            read_torch(save_torch(tmp_path / "a.pth", content, legacy))
    for protocol, message in ((2, "refused"), (4, "no file of torch")):
        plain = pickle.dumps(Harm(os.system, f"touch {victim}"), protocol)
        (tmp_path / "plain.pth").write_bytes(plain)
        with pytest.raises(InputError, match=message):
            read_torch(tmp_path / "plain.pth")
    assert not victim.exists()


def edit_archive(path, changes, compression=zipfile.ZIP_STORED):
    """Writes an archive of torch.save again, with other records or without some."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(parts)).split("/")[0]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in (parts | {f"{root}/{n}": v for n, v in changes.items()}).items():
            if value is not None:
                archive.writestr(name, value)


def test_what_is_allowed_cannot_be_changed(tmp_path, torch):
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
            path = save_torch(tmp_path / "a.pth", OrderedDict(a=np.arange(6.0)))
            edit_archive(path, {"data.pkl": b"\x80\x02" + found + state + b"b."})
            with pytest.raises(InputError, match="damaged"):
                read_torch(path)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "state")


def test_few_bytes_take_little_memory(tmp_path, torch):
    """Sizes and indices a pickle only claims are not allocated."""
    for pickled in (b"}r\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 6 + b"\x00\x00"):
        path = save_torch(tmp_path / "a.pth", OrderedDict(a=np.arange(6.0)))
        edit_archive(path, {"data.pkl": b"\x80\x02" + pickled + b"."})
        with pytest.raises(InputError):
            read_torch(path)


@both_formats
def test_cut_short_anywhere(tmp_path, legacy, torch):
    path = save_torch(tmp_path / "a.pth", OrderedDict(arrays()), legacy)
    whole = path.read_bytes()
    for end in [*range(1, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"a\.pth"):
            read_torch(path)


def test_damaged_archives(tmp_path, torch):
    def fresh():
        return save_torch(tmp_path / "a.pth", OrderedDict(a=np.arange(6.0)))

    for name, value in (
        ("data/0", b"\0" * 40),
        ("data/0", None),
        ("data.pkl", b"nonsense"),
        ("data.pkl", None),
    ):
        edit_archive(fresh(), {name: value})
        with pytest.raises(InputError, match="damaged or cut short"):
            read_torch(tmp_path / "a.pth")
    edit_archive(fresh(), {"data.pkl": b"\x80\x02N."})
    with pytest.raises(InputError, match=r"expected a state dict .* found NoneType"):
        read_torch(tmp_path / "a.pth")
    edit_archive(fresh(), {}, zipfile.ZIP_DEFLATED)  # a small file must not unpack to a large one
    with pytest.raises(InputError, match="damaged or cut short"):
        read_torch(tmp_path / "a.pth")
    whole = bytearray(fresh().read_bytes())
    whole[whole.index(np.float64(5).tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(whole)
    with pytest.raises(InputError, match="CRC-32"):
        read_torch(tmp_path / "a.pth")


def test_tensors_must_lie_in_their_storage(tmp_path, torch):
    path = save_torch(tmp_path / "a.pth", OrderedDict(a=np.arange(6.0).reshape(2, 3)))
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("a/data.pkl")
    place = pickled.index(b"K\x00K\x02K\x03\x86")  # offset 0, shape (2, 3)
    for wrong in (b"K\x01", b"J\xff\xff\xff\xff"):
        edit_archive(path, {"data.pkl": pickled[:place] + wrong + pickled[place + 2 :]})
        with pytest.raises(InputError, match=r"damaged or cut short"):
            read_torch(path)


def test_other_files(tmp_path, torch):
    for content in (b"", b"<html>", b"PK\x03\x04", pickle.dumps({"a": 1}, 2)):
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(InputError, match=r"damaged or cut short, or no file of torch\.save"):
            read_torch(tmp_path / "a.pth")
    for content, found in (
        ({"epoch": 3, "lr": 0.1}, "the keys epoch, lr"),
        ([1, 2], "list"),
        ({}, "the keys"),
    ):
        with pytest.raises(InputError, match=f"expected a state dict .* found {found}"):
            read_torch(save_torch(tmp_path / "a.pth", content))


@both_formats
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((10**12,), (0,)),
        ((10**6, 10**6), (0, 0)),
        ((3, 10**5, 64), (0, 0, 1)),
        ((2**40, 1), (0, 1)),
    ],
    ids=str,
)
def test_tensors_that_repeat_a_few_numbers_without_end(tmp_path, legacy, torch, shape, strides):
    """Neither a copy nor even a look: the sentence comes before any memory is taken."""
    absurd = torch.zeros(64).as_strided(shape, strides)
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3), "w": absurd}, path, _use_new_zipfile_serialization=not legacy)
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="tensor w: "):
        read_torch(path)


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it makes here
@both_formats
def test_tensors_whose_numbers_are_not_simply_there_are_named(tmp_path, legacy, torch):
    matrix = torch.ones(2, 3)
    for found, tensor in (
        ("sparse", matrix.to_sparse()),
        ("sparse", matrix.to_sparse_csr()),
        ("nested", torch.nested.nested_tensor([matrix, matrix])),
        ("meta", matrix.to("meta")),
        ("qint8", torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8)),
    ):
        torch.save({"w": tensor}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match=f"tensor w: .*{found}"):
            read_torch(tmp_path / "a.pth")


def test_many_tensors_of_the_same_few_numbers(tmp_path, torch):
    base = torch.zeros(2000)
    torch.save({f"w{i}": base.as_strided((20, 100), (0, 1)) for i in range(40)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"tensor w\d+: "):
        read_torch(tmp_path / "a.pth")
    tied = {"a": base, "b": base, "c": base.expand(2, -1).T}
    torch.save(tied, tmp_path / "a.pth")
    found = read_torch(tmp_path / "a.pth")
    assert {name: array.shape for name, array in found.items()} == {
        "a": (2000,),
        "b": (2000,),
        "c": (2000, 2),
    }


def test_absurd_shapes_of_nothing(tmp_path, torch):
    absurd = {"cls_token": torch.zeros(1, 1, 0), "pos_embed": torch.zeros(1, 2, 0)}
    absurd |= {"patch_embed.proj.weight": torch.zeros(0, 3, 4, 4)}
    absurd |= {"blocks.0.mlp.fc1.weight": torch.zeros(10**15, 0)}
    absurd |= {"blocks.999999.norm1.weight": torch.zeros(0), "head.weight": torch.zeros(10**12, 0)}
    torch.save(absurd, tmp_path / "a.pth")
    for kind in ("deit", "ivit"):
        with pytest.raises(InputError):
            pretrained.load(tmp_path / "a.pth", kind)
