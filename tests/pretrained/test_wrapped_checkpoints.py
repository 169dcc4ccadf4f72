"""Checkpoints as training programs write them: prefixes of wrapped models, running averages alone,
and nanoGPT's own file with the model's sizes inside.
"""

from collections import OrderedDict

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quweit_jax import pretrained
from quweit_jax.errors import InputError
from quweit_jax.pretrained.tensors import read_weights
from tests.pretrained.language_files import assert_same, both, published_tensors, write
from tests.pretrained.vit_files import save_torch, weights

PREFIXES = ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.")


@pytest.mark.parametrize("prefix", [*PREFIXES, "_fsdp_wrapped_module."])
def test_prefixes_of_wrapped_models_are_cut_off(tmp_path, prefix):
    save_file(weights(), tmp_path / "plain.safetensors")
    expected = pretrained.load(tmp_path / "plain.safetensors", "deit")[1]
    named = {prefix + name: value for name, value in weights().items()}
    save_file(named, tmp_path / "wrapped.safetensors")
    found = pretrained.load(tmp_path / "wrapped.safetensors", "deit")[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@both
def test_language_models_may_be_wrapped_too(tmp_path, kind):
    tensors = published_tensors(kind)
    write(tmp_path, kind, tensors)
    expected = pretrained.load(tmp_path, kind)[1]
    write(tmp_path, kind, {"_orig_mod." + name: value for name, value in tensors.items()})
    assert_same(pretrained.load(tmp_path, kind)[1], expected)


@both
@pytest.mark.parametrize("part", ["_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_single_blocks_may_be_wrapped(tmp_path, kind, part):
    tensors = published_tensors(kind)
    write(tmp_path, kind, tensors)
    expected = pretrained.load(tmp_path, kind)[1]
    block = {name.replace("layers.0.", f"layers.0.{part}"): v for name, v in tensors.items()}
    write(tmp_path, kind, block)
    assert_same(pretrained.load(tmp_path, kind)[1], expected)


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "backbone."])
def test_a_vision_transformer_inside_of_a_training_program_s_module(tmp_path, prefix):
    save_file(weights(), tmp_path / "plain.safetensors")
    named = {prefix + name: value for name, value in weights().items()}
    save_file(named, tmp_path / "inside.safetensors")
    assert pretrained.kind_of(tmp_path / "inside.safetensors") == "deit"
    expected, found = (loaded(tmp_path / f"{n}.safetensors") for n in ("plain", "inside"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@both
@pytest.mark.parametrize(
    "change",
    [
        lambda v: (50 * v).astype(np.int8),
        lambda v: v > 0,
        lambda v: v.astype(ml_dtypes.float8_e4m3fn),
        lambda v: v * np.nan,
        lambda v: (np.sign(v) * 1e8).astype(np.float16),
    ],
    ids=["int8", "bool", "float8", "NaN", "float16 overflowed"],
)
def test_numbers_that_are_no_weights_are_refused_by_name(tmp_path, kind, change):
    tensors = published_tensors(kind)
    name = next(name for name in tensors if "down_proj" in name)
    with np.errstate(over="ignore"):
        write(tmp_path, kind, tensors | {name: change(tensors[name])})
    with pytest.raises(InputError, match=r"expected (real|finite) numbers|numbers of a type"):
        pretrained.load(tmp_path, kind)


def test_two_models_in_one_file_are_not_mixed(tmp_path):
    both_of_them = weights() | {"module." + name: value for name, value in weights(seed=1).items()}
    save_file(both_of_them, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="twice"):
        pretrained.load(tmp_path / "a.safetensors", "deit")


def loaded(path, kind="deit"):
    return pretrained.load(path, kind)[1]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "name", ["model", "state_dict", "model_state_dict", "state_dict_ema", "model_ema", "module"]
)
def test_every_name_of_the_weights_in_a_file_of_torch(tmp_path, name, legacy):
    wrapped = {"_orig_mod." + key: value for key, value in weights().items()}
    content = {name: OrderedDict(wrapped), "epoch": 3, "arch": "deit_tiny"}
    path = save_torch(tmp_path / "a.pth", content, legacy)
    save_file(weights(), tmp_path / "a.safetensors")
    expected = loaded(tmp_path / "a.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded(path), expected)


def test_an_average_is_taken_only_if_there_is_nothing_else(tmp_path):
    content = {"state_dict_ema": OrderedDict(weights(seed=1)), "state_dict": OrderedDict(weights())}
    save_file(weights(), tmp_path / "a.safetensors")
    expected = loaded(tmp_path / "a.safetensors")
    found = loaded(save_torch(tmp_path / "a.pth", content))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


ARGS = {"n_layer": 2, "n_head": 4, "n_embd": 48, "block_size": 32, "bias": False, "vocab_size": 97}


def nanogpts(shared, **changes):
    """What nanoGPT's train.py saves, of the golden weights, compiled."""
    tensors = load_file(shared / "golden" / "nanogpt" / "model.safetensors")
    model = OrderedDict({"_orig_mod." + name: value for name, value in tensors.items()})
    model["_orig_mod.lm_head.weight"] = tensors["transformer.wte.weight"]  # it is tied
    moments = {"state": {0: {"step": np.float32(5), "exp_avg": np.zeros((3, 3), np.float32)}}}
    content = {"model": model, "optimizer": moments, "model_args": ARGS | {"dropout": 0.0}}
    return content | {"iter_num": 5, "best_val_loss": np.float32(2.5)} | changes


@pytest.mark.parametrize("ask", ["ckpt.pt", "."])
def test_nanogpts_own_checkpoint(shared, tmp_path, ask):
    save_torch(tmp_path / "ckpt.pt", nanogpts(shared))
    with np.load(shared / "golden" / "nanogpt" / "io.npz") as io:
        ids, expected = io["input_ids"].astype(np.int32), io["logits"]
    model, variables = pretrained.load(tmp_path / ask, "nanogpt")
    found = np.asarray(model.apply(variables, ids))
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_args": ARGS | {"n_head": "4"}}, "n_head: expected"),
        ({"model_args": ARGS | {"bias": 0}}, "bias: expected"),
        ({"model_args": {"n_layer": 2}}, "lacks block_size"),
        ({"model_args": None}, r"config\.json"),
    ],
    ids=str,
)
def test_what_is_wrong_in_nanogpts_own_checkpoint_is_named(shared, tmp_path, changes, key):
    save_torch(tmp_path / "ckpt.pt", nanogpts(shared, **changes))
    with pytest.raises(InputError, match=key):
        pretrained.load(tmp_path / "ckpt.pt", "nanogpt")


def test_a_name_twice_in_a_header_is_refused(tmp_path):
    entry = b'"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    header = b"{" + entry + b", " + entry + b"}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError, match="'w' twice"):
        read_weights(path)
