"""Reading published checkpoints: `load(folder, kind) -> (model, variables)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn

from quweit_jax.errors import check_choice
from quweit_jax.pretrained import nanogpt

KINDS: dict[str, Callable[[Path], tuple[nn.Module, dict[str, Any]]]] = {"nanogpt": nanogpt.load}


def load(folder: str | Path, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Reads a published checkpoint.

    Args:
      folder: holds `config.json` and the weights. kind: 'nanogpt' (nanoGPT's layout, or GPT-2's of Hugging Face).

    Returns:
      (model, variables): `model.apply(variables, input_ids)` gives logits.

    Raises:
      InputError: a file, key or tensor is missing, unexpected or misshapen (named, with what was expected and found).
    """
    check_choice("pretrained.load: kind", kind, KINDS)
    return KINDS[kind](Path(folder).expanduser())
