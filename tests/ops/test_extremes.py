"""Numbers at the ends of what a dtype holds: right, or a sentence that names the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops import (
    int64,
    integer,
    integer_norm,
    lut,
    packed_lut,
    packed_ternary,
    pair_table,
    sums,
    ternary,
    ternary_fit,
    thermometer,
)

DRAW = np.random.default_rng(0)
I32, I8, U8, U32 = jnp.int32, jnp.int8, jnp.uint8, jnp.uint32


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize("tau", [1e-40, float("inf"), float("nan")])
def test_sums_and_windows_are_not_divided_by_nothing(tau):
    with pytest.raises(InputError, match="tau"):
        sums.group_sum(jnp.ones((1, 4)), 2, tau=tau)
    with pytest.raises(InputError, match="window"):
        thermometer.encode_ste(jnp.ones((1, 1)), jnp.zeros((1, 2)), window=tau)
    for name in ("alpha", "beta"):
        wrong = {name: tau if tau > 1 or tau != tau else -jnp.inf}
        with pytest.raises(InputError, match=name):
            lut.efd_weighting(2, **wrong)


def test_sums_of_half_precision_have_room():
    assert sums.group_sum(jnp.ones((1, 4096), jnp.float16), 2, tau=1e-1)[0, 0] == 20480
    half = jnp.ones((40_000, 4), jnp.float16)
    assert sums.spectral_penalty(half) == 40_000
    assert sums.walsh_hadamard(jnp.full((1, 256), 300, jnp.float16))[0, 0] == 300
    x = jnp.asarray([[65504, -65504, 1000]], jnp.float16)
    np.testing.assert_allclose(sums.fake_quantize_int8(x, 1), x, rtol=4e-2)
    small = jnp.asarray([[6e-8, 0.0]], jnp.float16)
    values, scale = sums.quantize_int8(small, 1)
    np.testing.assert_allclose(values * scale, small)


WIDE = {
    "values": np.full((4, 2), 2**30, np.int32),
    "unsigned": jnp.full((4, 2), 2**31, jnp.uint32),
    "of the host": np.full((1, 2), 2**33, np.int64),
    "many": jax.ShapeDtypeStruct((2**16 + 1, 2), jnp.int16),
}


@pytest.mark.parametrize("name", WIDE)
def test_whole_vectors_whose_sums_do_not_fit_are_refused(name):
    vectors = WIDE[name]
    bits = jax.ShapeDtypeStruct(vectors.shape[:1], jnp.float32)
    for call in (
        lambda v: jax.eval_shape(lambda b: sums.conditional_sum(b, v), bits),
        lambda v: jax.eval_shape(lambda b: sums.conditional_sum_feature_major(b[:, None], v), bits),
    ):
        with pytest.raises(InputError, match="2,147,483,647"):
            jax.eval_shape(call, vectors) if name == "many" else call(vectors)


def test_a_real_bias_of_whole_vectors_is_not_cut():
    found = sums.conditional_sum(jnp.ones((1, 4)), jnp.ones((4, 1), jnp.int8), jnp.full(1, 0.75))
    assert found[0, 0] == 4.75


def test_whole_numbers_of_every_width_are_the_same():
    rows = DRAW.integers(-128, 128, (6, 9))
    rows[0, :2] = -128, 127
    inverse = integer.inverse_scale(jnp.float32(0.07))
    for call in (
        lambda x: integer.shiftmax_units(x, inverse, bits=8),
        lambda x: integer.shift_gelu_units(x, inverse),
        lambda x: integer.shift_exp(x, inverse, 15),
    ):
        expected = call(jnp.asarray(rows, jnp.int32))
        for dtype in (jnp.int8, jnp.int16):
            np.testing.assert_array_equal(call(jnp.asarray(rows, dtype)), expected)
        bright = np.abs(rows).astype(np.int32)
        np.testing.assert_array_equal(call(jnp.asarray(bright, jnp.uint8)), call(bright + 0))


def test_exponentials_at_the_ends_of_int32():
    ends = np.iinfo(np.int32)
    x = jnp.asarray([[ends.min, ends.max, 0], [ends.min, 0, 0]], jnp.int32)
    found = integer.shiftmax_units(x, jnp.int32(100), bits=8)
    assert found.tolist() == [[0, 127, 0], [0, 63, 63]]
    found = integer.shift_exp(jnp.asarray([ends.min, -(2**30), ends.max]), jnp.int32(10), 15)
    assert found.tolist() == [10, 10, ends.max]


WIDER_THAN_FITS = {
    "shift_gelu": lambda: integer.shift_gelu_units(jnp.full((1, 3), 2**24), jnp.int32(10)),
    "int_linear": lambda: integer.matmul_units(jnp.full((1, 4), 128), jnp.ones((4, 1), jnp.int8)),
    "66,311": lambda: jax.eval_shape(
        integer.matmul_units,
        jax.ShapeDtypeStruct((1, 66_312), jnp.uint8),
        jax.ShapeDtypeStruct((66_312, 1), jnp.int8),
    ),
    "int_layer_norm": lambda: integer_norm.layer_norm_units(
        jnp.full((1, 4), -(2**16)), zeros(4, dtype=I32), zeros(4, dtype=I32)
    ),
    "int_matmul": lambda: ternary.int_matmul(
        zeros(1, 131_072, dtype=I8), jnp.full((131_072, 1), -128, I8)
    ),
    "quantize": lambda: integer.quantize(jnp.ones(2), jnp.float32(1), 1),
    "symmetric_scale": lambda: integer.quantize_weights(jnp.ones((2, 2)), bits=1),
    "shiftmax": lambda: integer.shiftmax_units(jnp.ones((1, 2), I32), jnp.int32(1), bits=33),
    "clamp": lambda: integer.clamp(jnp.ones(2, I32), 40),
    "packed_matmul": lambda: packed_ternary.packed_matmul(
        jnp.full((1, 16), 200, U8), zeros(1, 1, 16, dtype=U32)
    ),
    "pack_ternary": lambda: packed_ternary.pack_ternary(jnp.full((2, 1), 255, U8)),
    "pack_tables": lambda: packed_lut.pack_tables(zeros(2, 3)),
    "silu_gate": lambda: pair_table.silu_gate(4, 0.0),
    "codes": lambda: pair_table.codes(jnp.ones(2), 0, 4),
    "to_bytes": lambda: ternary.to_bytes(jnp.ones((5, 2), I8)),
    "fit_ternary": lambda: ternary_fit.fit_ternary(
        np.full((2, 2), np.nan), np.eye(2), np.ones(2), np.eye(2)
    ),
}


@pytest.mark.parametrize("name", WIDER_THAN_FITS)
def test_what_does_not_fit_is_said(name):
    with pytest.raises(InputError, match=name):
        WIDER_THAN_FITS[name]()


def test_products_of_any_bytes_are_exact():
    x = np.full((1, 3000), -127, np.int8)
    weight = np.where(np.arange(3000)[:, None] % 7, -127, -128).astype(np.int8)
    weight[5] = 3
    expected = x.astype(np.int64) @ weight.astype(np.int64)
    found = ternary.int_matmul(jnp.asarray(x), jnp.asarray(weight))
    assert found[0, 0] == np.float32(expected[0, 0])
    packed = packed_ternary.pack_ternary(np.asarray([[0], [1]], np.uint8))
    assert packed_ternary.unpack_ternary(packed, 2, 1).tolist() == [[0], [1]]


def test_ratios_without_end_are_the_largest():
    for scales in ((jnp.inf, 1.0), (1.0, 0.0)):
        assert [int(x) for x in int64.dyadic(*map(jnp.float32, scales))] == [2**31 - 1, 0]
    assert int(int64.dyadic(jnp.float32(1), jnp.float32(jnp.inf))[0]) == 0
    assert int(integer.inverse_scale(jnp.float32(jnp.inf))) == 1


@pytest.mark.parametrize("fit", thermometer.FITS)
def test_thresholds_of_numbers_alone(fit):
    for wrong in (np.asarray([[1.0], [np.nan], [2.0]]), np.asarray([[1j], [2], [3]])):
        with pytest.raises(InputError, match="expected"):
            thermometer.FITS[fit](wrong, 2)
    wide = np.asarray([[2**40], [0], [2**41]])
    found = thermometer.FITS[fit](wide, 2)
    np.testing.assert_allclose(found, thermometer.FITS[fit](wide.astype(np.float32), 2))
    assert thermometer.encode(wide, np.ones((1, 1), np.float32))[:, 0, 0].tolist() == [1, 0, 1]
