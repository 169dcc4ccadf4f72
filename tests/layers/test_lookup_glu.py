"""`layers.lookup_glu`: the trained form against its formula in float64, the packed form against the
trained one, in every model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.costs.count import of_model
from quweit_jax.deploy.pack import pack, stored_bytes
from quweit_jax.errors import InputError
from quweit_jax.layers.lookup_glu import LookupGLU
from quweit_jax.ops import pair_table
from tests.compiled import quick_jit
from tests.ops.test_pair_table import naive_codes

VARIANTS = {
    "one_table": {},
    "trained_tables": {"train_tables": True},
    "table_groups": {"train_tables": True, "table_groups": 4},
    "a_table_a_unit": {"train_tables": True, "table_groups": 0, "code_bits": 2, "code_step": 0.6},
    "vector": {"sum": "vector", "num_luts": 9, "lut_inputs": 2},
    "int8": {"sum": "int8", "lut_inputs": 3},
    "no_norm": {"use_norm": False},
    "norm_bias": {"norm_bias": True},
    "output_norm": {"output_norm": 0.3},
}


def trained(layer, x):
    """Variables as after training: no parameter at its round initial value."""
    variables = jax.device_get(quick_jit(layer.init)(jax.random.key(0), x))
    draw = np.random.default_rng(3)
    move = lambda leaf: leaf + 0.1 * draw.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return {**variables, "params": jax.tree.map(move, variables["params"])}


def inputs(width=20, lead=(3, 5)):
    return 1.5 * np.random.default_rng(1).normal(size=(*lead, width)).astype(np.float32) + 0.2


def ternary(kernel):
    scale = np.abs(kernel).mean()
    return np.clip(np.round(kernel / scale), -1, 1), scale


@pytest.mark.parametrize("output_norm", [0.0, 0.3])
def test_against_the_formula(output_norm):
    options = {"train_tables": True, "table_groups": 3, "output_norm": output_norm}
    layer, x = LookupGLU(7, 12, **options), inputs()
    variables = trained(layer, x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    y = x.astype(np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = np.clip(np.round(32 * y * p["norm"]["scale"]), -127, 127)
    unit = 1 / (32 * np.sqrt(2 * 20 / 3))
    sums = y @ ternary(p["mix"])[0] - np.round(p["offsets"] / unit)
    codes = naive_codes(sums, round(0.25 / unit), 4).astype(int) + 8
    tables = np.clip(np.round(16 * p["gates"]), -127, 127)
    group = np.arange(12) // 4
    read = tables[group, codes[..., :12], codes[..., 12:]]
    whole, scale = ternary(p["sum"])
    expected = read @ whole * scale / 16 + p["bias"]
    if output_norm:
        rms = np.sqrt(np.square(read @ whole).mean(-1, keepdims=True) + 1)
        expected = read @ whole / rms * p["norm_scale"] + p["bias"]
    np.testing.assert_allclose(quick_jit(layer.apply)(variables, x), expected, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_is_what_was_trained(name):
    layer, x = LookupGLU(6, 16, **VARIANTS[name]), inputs()
    variables = trained(layer, x)
    expected = quick_jit(layer.apply)(variables, x)
    packed = pack(layer, variables, x)
    found = quick_jit(layer.apply)(packed, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if layer.sum == "ternary":  # all of it is whole numbers until the last scale
        np.testing.assert_array_equal(found, expected)
    assert np.std(expected) > 0.1
    one = quick_jit(layer.apply)(packed, x[:1, :1])
    np.testing.assert_allclose(one, found[:1, :1], atol=1e-5)
    counted = of_model(layer, x[0, :1])
    assert sum(counted.bytes_stored.values()) == stored_bytes(packed)
    assert counted.parameters == sum(a.size for a in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_gradient_reaches_every_parameter(name):
    layer, x = LookupGLU(6, 16, **VARIANTS[name]), inputs()
    variables = trained(layer, x)

    def loss(params, x):
        return jnp.square(layer.apply({**variables, "params": params}, x)).sum()

    for gradient in jax.tree.leaves(quick_jit(jax.grad(loss, (0, 1)))(variables["params"], x)):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_the_gradient_is_that_of_the_chain_of_its_steps():
    """d loss / d offsets, by hand: through the sum's weights, the table's slope and the step."""
    layer, x = LookupGLU(5, 8, use_norm=False), inputs()
    variables = trained(layer, x)
    p, step = variables["params"], round(0.25 * 32 * np.sqrt(40 / 3))
    unit = 1 / (32 * np.sqrt(40 / 3))
    y = np.clip(np.round(32 * x), -127, 127).reshape(-1, 20)
    sums = y @ ternary(p["mix"])[0] - np.round(p["offsets"] / unit)
    codes = naive_codes(sums, step, 4).astype(int)
    inside = (np.floor(sums / step + 0.5) >= -8) & (np.floor(sums / step + 0.5) <= 7)
    table = np.round(16 * pair_table.silu_gate(4, 0.25))
    a, b = (c + 8 for c in np.split(codes, 2, axis=1))
    slope = np.concatenate([np.gradient(table, axis=0)[a, b], np.gradient(table, axis=1)[a, b]], 1)
    whole, scale = ternary(p["sum"])
    upstream = np.ones((len(y), 5)) @ whole.T * scale / 16
    by_hand = -(np.tile(upstream, 2) * slope * inside / step / unit).sum(0)
    grads = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(p)
    np.testing.assert_allclose(grads["offsets"], by_hand, rtol=1e-4, atol=1e-5)


def test_bfloat16_operands_change_no_sum():
    x = inputs()
    variables = trained(LookupGLU(6, 16), x)
    exact = quick_jit(LookupGLU(6, 16).apply)(variables, x)
    half = quick_jit(LookupGLU(6, 16, dtype=jnp.bfloat16).apply)(variables, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "options,named",
    [
        ({"code_bits": 0}, "code_bits"),
        ({"code_bits": 7}, "code_bits"),
        ({"hidden": -1}, "hidden"),
        ({"hidden": 10, "table_groups": 3}, "table_groups"),
        ({"sum": "dense"}, "sum"),
        ({"code_step": 0.0}, "code_step"),
        ({"sum_init": float("nan")}, "sum_init"),
        ({"output_norm": -1.0}, "output_norm"),
        ({"output_norm": 0.3, "sum": "vector"}, "output_norm"),
    ],
)
def test_options_it_cannot_have(options, named):
    with pytest.raises(InputError, match=named):
        LookupGLU(4, **options).init(jax.random.key(0), jnp.zeros((1, 4)))


@pytest.mark.parametrize("kind", ["lookup_glu", "swiglu", "bitglu"])
@pytest.mark.parametrize("name", ["gpt", "transformer_pp", "matmulfree", "vit"])
def test_in_every_model(name, kind):
    config: dict = {"name": name, "mlp": f"{kind}+dense", kind: {"hidden": 24}}
    if name == "vit":
        config |= {"variant": "mu/8", "depth": 2}
        x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    else:
        config |= {"width": 32, "layers": 2, "context": 8}
        config |= {} if name == "matmulfree" else {"heads": 2}
        x = np.arange(12).reshape(2, 6) % 11
    model = models.build(config, 11)
    variables = trained(model, x)
    expected = quick_jit(model.apply)(variables, x)
    assert of_model(model, x[:1]).parameters == sum(
        a.size for a in jax.tree.leaves(variables["params"])
    )
    if kind != "swiglu" or name == "matmulfree":
        found = quick_jit(model.apply)(pack(model, variables, x), x)
        np.testing.assert_allclose(found, expected, atol=2e-4)


@functools.cache
def integer_vit():
    config = {"name": "vit", "variant": "mu/8", "depth": 2, "pool": "mean", "integer": True}
    model = models.build(config | {"mlp": "lookup_glu", "lookup_glu": {"hidden": 24}}, 11)
    x = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    variables = trained(model, x)
    calibrate = quick_jit(lambda v: model.apply(v, x, train=True, mutable=["ranges"])[1])
    return model, {**variables, **jax.device_get(calibrate(variables))}, x


def test_the_integer_form_is_exact_and_without_floats():
    model, variables, x = integer_vit()
    logits = quick_jit(model.apply)(variables, x)
    packed = pack(model, variables, x)
    np.testing.assert_allclose(quick_jit(model.apply)(packed, x), logits, atol=2e-3)
    held = packed["packed"]["block_0"]["mlp"]
    assert {str(value.dtype) for value in held.values()} == {"uint32", "int8", "int32"}
    counted = of_model(model, x[:1])
    assert sum(counted.bytes_stored.values()) == stored_bytes(packed)
    assert counted.parameters == sum(a.size for a in jax.tree.leaves(variables["params"]))
    block = [row for row in counted.layers if "/mlp" in row.name]
    assert block and not any(row.multiplications for row in block)


def test_the_integer_form_trains_every_parameter_and_follows_the_float_form():
    model, variables, x = integer_vit()

    def loss(params):
        return jnp.square(model.apply({**variables, "params": params}, x)).sum()

    grads = quick_jit(jax.grad(loss))(variables["params"])["block_1"]["mlp"]
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(grads))
    config = {"name": "vit", "variant": "mu/8", "depth": 2, "pool": "mean", "mlp": "lookup_glu"}
    floats = models.build(config | {"lookup_glu": {"hidden": 24}}, 11)
    near = quick_jit(floats.apply)({"params": variables["params"]}, x)
    found = quick_jit(model.apply)(variables, x)
    assert np.corrcoef(np.ravel(near), np.ravel(found))[0, 1] > 0.95


@pytest.mark.parametrize(
    "kind,options",
    [
        ("lookup_glu", {"sum": "int8"}),
        ("lookup_glu", {"output_norm": 0.3}),
        ("weightless", {"sum": "vector"}),
    ],
)
def test_what_has_no_integer_form_says_so(kind, options):
    config = {"name": "vit", "variant": "mu/8", "integer": True, "mlp": kind, kind: options}
    model = models.build(config, 11)
    with pytest.raises(InputError, match="integer=False"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
