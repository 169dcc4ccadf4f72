"""Where numbers or arrays end: wide sums, half precision, and arrays without elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops import (
    integer,
    integer_norm,
    lut,
    packed_lut,
    packed_ternary,
    patches,
    sums,
    ternary,
    thermometer,
    wiring,
)

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("inputs", [1, 132_104])
def test_integer_products_are_exact_up_to_the_limit(inputs):
    x, weight = jnp.full((1, inputs), -128, jnp.int8), jnp.ones((inputs, 1))
    weight_int, _ = integer.quantize_weights(weight)
    assert integer.matmul_units(x, weight_int).tolist() == [[-128 * 127 * inputs]]


def test_integer_products_of_more_inputs_are_refused():
    weight = jax.ShapeDtypeStruct((132_105, 1), jnp.float32)
    x = jax.ShapeDtypeStruct((1, 132_105), jnp.int8)
    for call in (
        lambda: jax.eval_shape(integer.quantize_weights, weight),  # before a layer trains
        lambda: jax.eval_shape(integer.matmul_units, x, weight),
    ):
        with pytest.raises(InputError, match="132,104"):
            call()


def test_integer_norms_are_exact_up_to_the_limit():
    width = integer_norm.MAX_NORM_WIDTH
    x = jnp.full((1, width), 32767, jnp.int32).at[0, ::2].set(-32767)
    bias, halvings, scale = integer_norm.layer_norm_constants(jnp.ones(width), jnp.zeros(width))
    out = integer_norm.layer_norm_units(x, bias, halvings) * scale
    np.testing.assert_allclose(out[0, :2], [-1, 1], rtol=1e-3)
    for call in (
        lambda: integer_norm.layer_norm_constants(jnp.ones(width + 1), jnp.zeros(width + 1)),
        lambda: integer_norm.layer_norm_units(jnp.zeros((1, width + 1), jnp.int32), bias, halvings),
    ):
        with pytest.raises(InputError, match="16,384"):
            call()


@pytest.mark.parametrize("width", [2**16 + 1, 2**18, 2**20])
def test_mean_squares_of_wide_rows(width):
    x = DRAW.normal(size=(2, width)).astype(np.float32)
    x[1] = 1.9999999  # the most a square can be of its power of two
    found = np.asarray(ternary.mean_square(jnp.asarray(x)))[:, 0]
    np.testing.assert_allclose(found, np.square(x, dtype=np.float64).mean(-1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8])
def test_whole_vectors_are_summed_in_32_bits(dtype):
    bits, vectors = np.ones((3, 40), np.float32), np.full((40, 2), 100, dtype)
    expected = np.full((3, 2), 4000)
    for found in (
        sums.conditional_sum(bits, vectors),
        sums.conditional_sum(bits, vectors, np.zeros(2, dtype)),
        sums.conditional_sum_feature_major(jnp.asarray(bits.T), jnp.asarray(vectors)),
        2 * sums.conditional_sum(bits, vectors[:, 0], np.zeros(2, dtype)),
    ):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)


def test_whole_tables_have_the_transform_of_real_ones():
    tables = DRAW.integers(-128, 128, (3, 64)).astype(np.int8)
    real = jnp.asarray(tables, jnp.float32)
    np.testing.assert_allclose(sums.walsh_hadamard(tables), sums.walsh_hadamard(real))
    np.testing.assert_allclose(sums.spectral_penalty(tables), sums.spectral_penalty(real))
    low = np.full((1, 4), -128, np.int8)
    np.testing.assert_allclose(sums.fake_quantize_int8(low, 1), -128 * np.ones((1, 4)))


def test_what_is_not_ternary_is_not_packed():
    for wrong in (jnp.full((4, 1), 2, jnp.int8), jnp.full((4, 1), 0.5), np.full((4, 1), -2)):
        with pytest.raises(InputError, match="pack_ternary"):
            packed_ternary.pack_ternary(wrong)
    inside = jax.jit(packed_ternary.pack_ternary)(jnp.asarray([[3], [0], [-1], [-5]], jnp.int8))
    assert packed_ternary.unpack_ternary(inside, 4, 1).tolist() == [[1], [0], [-1], [-1]]
    shape = (1, 1, 16)
    for damaged in (np.full(shape, 3, np.uint32), jnp.full(shape, 0xC0000000, jnp.uint32)):
        with pytest.raises(InputError, match="unpack_ternary"):
            packed_ternary.unpack_ternary(damaged)
    with pytest.raises(InputError, match="unpack_ternary"):
        packed_ternary.unpack_ternary(np.zeros(3, np.uint32))


@pytest.mark.parametrize("fit", thermometer.FITS)
def test_thresholds_of_half_precision_are_those_of_float32(fit):
    x = np.linspace(-3e4, 3e4, 600, dtype=np.float16)[:, None]
    expected = thermometer.FITS[fit](x.astype(np.float32), 300)
    found = thermometer.FITS[fit](jnp.asarray(x), 300)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected)
    coarse = thermometer.FITS[fit](jnp.linspace(0, 1, 600, dtype=jnp.bfloat16)[:, None], 300)
    assert np.isfinite(coarse).all() and (np.diff(coarse) >= 0).all()
    assert fit == "distributive" or (np.diff(coarse) > 0).all()


def test_thresholds_across_all_of_float32():
    x = np.asarray([[-3e38], [3e38]], np.float32)
    np.testing.assert_allclose(
        thermometer.uniform_thresholds(x, 3)[0], [-1.5e38, 0, 1.5e38], atol=1e33
    )


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("fit", ["uniform", "gaussian"])
def test_thresholds_of_what_are_no_numbers_are_refused(fit, wrong):
    with pytest.raises(InputError, match=f"{fit}_thresholds"):
        thermometer.FITS[fit](np.asarray([[1.0], [wrong], [2.0]], np.float32), 3)


def test_a_single_example_has_no_spread():
    with pytest.raises(InputError, match="at least 2 examples"):
        thermometer.gaussian_thresholds(jnp.ones((1, 2)), 3)
    assert np.isfinite(
        thermometer.gaussian_thresholds(DRAW.normal(size=(1, 9)), 3, per_feature=False)
    ).all()


@pytest.mark.parametrize("tau", [0.0, -1.0, 1e-40, float("nan")])
def test_gradients_cannot_be_divided_by_nothing(tau):
    bits, candidates = jnp.ones((1, 4)), jnp.zeros((2, 2), jnp.int32)
    for call in (
        lambda: wiring.learnable_wiring(bits, jnp.eye(4)[:, :2], tau=tau),
        lambda: wiring.sparse_learnable_wiring(bits, jnp.eye(2), candidates, tau=tau),
    ):
        with pytest.raises(InputError, match="tau"):
            call()


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


I32, I8, U8, U32, BOOL = jnp.int32, jnp.int8, jnp.uint8, jnp.uint32, jnp.bool_
KEY = jax.random.key(0)


def lookup_gradient(bits, mapping, tables):
    return jax.grad(lambda b, t: lut.lut_lookup(b, mapping, t).sum(), (0, 1))(bits, tables)


# name: (call, the shapes of what comes out)
EMPTY = {
    "no tables of no bits": (
        lambda: lookup_gradient(zeros(3, 0), zeros(0, 2, dtype=I32), zeros(0, 4)),
        [(3, 0), (0, 4)],
    ),
    "no tokens": (
        lambda: lookup_gradient(zeros(0, 4), zeros(2, 2, dtype=I32), zeros(2, 4)),
        [(0, 4), (2, 4)],
    ),
    "no packed tables": (
        lambda: packed_lut.look_up(
            zeros(0, 3, dtype=BOOL), zeros(0, 2, dtype=I32), zeros(0, 1, dtype=U8)
        ),
        [(0, 3)],
    ),
    "no vectors": (
        lambda: packed_lut.add_vectors(zeros(0, 3, dtype=BOOL), zeros(0, 2, dtype=I8)),
        [(3, 2)],
    ),
    "no inverse": (lambda: wiring.invert_wiring(np.zeros((0, 2), np.int32), 4), [(4, 0)]),
    "no slots": (
        lambda: jax.grad(lambda b, s: wiring.learnable_wiring(b, s).sum(), (0, 1))(
            zeros(3, 4), zeros(4, 0)
        ),
        [(3, 4), (4, 0)],
    ),
    "no tokens to choose for": (
        lambda: wiring.sparse_learnable_wiring(
            zeros(0, 4), zeros(2, 2), np.zeros((2, 2), np.int32)
        ),
        [(0, 2)],
    ),
    "no grouped bits": (lambda: sums.conditional_sum(zeros(0, 4), zeros(4), zeros(2)), [(0, 2)]),
    "no outputs": (lambda: packed_ternary.pack_ternary(zeros(5, 0, dtype=I8)), [(0, 1, 0)]),
    "no outputs on the host": (
        lambda: packed_ternary.pack_ternary(np.zeros((5, 0), np.int8)),
        [(0, 1, 0)],
    ),
    "no inputs of a product": (
        lambda: packed_ternary.packed_matmul(zeros(1, 0, dtype=I8), zeros(1, 0, 16, dtype=U32)),
        [(1, 16)],
    ),
    "no outputs of a product": (
        lambda: packed_ternary.packed_matmul(zeros(3, 5, dtype=I8), zeros(0, 1, 0, dtype=U32)),
        [(3, 0)],
    ),
    "no features of a norm": (lambda: ternary.mean_square(zeros(3, 0)), [(3, 1)]),
    "no inputs": (lambda: integer.quantize_weights(zeros(0, 3)), [(0, 3), (3,)]),
    **{
        f"nothing in {function.__name__} of {x.dtype}": (
            lambda function=function, x=x, more=more: function(x, I32(10), **more),
            [(3, 0)],
        )
        for function, more in (
            (integer.shiftmax_units, {"bits": 16}),
            (integer.shift_gelu_units, {}),
        )
        for x in (zeros(3, 0), zeros(3, 0, dtype=I32))
    },
    "no features": (lambda: integer_norm.layer_norm_constants(zeros(0), zeros(0)), [(0,)] * 3),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_gives_nothing(name):
    call, shapes = EMPTY[name]
    found = jax.tree.leaves(call())
    assert [leaf.shape for leaf in found] == shapes
    assert all(np.isfinite(leaf).all() for leaf in found)


NOTHING_TO_DO = {
    "look_up": lambda: packed_lut.look_up(
        zeros(0, 3, dtype=BOOL), zeros(2, 2, dtype=I32), zeros(2, 1, dtype=U8)
    ),
    "look_up ": lambda: packed_lut.look_up(
        zeros(4, 3, dtype=BOOL), zeros(2, 0, dtype=I32), zeros(2, 1, dtype=U8)
    ),
    "invert_wiring": lambda: wiring.invert_wiring(np.zeros((0, 2), np.int32), 0),
    "even_inverse": lambda: wiring.even_inverse(zeros(2, 2, dtype=I32), 0),
    "efd_matrix": lambda: lut.efd_matrix(0, lut.efd_weighting(1)),
    "strongest": lambda: wiring.strongest(zeros(0, 3)),
    "strongest ": lambda: wiring.strongest(zeros(3, 0), zeros(3, 0, dtype=I32)),
    "sparse_learnable_wiring": lambda: wiring.sparse_wiring_feature_major(
        zeros(0, 3), zeros(2, 2), zeros(2, 2, dtype=I32)
    ),
    "uniform_thresholds": lambda: thermometer.uniform_thresholds(zeros(3, 0), 2, per_feature=False),
    "distributive_thresholds": lambda: thermometer.distributive_thresholds(
        zeros(3, 0), 2, per_feature=False
    ),
    "normal_quantiles": lambda: thermometer.normal_quantiles(0),
    "walsh_hadamard": lambda: sums.walsh_hadamard(zeros(3, 0)),
    "requantize": lambda: integer.requantize_units([], jnp.float32(1), 8),
    "requantize ": lambda: integer.requantize_int([], 8),
    "cut_patches": lambda: patches.cut_patches(zeros(1, 8, 8, 3), 0),
    "ViT": lambda: patches.resample_positions(zeros(1, 1, 4), (2, 2)),
    "ViT ": lambda: patches.resample_positions(zeros(1, 0, 4), (2, 2)),
}


@pytest.mark.parametrize("name", NOTHING_TO_DO)
def test_what_cannot_be_done_with_nothing_is_said(name):
    with pytest.raises(InputError, match=name.strip()):
        NOTHING_TO_DO[name]()
