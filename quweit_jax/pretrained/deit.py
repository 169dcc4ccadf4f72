"""DeiT's checkpoints (timm's names), and I-ViT's: also the range of each activation quantizer.

Dimensions: P patch size, C channels, N patches, d width.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from absl import logging
from flax.traverse_util import unflatten_dict
from jax.typing import ArrayLike
from jaxtyping import PyTree

from quweit_jax.errors import InputError
from quweit_jax.layers.integer import ACTIVATION_BITS, RESIDUAL_BITS
from quweit_jax.models.vit import ViT
from quweit_jax.pretrained.layout import Opened, TensorMap, layer_norm, linear, read_params
from quweit_jax.pretrained.published_config import PublishedConfig
from quweit_jax.pretrained.tensors import Tensors, read_config, read_weights
from quweit_jax.pretrained.vision import Sizes, model_of, patch_kernel

# timm's options of a vision transformer that change what it computes, and the values that leave it
# the one modeled here; the first is timm's default.
_ONLY: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("qkv_bias", "proj_bias", "class_token", "final_norm", "patch_norm"), (True,)),
    **dict.fromkeys(
        ("qk_norm", "no_embed_class", "pre_norm", "distilled", "scale_attn_norm", "scale_mlp_norm"),
        (False,),
    ),
    **dict.fromkeys(("scale_attn_inner_norm", "scale_mlp_inner_norm", "fc_norm"), (False,)),
    **dict.fromkeys(("init_values", "qk_scale", "representation_size", "hybrid_backbone"), (None,)),
    **dict.fromkeys(("embed_layer", "embed_norm_layer", "block_fn", "mlp_layer"), (None,)),
    **dict.fromkeys(("attn_layer", "quantization_config"), (None,)),
    "reg_tokens": (0,),
    "pos_embed": ("learn",),
    "norm_layer": (None, "layernorm"),
    "act_layer": (None, "gelu"),
    "layer_norm_eps": (1e-6,),
    "norm_eps": (1e-6,),
}
# What else timm writes: names, statistics of the data, and options of training or of other sizes.
_HARMLESS = (
    *("num_features", "pretrained_cfg", "model_args", "crop_pct", "crop_mode", "interpolation"),
    *("mean", "std", "classifier", "first_conv", "url", "hf_hub_id", "tag", "fixed_input_size"),
    *("weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "pool_size", "custom_load"),
    *("pool_include_prefix", "strict_img_size", "label_names", "label_descriptions", "origin_url"),
    *("paper_ids", "paper_name", "min_input_size", "test_input_size", "test_crop_pct", "source"),
)
_SIZES = (
    *("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "num_classes"),
    *("img_size", "in_chans"),
)
WRAPPED = ("model.", "backbone.")  # before timm's names, where a training program keeps the model
_HEAD_WIDTH = 64  # of every published DeiT and of the ViTs it follows
# I-ViT's quantizers and ours: outside the blocks, and inside each.
_RANGES = {
    "qact_input": "quant_input",
    "patch_embed.qact": "quant_patches",
    "qact_pos": "quant_position",
    "qact1": "quant_embedding",
    "qact2": "quant_final",
}
_BLOCK_RANGES = {
    "qact1": "quant_attention_norm",
    "qact2": "quant_attention",
    "qact3": "quant_mlp_norm",
    "qact4": "quant_mlp",
    "attn.qact1": "attention/quant_qkv",
    "attn.qact_attn1": "attention/quant_scores",
    "attn.qact2": "attention/quant_mixed",
    "attn.qact3": "attention/quant_proj",
    "mlp.qact_gelu": "mlp/quant_up",
    "mlp.qact1": "mlp/quant_gelu",
    "mlp.qact2": "mlp/quant_down",
}
# What I-ViT computes from the weights and ranges and saves all the same, and quantizers whose range
# nothing depends on.
_DERIVED = re.compile(r".*(_scaling_factor|\.weight_integer|\.bias_integer)|.*\.int_softmax\..*")
_UNUSED = re.compile(r"act_out\..*|blocks\.\d+\.attn\.qact_softmax\..*")
_SCALE = ".act_scaling_factor"
_RESIDUAL = re.compile(r"quant_(patches|position|embedding|attention|mlp|proj|down)")
_QUANTIZER = re.compile(r".*\.(min_val|max_val|act_scaling_factor)")


def open_deit(path: Path) -> Opened:
    """A float ViT and a function that reads its variables, {'params': ...}."""
    return _opened(path, integer=False)


def open_ivit(path: Path) -> Opened:
    """An integer-only ViT and a function that reads its {'params': ..., 'ranges': ...}; zeros are
    ranges not set.

    It rounds as the published program does (`rounding='published'`), so that it decides alike. What
    is trained or fine-tuned here, and every packed form, computes with exact integers.
    """
    return _opened(path, integer=True)


def read_variables(path: Path) -> dict[str, PyTree]:
    """The variables alone, of either kind: with 'ranges' if the checkpoint has quantizers.

    Raises:
      InputError: as `pretrained.load`, except that the number of heads need not be known.
    """
    tensors = _weights(path)
    if "cls_token" not in tensors:
        raise InputError(
            "pretrained: expected the weights of a vision transformer in timm's names (cls_token, "
            f"blocks.0.attn.qkv.weight, ...) in {path}, found "
            f"{', '.join(sorted(tensors.names())[:5])}."
        )
    integer = is_integer(tensors)
    return _convert(tensors, _sizes(tensors, _config(path)), integer)


def calibrate(
    model: ViT, variables: Mapping[str, PyTree], batches: Iterable[ArrayLike]
) -> dict[str, PyTree]:
    """Sets the activation ranges of an integer-only model from a few hundred images of its kind.

    Args:
      model, variables: of `load(..., 'ivit')`. Ranges not set become the first batch's; then every
        batch moves them by a twentieth.
      batches: images (B, H, W, C) float each, normalized.

    Returns:
      The variables with new 'ranges'.

    Raises:
      InputError: the model has no ranges, or there are no batches.
    """
    if not model.config.integer or "ranges" not in variables:
        raise InputError(
            "calibrate: expected an integer-only model with 'ranges' among its variables, found "
            "none; load it with kind 'ivit'."
        )

    @jax.jit
    def moved(variables: dict[str, PyTree], images: jax.Array) -> PyTree:
        _, state = model.apply(
            variables, images, train=True, mutable=["ranges"], rngs={"dropout": jax.random.key(0)}
        )
        return state["ranges"]

    calibrated, count = dict(variables), 0
    for images in batches:
        calibrated["ranges"] = moved(calibrated, jax.numpy.asarray(images))
        count += 1
    if count == 0:
        raise InputError("calibrate: expected at least one batch of images, found none.")
    return calibrated


def _opened(path: Path, integer: bool) -> Opened:
    tensors, config = _weights(path), _config(path)
    if not integer and is_integer(tensors):
        raise InputError(
            f"pretrained: {path} holds I-ViT's activation quantizers; load it with kind 'ivit'."
        )
    sizes = _sizes(tensors, config)
    heads = _whole(config, "num_heads") or sizes.width // _HEAD_WIDTH
    if "num_heads" not in config and sizes.width % _HEAD_WIDTH:
        raise InputError(
            f"pretrained: the number of heads cannot be told from width {sizes.width}, which is no "
            f"multiple of {_HEAD_WIDTH}; write a "
            f"config.json beside {path if os.path.isfile(path) else 'the weights'} with "
            '{"num_heads": ...}.'
        )
    model = model_of(sizes, heads, integer=integer)
    side = sizes.patch * math.isqrt(sizes.patches)
    read = functools.partial(_convert, tensors, sizes, integer)
    return Opened(model, read, (side, side, sizes.channels))


def _weights(path: Path) -> Tensors:
    tensors = read_weights(path)
    tensors.strip_prefix(*WRAPPED)
    return tensors


def is_integer(tensors: Tensors) -> bool:
    """Whether weights come with I-ViT's activation quantizers."""
    return any(_QUANTIZER.fullmatch(name) for name in tensors.names())


def _config(path: Path) -> PublishedConfig:
    """The config.json beside the weights, timm's or with plain sizes; empty if there is none.

    Raises:
      InputError: an option asks for something that the model here does not compute.
    """
    folder = path if os.path.isdir(path) else path.parent
    where = folder / "config.json"
    values = read_config(folder, ()) if os.path.isfile(where) else {}
    extra = values.get("model_args")
    config = PublishedConfig(where, (extra if isinstance(extra, dict) else {}) | values)
    if "model_type" in config:
        raise InputError(
            f"pretrained: expected timm's names, found model_type '{config.get('model_type')}' in "
            f"{where}; load it with kind 'vit', that of Hugging Face's transformers."
        )
    if config.get("global_pool") not in (None, "", "token"):
        raise InputError(
            f"pretrained: expected global_pool 'token' in {where}, found "
            f"{config.get('global_pool')!r}; it is not supported."
        )
    for key, supported in _ONLY.items():
        config.only(key, *supported)
    if "quickgelu" in str(config.get("architecture", "")):
        raise config.error(
            "architecture",
            "a model of exact GELUs",
            config.get("architecture"),
            "the model here cannot do otherwise.",
        )
    config.finish(*_SIZES, *_HARMLESS)
    return config


def _whole(config: PublishedConfig, key: str) -> int | None:
    """A positive whole number of the config, None if it isn't there."""
    value = config.get(key)  # timm may give a patch size twice, for height and width
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        value = value[0]
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 1 <= value < 2**31
        or value != int(value)
    ):
        raise InputError(
            f"pretrained: config.json: {key}: expected a positive whole number, found {value!r}."
        )
    return int(value)


def _sizes(tensors: Tensors, config: PublishedConfig) -> Sizes:
    """The model's sizes: config.json's, else those of the tensors."""
    if any(name == "dist_token" or name.startswith("head_dist.") for name in tensors.names()):
        raise InputError(
            f"pretrained: {tensors.where} is a distilled DeiT (it has dist_token and head_dist, a "
            "second token and head), which is not supported; take the one without '_distilled' in "
            "its name."
        )
    found_width = tensors.shape("cls_token", "1, 1, width")[2]
    conv = tensors.shape("patch_embed.proj.weight", "width, channels, patch, patch")
    positions = tensors.shape("pos_embed", "1, 1 + patches, width")[1] - 1
    width = _whole(config, "embed_dim") or found_width
    hidden = tensors.shape("blocks.0.mlp.fc1.weight", "hidden, width")[0]
    matches = (re.match(r"blocks\.(\d{1,6})\.", name) for name in tensors.names())
    found_depth = 1 + max(int(match[1]) for match in matches if match)
    depth = _whole(config, "depth") or found_depth
    if depth > len(list(tensors.names())):  # before anything is made for each block
        raise InputError(
            f"pretrained: {tensors.where}: expected the weights of {depth} blocks, found "
            f"{len(list(tensors.names()))} tensors in all."
        )
    ratio = _whole(config, "mlp_ratio")
    if ratio is None and (width == 0 or hidden % width):
        raise InputError(
            f"pretrained: blocks.0.mlp.fc1.weight: expected a multiple of the width {width} rows, "
            f"found {hidden}."
        )
    if math.isqrt(max(positions, 0)) ** 2 != positions:
        raise InputError(
            "pretrained: pos_embed: expected a class token and a square grid of patches, found 1 "
            f"+ {positions}."
        )
    classes, patch = _whole(config, "num_classes"), _whole(config, "patch_size") or conv[2]
    image = _whole(config, "img_size")  # of equal sides, as the grid of positions is read here
    if image is not None and (image // patch) ** 2 != positions:
        raise InputError(
            f"pretrained: config.json: img_size: {image} by patches of {patch} gives "
            f"{(image // patch) ** 2} positions, found {positions} in pos_embed; do config.json "
            "and the weights belong together?"
        )
    return Sizes(
        patch=patch,
        channels=_whole(config, "in_chans") or conv[1],
        patches=positions,
        width=width,
        depth=depth,
        mlp_ratio=ratio or hidden // width,
        num_classes=classes or tensors.shape("head.weight", "classes, width")[0],
    )


def _convert(tensors: Tensors, s: Sizes, integer: bool) -> dict[str, PyTree]:
    """Every tensor in its place in the variables; none may be missing or left over."""
    ranges = {"ranges": _ranges(tensors, s.depth)} if integer else {}
    params = read_params(tensors, _maps(s))
    params["patch_embed"]["kernel"] = patch_kernel(params["patch_embed"]["kernel"])
    return {"params": params, **ranges}


def _maps(s: Sizes) -> Iterator[TensorMap]:
    """Every array of the model and the published tensor it is; of patch_embed the convolution's."""
    d, hidden = s.width, s.mlp_ratio * s.width
    patches = "patch_embed.proj"
    yield TensorMap("patch_embed/kernel", {f"{patches}.weight": (d, s.channels, s.patch, s.patch)})
    yield TensorMap("patch_embed/bias", {f"{patches}.bias": (d,)})
    yield TensorMap("cls_token", {"cls_token": (1, 1, d)})
    yield TensorMap("position_embedding", {"pos_embed": (1, 1 + s.patches, d)})
    for i in range(s.depth):
        ours, theirs = f"block_{i}", f"blocks.{i}"
        yield from layer_norm(f"{ours}/attention_norm", f"{theirs}.norm1", d)
        yield from linear(f"{ours}/attention/qkv", f"{theirs}.attn.qkv", d, 3 * d)
        yield from linear(f"{ours}/attention/proj", f"{theirs}.attn.proj", d, d)
        yield from layer_norm(f"{ours}/mlp_norm", f"{theirs}.norm2", d)
        yield from linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1", d, hidden)
        yield from linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2", hidden, d)
    yield from layer_norm("final_norm", "norm", d)
    yield from linear("head", "head", d, s.num_classes)


def _ranges(tensors: Tensors, depth: int) -> dict[str, PyTree]:
    """Each quantizer's {min, max}; zeros for all, and a warning, if there are none.

    The published program forgets min_val and max_val when it saves, but keeps each quantizer's last
    scale, which says as much.
    """
    scales: dict[str, float] = {}
    for name in tensors.names():
        scale = tensors.peek(name) if name.endswith(_SCALE) else None
        if scale is not None and scale.size:
            scales[name.removesuffix(_SCALE)] = float(np.max(scale))
    tensors.drop(*(n for n in tensors.names() if _DERIVED.fullmatch(n) or _UNUSED.fullmatch(n)))
    quantizers = dict(_RANGES)
    for i in range(depth):
        quantizers |= {f"blocks.{i}.{t}": f"block_{i}/{ours}" for t, ours in _BLOCK_RANGES.items()}
    unset = not any(name.endswith((".min_val", ".max_val")) for name in tensors.names())
    from_scales = unset and all(scales.get(theirs, 0) > 0 for theirs in quantizers)
    if unset and not from_scales:
        logging.warning(
            "%s",
            f"{tensors.where} has no ranges; every batch is quantized by its own until they are "
            "set; calibrate with quweit_jax.pretrained.calibrate(model, variables, batches).",
        )
    ranges: dict[tuple[str, ...], np.ndarray] = {}
    for theirs, ours in quantizers.items():
        path = tuple(ours.split("/"))
        if not unset:
            low, high = (_scalar(tensors, f"{theirs}.{end}") for end in ("min_val", "max_val"))
        else:
            bits = RESIDUAL_BITS if _RESIDUAL.fullmatch(path[-1]) else ACTIVATION_BITS
            limit = scales[theirs] * (2 ** (bits - 1) - 1) if from_scales else 0.0
            low, high = np.asarray(0.0 - limit, np.float32), np.asarray(limit, np.float32)
        if not low <= high:  # also if one is not a number
            raise InputError(
                f"pretrained: {theirs}: expected min_val <= max_val, found {low} and {high}."
            )
        ranges |= {(*path, "min"): low, (*path, "max"): high}
    return unflatten_dict(ranges)


def _scalar(tensors: Tensors, name: str) -> np.ndarray:
    """One number, saved as such or as an array of one."""
    found = tensors.peek(name)
    return tensors.take(name, (1,) if found is not None and found.shape == (1,) else ()).reshape(())
