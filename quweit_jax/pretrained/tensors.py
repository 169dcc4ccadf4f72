"""Reading config.json and weights, and taking tensors out by name with every mistake named."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from quweit_jax.errors import InputError, first_line, nearest, require
from quweit_jax.pretrained.lazy_tensors import (
    SAFETENSORS_INDEX,
    TORCH_INDEX,
    LazyTensor,
    open_safetensors,
    open_torch_shards,
    read_index,
    read_json,
)
from quweit_jax.pretrained.torch_files import SUFFIXES, read_torch_checkpoint
from quweit_jax.reading import list_folder

# What torch's FSDP, `compile` and activation checkpointing put before the names of what they wrap,
# a whole model or each of its blocks; and DistributedDataParallel before those of a model.
_WRAPPED_INSIDE = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
_WRAPPED = ("module.",)


def write_arrays(
    arrays: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a .safetensors file; OSError if it cannot be."""
    library = require("safetensors", "to write a model's arrays")
    writer = require("safetensors.numpy", "to write a model's arrays")
    try:
        writer.save_file(dict(arrays), path, dict(metadata) if metadata else None)
    except library.SafetensorError as error:  # what a full disk is in that library
        raise OSError(first_line(error)) from None


def read_config(folder: Path, required: tuple[str, ...]) -> dict[str, Any]:
    """config.json, checked for the keys that must be there."""
    path = folder / "config.json"
    if not os.path.isfile(path):
        raise InputError(
            f"pretrained: expected {path}, found no such "
            f"{'file' if os.path.isdir(folder) else 'folder'}; "
            "give the folder that holds it."
        )
    config = read_json(path)
    missing = [key for key in required if key not in config]
    if missing:
        raise InputError(
            f"pretrained: {path} lacks {', '.join(missing)}; "
            "is it the config of this kind of model?"
        )
    return config


def read_weights(path: Path) -> Tensors:
    """Every tensor of a file, or of a folder's *.safetensors, else its pytorch_model*.bin, else its
    one *.pth, *.pt or *.bin.

    Shards are those that model.safetensors.index.json or pytorch_model.bin.index.json names.
    The prefixes of models wrapped for several devices or compiled are cut off tensors' names.

    Raises:
      InputError: there is no such file, a shard is missing, or more than one file could be meant.
    """
    if not os.path.isdir(path):
        tensors = _read_file(path)
    elif files := _safetensors_in(path):
        tensors = Tensors(open_safetensors(files), str(path))
    elif os.path.isfile(path / "pytorch_model.bin"):
        tensors = _read_file(path / "pytorch_model.bin")
    elif os.path.isfile(path / TORCH_INDEX):
        tensors = Tensors(open_torch_shards(path / TORCH_INDEX), str(path))
    else:
        files = _weights_in(path, SUFFIXES)
        if len(files) != 1:
            found = ", ".join(file.name for file in files[:5]) or "none"
            raise InputError(
                "pretrained: expected model.safetensors, pytorch_model.bin or one *.pth in "
                f"{path}, found {found}; give the file itself."
            )
        tensors = _read_file(files[0])
    tensors.strip_inside(*_WRAPPED_INSIDE)
    tensors.strip_prefix(*_WRAPPED)
    return tensors


def _read_file(path: Path) -> Tensors:
    if not os.path.isfile(path):
        raise InputError(f"pretrained: expected weights at {path}, found no such file or folder.")
    if path.suffix == ".safetensors":
        return Tensors(open_safetensors([path]), str(path))
    if path.suffix in SUFFIXES:
        return Tensors(*read_torch_checkpoint(path))
    raise InputError(
        f"pretrained: expected a file *.safetensors, {', '.join('*' + s for s in SUFFIXES)}, found "
        f"{path}."
    )


def _safetensors_in(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / SAFETENSORS_INDEX
    if os.path.isfile(single):
        return [single]
    if os.path.isfile(index):
        return sorted(read_index(index))
    return _weights_in(folder, (".safetensors",))


def _weights_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder whose names end so, but for hidden ones ('._model.safetensors').

    Raises:
      InputError: one is no file, or the folder cannot be read.
    """
    if not os.path.isdir(folder):
        return []
    found = [e for e in list_folder(folder, "pretrained") if e.name.endswith(suffixes)]
    for entry in found:
        if not os.path.isfile(entry.path):
            raise InputError(
                f"pretrained: expected a file at {entry.path}, found a folder, a pipe, a device or "
                "a link to nothing; take it away, or download it again."
            )
    return [Path(entry.path) for entry in found]


class Tensors:
    """Named tensors, each taken once, so that what is left can be told.

    where: for messages. model_args: the options of the model that were saved beside it, if any.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        where: str,
        model_args: Mapping[str, Any] | None = None,
    ):
        self._left, self.where, self.model_args = dict(tensors), where, model_args

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self) -> Iterable[str]:
        """The names not taken yet."""
        return list(self._left)

    def peek(self, name: str) -> np.ndarray | None:
        """The tensor as it is, left where it is; None if there is none."""
        return np.asarray(self._left[name]) if name in self._left else None

    def lazy(self, name: str) -> LazyTensor | None:
        """The tensor, left where it is and not read; None if there is none."""
        return self._left.get(name)

    def replace(self, name: str, tensor: LazyTensor) -> None:
        """Puts another tensor in the place of one, or a new one."""
        self._left[name] = tensor

    def shape(self, name: str, form: str) -> tuple[int, ...]:
        """The shape of a tensor that must be there; `form` names its dimensions: 'classes, d'."""
        if name not in self._left:
            raise self._lacks(name, form)
        found = self._left[name].shape
        if len(found) != form.count(",") + 1:
            raise InputError(
                f"pretrained: tensor {name}: expected shape [{form}], found {list(found)}."
            )
        return found

    def strip_prefix(self, *prefixes: str) -> None:
        """Renames 'prefix.x' to 'x', of several prefixes in any order and number.

        Raises:
          InputError: two tensors would have one name.
        """

        def short_of(name: str) -> str:
            while prefix := next((p for p in prefixes if name.startswith(p)), ""):
                name = name.removeprefix(prefix)
            return name

        self._rename(short_of)

    def strip_inside(self, *parts: str) -> None:
        """Renames 'a.part.b' to 'a.b', wherever one of these parts stands.

        Raises:
          InputError: two tensors would have one name.
        """
        wrapped = re.compile("|".join(rf"(?<![^.]){re.escape(part)}" for part in parts))
        self._rename(lambda name: wrapped.sub("", name))

    def _rename(self, short_of: Callable[[str], str]) -> None:
        stripped: dict[str, LazyTensor] = {}
        for name, value in self._left.items():
            if (short := short_of(name)) in stripped:
                raise InputError(
                    f"pretrained: {self.where} holds {short} twice, once as {name}; save one of "
                    "the two models alone."
                )
            stripped[short] = value
        self._left = stripped

    def drop(self, *suffixes: str) -> None:
        """Forgets tensors that hold no weights, by the end of their name."""
        self._left = {n: value for n, value in self._left.items() if not n.endswith(suffixes)}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32, of exactly this shape; a copy, whatever becomes of the file."""
        self._check(name, shape)
        return np.array(_real(name, self._left.pop(name)), np.float32)

    def take_stacked(self, rows: Mapping[str, int], columns: int) -> np.ndarray:
        """Matrices (rows[name], columns) below each other, float32; beside it one is in memory."""
        if len(rows) == 1:
            ((name, count),) = rows.items()
            return self.take(name, (count, columns))
        for name, count in rows.items():
            self._check(name, (count, columns))  # before making room for them
        stacked, start = np.empty((sum(rows.values()), columns), np.float32), 0
        for name, count in rows.items():
            stacked[start : start + count] = _real(name, self._left.pop(name))
            start += count
        return stacked

    def finish(self) -> None:
        """Raises InputError if a tensor was never asked for."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise InputError(
                f"pretrained: {self.where} holds tensors this model does not have: "
                f"{', '.join(names[:5])}{more}."
            )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._left:
            raise self._lacks(name, ", ".join(map(str, shape)))
        found = self._left[name].shape
        if found != shape:
            raise InputError(
                f"pretrained: tensor {name}: expected shape {list(shape)}, found {list(found)}; do "
                "config.json and the weights belong together?"
            )

    def _lacks(self, name: str, form: str) -> InputError:
        return InputError(
            f"pretrained: {self.where} lacks the tensor {name} [{form}].{_near(name, self._left)}"
        )


def _real(name: str, tensor: LazyTensor) -> np.ndarray:
    """A tensor's numbers; InputError unless all are real and finite: whole numbers are codes of a
    quantized model, whose scales are elsewhere.
    """
    values = np.asarray(tensor)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise InputError(
            f"pretrained: tensor {name}: expected real numbers (float32, float16 or bfloat16), "
            f"found {values.dtype}; quantized weights are not supported: take the checkpoint they "
            "were made from."
        )
    if not np.isfinite(values).all():
        raise InputError(
            f"pretrained: tensor {name}: expected finite numbers, found infinite ones or NaN; the "
            "training that wrote it has failed, or the file is damaged: take another."
        )
    return values


def _near(name: str, known: Iterable[str]) -> str:
    """`errors.nearest`, but of a long list of names none is printed when none is close."""
    said = nearest(name, known) if known else ""
    return said if said.startswith(" Did") or len(said) < 300 else ""
