"""I-ViT's arithmetic: the golden outputs of the published program, Python integers, and gradients
of the real functions.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops import integer, integer_norm
from tests.compiled import quick_jit
from tests.ops import published
from tests.ops.gradients import value_and_vjp


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "ivit_ops.npz") as file:
        return dict(file)


def assert_golden(found, expected):
    """Every element to 1e-6 of the range."""
    assert np.abs(np.asarray(found) - expected).max() <= 1e-6 * (expected.max() - expected.min())


@pytest.mark.parametrize("case", [0, 1])
def test_golden_float_door(golden, case):
    def get(name):
        return golden[name.replace("#", str(case))]

    found, scale = published.shiftmax(
        get("shiftmax#/x_int"), get("shiftmax#/scale"), bits=int(get("shiftmax#/bits").item())
    )
    assert_golden(found, get("shiftmax#/out"))
    assert scale == get("shiftmax#/out_scale")
    found, scale = published.shift_gelu(get("shiftgelu#/x_int"), get("shiftgelu#/scale"))
    assert_golden(found, get("shiftgelu#/out"))
    np.testing.assert_allclose(scale, get("shiftgelu#/out_scale"), rtol=1e-6)
    names = ("x_int", "scale", "weight", "bias")
    found, scale = published.int_layer_norm(*(jnp.asarray(get(f"layernorm#/{n}")) for n in names))
    assert_golden(found, get("layernorm#/out"))
    np.testing.assert_allclose(scale, get("layernorm#/out_scale"), rtol=1e-6)
    x, scale, weight, bias = (jnp.asarray(get(f"linear#/{n}")) for n in names)
    found, scale = published.int_linear(x, scale, weight.T, bias)
    assert_golden(found, get("linear#/out"))
    np.testing.assert_allclose(scale, get("linear#/out_scale"), rtol=1e-6)
    for name in ("requant#", "requant_residual#"):
        residual = (
            {n: get(f"{name}/{n}") for n in ("identity", "identity_scale")}
            if "residual" in name
            else {}
        )
        bits, scale = (
            int(get(f"{name}/bits").item()),
            integer.symmetric_scale(
                get(f"{name}/min"), get(f"{name}/max"), int(get(f"{name}/bits").item())
            ),
        )
        np.testing.assert_allclose(scale, get(f"{name}/out_scale").item(), rtol=1e-6)
        found = published.requantize(
            get(f"{name}/x"), get(f"{name}/scale"), get(f"{name}/out_scale"), bits=bits, **residual
        )
        assert_golden(found, get(f"{name}/out"))


@pytest.mark.parametrize("case", [0, 1])
def test_golden_integer_door(golden, case):
    """The functions without exponentials give the same integers; those with are compared with
    Python integers below.
    """

    def ints(values, scale):
        return jnp.asarray(np.round(values / scale), jnp.int32)

    g = {
        key.split("/")[0][:-1] + "/" + key.split("/")[1]: value
        for key, value in golden.items()
        if key.split("/")[0].endswith(str(case))
    }
    found, scale = published.int_layer_norm(
        ints(g["layernorm/x_int"], 1),
        g["layernorm/scale"],
        g["layernorm/weight"],
        g["layernorm/bias"],
    )
    assert found.dtype == jnp.int32
    assert_golden(found * scale, g["layernorm/out"])
    found, scale = published.int_linear(
        ints(g["linear/x_int"], 1), g["linear/scale"], g["linear/weight"].T, g["linear/bias"]
    )
    assert found.dtype == jnp.int32
    assert_golden(found * scale, g["linear/out"])
    x, identity = (
        ints(g["requant_residual/x"], g["requant_residual/scale"]),
        ints(g["requant_residual/identity"], g["requant_residual/identity_scale"]),
    )
    scales = {"identity": identity, "identity_scale": g["requant_residual/identity_scale"]}
    found = published.requantize(
        x, g["requant_residual/scale"], g["requant_residual/out_scale"], bits=16, **scales
    )
    assert found.dtype == jnp.int32
    assert_golden(found * g["requant_residual/out_scale"], g["requant_residual/out"])


def python_exp(x, inverse, shifts):
    """ALGORITHMS section 3 in Python integers (halves are kept by doubling)."""
    x = max(x + x // 2 - x // 16, -shifts * inverse)
    halvings = math.floor(x / -inverse)
    twice = x + halvings * inverse + 2 * inverse
    power = shifts - halvings
    return twice * 2**power // 2 if power >= 0 else twice // 2 ** (1 - power)


def python_shiftmax(row, inverse, bits):
    exponentials = [python_exp(x - max(row), inverse, 15) for x in row]
    factor = 2**31 // min(sum(exponentials), 2**31 - 1)
    return [e * factor >> (32 - bits) for e in exponentials]


def python_gelu(row, inverse):
    shifts = min(23, 31 - inverse.bit_length())
    other = min(python_exp(-max(row), inverse, shifts), 2**31 - 1)
    out = []
    for x in row:
        numerator = python_exp(x - max(row), inverse, shifts)
        out.append(x * (numerator * (2**31 // min(numerator + other, 2**31 - 1)) >> 24))
    return out


@pytest.mark.parametrize("scale", [0.5, 0.03, 0.017, 0.004])
@pytest.mark.parametrize("width", [1, 2, 65])
def test_exponentials_in_python_integers(scale, width):
    rng = np.random.default_rng(width)
    x = rng.integers(-128, 128, (20, width)).astype(np.int32)
    x[:4] = -np.abs(x[:4]) - 1 + (np.abs(x[:4]) == 128)  # rows with a negative maximum
    inverse = int(integer.inverse_scale(jnp.float32(scale)))
    for bits in (8, 16):
        found = quick_jit(lambda x, s, bits=bits: published.shiftmax(x, s, bits=bits)[0])(
            x, np.float32(scale)
        )
        assert found.dtype == jnp.int32 and found.tolist() == [
            python_shiftmax(row, inverse, bits) for row in x.tolist()
        ]
    inverse = int(integer.inverse_scale(jnp.float32(scale) * integer.GELU_SLOPE))
    found = quick_jit(lambda x, s: published.shift_gelu(x, s)[0])(x, np.float32(scale))
    assert found.dtype == jnp.int32 and found.tolist() == [
        python_gelu(row, inverse) for row in x.tolist()
    ]


@pytest.mark.parametrize("scale", [0.02, 0.05])
def test_exponentials_are_close_to_the_real_functions(scale):
    x = np.random.default_rng(0).integers(-128, 128, (50, 17)).astype(np.int32)
    probabilities, unit = published.shiftmax(x, scale, bits=16)
    assert np.abs(probabilities * unit - jax.nn.softmax(x * scale, -1)).max() < 0.05
    values, unit = published.shift_gelu(x, scale)
    assert np.abs(values * unit - integer.gelu_shadow(x * scale)).max() < 0.15 * 128 * scale
    # Beyond 23 halvings both of its exponentials are at their floor, and the published sigmoid is a
    # half: from about 9.4 on.
    values, unit = published.shift_gelu(np.asarray([[124, -118]], np.int32), 0.1)
    assert values[0, 1] * unit[0] == pytest.approx(-5.9, abs=0.1)


@pytest.mark.parametrize("width", [1, 2, 3, 48, 193])
@pytest.mark.parametrize("reach", [3, 500, 32767])
def test_layer_norm_in_python_integers(width, reach):
    rng = np.random.default_rng(width)
    x = rng.integers(-reach, reach + 1, (5, width)).astype(np.int32)
    weight, bias = (
        rng.normal(1, 0.2, width).astype(np.float32),
        rng.normal(0, 0.5, width).astype(np.float32),
    )
    bias_int, halvings, scale = (
        np.asarray(a) for a in integer_norm.layer_norm_constants(weight, bias)
    )
    assert (halvings == 0).all()
    expected = []
    for row in x.tolist():
        mean = round(sum(row) / width)
        root = 2**16
        for _ in range(10):
            root = (root + sum((v - mean) ** 2 for v in row) // root) // 2
        expected.append(
            [((v - mean) * (2**31 // root) >> 1) + int(b) for v, b in zip(row, bias_int)]
        )
    found, _ = quick_jit(published.int_layer_norm)(x, np.float32(1e-3), weight, bias)
    assert found.tolist() == expected
    np.testing.assert_allclose(scale, np.sqrt(width) / 2**30 * weight, rtol=1e-6)


def test_layer_norm_with_a_bias_far_above_its_weight():
    """Trained models have dead channels, whose bias over weight would not fit 32 bits."""
    x = np.random.default_rng(0).integers(-3000, 3000, (4, 16)).astype(np.int32)
    weight, bias = np.full(16, 1.0, np.float32), np.zeros(16, np.float32)
    weight[:3], bias[:3] = [0.001, 0.0, -0.002], [0.5, 0.25, 0.3]
    found, scale = quick_jit(published.int_layer_norm)(x, np.float32(1e-3), weight, bias)
    np.testing.assert_allclose(
        found * scale, integer_norm.layer_norm_shadow(x * 1e-3, weight, bias), atol=2e-3
    )


def test_empty_and_single():
    for shape in ((0, 4), (1, 1)):
        x = np.zeros(shape, np.int32)
        assert published.shiftmax(x, 0.1)[0].shape == shape
        assert published.shift_gelu(x, 0.1)[0].shape == shape
        assert (
            published.int_layer_norm(
                x, 0.1, np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
            )[0].shape
            == shape
        )
        assert published.requantize(x, 0.1, 0.2, bits=8).shape == shape
        assert published.int_linear(x, 0.1, np.ones((shape[1], 3), np.float32))[0].shape == (
            shape[0],
            3,
        )


def test_int8_products_are_those_of_floats():
    rng = np.random.default_rng(0)
    x, weight = rng.integers(-128, 128, (3, 5, 40)), rng.integers(-127, 128, (40, 7))
    exact = integer.matmul_units(jnp.asarray(x, jnp.int8), jnp.asarray(weight, jnp.int8))
    assert exact.dtype == jnp.int32 and (exact == x @ weight).all()
    assert (
        integer.matmul_units(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.int32))
        == x @ weight
    ).all()


def test_gradients_are_those_of_the_real_functions():
    rng = np.random.default_rng(3)
    scale = np.float32(0.05)
    x = rng.integers(-100, 100, (4, 9)).astype(np.float32)
    grad = rng.normal(size=(4, 9)).astype(np.float32)
    weight, bias = rng.normal(1, 0.3, 9).astype(np.float32), rng.normal(0, 1, 9).astype(np.float32)
    pairs = [
        (lambda x: published.shiftmax(x, scale)[0], lambda x: jax.nn.softmax(x * scale, -1), (x,)),
        (
            lambda x: published.shift_gelu(x, scale)[0],
            lambda x: integer.gelu_shadow(x * scale),
            (x,),
        ),
        (
            lambda x, w, b: published.int_layer_norm(x, scale, w, b)[0],
            lambda x, w, b: integer_norm.layer_norm_shadow(x * scale, w, b),
            (x, weight, bias),
        ),
    ]
    for ours, real, inputs in pairs:
        _, *found = value_and_vjp(ours, inputs, grad)
        _, *expected = value_and_vjp(real, inputs, grad)
        for f, e in zip(found, expected):
            np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-6)


def test_linear_gradients():
    rng = np.random.default_rng(4)
    x, weight, bias = (
        rng.integers(-128, 128, (6, 5)).astype(np.float32),
        rng.normal(size=(5, 3)).astype(np.float32),
        rng.normal(size=3).astype(np.float32),
    )
    grad, scale = rng.normal(size=(6, 3)).astype(np.float32), np.float32(0.01)
    out, grad_x, grad_weight, grad_bias = value_and_vjp(
        lambda x, w, b: published.int_linear(x, scale, w, b)[0], (x, weight, bias), grad
    )
    rounded, weight_scale = integer.quantize_weights(weight)
    np.testing.assert_allclose(out, x * scale @ (rounded * weight_scale) + bias, atol=1e-3)
    np.testing.assert_allclose(
        grad_x, grad @ (rounded * weight_scale).T * scale, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(grad_weight, (x * scale).T @ grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grad_bias, grad.sum(0), rtol=1e-5)


def test_requantize_gradient_stops_where_it_clamps():
    x = np.asarray([-3.0, -0.5, 0.5, 3.0], np.float32)
    scale = np.float32(1 / 64)
    out, grad = value_and_vjp(
        lambda x: published.requantize(x, np.float32(2**-10), scale, bits=8),
        (x,),
        np.ones(4, np.float32),
    )
    assert out.tolist() == [-2.0, -0.5, 0.5, 127 / 64]
    assert grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_quantize_weights_is_symmetric_by_output():
    weight = np.asarray([[1.0, -0.2], [-0.5, 0.1]], np.float32)
    ints, scale = integer.quantize_weights(weight)
    assert ints.tolist() == [[127, -127], [-64, 64]] and np.allclose(scale, [1 / 127, 0.2 / 127])
    assert integer.quantize_weights(np.zeros((2, 2), np.float32))[0].tolist() == [[0, 0], [0, 0]]


def test_named_errors():
    with pytest.raises(InputError, match="identity and identity_scale belong together"):
        published.requantize(
            np.zeros(2, np.int32), 1.0, 1.0, bits=8, identity=np.zeros(2, np.int32)
        )
    with pytest.raises(InputError, match="bits must be 2 to 31, found 1"):
        published.shiftmax(np.zeros(2, np.int32), 1.0, bits=1)
