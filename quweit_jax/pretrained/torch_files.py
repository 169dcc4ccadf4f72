"""Reading the weights of `.pth`, `.pt` and `.bin` files without torch and without running anything
that is in them.

Such a file is a pickle that names its tensors' storages, with the storages' bytes beside it: in a
zip archive (torch.save since 1.6), or one after another behind the pickle (before). A pickle may
ask for any function to be called. Here it gets tensors, dicts and sizes; what checkpoints commonly
hold beside them (arguments, NumPy scalars) becomes a stand-in that does nothing; anything else is
refused by name.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from quweit_jax.errors import InputError

SUFFIXES = (".pth", ".pt", ".bin")
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what the older format starts with
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_WRAPPERS = (
    "model",
    "state_dict",
)  # where training programs keep the state dict, beside the optimizer's
# Harmless company of weights: arguments of a training program, and NumPy scalars such as a best
# accuracy.
_STAND_INS = {
    ("argparse", "Namespace"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the state dict in a file of torch.save, by name; bytes of other tensors in the
    file are not read.

    The state dict is the saved object itself, or what it holds under 'model' or 'state_dict'.

    Raises:
      InputError: the file is missing, damaged, of another format, holds no state dict, or wants
        more than tensors.
    """
    with _naming(path), open(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                return _arrays(*_open_archive(archive), path)
        if start[:1] == b"\x80":
            return _arrays(*_open_legacy(file, path), path)
    raise InputError(
        f"pretrained: {path} is in no format of torch.save since 0.4; load it with torch and save "
        "model.state_dict() again."
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong in a file of unknown origin becomes an InputError that names the file."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"pretrained: {path} {error}" if isinstance(error, _Refused) else str(error)
        ) from None
    except FileNotFoundError:
        raise InputError(f"pretrained: expected {path}, found no such file.") from None
    except Exception as error:
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise InputError(
            f"pretrained: {path} is damaged or cut short ({detail}); download or save it again."
        ) from None


class _Refused(InputError):
    """What a pickle asked for; the file's name is put in front of it."""


class _Sealed:
    """What a pickle gets but cannot change."""

    def __setstate__(self, state: Any) -> None:
        raise TypeError(f"{type(self).__name__} with a state")


class _Call(_Sealed):
    """A function, without the attributes a function has."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


@dataclasses.dataclass(frozen=True)
class _Storage(_Sealed):
    """Where a tensor's numbers are: `key` names them in the file."""

    dtype: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor(_Sealed):
    """A tensor as the pickle describes it, unchecked; offset and strides count numbers."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _Dict(dict):
    """In place of OrderedDict; attributes (a state dict's version numbers) are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
}


class _StandIn:
    """In place of an object that is no weight: takes anything, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Python's own unpickler, not the faster one in C, which a few bytes (an index of 2**30) make
# allocate gigabytes.
class _Reader(pickle._Unpickler):
    """An unpickler that knows tensors, dicts and stand-ins, and notes the storages it meets."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        """What a pickle gets for a function or class it names."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _STAND_INS:
            return _StandIn
        if (module, name) not in _KNOWN:
            raise _Refused(
                f"wants to run {module}.{name}; this is no plain state dict; refused. If you trust "
                "the file, save the weights "
                "alone with torch: torch.save(model.state_dict(), 'weights.pth')."
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any, /) -> _Storage:
        """What a pickle gets for a storage it names."""
        kind, dtype, key, _, count, *view = pid
        if (
            kind != "storage"
            or dtype not in _STORAGES.values()
            or not isinstance(key, str)
            or type(count) is not int
            or view not in ([], [None])
        ):
            raise ValueError(f"no storage: {pid!r:.200}")
        return self.storages.setdefault(key, _Storage(dtype, key, count))


# Reads one storage's bytes; whether they are little-endian.
_Source = tuple[Callable[[_Storage], bytes], bool]


def _open_archive(archive: zipfile.ZipFile) -> tuple[Any, _Source]:
    """The saved object and its storages, of the zip format: ROOT/data.pkl, ROOT/data/KEY,
    ROOT/byteorder.
    """
    pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise InputError(
            f"pretrained: {archive.filename} is a zip archive, but not one of torch.save: it holds "
            "no data.pkl."
        )
    root = pickles[0].removesuffix("data.pkl")

    def read(name: str, size: int | None = None) -> bytes:
        info = archive.getinfo(root + name)
        # torch never compresses; without compression nothing in the file is larger than the file.
        if info.compress_type != zipfile.ZIP_STORED or (size is not None and info.file_size < size):
            raise ValueError(f"{name}: expected {size} plain bytes, found {info.file_size}")
        return archive.read(info)

    order = read("byteorder").strip() if root + "byteorder" in archive.namelist() else b"little"
    content = _Reader(io.BytesIO(read("data.pkl"))).load()
    return content, (lambda s: read(f"data/{s.key}", s.count * _dtype(s).itemsize), order != b"big")


def _open_legacy(file: BinaryIO, path: Path) -> tuple[Any, _Source]:
    """The same of the format before torch 1.6: three pickles of preliminaries, the object, the
    storages' keys, the storages.
    """
    if _Reader(file).load() != _MAGIC or _Reader(file).load() != _PROTOCOL:
        raise InputError(
            f"pretrained: {path} is a pickle, but not one of torch.save; save model.state_dict() "
            "with torch."
        )
    little = bool(_Reader(file).load()["little_endian"])
    reader = _Reader(file)
    content = reader.load()
    end, places = os.fstat(file.fileno()).st_size, {}
    for key in _Reader(file).load():
        size = struct.unpack("<q", file.read(8))[0] * _dtype(reader.storages[key]).itemsize
        if not 0 <= size <= end - file.tell():
            raise ValueError(f"storage {key} is incomplete")
        places[key] = (file.tell(), size)
        file.seek(size, os.SEEK_CUR)

    def read(storage: _Storage) -> bytes:
        file.seek(places[storage.key][0])
        return file.read(places[storage.key][1])

    return content, (read, little)


def _dtype(storage: _Storage) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if storage.dtype == "bfloat16" else storage.dtype)


def _arrays(content: Any, source: _Source, path: Path) -> dict[str, np.ndarray]:
    """The state dict's tensors; each storage they share is read once."""
    read, little = source
    numbers: dict[str, np.ndarray] = {}

    def array(tensor: _Tensor) -> np.ndarray:
        storage = tensor.storage
        if storage.key not in numbers:
            dtype = _dtype(storage)
            plain = np.frombuffer(read(storage), f"{'<' if little else '>'}u{dtype.itemsize}")
            numbers[storage.key] = plain.astype(plain.dtype.newbyteorder("="), copy=False).view(
                dtype
            )
        return _view(numbers[storage.key], tensor)

    return {name: array(value) for name, value in _state_dict(content, path).items()}


def _view(numbers: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """The tensor's part of its storage, if it lies inside it."""
    offset, shape, strides = tensor.offset, tuple(tensor.shape), tuple(tensor.strides)
    if len(shape) != len(strides) or any(
        type(n) is not int or n < 0 for n in (offset, *shape, *strides)
    ):
        raise ValueError(f"a tensor of shape {shape}, strides {strides} and offset {offset}")
    if math.prod(shape) == 0:
        return np.zeros(shape, numbers.dtype)
    if offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) >= len(numbers):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {len(numbers)}")
    steps = tuple(stride * numbers.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)


def _state_dict(content: Any, path: Path) -> dict[str, _Tensor]:
    """The named tensors in what was saved: those under 'model' or 'state_dict' if there are any."""
    inside, depth = content, 0
    while isinstance(inside, dict) and depth < 4:  # {'model': {'state_dict': ...}} and the like
        wrapped = [inside[name] for name in _WRAPPERS if isinstance(inside.get(name), dict)]
        if not wrapped:
            break
        inside, depth = wrapped[0], depth + 1
    tensors = (
        {name: t for name, t in inside.items() if isinstance(name, str) and isinstance(t, _Tensor)}
        if isinstance(inside, dict)
        else {}
    )
    if not tensors:
        found = (
            f"the keys {', '.join(sorted(map(str, inside))[:8])}"
            if isinstance(inside, dict)
            else type(inside).__name__
        )
        raise InputError(
            f"pretrained: {path}: expected a state dict (names and tensors, or one under 'model' "
            f"or 'state_dict'), found {found}; "
            "save model.state_dict() with torch."
        )
    return tensors
