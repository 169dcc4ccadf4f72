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
    """(B, H, W, C) -> (B, N, P * P * C), patches in rows, each in rows, columns, channels.

    Raises:
      InputError: images of other dimensions, or sides that are no multiples of the patch.
    """
    if images.ndim != 4 or patch < 1 or any(side % patch for side in images.shape[1:3]):
        raise InputError(
            "cut_patches: expected images (batch, height, width, channels) whose sides are "
            f"multiples of a patch of at least 1, found {list(images.shape)} and {patch}."
        )
    b, h, w, ch = images.shape
    cut = images.reshape(b, h // patch, patch, w // patch, patch, ch).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(b, (h // patch) * (w // patch), patch * patch * ch)


def resample_positions(
    embedding: Float[Array, "1 tokens d"], grid: tuple[int, int], extra: int = 1
) -> Float[Array, "1 resampled d"]:
    """A positional embedding (1, extra + N, d) of a square grid for a grid of another size,
    bicubic; the first `extra` tokens stay.

    Raises:
      InputError: its own grid isn't square and another one is asked for, or either has no patches.
    """
    count = embedding.shape[1] - extra
    if count == math.prod(grid):
        return embedding
    if count < 1 or math.prod(grid) < 1:
        raise InputError(
            f"ViT: a positional embedding of {count} patches cannot be resampled to {grid[0]} x "
            f"{grid[1]}."
        )
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
