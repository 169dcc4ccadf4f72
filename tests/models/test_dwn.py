"""`models.dwn`: the plain weightless classifier, from raw inputs to scores."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.models.dwn import DWN, DWNConfig
from tests.compiled import quick_jit
from tests.ops import naive


def inputs(examples=40, *shape, seed=0):
    return np.random.default_rng(seed).normal(2, 3, (examples, *(shape or (5,)))).astype(np.float32)


@pytest.mark.parametrize("per_feature", [True, False])
@pytest.mark.parametrize("kind", ["distributive", "gaussian", "uniform"])
def test_initializing_fits_the_thermometer(kind, per_feature):
    x = inputs()
    model = DWN(
        DWNConfig(3, num_luts=6, thermometer=kind, thermometer_bits=3, per_feature=per_feature)
    )
    thresholds = quick_jit(model.init)(jax.random.key(0), x)["wiring"]["thresholds"]
    np.testing.assert_allclose(
        np.atleast_2d(thresholds), naive.thresholds(kind, x, 3, per_feature), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mapping", ["learnable", "random"])
def test_scores_are_the_layers_one_after_another(mapping):
    x = inputs(6, 2, 3, 1)
    model = DWN(
        DWNConfig(2, num_luts=(8, 6), lut_inputs=2, mapping=mapping, thermometer_bits=2, tau=1.5)
    )
    variables = jax.device_get(quick_jit(model.init)(jax.random.key(0), x))
    params, wiring = variables["params"], variables["wiring"]
    bits = naive.encode(x.reshape(6, 6), wiring["thresholds"]).reshape(6, -1)
    first = (
        params["luts_0"]["scores"].argmax(0).reshape(8, 2)
        if mapping == "learnable"
        else wiring["luts_0"]["mapping"]
    )
    for chosen, name in ((first, "luts_0"), (wiring["luts_1"]["mapping"], "luts_1")):
        bits = naive.lut_lookup(bits, chosen, params[name]["tables"]) > 0
    scores = quick_jit(model.apply)(variables, x)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, naive.group_sum(bits, 2, 1.5), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["group_sum", "learnable"])
def test_it_learns(reduction):
    x = inputs(200)
    labels = (x[:, 1] > 2).astype(np.int32)
    model = DWN(DWNConfig(2, num_luts=60, lut_inputs=3, reduction=reduction, thermometer_bits=3))
    variables = jax.device_get(quick_jit(model.init)(jax.random.key(0), x))

    def loss(params):
        scores = model.apply({"params": params, "wiring": variables["wiring"]}, x, train=True)
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], axis=1)
        ), scores

    @quick_jit
    def step(params):
        (value, scores), grads = jax.value_and_grad(loss, has_aux=True)(params)
        # One size of step for each array, so that this needs no optimizer.
        params = jax.tree.map(
            lambda p, g: p - 0.02 * g / (jnp.sqrt(jnp.mean(g**2)) + 1e-9), params, grads
        )
        return (
            jax.tree.map(lambda p: jnp.clip(p, -1, 1), params),
            value,
            (scores.argmax(-1) == labels).mean(),
            grads,
        )

    params, before, _, grads = step(variables["params"])
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(gradient).max() > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"
    for _ in range(60):
        params, after, accuracy, _ = step(params)
    assert after < before and accuracy > 0.8


@pytest.mark.parametrize("shape", [(5, 5), (2, 6, 6), (3, 24)])
def test_a_packed_classifier_says_what_it_reads(shape):
    model = models.build({"name": "dwn", "num_luts": (20,), "lut_inputs": 2}, 10)
    images = jax.random.uniform(jax.random.key(0), (4, 5, 5))
    packed = pack(model, quick_jit(model.init)(jax.random.key(1), images), images)
    assert quick_jit(model.apply)(packed, images).shape == (4, 10)
    found = f"25 numbers each, found {shape[0]} of {math.prod(shape[1:])}; "
    with pytest.raises(InputError, match=found):
        model.apply(packed, jnp.zeros(shape))


def test_build():
    model = models.build({"name": "dwn", "num_luts": [30, 20], "lut_inputs": 4}, 10)
    assert model.config == DWNConfig(10, num_luts=(30, 20), lut_inputs=4)
    uneven = DWNConfig(10, num_luts=47, reduction="learnable")  # a pyramid shares nothing
    assert uneven.num_luts == (47,)
    assert DWNConfig(10, num_luts=70).num_luts == (70,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mapping": "learnabel"}, r"model\.mapping: .*Did you mean 'learnable'\?"),
        ({"thermometer": "gauss"}, r"model\.thermometer: .*Did you mean 'gaussian'\?"),
        ({"reduction": "groupsum"}, r"model\.reduction: .*Did you mean 'group_sum'\?"),
        ({"decay": "harmonics"}, r"model\.decay: .*Did you mean 'harmonic'\?"),
        ({"lut_inputs": 9}, r"model\.lut_inputs: .*1 to 8 inputs, found 9"),
        (
            {"num_luts": ()},
            r"model\.num_luts: expected a positive number of tables for each layer, found \(\)",
        ),
        ({"num_luts": (5, 0)}, r"model\.num_luts: .*found \(5, 0\)"),
        ({"num_luts": (30, 47)}, r"model\.num_luts: .*use 40 or 50"),
        ({"num_luts": 4}, r"model\.num_luts: .*use 10, or"),
        *(({"tau": tau}, r"model\.tau: ") for tau in (0.0, -1.0, float("nan"), float("inf"))),
        ({"lut_inputs": 1, "reduction": "learnable"}, r"model\.lut_inputs: expected 2 or more"),
        ({"luts": 5}, r"model: unknown key 'luts'\. Did you mean 'num_luts'\?"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(InputError, match=message):
        models.build({"name": "dwn"} | changes, 10)
