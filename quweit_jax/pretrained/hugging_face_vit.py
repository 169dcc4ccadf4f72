"""ViT and DeiT in the layout of Hugging Face's transformers (ViTForImageClassification), as
`facebook/deit-tiny-patch16-224` has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from quweit_jax.errors import InputError
from quweit_jax.pretrained.layout import Opened, TensorMap, kernel, layer_norm, linear, read_params
from quweit_jax.pretrained.published_config import PublishedConfig
from quweit_jax.pretrained.tensors import Tensors, read_config, read_weights
from quweit_jax.pretrained.vision import Sizes, model_of, patch_kernel

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_PARTS = ("query", "key", "value")
_HARMLESS = (
    *("encoder_stride", "pooler_act", "pooler_output_size"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob"),
)


def opened(folder: Path) -> Opened:
    """The model and a function that reads its variables, {'params': ...} in float32.

    Raises:
      InputError: as `pretrained.load`; also a DeiT with a distillation token, or an option of ViT
        that this model does not have.
    """
    found = read_config(folder, ()).get("model_type")
    if found == "deit":
        raise InputError(
            f"pretrained: {folder} is a DeiT with a second, distilled token (model_type 'deit'), "
            "which is not supported; take one of model_type 'vit', such as the one without "
            "'-distilled' in its name."
        )
    config = PublishedConfig.of_type(folder, "vit", _REQUIRED)
    config.only("hidden_act", "gelu")
    config.only("qkv_bias", True)
    width, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    hidden, side = config.whole("intermediate_size"), config.whole("image_size", 224)
    patch = config.whole("patch_size", 16)
    channels, depth = config.whole("num_channels", 3), config.whole("num_hidden_layers", most=1000)
    if hidden % width:
        raise config.error("intermediate_size", f"a multiple of hidden_size {width}", hidden)
    if side % patch:
        raise config.error("image_size", f"a multiple of patch_size {patch}", side)
    epsilon = config.positive("layer_norm_eps", 1e-12)
    config.finish(*_HARMLESS)
    tensors = read_weights(folder)
    tensors.strip_prefix("vit.")
    tensors.drop("pooler.dense.weight", "pooler.dense.bias")
    classes = tensors.shape("classifier.weight", "classes, width")[0]
    sizes = Sizes(patch, channels, (side // patch) ** 2, width, depth, hidden // width, classes)
    read = functools.partial(_read, tensors, sizes)
    return Opened(model_of(sizes, heads, epsilon=epsilon), read, (side, side, channels))


def _read(tensors: Tensors, sizes: Sizes) -> dict[str, PyTree]:
    params = read_params(tensors, _maps(sizes))
    for i in range(sizes.depth):
        qkv = params[f"block_{i}"]["attention"]["qkv"]
        qkv["bias"] = np.concatenate([qkv.pop(f"bias_{part}") for part in _PARTS])
    params["patch_embed"]["kernel"] = patch_kernel(params["patch_embed"]["kernel"])
    return {"params": params}


def _maps(s: Sizes) -> Iterator[TensorMap]:
    """Every array of the model and the published tensors it is made of; biases of queries, keys and
    values are apart.
    """
    d, hidden, above = s.width, s.mlp_ratio * s.width, "embeddings"
    patches = f"{above}.patch_embeddings.projection"
    yield TensorMap("patch_embed/kernel", {f"{patches}.weight": (d, s.channels, s.patch, s.patch)})
    yield TensorMap("patch_embed/bias", {f"{patches}.bias": (d,)})
    yield TensorMap("cls_token", {f"{above}.cls_token": (1, 1, d)})
    yield TensorMap("position_embedding", {f"{above}.position_embeddings": (1, 1 + s.patches, d)})
    for i in range(s.depth):
        ours, theirs = f"block_{i}", f"encoder.layer.{i}"
        attention = f"{theirs}.attention.attention"
        yield kernel(
            f"{ours}/attention/qkv/kernel", d, {f"{attention}.{part}.weight": d for part in _PARTS}
        )
        for part in _PARTS:
            name = f"{attention}.{part}.bias"
            yield TensorMap(f"{ours}/attention/qkv/bias_{part}", {name: (d,)})
        yield from linear(f"{ours}/attention/proj", f"{theirs}.attention.output.dense", d, d)
        yield from layer_norm(f"{ours}/attention_norm", f"{theirs}.layernorm_before", d)
        yield from layer_norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after", d)
        yield from linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense", d, hidden)
        yield from linear(f"{ours}/mlp/down", f"{theirs}.output.dense", hidden, d)
    yield from layer_norm("final_norm", "layernorm", d)
    yield from linear("head", "classifier", d, s.num_classes)
