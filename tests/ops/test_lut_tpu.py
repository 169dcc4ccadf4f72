"""The look-up's kernels for TPUs, interpreted, against the reference: values and every gradient."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quweit_jax.ops import lut
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.tpu import lut as kernels
from tests.ops.gradients import value_and_vjp
from tests.ops.test_lut import case
from tests.ops.tpu import drawn


def check(n, tokens, inputs, luts, dtype="float32", even=True):
    bits, wiring, tables, grad = case(tokens, inputs, luts, n, seed=n)
    if not even:  # inputs read by several slots of one table, and by none
        wiring = np.random.default_rng(n).integers(0, (inputs + 1) // 2, wiring.shape)
    tables, grad = jnp.asarray(tables, dtype), jnp.asarray(grad, dtype)

    def found(implementation):
        def read(b, t):
            return lut.lut_lookup(b, wiring, t, implementation=implementation)

        with choice.interpreted():
            return value_and_vjp(read, (jnp.asarray(bits, dtype), tables), grad)

    tolerance = 1e-5 if dtype == "float32" else 2**-7
    for one, other in zip(found("pallas"), found("reference"), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@drawn
@given(
    st.integers(1, 8),
    st.sampled_from([0, 1, 9, 1025]),
    st.integers(1, 13),
    st.sampled_from([0, 1, 3, 16, 136]),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
)
def test_equals_the_reference(n, tokens, inputs, luts, dtype, even):
    check(n, tokens, inputs, luts, dtype, even)


@pytest.mark.parametrize("n, tokens", [(8, 40), (6, 6000)])
def test_large_tables_and_several_chunks(n, tokens):
    assert kernels.chunks(6000, 6).count == 2
    check(n, tokens, inputs=11, luts=17)
