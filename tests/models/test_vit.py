"""`models.vit`: shapes, variants, positions, drop-path; and the integer form beside
its packed one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.deploy.pack import pack, stored_bytes
from quweit_jax.errors import InputError
from quweit_jax.layers.drop_path import DropPath
from quweit_jax.models.vit import ViT, ViTConfig
from quweit_jax.ops.patches import cut_patches, resample_positions
from tests.compiled import quick_jit

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
SMALL = {"num_classes": 5, "variant": "mu/4", "width": 16, "depth": 2, "heads": 2}


def build(**changes):
    return models.build(
        {
            "name": "vit",
            **SMALL,
            "weightless": {"num_luts": 24, "lut_inputs": 3, "thermometer_bits": 2},
            **changes,
        }
    )


def variables_of(model, images=IMAGES):
    return quick_jit(model.init)(jax.random.key(0), images)


@pytest.mark.parametrize(
    "variant, parameters", [("Ti/16", 5.7e6), ("S/16", 22.0e6), ("B/16", 86.6e6), ("Ti/4", 5.4e6)]
)
def test_published_sizes(variant, parameters):
    model, size = ViT(ViTConfig(1000, variant)), 224 if variant.endswith("16") else 32
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    )
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == pytest.approx(parameters, rel=0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "mean"},
        {"mlp": "weightless+none"},
        {"dtype": "bfloat16"},
        {"linear": "ternary"},
        {"remat": True, "mlp": "weightless"},
    ],
)
def test_float_forms(changes):
    model = build(**changes)
    variables = variables_of(model)

    def loss(params):
        logits = model.apply(
            {**variables, "params": params}, IMAGES, train=True, rngs={"dropout": jax.random.key(1)}
        )
        return jnp.square(logits).sum(), logits

    grads, logits = quick_jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert logits.shape == (4, 5) and logits.dtype == jnp.float32
    unused = [
        path for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.abs(g).max() > 0
    ]
    assert not unused, unused


def test_patches_are_rows_columns_channels():
    patches = cut_patches(jnp.asarray(IMAGES), 4)
    assert patches.shape == (4, 4, 48)
    np.testing.assert_array_equal(patches[1, 2], IMAGES[1, 4:, :4].reshape(-1))


def test_one_parameter_tree_for_floats_and_integers():
    for changes in ({"mlp": "dense"}, {"mlp": "weightless"}, {"mlp": "none"}, {"pool": "mean"}):
        trees = [
            jax.eval_shape(build(**changes, integer=i).init, jax.random.key(0), IMAGES)["params"]
            for i in (False, True)
        ]
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
        assert [leaf.shape for leaf in jax.tree.leaves(trees[0])] == [
            leaf.shape for leaf in jax.tree.leaves(trees[1])
        ]


def test_other_resolution_is_resampled():
    model = build()
    variables = variables_of(model)
    larger = np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)
    assert quick_jit(model.apply)(variables, larger).shape == (4, 5)
    flat = {
        **variables,
        "params": {**variables["params"], "position_embedding": jnp.ones((1, 5, 16))},
    }
    np.testing.assert_allclose(
        resample_positions(flat["params"]["position_embedding"], (4, 3)),
        np.ones((1, 13, 16)),
        rtol=1e-5,
    )
    with pytest.raises(InputError, match="6 patches that are not square"):
        resample_positions(jnp.ones((1, 7, 16)), (4, 4))


def test_drop_path_leaves_out_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 3))
    out = DropPath(0.25).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    assert (
        set(np.unique(out).tolist()) == {0.0, np.float32(4 / 3)} and (out[:, 0] == out[:, 2]).all()
    )
    assert float(out.mean()) == pytest.approx(1.0, abs=0.05)
    assert DropPath(0.25).apply({}, x, False) is x


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": "Q/16"}, "expected SIZE/PATCH such as Ti/16"),
        ({"variant": "Ti"}, "expected SIZE/PATCH"),
        ({"width": 18, "heads": 4}, "18 is not a multiple of the 4 heads; use 20"),
        ({"drop_path": 1.0}, "expected 0 <= drop_path < 1, found 1.0"),
        ({"mlp": "dense+none+none"}, "expected 1 kind or 2"),
        ({"integer": True, "dtype": "bfloat16"}, "an integer model trains beside float32"),
        ({"pool": "max"}, "model.pool"),
        ({"depth": -1}, "model.depth: expected a positive number"),
        ({"mlp_ratio": 0}, "model.mlp_ratio: expected at least 1"),
        ({"varient": "Ti/16"}, "variant"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(InputError, match=message):
        build(**changes)


@pytest.mark.parametrize("shape", [(4, 9, 8, 3), (4, 8, 8), (4, 0, 8, 3)])
def test_bad_images(shape):
    with pytest.raises(InputError, match="multiples of the patch size 4"):
        build().init(jax.random.key(0), np.zeros(shape, np.float32))


def calibrated(model):
    variables = variables_of(model)

    def move(variables, images):
        return model.apply(
            variables, images, train=True, mutable=["ranges"], rngs={"dropout": jax.random.key(0)}
        )[1]

    return {**variables, **quick_jit(move)(variables, IMAGES)}


FORMS = [
    ("dense", "cls", "dense"),
    ("weightless", "cls", "dense"),
    ("none", "mean", "dense"),
    ("none", "cls", "ternary"),
]


@pytest.mark.parametrize("mlp, pool, linear", FORMS)
def test_packed_integers_give_the_same_logits(mlp, pool, linear):
    model = build(mlp=mlp, pool=pool, linear=linear, integer=True, depth=1)
    variables = calibrated(model)
    expected = quick_jit(model.apply)(variables, IMAGES)
    packed = pack(model, variables, IMAGES)
    found = quick_jit(model.apply)(packed, IMAGES)
    # float32 rounds sums of more than 24 bits; a floor may then fall elsewhere, by a step or two of
    # the head's integers
    np.testing.assert_allclose(found, expected, atol=0.02 * np.ptp(expected))
    assert {
        np.asarray(leaf).dtype.kind
        for path, leaf in _constants(packed)
        if path not in ("scale", "logit_scale")
    } <= set("iu")
    assert stored_bytes(packed) < stored_bytes(variables["params"]) / 2


def _constants(packed):
    return [(path[-1].key, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(packed)]


def primitives(jaxpr, found=None):
    """(name, whether a float goes in or comes out) of every primitive,
    branches and loops included.
    """
    found = [] if found is None else found
    for equation in jaxpr.eqns:
        inner = [
            v
            for v in jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
            )
        ]
        inner = [getattr(v, "jaxpr", v) for v in inner if hasattr(v, "jaxpr") or hasattr(v, "eqns")]
        for sub in inner:
            primitives(sub, found)
        if not inner:
            dtypes = [
                v.aval.dtype
                for v in [*equation.invars, *equation.outvars]
                if hasattr(v.aval, "dtype")
            ]
            found.append(
                (equation.primitive.name, any(jnp.issubdtype(d, jnp.floating) for d in dtypes))
            )
    return found


# How an image becomes integers, the head's scale, and the branch that keeps XLA on CPU from fusing
# (see ops.fusion).
FLOATS_ALLOWED = {
    "reshape",
    "broadcast_in_dim",
    "transpose",
    "div",
    "round",
    "clamp",
    "max",
    "min",
    "convert_element_type",
    "mul",
    "gt",
    "jit",
    "pjit",
    "custom_jvp_call",
}


@pytest.mark.parametrize("mlp, pool, linear", FORMS)
def test_nothing_but_integers_between_image_and_logits(mlp, pool, linear):
    model = build(mlp=mlp, pool=pool, linear=linear, integer=True, depth=2)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    packed = jax.eval_shape(lambda v: model.apply(v, IMAGES, mutable=["packed"])[1], variables)
    used = primitives(jax.make_jaxpr(model.apply)(packed, IMAGES).jaxpr)
    floats = [name for name, is_float in used if is_float]
    assert set(floats) <= FLOATS_ALLOWED, set(floats) - FLOATS_ALLOWED
    assert floats.count("mul") == 1 and floats.count("div") == 1  # the head's scale; the image's
    assert sum(name == "dot_general" for name, _ in used) >= 9


def test_ternary_integers_are_their_formula_and_train():
    from quweit_jax.layers.integer import Quantized
    from quweit_jax.layers.integer_ternary import IntegerTernary

    draw, layer = np.random.default_rng(0), IntegerTernary(5)
    ints = np.float32(draw.integers(-127, 128, (2, 3, 7)))
    x = Quantized(ints, jnp.float32(0.02), ints * np.float32(0.02))
    kernel = draw.normal(size=(7, 5)).astype(np.float32)
    bias = draw.normal(size=5).astype(np.float32)
    params = {"kernel": kernel, "bias": bias}
    out, kept = layer.apply({"params": params}, x, mutable=["packed"])
    mean = np.abs(kernel).mean(dtype=np.float64)
    whole = np.clip(np.round(kernel / mean), -1, 1)
    expected = ints @ whole + np.round(bias / (mean * 0.02))
    np.testing.assert_array_equal(out.ints, expected)
    np.testing.assert_allclose(out.real, expected * mean * 0.02, rtol=1e-5)
    packed = layer.apply(kept, Quantized(ints.astype(np.int8)))
    assert packed.ints.dtype == jnp.int32 and kept["packed"]["kernel"].dtype == jnp.uint32
    np.testing.assert_array_equal(packed.ints, expected)

    def loss(params):
        return (layer.apply({"params": params}, x).real * upstream).sum()

    upstream = draw.normal(size=(2, 3, 5)).astype(np.float32)
    found = jax.grad(loss)(params)
    by_hand = x.real.reshape(-1, 7).T @ upstream.reshape(-1, 5)  # straight through
    np.testing.assert_allclose(found["kernel"], by_hand, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["bias"], upstream.sum((0, 1)), rtol=1e-5)


def test_no_multiplication_inside_a_weightless_block():
    from quweit_jax.layers.integer import Quantized
    from quweit_jax.layers.integer_blocks import IntegerWeightlessBlock

    rng = np.random.default_rng(0)
    block = IntegerWeightlessBlock(
        16, num_luts=32, lut_inputs=4, thermometer_bits=2, use_norm=False
    )
    scale = np.float32(0.03)
    x = Quantized(jnp.asarray(rng.integers(-128, 128, (2, 3, 16)), jnp.float32), scale)
    x = x.replace(real=x.ints * scale)
    variables = quick_jit(block.init)(jax.random.key(0), x)
    out, packed = block.apply(variables, x, mutable=["packed"])
    x_int = Quantized(x.ints.astype(jnp.int8))
    found = block.apply(packed, x_int)
    assert (
        found.ints.dtype == jnp.int32
        and (found.ints == out.ints).all()
        and np.abs(np.asarray(out.ints)).max() > 0
    )
    used = {
        name
        for name, _ in primitives(
            jax.make_jaxpr(lambda p, i: block.apply(p, Quantized(i)).ints)(packed, x_int.ints).jaxpr
        )
    }
    # jnp.take multiplies nothing either: the places it reads are computed by XLA's gather
    assert not used & {
        "mul",
        "dot_general",
        "conv_general_dilated",
        "div",
        "integer_pow",
        "square",
    }, used


def test_pack_names_what_is_missing():
    model = build(integer=True, depth=1)
    with pytest.raises(InputError, match="activation ranges were never set"):
        pack(model, variables_of(model), IMAGES)
    with pytest.raises(InputError, match="activation range was never set"):
        pack(model, {"params": variables_of(model)["params"]}, IMAGES)
    model = build()
    with pytest.raises(InputError, match="nothing to pack"):
        pack(model, variables_of(model), IMAGES)
