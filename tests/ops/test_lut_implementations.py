"""The implementations of `ops.lut` against each other: values and every gradient."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quweit_jax.errors import InputError
from quweit_jax.ops import lut
from quweit_jax.ops.kernels import lut_xla
from quweit_jax.ops.wiring import invert_wiring
from tests.ops.gradients import value_and_vjp
from tests.ops.test_lut import case


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    st.integers(1, 8),
    st.integers(0, 9),
    st.integers(1, 13),
    st.sampled_from([0, 1, 3, 16, 136]),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
)
def test_implementations_agree(n, tokens, inputs, luts, dtype, indexed):
    bits, wiring, tables, grad = case(tokens, inputs, luts, n, seed=n)
    inverse = invert_wiring(wiring, inputs) if indexed else None
    tables, grad = jnp.asarray(tables, dtype), jnp.asarray(grad, dtype)

    def found(implementation):
        def read(b, t):
            return lut.lut_lookup(b, wiring, t, inverse=inverse, implementation=implementation)

        return value_and_vjp(read, (jnp.asarray(bits, dtype), tables), grad)

    tolerance = 1e-5 if dtype == "float32" else 2**-7
    for one, other in zip(found("xla"), found("reference")):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", range(1, 9))
def test_table_gradients_for_matrix_units(n):
    draw = np.random.default_rng(n)
    address = draw.integers(0, 2**n, (3, 17)).astype(np.int32)
    grad = draw.normal(size=(3, 17)).astype(np.float32)
    np.testing.assert_allclose(
        lut_xla._table_grad_product(address, grad, 2**n),
        lut_xla._table_grad_scatter(address, grad, 2**n),
        atol=1e-5,
    )


def test_unknown_implementations_are_refused():
    bits, wiring, tables, _ = case()
    with pytest.raises(InputError, match="lut_lookup: implementation='cuda' does not exist"):
        lut.lut_lookup(bits, wiring, tables, implementation="cuda")
