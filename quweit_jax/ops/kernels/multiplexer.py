"""The tree of multiplexers that kernels read 1-bit tables with, whole words at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax import Array
from jaxtyping import Shaped


def multiplex(
    entry: Callable[[int], Shaped[Array, "*shape"]], slots: Sequence[Shaped[Array, "*shape"]]
) -> Shaped[Array, "*shape"]:
    """For each bit of words, the entry that the slots' bits spell, the first the least significant.

    What the last slot chooses from is made one after the other, so that as many words are needed at
    once as there are slots, and not half as many as entries.

    Args:
      entry: of an address, words that are 0 or ~0. slots: words of bits.
    """

    def below(level: int, address: int) -> Array:
        if level == 0:
            return entry(address)
        zero, one = below(level - 1, address), below(level - 1, address + (1 << (level - 1)))
        return zero ^ ((zero ^ one) & slots[level - 1])

    return below(len(slots), 0)
