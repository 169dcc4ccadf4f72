"""What one inference of a model costs: operations, table look-ups, bytes moved and stored.

The model is traced, not run: no array is made, and one of 13 billion weights is counted in a
second. Its layers say what each call of them costs (`layers.costs`). An image model is counted for
one image, a language model for one token at the end of `context` tokens, which attention reads from
a key-value cache. Published shares follow: of nanoGPT's multiplications a token (6 blocks of 12 d^2
for the matrices and 2 T d for attention at T = 256), MLPs hold 8 d^2 a block: 60.0 % without the
head and 59.9 % with it, which is counted here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from quweit_jax.costs.recording import recorded
from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers.costs import Call
from quweit_jax.models.options import LM_SIZES
from quweit_jax.models.registry import MODELS, build
from quweit_jax.models.stack import unscanned
from quweit_jax.ops.counts import Costs, Elementwise, LayerCosts

__all__ = [
    "Costs",
    "DataShape",
    "Elementwise",
    "LayerCosts",
    "baseline",
    "count",
    "data_shape",
    "multiplications_replaced",
    "of_config",
    "of_model",
]

PRECISIONS = ("float32", "bfloat16", "float16", "int8")

# Image sets' classes, channels and side (None: several), by TFDS name ('digits': by source).
IMAGES = {
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
    "digits": (10, 1, 8),
    "fashion_mnist": (10, 1, 28),
    "imagenet2012": (1000, 3, None),
    "mnist": (10, 1, 28),
    "svhn_cropped": (10, 3, 32),
}
CHARACTERS = {
    "tiny_shakespeare": (65, "the characters of tiny_shakespeare"),
    "python_stdlib": (
        96,
        "the characters of the first 2 MB of CPython 3.11's standard library; --outputs=N for "
        "another",
    ),
}


def count(
    model_config: Mapping[str, object],
    outputs: int,
    *,
    image_size: int | None = None,
    channels: int = 3,
    context: int | None = None,
    precision: str | None = None,
) -> Costs:
    """The costs of one inference.

    Args:
      model_config: `config.model` of an experiment: 'name' and the keys of the model's config.
      outputs: vocabulary size or number of classes. image_size: side of the images, of `channels`
        channels; for 'vit' and 'dwn'.
      context: tokens the token attends to, itself among them; None for the model's whole context.
        Of no consequence to 'matmulfree'.
      precision: operands of the dense matrix products, 'float32', 'bfloat16', 'float16' or 'int8';
        None for the model as it is: its dtype, or for an integer model int8 with attention's 16-bit
        weights. Ternary layers and weightless blocks have a precision of their own.

    Returns:
      Costs of the deployed form: ternary weights at 2 bits, tables at 1 bit, matrices in the type
        of their products, vectors in float32.

    Raises:
      InputError: an unknown model, key or value; no image_size where it is needed; a context that
        the model doesn't have.
    """
    model_config = _plain(model_config)
    model: Any = unscanned(build(model_config, outputs))
    if not _reads_images(model_config):
        limit = model.config.context if getattr(model, "limited_context", True) else None
        context = int(model.config.context if context is None else context)
        if context < 1 or (limit is not None and context > limit):
            raise InputError(
                f"context: expected 1 to {limit or 'any number of'} tokens, found {context}; a "
                "longer one is --config.model.context."
            )
        return _costs(_one_token(model), context, precision)
    if image_size is None:
        raise InputError(
            f"image_size: the costs of a {model_config['name']} depend on the side of its images; "
            "give it."
        )
    patch = getattr(model.config, "patch", 1)
    if image_size < 1 or image_size % patch:
        raise InputError(
            f"image_size: expected a multiple of the patch size {patch}, found {image_size}."
        )
    return _costs(_one_image(model, (1, image_size, image_size, channels)), None, precision)


def of_model(
    model: nn.Module,
    *inputs: PyTree,
    context: int | None = None,
    precision: str | None = None,
    **options: Any,
) -> Costs:
    """The costs of any Flax model on one example, its own layers among ours or Flax's.

    Args:
      inputs: what the model is called with, a batch of one; shapes (`jax.ShapeDtypeStruct`) will
        do. options: keywords of the call; a language model of ours takes one token, (1, 1) int32,
        and decode=True.
      context: of a language model the tokens that the token attends to. precision: see `count`.

    Raises:
      InputError: a layer without a rule, or one that is called in a way that can't be followed.
    """
    return _costs(recorded(model, *inputs, **options), context, precision)


@functools.lru_cache(64)
def _one_token(model: nn.Module) -> Call:
    return recorded(model, jax.ShapeDtypeStruct((1, 1), jnp.int32), decode=True)


@functools.lru_cache(64)
def _one_image(model: nn.Module, shape: tuple[int, ...]) -> Call:
    return recorded(model, jax.ShapeDtypeStruct(shape, jnp.float32))


def _costs(call: Call, context: int | None, precision: str | None) -> Costs:
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    asked = dataclasses.replace(call, precision=precision, context=context)
    counted = Costs(tuple(asked.costs()), "image" if context is None else "token", context)
    if counted.parameters != call.all_params:
        raise InputError(
            f"costs: the layers of {type(call.layer).__name__} say {counted.parameters:,} "
            f"parameters of the model's {call.all_params:,}; a rule is wrong, or layers are called "
            "within a scan or a vmap, where one of several calls is seen."
        )
    return counted


def _reads_images(model_config: Mapping[str, object]) -> bool:
    name = str(model_config.get("name"))
    return name in MODELS and MODELS[name].task == "classify"


def multiplications_replaced(costs: Costs, dense_costs: Costs) -> float:
    """The share (0 to 1) of the dense baseline's multiplications in matrix products that the
    variant no longer does.

    Raises:
      InputError: the baseline has none, or is not of the same unit.
    """
    if costs.unit != dense_costs.unit:
        raise InputError(
            f"multiplications_replaced: expected two costs of one unit, found {costs.unit} and "
            f"{dense_costs.unit}."
        )
    if not dense_costs.total_multiplications:
        raise InputError(
            "multiplications_replaced: the baseline multiplies nothing; give a dense model's costs."
        )
    return 1 - costs.total_multiplications / dense_costs.total_multiplications


def baseline(model_config: Mapping[str, object]) -> tuple[dict[str, Any], str] | None:
    """The dense model to compare with, and what it is: every MLP dense or, for 'matmulfree',
    Transformer++ of the same size.

    None for 'dwn', which takes the place of no dense model.
    """
    values = _plain(model_config)
    if values.get("name") == "dwn":
        return None
    if values.get("name") != "matmulfree":
        return values | {"mlp": "dense"}, "the same model with dense MLPs"
    kept = ("size", "width", "layers", "context", "hidden", "epsilon", "dtype", "weightless")
    dense = {
        "name": "transformer_pp",
        **{key: values[key] for key in kept if key in values},
        "mlp": "dense",
    }
    size = LM_SIZES.get(dense.get("size", "tiny"))
    if size is not None and dense.get("width"):  # a width that the size's heads may not divide
        heads = size[2]
        while heads > 1 and dense["width"] % (2 * heads):
            heads -= 1
        dense["heads"] = heads
    return dense, "Transformer++ of the same width and layers"


@dataclasses.dataclass(frozen=True)
class DataShape:
    """What the data decides of a model: outputs, and of images their side and channels.
    assumptions: where that came from, in sentences.
    """

    outputs: int
    image_size: int | None
    channels: int
    assumptions: tuple[str, ...]


def of_config(
    config: Any,
    *,
    outputs: int | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    context: int | None = None,
    precision: str | None = None,
    model: Mapping[str, object] | None = None,
) -> Costs:
    """The costs of a whole experiment config (or of a run's config.json), with what the data
    decides taken from a table of known sets.

    Args:
      config: with 'model' and 'data'. outputs, image_size, channels: where the table doesn't know,
        or to overrule it. context, precision: see `count`.
      model: another model on the same data, such as `baseline(config.model)[0]`.

    Returns:
      Costs, whose `assumptions` say what was taken from the table.

    Raises:
      InputError: see `count`; or the table doesn't know the data.
    """
    values = _plain(config["model"]) if model is None else model
    data = data_shape(config, outputs=outputs, image_size=image_size, channels=channels)
    costs = count(
        values,
        data.outputs,
        image_size=data.image_size,
        channels=data.channels,
        context=context,
        precision=precision,
    )
    return dataclasses.replace(costs, assumptions=data.assumptions)


def data_shape(
    config: Any,
    *,
    outputs: int | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> DataShape:
    """What is known of a config's data without reading them; `outputs`, `image_size` and
    `channels` overrule the table.

    Raises:
      InputError: the data are not in the table, naming what to give.
    """
    data, images = _plain(config["data"]), _reads_images(config["model"])
    assumptions = []
    name = str(data.get("name") if data.get("source") == "tfds" else data.get("source"))
    _, known, side = IMAGES.get(name, (0, 3, None))
    if outputs is None:
        outputs, assumed = _classes(name) if images else _vocabulary(data, name)
        assumptions.append(assumed)
    if images:
        known = channels or (3 if data.get("to_rgb") else known)
        image_size = image_size or data.get("image_size") or side
        if image_size is None:
            raise InputError(
                f"image_size: the side of the images of {name} is not known without reading them; "
                "give --config.data.image_size=SIZE."
            )
        assumptions.append(
            f"images of {image_size} x {image_size} pixels and {known} "
            f"channel{'s' if known > 1 else ''}"
        )
    return DataShape(outputs, image_size, known, tuple(assumptions))


def _plain(values: Any) -> dict[str, Any]:
    """A mapping or an ml_collections.ConfigDict as a dict."""
    return values.to_dict() if hasattr(values, "to_dict") else dict(values)


def _classes(name: str) -> tuple[int, str]:
    if name not in IMAGES:
        raise InputError(
            f"outputs: the classes of {name} are not known without reading it; give --outputs=N. "
            f"Known: {', '.join(sorted(IMAGES))}."
        )
    return IMAGES[name][0], f"{IMAGES[name][0]} classes of {name}"


def _vocabulary(data: Mapping[str, Any], name: str) -> tuple[int, str]:
    tokenizer = data.get("tokenizer")
    if tokenizer == "byte":
        return 256, "a vocabulary of 256 bytes"
    if tokenizer == "bpe":
        count = data["bpe_vocab_size"]
        return count, f"a vocabulary of {count:,} byte pairs, the most the tokenizer may have"
    if tokenizer == "char" and name in CHARACTERS:
        count, of = CHARACTERS[name]
        return count, f"a vocabulary of {count}, {of}"
    raise InputError(
        f"outputs: the vocabulary of {name} with tokenizer '{tokenizer}' is not known without "
        "reading it; give --outputs=N."
    )
