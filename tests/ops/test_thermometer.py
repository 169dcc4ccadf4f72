"""`ops.thermometer` against the golden cases and the naive reference: fits, bits, and the surrogate
gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops import thermometer
from tests.compiled import quick_jit
from tests.ops import naive
from tests.ops.gradients import value_and_vjp

KINDS = ("uniform", "gaussian", "distributive")


@pytest.mark.parametrize("scope", ["feature", "global"])
@pytest.mark.parametrize("kind", KINDS)
def test_golden(shared, kind, scope):
    golden = np.load(shared / "golden" / "dwn.npz")
    name = f"thermometer_{kind}_{scope}"
    thresholds = thermometer.FITS[kind](golden[f"{name}/fit"], 5, per_feature=scope == "feature")
    assert thresholds.shape == golden[f"{name}/thresholds"].shape
    np.testing.assert_allclose(thresholds, golden[f"{name}/thresholds"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(
        thermometer.encode(golden[f"{name}/x"], golden[f"{name}/thresholds"]),
        golden[f"{name}/bits"],
    )


@pytest.mark.parametrize("per_feature", [True, False])
@pytest.mark.parametrize(("examples", "features", "bits"), [(30, 3, 4), (7, 1, 1), (2, 4, 9)])
@pytest.mark.parametrize("kind", KINDS)
def test_fits(kind, examples, features, bits, per_feature):
    x = np.random.default_rng(0).normal(3, 2, (examples, features)).astype(np.float32)
    found = quick_jit(lambda x: thermometer.FITS[kind](x, bits, per_feature=per_feature))(x)
    expected = naive.thresholds(kind, x, bits, per_feature)
    np.testing.assert_allclose(np.atleast_2d(found), expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("kind", KINDS)
def test_fits_take_whole_numbers_and_one_value(kind):
    x = np.asarray([[3, 8], [3, 5], [3, 1]], np.uint8)
    found = np.asarray(thermometer.FITS[kind](x, 2))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, naive.thresholds(kind, x, 2, True), rtol=1e-5)
    np.testing.assert_allclose(found[0], 3)


def test_normal_quantiles_are_symmetric():
    np.testing.assert_allclose(
        thermometer.normal_quantiles(3), [-0.6744898, 0, 0.6744898], atol=1e-6
    )
    np.testing.assert_allclose(thermometer.normal_quantiles(1), [0], atol=1e-7)


def encoder_case(kind, tokens=5, features=3, bits=4):
    draw = np.random.default_rng(1)
    x = draw.normal(size=(tokens, features)).astype(np.float32)
    shape = {"feature": (features, bits), "row": (1, bits), "flat": (bits,)}[kind]
    thresholds = np.sort(draw.normal(size=shape).astype(np.float32), axis=-1)
    x.reshape(-1)[:1] = thresholds.reshape(-1)[0]  # a tie: the comparison is strict
    return x, thresholds, draw.normal(size=(tokens, features, bits)).astype(np.float32)


@pytest.mark.parametrize("window", [0.3, 2.5])
@pytest.mark.parametrize("shape", thermometer.WINDOWS)
@pytest.mark.parametrize("kind", ["feature", "row", "flat"])
def test_encode_and_its_surrogate_gradients(kind, shape, window):
    x, thresholds, grad = encoder_case(kind)
    out, *grads = value_and_vjp(
        lambda x, t: thermometer.encode_ste(x, t, window=window, shape=shape), (x, thresholds), grad
    )
    expected = naive.encode(x, thresholds)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(thermometer.encode(x, thresholds), expected)
    for found, wanted in zip(grads, naive.encode_gradients(x, thresholds, grad, window, shape)):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", thermometer.WINDOWS)
def test_windows_have_unit_area(shape):
    x = np.linspace(-3, 3, 6001, dtype=np.float32)[:, None]
    slope = quick_jit(
        jax.grad(
            lambda x: thermometer.encode_ste(x, jnp.asarray([0.25]), window=0.7, shape=shape).sum()
        )
    )(x)
    assert float(slope.sum()) * 0.001 == pytest.approx(1, rel=1e-3)
    assert np.asarray(slope)[np.abs(x - 0.25) > 0.7001].max() == 0


def test_the_window_can_be_named_alone():
    x, thresholds, grad = encoder_case("flat")
    named = value_and_vjp(
        lambda x: thermometer.encode_ste(x, thresholds, window="boxcar"), (x,), grad
    )
    np.testing.assert_array_equal(
        named[1],
        value_and_vjp(lambda x: thermometer.encode_ste(x, thresholds, shape="boxcar"), (x,), grad)[
            1
        ],
    )


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions_and_bfloat16(lead):
    x, thresholds, grad = encoder_case("feature", tokens=int(np.prod(lead)))
    x, grad = x.astype(jnp.bfloat16), grad.astype(jnp.bfloat16)
    out, grad_x, grad_thresholds = value_and_vjp(
        thermometer.encode_ste, (x.reshape(*lead, 3), thresholds), grad.reshape(*lead, 3, 4)
    )
    assert out.shape == (*lead, 3, 4) and (out.dtype, grad_x.dtype, grad_thresholds.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        jnp.float32,
    )
    np.testing.assert_array_equal(
        np.asarray(out, np.float32).reshape(-1, 3, 4),
        naive.encode(np.asarray(x, np.float32), thresholds),
    )
    expected = naive.encode_gradients(
        np.asarray(x, np.float32), thresholds, np.asarray(grad, np.float32), 1.0, "triangular"
    )
    np.testing.assert_allclose(
        np.asarray(grad_x, np.float32).reshape(-1, 3), expected[0], rtol=0.02, atol=0.02
    )
    np.testing.assert_allclose(grad_thresholds, expected[1], rtol=1e-4, atol=1e-4)


def test_encode_whole_numbers():
    out = thermometer.encode(np.asarray([[1, 2]], np.uint8), np.asarray([1.0, 1.5], np.float32))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, [[[0, 0], [1, 1]]])


def test_transforms_agree():
    x, thresholds, grad = encoder_case("feature")

    def loss(x, thresholds, grad):
        return jnp.sum(thermometer.encode_ste(x, thresholds) * grad)

    gradients = jax.grad(loss, (0, 1))
    whole = quick_jit(gradients)(x, thresholds, grad)
    rows = quick_jit(jax.vmap(gradients, (0, None, 0)))(x, thresholds, grad)
    remembered = quick_jit(jax.grad(jax.checkpoint(loss), (0, 1)))(x, thresholds, grad)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(rows[0], whole[0])
    close(rows[1].sum(0), whole[1])
    jax.tree.map(close, remembered, whole)


X = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: thermometer.uniform_thresholds(X[0], 2),
            r"uniform_thresholds: expected at least one example, x \(N, F\), found \[3\]",
        ),
        (
            lambda: thermometer.gaussian_thresholds(X[:0], 2),
            r"gaussian_thresholds: expected at least one example.*found \[0, 3\]",
        ),
        (
            lambda: thermometer.distributive_thresholds(X, 0),
            r"distributive_thresholds: expected num_bits >= 1, found 0",
        ),
        (
            lambda: thermometer.encode(X, np.zeros((2, 5))),
            r"encode: expected thresholds .*found \[2, 5\] for \[4, 3\]",
        ),
        (
            lambda: thermometer.encode_ste(X, np.float32(0)),
            r"encode_ste: expected thresholds .*found \[\]",
        ),
        (
            lambda: thermometer.encode_ste(X, np.zeros(2, np.float32), window=0),
            "window is a half-width and must be positive and finite, found 0",
        ),
        (
            lambda: thermometer.encode_ste(X, np.zeros(2, np.float32), shape="triangle"),
            r"encode_ste: shape: .*Did you mean 'triangular'\?",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
