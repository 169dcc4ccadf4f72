"""Reading a folder's config.json and safetensors, and taking tensors out by name with every mistake named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from quweit_jax.errors import InputError, nearest


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
    missing = [key for key in required if key not in config]
    if missing:
        raise InputError(f"pretrained: {path} lacks {', '.join(missing)}; is it the config of this kind of model?")
    return config


def read_safetensors(folder: Path) -> Tensors:
    """Every tensor of model.safetensors, or of all *.safetensors of a sharded checkpoint."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"pretrained: expected model.safetensors in {folder}, found none; convert the checkpoint to safetensors first.")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"pretrained: {file} is damaged or cut short ({error}); download it again.") from None
    return Tensors(tensors, str(folder))


class Tensors:
    """Named tensors; each is taken once, so that what is left over can be told."""

    def __init__(self, tensors: dict[str, np.ndarray], where: str):
        self._left, self._where = dict(tensors), where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def peek(self, name: str) -> np.ndarray | None:
        """The tensor as it is, left where it is; None if there is none."""
        return self._left.get(name)

    def strip_prefix(self, prefix: str) -> None:
        """Renames 'prefix.x' to 'x'."""
        self._left = {name.removeprefix(prefix): value for name, value in self._left.items()}

    def drop(self, *suffixes: str) -> None:
        """Forgets tensors that hold no weights, by the end of their name."""
        self._left = {name: value for name, value in self._left.items() if not name.endswith(suffixes)}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32, of exactly this shape."""
        if name not in self._left:
            raise InputError(f"pretrained: {self._where} lacks the tensor {name} {list(shape)}.{nearest(name, self._left) if self._left else ''}")
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
            raise InputError(f"pretrained: {self._where} holds tensors this model does not have: {', '.join(names[:5])}{more}.")
