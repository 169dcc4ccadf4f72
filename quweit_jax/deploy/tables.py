"""The look-up tables of a packed model in plain NumPy: what pruning, reports and hardware read.

Dimensions: F input bits, L tables, n inputs a table, A = 2**n entries, T tokens, d features, z
thresholds a feature.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeAlias

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

Tree: TypeAlias = dict[str, PyTree]
Path: TypeAlias = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Block:
    """A block's look-up layers, from the thermometer's bits upwards.

    tables: of each layer, bool (L, A). wiring: of each, int (L, n). num_inputs: F of the first
      layer.
    thresholds: z. replaced_weights: of the dense MLP (hidden layer 4 times wider, no biases) that a
    weightless block takes the place of; 0 for a classifier. layers: each layer's path in the model.
    """

    tables: tuple[np.ndarray, ...]
    wiring: tuple[np.ndarray, ...]
    num_inputs: int
    thresholds: int
    replaced_weights: int = 0
    layers: tuple[Path, ...] = ()


def find_blocks(model: nn.Module, packed: Tree, *inputs: Array | np.ndarray) -> dict[str, Block]:
    """The blocks of a packed model by path ('' for the model itself), in order; {} without tables
    of bits. A block that ends in vector tables is left out.

    inputs: any that the model can be applied to; only their shapes matter.
    """
    shapes = jax.eval_shape(lambda v: watch(model, v, *inputs)[1], packed)
    flat: dict[Path, tuple[jax.ShapeDtypeStruct, ...]] = flatten_dict(shapes)  # type: ignore[assignment]
    bits = {path: found[0].shape for path, found in flat.items()}
    layers = sorted((path for path in bits if path[-1] == "bits"), key=_natural)
    blocks: dict[str, Block] = {}
    for path in sorted((path for path in bits if path[-1] == "thermometer"), key=_natural):
        own = [layer[:-1] for layer in layers if layer[: len(path) - 1] == path[:-1]]
        held = at(packed["packed"], "/".join(path[:-1]))
        if not own or isinstance(held.get("vectors"), Mapping):
            continue  # of vector tables there are no bits to look at, and none to drop
        parts = [at(packed["packed"], "/".join(layer)) for layer in own]
        wiring = tuple(np.asarray(part["wiring"], np.int64) for part in parts)
        replaced = 8 * len(held["thresholds"]) * len(held["bias"]) if "bias" in held else 0
        blocks["/".join(path[:-1])] = Block(
            tuple(_unpack(part["tables"], w.shape[1]) for part, w in zip(parts, wiring)),
            wiring,
            bits[path][0],
            np.shape(held["thresholds"])[-1],
            replaced,
            tuple(own),
        )
    return blocks


def watch(model: nn.Module, packed: Tree, *inputs: Array | np.ndarray) -> tuple[Array, Tree]:
    """`model.apply`, and by path the bits (F or L, T) within its blocks; can be traced.

    A block has its thermometer's under 'thermometer', each look-up layer its own under 'bits', each
    in a tuple of one. Tokens are in the order of the inputs.
    """
    out, found = model.apply(packed, *inputs, mutable=["intermediates"])
    return out, dict(found.get("intermediates", {}))  # type: ignore[return-value]


def at(tree: Mapping[str, PyTree], path: str) -> Tree:
    """The part of a tree at 'a/b', {} where there is none."""
    for key in path.split("/") if path else ():
        tree = tree.get(key, {})
    return dict(tree)


def pack_bits(tables: np.ndarray) -> np.ndarray:
    """Tables bool (L, A) -> uint8 (L, ceil(A / 8)), as a look-up layer holds them."""
    return np.packbits(tables, axis=1, bitorder="little")


def _unpack(tables: ArrayLike, lut_inputs: int) -> np.ndarray:
    bits = np.unpackbits(np.asarray(tables), axis=1, bitorder="little")
    return bits[:, : 2**lut_inputs].astype(bool)


def _natural(path: Path) -> list[str | int]:
    """A key that puts block_2 before block_10."""
    pieces = re.split(r"(\d+)", "/".join(path))
    return [int(piece) if piece.isdigit() else piece for piece in pieces]
