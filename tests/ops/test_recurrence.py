"""`ops.recurrence`: every implementation against a loop in double precision, values, final state
and all gradients."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops.recurrence import (
    IMPLEMENTATIONS,
    gated_recurrence,
    gated_recurrence_step,
    pick_implementation,
)

FORMS = [m for m in IMPLEMENTATIONS if m not in ("auto", "pallas")]


def case(steps, batch=2, features=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, steps, features)
    gates = rng.uniform(0, 1, shape)
    gates[rng.random(shape) < 0.1] = (
        0  # a closed gate forgets everything: no implementation may divide by it
    )
    gates[rng.random(shape) < 0.1] = 1
    return (
        gates,
        rng.normal(size=shape),
        rng.normal(size=(batch, features)),
        rng.normal(size=shape),
        rng.normal(size=(batch, features)),
    )


def loop(gates, candidates, start, grad_states, grad_final):
    """Values and gradients by two loops, float64."""
    states, state = np.zeros_like(candidates), start
    for t in range(candidates.shape[1]):
        state = gates[:, t] * state + candidates[:, t]
        states[:, t] = state
    d_gates, d_candidates, flowing = np.zeros_like(gates), np.zeros_like(gates), grad_final.copy()
    for t in reversed(range(candidates.shape[1])):
        flowing = flowing + grad_states[:, t]
        d_candidates[:, t], d_gates[:, t] = flowing, flowing * (states[:, t - 1] if t else start)
        flowing = flowing * gates[:, t]
    return states, state, d_gates, d_candidates, flowing


def run(implementation, gates, candidates, start, grad_states, grad_final, dtype=jnp.float32):
    def function(*args):
        return gated_recurrence(*args, implementation=implementation)

    arrays = [jnp.asarray(a, dtype) for a in (gates, candidates, start)]
    (states, final), pull = jax.vjp(function, *arrays)
    return (
        states,
        final,
        *pull((jnp.asarray(grad_states, states.dtype), jnp.asarray(grad_final, final.dtype))),
    )


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 1000, 4096])
@pytest.mark.parametrize("implementation", FORMS)
def test_equals_a_float64_loop(implementation, steps):
    arrays = case(steps)
    for found, expected in zip(run(implementation, *arrays), loop(*arrays), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("batch, features", [(1, 1), (3, 130)])
def test_auto_and_odd_shapes(batch, features):
    arrays = case(13, batch, features, seed=1)
    for found, expected in zip(run("auto", *arrays), loop(*arrays), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("implementation", FORMS)
def test_half_precision_is_summed_in_float32(implementation):
    arrays = case(65, seed=2)
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in arrays]
    found, expected = (
        run(implementation, *arrays, dtype=jnp.bfloat16),
        loop(*rounded[:4], arrays[4]),
    )
    assert [a.dtype for a in found] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=1 / 128, atol=1e-2)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_no_steps_and_no_initial_state(implementation):
    start = jnp.asarray(case(3)[2], jnp.float32)
    states, final = gated_recurrence(
        jnp.zeros((2, 0, 3)), jnp.zeros((2, 0, 3)), start, implementation=implementation
    )
    assert states.shape == (2, 0, 3)
    np.testing.assert_array_equal(final, start)
    gates, candidates = (jnp.asarray(a, jnp.float32) for a in case(9)[:2])
    without = gated_recurrence(gates, candidates, implementation=implementation)
    for one, other in zip(
        without,
        gated_recurrence(gates, candidates, jnp.zeros((2, 3)), implementation=implementation),
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", FORMS)
def test_in_pieces_and_in_single_steps(implementation):
    """Going on from a final state gives what one call over everything gives."""
    gates, candidates, start = (jnp.asarray(a, jnp.float32) for a in case(21)[:3])
    states, final = gated_recurrence(gates, candidates, start, implementation=implementation)
    first, middle = gated_recurrence(
        gates[:, :8], candidates[:, :8], start, implementation=implementation
    )
    second, last = gated_recurrence(
        gates[:, 8:], candidates[:, 8:], middle, implementation=implementation
    )
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), states, atol=1e-5)
    np.testing.assert_allclose(last, final, atol=1e-5)
    state = start
    for t in range(21):
        state = gated_recurrence_step(gates[:, t], candidates[:, t], state)
        np.testing.assert_allclose(state, states[:, t], atol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_backward_memory_grows_no_faster_than_time(implementation):
    def temporaries(steps):
        shape = jax.ShapeDtypeStruct((1, steps, 64), jnp.float32)
        start = jax.ShapeDtypeStruct((1, 64), jnp.float32)
        gradient = jax.grad(
            lambda *args: gated_recurrence(*args, implementation=implementation)[0].sum(),
            argnums=(0, 1, 2),
        )
        return (
            jax.jit(gradient)
            .lower(shape, shape, start)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporaries(4096) < 1.25 * 4 * temporaries(1024)


def test_method_by_platform():
    assert (
        pick_implementation(4096, platform="cpu") == "sequential"
        and pick_implementation(4096, platform="tpu") == "chunked"
    )
    assert (
        pick_implementation(1, platform="gpu") == "sequential"
        and pick_implementation(5, "associative") == "associative"
    )


def test_a_length_that_is_only_a_name():
    """Exported programs have one: a TPU's recurrence in chunks, padded to whole ones, and what
    'auto' compiles to here.
    """
    gates, candidates, start = (jnp.asarray(a, jnp.float32) for a in case(70)[:3])
    shapes = [
        jax.ShapeDtypeStruct(
            jax.export.symbolic_shape("2, t, 3", constraints=["t >= 1"]), jnp.float32
        )
    ] * 2

    def both(*given):
        return [
            gated_recurrence(*given, implementation=implementation)
            for implementation in ("chunked", "auto")
        ]

    program = jax.export.export(jax.jit(both), platforms=["cpu", "tpu", "cuda"])
    call = program(*shapes, jax.ShapeDtypeStruct((2, 3), jnp.float32)).call
    for steps in (1, 70):
        expected = gated_recurrence(
            gates[:, :steps], candidates[:, :steps], start, implementation="associative"
        )
        for found in call(gates[:, :steps], candidates[:, :steps], start):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, atol=1e-5), tuple(found), expected
            )


def test_errors():
    x = jnp.zeros((2, 3, 4))
    with pytest.raises(
        InputError, match=r"one shape \(batch, time, features\), found \[2, 3, 4\] and \[2, 3, 5\]"
    ):
        gated_recurrence(x, jnp.zeros((2, 3, 5)))
    with pytest.raises(InputError, match=r"expected initial_state \[2, 4\], found \[4\]"):
        gated_recurrence(x, x, jnp.zeros(4))
    with pytest.raises(InputError, match="gated_recurrence: implementation"):
        gated_recurrence(x, x, implementation="parallel")
