"""Llama's layout with every scaling of rotary positions, Qwen2's biases, and BitNet's norms and
ternary weights: against what the real transformers computed (`llama_golden`), written and read.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quweit_jax import pretrained
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.layers.rotary import RopeScaling
from quweit_jax.ops.ternary import quantize_weights
from tests.compiled import quick_jit
from tests.pretrained import llama_golden as golden
from tests.pretrained.language_files import assert_same, random_variables, small

EXPECTED = json.loads(golden.FILE.read_text(encoding="utf-8"))
PLAIN = ("linear", "dynamic", "llama3", "yarn", "yarn not rounded")


def test_golden_values_are_of_the_cases():
    assert list(EXPECTED) == list(golden.CASES)


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


def beside(variables, seed):
    """The variables, every float changed by up to a millionth of itself;
    with seed 0 as they are.
    """
    rng = np.random.default_rng(seed)

    def changed(leaf):
        if not seed or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return (leaf * (1 + rng.uniform(-1e-6, 1e-6, leaf.shape))).astype(leaf.dtype)

    return jax.tree.map(changed, variables)


def as_expected(case, model, variables):
    """Whether the last logits are transformers' own. Where rounding to 8 bits meets a half, the
    last bit of a sum decides, which no two programs share: then they may be of variables beside.
    """
    compiled, tokens = quick_jit(model.apply), golden.tokens_of(case)
    every = (compiled(beside(variables, seed), tokens)[0, -golden.LAST :] for seed in range(8))
    return any(close(np.asarray(logits), np.asarray(EXPECTED[case])) for logits in every)


@pytest.mark.parametrize("case", golden.CASES)
def test_logits_are_those_of_transformers(tmp_path, case):
    """Of what is saved and loaded again, bit for bit the same model."""
    model, variables = golden.model_of(case)
    pretrained.save(model, variables, tmp_path)
    found, read = pretrained.load(tmp_path)
    assert as_expected(case, found, read)
    if "tie_embeddings" not in golden.CASES[case]:
        assert_same(read, variables)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is ("tie_embeddings" in golden.CASES[case])


def test_scaling_matters():
    """No two of the scaled cases compute the same, nor what is not scaled."""
    model, variables = golden.model_of("linear")
    plain = model.clone(config=small("transformer_pp", **golden.SCALED).config)
    tokens = golden.tokens_of("linear")
    every = [plain, *(golden.model_of(case)[0] for case in PLAIN)]
    found = [np.asarray(quick_jit(model.apply)(variables, tokens)) for model in every]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert np.abs(one - other).max() > 1e-3 * np.ptp(one)


def test_dynamic_positions_are_plain_in_the_original_context():
    model, variables = golden.model_of("dynamic")
    plain = model.clone(config=small("transformer_pp", **golden.SCALED).config)
    tokens = golden.tokens_of("dynamic")[:, :16]
    found, expected = (quick_jit(m.apply)(variables, tokens) for m in (model, plain))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("case", golden.PACKED)
def test_packed_weights_are_the_masters_quantized(tmp_path, case, linear_class):
    """At two bits, whatever way their scale is written; what is read makes the same whole numbers
    and scales again, so that fine-tuning and packing begin there.
    """
    model, variables = golden.model_of(case)
    pretrained.save(model, variables, tmp_path, packed=True)
    tensors = load_file(tmp_path / "model.safetensors")
    codes = [name for name, value in tensors.items() if value.dtype == np.uint8]
    assert len(codes) == 2 * 7
    if linear_class == "bitlinear":
        inverted = {n: 1 / v if n.endswith("_scale") else v for n, v in tensors.items()}
        save_file(inverted, tmp_path / "model.safetensors", {"format": "pt"})
        edit(tmp_path, quantization_config={"quant_method": "bitnet"})
    found, read = pretrained.load(tmp_path)
    assert as_expected(case, found, read)
    for name in ("query", "key", "value", "proj"):
        ours, theirs = (p["params"]["block_1"]["mixer"][name]["kernel"] for p in (variables, read))
        whole, scale = quantize_weights(jnp.asarray(ours))
        again, scale_again = quantize_weights(jnp.asarray(theirs))
        np.testing.assert_array_equal(whole, again)
        np.testing.assert_allclose(scale, scale_again, rtol=1e-5)  # float32 sums of 480 numbers


def test_our_packed_form_computes_the_same():
    model, variables = golden.model_of("bitnet")
    packed = pack(model, variables, golden.tokens_of("bitnet")[:, :4])
    assert "kernel" in packed["packed"]["block_0"]["mlp"]["up"]
    assert as_expected("bitnet", model, packed)


def edit(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: v for key, v in config.items() if v != "left out"}))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("linear", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}),
        ("linear", {"rope_parameters": {"rope_type": "linear"}}),
        ("linear", {"rope_parameters": {"rope_type": "linear", "factor": "4"}}),
        ("linear", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}),
        ("linear", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "low_freq": 1}}),
        ("linear", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}}),
        ("plain", {"mlp_bias": True}),
        ("plain", {"hidden_act": "gelu"}),
        ("plain", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("biases of qwen2", {"use_sliding_window": True}),
        ("plain", {"sliding_window": 8}),
        ("bitnet", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("bitnet", {"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}),
        ("bitnet", {"quantization_config": {"quant_method": "bitnet", "linear_class": "other"}}),
        (
            "bitnet",
            {
                "quantization_config": {
                    "quant_method": "bitnet",
                    "modules_to_not_convert": ["lm_head", "model.layers.0"],
                }
            },
        ),
    ],
    ids=str,
)
def test_what_cannot_be_here_is_refused_by_name(tmp_path, case, change):
    model, variables = golden.model_of(case)
    pretrained.save(model, variables, tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(InputError, match=rf"config\.json: {next(iter(change))}.*: expected"):
        pretrained.load(tmp_path)


def test_files_of_older_and_other_programs(tmp_path):
    """rope_scaling with 'type', the original context outside of it, an unused window, mscale."""
    model, variables = golden.model_of("yarn")
    pretrained.save(model, variables, tmp_path)
    scaling = {"type": "yarn", "factor": 4.0, "beta_fast": 3, "mscale": 1.0, "mscale_all_dim": 0.5}
    changes = {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    edit(tmp_path, **changes, rope_parameters="left out", sliding_window=9)
    edit(tmp_path, use_sliding_window=False, layer_types=["full_attention"] * 2)
    found = pretrained.load(tmp_path)[0].config
    assert (found.rope.kind, found.rope.original_context, found.rope_theta) == ("yarn", 16, 100.0)
    own = 0.1 * np.log(4.0)
    np.testing.assert_allclose(found.rope.magnitude(), (1 + own) / (1 + 0.5 * own))
    edit(tmp_path, original_max_position_embeddings="left out")
    assert pretrained.load(tmp_path)[0].config.rope.original_context == 64


def test_damaged_packed_weights_are_named(tmp_path):
    model, variables = golden.model_of("llama, ternary")
    pretrained.save(model, variables, tmp_path, packed=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    for change, said in (
        ({f"{name}.weight_scale": np.zeros(1, np.float32)}, "weight_scale: expected one positive"),
        ({f"{name}.weight": np.full_like(tensors[f"{name}.weight"], 255)}, "-1, 0 and 1"),
        ({f"{name}.weight": tensors[f"{name}.weight"][:-1]}, "expected shape"),
    ):
        save_file(tensors | change, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=said):
            pretrained.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"sub_norms": True}, {}, "head_width"),
        ({"sub_norms": True, "head_width": 0, "width": 24, "biases": "qkv"}, {}, "biases"),
        ({}, {"packed": True}, "linear"),
        ({"linear": "ternary", "hidden": 38}, {"packed": True}, "multiples of 4"),
    ],
    ids=str,
)
def test_what_has_no_layout_is_refused_by_name(tmp_path, changes, options, said):
    model = small("transformer_pp", **changes)
    variables = random_variables("transformer_pp", model)
    with pytest.raises(InputError, match=said):
        pretrained.save(model, variables, tmp_path, **options)


def test_packed_is_of_ternary_transformers(tmp_path):
    model = small("matmulfree")
    with pytest.raises(InputError, match="packed: expected a TransformerPP"):
        variables = random_variables("matmulfree", model)
        pretrained.save(model, variables, tmp_path, packed=True)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "longrope"},
        {"kind": "linear", "factor": 0.5},
        {"kind": "llama3", "low_frequency": 4.0, "high_frequency": 4.0},
        {"kind": "yarn", "attention_factor": -1.0},
        {"original_context": -1},
    ],
    ids=str,
)
def test_impossible_scalings_are_refused_by_name(options):
    with pytest.raises(InputError, match=r"model\.rope\."):
        RopeScaling(**options)
