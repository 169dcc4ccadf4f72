"""Every option of a published config is honored, known to change nothing, or refused by name."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from quweit_jax import pretrained
from quweit_jax.errors import InputError
from tests.pretrained import gpt2_reference as gpt2
from tests.pretrained.language_files import both, published_tensors, write
from tests.pretrained.test_vit import warnings_of
from tests.pretrained.vit_files import weights

IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


@pytest.mark.parametrize(
    "change",
    [
        {},
        *({"activation_function": name} for name in gpt2.GELUS),
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"tie_word_embeddings": True},
        {"scale_attn_weights": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"layer_norm_epsilon": 1e-2},
        {"n_inner": 64, "n_ctx": 12, "attn_pdrop": 0.1, "pruned_heads": {}},
        {"activation_function": None, "layer_norm_epsilon": None, "n_inner": None},
    ],
    ids=str,
)
def test_gpt2_is_what_its_options_say(tmp_path, change):
    config, tensors = gpt2.BASE | change, gpt2.weights()
    gpt2.write(tmp_path, config, tensors)
    (model, variables), said = warnings_of(lambda: pretrained.load(tmp_path, "nanogpt"))
    found = np.asarray(model.apply(variables, jnp.asarray(IDS[None])))[0]
    given = {key: value for key, value in config.items() if value is not None}
    expected = gpt2.logits(IDS, tensors, given)
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)
    assert not said
    plain = gpt2.logits(IDS, tensors, gpt2.BASE)
    if set(change) & {"scale_attn_weights", "scale_attn_by_inverse_layer_idx"}:
        assert np.abs(plain - expected).max() > 1e-2 * np.ptp(expected)  # the option matters


@pytest.mark.parametrize(
    "change",
    [
        *({"activation_function": n} for n in ("relu", "silu", "quick_gelu", "gelu_10", 3)),
        {"scale_attn_weights": "yes"},
        {"scale_attn_by_inverse_layer_idx": 1},
        {"layer_norm_epsilon": 0},
        {"layer_norm_epsilon": "1e-5"},
        {"n_inner": 32},
        {"add_cross_attention": True},
        {"quantization_config": {"bits": 4}},
        {"pruned_heads": {"0": [1]}},
        {"n_head": "4"},
        {"n_layer": 2.0},
        {"n_layer": 2**31},
        {"n_embd": None},
        {"vocab_size": [37]},
        {"n_positions": 0},
        {"tie_word_embeddings": "no"},
    ],
    ids=str,
)
def test_what_gpt2_cannot_be_here_is_refused_by_name(tmp_path, change):
    gpt2.write(tmp_path, gpt2.BASE | change, gpt2.weights())
    with pytest.raises(InputError, match=rf"config\.json: {next(iter(change))}: expected"):
        pretrained.load(tmp_path, "nanogpt")


def test_gpt2s_head_is_tied_as_it_says(tmp_path):
    tensors, said = gpt2.weights(), {"tie_word_embeddings": True}
    own = {"lm_head.weight": 2 * tensors["wte.weight"]}
    gpt2.write(tmp_path, gpt2.BASE | said, tensors | own)
    with pytest.raises(InputError, match="tie_word_embeddings"):
        pretrained.load(tmp_path, "nanogpt")
    said = {"tie_word_embeddings": False}
    gpt2.write(tmp_path, gpt2.BASE | said, tensors | own)
    model, variables = pretrained.load(tmp_path, "nanogpt")
    found = np.asarray(model.apply(variables, jnp.asarray(IDS[None])))[0]
    np.testing.assert_allclose(found, 2 * gpt2.logits(IDS, tensors, gpt2.BASE), atol=1e-3)
    gpt2.write(tmp_path, gpt2.BASE | said, tensors)
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        pretrained.load(tmp_path, "nanogpt")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("matmulfree", {"elementwise_affine": False}),
        ("matmulfree", {"attn": {"layers": [1]}}),
        ("transformer_pp", {"partial_rotary_factor": 0.5}),
        *((kind, {"quantization_config": {}}) for kind in ("matmulfree", "transformer_pp")),
    ],
    ids=str,
)
def test_what_language_models_cannot_be_here_is_refused_by_name(tmp_path, kind, change):
    write(tmp_path, kind, published_tensors(kind), change)
    with pytest.raises(InputError, match=rf"config\.json: {next(iter(change))}: expected"):
        pretrained.load(tmp_path, kind)


@both
def test_options_nobody_knows_are_told(tmp_path, kind):
    write(tmp_path, kind, published_tensors(kind), {"new_trick": 3, "use_cache": True})
    _, said = warnings_of(lambda: pretrained.load(tmp_path, kind))
    assert len(said) == 1 and "new_trick" in said[0] and "use_cache" not in said[0]


@pytest.mark.parametrize(
    "change",
    [
        {"qk_scale": 0.5},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"init_values": 1e-5},
        {"no_embed_class": True},
        {"pre_norm": True},
        {"reg_tokens": 4},
        {"act_layer": "quick_gelu"},
        {"norm_layer": "rmsnorm"},
        {"norm_eps": 1e-5},
        {"class_token": False},
        {"quantization_config": {"bits": 4}},
        {"architecture": "vit_base_patch16_clip_quickgelu_224"},
        {"img_size": 16},
        {"img_size": [4, 16]},
        {"in_chans": 1.5},
        {"model_args": {"qk_scale": 0.5}},
    ],
    ids=str,
)
def test_what_a_vit_cannot_be_here_is_refused_by_name(tmp_path, change):
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(change))
    key = next(iter(change.get("model_args", change)))
    with pytest.raises(InputError, match=rf"config\.json: {key}: "):
        pretrained.load(tmp_path, "deit")


def test_a_vits_own_options_are_taken(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    config = {"architecture": "vit", "img_size": [8, 8], "in_chans": 3, "qkv_bias": True}
    config |= {"norm_layer": None, "act_layer": "gelu", "drop_path_rate": 0.1, "mystery": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, said = warnings_of(lambda: pretrained.load(tmp_path, "deit"))
    assert len(said) == 1 and said[0].count("mystery") == 1 and "drop_path" not in said[0]
