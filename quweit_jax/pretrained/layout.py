"""A model's arrays and the published tensors they are made of, as one table that is read both ways:
loading and saving.

Ours are kernels (inputs, outputs), published weights (outputs, inputs); several published weights
may be one of our kernels, side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import PyTree

from quweit_jax.errors import InputError
from quweit_jax.pretrained.tensors import Tensors


@dataclasses.dataclass(frozen=True)
class Opened:
    """A published checkpoint before its weights are read.

    model: a Flax module. read: reads and checks its variables. image_shape: of a vision model, the
    (H, W, C) that its positions are for.
    """

    model: nn.Module
    read: Callable[[], dict[str, PyTree]]
    image_shape: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """One of our arrays.

    path: 'block_0/mixer/qkv/kernel'. tensors: the published names and shapes it is made of, in
    order; of vectors one behind the other. transposed: whether it is a kernel.
    """

    path: str
    tensors: Mapping[str, tuple[int, ...]]
    transposed: bool = False

    def shape(self) -> tuple[int, ...]:
        """Of our array."""
        shapes = list(self.tensors.values())
        if self.transposed:
            return shapes[0][1], sum(rows for rows, _ in shapes)
        return shapes[0] if len(shapes) == 1 else (sum(rows for (rows,) in shapes),)


@dataclasses.dataclass(frozen=True)
class TensorOut:
    """A published tensor to be written: some rows of one of our arrays, as it lies in the model."""

    shape: tuple[int, ...]
    array: Array | np.ndarray
    start: int
    transposed: bool
    itemsize = 4  # bytes of a number

    def make(self) -> np.ndarray:
        """Its numbers, float32 and contiguous; copied only where they lie otherwise."""
        whole = np.asarray(self.array)
        whole = whole.T if self.transposed else whole
        return np.ascontiguousarray(whole[self.start : self.start + self.shape[0]], np.float32)


def kernel(path: str, inputs: int, outputs: Mapping[str, int]) -> TensorMap:
    """A kernel (inputs, all outputs) made of published weights (outputs[name], inputs)."""
    return TensorMap(path, {name: (rows, inputs) for name, rows in outputs.items()}, True)


def linear(
    path: str, name: str, inputs: int, outputs: int, *, bias: bool = True, transposed: bool = True
) -> Iterator[TensorMap]:
    """A linear layer, published as name.weight and name.bias; transposed: as PyTorch's are."""
    shape = (outputs, inputs) if transposed else (inputs, outputs)
    yield TensorMap(f"{path}/kernel", {f"{name}.weight": shape}, transposed)
    if bias:
        yield TensorMap(f"{path}/bias", {f"{name}.bias": (outputs,)})


def layer_norm(path: str, name: str, width: int, *, bias: bool = True) -> Iterator[TensorMap]:
    """A LayerNorm, published as name.weight and name.bias."""
    yield TensorMap(f"{path}/scale", {f"{name}.weight": (width,)})
    if bias:
        yield TensorMap(f"{path}/bias", {f"{name}.bias": (width,)})


def read_params(tensors: Tensors, maps: Iterable[TensorMap]) -> dict[str, PyTree]:
    """Every array, of published tensors, as a nested dict; only the tensor being copied is in
    memory beside the result.

    Raises:
      InputError: a tensor is missing, misshapen or left over (named).
    """
    params: dict[str, np.ndarray] = {}
    for ours in maps:
        if ours.transposed:
            columns, _ = ours.shape()
            rows = {name: count for name, (count, _) in ours.tensors.items()}
            params[ours.path] = tensors.take_stacked(rows, columns).T
        else:
            taken = [tensors.take(name, shape) for name, shape in ours.tensors.items()]
            params[ours.path] = taken[0] if len(taken) == 1 else np.concatenate(taken)
    tensors.finish()
    return unflatten_dict(params, sep="/")


def published(variables: Mapping[str, PyTree], maps: Iterable[TensorMap]) -> dict[str, TensorOut]:
    """The published tensors of {'params': ...}, by name and in order; nothing is copied yet.

    Raises:
      InputError: an array is missing, misshapen or has no place in the public layout (named).
    """
    left: dict[str, Array | np.ndarray] = flatten_dict(  # type: ignore[assignment]
        variables.get("params", {}), sep="/"
    )
    out: dict[str, TensorOut] = {}
    for ours in maps:
        if ours.path not in left:
            raise InputError(
                f"pretrained.save: expected the array params/{ours.path} {list(ours.shape())}, "
                "found none; give the variables the model was trained with, not their packed form."
            )
        array = left.pop(ours.path)
        if np.shape(array) != ours.shape():
            raise InputError(
                f"pretrained.save: params/{ours.path}: expected shape {list(ours.shape())}, found "
                f"{list(np.shape(array))}; do the model and the variables belong together?"
            )
        start = 0
        for name, shape in ours.tensors.items():
            out[name] = TensorOut(shape, array, start, ours.transposed)
            start += shape[0]
    if left:
        names = ", ".join(sorted(left)[:5])
        raise InputError(
            f"pretrained.save: the public layout has no place for params/{names}; do the model and "
            "the variables belong together?"
        )
    return out
