"""Published checkpoints: nanoGPT's golden outputs, GPT-2's layout, and files that are wrong."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quweit_jax import pretrained
from quweit_jax.errors import InputError


@pytest.fixture
def golden(shared):
    return shared / "golden" / "nanogpt"


@pytest.fixture
def copy(golden, tmp_path):
    """A copy whose files a test may change."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in golden.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


def logits_of(folder, ids):
    model, variables = pretrained.load(folder, "nanogpt")
    return np.asarray(model.apply(variables, ids))


def test_golden_logits(golden):
    io = np.load(golden / "io.npz")
    logits = logits_of(golden, io["input_ids"].astype(np.int32))
    reach = io["logits"].max() - io["logits"].min()
    assert np.abs(logits - io["logits"]).max() <= 1e-4 * reach


def test_gpt2_layout_gives_the_same_model(golden, tmp_path):
    """The same weights rewritten as Hugging Face GPT-2 (transposed, with biases, exact GELU) give
    the same logits.
    """
    config = json.loads((golden / "config.json").read_text())
    tensors = {}
    for name, value in load_file(golden / "model.safetensors").items():
        name = name.removeprefix("transformer.")
        projection = name.startswith("h.") and "ln_" not in name
        tensors[name] = np.ascontiguousarray(value.T) if projection else value
        if projection or "ln_" in name:
            tensors[name.replace(".weight", ".bias")] = np.zeros(
                tensors[name].shape[-1], np.float32
            )
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    tensors["lm_head.weight"] = tensors["wte.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {k: config[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd")}
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "n_positions": config["block_size"],
                "activation_function": "gelu",
            }
            | sizes
        )
    )
    io = np.load(golden / "io.npz")
    np.testing.assert_allclose(
        logits_of(tmp_path, io["input_ids"].astype(np.int32)), io["logits"], atol=1e-4
    )


def test_untied_head_is_kept(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["transformer.wte.weight"]
    save_file(tensors, copy / "model.safetensors")
    io = np.load(copy / "io.npz")
    np.testing.assert_allclose(
        logits_of(copy, io["input_ids"].astype(np.int32)), 2 * io["logits"], atol=2e-4
    )


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_wrong_tensors_are_named(copy):
    name = "transformer.h.1.mlp.c_fc.weight"
    kept = load_file(copy / "model.safetensors")[name]
    change(copy, lambda t: t.pop(name))
    with pytest.raises(InputError, match=r"lacks the tensor h\.1\.mlp\.c_fc\.weight \[192, 48\]"):
        pretrained.load(copy, "nanogpt")
    change(copy, lambda t: t.update({name: kept[:-1]}))
    with pytest.raises(
        InputError, match=r"h\.1\.mlp\.c_fc\.weight: expected shape \[192, 48\], found \[191, 48\]"
    ):
        pretrained.load(copy, "nanogpt")
    change(
        copy,
        lambda t: t.update({name: kept, "transformer.h.2.ln_1.weight": np.ones(48, np.float32)}),
    )
    with pytest.raises(InputError, match=r"does not have: h\.2\.ln_1\.weight"):
        pretrained.load(copy, "nanogpt")


def test_wrong_files_are_named(copy, tmp_path):
    with pytest.raises(
        InputError, match=r"expected one of .*'nanogpt'.*, found 'nanogtp'.* Did you mean 'nanogpt'"
    ):
        pretrained.load(copy, "nanogtp")
    with pytest.raises(InputError, match="no such folder"):
        pretrained.load(tmp_path / "nowhere", "nanogpt")
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged or cut short"):
        pretrained.load(copy, "nanogpt")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"expected model\.safetensors"):
        pretrained.load(copy, "nanogpt")
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match=r"expected model_type 'gpt2'.*found 'llama'"):
        pretrained.load(copy, "nanogpt")
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        pretrained.load(copy, "nanogpt")
