"""The recurrence's kernel for TPUs, interpreted, against a loop over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from quweit_jax.errors import InputError
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.recurrence import gated_recurrence
from tests.ops.test_recurrence import case, loop, run
from tests.ops.tpu import drawn


def check(steps, batch, features, dtype="float32"):
    arrays = case(steps, batch, features, seed=steps)
    tolerance = 1e-5
    if dtype != "float32":
        arrays = [np.asarray(jnp.asarray(a, dtype), np.float64) for a in arrays]
        tolerance = 2**-7
    with choice.interpreted():
        found = run("pallas", *arrays, dtype=dtype)
    for one, expected in zip(found, loop(*arrays), strict=True):
        assert one.shape == expected.shape
        atol = tolerance * max(1, np.abs(expected).max())
        np.testing.assert_allclose(np.asarray(one, np.float64), expected, atol=atol, rtol=0)


@drawn
@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 3, 130]), st.sampled_from("fb"))
def test_values_final_states_and_gradients(steps, batch, features, dtype):
    check(steps, batch, features, {"f": "float32", "b": "bfloat16"}[dtype])


def test_several_blocks_of_time_and_features():
    check(steps=300, batch=2, features=516)


def test_nothing_at_all():
    with choice.interpreted():
        for sizes in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
            states, final = gated_recurrence(
                jnp.zeros(sizes), jnp.zeros(sizes), implementation="pallas"
            )
            assert (states.shape, final.shape) == (sizes, sizes[::2])


def loss(*arrays, implementation="pallas"):
    states, final = gated_recurrence(*arrays, implementation=implementation)
    return (states**2).sum() + final.sum()


def test_under_transformations():
    """jit, grad, vmap, remat, scan and shard_map; and divided over a mesh that is told."""
    arrays = tuple(jnp.asarray(a, jnp.float32) for a in case(19, 4, 5)[:3])
    grad = jax.grad(loss, argnums=(0, 1, 2))
    expected = jax.grad(lambda *a: loss(*a, implementation="sequential"), argnums=(0, 1, 2))(
        *arrays
    )
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(4, 1), ("data", "tensor"))
    pairs = [a.reshape(2, 2, *a.shape[1:]) for a in arrays]

    def scanned(*arrays):
        return jax.lax.scan(lambda _, a: (None, grad(*a)), None, arrays)[1]

    with choice.interpreted():
        found = {
            "remat": jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)))(*arrays),
            "vmap": jax.vmap(grad)(*pairs),
            "scan": jax.jit(scanned)(*pairs),
            "shard_map": jax.jit(
                jax.shard_map(
                    grad, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
                )
            )(*arrays),
        }
        with choice.divided(mesh, "data"):
            found["divided"] = jax.jit(grad)(*arrays)
    for name, values in found.items():
        for one, other in zip(values, expected, strict=True):
            np.testing.assert_allclose(
                one.reshape(other.shape), other, atol=1e-4, rtol=1e-4, err_msg=name
            )


def test_refused_where_it_is_not():
    x = jnp.zeros((1, 2, 3))
    with pytest.raises(InputError, match="'pallas' needs a tpu"):
        gated_recurrence(x, x, implementation="pallas")
    with choice.interpreted(), jax.enable_x64(True), pytest.raises(InputError, match="float64"):
        gated_recurrence(x.astype("float64"), x, implementation="pallas")
