"""A model's arrays and the published tensors they are made of, as one table that is read both ways:
loading and saving.

Ours are kernels (inputs, outputs), published weights (outputs, inputs); several published weights
may be one of our kernels, side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from quweit_jax.errors import InputError
from quweit_jax.pretrained.tensors import Tensors


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our arrays.

    path: 'block_0/mixer/qkv/kernel'. tensors: the published names and shapes it is made of, in
    order. transposed: whether it is a kernel.
    """

    path: str
    tensors: Mapping[str, tuple[int, ...]]
    transposed: bool = False

    def shape(self) -> tuple[int, ...]:
        """Of our array."""
        shapes = list(self.tensors.values())
        return (shapes[0][1], sum(rows for rows, _ in shapes)) if self.transposed else shapes[0]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A published tensor to be written. shape. make: some of its rows, float32 and contiguous."""

    shape: tuple[int, ...]
    make: Callable[[slice], np.ndarray]


def kernel(path: str, inputs: int, outputs: Mapping[str, int]) -> Part:
    """A kernel (inputs, all outputs) made of published weights (outputs[name], inputs)."""
    return Part(path, {name: (rows, inputs) for name, rows in outputs.items()}, transposed=True)


def read_params(tensors: Tensors, parts: Iterable[Part]) -> dict[str, Any]:
    """Every part of published tensors, as a nested dict; only the tensor being copied is in memory
    beside the result.

    Raises:
      InputError: a tensor is missing, misshapen or left over (named).
    """
    params: dict[str, np.ndarray] = {}
    for part in parts:
        if part.transposed:
            columns, _ = part.shape()
            params[part.path] = tensors.take_stacked(
                {name: rows for name, (rows, _) in part.tensors.items()}, columns
            ).T
        else:
            ((name, shape),) = part.tensors.items()
            params[part.path] = tensors.take(name, shape)
    tensors.finish()
    return unflatten_dict(params, sep="/")


def published(variables: Mapping[str, Any], parts: Iterable[Part]) -> dict[str, Piece]:
    """The published tensors of {'params': ...}, by name and in order; nothing is copied before rows
    are made.

    Raises:
      InputError: an array is missing, misshapen or has no place in the public layout (named).
    """
    ours: dict[str, Any] = flatten_dict(variables.get("params", {}), sep="/")
    pieces: dict[str, Piece] = {}
    for part in parts:
        if part.path not in ours:
            raise InputError(
                f"pretrained.save: expected the array params/{part.path} {list(part.shape())}, "
                "found none; give the variables the model was "
                "trained with, not their packed form."
            )
        array = ours.pop(part.path)
        if np.shape(array) != part.shape():
            raise InputError(
                f"pretrained.save: params/{part.path}: expected shape {list(part.shape())}, found "
                f"{list(np.shape(array))}; "
                "do the model and the variables belong together?"
            )
        pieces |= _cut(array, part)
    if ours:
        names = ", ".join(sorted(ours)[:5])
        raise InputError(
            f"pretrained.save: the public layout has no place for params/{names}; do the model and "
            "the variables belong together?"
        )
    return pieces


def _cut(array: Any, part: Part) -> Iterator[tuple[str, Piece]]:
    start = 0
    for name, shape in part.tensors.items():

        def make(rows: slice, start: int = start) -> np.ndarray:
            whole = np.asarray(array)
            some = (
                whole.T[start + rows.start : start + rows.stop] if part.transposed else whole[rows]
            )
            return np.ascontiguousarray(some, np.float32)

        yield name, Piece(shape, make)
        start += shape[0]
