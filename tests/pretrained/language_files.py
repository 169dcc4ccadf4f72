"""Checkpoints of small language models for tests: random weights, written in every form."""

import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from quweit_jax import pretrained
from quweit_jax.models.matmulfree import MatMulFree, MatMulFreeConfig
from quweit_jax.models.transformer_pp import TransformerPP, TransformerPPConfig
from quweit_jax.pretrained import layout, matmulfree, transformer_pp
from tests.pretrained.vit_files import save_torch

LAYOUTS: dict[str, Any] = {"matmulfree": matmulfree, "transformer_pp": transformer_pp}
KINDS = list(LAYOUTS)
both = pytest.mark.parametrize("kind", KINDS)
INDEX = "model.safetensors.index.json"


def small(kind, **changes) -> Any:
    """A small model of odd sizes; of the Transformer++, 4 heads of queries share 2 of keys and
    values.
    """
    sizes: dict[str, Any] = {"vocab_size": 31, "layers": 2, "context": 20}
    if kind == "matmulfree":
        sizes |= {"width": 24, "hidden": 40, **changes}
        return MatMulFree(MatMulFreeConfig(**sizes))
    sizes |= {
        "width": 20,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 6,
        "hidden": 36,
        "rope_theta": 500.0,
        "epsilon": 1e-5,
        **changes,
    }
    return TransformerPP(TransformerPPConfig(**sizes))


def size_of(kind, model) -> int:
    """Bytes of the model's arrays."""
    return 4 * sum(math.prod(part.shape()) for part in LAYOUTS[kind].maps(model.config))


def random_variables(kind, model, seed=0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {
        "params": unflatten_dict(
            {
                p.path: draw.standard_normal(p.shape(), np.float32)
                for p in LAYOUTS[kind].maps(model.config)
            },
            sep="/",
        )
    }


def assert_same(found, expected):
    """Bit for bit."""
    arrays: dict[str, Any] = flatten_dict(found, sep="/")
    others: dict[str, Any] = flatten_dict(expected, sep="/")
    assert arrays.keys() == others.keys()
    for name, value in others.items():
        assert (
            arrays[name].dtype == value.dtype
            and arrays[name].shape == value.shape
            and arrays[name].tobytes() == value.tobytes()
        ), name


def write(folder, kind, tensors, config=None):
    """A checkpoint of a small model with these tensors; config.json as saved, with changes."""
    pretrained.save(small(kind), random_variables(kind, small(kind)), folder, overwrite=True)
    save_file(tensors, folder / "model.safetensors")
    known = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in known.items() if value != "left out"})
    )


def as_published(kind, model, variables) -> dict[str, np.ndarray]:
    """The published tensors of the model's variables (or their gradients), by name."""
    tensors = layout.published(variables, LAYOUTS[kind].maps(model.config))
    return {name: tensor.make() for name, tensor in tensors.items()}


def published_tensors(kind) -> dict[str, np.ndarray]:
    """Those of a small model."""
    return as_published(kind, small(kind), random_variables(kind, small(kind)))


def torch_shards(folder, tensors, count=3):
    """pytorch_model-0000x-of-0000y.bin with their index, in place of model.safetensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names, places = list(tensors), {}
    for i in range(count):
        part = names[len(names) * i // count : len(names) * (i + 1) // count]
        file = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        save_torch(folder / file, OrderedDict({name: tensors[name] for name in part}))
        places |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
