"""Transformer++ in the layout of Hugging Face's Llama (LlamaForCausalLM) and of what is built like
it (Mistral, Qwen2, BitNet): reading and writing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from quweit_jax.errors import InputError
from quweit_jax.models.options import kinds_of_mlp
from quweit_jax.models.transformer_pp import TransformerPP, TransformerPPConfig
from quweit_jax.pretrained import bitnet, rope_options
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


# Which biases a model_type has; of the others config.json says.
_TYPES = {"llama": None, "mistral": "none", "qwen2": "qkv", "bitnet": None}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "relu2"}


def opened(folder: Path) -> Opened:
    """The model and a function that reads its variables, {'params': ...} in float32; a tied head
    becomes one of its own.

    Read are model_type 'llama', 'mistral' and 'qwen2' (without sliding windows) and 'bitnet', with
    dense or ternary weights (`quant_method` 'bitnet', masters or two bits a weight).

    Raises:
      InputError: as `pretrained.load`; also an option that this model does not have, such as biases
        in the gated unit.
    """
    config = PublishedConfig.of_type(folder, tuple(_TYPES), _REQUIRED, quantized=True)
    kind = str(config.get("model_type"))
    config.only("mlp_bias", False)
    for layer in config.get("layer_types", []):
        if layer != "full_attention":
            raise config.error(
                "layer_types", "'full_attention' alone", layer, "others are unknown."
            )
    heads, biases = config.whole("num_attention_heads"), _TYPES[kind]
    has_biases = config.flag("attention_bias", False)
    if biases is None:
        biases = "attention" if has_biases else "none"
    quantization, is_bitnet = bitnet.read(config), kind == "bitnet"
    theta, rope, context = rope_options.read(config, 500000.0 if is_bitnet else 10000.0)
    activation = config.only("hidden_act", *(("relu2",) if is_bitnet else ()), *_ACTIVATIONS)
    c = TransformerPPConfig(
        vocab_size=config.whole("vocab_size"),
        width=config.whole("hidden_size"),
        layers=config.whole("num_hidden_layers", most=10_000),
        heads=heads,
        kv_heads=config.whole("num_key_value_heads", heads),
        head_width=config.whole("head_dim", max(1, config.whole("hidden_size") // heads)),
        context=context,
        hidden=config.whole("intermediate_size"),
        epsilon=config.positive("rms_norm_eps", 1e-5 if is_bitnet else 1e-6),
        rope_theta=theta,
        rope=rope,
        biases=biases,
        linear="dense" if quantization is None else "ternary",
        sub_norms=is_bitnet,
        activation=_ACTIVATIONS[activation],
    )
    # The first splits a product, no more; the last says which layers have windows, where any has.
    config.finish("pretraining_tp", "tie_word_embeddings", "max_window_layers")
    prepare = None
    if quantization is not None and quantization[1] == "offline":
        matrices = bitnet.ternary(maps(c))
        prepare = functools.partial(bitnet.unpack, matrices=matrices, linear_class=quantization[0])
    read = functools.partial(read_language_model, folder, config, maps(c), prepare)
    return Opened(TransformerPP(c), read)


def published_config(c: TransformerPPConfig, packed: bool = False) -> dict[str, object]:
    """config.json, as `transformers` reads it. packed: ternary weights at two bits.

    Raises:
      InputError: MLPs are not dense, or no public layout has this choice of options.
    """
    width, layers, heads = c.sizes()
    require_dense(kinds_of_mlp(c.mlp, layers), "Llama")
    kind, name = "llama", "LlamaForCausalLM"
    if set(c.mixers()) != {"attention"}:
        raise _unwritten("model.mixer", "attention", c.mixer)
    if c.sub_norms:
        kind, name = "bitnet", "BitNetForCausalLM"
        if heads * _head_width(c) != width:
            raise _unwritten("model.head_width", "width / heads with model.sub_norms", c.head_width)
    if c.biases == "qkv":
        kind, name = "qwen2", "Qwen2ForCausalLM"
        if c.sub_norms:
            raise _unwritten("model.biases", "none or attention with model.sub_norms", c.biases)
    if packed and c.linear != "ternary":
        raise _unwritten("model.linear", "ternary, for two bits a weight", c.linear)
    more: dict[str, object] = {}
    if c.linear == "ternary":
        more = {"quantization_config": bitnet.written(packed)}
    if kind == "bitnet":  # whose defaults are of a vocabulary of 128,256
        more |= {"bos_token_id": None, "eos_token_id": None}
    return {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": width,
        "intermediate_size": c.hidden_width(),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": c.kv_heads or heads,
        "head_dim": _head_width(c),
        "hidden_act": c.activation,
        "rms_norm_eps": c.epsilon,
        **rope_options.write(c.rope_theta, c.rope, c.context),
        "attention_bias": c.biases != "none",
        "mlp_bias": False,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": "float32",
        **more,
    }


def _unwritten(key: str, expected: str, found: object) -> InputError:
    return InputError(
        f"pretrained.save: {key}: expected {expected}, found {found!r}, which no public layout "
        "has; keep the run's own checkpoint."
    )


def maps(c: TransformerPPConfig) -> Iterator[TensorMap]:
    """Every array of the model and the published tensors it is made of."""
    width, layers, heads = c.sizes()
    hidden, queries, keys = (
        c.hidden_width(),
        heads * _head_width(c),
        (c.kv_heads or heads) * _head_width(c),
    )

    def scale(path: str, name: str, size: int = width) -> TensorMap:
        return TensorMap(path, {name: (size,)})

    yield TensorMap(
        "token_embedding/embedding", {"model.embed_tokens.weight": (c.vocab_size, width)}
    )
    for i in range(layers):
        ours, theirs = f"block_{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv = {"q": queries, "k": keys, "v": keys}
        gated = {"gate": hidden, "up": hidden}
        yield from _side_by_side(c, f"{ours}/mixer", _ATTENTION, attention, width, qkv)
        if c.biases != "none":
            named = {f"{attention}.{name}_proj.bias": (rows,) for name, rows in qkv.items()}
            yield TensorMap(f"{ours}/mixer/qkv/bias", named)
        yield kernel(f"{ours}/mixer/proj/kernel", queries, {f"{attention}.o_proj.weight": width})
        if c.biases == "attention":
            yield scale(f"{ours}/mixer/proj/bias", f"{attention}.o_proj.bias")
        yield from _side_by_side(c, f"{ours}/mlp", _GATED, mlp, width, gated)
        yield kernel(f"{ours}/mlp/down/kernel", hidden, {f"{mlp}.down_proj.weight": width})
        if c.sub_norms:
            yield scale(
                f"{ours}/mixer/sub_norm/scale", f"{attention}.attn_sub_norm.weight", queries
            )
            yield scale(f"{ours}/mlp/sub_norm/scale", f"{mlp}.ffn_sub_norm.weight", hidden)
        yield scale(f"{ours}/mixer_norm/scale", f"{theirs}.input_layernorm.weight")
        yield scale(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight")
    yield scale("final_norm/scale", "model.norm.weight")
    if not c.tie_embeddings:
        yield kernel("head/kernel", width, {"lm_head.weight": c.vocab_size})


# Our names of matrices that read the same vectors: of all together, and one by one.
_ATTENTION = ("qkv", {"q": "query", "k": "key", "v": "value"})
_GATED = ("gate", {"gate": "gate", "up": "up"})


def _side_by_side(
    c: TransformerPPConfig,
    path: str,
    names: tuple[str, dict[str, str]],
    theirs: str,
    inputs: int,
    outputs: dict[str, int],
) -> Iterator[TensorMap]:
    """One kernel for several published ones, but with ternary weights one for each."""
    together, single = names
    if c.linear == "dense":
        whole = {f"{theirs}.{name}_proj.weight": rows for name, rows in outputs.items()}
        yield kernel(f"{path}/{together}/kernel", inputs, whole)
        return
    for name, rows in outputs.items():
        one = {f"{theirs}.{name}_proj.weight": rows}
        yield kernel(f"{path}/{single[name]}/kernel", inputs, one)


def _head_width(c: TransformerPPConfig) -> int:
    width, _, heads = c.sizes()
    return c.head_width or width // heads
