"""64-bit arithmetic in 32-bit words, against Python's own integers."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.ops import int64
from tests.compiled import quick_jit

EDGES = [
    0,
    1,
    -1,
    2,
    -2,
    127,
    -128,
    2**15,
    -(2**15),
    2**16 - 1,
    2**24 + 1,
    2**30,
    -(2**30),
    2**31 - 1,
    -(2**31),
]


def rounded(x, multiplier, shift):
    """round half to even, saturated."""
    return max(
        -(2**31 - 1), min(2**31 - 1, round(Fraction(int(x) * int(multiplier), 2 ** int(shift))))
    )


def test_multiply_shift_is_exact():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [np.repeat(EDGES, 64), rng.integers(-(2**31), 2**31, 3000), rng.integers(-200, 200, 3000)]
    ).astype(np.int32)
    multiplier = np.concatenate(
        [
            rng.choice(EDGES, 64 * len(EDGES)),
            rng.integers(-(2**31), 2**31, 3000),
            2**30 * rng.choice([-1, 1], 3000),
        ]
    )
    shift = np.concatenate(
        [np.tile(np.arange(64), len(EDGES)), rng.integers(0, 64, 3000), rng.integers(25, 40, 3000)]
    ).astype(np.int32)
    found = quick_jit(int64.multiply_shift)(x, multiplier.astype(np.int32), shift)
    assert found.tolist() == [rounded(*values) for values in zip(x, multiplier, shift)]


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 1, 5)])
def test_multiply_shift_shapes(shape):
    out = quick_jit(int64.multiply_shift)(np.ones(shape, np.int32), np.int32(2**30), np.int32(30))
    assert out.shape == shape and out.dtype == jnp.int32 and (out == 1).all()


def test_dyadic_is_the_float64_quotient():
    rng = np.random.default_rng(1)
    a, b = (np.exp(rng.normal(0, 8, 3000)).astype(np.float32) for _ in range(2))
    a[:5], b[:5] = [1.0, 3.0, 1.0, 0.0, -2.0], [1.0, 1.0, 3.0, 1.0, 3.0]
    multiplier, shift = quick_jit(int64.dyadic)(a, b)
    for x, y, m, s in zip(a.astype(float), b.astype(float), multiplier.tolist(), shift.tolist()):
        mantissa, exponent = math.frexp(abs(x) / y)
        whole = math.floor(Fraction(mantissa) * 2**31 + Fraction(1, 2))
        if whole == 2**31:
            whole, exponent = 2**30, exponent + 1
        if x == 0 or 31 - exponent > 63:
            assert m == 0
        elif exponent > 31:
            assert abs(m) == 2**31 - 1 and s == 0
        else:
            assert (m, s) == (math.copysign(whole, x), 31 - exponent)


def test_divide_is_exact():
    rng = np.random.default_rng(2)
    small = rng.integers(1, 2**31, 500) >> rng.integers(0, 31, 500)
    edges = [1, 2, 3, 64, 2**16 - 1, 2**16, 2**16 + 1, 2**30, 2**31 - 2**16, 2**31 - 1]
    drawn = [rng.integers(1, 2**31, 500), small.clip(1), small | 2**16 - 1]
    divisor = np.concatenate([*drawn, edges]).astype(np.uint32)
    high = (rng.random(len(divisor)) * divisor).astype(np.uint32)
    low = rng.integers(0, 2**32, len(divisor)).astype(np.uint32)
    # the largest quotients there are
    divisor, high = np.concatenate([divisor, divisor]), np.concatenate([high, divisor - 1])
    low = np.concatenate([low, np.full_like(low, 2**32 - 1)])
    found = quick_jit(int64.divide)(high, low, divisor)
    assert found.tolist() == [
        (int(h) * 2**32 + int(l)) // int(d) for h, l, d in zip(high, low, divisor)
    ]


def test_add_carries():
    high, low = quick_jit(int64.add)(
        (jnp.uint32(1), jnp.uint32(2**32 - 1)), (jnp.uint32(2), jnp.uint32(1))
    )
    assert (int(high), int(low)) == (4, 0)
