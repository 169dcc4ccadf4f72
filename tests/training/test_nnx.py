"""A model written in NNX learns what its twin in Linen does, keeps its tables in range,
and packs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from sklearn.datasets import load_digits

from quweit_jax.deploy.pack import pack
from quweit_jax.layers.lookup_glu import LookupGLU
from quweit_jax.layers.weightless import WeightlessBlock
from quweit_jax.training.optimizers import OptimizerConfig, make_optimizer

pytestmark = pytest.mark.usefixtures("compile_quickly")

STEPS, WIDTH, TRAINING = 120, 32, 1200
BLOCK = WeightlessBlock(WIDTH, num_luts=192)


class InLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="enter")(x)
        x = x + BLOCK.copy(name="block")(x)
        return nn.Dense(10, name="leave")(x)


class InNNX(nnx.Module):
    def __init__(self, rngs):
        self.enter = nnx.Linear(64, WIDTH, rngs=rngs)
        self.block = nnx.bridge.ToNNX(BLOCK, rngs=rngs).lazy_init(jnp.zeros((1, WIDTH)))
        self.leave = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        x = self.enter(x)
        return self.leave(x + self.block(x))


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@nnx.jit
def call(model, x):
    return model(x)


def optimizer_of_both():
    return make_optimizer(OptimizerConfig(learning_rate=4e-3, warmup=10), STEPS)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return np.float32(x[order] / 8 - 1), y[order]


@pytest.fixture(scope="module")
def batches(digits):
    x, y = digits
    rows = [np.random.default_rng(i).permutation(TRAINING)[:200] for i in range(STEPS)]
    return [(x[r], y[r]) for r in rows]


@pytest.fixture(scope="module")
def in_nnx(batches):
    model = nnx.jit(lambda: InNNX(nnx.Rngs(0)))()
    start = jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    optimizer = nnx.Optimizer(model, optimizer_of_both(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        optimizer.update(model, nnx.grad(lambda m: cross_entropy(m(x), y))(model))

    for x, y in batches:
        step(model, optimizer, x, y)
    return model, start


def test_it_learns_digits_as_linen_does(digits, batches, in_nnx):
    model, start = in_nnx
    drawn = {name: start["block"]["luts_0"].pop(name) for name in ("mapping", "inverse")}
    wiring = {"block": {"luts_0": drawn}}
    del start["block"]["to_nnx__rngs"]
    twin, optimizer, params = InLinen(), optimizer_of_both(), start
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            return cross_entropy(twin.apply({"params": params, "wiring": wiring}, x), y)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for x, y in batches:
        params, state = step(params, state, x, y)
    x, y = digits
    held, right = x[TRAINING:], y[TRAINING:]
    logits = jax.jit(twin.apply)({"params": params, "wiring": wiring}, held)
    ours, theirs = ((found.argmax(-1) == right).mean() for found in (call(model, held), logits))
    assert theirs > 0.85 and abs(ours - theirs) <= 0.01


def test_its_tables_stay_in_range_and_reach_the_ends(in_nnx):
    tables = np.abs(in_nnx[0].block.luts_0["tables"][...])
    assert tables.max() == 1 and (tables == 1).mean() > 0.001


def test_packed_is_as_trained(digits, in_nnx):
    model, held = in_nnx[0], digits[0][TRAINING:]
    logits, hidden = call(model, held), model.enter(held[:1])
    expected = flatten_dict(pack(model.block, model.block, hidden)["packed"])
    model.block(hidden, mutable=["packed"])  # in place
    found = flatten_dict(nnx.to_pure_dict(nnx.state(model.block)))
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)
    assert expected["luts_0", "tables"].dtype == np.uint8 == found["luts_0", "tables"].dtype
    np.testing.assert_allclose(call(model, held), logits, atol=1e-3)


def test_a_lookup_glu_packs_in_place():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    glu = LookupGLU(16, hidden=24)
    layer = nnx.jit(lambda: nnx.bridge.ToNNX(glu, rngs=nnx.Rngs(0)).lazy_init(x))()
    expected = call(layer, x)
    layer(x, mutable=["packed"])
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(call(layer, x), expected, atol=1e-4)
