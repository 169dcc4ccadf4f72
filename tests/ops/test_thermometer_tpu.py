"""The thermometer's kernels for TPUs, interpreted, against what XLA makes: values and gradients."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quweit_jax.errors import InputError
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.thermometer import WINDOWS, encode_feature_major
from tests.ops.gradients import value_and_vjp
from tests.ops.tpu import drawn


def check(features, steps, tokens, shape, dtype="float32"):
    draw = np.random.default_rng(features)
    x, thresholds, grad = (
        jnp.asarray(draw.normal(size=sizes), dtype)
        for sizes in ((features, tokens), (features, steps), (features * steps, tokens))
    )
    thresholds = thresholds.at[0, 0].set(x[0, 0]) if x.size and steps else thresholds  # not above

    def found(implementation):
        def encode(x, thresholds):
            return encode_feature_major(
                x, thresholds, window=0.7, shape=shape, implementation=implementation
            )

        with choice.interpreted():
            return value_and_vjp(encode, (x, thresholds), grad)

    tolerance = 1e-5 if dtype == "float32" else 2**-6
    for one, other in zip(found("pallas"), found("xla"), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * 10)


@drawn
@given(
    st.sampled_from([1, 5, 8, 70]),
    st.integers(1, 9),
    st.sampled_from([0, 1, 130]),
    st.sampled_from(WINDOWS),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_values_and_gradients(features, steps, tokens, shape, dtype):
    check(features, steps, tokens, shape, dtype)


def test_several_blocks():
    check(70, 3, 700, "triangular")


def test_bad_input_is_refused():
    with pytest.raises(InputError, match=r"\(D, z\), found \[2, 3\] and \[4\]"):
        encode_feature_major(jnp.zeros((2, 3)), jnp.zeros(4))
    with pytest.raises(InputError, match="'pallas' needs a tpu"):
        encode_feature_major(jnp.zeros((2, 3)), jnp.zeros((2, 1)), implementation="pallas")
