"""MatMul-free language models as published (HGRNBitForCausalLM; arXiv 2406.02528)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

from quweit_jax.models.matmulfree import MatMulFree, MatMulFreeConfig
from quweit_jax.models.options import kinds_of_mlp
from quweit_jax.pretrained.hugging_face import read_language_model, require_dense
from quweit_jax.pretrained.layout import Opened, TensorMap, kernel
from quweit_jax.pretrained.published_config import PublishedConfig

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers")
_PROJECTIONS = {"input": "i_proj", "forget": "f_proj", "gate": "g_proj", "output": "o_proj"}


def opened(folder: Path) -> Opened:
    """The model and a function that reads its variables, {'params': ...} in float32; a tied head
    becomes one of its own.

    Raises:
      InputError: as `pretrained.load`; also an option of the public program that this model does
        not have.
    """
    config = PublishedConfig.of_type(folder, "hgrn_bit", _REQUIRED)
    config.only("hidden_act", "swish", "silu")
    for key, supported in (
        ("use_lower_bound", True),
        ("use_short_conv", False),
        ("expand_ratio", 1),
        ("elementwise_affine", True),
        ("attn", None),  # layers of softmax attention among the others
    ):
        config.only(key, supported)
    width = config.whole("hidden_size")
    about = int(width * config.positive("hidden_ratio", 4) * 2 / 3)
    c = MatMulFreeConfig(
        vocab_size=config.whole("vocab_size"),
        width=width,
        layers=config.whole("num_hidden_layers", most=10_000),
        context=config.whole("max_position_embeddings", 2048),
        hidden=config.whole("intermediate_size", 256 * math.ceil(about / 256)),
        epsilon=config.positive("rms_norm_eps", 1e-6),
    )
    # Heads only group elements, the mode says how the recurrence is run, and without the short
    # convolution it has no options.
    harmless = ("num_heads", "attn_mode", "conv_size", "conv_bias", "share_conv_kernel")
    config.finish(*harmless, "tie_word_embeddings")
    return Opened(MatMulFree(c), functools.partial(read_language_model, folder, config, maps(c)))


def published_config(c: MatMulFreeConfig) -> dict[str, object]:
    """config.json, as the public program reads it; raises InputError unless MLPs are dense."""
    width, layers = c.sizes()
    require_dense(kinds_of_mlp(c.mlp, layers), "MatMul-free language models")
    return {
        "architectures": ["HGRNBitForCausalLM"],
        "model_type": "hgrn_bit",
        "attn_mode": "fused_recurrent",
        "vocab_size": c.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_heads": 1,
        "expand_ratio": 1,
        "hidden_ratio": 4,
        "intermediate_size": c.hidden_width(),
        "hidden_act": "swish",
        "rms_norm_eps": c.epsilon,
        "use_lower_bound": True,
        "use_short_conv": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": c.context,
        "torch_dtype": "float32",
    }


def maps(c: MatMulFreeConfig) -> Iterator[TensorMap]:
    """Every array of the model and the published tensors it is made of."""
    width, layers = c.sizes()
    hidden = c.hidden_width()

    def scale(path: str, name: str) -> TensorMap:
        return TensorMap(path, {name: (width,)})

    def bit_linear(path: str, name: str, inputs: int, outputs: int) -> Iterator[TensorMap]:
        yield kernel(f"{path}/kernel", inputs, {f"{name}.weight": outputs})
        yield TensorMap(f"{path}/norm_scale", {f"{name}.norm.weight": (inputs,)})

    yield TensorMap("lower_bounds", {"model.lower_bounds": (layers, width)})
    yield TensorMap("token_embedding/embedding", {"model.embeddings.weight": (c.vocab_size, width)})
    for i in range(layers):
        ours, theirs = f"block_{i}", f"model.layers.{i}"
        yield scale(f"{ours}/mixer_norm/scale", f"{theirs}.attn_norm.weight")
        for name, projection in _PROJECTIONS.items():
            yield from bit_linear(
                f"{ours}/mixer/{name}", f"{theirs}.attn.{projection}", width, width
            )
        yield scale(f"{ours}/mixer/gate_norm/scale", f"{theirs}.attn.g_norm.weight")
        yield scale(f"{ours}/mlp_norm/scale", f"{theirs}.mlp_norm.weight")
        yield from bit_linear(f"{ours}/mlp/gate", f"{theirs}.mlp.gate_proj", width, 2 * hidden)
        yield from bit_linear(f"{ours}/mlp/down", f"{theirs}.mlp.down_proj", hidden, width)
    yield scale("final_norm/scale", "model.norm.weight")
    yield from bit_linear("head", "lm_head", width, c.vocab_size)
