"""Transformer++ in the layout of Hugging Face's Llama (LlamaForCausalLM): reading and writing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from quweit_jax.models.options import kinds_of_mlp
from quweit_jax.models.transformer_pp import TransformerPP, TransformerPPConfig
from quweit_jax.pretrained.hugging_face import read_language_model, require_dense
from quweit_jax.pretrained.layout import Opened, TensorMap, kernel
from quweit_jax.pretrained.published_config import PublishedConfig

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def opened(folder: Path) -> Opened:
    """The model and a function that reads its variables, {'params': ...} in float32; a tied head becomes one of its own.

    Raises:
      InputError: as `pretrained.load`; also an option of Llama that this model does not have, such
        as scaled rotary positions.
    """
    config = PublishedConfig.of_type(folder, "llama", _REQUIRED)
    config.only("hidden_act", "silu", "swish")
    for key in ("attention_bias", "mlp_bias"):
        config.only(key, False)
    heads = config.whole("num_attention_heads")
    c = TransformerPPConfig(
        vocab_size=config.whole("vocab_size"),
        width=config.whole("hidden_size"),
        layers=config.whole("num_hidden_layers", most=10_000),
        heads=heads,
        kv_heads=config.whole("num_key_value_heads", heads),
        head_width=config.whole("head_dim", max(1, config.whole("hidden_size") // heads)),
        context=config.whole("max_position_embeddings", 2048),
        hidden=config.whole("intermediate_size"),
        epsilon=config.positive("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(config),
    )
    config.finish("pretraining_tp", "tie_word_embeddings")  # the first splits a product, no more
    return Opened(TransformerPP(c), functools.partial(read_language_model, folder, config, maps(c)))


def published_config(c: TransformerPPConfig) -> dict[str, object]:
    """config.json, as `transformers` reads it; raises InputError unless MLPs are dense."""
    width, layers, heads = c.sizes()
    require_dense(kinds_of_mlp(c.mlp, layers), "Llama")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": width,
        "intermediate_size": c.hidden_width(),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": c.kv_heads or heads,
        "head_dim": _head_width(c),
        "hidden_act": "silu",
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.epsilon,
        # Programs before transformers 5 read the first, later ones the second.
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def maps(c: TransformerPPConfig) -> Iterator[TensorMap]:
    """Every array of the model and the published tensors it is made of."""
    width, layers, heads = c.sizes()
    hidden, queries, keys = (
        c.hidden_width(),
        heads * _head_width(c),
        (c.kv_heads or heads) * _head_width(c),
    )

    def scale(path: str, name: str) -> TensorMap:
        return TensorMap(path, {name: (width,)})

    yield TensorMap(
        "token_embedding/embedding", {"model.embed_tokens.weight": (c.vocab_size, width)}
    )
    for i in range(layers):
        ours, theirs = f"block_{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv = {
            f"{attention}.q_proj.weight": queries,
            f"{attention}.k_proj.weight": keys,
            f"{attention}.v_proj.weight": keys,
        }
        yield kernel(f"{ours}/mixer/qkv/kernel", width, qkv)
        yield kernel(f"{ours}/mixer/proj/kernel", queries, {f"{attention}.o_proj.weight": width})
        yield kernel(
            f"{ours}/mlp/gate/kernel",
            width,
            {f"{mlp}.gate_proj.weight": hidden, f"{mlp}.up_proj.weight": hidden},
        )
        yield kernel(f"{ours}/mlp/down/kernel", hidden, {f"{mlp}.down_proj.weight": width})
        yield scale(f"{ours}/mixer_norm/scale", f"{theirs}.input_layernorm.weight")
        yield scale(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight")
    yield scale("final_norm/scale", "model.norm.weight")
    yield kernel("head/kernel", width, {"lm_head.weight": c.vocab_size})


def _head_width(c: TransformerPPConfig) -> int:
    width, _, heads = c.sizes()
    return c.head_width or width // heads


def _rope_theta(config: PublishedConfig) -> float:
    """The base of the rotary positions; refused if they are scaled or of a part of a head."""
    theta = config.get("rope_theta", 10000.0)
    config.only("partial_rotary_factor", 1)
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key, {})
        if not isinstance(rope, dict):
            raise config.error(key, "an object of names and values", rope)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default" or rope.get("partial_rotary_factor") not in (None, 1):
            raise config.error(
                key,
                "rotary positions of type 'default'",
                rope,
                "scaled or partial ones are not supported.",
            )
        theta = theta if rope.get("rope_theta") is None else rope["rope_theta"]
    return config.check_positive("rope_theta", theta)
