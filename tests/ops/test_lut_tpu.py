"""The look-up's kernels for TPUs, interpreted, against the reference: values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from quweit_jax.errors import InputError
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


def test_under_transformations():
    """jit, grad, vmap, remat, scan and shard_map; and divided over a mesh that is told."""
    bits, wiring, tables, weights = (jnp.asarray(a) for a in case(8, 5, 3, 2))

    def loss(bits, weights, tables, implementation="pallas"):
        return (
            weights * lut.lut_lookup(bits, wiring, tables, implementation=implementation) ** 2
        ).sum()

    def grad(of):
        return jax.grad(of, argnums=(0, 2))

    expected = grad(lambda *a: loss(*a, implementation="reference"))(bits, weights, tables)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(4, 1), ("data", "tensor"))
    pairs = [a.reshape(2, 4, *a.shape[1:]) for a in (bits, weights)]

    def scanned(bits, weights, tables):
        def step(_, pair):
            return None, grad(jax.checkpoint(loss))(*pair, tables)

        return jax.lax.scan(step, None, (bits, weights))[1]

    def of_device(*arrays):
        to_bits, to_tables = grad(loss)(*arrays)
        return to_bits, jax.lax.psum(to_tables, "data")

    specs = P("data"), P("data"), P()
    with choice.interpreted():
        found = {
            "vmap": jax.jit(jax.vmap(grad(loss), (0, 0, None)))(*pairs, tables),
            "scan": jax.jit(scanned)(*pairs, tables),
            "shard_map": jax.jit(
                jax.shard_map(
                    of_device,
                    mesh=mesh,
                    in_specs=specs,
                    out_specs=(P("data"), P()),
                    check_vma=False,
                )
            )(bits, weights, tables),
        }
        with choice.divided(mesh, "data"):
            found["divided"] = jax.jit(grad(loss))(bits, weights, tables)
    for name, (to_bits, to_tables) in found.items():
        to_tables = to_tables.sum(0) if to_tables.ndim == 3 else to_tables
        for one, other in zip((to_bits.reshape(bits.shape), to_tables), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, err_msg=name)


def test_refused_where_it_is_not():
    bits, wiring, tables, _ = case()
    with pytest.raises(InputError, match="'pallas' needs a tpu"):
        lut.lut_lookup(bits, wiring, tables, implementation="pallas")
    with choice.interpreted(), pytest.raises(InputError, match="fast memory for 100000 inputs"):
        lut.lut_lookup(np.zeros((1, 100_000)), wiring, tables, implementation="pallas")


def test_chosen_on_a_tpu_where_there_is_enough_to_do():
    def anywhere(tokens):
        sizes = (64, tokens, 256)
        return lut._choose(None, lut.efd_weighting(2), sizes, "float32").implementation

    def chosen(tokens, parts=1):
        mesh = Mesh(np.asarray(jax.devices()[:parts]), ("data",))
        with choice.compiling_for("tpu"), choice.divided(mesh, "data"):
            return anywhere(tokens)

    assert [chosen(1024), chosen(512)] == ["pallas", "xla"]
    assert [chosen(4096, parts=4), chosen(2048, parts=4)] == ["pallas", "xla"]
    with choice.compiling_for("tpu"):  # several devices, and nobody says how to divide
        assert anywhere(4096) == "xla"
    with choice.compiling_for("cpu"):
        assert anywhere(4096) == "xla"
