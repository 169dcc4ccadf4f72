"""Published vision checkpoints: golden outputs of DeiT and I-ViT, files without a config, ranges,
and what is wrong with others.
"""

import dataclasses
import json
import logging as standard_logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from safetensors.numpy import save_file

from quweit_jax import pretrained
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.models.vit import ViT, ViTConfig
from tests.compiled import quick_jit
from tests.pretrained.vit_files import BFLOAT16, save_torch, weights


def check_tree(model, variables, image):
    """The variables are those the model would initialize."""
    expected = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, image, image, 3), jnp.float32)
    )
    found = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)


def golden_logits(folder, kind):
    model, variables = pretrained.load(folder, kind)
    check_tree(model, variables, 32)
    with np.load(folder / "io.npz") as io:
        images, logits = io["images_nchw"].transpose(0, 2, 3, 1), io["logits"]
    return np.asarray(quick_jit(model.apply)(variables, images)), logits


def test_golden_deit(shared):
    found, logits = golden_logits(shared / "golden" / "deit", "deit")
    assert np.abs(found - logits).max() <= 1e-4 * np.ptp(logits)


def test_golden_ivit(shared):
    """The published program rounds down x / scale in float32, where a whole number may come out
    just below itself; an imported model does as well.
    """
    found, logits = golden_logits(shared / "golden" / "ivit", "ivit")
    assert np.abs(found - logits).max() <= 1e-4 * np.ptp(logits)
    np.testing.assert_array_equal(found.argmax(-1), logits.argmax(-1))


def test_golden_ivit_in_exact_integers(shared):
    """With whole numbers in its Shiftmax and ShiftGELU the published program gives our integers at
    every quantizer, and logits 0.0083 of their range from its own; with exact sums of squares in
    its LayerNorm too, as packed here, 0.0125.
    """
    folder = shared / "golden" / "ivit"
    model, variables = pretrained.load(folder, "ivit")
    assert model.config.rounding == "published"
    exact = ViT(dataclasses.replace(model.config, rounding="exact"))
    with np.load(folder / "io.npz") as io:
        images, logits = io["images_nchw"].transpose(0, 2, 3, 1), io["logits"]
    found = np.asarray(quick_jit(exact.apply)(variables, images))
    difference = np.abs(found - logits).max() / np.ptp(logits)
    assert 1e-3 < difference <= 1e-2
    np.testing.assert_array_equal(found.argmax(-1), logits.argmax(-1))
    packed = np.asarray(quick_jit(model.apply)(pack(model, variables, images[:1]), images))
    assert np.abs(packed - logits).max() <= 2e-2 * np.ptp(logits)


def test_rounding_is_an_option_of_integer_models():
    for options, message in (
        ({"rounding": "publishd", "integer": True}, r"rounding: .*Did you mean 'published'"),
        ({"rounding": "published"}, "rounding: only an integer model"),
    ):
        with pytest.raises(InputError, match=message):
            ViTConfig(3, "mu/4", **options)
    assert ViTConfig(3, "mu/4", integer=True).rounding == "exact"


IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def apply(path, images=IMAGES, kind="deit"):
    model, variables = pretrained.load(path, kind)
    return np.asarray(quick_jit(model.apply)(variables, images))


def test_a_file_alone(tmp_path):
    """Sizes are told from the tensors, with or without a wrapper's prefix."""
    tensors = weights(width=128, depth=2)
    save_file(tensors, tmp_path / "a.safetensors")
    model, variables = pretrained.load(tmp_path / "a.safetensors", "deit")
    assert (
        model.config.sizes() == (128, 2, 2)
        and model.config.patch == 4
        and model.config.mlp_ratio == 2
        and model.config.num_classes == 5
    )
    check_tree(model, variables, 8)
    (tmp_path / "folder").mkdir()
    named = {f"module.{name}": value for name, value in tensors.items()}
    save_file(named, tmp_path / "folder" / "model.safetensors")
    again, same = pretrained.load(tmp_path / "folder", "deit")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, variables)


def test_a_file_of_torch_alone(tmp_path):
    """Every way to the same weights gives the same model."""
    tensors = weights(width=128, depth=2)
    save_file(tensors, tmp_path / "a.safetensors")
    model, variables = pretrained.load(tmp_path / "a.safetensors", "deit")
    (tmp_path / "folder").mkdir()
    named = {f"module.{name}": value for name, value in tensors.items()}
    for path in (
        save_torch(tmp_path / "deit_tiny.pth", {"model": tensors}),
        save_torch(tmp_path / "old.pt", {"state_dict": named, "epoch": 1}, legacy=True),
        save_torch(tmp_path / "folder" / "pytorch_model.bin", named).parent,
    ):
        again, same = pretrained.load(path, "deit")
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, same, variables)


@pytest.mark.parametrize("save", [save_torch, lambda path, content: save_file(content, path)])
def test_half_precision_weights(tmp_path, save):
    halves = {name: value.astype(BFLOAT16) for name, value in weights().items()}
    path = tmp_path / ("a.pth" if save is save_torch else "a.safetensors")
    save(path, halves)
    _, variables = pretrained.load(path, "deit")
    assert variables["params"]["head"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(
        variables["params"]["head"]["kernel"], halves["head.weight"].T.astype(np.float32)
    )


def test_named_size(tmp_path):
    """DeiT-Ti, with timm's config.json: the sizes need not be spelled out."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "deit_tiny_patch16_224",
                "num_classes": 3,
                "global_pool": "token",
                "pretrained_cfg": {"num_classes": 3},
            }
        )
    )
    save_file(
        weights(width=192, depth=12, patch=16, grid=14, classes=3, ratio=4),
        tmp_path / "model.safetensors",
    )
    model, variables = pretrained.load(tmp_path, "deit")
    assert (
        model.config.variant == "Ti/16"
        and model.config.width == model.config.depth == model.config.heads == 0
    )
    check_tree(model, variables, 224)
    config = {
        "architecture": "a",
        "num_classes": 3,
        "model_args": {"num_heads": 6, "patch_size": [16, 16]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pretrained.load(tmp_path, "deit")[0].config.sizes() == (192, 12, 6)


def test_patches_are_cut_as_the_convolution_does(tmp_path):
    """The embedding of one patch, by hand: sum over channel, row and column of weight and pixel."""
    tensors = weights()
    save_file(tensors, tmp_path / "a.safetensors")
    params = pretrained.load(tmp_path / "a.safetensors", "deit")[1]["params"]
    patch = IMAGES[0, 4:8, 0:4]
    expected = np.einsum("dcij,ijc->d", tensors["patch_embed.proj.weight"], patch)
    np.testing.assert_allclose(
        patch.reshape(-1) @ params["patch_embed"]["kernel"], expected, rtol=1e-4, atol=1e-5
    )


def test_other_image_size(tmp_path):
    save_file(weights(), tmp_path / "a.safetensors")
    assert apply(tmp_path / "a.safetensors", np.zeros((1, 16, 16, 3), np.float32)).shape == (1, 5)


def ivit_names(tensors):
    """Ranges for every quantizer of the published program, and the buffers it saves beside the
    weights.
    """
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    names = ["qact_input", "patch_embed.qact", "qact_pos", "qact1", "qact2", "act_out"]
    inside = [
        "qact1",
        "qact2",
        "qact3",
        "qact4",
        "attn.qact1",
        "attn.qact_attn1",
        "attn.qact_softmax",
        "attn.qact2",
        "attn.qact3",
    ]
    inside += ["mlp.qact_gelu", "mlp.qact1", "mlp.qact2"]
    names += [f"blocks.{i}.{name}" for i in range(depth) for name in inside]
    ranges = {}
    for i, name in enumerate(names):
        ranges |= {
            f"{name}.min_val": np.array(-i - 1, np.float32),
            f"{name}.max_val": np.full(1, i + 2, np.float32),
        }
    one = np.ones(1, np.float32)
    buffers = {f"{name}.act_scaling_factor": one for name in names}
    buffers |= {
        "head.fc_scaling_factor": one,
        "head.weight_integer": one,
        "head.bias_integer": one,
        "norm.norm_scaling_factor": one,
    }
    buffers |= {
        "patch_embed.proj.conv_scaling_factor": one,
        "blocks.0.attn.int_softmax.act_scaling_factor": one,
    }
    return ranges, buffers


def test_ranges(tmp_path):
    tensors = weights()
    ranges, buffers = ivit_names(tensors)
    path = tmp_path / "a.safetensors"
    save_file(tensors | ranges | buffers, path)
    model, variables = pretrained.load(path, "ivit")
    check_tree(model, variables, 8)
    found = variables["ranges"]
    assert found["quant_patches"] == {"min": -2, "max": 3}
    theirs = {
        "attn.qact_attn1": ("attention", "quant_scores"),
        "mlp.qact_gelu": ("mlp", "quant_up"),
        "mlp.qact1": ("mlp", "quant_gelu"),
    }
    for name, (module, ours) in theirs.items():
        assert found["block_0"][module][ours]["max"] == ranges[f"blocks.0.{name}.max_val"][0]
    assert found["block_0"]["quant_attention"]["min"] == ranges["blocks.0.qact2.min_val"]
    with pytest.raises(
        InputError, match="holds I-ViT's activation quantizers; load it with kind 'ivit'"
    ):
        pretrained.load(path, "deit")
    for name, value, message in (
        ("blocks.0.qact3.max_val", None, r"lacks the tensor blocks\.0\.qact3\.max_val \[\]"),
        ("qact1.min_val", np.float32(np.nan), r"qact1\.min_val: expected finite numbers"),
        (
            "qact1.min_val",
            np.zeros(3, np.float32),
            r"qact1\.min_val: expected shape \[\], found \[3\]",
        ),
    ):
        changed = {
            key: new for key, new in (tensors | ranges | {name: value}).items() if new is not None
        }
        save_file({k: np.asarray(v) for k, v in changed.items()}, path)
        with pytest.raises(InputError, match=message):
            pretrained.load(path, "ivit")


def test_ranges_from_the_scales_the_published_program_does_save(tmp_path):
    tensors = weights()
    ranges, _ = ivit_names(tensors)
    limits = {
        name.removesuffix(".max_val"): max(-ranges[name.replace("max_val", "min_val")], value)
        for name, value in ranges.items()
        if "max_val" in name
    }
    residual = re.compile(
        r"patch_embed\.qact|qact_pos|qact1|blocks\.0\.(qact2|qact4|attn\.qact3|mlp\.qact2)"
    )
    scales = {
        f"{n}.act_scaling_factor": np.reshape(v / (32767 if residual.fullmatch(n) else 127), (1,))
        for n, v in limits.items()
    }
    save_file(
        tensors | {name: value.astype(np.float32) for name, value in scales.items()},
        tmp_path / "a.safetensors",
    )
    (_, variables), said = warnings_of(lambda: pretrained.load(tmp_path / "a.safetensors", "ivit"))
    assert not said
    expected = {
        "quant_patches": limits["patch_embed.qact"],
        "quant_embedding": limits["qact1"],
        "quant_final": limits["qact2"],
    }
    for name, limit in expected.items():
        np.testing.assert_allclose(
            list(variables["ranges"][name].values()), [-limit.item(), limit.item()], rtol=1e-5
        )
    np.testing.assert_allclose(
        variables["ranges"]["block_0"]["mlp"]["quant_down"]["max"],
        limits["blocks.0.mlp.qact2"],
        rtol=1e-5,
    )


def warnings_of(call):
    """What call() gives, and the warnings it logs."""
    said = []
    handler = standard_logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.get_absl_logger().addHandler(handler)
    try:
        return call(), said
    finally:
        logging.get_absl_logger().removeHandler(handler)


def test_missing_ranges_are_told_and_calibrated(tmp_path):
    tensors = weights()
    save_file(
        tensors | {"qact1.act_scaling_factor": np.ones(1, np.float32)}, tmp_path / "a.safetensors"
    )
    (model, variables), said = warnings_of(
        lambda: pretrained.load(tmp_path / "a.safetensors", "ivit")
    )
    assert (
        len(said) == 1
        and "a.safetensors has no ranges; " in said[0]
        and "calibrate with quweit_jax.pretrained.calibrate" in said[0]
    )
    check_tree(model, variables, 8)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(variables["ranges"]))
    calibrated = pretrained.calibrate(model, variables, [IMAGES, 3 * IMAGES])
    assert calibrated.keys() == variables.keys() and calibrated["params"] is variables["params"]
    check_tree(model, calibrated, 8)
    low, high = (
        jax.tree.leaves(calibrated["ranges"])[i::2] for i in (1, 0)
    )  # max comes before min
    assert all(a < b for a, b in zip(low, high))
    np.testing.assert_allclose(
        calibrated["ranges"]["quant_input"]["max"], 1.1 * IMAGES.max(), rtol=1e-5
    )
    with pytest.raises(InputError, match="expected at least one batch"):
        pretrained.calibrate(model, variables, [])
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"calibrate: expected an integer-only model"):
        pretrained.calibrate(*pretrained.load(tmp_path / "a.safetensors", "deit"), [IMAGES])


def test_wrong_tensors_are_named(tmp_path):
    def refused(changes, message):
        tensors = {
            name: value for name, value in (weights(depth=2) | changes).items() if value is not None
        }
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=message):
            pretrained.load(tmp_path / "a.safetensors", "deit")

    one = np.ones((1, 1, 64), np.float32)
    refused(
        {"blocks.1.mlp.fc1.bias": None},
        r"lacks the tensor blocks\.1\.mlp\.fc1\.bias \[128\]\. Did you mean 'blocks\.\d\.",
    )
    refused({"cls_token": None}, r"lacks the tensor cls_token \[1, 1, width\]")
    refused(
        {"blocks.1.attn.qkv.weight": np.ones((64, 64), np.float32)},
        r"blocks\.1\.attn\.qkv\.weight: expected shape \[192, 64\], found \[64, 64\]",
    )
    refused({"blocks.1.ls1.gamma": one}, r"does not have: blocks\.1\.ls1\.gamma")
    refused(
        {"patch_embed.proj.weight": one},
        r"patch_embed\.proj\.weight: expected shape \[width, channels, patch, patch\], found \[1, "
        r"1, 64\]",
    )
    refused(
        {"dist_token": one, "pos_embed": np.ones((1, 6, 64), np.float32)},
        r"is a distilled DeiT .*not supported",
    )
    refused(
        {"pos_embed": np.ones((1, 7, 64), np.float32)},
        r"pos_embed: expected a class token and a square grid of patches, found 1 \+ 6",
    )
    refused(
        {"blocks.0.mlp.fc1.weight": np.ones((100, 64), np.float32)},
        r"fc1\.weight: expected a multiple of the width 64 rows, found 100",
    )


def test_config_and_weights_must_agree(tmp_path):
    save_file(weights(width=48), tmp_path / "model.safetensors")
    with pytest.raises(
        InputError,
        match=r'heads cannot be told from width 48.*write a config\.json.*{"num_heads": \.\.\.}',
    ):
        pretrained.load(tmp_path, "deit")

    def with_config(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return pretrained.load(tmp_path, "deit")[0].config

    assert with_config(num_heads=3).sizes() == (48, 1, 3)
    assert with_config(
        num_heads=4, mlp_ratio=2.0, img_size=8, embed_dim=48, depth=1, patch_size=4, num_classes=5
    ).sizes() == (48, 1, 4)
    for config, message in (
        (
            {"num_classes": 4},
            r"head\.weight: expected shape \[4, 48\], found \[5, 48\]; do config\.json and the "
            r"weights belong together",
        ),
        ({"depth": 2}, r"lacks the tensor blocks\.1\.norm1\.weight"),
        (
            {"mlp_ratio": 2.5},
            r"config\.json: mlp_ratio: expected a positive whole number, found 2\.5",
        ),
        ({"patch_size": "4"}, "patch_size: expected a positive whole number, found '4'"),
        ({"model_type": "vit"}, r"expected timm's names, found model_type 'vit'.*kind 'vit'"),
        ({"global_pool": "avg"}, r"expected global_pool 'token' .* found 'avg'"),
        ({"num_heads": 5}, "width: 48 is not a multiple of the 5 heads"),
    ):
        with pytest.raises(InputError, match=message):
            with_config(**{"num_heads": 3} | config)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"expected weights at .*nowhere, found no such file or folder"
    ):
        pretrained.load(tmp_path / "nowhere", "deit")
    with pytest.raises(
        InputError,
        match=r"expected model\.safetensors, pytorch_model\.bin or one \*\.pth in .*, found none",
    ):
        pretrained.load(tmp_path, "deit")
    for name in ("one.pth", "two.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"found one\.pth, two\.pt; give the file itself"):
        pretrained.load(tmp_path, "deit")
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"expected a file \*\.safetensors, \*\.pth, .* found .*a\.npz"
    ):
        pretrained.load(tmp_path / "a.npz", "deit")
    save_file(weights(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(InputError, match="damaged or cut short"):
        pretrained.load(tmp_path, "deit")
