"""Tensors in files of safetensors and of torch.save, whole or in shards: named, and read when they
are asked for.

Of safetensors each is read alone, of a torch file all with the first.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from quweit_jax.errors import InputError
from quweit_jax.pretrained import torch_files

SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
_CHUNK = 2**20  # numbers that are converted at a time


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file. shape. peek: as it is, left where it is. take: in float32, once. fill: an
    array of float32 with it, instead.
    """

    shape: Callable[[], tuple[int, ...]]
    peek: Callable[[], np.ndarray]
    take: Callable[[], np.ndarray]
    fill: Callable[[np.ndarray], None]


def open_safetensors(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of these files, by name."""
    stored: dict[str, Stored] = {}
    for file in files:
        with _opened(file) as tensors:
            stored |= {
                name: _in_safetensors(file, name, tuple(tensors.get_slice(name).get_shape()))
                for name in list(tensors.keys())
            }
    return stored


def open_torch(path: Path) -> dict[str, Stored]:
    """Every tensor of a file of torch.save, by name."""
    file = _TorchFile(path)
    return {name: _in_torch(file, name) for name in file.tensors()}


def open_torch_shards(index: Path) -> dict[str, Stored]:
    """Every tensor of the files of torch.save that a pytorch_model.bin.index.json names."""
    stored: dict[str, Stored] = {}
    for path, names in read_index(index).items():
        file = _TorchFile(path, frozenset(names))
        stored |= {name: _in_torch(file, name) for name in names}
    return stored


def read_index(path: Path) -> dict[Path, list[str]]:
    """The shards a Hugging Face index names, each with its tensors' names.

    Raises:
      InputError: it is no index, a shard is missing or lies elsewhere.
    """
    places = read_json(path).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) for file in places.values())
    ):
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
        if not file.is_file():
            raise InputError(
                f"pretrained: {path} names the shard {file.name}, found no such file in "
                f"{path.parent}; download it too."
            )
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
      InputError: it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"pretrained: {path} is not JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise InputError(
            f"pretrained: {path}: expected an object of names and values, found "
            f"{type(content).__name__}."
        )
    return content


def chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """An array's rows, a few megabytes of float32 at a time."""
    rows = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"pretrained: {file} is damaged or cut short ({error}); download it again."
        ) from None


def _in_safetensors(file: Path, name: str, shape: tuple[int, ...]) -> Stored:
    # Opened anew for each tensor: what is mapped counts as the process's memory until it is closed.
    def read() -> np.ndarray:
        with _opened(file) as tensors:
            return tensors.get_tensor(name)

    def take() -> np.ndarray:
        with _opened(file) as tensors:
            if not shape or tensors.get_slice(name).get_dtype() == "F32":
                return tensors.get_tensor(name)
        fill(numbers := np.empty(shape, np.float32))
        return numbers

    def fill(numbers: np.ndarray) -> None:
        with _opened(file) as tensors:
            stored = tensors.get_slice(name)
            for rows in chunks(numbers.shape):
                numbers[rows] = stored[rows]

    return Stored(lambda: shape, read, take, fill)


class _TorchFile:
    """A file of torch.save: read when the first of its tensors is asked for, and let go of tensor
    by tensor.
    """

    def __init__(self, path: Path, names: frozenset[str] | None = None):
        self._path, self._names = path, names
        self._tensors: dict[str, np.ndarray] | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """Those not taken yet."""
        if self._tensors is None:
            found = torch_files.read_torch(self._path)
            wrong = sorted(found.keys() ^ (found.keys() if self._names is None else self._names))
            if wrong:
                raise InputError(
                    f"pretrained: {self._path.parent / TORCH_INDEX} and {self._path.name} do not "
                    f"agree on {', '.join(wrong[:5])}; download both again."
                )
            self._tensors = found
        return self._tensors


def _in_torch(file: _TorchFile, name: str) -> Stored:
    def take() -> np.ndarray:
        return np.asarray(file.tensors().pop(name), np.float32)

    def fill(numbers: np.ndarray) -> None:
        numbers[...] = file.tensors().pop(name)

    return Stored(lambda: file.tensors()[name].shape, lambda: file.tensors()[name], take, fill)
