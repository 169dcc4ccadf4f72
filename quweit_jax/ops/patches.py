"""Images as patches, and positions of patches on other grids.

Dimensions: B batch, H x W pixels, C channels, P patch size, N patches, d model width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from quweit_jax.errors import InputError


def cut_patches(images: Shaped[Array, "B H W C"], patch: int) -> Shaped[Array, "B N PPC"]:
    """Images (B, H, W, C) as patches (B, N, P * P * C), row by row, each in rows, columns,
    channels.
    """
    b, h, w, ch = images.shape
    cut = images.reshape(b, h // patch, patch, w // patch, patch, ch).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(b, (h // patch) * (w // patch), patch * patch * ch)


def resample_positions(
    embedding: Float[Array, "1 tokens d"], grid: tuple[int, int], extra: int = 1
) -> Float[Array, "1 resampled d"]:
    """A positional embedding (1, extra + N, d) of a square grid for a grid of another size,
    bicubic; the first `extra` tokens stay.

    Raises:
      InputError: its own grid isn't square and another one is asked for.
    """
    count = embedding.shape[1] - extra
    if count == math.prod(grid):
        return embedding
    side = math.isqrt(count)
    if side * side != count:
        raise InputError(
            f"ViT: a positional embedding of {count} patches that are not square cannot be "
            f"resampled to {grid[0]} x {grid[1]}."
        )
    square = embedding[:, extra:].reshape(1, side, side, -1)
    resized = jax.image.resize(square, (1, *grid, square.shape[-1]), "cubic").reshape(
        1, math.prod(grid), -1
    )
    return jnp.concatenate([embedding[:, :extra], resized], 1)
