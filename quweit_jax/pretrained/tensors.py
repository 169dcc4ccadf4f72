"""Reading config.json and weights (safetensors, or torch.save's files), and taking tensors out by name with every mistake named."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from quweit_jax.errors import InputError, nearest
from quweit_jax.pretrained import torch_files


def read_config(folder: Path, required: tuple[str, ...]) -> dict[str, Any]:
    """config.json, checked for the keys that must be there."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"pretrained: expected {path}, found {'no such file' if folder.is_dir() else 'no such folder'}; give the folder that holds it."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"pretrained: {path} is not JSON ({error}); download it again.") from None
    if not isinstance(config, dict):
        raise InputError(f"pretrained: {path}: expected an object of names and values, found {type(config).__name__}.")
    missing = [key for key in required if key not in config]
    if missing:
        raise InputError(f"pretrained: {path} lacks {', '.join(missing)}; is it the config of this kind of model?")
    return config


def read_safetensors(folder: Path) -> Tensors:
    """Every tensor of model.safetensors, or of all *.safetensors of a sharded checkpoint."""
    files = _safetensors_in(folder)
    if not files:
        raise InputError(f"pretrained: expected model.safetensors in {folder}, found none; convert the checkpoint to safetensors first.")
    return _load_safetensors(files, folder)


def read_weights(path: Path) -> Tensors:
    """Every tensor of a file, or of a folder's *.safetensors or else its one *.pth, *.pt or *.bin; 'module.' is cut off names.

    Raises:
      InputError: there is no such file, or more than one that could be meant.
    """
    if not path.is_dir():
        tensors = _read_file(path)
    elif files := _safetensors_in(path):
        tensors = _load_safetensors(files, path)
    else:
        files = [path / "pytorch_model.bin"]
        if not files[0].is_file():
            files = sorted(file for suffix in torch_files.SUFFIXES for file in path.glob(f"*{suffix}"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files[:5]) or "none"
            raise InputError(
                f"pretrained: expected model.safetensors, pytorch_model.bin or one *.pth in {path}, found {found}; give the file itself."
            )
        tensors = _read_file(files[0])
    tensors.strip_prefix("module.")  # of a model wrapped for several devices
    return tensors


def _read_file(path: Path) -> Tensors:
    if not path.is_file():
        raise InputError(f"pretrained: expected weights at {path}, found no such file or folder.")
    if path.suffix == ".safetensors":
        return _load_safetensors([path], path)
    if path.suffix in torch_files.SUFFIXES:
        return Tensors(torch_files.read_torch(path), str(path))
    raise InputError(f"pretrained: expected a file *.safetensors, {', '.join('*' + s for s in torch_files.SUFFIXES)}, found {path}.")


def _safetensors_in(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _load_safetensors(files: list[Path], where: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"pretrained: {file} is damaged or cut short ({error}); download it again.") from None
    return Tensors(tensors, str(where))


class Tensors:
    """Named tensors; each is taken once, so that what is left over can be told. `where` they are from, for messages."""

    def __init__(self, tensors: dict[str, np.ndarray], where: str):
        self._left, self.where = dict(tensors), where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self) -> Iterable[str]:
        """The names not taken yet."""
        return list(self._left)

    def peek(self, name: str) -> np.ndarray | None:
        """The tensor as it is, left where it is; None if there is none."""
        return self._left.get(name)

    def shape(self, name: str, form: str) -> tuple[int, ...]:
        """The shape of a tensor that must be there, of as many dimensions as `form` names: 'classes, width'."""
        found = self._left.get(name)
        if found is None:
            raise self._lacks(name, form)
        if found.ndim != form.count(",") + 1:
            raise InputError(f"pretrained: tensor {name}: expected shape [{form}], found {list(found.shape)}.")
        return found.shape

    def strip_prefix(self, prefix: str) -> None:
        """Renames 'prefix.x' to 'x'."""
        self._left = {name.removeprefix(prefix): value for name, value in self._left.items()}

    def drop(self, *suffixes: str) -> None:
        """Forgets tensors that hold no weights, by the end of their name."""
        self._left = {name: value for name, value in self._left.items() if not name.endswith(suffixes)}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32, of exactly this shape."""
        if name not in self._left:
            raise self._lacks(name, ", ".join(map(str, shape)))
        value = self._left.pop(name)
        if value.shape != shape:
            raise InputError(
                f"pretrained: tensor {name}: expected shape {list(shape)}, found {list(value.shape)}; do config.json and the weights belong together?"
            )
        return np.asarray(value, np.float32)

    def finish(self) -> None:
        """Raises InputError if a tensor was never asked for."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise InputError(f"pretrained: {self.where} holds tensors this model does not have: {', '.join(names[:5])}{more}.")

    def _lacks(self, name: str, form: str) -> InputError:
        return InputError(f"pretrained: {self.where} lacks the tensor {name} [{form}].{_near(name, self._left)}")


def _near(name: str, known: Iterable[str]) -> str:
    """`errors.nearest`, but of a long list of names none is printed when none is close."""
    said = nearest(name, known) if known else ""
    return said if said.startswith(" Did") or len(said) < 300 else ""
