"""`training.optimizers`: tables stay in range whatever the optimizer does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from quweit_jax.errors import InputError
from quweit_jax.layers.weightless import WeightlessBlock
from quweit_jax.training import state
from quweit_jax.training.optimizers import (
    OptimizerConfig,
    keep_tables_in_range,
    make_optimizer,
    spectral_penalty,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_are_what_clipping_makes_them(dtype):
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.uniform(-1, 1, 4000), [-1, 1, 0, 1e-30, -1e-30, 0.3, -0.7]])
    p = jnp.asarray(values, dtype)
    u = jnp.asarray(draw.normal(size=p.shape) * 10 ** draw.uniform(-6, 1, p.shape), dtype)
    params, updates = ({"luts": {"tables": a}, "kernel": 3 * a} for a in (p, u))
    keep = keep_tables_in_range()

    @jax.jit
    def step(params, updates):
        updates, _ = keep.update(updates, keep.init(params), params)
        return optax.apply_updates(params, updates)

    moved = step(params, updates)
    tables = np.asarray(moved["luts"]["tables"], np.float32)
    clipped = np.asarray(jnp.clip(p + u, -1, 1), np.float32)
    assert np.abs(tables).max() == 1
    inside = np.abs(clipped) < 1
    np.testing.assert_array_equal(tables[inside], clipped[inside])
    np.testing.assert_allclose(tables, clipped, rtol=float(jnp.finfo(dtype).epsneg))
    np.testing.assert_array_equal(moved["kernel"], 3 * p + 3 * u)
    assert np.mean(np.abs(tables) == 1) > 0.1


def test_a_training_keeps_tables_in_range():
    params = {"tables": jnp.full((4, 4), 0.9), "bias": jnp.zeros(3)}
    optimizer = make_optimizer(OptimizerConfig(tables_learning_rate=0.5), 10)
    state = optimizer.init(params)
    for _ in range(5):
        grads = jax.tree.map(lambda p: -jnp.ones_like(p), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert (params["tables"] == 1).all() and (params["bias"] > 0).all()


def test_mistakes_are_named():
    keep = keep_tables_in_range()
    with pytest.raises(InputError, match="found none"):
        keep.init({"kernel": jnp.zeros(3)})
    with pytest.raises(InputError, match="pass the parameters"):
        keep.update({"tables": jnp.zeros(3)}, optax.EmptyState())
    make_optimizer(OptimizerConfig(), 3).init({"kernel": jnp.zeros((3, 3))})
    with pytest.raises(InputError, match="Did you mean 'adamw'"):
        OptimizerConfig(name="adam")


class Classifier(nn.Module):
    """A block that takes the arguments a training step gives."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return WeightlessBlock(3, num_luts=12, lut_inputs=3, name="block")(x)


def test_the_spectral_penalty_moves_tables_alone():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(16, 5)).astype(np.float32), np.arange(16) % 3
    model, sgd = Classifier(), optax.sgd(1.0)
    start = jax.jit(state.make_init(model, sgd, 0, ema=False))(x)
    tables = np.asarray(start.params["block"]["luts_0"]["tables"])
    np.testing.assert_allclose(spectral_penalty(start.params), (tables**2).sum() / 8, rtol=1e-5)
    moved = [
        state.make_train_step(model, sgd, spectral_penalty=weight)(
            jax.tree.map(jnp.copy, start), {"inputs": x, "targets": y}
        )[0].params["block"]
        for weight in (0.0, 0.01)
    ]
    found = moved[0]["luts_0"]["tables"] - moved[1]["luts_0"]["tables"]
    np.testing.assert_allclose(found, 0.01 * 2 * tables / 8, atol=1e-6)
    np.testing.assert_array_equal(moved[0]["vectors"], moved[1]["vectors"])
    assert spectral_penalty({"kernel": jnp.ones(3)}) == 0
