"""Fine-tuning from other variables: what is taken, what isn't, and how that is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from quweit_jax.errors import InputError
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.models.options import WeightlessOptions
from quweit_jax.models.transformer_pp import TransformerPP, TransformerPPConfig
from quweit_jax.models.vit import ViT, ViTConfig
from quweit_jax.ops.patches import resample_positions
from quweit_jax.pretrained import kind_of, load, merge, read_source
from tests.pretrained.vit_files import save_torch, weights


@functools.cache
def shapes(image=16, classes=5, variant="mu/8", depth=2, bits=4, num_luts=32, **options):
    model = ViT(
        ViTConfig(
            classes,
            variant=variant,
            depth=depth,
            weightless=WeightlessOptions(num_luts=num_luts, thermometer_bits=bits),
            **options,
        )
    )
    return jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, image, image, 3), jnp.float32)
    )


def variables(seed, **options):
    """Variables of a ViT, each array of other numbers, without initializing it."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(draw.integers(0, 100, s.shape), s.dtype), shapes(**options)
    )


def leaves(tree):
    return {"/".join(path): np.asarray(value) for path, value in flatten_dict(tree).items()}


def split(merged, target, source):
    """Which arrays of merged are the source's, and which the target's own."""
    merged, target, source = leaves(merged), leaves(target), leaves(source)
    assert merged.keys() == target.keys()
    assert all(
        merged[n].shape == target[n].shape and merged[n].dtype == target[n].dtype for n in merged
    )
    taken = {
        name for name in merged if name in source and np.array_equal(merged[name], source[name])
    }
    assert all(
        np.array_equal(merged[name], target[name])
        for name in merged.keys() - taken
        if "position" not in name
    )
    return taken


def test_all_of_the_same_model():
    target, source = variables(1), variables(2)
    merged, report = merge(target | {"cache": {"a": 1}}, source)
    assert merged.pop("cache") == {"a": 1}
    assert split(merged, target, source) == leaves(target).keys()
    assert report.describe() == "init_from: 32 of 32 arrays taken"
    assert not report.fresh and not report.unused and len(report.taken) == 32


def test_other_classes_and_image_size():
    target, source = variables(1, image=32, classes=7), variables(2)
    merged, report = merge(target, source)
    split(merged, target, source)
    position = resample_positions(source["params"]["position_embedding"], (4, 4))
    np.testing.assert_allclose(merged["params"]["position_embedding"], position, rtol=1e-6)
    assert (
        report.resampled == ("position_embedding",)
        and report.fresh == ("head/bias", "head/kernel") == report.unused
    )
    assert report.describe() == (
        "init_from: 30 of 32 arrays taken; resampled: position_embedding; fresh: head; unused: head"
    )


def test_class_token_only_on_one_side():
    target, source = variables(1, image=32, pool="mean"), variables(2)
    merged, report = merge(target, source)
    position = resample_positions(source["params"]["position_embedding"], (4, 4))
    np.testing.assert_allclose(merged["params"]["position_embedding"], position[:, 1:], rtol=1e-6)
    assert report.unused == ("cls_token",)
    merged, report = merge(source, target)
    np.testing.assert_array_equal(
        merged["params"]["position_embedding"][:, :1], source["params"]["position_embedding"][:, :1]
    )
    assert report.fresh == ("cls_token",)


def test_weightless_in_place_of_dense():
    source = variables(2)
    for mlp, named in (("weightless", "block_*/mlp"), ("dense+weightless", "block_1/mlp")):
        target = variables(1, mlp=mlp, classes=6)
        merged, report = merge(target, source)
        taken = split(merged, target, source)
        assert (
            not any("/luts_" in name for name in taken) and "params/block_1/mlp_norm/scale" in taken
        )
        assert report.describe().endswith(f"; fresh: head, {named}; unused: head, {named}")


def test_tables_and_wiring_go_together():
    target, source = variables(1, mlp="weightless"), variables(2, mlp="weightless")
    merged, report = merge(target, source)
    assert split(merged, target, source) == leaves(target).keys() and not report.fresh
    # Other thresholds: tables, vectors and mapping have the same shapes, but mean something else;
    # so do those without a wiring.
    unwired = {"params": source["params"]}
    for other in (variables(2, mlp="weightless", bits=2), unwired):
        merged, report = merge(target, other)
        taken = split(merged, target, other)
        assert not any("/mlp/" in name for name in taken) and "params/head/kernel" in taken
        assert "fresh: block_*/mlp; unused: block_*/mlp" in report.describe()


def test_look_up_layers_outside_of_blocks():
    def layers(inputs, fill):
        wiring = {
            "mapping": np.full((8, 4), fill, np.int32),
            "inverse": np.full((inputs, 32 // inputs), fill, np.int32),
        }
        first = {"tables": np.full((8, 16), fill, np.float32)}
        return {
            "params": {"luts_0": first, "luts_1": {"tables": np.full((4, 4), fill, np.float32)}},
            "wiring": {"luts_0": wiring, "luts_1": {"mapping": np.full((4, 2), fill, np.int32)}},
        }

    merged, report = merge(layers(8, 1), layers(16, 2))
    assert report.fresh == ("luts_0/inverse", "luts_0/mapping", "luts_0/tables")
    assert (
        merged["params"]["luts_1"]["tables"][0, 0]
        == 2
        == merged["wiring"]["luts_1"]["mapping"][0, 0]
    )
    assert merged["wiring"]["luts_0"]["mapping"][0, 0] == 1


def test_ranges():
    floats, integers = variables(1), variables(2, integer=True)
    merged, report = merge(integers, floats)
    assert split(merged, integers, floats) == {
        name for name in leaves(integers) if name.startswith("params/")
    }
    assert report.describe().endswith("; fresh: ranges")
    assert merge(floats, integers)[1].describe().endswith("arrays taken; unused: ranges")
    other = variables(3, integer=True)
    assert split(merge(integers, other)[0], integers, other) == leaves(integers).keys()


def test_nothing_fits():
    with pytest.raises(
        InputError,
        match=r"init_from: none of the source's 32 arrays fits .*--config\.model\.variant",
    ):
        merge(variables(1), variables(2, variant="Mi/4", depth=2))
    with pytest.raises(InputError, match="init_from: none"):
        merge(variables(1), {"params": {}})
    one, two = ({"params": {"a": {"kernel": np.ones((3, n), np.float32)}}} for n in (4, 5))
    with pytest.raises(InputError, match=r"a/kernel is \[3, 5\] there, \[3, 4\] here"):
        merge(one, two)


@pytest.mark.parametrize("kind", ["nanogpt", "matmulfree", "transformer_pp", "deit", "ivit"])
def test_published_checkpoints_are_told_apart_and_begun_from(shared, kind):
    folder = shared / "golden" / kind
    assert kind_of(folder) == kind
    _, loaded = load(folder, kind)
    merged, report = merge(jax.tree.map(np.zeros_like, loaded), read_source(folder))
    assert not report.fresh and not report.unused
    for name, value in leaves(loaded).items():
        np.testing.assert_array_equal(leaves(merged)[name], value, err_msg=name)


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        kind_of(tmp_path / "gone")
    with pytest.raises(InputError):
        kind_of(tmp_path)


def norms(mlp, value):
    """A language model of two blocks, whose arrays all have one value."""
    config = GPTConfig(5, 4, 2, 2, 8, mlp=mlp, weightless=WeightlessOptions(num_luts=16))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)
    return jax.tree.map(lambda s: jnp.full(s.shape, value, s.dtype), shapes)


@pytest.mark.parametrize("kinds", [("lookup_glu", "dense"), ("dense", "lookup_glu")])
def test_the_norm_before_a_mixer_is_found_wherever_it_lies(kinds):
    merged, report = merge(norms(kinds[0], 1), norms(kinds[1], 2))
    name = "mlp/norm/scale" if kinds[0] == "lookup_glu" else "mlp_norm/scale"
    assert {f"block_{i}/{name}" for i in range(2)} <= set(report.taken)
    assert leaves(merged)[f"params/block_1/{name}"][0] == 2
    assert not any("norm" in name for name in (*report.fresh, *report.unused))


def _llama(seed, **options):
    config = TransformerPPConfig(50, width=32, layers=2, heads=4, hidden=40, context=8, **options)
    made = jax.eval_shape(TransformerPP(config).init, jax.random.key(0), jnp.ones((1, 8), int))
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(draw.integers(1, 100, s.shape), s.dtype), made)


@pytest.mark.parametrize("kv_heads", [0, 2])
def test_projections_in_one_matrix_and_in_several(kv_heads):
    """A ternary transformer begins from a dense one, and the way back gives the dense one again."""
    dense = _llama(1, kv_heads=kv_heads)
    ternary = _llama(2, kv_heads=kv_heads, linear="ternary", sub_norms=True)
    begun, report = merge(ternary, dense)
    assert {name.split("/", 1)[1] for name in report.fresh} == {
        "mixer/sub_norm/scale",
        "mlp/sub_norm/scale",
    }
    assert not report.unused
    before, after = leaves(dense["params"]), leaves(begun["params"])
    keys = 8 * (kv_heads or 4)
    whole = before["block_1/mixer/qkv/kernel"]
    assert whole.shape[1] == 32 + 2 * keys
    for name, first, width in (("query", 0, 32), ("key", 32, keys), ("value", 32 + keys, keys)):
        np.testing.assert_array_equal(
            after[f"block_1/mixer/{name}/kernel"], whole[:, first : first + width]
        )
    both = before["block_0/mlp/gate/kernel"]
    np.testing.assert_array_equal(after["block_0/mlp/gate/kernel"], both[:, :40])
    np.testing.assert_array_equal(after["block_0/mlp/up/kernel"], both[:, 40:])
    back, report = merge(_llama(3, kv_heads=kv_heads), begun)
    assert not report.fresh
    for name, value in leaves(back["params"]).items():
        np.testing.assert_array_equal(value, before[name])


def test_projections_of_other_widths_stay_as_they_are():
    ternary = _llama(2, linear="ternary", kv_heads=2)
    _, report = merge(ternary, _llama(1))
    assert "block_0/mixer/qkv/kernel" in report.unused
    assert "block_0/mixer/query/kernel" in report.fresh
    assert "block_0/mlp/up/kernel" in report.taken


def test_a_weightless_block_keeps_the_norm_that_its_thresholds_are_for():
    merged, report = merge(norms("weightless", 1), norms("dense", 2))
    assert "block_0/mlp/norm/scale" in report.fresh
    assert leaves(merged)["params/block_0/mlp/norm/scale"][0] == 1


def test_sources(tmp_path):
    """The kind is told by the names; heads and a config.json are not needed."""
    tensors = weights(width=32)
    save_file(tensors, tmp_path / "a.safetensors")
    source = read_source(tmp_path / "a.safetensors")
    assert source.keys() == {"params"}
    merged, report = merge(variables(1, variant="mu/4", depth=1, image=8, mlp_ratio=2), source)
    assert report.describe() == "init_from: 20 of 20 arrays taken"
    np.testing.assert_array_equal(
        merged["params"]["block_0"]["mlp"]["up"]["kernel"], tensors["blocks.0.mlp.fc1.weight"].T
    )
    save_file(
        {"module." + name: value for name, value in tensors.items()}, tmp_path / "model.safetensors"
    )
    np.testing.assert_array_equal(
        read_source(tmp_path)["params"]["head"]["bias"], tensors["head.bias"]
    )
    save_file({"wte.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=r"expected a checkpoint of kind nanogpt, .* found wte\.weight"
    ):
        read_source(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        read_source(tmp_path / "nowhere")


def test_source_in_a_file_of_torch(tmp_path):
    tensors = weights(width=32)
    source = read_source(save_torch(tmp_path / "a.pth", {"model": tensors}))
    assert source.keys() == {"params"}
    np.testing.assert_array_equal(source["params"]["head"]["bias"], tensors["head.bias"])


def test_golden_sources(shared):
    assert read_source(shared / "golden" / "deit").keys() == {"params"}
    source = read_source(shared / "golden" / "ivit" / "model.safetensors")
    assert source.keys() == {"params", "ranges"} and source["ranges"]["quant_input"]["max"] > 0
