"""The ternary product's kernel for TPUs, interpreted, against exact integers."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quweit_jax.errors import InputError
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.packed_ternary import pack_ternary, packed_sums
from tests.ops.tpu import drawn


def check(lead, inputs, outputs):
    draw = np.random.default_rng(inputs)
    x = draw.integers(-128, 128, (*lead, inputs)).astype(np.int8)
    weights = draw.integers(-1, 2, (inputs, outputs)).astype(np.int8)
    packed = pack_ternary(weights)
    with choice.interpreted():
        found = jax.jit(
            lambda x, p: packed_sums(x, p, num_outputs=outputs, implementation="pallas")
        )(x, packed)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ weights.astype(np.int64))


@drawn
@given(
    st.sampled_from([(), (0,), (1,), (2, 3), (33,)]),
    st.sampled_from([1, 15, 130, 512]),
    st.sampled_from([1, 100, 128, 300]),
)
def test_exact(lead, inputs, outputs):
    check(lead, inputs, outputs)


def test_several_blocks_of_tokens_and_tiles():
    check((600,), 64, 1300)


def test_no_inputs_and_no_outputs():
    check((2,), 0, 3)
    check((2,), 3, 0)


def test_refused_where_it_is_not():
    x, packed = np.zeros((1, 16), np.int8), pack_ternary(np.zeros((16, 16), np.int8))
    with pytest.raises(InputError, match="'pallas' needs a tpu"):
        packed_sums(x, packed, implementation="pallas")
