"""What is wrong with a language model's checkpoint is named, and nothing is written that should not
be.
"""

import json
import os
import pickle
import resource
import shutil
from collections import OrderedDict

import numpy as np
import pytest

from quweit_jax import pretrained
from quweit_jax.errors import InputError
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.pretrained import tensors
from tests.pretrained.language_files import (
    INDEX,
    assert_same,
    both,
    published_tensors,
    random_variables,
    small,
    torch_shards,
    write,
)
from tests.pretrained.vit_files import Harm, save_torch


def test_wrong_configs_are_named(tmp_path):
    def refused(kind, config, message):
        write(tmp_path, kind, published_tensors(kind), config)
        with pytest.raises(InputError, match=message):
            pretrained.load(tmp_path, kind)

    where = r"config\.json: "
    for key, value, expected in (
        ("use_lower_bound", False, "true, found false; the model here cannot do otherwise"),
        ("use_short_conv", True, "false, found true"),
        ("expand_ratio", 2, "1, found 2"),
        ("hidden_act", "gelu", '"swish" or "silu", found "gelu"'),
        ("hidden_size", 24.5, "a whole number from 1 to .*, found 24.5"),
        ("num_hidden_layers", 10**9, "a whole number from 1 to 10000, found 1000000000"),
        ("rms_norm_eps", -1, "a positive number, found -1"),
        ("tie_word_embeddings", "yes", 'true or false, found "yes"'),
    ):
        refused("matmulfree", {key: value}, where + f"{key}: expected {expected}")
    for key, value, expected in (
        ("attention_bias", "yes", 'true or false, found "yes"'),
        ("mlp_bias", True, "false, found true"),
        ("hidden_act", "gelu", '"silu" or "swish" or "relu2", found "gelu"'),
        (
            "rope_scaling",
            {"rope_type": "longrope", "factor": 8.0},
            "rotary positions of type default, linear.*, found .*longrope.*not supported",
        ),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "rotary positions of whole heads"),
        ("rope_parameters", 3, "an object of names and values, found 3"),
        ("rope_theta", "10000", 'a positive number, found "10000"'),
        ("num_key_value_heads", 0, "a whole number from 1 to .*, found 0"),
    ):
        refused(
            "transformer_pp",
            {"rope_parameters": None} | {key: value},
            where + f"{key}: expected {expected}",
        )
    refused(
        "transformer_pp",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}},
        where + r"rope_parameters\.factor: expected a number, found null",
    )
    refused(
        "transformer_pp",
        {"attention_bias": True},
        r"lacks the tensor model\.layers\.0\.self_attn\.q_proj\.bias \[24\]",
    )
    refused(
        "transformer_pp",
        {"num_key_value_heads": 3},
        "4 heads cannot share 3 heads of keys and values",
    )
    refused(
        "transformer_pp",
        {"num_attention_heads": "left out", "vocab_size": "left out"},
        r"config\.json lacks vocab_size, num_attention_heads",
    )
    refused("matmulfree", {"hidden_size": "left out"}, r"config\.json lacks hidden_size")
    refused(
        "matmulfree",
        {"model_type": "llama"},
        r"expected model_type 'hgrn_bit' in .*config\.json, found 'llama'; load it with the kind",
    )
    refused(
        "transformer_pp",
        {"model_type": "left out"},
        r"expected model_type 'llama' or .*'bitnet' in .*config\.json, found None",
    )


def test_wrong_tensors_are_named(tmp_path):
    def refused(kind, changes, message):
        write(
            tmp_path,
            kind,
            {
                name: value
                for name, value in (published_tensors(kind) | changes).items()
                if value is not None
            },
        )
        with pytest.raises(InputError, match=message):
            pretrained.load(tmp_path, kind)

    one, name = np.ones((1, 20), np.float32), "model.layers.1.mlp.up_proj.weight"
    refused("transformer_pp", {name: None}, rf"lacks the tensor {name} \[36, 20\]\. Did you mean")
    refused(
        "transformer_pp",
        {name: one},
        rf"tensor {name}: expected shape \[36, 20\], found \[1, 20\]; do config\.json and the "
        r"weights belong",
    )
    refused(
        "transformer_pp",
        {"model.layers.2.mlp.up_proj.weight": one},
        r"does not have: model\.layers\.2\.mlp\.up_proj\.weight",
    )
    refused(
        "transformer_pp", {"lm_head.weight": None}, r"lacks the tensor lm_head\.weight \[31, 20\]"
    )
    refused(
        "matmulfree",
        {"lm_head.norm.weight": None},
        r"lacks the tensor lm_head\.norm\.weight \[24\]",
    )
    refused(
        "matmulfree",
        {"model.lower_bounds": one},
        r"model\.lower_bounds: expected shape \[2, 24\], found \[1, 20\]",
    )
    refused("matmulfree", {"lm_head.bias": one}, r"does not have: lm_head\.bias")


def test_wrong_files_are_named(tmp_path):
    kind = "transformer_pp"
    tensors = published_tensors(kind)

    def refused(message):
        with pytest.raises(InputError, match=message):
            pretrained.load(tmp_path, kind)

    write(tmp_path, kind, tensors)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    refused(r"model\.safetensors is damaged or cut short")
    (tmp_path / "model.safetensors").unlink()
    refused(r"expected model\.safetensors, pytorch_model\.bin or one \*\.pth in .*found none")

    shutil.rmtree(tmp_path)

    pretrained.save(small(kind), random_variables(kind, small(kind)), tmp_path, shard_bytes=4000)
    index = json.loads((tmp_path / INDEX).read_text())
    shutil.move(tmp_path / index["weight_map"]["model.norm.weight"], tmp_path / "elsewhere")
    refused(r"names the shard model-.*\.safetensors, found no such file in .*download it too")
    for content, message in (
        ("{", "index.json is not JSON"),
        (json.dumps({"weight_map": {}}), "expected a 'weight_map' of tensors' names and files"),
        (
            json.dumps({"weight_map": {"a": "../a.safetensors"}}),
            r"expected the name of a file beside it, found '\.\./a\.safetensors'",
        ),
    ):
        (tmp_path / INDEX).write_text(content)
        refused(message)


def test_wrong_files_of_torch_are_named(tmp_path):
    kind = "transformer_pp"
    tensors = published_tensors(kind)

    def refused(message):
        with pytest.raises(InputError, match=message):
            pretrained.load(tmp_path, kind)

    write(tmp_path, kind, tensors)
    (tmp_path / "model.safetensors").unlink()
    victim = tmp_path / "victim"
    harm = Harm(os.system, f"touch {victim}")
    for content, message in (
        ({"weights": harm}, "wants to run .*system; this is no plain state dict; refused"),
        ([1, 2], "expected a state dict"),
    ):
        save_torch(tmp_path / "pytorch_model.bin", content)
        refused(message)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, 2))
    refused(r"pytorch_model\.bin is damaged or cut short, or no file of torch\.save")
    assert not victim.exists()
    (tmp_path / "pytorch_model.bin").unlink()

    torch_shards(tmp_path, tensors)
    second = tmp_path / "pytorch_model-00002-of-00003.bin"
    save_torch(second, OrderedDict({"model.norm.weight": np.ones(20, np.float32)}))
    refused(
        r"pytorch_model\.bin\.index\.json and pytorch_model-00002-of-00003\.bin do not agree on "
        r"model\..*; download both"
    )
    second.write_bytes(second.read_bytes()[:-100])
    refused(r"pytorch_model-00002-of-00003\.bin is damaged or cut short")
    second.unlink()
    refused(
        r"pytorch_model\.bin\.index\.json names the shard pytorch_model-00002-of-00003\.bin, found "
        r"no such file"
    )


@both
def test_what_cannot_be_saved(tmp_path, kind):
    model = small(kind)
    variables = random_variables(kind, model)

    def refused(model, variables, message, **options):
        with pytest.raises(InputError, match=message):
            pretrained.save(model, variables, tmp_path / "a", **options)
        assert not (tmp_path / "a" / "config.json").exists()

    for mlp in ("weightless", "none", "dense+weightless"):
        refused(
            small(kind, mlp=mlp),
            variables,
            f"has dense MLPs alone, found mlp '{mlp.split('+')[-1]}'",
        )
    refused(
        GPT(GPTConfig(vocab_size=5, context=4)),
        variables,
        "expected a MatMulFree or TransformerPP model, found GPT",
    )
    refused(
        model,
        {"packed": {}},
        r"expected the array params/\w+.*, found none; give the variables the model was trained "
        r"with",
    )
    refused(
        small(kind, vocab_size=32),
        variables,
        r"embedding: expected shape \[32, 2\d\], found \[31, 2\d\]",
    )
    refused(
        model,
        {"params": variables["params"] | {"more": {"x": np.ones(2)}}},
        "has no place for params/more/x",
    )
    refused(model, variables, "shard_bytes: expected at least 1, found 0", shard_bytes=0)
    (tmp_path / "a").write_text("")
    refused(model, variables, "expected a folder, found a file")


@both
def test_nothing_is_overwritten_unasked(tmp_path, kind):
    model = small(kind)
    first, second = (random_variables(kind, model, seed) for seed in (0, 1))
    (tmp_path / "tokenizer.json").write_text("{}")
    pretrained.save(model, first, tmp_path)
    with pytest.raises(
        InputError,
        match=r"already holds config\.json, model\.safetensors; give another folder, or "
        r"overwrite=True",
    ):
        pretrained.save(model, second, tmp_path)
    assert_same(pretrained.load(tmp_path, kind)[1], first)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"already holds model\.safetensors; give"):
        pretrained.save(model, second, tmp_path)
    for shard_bytes in (3000, 4000, 10**9):  # neither old shards nor an old whole file may be left
        pretrained.save(model, second, tmp_path, overwrite=True, shard_bytes=shard_bytes)
        assert_same(pretrained.load(tmp_path, kind)[1], second)
        second = random_variables(kind, model, shard_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@both
def test_a_disk_that_is_full_is_a_sentence(tmp_path, kind):
    model, limits = small(kind), resource.getrlimit(resource.RLIMIT_FSIZE)
    variables = random_variables(kind, model)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(InputError, match=r"pretrained\.save: .*cannot be written .*too large"):
            pretrained.save(model, variables, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "config.json").exists()
    pretrained.save(model, variables, tmp_path, overwrite=True)
    assert_same(pretrained.load(tmp_path, kind)[1], variables)


@pytest.mark.parametrize("name", ["model.safetensors", "model-2.safetensors", "weights.pth"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_weights_that_are_no_file(name, kind, tmp_path):
    file = tmp_path / name
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(name)
    with pytest.raises(InputError, match=rf"pretrained: .*{name}"):
        tensors.read_weights(tmp_path)


def test_hidden_files_are_no_weights(tmp_path):
    (tmp_path / "._model.safetensors").write_bytes(b"of a Mac")
    (tmp_path / "._weights.pth").write_bytes(b"of a Mac")
    with pytest.raises(InputError, match="found none"):
        tensors.read_weights(tmp_path)
