"""`ops.sums` against the naive reference: group and conditional sums, the spectral penalty,
int8 rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops import sums
from tests.compiled import quick_jit
from tests.ops import naive
from tests.ops.gradients import value_and_vjp

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def draw_bits(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("tau", [1.0, 3.3])
@pytest.mark.parametrize(("num_bits", "groups"), [(12, 3), (10, 4), (3, 5), (1, 1), (7, 7), (5, 1)])
def test_group_sum(num_bits, groups, tau):
    bits, grad = draw_bits(4, num_bits), normal(4, groups)
    out, grad_bits = value_and_vjp(lambda b: sums.group_sum(b, groups, tau=tau), (bits,), grad)
    close(out, naive.group_sum(bits, groups, tau))
    close(grad_bits, naive.group_sum_gradient(grad, num_bits, tau))


def test_group_sum_leading_dimensions_and_dtypes():
    bits = draw_bits(6, 9)
    expected = naive.group_sum(bits, 2, 1.0)
    close(sums.group_sum(bits.reshape(2, 3, 9), 2).reshape(6, 2), expected)
    close(sums.group_sum(bits[0], 2), expected[0])
    assert sums.group_sum(bits[:0], 2).shape == (0, 2)
    for dtype, out_dtype in ((bool, "float32"), (np.int8, "float32"), (jnp.bfloat16, "bfloat16")):
        out = sums.group_sum(jnp.asarray(bits, dtype), 2)
        assert out.dtype == out_dtype
        np.testing.assert_array_equal(np.asarray(out, np.float32), expected)
    # 300 bits of int8 would overflow int8.
    np.testing.assert_array_equal(sums.group_sum(np.ones((1, 300), np.int8), 1), [[300]])


CONDITIONAL_SUMS = {
    "dense": ((6, 4), True),
    "dense without bias": ((6, 4), False),
    "dense to one output": ((6, 1), True),
    "dense from one bit": ((1, 4), True),
    "grouped": ((6,), True),
    "grouped one a bit": ((4,), True),
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", CONDITIONAL_SUMS)
def test_conditional_sum(name, signed):
    shape, with_bias = CONDITIONAL_SUMS[name]
    outputs = shape[1] if len(shape) == 2 else {6: 3, 4: 4}[shape[0]]
    bits, vectors, grad = draw_bits(5, shape[0]), normal(*shape), normal(5, outputs, seed=2)
    bits = 2 * bits - 1 if signed else bits
    bias = normal(outputs, seed=3) if with_bias else None
    out, *grads = value_and_vjp(sums.conditional_sum, (bits, vectors, bias), grad)
    close(out, naive.conditional_sum(bits, vectors, bias, outputs))
    expected = naive.conditional_sum_gradients(bits, vectors, grad)
    for found, wanted in zip(grads, expected if with_bias else (*expected[:2], None)):
        assert (found is None) == (wanted is None)
        if found is not None:
            close(found, wanted)


def test_conditional_sum_shapes_and_dtypes():
    bits, vectors, bias = draw_bits(6, 4), normal(4, 3), normal(3)
    expected = naive.conditional_sum(bits, vectors, bias, 3)
    close(sums.conditional_sum(bits.reshape(2, 3, 4), vectors, bias).reshape(6, 3), expected)
    close(sums.conditional_sum(bits[0], vectors, bias), expected[0])
    close(sums.conditional_sum(bits.astype(bool), vectors, bias), expected)
    assert sums.conditional_sum(bits[:0], vectors, bias).shape == (0, 3)
    assert (
        sums.conditional_sum(bits, jnp.asarray(vectors, jnp.bfloat16), bias).dtype == jnp.bfloat16
    )
    close(
        sums.conditional_sum_feature_major(bits.T, vectors),
        naive.conditional_sum(bits, vectors, None, 3),
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_walsh_hadamard(n):
    tables = normal(5, 2**n)
    transform = quick_jit(sums.walsh_hadamard)
    close(transform(tables), naive.walsh_hadamard(tables))
    close(transform(tables.reshape(5, 1, -1))[:, 0], naive.walsh_hadamard(tables))


@pytest.mark.parametrize("n", [1, 3, 4])
def test_spectral_penalty_and_its_gradient(n):
    tables = normal(3, 2**n)
    coefficients = naive.walsh_hadamard(tables)
    squares = np.asarray(
        [
            sum(
                coefficients[j, s] ** 2 for j in range(3) for s in range(2**n) if s.bit_count() == k
            )
            for k in range(n + 1)
        ]
    )
    run = quick_jit(jax.value_and_grad(sums.spectral_penalty))
    plain, gradient = run(tables)
    close(plain, squares.sum())
    close(gradient, 2 * tables / 2**n)
    close(run(tables, np.ones(n + 1, np.float32))[0], plain)  # Parseval
    weights = np.arange(1, n + 2, dtype=np.float32) ** 2
    weighted, gradient = run(tables, weights)
    close(weighted, squares @ weights)
    by_degree = np.asarray([weights[s.bit_count()] for s in range(2**n)])
    back = (
        naive.walsh_hadamard(coefficients * by_degree) * 2**n
    )  # the transform is its own inverse but for 2**n
    close(gradient, 2 * back / 2**n)


def test_degrees_are_told_apart():
    entries = np.arange(8)
    parity = 1.0 - 2 * (np.bitwise_count(entries.astype(np.uint8)) % 2)
    first = 1.0 - 2 * (entries & 1)
    penalty = quick_jit(jax.vmap(sums.spectral_penalty, (None, 0)))
    for table, degree in ((np.ones(8), 0), (first, 1), (parity, 3)):
        penalties = penalty(np.asarray([table], np.float32), np.eye(4, dtype=np.float32))
        close(penalties, np.eye(4)[degree])


@pytest.mark.parametrize("axis", [0, 1, (0, 1)])
def test_quantize_int8(axis):
    x = normal(5, 4) * np.asarray([1e-3, 1, 0, 1e4], np.float32)
    values, scale = quick_jit(sums.quantize_int8, static_argnums=1)(x, axis)
    largest = np.abs(x).max(axis=axis, keepdims=True)
    assert values.dtype == jnp.int8 and scale.shape == largest.shape
    close(scale, np.where(largest > 0, largest, 1) / 127)
    np.testing.assert_array_equal(values, np.round(x / np.asarray(scale)))
    assert np.abs(np.asarray(values, np.int32)).max() == 127
    fake, gradient = value_and_vjp(lambda x: sums.fake_quantize_int8(x, axis), (x,), x)
    np.testing.assert_allclose(fake, np.asarray(values, np.float32) * np.asarray(scale), rtol=1e-5)
    np.testing.assert_array_equal(gradient, x)  # straight through


def test_quantize_int8_of_nothing_and_of_what_it_can_hold():
    quantize = quick_jit(sums.quantize_int8, static_argnums=1)
    values, scale = quantize(np.zeros((0, 3), np.float32), 0)
    assert values.shape == (0, 3) and np.isfinite(np.asarray(scale)).all()
    whole = np.arange(-127, 128).astype(np.float32)
    np.testing.assert_array_equal(quantize(whole, 0)[0], whole)
    half = quick_jit(sums.fake_quantize_int8, static_argnums=1)(whole.astype(jnp.bfloat16), 0)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(half, np.float32), whole)


BITS = np.zeros((2, 6), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sums.group_sum(np.float32(1), 2),
            r"group_sum: expected bits \(\.\.\., L\) and num_groups >= 1, found \[\] and 2",
        ),
        (lambda: sums.group_sum(BITS, 0), r"group_sum: .*found \[2, 6\] and 0"),
        (
            lambda: sums.group_sum(BITS, 2, tau=0),
            "tau is a temperature and must be positive and finite, found 0",
        ),
        (
            lambda: sums.conditional_sum(BITS, np.zeros((5, 2), np.float32)),
            r"conditional_sum: .*found \[2, 6\] and \[5, 2\]",
        ),
        (
            lambda: sums.conditional_sum(BITS, np.zeros(6, np.float32)),
            r"need a bias \(d,\).*pass jnp.zeros\(d\)",
        ),
        (
            lambda: sums.conditional_sum(BITS, np.zeros((6, 3), np.float32), np.zeros(2)),
            r"bias must be \[3\].*found \[2\]",
        ),
        (
            lambda: sums.conditional_sum(BITS, np.zeros(6, np.float32), np.zeros(4)),
            r"6 grouped bits cannot be shared equally by the \[4\] outputs",
        ),
        (
            lambda: sums.spectral_penalty(np.zeros((2, 6), np.float32)),
            r"tables must be \(\.\.\., 2\*\*n\), found \[2, 6\]",
        ),
        (
            lambda: sums.spectral_penalty(np.zeros((2, 8), np.float32), np.ones(3)),
            r"expected 4 degree weights .*found \[3\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
