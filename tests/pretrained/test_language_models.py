"""Published language models: golden values and gradients, every form of file, what is saved, and
memory.
"""

import json
import tracemalloc
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quweit_jax import pretrained
from quweit_jax.errors import InputError
from quweit_jax.pretrained import matmulfree
from tests.pretrained.language_files import (
    INDEX,
    as_published,
    assert_same,
    both,
    published_tensors,
    random_variables,
    size_of,
    small,
    torch_shards,
    write,
)
from tests.pretrained.vit_files import save_torch


def assert_close(found, expected, name=""):
    reach = np.ptp(expected) if np.ndim(expected) else abs(expected)
    assert np.shape(found) == np.shape(expected), name
    assert np.abs(np.asarray(found) - expected).max() <= 1e-4 * reach, name


@pytest.fixture
def golden(shared):
    return shared / "golden"


def test_golden_transformer_pp(golden):
    io = np.load(golden / "transformer_pp" / "io.npz")
    model, variables = pretrained.load(golden / "transformer_pp", "transformer_pp")
    assert_close(jax.jit(model.apply)(variables, io["input_ids"].astype(np.int32)), io["logits"])


def test_golden_matmulfree(golden):
    """Logits, loss and gradients, and the state after reading the text."""
    io = np.load(golden / "matmulfree" / "io.npz")
    model, variables = pretrained.load(golden / "matmulfree", "matmulfree")
    ids = jnp.asarray(io["input_ids"], jnp.int32)

    @jax.jit
    def loss(variables):
        logits = model.apply(variables, ids)
        assert isinstance(logits, jax.Array)
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1
        ).mean(), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(variables)
    assert_close(logits, io["logits"])
    assert_close(value, float(io["loss"]))
    found = as_published("matmulfree", model, gradients)
    names = [name for name in io if name.startswith("grad/")]
    assert len(names) == 7
    for name in names:
        assert_close(found[name.removeprefix("grad/")], io[name], name)
    read: Any = jax.jit(
        lambda variables: model.apply(variables, ids, decode=True, mutable=["cache"])
    )
    logits, state = read(variables)
    assert_close(logits, io["logits"])
    for i, expected in enumerate(io["final_state"]):
        assert_close(state["cache"][f"block_{i}"]["mixer"]["state"], expected, f"state {i}")


@both
def test_golden_is_written_as_it_was(golden, tmp_path, kind):
    model, variables = pretrained.load(golden / kind, kind)
    pretrained.save(model, variables, tmp_path / "a" / "b")
    assert_same(
        load_file(tmp_path / "a" / "b" / "model.safetensors"),
        load_file(golden / kind / "model.safetensors"),
    )
    if kind == "transformer_pp":  # saved by transformers: the whole file is the same
        assert (tmp_path / "a" / "b" / "model.safetensors").read_bytes() == (
            golden / kind / "model.safetensors"
        ).read_bytes()
    again, read = pretrained.load(tmp_path / "a" / "b", kind)
    assert again == model
    assert_same(read, variables)
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "a" / "b", golden / kind)
    )
    shared_keys = ours.keys() & theirs.keys()
    assert len(shared_keys) >= 13 and ours["intermediate_size"] == 256
    assert all(
        ours[key] == theirs[key] for key in shared_keys if theirs[key] is not None
    )  # null: 256 is worked out


@both
@pytest.mark.parametrize("shard_bytes", [10**9, 3000, 1])
def test_saved_and_read_again(tmp_path, kind, shard_bytes):
    """Whole or in shards, from JAX's arrays; every array and every option that matters
    comes back.
    """
    model = small(kind)
    variables = random_variables(kind, model)
    pretrained.save(
        model,
        jax.tree.map(jnp.asarray, variables) | {"cache": {}},
        tmp_path,
        shard_bytes=shard_bytes,
    )
    found, read = pretrained.load(tmp_path, kind)
    assert found == model
    assert_same(read, variables)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    shapes = {name: value.shape for name, value in as_published(kind, model, variables).items()}
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"] and not (tmp_path / INDEX).exists()
        return
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index, seen = json.loads((tmp_path / INDEX).read_text()), {}
    for file in files:
        tensors = load_file(tmp_path / file)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= shard_bytes
        seen |= {name: (value.shape, file) for name, value in tensors.items()}
    assert {name: shape for name, (shape, _) in seen.items()} == shapes
    assert index == {
        "metadata": {"total_size": size_of(kind, model)},
        "weight_map": {name: file for name, (_, file) in seen.items()},
    }
    assert len(files) == len(shapes) if shard_bytes == 1 else len(files) > 1


def test_grouped_heads_are_those_of_llama(tmp_path):
    """Query head h attends with keys and values h // 2: writing each of those out gives the same
    logits.
    """
    model = small("transformer_pp")
    pretrained.save(model, random_variables("transformer_pp", model), tmp_path)
    ids = np.arange(12).reshape(1, 12)
    expected = jax.jit(model.apply)(pretrained.load(tmp_path, "transformer_pp")[1], ids)
    tensors, config = (
        load_file(tmp_path / "model.safetensors"),
        json.loads((tmp_path / "config.json").read_text()),
    )
    for name, value in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            tensors[name] = np.repeat(value.reshape(2, 6, 20), 2, axis=0).reshape(24, 20)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": None}))
    model, variables = pretrained.load(tmp_path, "transformer_pp")
    assert model.config.kv_heads == 4
    assert_close(jax.jit(model.apply)(variables, ids), np.asarray(expected))


@both
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("form", ["safetensors", "torch shards", "torch"])
def test_every_form_of_file(tmp_path, kind, dtype, form):
    tensors = {name: value.astype(dtype) for name, value in published_tensors(kind).items()}
    write(tmp_path, kind, tensors)
    if form != "safetensors":
        torch_shards(tmp_path, {f"module.{name}": value for name, value in tensors.items()})
    if form == "torch":
        (tmp_path / "pytorch_model.bin.index.json").unlink()
        for file in tmp_path.glob("*.bin"):
            file.unlink()
        save_torch(tmp_path / "pytorch_model.bin", {"model": OrderedDict(tensors)})
    rounded = jax.tree.map(
        lambda x: x.astype(dtype).astype(np.float32), random_variables(kind, small(kind))
    )
    assert_same(pretrained.load(tmp_path, kind)[1], rounded)


@both
def test_tied_embeddings(tmp_path, kind):
    """The head is the embedding's transpose, whether a file repeats it or not; constants that old
    files hold are left.
    """
    tensors = published_tensors(kind)
    embedding = tensors[
        "model.embeddings.weight" if kind == "matmulfree" else "model.embed_tokens.weight"
    ]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    write(tmp_path, kind, tensors, {"tie_word_embeddings": True})
    _, expected = pretrained.load(tmp_path, kind)
    assert_same({"kernel": expected["params"]["head"]["kernel"]}, {"kernel": embedding.T})
    tensors.pop("lm_head.weight")
    write(tmp_path, kind, tensors, {"tie_word_embeddings": True})
    model, variables = pretrained.load(tmp_path, kind)
    assert_same(variables, expected)
    pretrained.save(model, variables, tmp_path / "untied")
    assert (
        json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"]
        is False
    )
    assert_same(pretrained.load(tmp_path / "untied", kind)[1], variables)


def test_options_that_may_be_left_out(tmp_path):
    defaults = (
        "num_heads",
        "expand_ratio",
        "hidden_ratio",
        "hidden_act",
        "use_lower_bound",
        "tie_word_embeddings",
        "rms_norm_eps",
    )
    model = small("matmulfree", hidden=0)
    pretrained.save(model, random_variables("matmulfree", model), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in defaults} | {
        "intermediate_size": None,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = matmulfree.opened(tmp_path).model.config
    assert found.hidden_width() == 256 and found.epsilon == 1e-6
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"hidden_ratio": 33})
    )  # int(24 * 33 * 2 / 3) = 528
    with pytest.raises(
        InputError, match=r"gate_proj\.weight: expected shape \[1536, 24\], found \[512, 24\]"
    ):
        matmulfree.opened(tmp_path).read()
    kind = "transformer_pp"
    changes = {
        "rope_parameters": None,
        "rope_theta": 700,
        "rms_norm_eps": None,
        "attention_bias": None,
        "rope_scaling": {"type": "default"},
    }
    write(tmp_path, kind, published_tensors(kind), changes)
    found = pretrained.load(tmp_path, "transformer_pp")[0].config
    assert (found.rope_theta, found.epsilon) == (700.0, 1e-6)
    write(
        tmp_path,
        kind,
        published_tensors(kind),
        {"rope_parameters": {"rope_theta": 800.0}, "head_dim": "left out", "hidden_size": 24},
    )
    with pytest.raises(
        InputError,
        match=r"model\.embed_tokens\.weight: expected shape \[31, 24\], found \[31, 20\]",
    ):
        pretrained.load(tmp_path, "transformer_pp")


@both
@pytest.mark.parametrize("form", ["float32", "bfloat16", "torch shards"])
def test_memory(tmp_path, kind, form):
    """Reading and writing 60 MB needs at most a fifth more than the arrays themselves, and rows
    that are read in parts are in their places.
    """
    changes = {"width": 512, "layers": 4, "hidden": 1501, "vocab_size": 2100} | (
        {"head_width": 128} if kind == "transformer_pp" else {}
    )
    model = small(kind, **changes)
    variables, size = random_variables(kind, model), size_of(kind, model)
    assert size > 55e6
    tracemalloc.start()
    try:
        if form == "float32":
            copied = jax.tree.map(
                np.ascontiguousarray, variables
            )  # kernels as training leaves them
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            # a shard at a time is copied
            pretrained.save(model, copied, tmp_path, shard_bytes=size // 8)
            assert tracemalloc.get_traced_memory()[1] - before <= 0.2 * size
            del copied
        else:
            pretrained.save(model, variables, tmp_path)
            tensors = load_file(tmp_path / "model.safetensors")
            if form == "torch shards":
                torch_shards(tmp_path, {name: value.copy() for name, value in tensors.items()}, 6)
            else:
                save_file(
                    {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()},
                    tmp_path / "model.safetensors",
                )
            del tensors
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        _, read = pretrained.load(tmp_path, kind)
        assert tracemalloc.get_traced_memory()[1] - before <= 1.2 * size
    finally:
        tracemalloc.stop()
    if form == "bfloat16":
        variables = jax.tree.map(
            lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), variables
        )
    assert_same(read, variables)
