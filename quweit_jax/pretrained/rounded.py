"""Matrices rounded to a few bits, for a model's folder: what a model without a deployed form of its
own takes on disk. They are floats again when they are read.

Each column (the last axis) has a scale, its largest magnitude at the largest code; codes are
2^(bits - 1) - 1 above the rounded quotient, most significant bit first, one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quweit_jax.errors import InputError
from quweit_jax.reading import is_whole

BITS = range(2, 9)
_CODES, _SCALES = "@codes", "@scales"


def is_rounded(name: str, leaf: np.ndarray) -> bool:
    """Whether an array is one that is rounded: trained, of floats, with two axes or more."""
    return name.startswith("params/") and leaf.ndim > 1 and leaf.dtype.kind in "fV"


def encode(
    arrays: Mapping[str, np.ndarray], bits: int
) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Arrays by path, each matrix replaced by 'PATH@codes' uint8 and 'PATH@scales' float32 (a
    column), and the shapes of those.

    Raises:
      InputError: bits not from 2 to 8.
    """
    if bits not in BITS:
        raise InputError(f"bits of a weight: expected 2 to 8, found {bits}.")
    found, shapes = {}, {}
    for name, leaf in arrays.items():
        if not is_rounded(name, leaf):
            found[name] = leaf
            continue
        columns = leaf.astype(np.float32).reshape(-1, leaf.shape[-1])
        half = 2 ** (bits - 1) - 1
        scales = np.abs(columns).max(0) / half
        codes = np.rint(columns / np.where(scales == 0, 1, scales)) + half
        each = np.unpackbits(codes.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits :]
        found[name + _CODES], found[name + _SCALES] = np.packbits(each), scales
        shapes[name] = list(leaf.shape)
    return found, shapes


def decode(
    arrays: Mapping[str, np.ndarray], bits: int, shapes: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """What `encode` was given, matrices rounded, in float32.

    Raises:
      InputError: bits and shapes are not those of the arrays.
    """
    found = {name: leaf for name, leaf in arrays.items() if not name.endswith((_CODES, _SCALES))}
    for name, shape in shapes.items():
        codes, scales = arrays.get(name + _CODES), arrays.get(name + _SCALES)
        size = math.prod(shape)
        if (
            codes is None
            or scales is None
            or codes.dtype != np.uint8
            or codes.shape != (-(-size * bits // 8),)
            or scales.shape != tuple(shape[-1:])
        ):
            raise InputError(
                f"{name}: expected codes of {bits} bits and scales of the shape {list(shape)}, "
                "found others; write the folder again."
            )
        each = np.unpackbits(codes, count=size * bits).reshape(size, bits)
        values = each @ (1 << np.arange(bits)[::-1]) - (2 ** (bits - 1) - 1)
        found[name] = values.reshape(shape).astype(np.float32) * scales
    return found


def check(told: Any) -> tuple[int, dict[str, list[int]]]:
    """bits and shapes, of what model.json says of them.

    Raises:
      InputError: something else.
    """
    if isinstance(told, dict):
        bits, shapes = told.get("bits"), told.get("shapes")
        if isinstance(bits, int) and bits in BITS and isinstance(shapes, dict):
            sizes = [size for s in shapes.values() for size in (s if isinstance(s, list) else [0])]
            if all(is_whole(size) and size > 0 for size in sizes):
                return bits, shapes
    raise InputError(
        "model.json: expected 'weights' with 'bits', 2 to 8, and 'shapes' of matrices; write the "
        "folder again."
    )
