"""`layers.weightless`: every mapping and option against the naive reference, and as a part of a
user's own model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.layers.lookup import MAPPINGS, GroupSum, LearnableReduction, LUTLayer
from quweit_jax.layers.weightless import WeightlessBlock
from tests.compiled import quick_jit
from tests.ops import naive


def random_bits(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)


def init(module, inputs):
    return jax.device_get(quick_jit(module.init)(jax.random.key(0), inputs))


def wiring_of(params, wiring):
    """The inputs each slot reads, (L, n), found apart from the layer."""
    num_luts, entries = params["tables"].shape
    if "mapping" in wiring:
        chosen = wiring["mapping"]
    elif "candidates" in wiring:
        chosen = np.asarray(
            [row[np.argmax(scores)] for row, scores in zip(wiring["candidates"], params["scores"])]
        )
    else:
        chosen = np.argmax(params["scores"], axis=0)
    return np.asarray(chosen).reshape(num_luts, entries.bit_length() - 1)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_lut_layer(mapping):
    layer, bits = LUTLayer(5, 3, mapping=mapping, candidates=4), random_bits(2, 3, 8)
    variables = init(layer, bits)
    params, wiring = variables["params"], variables.get("wiring", {})
    shapes = {"learnable": {"scores": (8, 15)}, "candidates": {"scores": (15, 4)}}.get(mapping, {})
    assert {k: v.shape for k, v in params.items()} == {"tables": (5, 8)} | shapes
    fixed = {"candidates": {"candidates": (15, 4)}, "learnable": {}}.get(
        mapping, {"mapping": (5, 3), "inverse": (8, 2)}
    )
    assert {k: v.shape for k, v in wiring.items()} == fixed

    def loss(params, bits):
        out = layer.apply({"params": params, "wiring": wiring}, bits)
        return jnp.sum(out * jnp.arange(1.0, 6.0)), out

    (_, out), (grads, grad_bits) = quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        params, bits
    )
    expected = naive.lut_lookup(bits.reshape(6, 8), wiring_of(params, wiring), params["tables"]) > 0
    np.testing.assert_array_equal(out.reshape(6, 5), expected)
    assert set(np.unique(out)) == {0, 1}
    for name, gradient in {**grads, "bits": grad_bits}.items():
        assert np.abs(gradient).max() > 0, f"no gradient reaches {name}"


def test_real_values_instead_of_bits():
    layer, bits = LUTLayer(4, 2, binary=False), random_bits(6, 5)
    variables = init(layer, bits)
    expected = naive.lut_lookup(bits, variables["wiring"]["mapping"], variables["params"]["tables"])
    np.testing.assert_allclose(layer.apply(variables, bits), expected, rtol=1e-6)


def test_table_inits():
    bits = random_bits(20, 9)
    uniform = init(LUTLayer(50, 4, table_scale=0.5), bits)["params"]["tables"]
    assert 0.45 < np.abs(uniform).max() <= 0.5 and abs(uniform.mean()) < 0.05
    layer = LUTLayer(50, 4, table_init="residual", table_scale=0.5)
    variables = init(layer, bits)
    assert np.abs(variables["params"]["tables"]).max() <= 0.5
    np.testing.assert_array_equal(
        layer.apply(variables, bits), bits[:, variables["wiring"]["mapping"][:, 0]]
    )


def test_wiring_depends_on_the_seed_and_the_layer():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, bits):
            return LUTLayer(12, 3)(LUTLayer(12, 3)(bits))

    bits = random_bits(2, 12)
    start = quick_jit(Two().init)
    first, again, other = (start(jax.random.key(seed), bits)["wiring"] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    mapping = first["LUTLayer_0"]["mapping"]
    assert (mapping != other["LUTLayer_0"]["mapping"]).any() and (
        mapping != first["LUTLayer_1"]["mapping"]
    ).any()


def reference_block(block, variables, x):
    """LayerNorm -> thermometer -> look-ups -> conditional sum, from the formulas."""
    params, wiring = variables["params"], variables.get("wiring", {})
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    if block.use_norm:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * params[
            "norm"
        ]["scale"] + params["norm"].get("bias", 0)
    bits = naive.encode(
        x, params["thresholds"] if block.learn_thresholds else wiring["thresholds"]
    ).reshape(len(x), -1)
    for name in sorted(k for k in params if k.startswith("luts_")):
        bits = (
            naive.lut_lookup(
                bits, wiring_of(params[name], wiring.get(name, {})), params[name]["tables"]
            )
            > 0
        )
    vectors = np.asarray(params["vectors"], np.float64)
    if block.int8_sums:
        scale = np.abs(vectors).max(axis=0, keepdims=True) / 127
        vectors = np.round(vectors / scale) * scale
    return naive.conditional_sum(
        2.0 * bits - 1 if block.signed else bits.astype(float),
        vectors,
        params["bias"],
        block.features,
    )


OPTIONS = {
    "default": {},
    "grouped": {"sum": "grouped"},
    "unsigned": {"signed": False},
    "grouped unsigned": {"sum": "grouped", "signed": False, "int8_sums": False},
    "several layers": {"num_luts": (20, 12)},
    "fixed thresholds": {"learn_thresholds": False},
    "real sums, no norm": {"int8_sums": False, "use_norm": False},
    "arange, norm with bias": {"mapping": "arange", "norm_bias": True},
    "learnable": {"mapping": "learnable"},
    "candidates": {"mapping": "candidates", "candidates": 3},
    "harmonic boxcar residual": {
        "decay": "harmonic",
        "window_shape": "boxcar",
        "window": 0.5,
        "table_init": "residual",
        "table_scale": 0.1,
    },
    "one bit, one input": {"thermometer_bits": 1, "lut_inputs": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_block_with_every_option(name):
    block = WeightlessBlock(
        4,
        **{"num_luts": 16, "lut_inputs": 3, "thermometer_bits": 3, "vector_init": 0.5}
        | OPTIONS[name],
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    variables = init(block, x)
    rest = {k: v for k, v in variables.items() if k != "params"}
    assert ("thresholds" in variables["params"]) == block.learn_thresholds

    def loss(params, x):
        out = block.apply({"params": params, **rest}, x)
        return jnp.sum(out * jnp.arange(1.0, 5.0)), out

    (_, out), (grads, grad_x) = quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        variables["params"], x
    )
    assert out.shape == (2, 5, 4) and out.dtype == jnp.float32
    np.testing.assert_allclose(out.reshape(10, 4), reference_block(block, variables, x), atol=1e-4)
    for path, gradient in jax.tree_util.tree_leaves_with_path({"params": grads, "x": grad_x}):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, (
            f"no gradient reaches {jax.tree_util.keystr(path)}"
        )


def test_thresholds_start_at_the_quantiles_of_a_gaussian():
    thresholds = init(
        WeightlessBlock(2, num_luts=4, thermometer_bits=3), np.zeros((1, 5), np.float32)
    )["params"]["thresholds"]
    np.testing.assert_allclose(thresholds, np.tile([-0.67449, 0, 0.67449], (5, 1)), atol=1e-5)


def test_block_in_bfloat16():
    x = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    options = {"num_luts": 16, "lut_inputs": 3, "vector_init": 0.5}
    variables = init(WeightlessBlock(4, **options), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {np.dtype("float32")}
    half = quick_jit(WeightlessBlock(4, dtype=jnp.bfloat16, **options).apply)(variables, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(half, np.float32), WeightlessBlock(4, **options).apply(variables, x), atol=0.1
    )


def test_block_takes_the_place_of_an_mlp_in_a_users_model():
    class Classifier(nn.Module):
        weightless: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = x + (
                WeightlessBlock(features=8, num_luts=32)
                if self.weightless
                else nn.Sequential([nn.Dense(32), nn.gelu, nn.Dense(8)])
            )(x)
            return nn.Dense(2)(x)

    x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    labels = (x[:, 0] * x[:, 1] > 0).astype(np.int32)
    for weightless in (True, False):
        model = Classifier(weightless)
        variables = init(model, x)
        rest = {k: v for k, v in variables.items() if k != "params"}

        def loss(params, model=model, rest=rest):
            logits = model.apply({"params": params, **rest}, x)
            return -jnp.mean(
                jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            )

        @quick_jit
        def step(params, loss=loss):
            value, grads = jax.value_and_grad(loss)(params)
            return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        before, params = step(variables["params"])
        for leaf, old in zip(jax.tree.leaves(params), jax.tree.leaves(variables["params"])):
            assert (np.asarray(leaf) != old).any()
        for _ in range(20):
            after, params = step(params)
        assert after < before


@pytest.mark.parametrize(
    ("outputs", "n", "inputs", "widths"),
    [
        (10, 6, 500, [360, 60, 10]),
        (10, 6, 60, [10]),
        (10, 6, 61, [60, 10]),
        (2, 2, 17, [16, 8, 4, 2]),
        (3, 4, 1, [3]),
    ],
)
def test_learnable_reduction_widths(outputs, n, inputs, widths):
    reduction = LearnableReduction(outputs, n)
    assert reduction.widths(inputs) == widths
    shapes = jax.eval_shape(reduction.init, jax.random.key(0), jnp.zeros((2, inputs)))["params"]
    assert {k: v["tables"].shape for k, v in shapes.items()} == {
        f"luts_{i}": (w, 2**n) for i, w in enumerate(widths)
    }


def test_learnable_reduction():
    reduction, bits = (
        LearnableReduction(2, 2, tau=0.5, lut={"mapping": "random"}),
        random_bits(9, 8),
    )
    variables = init(reduction, bits)
    hidden = bits
    for name in ("luts_0", "luts_1"):
        mapping, tables = variables["wiring"][name]["mapping"], variables["params"][name]["tables"]
        values = naive.lut_lookup(hidden, mapping, tables)
        hidden = values > 0
    out = reduction.apply(variables, bits)
    np.testing.assert_allclose(out, values / 0.5, rtol=1e-5)
    assert len(np.unique(out)) > 2  # scores, not bits


def test_group_sum():
    bits = random_bits(3, 12)
    np.testing.assert_allclose(GroupSum(4, tau=2.0).apply({}, bits), naive.group_sum(bits, 4, 2.0))
    with pytest.raises(InputError, match=r"GroupSum: num_groups: .*use 10 or 15"):
        GroupSum(5).apply({}, bits)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (LUTLayer(4, mapping="rand"), r"LUTLayer: mapping: .*Did you mean 'random'\?"),
        (LUTLayer(4, table_init="unifrom"), r"LUTLayer: table_init: .*Did you mean 'uniform'\?"),
        (
            LUTLayer(4, lut_inputs=9),
            "LUTLayer: lut_inputs: a table can have 1 to 8 inputs, found 9",
        ),
        (
            LUTLayer(4, lut_inputs=0),
            "LUTLayer: lut_inputs: a table can have 1 to 8 inputs, found 0",
        ),
        (LUTLayer(4, decay="harmonic", beta=0.5), "beta belongs to decay='exponential'"),
        (WeightlessBlock(4, sum="group"), r"WeightlessBlock: sum: .*Did you mean 'grouped'\?"),
        (
            WeightlessBlock(4, window_shape="box"),
            r"WeightlessBlock: window_shape: .*Did you mean 'boxcar'\?",
        ),
        (
            WeightlessBlock(4, num_luts=()),
            r"WeightlessBlock: num_luts must be a positive number.*found \(\)",
        ),
        (
            WeightlessBlock(4, num_luts=(8, 0)),
            r"WeightlessBlock: num_luts must be a positive number.*found \(8, 0\)",
        ),
        (
            WeightlessBlock(0, num_luts=10, sum="grouped"),
            "grouped sum: expected at least one output, found 0",
        ),
        (LearnableReduction(0), "LearnableReduction: expected at least 1 output"),
        (LearnableReduction(2, 1), "LearnableReduction: .* found 2 and 1"),
        (LearnableReduction(2, 2, tau=0.0), "LearnableReduction: tau"),
        (
            WeightlessBlock(4, num_luts=10, sum="grouped"),
            r"num_luts of the last layer of a grouped sum: .*use 8 or 12, or sum='dense'",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_errors(module, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 6)))
