"""nanoGPT's checkpoints, and GPT-2's of Hugging Face (transposed projections, tanh GELU)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from quweit_jax.errors import InputError
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.pretrained.layout import TensorMap, kernel, layer_norm, linear, read_params
from quweit_jax.pretrained.tensors import Tensors, read_config, read_safetensors

_NANOGPT_KEYS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
_GPT2_KEYS = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")


def load(folder: Path) -> tuple[GPT, dict[str, PyTree]]:
    """The model and its variables; the layout is told from config.json."""
    config = read_config(folder, ())
    hugging_face = config.get("model_type") == "gpt2" or "n_positions" in config
    if "model_type" in config and not hugging_face:
        raise InputError(
            "pretrained: expected model_type 'gpt2' (or none, for nanoGPT), found "
            f"'{config['model_type']}' in {folder / 'config.json'}."
        )
    config = read_config(folder, _GPT2_KEYS if hugging_face else _NANOGPT_KEYS)
    tensors = read_safetensors(folder)
    tensors.strip_prefix("transformer.")
    tensors.drop(".attn.bias", ".attn.masked_bias")  # causal masks, saved as buffers
    width, vocab = config["n_embd"], config["vocab_size"]
    tied = not ("lm_head.weight" in tensors and not _same_head(tensors, vocab, width))
    gpt = GPTConfig(
        vocab_size=vocab,
        context=config["n_positions"] if hugging_face else config["block_size"],
        layers=config["n_layer"],
        heads=config["n_head"],
        width=width,
        bias=True if hugging_face else bool(config.get("bias", True)),
        gelu="tanh"
        if hugging_face and config.get("activation_function", "gelu_new") == "gelu_new"
        else "exact",
        tie_embeddings=tied,
    )
    params = read_params(tensors, _maps(gpt, transposed=not hugging_face))
    return GPT(gpt), {"params": params}


def _same_head(tensors: Tensors, vocab: int, width: int) -> bool:
    """Whether lm_head repeats the token embedding; if so it is dropped."""
    head, embedding = tensors.peek("lm_head.weight"), tensors.peek("wte.weight")
    same = (
        embedding is not None
        and head is not None
        and head.shape == embedding.shape
        and bool(np.array_equal(head, embedding))
    )
    if same:
        tensors.take("lm_head.weight", (vocab, width))
    return same


def _maps(c: GPTConfig, transposed: bool) -> Iterator[TensorMap]:
    """Every array of the model and the published tensor it is; of GPT-2 kernels lie as ours do."""
    norm = functools.partial(layer_norm, width=c.width, bias=c.bias)
    dense = functools.partial(linear, bias=c.bias, transposed=transposed)
    yield TensorMap("token_embedding/embedding", {"wte.weight": (c.vocab_size, c.width)})
    yield TensorMap("position_embedding", {"wpe.weight": (c.context, c.width)})
    yield from norm("final_norm", "ln_f")
    for i in range(c.layers):
        ours, theirs = f"block_{i}", f"h.{i}"
        yield from norm(f"{ours}/attention_norm", f"{theirs}.ln_1")
        yield from dense(f"{ours}/attention/qkv", f"{theirs}.attn.c_attn", c.width, 3 * c.width)
        yield from dense(f"{ours}/attention/proj", f"{theirs}.attn.c_proj", c.width, c.width)
        yield from norm(f"{ours}/mlp_norm", f"{theirs}.ln_2")
        yield from dense(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc", c.width, 4 * c.width)
        yield from dense(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj", 4 * c.width, c.width)
    if not c.tie_embeddings:
        yield kernel("head/kernel", c.width, {"lm_head.weight": c.vocab_size})
