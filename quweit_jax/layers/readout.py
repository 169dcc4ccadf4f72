"""The end of a language model: logits, or what is wanted of them, piece by piece of the text.

Dimensions: B batch, T tokens, V vocabulary, d model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Integer

from quweit_jax.errors import InputError

Head = TypeVar("Head", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What is wanted of the logits, which then never exist whole, in either pass.

    count: equal pieces that the text is cut into. targets: (B, T). summed: (logits (B, T / count,
      V) float32, targets (B, T / count)) -> sums by name, which are added over the pieces.
    """

    count: int
    targets: Integer[Array, "B T"]
    summed: Callable[[Array, Array], dict[str, Array]]


def read_out(
    head: Head,
    read: Callable[[Head, Float[Array, "B T d"]], Float[Array, "B T V"]],
    x: Float[Array, "B T d"],
    pieces: Pieces | None,
) -> Float32[Array, "B T V"] | dict[str, Float32[Array, ""]]:
    """read(head, x) in float32, (B, T, d) -> (B, T, V); with pieces, their sums.

    Raises:
      InputError: the text cannot be cut into so many equal pieces.
    """
    if pieces is None:
        return read(head, x).astype(jnp.float32)
    length, count = x.shape[1], pieces.count
    if count < 1 or length % count:
        raise InputError(
            f"pieces: expected a number that divides the {length} tokens of a text, found {count}."
        )

    def one(head: Head, _: None, piece: tuple[Array, Array]) -> tuple[None, dict[str, Array]]:
        return None, pieces.summed(read(head, piece[0]).astype(jnp.float32), piece[1])

    def cut(a: Array) -> Array:
        return a.reshape(a.shape[0], count, -1, *a.shape[2:])

    scanned = nn.scan(
        nn.remat(one, prevent_cse=False),
        variable_broadcast=True,
        split_rngs={True: False},
        in_axes=1,
        length=count,
    )
    sums = scanned(head, None, (cut(x), cut(pieces.targets)))[1]
    return jax.tree.map(lambda values: values.sum(0), sums)
