"""The weights in files of torch.save (`.pth`, `.pt` and `.bin`), read by torch itself, as NumPy
arrays; nothing that is in a file is run.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quweit_jax.errors import InputError, require

SUFFIXES = (".pth", ".pt", ".bin")
# Where training programs keep the state dict; its running average only if there is nothing else.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "net", "network") + (
    "module",  # DeepSpeed's
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "params_ema",
    "ema",
)
_REPEATED = 16  # how often numbers may be named by several tensors: tied weights, expanded ones
# Harmless company of weights, which torch would refuse: arguments of a training program, and NumPy
# scalars such as a best accuracy.
_IGNORED = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Float64DType",
)


class _StandIn:
    """In place of an object that is no weight: takes anything, does nothing."""

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors alone, see `read_torch_checkpoint`."""
    return read_torch_checkpoint(path)[0]


def read_torch_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], str, dict[str, Any] | None]:
    """Returns (the tensors of a file's state dict by name, the file's name, the options of the
    model that nanoGPT saves as 'model_args', or None); tensors of files since torch 1.6 stay on
    disk until they are looked at.

    The state dict is the saved object itself, or what it holds under a name that training programs
    use: 'model', 'state_dict' and others, else a running average's, 'state_dict_ema'.

    Raises:
      InputError: torch isn't installed; or the file is missing, damaged, of another format, holds
        no state dict, or wants more than tensors.
    """
    if not os.path.isfile(path):
        raise InputError(f"pretrained: expected {path}, found no such file.")
    require("torch", f"to read {path.name}", "or convert the file to safetensors elsewhere")
    try:
        content = _load(path)
        tensors = _state_dict(content, path)
        _check_kinds(tensors, path)
        _check_sizes(tensors, path)
        arrays = {name: _array(tensor) for name, tensor in tensors.items()}
        options = content.get("model_args") if isinstance(content, Mapping) else None
        return arrays, str(path), options if isinstance(options, dict) else None
    except InputError:
        raise
    except Exception as error:  # whatever goes wrong in a file of unknown origin
        said = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        if isinstance(error, pickle.UnpicklingError) and (name := re.search(r"GLOBAL (\S+)", said)):
            raise InputError(
                f"pretrained: {path} wants to run {name[1]}; this is no plain state dict; refused. "
                "If you trust the file, save the weights alone with torch: "
                "torch.save(model.state_dict(), 'weights.pth')."
            ) from None
        detail = f"{type(error).__name__}: {said.strip().partition(chr(10))[0]:.200}"
        raise InputError(
            f"pretrained: {path} is damaged or cut short, or no file of torch.save ({detail}); "
            "download or save it again."
        ) from None


def _load(path: Path) -> object:
    """The saved object, its tensors on the CPU."""
    import torch  # type: ignore[import-not-found]

    sizes: list[int] = []

    def keep(storage: Any, _: str) -> Any:
        sizes.append(storage.nbytes())
        return storage

    archive = zipfile.is_zipfile(path)  # as torch saves since 1.6; only these can be mapped
    room = _check_archive(path) if archive else None
    stand_ins = [(_StandIn, name) for name in _IGNORED]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other protocols: what it cannot read is an error
        content = torch.load(path, map_location=keep, weights_only=True, mmap=archive)
    room = path.stat().st_size if room is None else room
    if sum(sizes) > room:
        raise ValueError(f"tensors of {sum(sizes)} bytes, found {room}")
    return content


def _check_archive(path: Path) -> int:
    """The bytes of all tensors; raises ValueError unless the archive is whole. torch doesn't look
    where it maps.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("compressed, as torch.save never does")
        if (wrong := archive.testzip()) is not None:
            raise ValueError(f"Bad CRC-32 for {wrong}")
    return sum(record.file_size for record in records if "/data/" in record.filename)


def _state_dict(content: object, path: Path) -> dict[str, Any]:
    """The named tensors in what was saved: those under 'model' or 'state_dict' if there are any."""
    import torch  # type: ignore[import-not-found]

    for _ in range(4):  # {'model': {'state_dict': ...}} and the like
        inside = content if isinstance(content, Mapping) else {}
        wrapped = [inside[name] for name in _WRAPPERS if isinstance(inside.get(name), dict)]
        content = wrapped[0] if wrapped else content
    found = type(content).__name__
    if isinstance(content, Mapping):
        tensors = {
            name: value
            for name, value in content.items()
            if isinstance(name, str) and isinstance(value, torch.Tensor)
        }
        if tensors:
            return tensors
        found = f"the keys {', '.join(sorted(map(str, content))[:8])}"
    raise InputError(
        f"pretrained: {path}: expected a state dict (names and tensors, or one under 'model' or "
        f"'state_dict'), found {found}; save model.state_dict() with torch."
    )


def _check_kinds(tensors: Mapping[str, Any], path: Path) -> None:
    """Raises InputError for a tensor whose numbers are not simply there, by name."""
    import torch  # type: ignore[import-not-found]

    for name, tensor in tensors.items():
        kind = "a nested one" if tensor.is_nested else None
        if kind is None and tensor.layout != torch.strided:
            kind = f"a sparse one ({tensor.layout}); save tensor.to_dense()"
        elif tensor.is_meta:
            kind = "one without numbers (on the device 'meta'); load the weights before saving them"
        elif tensor.is_quantized or str(tensor.dtype).startswith("torch.float8"):
            kind = f"{tensor.dtype}: take the checkpoint it was quantized from"
        if kind is not None:
            raise InputError(
                f"pretrained: {path}: tensor {name}: expected a plain tensor of float32, float16 "
                f"or bfloat16, found {kind}."
            )


def _check_sizes(tensors: Mapping[str, Any], path: Path) -> None:
    """Raises InputError if tensors claim more numbers than a file of this size can mean: views that
    repeat a few numbers, of which a copy would fill the memory.
    """
    size, total = path.stat().st_size, 0
    for name, tensor in tensors.items():
        total += tensor.numel() * tensor.element_size()
        if total > _REPEATED * size:
            raise InputError(
                f"pretrained: {path}: tensor {name}: expected tensors of no more than {_REPEATED} "
                f"times the file's {size} bytes, found {total}, with this one's shape "
                f"{list(tensor.shape)}; it repeats numbers, or means harm; save tensor.clone()."
            )


def _array(tensor: Any) -> np.ndarray:
    """The tensor's numbers where they are; NumPy knows bfloat16 by ml_dtypes alone."""
    import torch  # type: ignore[import-not-found]

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
