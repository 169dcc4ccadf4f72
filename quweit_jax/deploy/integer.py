"""The deployed form of integer-only models: int8 weights, int32 biases, integer multipliers and
shifts, 1-bit tables. No floats between.

A packed model is evaluated by `model.apply(packed, images)`: the image is rounded to int8 with one
scale, everything after that is integer operations, and the head's int32 results are multiplied by
one float scale a class.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from quweit_jax.errors import InputError

Tree = dict[str, Any]


def is_integer(model: nn.Module) -> bool:
    """Whether a model computes in integers."""
    return bool(getattr(getattr(model, "config", None), "integer", False))


def pack(model: nn.Module, variables: Tree, image_shape: tuple[int, int, int]) -> Tree:
    """{'packed': constants} of a trained integer model, for images (H, W, C).

    Raises:
      InputError: the model is not an integer one, or its activation ranges were never set.
    """
    if not is_integer(model):
        raise InputError(
            "pack: this model computes in floats; train it with --config.model.integer=True to "
            "deploy it in integers."
        )
    ranges = flatten_dict(jax.device_get(variables.get("ranges", {})))
    unset = [
        "/".join(path[:-1])
        for path, low in ranges.items()
        if path[-1] == "min" and low == ranges[(*path[:-1], "max")]
    ]
    if unset or not ranges:
        raise InputError(
            f"pack: {len(unset) or 'all'} activation ranges were never "
            f"set{f' ({unset[0]}, ...)' if unset else ''}; train a few steps, or calibrate the "
            "model with pretrained.calibrate(model, variables, batches)."
        )
    images = np.zeros((1, *image_shape), np.float32)
    constants = jax.jit(lambda v, x: model.apply(v, x, mutable=["packed"])[1])(variables, images)
    return jax.device_get(constants)


def packed_bytes(packed: Tree) -> int:
    """Bytes of all constants of a packed model."""
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(packed))
