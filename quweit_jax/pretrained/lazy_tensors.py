"""Tensors in files of safetensors and of torch.save, whole or in shards: by name, and read when
they are asked for. Anything with `.shape` that `np.asarray` takes is such a tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from quweit_jax import reading
from quweit_jax.errors import InputError, require
from quweit_jax.pretrained.torch_files import read_torch

if TYPE_CHECKING:
    from safetensors import safe_open

SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"


class SafeTensor:
    """A tensor in a file of safetensors. The file is opened anew for each: what is mapped counts as
    the process's memory until it is closed.
    """

    def __init__(self, file: Path, name: str, shape: tuple[int, ...]):
        self.shape, self._file, self._name = shape, file, name

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        with _opened(self._file) as tensors:
            numbers = tensors.get_tensor(self._name)
        return numbers if dtype is None else numbers.astype(dtype, copy=False)


class DerivedTensor:
    """A tensor that is made of others when it is asked for."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], np.ndarray]):
        self.shape, self._make = shape, make

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        numbers = self._make()
        return numbers if dtype is None else numbers.astype(dtype, copy=False)


LazyTensor = SafeTensor | DerivedTensor | np.ndarray


def open_safetensors(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """Every tensor of these files, by name."""
    found: dict[str, LazyTensor] = {}
    for file in files:
        with _opened(file) as tensors:
            _check_names(file)
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                found[name] = SafeTensor(file, name, tuple(tensors.get_slice(name).get_shape()))
    return found


def _check_names(file: Path) -> None:
    """Raises InputError if a whole file's header has a name twice, which the format forbids and its
    library lets pass.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"pretrained: {file}: expected every name once, found {twice!r} twice; download it "
                "again."
            )
        return found

    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        json.loads(stream.read(length), object_pairs_hook=once)


def open_torch_shards(index: Path) -> dict[str, LazyTensor]:
    """Every tensor of the files of torch.save that a pytorch_model.bin.index.json names."""
    found: dict[str, LazyTensor] = {}
    for path, names in read_index(index).items():
        shard = read_torch(path)
        if wrong := sorted(shard.keys() ^ set(names)):
            raise InputError(
                f"pretrained: {index} and {path.name} do not agree on {', '.join(wrong[:5])}; "
                "download both again."
            )
        found |= shard
    return found


def read_index(path: Path) -> dict[Path, list[str]]:
    """The shards a Hugging Face index names, each with its tensors' names.

    Raises:
      InputError: it is no index, a shard is missing or lies elsewhere.
    """
    places = read_json(path).get("weight_map")
    known = isinstance(places, dict) and all(isinstance(file, str) for file in places.values())
    if not places or not known:
        raise InputError(
            f"pretrained: {path}: expected a 'weight_map' of tensors' names and files; download it "
            "again."
        )
    shards: dict[Path, list[str]] = {}
    for name, file in places.items():
        if Path(file).name != file:  # nothing outside of the folder
            raise InputError(
                f"pretrained: {path}: expected the name of a file beside it, found {file!r} for "
                f"the tensor {name}."
            )
        shards.setdefault(path.parent / file, []).append(name)
    for file in shards:
        if not os.path.isfile(file):
            raise InputError(
                f"pretrained: {path} names the shard {file.name}, found no such file in "
                f"{path.parent}; download it too."
            )
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; raises InputError if it is something else."""
    return reading.read_json(path, "pretrained", "download it again")


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    safetensors = require("safetensors", f"to read {file.name}", "or safetensors alone")
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (AttributeError, TypeError) as error:  # of a type that NumPy has no name for
        raise InputError(
            f"pretrained: {file}: expected numbers of a type such as float32, float16 or bfloat16, "
            f"found another ({error}); take the checkpoint it was quantized from."
        ) from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"pretrained: {file} is damaged or cut short ({error}); download it again."
        ) from None
