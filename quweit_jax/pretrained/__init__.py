"""Reading published checkpoints: `load(folder, kind) -> (model, variables)`; and fine-tuning from them: `read_source`, `merge`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn

from quweit_jax.errors import check_choice
from quweit_jax.pretrained import deit, nanogpt
from quweit_jax.pretrained.deit import calibrate
from quweit_jax.pretrained.transfer import Report, merge, read_source

__all__ = ["KINDS", "Report", "calibrate", "load", "merge", "read_source"]

KINDS: dict[str, Callable[[Path], tuple[nn.Module, dict[str, Any]]]] = {
    "nanogpt": nanogpt.load,
    "deit": deit.load_deit,
    "ivit": deit.load_ivit,
}


def load(folder: str | Path, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Reads a published checkpoint.

    Args:
      folder: holds `config.json` and the weights. For 'deit' and 'ivit' also the file of weights itself (*.safetensors, *.pth, *.pt,
        *.bin; read without running what is in it), and config.json may be missing: sizes are told from the weights.
      kind: 'nanogpt' (nanoGPT's layout, or GPT-2's of Hugging Face), 'deit' (a ViT in timm's names) or 'ivit' (I-ViT's integer-only ViT).

    Returns:
      (model, variables): `model.apply(variables, input_ids)`, of a ViT `model.apply(variables, images)` with images (B, H, W, C), gives
      logits. Images may be of another size than the checkpoint's: the positional embedding is resampled.

    Raises:
      InputError: a file, key or tensor is missing, unexpected or misshapen (named, with what was expected and found).
    """
    check_choice("pretrained.load: kind", kind, KINDS)
    return KINDS[kind](Path(folder).expanduser())
