"""Published checkpoints: `load(folder, kind) -> (model, variables)`, `save(model, variables,
folder)`, `kind_of(folder)`; fine-tuning: `read_source`, `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import flax.linen as nn
from jaxtyping import PyTree

from quweit_jax.errors import InputError, check_choice
from quweit_jax.models.matmulfree import MatMulFree
from quweit_jax.models.transformer_pp import TransformerPP
from quweit_jax.pretrained import bitnet, matmulfree, transformer_pp
from quweit_jax.pretrained.deit import calibrate
from quweit_jax.pretrained.hugging_face import SHARD_BYTES, write_checkpoint
from quweit_jax.pretrained.kinds import KINDS, kind_of
from quweit_jax.pretrained.layout import published
from quweit_jax.pretrained.saved import find_model, is_saved, load_model
from quweit_jax.pretrained.transfer import Report, merge, read_source

__all__ = ["KINDS", "Report", "calibrate", "kind_of", "load", "merge", "read_source", "save"]


def load(folder: str | Path, kind: str | None = None) -> tuple[nn.Module, dict[str, PyTree]]:
    """Reads a published checkpoint, a folder that the command `pack` wrote, or a model that comes
    with the package (`saved.boxed()` names them).

    Args:
      folder: or the name of a model in the box. Of a published checkpoint it holds `config.json`
        and the weights. For 'deit' and 'ivit' also the file of weights itself (*.safetensors,
        *.pth, *.pt, *.bin; nothing in it is run), and config.json may be missing: sizes are told
        from the weights. For 'nanogpt' also the ckpt.pt of its own program.
      kind: 'nanogpt' or 'gpt2' (nanoGPT's layout, or GPT-2's of Hugging Face), 'matmulfree'
        (HGRNBitForCausalLM, the MatMul-free language model), 'transformer_pp' or 'llama' (Hugging
        Face's Llama, Mistral, Qwen2 and BitNet), 'deit' (a ViT in timm's names), 'vit' (one in the
        names of Hugging Face's transformers) or 'ivit' (I-ViT's integer-only ViT); None: told from
        what is there.

    Returns:
      (model, variables): `model.apply(variables, input_ids)`, of a ViT `model.apply(variables,
      images)` with images (B, H, W, C), gives logits. Images may be of another size than the
      checkpoint's: the positional embedding is resampled. Variables are float32 arrays, whatever
      the type of the weights; little more than the model itself is in memory (of torch files
      before torch 1.6 the whole file).

    Raises:
      InputError: a file, key or tensor is missing, unexpected or misshapen, or an option asks for
        what the model here doesn't compute (named, with what was expected and found).
    """
    if kind is None:
        path = find_model(str(folder))
        if is_saved(path):
            found = load_model(path)
            return found.model, found.variables
        folder, kind = path, kind_of(path)
    check_choice("pretrained.load: kind", kind, KINDS)
    found = KINDS[kind](Path(folder).expanduser())
    return found.model, found.read()


def save(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    folder: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    packed: bool = False,
) -> None:
    """Writes config.json and model.safetensors, float32, in the public layout: `load` and the
    public program read them.

    Which layout is told from the model: `MatMulFree` is written as HGRNBitForCausalLM,
    `TransformerPP` as LlamaForCausalLM, with biases of queries, keys and values alone as
    Qwen2ForCausalLM, with sub-norms as BitNetForCausalLM. The tokenizer is not part of it, nor the
    numbers of its special tokens: without them in config.json, both programs take 1 for the first
    and 2 for the last. Beside the model one shard is in memory.

    Args:
      variables: {'params': ...} of the model; other collections are left out.
      folder: made if it isn't there. overwrite: whether a checkpoint that is there may be replaced.
      shard_bytes: weights of more bytes are split into model-00001-of-0000N.safetensors, with
        model.safetensors.index.json.
      packed: of a Transformer++ with ternary weights, whether these are written at two bits each
        (transformers' `quantization_mode` offline) and not as masters.

    Raises:
      InputError: the model has no public layout (another class, weightless blocks, or none for an
        MLP), the variables are another model's, or the folder holds a checkpoint already.
    """
    layouts: dict[type[nn.Module], ModuleType] = {
        MatMulFree: matmulfree,
        TransformerPP: transformer_pp,
    }
    layout = layouts.get(type(model))
    if layout is None:
        raise InputError(
            "pretrained.save: expected a MatMulFree or TransformerPP model, found "
            f"{type(model).__name__}; no public layout is written for it."
        )
    c = getattr(model, "config")  # noqa: B009 - of both
    if packed and layout is not transformer_pp:
        raise InputError(
            "pretrained.save: packed: expected a TransformerPP model, found "
            f"{type(model).__name__}, which has no public layout of packed weights."
        )
    config = layout.published_config(c, **({"packed": True} if packed else {}))
    tensors = published(variables, layout.maps(c))
    if packed:
        tensors = bitnet.pack(tensors, bitnet.ternary(layout.maps(c)))
    write_checkpoint(Path(folder).expanduser(), config, tensors, overwrite, shard_bytes)
