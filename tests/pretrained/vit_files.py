"""Checkpoints of vision transformers for tests: weights in timm's names,
and files of torch.save.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

BFLOAT16 = ml_dtypes.bfloat16
NO_TORCH = "files of torch.save are written and read by torch: pip install 'quweit_jax[pretrained]'"


def weights(width=64, depth=1, patch=4, grid=2, classes=5, ratio=2, channels=3, seed=0):
    """Random weights of a small DeiT, timm's names and layout."""
    draw = np.random.default_rng(seed)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for i in range(depth):
        for name, (rows, columns) in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (ratio * width, width),
            "mlp.fc2": (width, ratio * width),
        }.items():
            shapes |= {
                f"blocks.{i}.{name}.weight": (rows, columns),
                f"blocks.{i}.{name}.bias": (rows,),
            }
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
    return {
        name: draw.normal(0.3 * ("norm" in name), 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def as_torch(content: Any) -> Any:
    """The same with torch's tensors in place of arrays."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    if isinstance(content, dict):
        return type(content)((name, as_torch(value)) for name, value in content.items())
    if not isinstance(content, np.ndarray):
        return content
    if content.dtype == BFLOAT16:
        return torch.from_numpy(content.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(content.copy())


def save_torch(path, content, legacy=False):
    """Writes content, arrays as tensors, in torch's zip format or in the one before 1.6."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    torch.save(as_torch(content), path, _use_new_zipfile_serialization=not legacy)
    return path


class Harm:
    """Runs something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
