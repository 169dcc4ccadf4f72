"""`ops.delta`: the gated delta rule against its published equation in float64, every form and every
gradient, decoding, odd lengths and empty edges.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops import delta
from quweit_jax.ops.delta import gated_delta, gated_delta_step
from tests.compiled import quick_jit

BATCH, HEADS, KEY, VALUE = 2, 3, 5, 4


def inputs(steps, dtype=np.float32, seed=0):
    """q, k, v, log_gate, rate and a state; keys of length 1."""
    draw = np.random.default_rng(seed)
    q, k = (draw.normal(size=(BATCH, steps, HEADS, KEY)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = draw.normal(size=(BATCH, steps, HEADS, VALUE))
    log_gate = -draw.exponential(0.3, (BATCH, steps, HEADS))
    rate = draw.uniform(0, 1, (BATCH, steps, HEADS))
    state = draw.normal(size=(BATCH, HEADS, KEY, VALUE))
    return tuple(x.astype(dtype) for x in (q, k, v, log_gate, rate, state))


def reference(q, k, v, log_gate, rate, state):
    """S_t = S_{t-1} (a (1 - b k k^T)) + b v k^T, as published: values in rows; o_t = S_t q_t."""
    read = np.zeros(v.shape)
    final = np.zeros((BATCH, HEADS, KEY, VALUE))
    for b in range(BATCH):
        for h in range(HEADS):
            s = state[b, h].astype(np.float64).T
            for t in range(v.shape[1]):
                key, a, r = k[b, t, h], np.exp(log_gate[b, t, h]), rate[b, t, h]
                s = s @ (a * (np.eye(KEY) - r * np.outer(key, key)))
                s = s + r * np.outer(v[b, t, h], key)
                read[b, t, h] = s @ q[b, t, h]
            final[b, h] = s.T
    return read, final


@pytest.mark.parametrize("implementation", ["sequential", "chunked"])
@pytest.mark.parametrize(("steps", "chunk"), [(1, 4), (7, 4), (12, 4), (13, 64), (40, 8)])
def test_it_is_the_published_equation(implementation, steps, chunk):
    given = inputs(steps)
    run = quick_jit(lambda *x: gated_delta(*x, implementation=implementation, chunk=chunk))
    for found, expected in zip(run(*given), reference(*given)):
        np.testing.assert_allclose(found, expected, atol=3e-5)


def test_gradients_are_exact():
    """Of chunks, of every argument, in float64: those of the loop over time, and these are those of
    differences.
    """
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, inputs(11, np.float64)))
        weights = tuple(map(jnp.asarray, (given[2] + 1, given[5] - 1)))

        def loss(implementation, *x):
            read, state = gated_delta(*x, implementation=implementation, chunk=4)
            return jnp.sin(read * weights[0]).sum() + (state * weights[1]).sum()

        names = range(1, 7)
        loop, chunks = (
            jax.jit(jax.grad(loss, names), static_argnums=0)(kind, *given)
            for kind in ("sequential", "chunked")
        )
        for one, other in zip(loop, chunks, strict=True):
            assert one.dtype == jnp.float64
            np.testing.assert_allclose(other, one, atol=1e-11)
        ahead = jax.jit(loss, static_argnums=0)
        for i in range(6):
            way = jnp.asarray(np.random.default_rng(i).normal(size=given[i].shape))
            moved = [
                tuple(x + sign * 1e-6 * way if j == i else x for j, x in enumerate(given))
                for sign in (1, -1)
            ]
            slope = (ahead("chunked", *moved[0]) - ahead("chunked", *moved[1])) / 2e-6
            np.testing.assert_allclose((chunks[i] * way).sum(), slope, rtol=1e-6)


def test_strong_forgetting_overflows_nothing():
    """Gates of e^-200 a step, whose inverse no float32 holds: values and gradients are numbers."""
    q, k, v, log_gate, rate, state = inputs(20)
    log_gate = log_gate * 0 - 200

    def total(gate):
        return gated_delta(q, k, v, gate, rate, state, implementation="chunked", chunk=8)[0].sum()

    found, slope = quick_jit(jax.value_and_grad(total))(jnp.asarray(log_gate))
    expected = reference(q, k, v, log_gate, rate, state)[0]
    np.testing.assert_allclose(found, expected.sum(), atol=1e-4)
    assert np.isfinite(slope).all()


def test_decoding_is_the_parallel_form_and_continues_a_state():
    *given, state = inputs(9)
    chunks = quick_jit(lambda *x: gated_delta(*x, implementation="chunked", chunk=4))
    whole, final = chunks(*given, state)
    first, middle = quick_jit(gated_delta)(*(x[:, :5] for x in given), state)
    held, reads, step = middle, [], quick_jit(gated_delta_step)
    for t in range(5, 9):
        read, held = step(*(x[:, t] for x in given), held)
        reads.append(read)
    np.testing.assert_allclose(first, whole[:, :5], atol=1e-5)
    np.testing.assert_allclose(np.stack(reads, 1), whole[:, 5:], atol=1e-5)
    np.testing.assert_allclose(held, final, atol=1e-5)


def test_steps_of_no_gate_and_no_rate_change_nothing():
    q, k, v, log_gate, rate, state = inputs(6)
    _, final = quick_jit(gated_delta)(q, k, v, log_gate * 0, rate * 0, state)
    np.testing.assert_allclose(final, state, atol=1e-6)


def test_a_key_written_again_is_overwritten():
    """What a sum of outer products would keep beside the new value is gone."""
    k = np.zeros((1, 2, 1, 3), np.float32)
    k[..., 0] = 1
    v = np.arange(8, dtype=np.float32).reshape(1, 2, 1, 4)
    zero, one = np.zeros((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32)
    read, _ = gated_delta(k, k, v, zero, one)
    np.testing.assert_array_equal(read, v)


def test_half_precision_and_nothing():
    given = inputs(20)[:5]
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in given)
    read, state = quick_jit(lambda *x: gated_delta(*x, implementation="chunked", chunk=8))(*half)
    assert read.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    wide = tuple(np.asarray(x, np.float32) for x in half)
    exact = reference(*wide, np.zeros((BATCH, HEADS, KEY, VALUE)))[0]
    np.testing.assert_allclose(np.asarray(read, np.float32), exact, atol=0.02)
    read, state = gated_delta(*(x[:, :0] for x in given))
    assert read.shape == (BATCH, 0, HEADS, VALUE) and not np.asarray(state).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: np.zeros((2, 6, 3, 4))}, "expected q and k"),
        ({3: np.zeros((2, 6))}, "log_gate and rate"),
        ({5: np.zeros((2, 3, 4, 5))}, "and a state"),
    ],
    ids=str,
)
def test_shapes_that_do_not_belong_together(change, said):
    given = [change.get(i, x) for i, x in enumerate(inputs(6))]
    with pytest.raises(InputError, match=said):
        gated_delta(*given)


def test_unknown_implementations_and_chunks():
    with pytest.raises(InputError, match="implementation"):
        gated_delta(*inputs(6), implementation="chunk")
    with pytest.raises(InputError, match="chunk: expected"):
        gated_delta(*inputs(6), chunk=0)


@pytest.mark.parametrize(
    ("size", "width", "more"), [(1, 1, ()), (5, 3, (2,)), (64, 7, (2, 3)), (4, 0, ())]
)
def test_rows_one_by_one_solve_what_the_library_solves(size, width, more):
    """Values and both gradients, of systems whose other half is not read."""
    draw = np.random.default_rng(size)
    system = draw.normal(size=(*more, size, size)) / size**0.5
    sides, weights = (draw.normal(size=(*more, size, width)) for _ in range(2))

    def weighed(solve):
        return jax.value_and_grad(lambda *x: (weights * solve(*x)).sum(), (0, 1))(system, sides)

    with jax.enable_x64(True):
        found, expected = weighed(delta._substituted), weighed(delta._solved)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, expected)


def test_a_step_on_a_cpu_calls_no_library_that_waits_for_its_threads():
    """A step of several blocks that called LAPACK could wait for itself for ever."""
    given = inputs(12)
    step = jax.grad(lambda *x: gated_delta(*x, implementation="chunked", chunk=4)[0].sum())
    compiled = str(jax.jit(step).lower(*given).compile().as_text())
    assert "lapack" not in compiled and "triangular-solve" not in compiled
    waiting = jax.jit(delta._solved).lower(np.eye(4), np.eye(4)).compile()
    assert "lapack" in str(waiting.as_text())
