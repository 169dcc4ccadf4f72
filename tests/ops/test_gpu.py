"""The kernels for GPUs, interpreted, against references: values, every gradient, final states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quweit_jax.errors import InputError
from quweit_jax.ops import lut, wiring
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.gpu import lut_gradients, recurrence
from quweit_jax.ops.packed_ternary import pack_ternary, packed_sums
from quweit_jax.ops.recurrence import gated_recurrence
from tests.ops import test_lut_tpu, test_recurrence_tpu, test_ternary_tpu
from tests.ops.gradients import value_and_vjp
from tests.ops.test_lut import case
from tests.ops.tpu import drawn

DTYPES = st.sampled_from(["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def for_a_gpu(monkeypatch):
    monkeypatch.setattr(recurrence, "_TOGETHER", 2)  # quicker to compile than 8 steps
    with choice.compiling_for("gpu"):
        yield


@drawn
@given(
    st.integers(1, 8),
    st.sampled_from([0, 1, 9, 130]),
    st.integers(1, 13),
    st.sampled_from([0, 1, 3, 17]),
    DTYPES,
    st.booleans(),
)
def test_look_ups(n, tokens, inputs, luts, dtype, even):
    test_lut_tpu.check(n, tokens, inputs, luts, dtype, even)


@pytest.mark.parametrize("n, tokens, luts", [(8, 40, 3), (2, 1100, 1), (6, 3, 70)])
def test_look_ups_of_several_blocks(n, tokens, luts):
    test_lut_tpu.check(n, tokens, inputs=11, luts=luts)


@pytest.mark.parametrize("inputs", [3, 7])  # with places that are all taken, and with empty ones
def test_gradients_to_bits_by_an_inverse(inputs):
    bits, _, tables, grad = (jnp.asarray(a, "float32") for a in case(5, inputs, 6, 2))
    wired = wiring.random_wiring(jax.random.key(0), inputs, 6, 2)
    inverse = wiring.invert_wiring(wired, inputs)

    def found(implementation, **more):
        def read(b, t):
            return lut.lut_lookup(b, wired, t, implementation=implementation, **more)

        with choice.interpreted():
            return value_and_vjp(read, (bits, tables), grad)

    for one, other in zip(found("pallas", inverse=inverse), found("reference"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_table_gradients_of_few_tables_are_the_same_however_often():
    """Several programs add up a table's tokens; the order of sums does not depend on chance."""
    draw = np.random.default_rng(0)
    addresses = draw.integers(0, 4, (2, 1300)).astype(np.uint8)
    grad = draw.normal(size=(2, 1300)).astype(np.float32)
    with choice.interpreted():
        found = lut_gradients.table_gradient(jnp.asarray(addresses), jnp.asarray(grad), 4)
    for table in range(2):
        expected = np.bincount(addresses[table], grad[table].astype(np.float64), 4)
        np.testing.assert_allclose(found[table], expected, atol=1e-4)


@drawn
@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 3, 65]), DTYPES)
def test_recurrences(steps, batch, features, dtype):
    test_recurrence_tpu.check(steps, batch, features, dtype)


def test_recurrences_in_chunks_of_time():
    test_recurrence_tpu.check(steps=203, batch=2, features=5)


@drawn
@given(
    st.sampled_from([(), (0,), (1,), (2, 3), (17,)]),
    st.sampled_from([1, 15, 130, 512]),
    st.sampled_from([1, 100, 128, 300]),
)
def test_ternary_products(lead, inputs, outputs):
    test_ternary_tpu.check(lead, inputs, outputs)


@pytest.mark.parametrize(
    "of_tpus",
    [
        test_lut_tpu.test_under_transformations,
        test_recurrence_tpu.test_under_transformations,
        test_recurrence_tpu.test_nothing_at_all,
        test_ternary_tpu.test_no_inputs_and_no_outputs,
    ],
)
def test_as_those_for_tpus(of_tpus):
    """jit, grad, vmap, remat, scan, shard_map, told division; and nothing at all."""
    of_tpus()


def test_chosen_where_there_is_enough_to_do():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))

    def chosen(tokens):
        return lut._choose(None, lut.efd_weighting(2), (64, tokens, 256), "float32").implementation

    with choice.divided(mesh, "data"):
        assert [chosen(1024), chosen(512)] == ["pallas", "xla"]
        with choice.compiling_for("gpu", portable=True):  # no program takes them along
            assert chosen(1024) == "xla"
    assert chosen(1024) == "xla"  # several devices, and nobody says how to divide


def test_what_hinders_them_is_said():
    bits, wired, tables, _ = case()
    with choice.interpreted(), pytest.raises(InputError, match="cannot count the 2,147,483,648"):
        lut._choose("pallas", lut.efd_weighting(2), (2**21, 2**10, 4), "float32")
    exported = pytest.raises(InputError, match="'pallas' cannot be exported; on this gpu there are")
    with choice.compiling_for("gpu", portable=True), choice.interpreted(), exported:
        lut.lut_lookup(bits, wired, tables, implementation="pallas")
    with choice.compiling_for("cpu"):
        x, packed = jnp.zeros((1, 16), "int8"), pack_ternary(jnp.zeros((16, 16), "int8"))
        with pytest.raises(InputError, match="'pallas' needs a tpu or gpu"):
            packed_sums(x, packed, implementation="pallas")
        with pytest.raises(InputError, match="'pallas' needs a tpu or gpu"):
            gated_recurrence(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3)), implementation="pallas")
