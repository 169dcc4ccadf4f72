"""What the public layouts of vision transformers share.

Dimensions: P patch size, C channels, d width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from quweit_jax.models.vit import SIZES, ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a vision transformer; patches: along both sides together."""

    patch: int
    channels: int
    patches: int
    width: int
    depth: int
    mlp_ratio: int
    num_classes: int


def model_of(sizes: Sizes, heads: int, **options: Any) -> ViT:
    """The model of these sizes; options: others of `ViTConfig`."""
    known = (sizes.width, sizes.depth, heads)
    name = next((name for name, size in SIZES.items() if size == known), None)
    own = {} if name else dict(zip(("width", "depth", "heads"), known))
    rounding = "published" if options.get("integer") else "exact"
    of_all = {"variant": f"{name or 'Ti'}/{sizes.patch}", "mlp_ratio": sizes.mlp_ratio}
    return ViT(ViTConfig(sizes.num_classes, rounding=rounding, **of_all, **own, **options))


def patch_kernel(convolution: np.ndarray) -> np.ndarray:
    """A convolution (d, C, P, P) that never overlaps, as the linear layer (P * P * C, d) of each
    patch that it is, cut in the order of `ops.patches.cut_patches`.
    """
    return convolution.transpose(2, 3, 1, 0).reshape(-1, len(convolution))
