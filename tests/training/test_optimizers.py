"""`training.optimizers`: tables stay in range whatever the optimizer does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from quweit_jax.errors import InputError
from quweit_jax.training.optimizers import OptimizerConfig, keep_tables_in_range, make_optimizer


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
