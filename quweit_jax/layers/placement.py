"""Where activations lie on the devices, for models that mention none.

A model says `hand_over(x)` where one block hands its result to the next. Outside of `placing` that
does nothing; inside, what was given there decides (`training.sharding` divides the batch).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
from jax import Array

T = TypeVar("T")
_now = threading.local()


@contextmanager
def placing(place: Callable[[Array], Array]) -> Iterator[None]:
    """What is traced inside hands its activations (B, ...) over through `place`."""
    before = getattr(_now, "place", None)
    _now.place = place
    try:
        yield
    finally:
        _now.place = before


def hand_over(x: T) -> T:
    """The same values, placed where the run wants activations: an array (B, T, d), or a tree of
    arrays in which other ranks stay where they are.
    """
    place = getattr(_now, "place", None)
    if place is None:
        return x
    return jax.tree.map(lambda leaf: place(leaf) if leaf.ndim == 3 else leaf, x)
