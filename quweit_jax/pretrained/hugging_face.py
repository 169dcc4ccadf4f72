"""Checkpoints of Hugging Face's programs: config.json, and weights whole or in shards."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from jaxtyping import PyTree

from quweit_jax.errors import InputError, require
from quweit_jax.pretrained.layout import TensorMap, TensorOut, read_params
from quweit_jax.pretrained.lazy_tensors import SAFETENSORS_INDEX
from quweit_jax.pretrained.published_config import PublishedConfig
from quweit_jax.pretrained.tensors import Tensors, read_weights, write_arrays
from quweit_jax.reading import shown, why

SHARD_BYTES = 5 * 10**9  # as Hugging Face's programs split
_WEIGHTS = ("model.safetensors", SAFETENSORS_INDEX, "model-*-of-*.safetensors")


def read_language_model(
    folder: Path,
    config: PublishedConfig,
    maps: Iterable[TensorMap],
    prepare: Callable[[Tensors], None] | None = None,
) -> dict[str, PyTree]:
    """{'params': ...} of a causal language model; a tied head is the embedding's transpose.
    prepare: changes the tensors before they are taken.

    Raises:
      InputError: as `tensors.read_weights` and `layout.read_params`.
    """
    tied, tensors = config.flag("tie_word_embeddings", False), read_weights(folder)
    tensors.drop(".rotary_emb.inv_freq")  # a constant that older programs saved
    if prepare is not None:
        prepare(tensors)
    if tied:
        tensors.drop("lm_head.weight")
        maps = (ours for ours in maps if ours.path != "head/kernel")
    params = read_params(tensors, maps)
    if tied:
        params.setdefault("head", {})["kernel"] = params["token_embedding"]["embedding"].T
    return {"params": params}


def write_checkpoint(
    folder: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, TensorOut],
    overwrite: bool,
    shard_bytes: int,
) -> None:
    """Writes config.json and the weights, float32; beside the model one shard is in memory.

    Args:
      folder: made if it isn't there. overwrite: whether a checkpoint that is there may be replaced;
        all of its model*.safetensors are.
      shard_bytes: weights of more bytes than this are split, between tensors.

    Raises:
      InputError: there is a checkpoint already, `folder` is a file, or shard_bytes is no positive
        number.
    """
    if shard_bytes < 1:
        raise InputError(f"pretrained.save: shard_bytes: expected at least 1, found {shard_bytes}.")
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise InputError(
            f"pretrained.save: expected a folder, found a file: {folder}; give another name."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"pretrained.save: cannot make {shown(folder)} ({why(error)}); give another folder."
        ) from None
    old = sorted(path for pattern in ("config.json", *_WEIGHTS) for path in folder.glob(pattern))
    if old and not overwrite:
        raise InputError(
            f"pretrained.save: {folder} already holds {', '.join(p.name for p in old[:5])}; give "
            "another folder, or overwrite=True."
        )
    require("safetensors.numpy", "to write a checkpoint", "or safetensors alone")
    try:
        for path in old:
            path.unlink()
        _write(folder, config, tensors, shard_bytes)
    except OSError as error:
        raise InputError(
            f"pretrained.save: {shown(folder)} cannot be written ({why(error)}); give another "
            "folder."
        ) from None


def _write(
    folder: Path, config: Mapping[str, object], tensors: Mapping[str, TensorOut], shard_bytes: int
) -> None:
    shards = _split(tensors, shard_bytes)
    places: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        shard = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else shard
        # without the format transformers refuses the file
        write_arrays({n: tensors[n].make() for n in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(map(_bytes, tensors.values()))
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / SAFETENSORS_INDEX, index)
    # last: without it nobody takes what is there for a whole checkpoint
    _write_json(folder / "config.json", config)


def _bytes(tensor: TensorOut) -> int:
    return tensor.itemsize * math.prod(tensor.shape)


def _split(tensors: Mapping[str, TensorOut], shard_bytes: int) -> list[list[str]]:
    """Names in order, of at most so many bytes together, or one alone that has more."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        size += _bytes(tensor)
        if shards[-1] and size > shard_bytes:
            shards.append([])
            size = _bytes(tensor)
        shards[-1].append(name)
    return shards


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def require_dense(kinds: Iterable[str], name: str) -> None:
    """Raises InputError unless every block's MLP is the dense one of the published model."""
    other = sorted(set(kinds) - {"dense"})
    if other:
        raise InputError(
            f"pretrained.save: the public layout of {name} has dense MLPs alone, found mlp "
            f"'{other[0]}'; keep the run's own checkpoint."
        )
