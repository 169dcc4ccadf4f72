"""Where activations lie on the devices, for models that mention none.

A model says `hand_over(x)` where one block hands its result to the next, and a ternary layer asks
`weights()` how its weights come together. Outside of `placing` nothing is done; inside, what was
given there decides (`training.sharding` divides the batch).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
from jax import Array
from jaxtyping import Int8, Shaped

T = TypeVar("T")
Place = Callable[[Shaped[Array, "B T d"]], Shaped[Array, "B T d"]]
Gather = Callable[[Int8[Array, "I O"]], Int8[Array, "I O"]]
_now = threading.local()


@contextmanager
def placing(place: Place | None, gather: Gather | None = None) -> Iterator[None]:
    """What is traced inside hands its activations (B, ...) over through `place`, and brings ternary
    weights, int8 (I, O), together by `gather`; None leaves that to the compiler.
    """
    before = getattr(_now, "place", None), getattr(_now, "gather", None)
    _now.place, _now.gather = place, gather
    try:
        yield
    finally:
        _now.place, _now.gather = before


def weights() -> Gather | None:
    """How ternary weights that are divided over devices come together on each, if that is said."""
    return getattr(_now, "gather", None)


def hand_over(x: T) -> T:
    """The same values, placed where the run wants activations: an array (B, T, d), or a tree of
    arrays in which other ranks stay where they are.
    """
    place = getattr(_now, "place", None)
    if place is None:
        return x
    return jax.tree.map(lambda leaf: place(leaf) if leaf.ndim == 3 else leaf, x)
