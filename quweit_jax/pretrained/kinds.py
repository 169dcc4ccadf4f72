"""The kinds of published checkpoints, and which of them a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quweit_jax.errors import InputError
from quweit_jax.pretrained import deit, hugging_face_vit, matmulfree, nanogpt, transformer_pp
from quweit_jax.pretrained.layout import Opened
from quweit_jax.pretrained.tensors import read_config, read_weights

KINDS: dict[str, Callable[[Path], Opened]] = {
    "nanogpt": nanogpt.opened,
    "gpt2": nanogpt.opened,
    "matmulfree": matmulfree.opened,
    "transformer_pp": transformer_pp.opened,
    "llama": transformer_pp.opened,
    "deit": deit.open_deit,
    "ivit": deit.open_ivit,
    "vit": hugging_face_vit.opened,
}
# Hugging Face's model_type; and options that say so in a config.json without one.
_TYPES = {
    "gpt2": "nanogpt",
    "hgrn_bit": "matmulfree",
    **dict.fromkeys(("llama", "mistral", "qwen2", "bitnet"), "transformer_pp"),
    "vit": "vit",
    "deit": "vit",  # which says what is the matter with it
}
_NANOGPT = {"n_layer", "n_head", "n_embd"}


def kind_of(path: str | Path) -> str:
    """The kind to `load` a published checkpoint with, told from its config.json or its weights.

    Args:
      path: a folder, or a file of weights.

    Raises:
      InputError: there is none, or it is of no kind known here.
    """
    path = Path(path).expanduser()
    config = read_config(path, ()) if (path / "config.json").is_file() else {}
    if kind := _TYPES.get(str(config.get("model_type"))):
        return kind
    if config.keys() >= _NANOGPT:
        return "nanogpt"
    tensors = read_weights(path)
    if tensors.model_args is not None:
        return "nanogpt"
    tensors.strip_prefix(*deit.WRAPPED)
    if "cls_token" in tensors:
        return "ivit" if deit.is_integer(tensors) else "deit"
    raise InputError(
        f"pretrained: {path}: expected a checkpoint of kind {', '.join(KINDS)}, found "
        f"{', '.join(sorted(tensors.names())[:5]) or 'no tensors'}."
    )
