"""nanoGPT's checkpoints, and GPT-2's of Hugging Face (transposed projections, tanh GELU)."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from quweit_jax.errors import InputError
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.pretrained.layout import Opened, TensorMap, kernel, layer_norm, linear, read_params
from quweit_jax.pretrained.published_config import PublishedConfig
from quweit_jax.pretrained.tensors import Tensors, read_config, read_weights

_NANOGPT_KEYS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
_GPT2_KEYS = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
# How Hugging Face's programs call the two forms of GELU; those of tanh differ in rounding alone.
_GELUS = {
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "tanh"
    ),
    **dict.fromkeys(("gelu", "gelu_python"), "exact"),
}


def opened(path: Path) -> Opened:
    """The model and a function that reads its variables, {'params': ...} in float32.

    path: a folder with config.json and weights, in the layout that config.json tells; or what
    nanoGPT's own program saves, ckpt.pt or the folder that holds it, with the sizes inside.

    A factor of attention scores other than 1 / sqrt(width of a head), of GPT-2's options, becomes
    part of the queries' weights.

    Raises:
      InputError: as `pretrained.load`; also an option of GPT-2 that this model does not have.
    """
    tensors, config = _opened(path)
    hugging_face = config.get("model_type") == "gpt2" or "n_positions" in config
    if "model_type" in config and not hugging_face:
        raise InputError(
            "pretrained: expected model_type 'gpt2' (or none, for nanoGPT), found "
            f"'{config.get('model_type')}' in {config.where}."
        )
    config.require(*(_GPT2_KEYS if hugging_face else _NANOGPT_KEYS))
    sizes: dict[str, PyTree] = {
        "vocab_size": config.whole("vocab_size"),
        "layers": config.whole("n_layer", most=10_000),
        "heads": config.whole("n_head"),
        "width": config.whole("n_embd"),
    }
    options, factors = (_gpt2_options if hugging_face else _nanogpt_options)(config, sizes)
    # a buffer's size, what is only ever more exact, and what `_is_tied` asks
    config.finish("n_ctx", "reorder_and_upcast_attn", "tie_word_embeddings")
    tensors = tensors or read_weights(path)
    tensors.strip_prefix("transformer.", "model.")
    tensors.drop(".attn.bias", ".attn.masked_bias")  # causal masks, saved as buffers
    tied = _is_tied(config, tensors, sizes["vocab_size"], sizes["width"])
    gpt = GPTConfig(**sizes, **options, tie_embeddings=tied)
    maps = _maps(gpt, transposed=not hugging_face)
    return Opened(GPT(gpt), functools.partial(_read, tensors, maps, factors, gpt.width))


def _read(
    tensors: Tensors, maps: Iterator[TensorMap], factors: Sequence[float], width: int
) -> dict[str, PyTree]:
    params = read_params(tensors, maps)
    for i, factor in enumerate(factors):
        for values in params[f"block_{i}"]["attention"]["qkv"].values():
            values[..., :width] *= np.float32(factor)
    return {"params": params}


def _opened(path: Path) -> tuple[Tensors | None, PublishedConfig]:
    """The config, and the weights if they had to be opened for it."""
    folder, tensors = path.parent if os.path.isfile(path) else path, None
    if os.path.isfile(path) or (os.path.isdir(path) and not os.path.isfile(path / "config.json")):
        tensors = read_weights(path)
        if tensors.model_args is not None:
            return tensors, PublishedConfig(f"{tensors.where}: model_args", tensors.model_args)
    return tensors, PublishedConfig(folder / "config.json", read_config(folder, ()))


def _nanogpt_options(
    config: PublishedConfig, _: Mapping[str, object]
) -> tuple[dict[str, PyTree], list[float]]:
    return {"context": config.whole("block_size"), "bias": config.flag("bias", True)}, []


def _gpt2_options(
    config: PublishedConfig, sizes: Mapping[str, int]
) -> tuple[dict[str, PyTree], list[float]]:
    """What GPT-2's options say of our model's, and each layer's factor of attention scores beyond
    1 / sqrt(width of a head); what our model cannot do is refused by name.
    """
    config.only_float_weights()
    config.only("add_cross_attention", False)
    config.only("n_inner", 4 * sizes["width"])
    options = {
        "context": config.whole("n_positions"),
        "bias": True,
        "gelu": _GELUS[config.only("activation_function", *_GELUS)],
        "epsilon": config.positive("layer_norm_epsilon", 1e-5),
    }
    scaled = config.flag("scale_attn_weights", True)
    factor = 1.0 if scaled else math.sqrt(sizes["width"] / sizes["heads"])
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", False)
    return options, [factor / (i + 1 if by_layer else 1) for i in range(sizes["layers"])]


def _is_tied(config: PublishedConfig, tensors: Tensors, vocab: int, width: int) -> bool:
    """Whether the head is the token embedding; a head that repeats it is dropped."""
    found, said = "lm_head.weight" in tensors, "tie_word_embeddings" in config
    tied = config.flag("tie_word_embeddings", True)
    own = found and not _same_head(tensors, vocab, width)
    if own and said and tied:
        raise config.error(
            "tie_word_embeddings",
            "false beside an lm_head.weight other than wte.weight",
            True,
            "set it to false to use that head, or leave the tensor out.",
        )
    return not own if found else tied


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
