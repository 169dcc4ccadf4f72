"""Native look-ups of real tables: the values and both gradients of their definition on drawn
shapes, with every level of instructions, under JAX's transformations, and where they are chosen.
"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from quweit_jax.errors import InputError
from quweit_jax.layers.weightless import WeightlessBlock
from quweit_jax.ops import lut
from quweit_jax.ops.kernels import lut_native
from quweit_jax.ops.kernels.choice import compiling_for, divided
from quweit_jax.ops.kernels.native import calls, library
from quweit_jax.ops.wiring import invert_wiring, random_wiring
from tests.compiled import quick_jit
from tests.ops import test_native
from tests.ops.gradients import value_and_vjp
from tests.ops.test_native import needs_compiler

cache = test_native.cache
pytestmark = needs_compiler
MESH = Mesh(np.asarray(jax.devices()[:1]), ("data",))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Tests see 8 devices, between which the compiler could not divide native code."""
    with divided(MESH, "data"):
        yield


def draw(n, tokens, inputs, luts, seed=0):
    """bits (F, T), a wiring that may read an input several times, tables, gradients (L, T)."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 2, (inputs, tokens)),
        rng.integers(0, inputs, (luts, n)).astype(np.int32),
        rng.uniform(-1, 1, (luts, 2**n)),
        rng.normal(size=(luts, tokens)),
    )


def expected_of(bits_FT, wiring, tables, grad_LT, **weighting):
    """Values, gradients to the bits and to the tables, in float64 and by their definition."""
    luts, n = wiring.shape
    address = np.sum([bits_FT[wiring[:, l]] << l for l in range(n)], axis=0)
    to_tables, to_bits = np.zeros(tables.shape), np.zeros(bits_FT.shape)
    np.add.at(to_tables, (np.arange(luts)[:, None], address), grad_LT)
    matrix = lut.efd_matrix(n, lut.efd_weighting(n, **weighting))
    for l, differences in enumerate(np.einsum("lra,ja->ljr", matrix, tables)):
        rest = (address & ((1 << l) - 1)) | ((address >> (l + 1)) << l)
        np.add.at(to_bits, wiring[:, l], grad_LT * np.take_along_axis(differences, rest, 1))
    return np.take_along_axis(tables, address, 1), to_bits, to_tables


def check(n, tokens, inputs, luts, dtype="float32", bits_dtype=None, **weighting):
    bits, wiring, tables, grad = draw(n, tokens, inputs, luts, seed=n)
    given_tables, given_grad = jnp.asarray(tables, dtype), jnp.asarray(grad, dtype)
    given_bits = jnp.asarray(bits, bits_dtype or dtype)

    def read(bits, tables):
        return lut.lut_lookup_feature_major(
            bits, wiring, tables, implementation="native", **weighting
        )

    @quick_jit
    def run(bits, tables, grad):
        if not jnp.issubdtype(bits.dtype, jnp.floating):
            out, pullback = jax.vjp(lambda t: read(bits, t), tables)
            return out, None, *pullback(grad)
        out, pullback = jax.vjp(read, bits, tables)
        return out, *pullback(grad)

    tables, grad = np.asarray(given_tables, np.float64), np.asarray(given_grad, np.float64)
    values, to_bits, to_tables = expected_of(bits, wiring, tables, grad, **weighting)
    tolerance = 2e-5 if dtype == "float32" else 2**-7
    for level in library.LEVELS:
        with library.using(level) as used:
            found = jax.block_until_ready(run(given_bits, given_tables, given_grad))
        np.testing.assert_array_equal(np.asarray(found[0], np.float64), values, used)
        assert found[0].dtype == found[2].dtype == given_tables.dtype
        np.testing.assert_allclose(
            np.asarray(found[2], np.float64), to_tables, rtol=tolerance, atol=tolerance
        )
        if found[1] is not None:
            assert found[1].dtype == given_bits.dtype
            np.testing.assert_allclose(
                np.asarray(found[1], np.float64), to_bits, rtol=tolerance, atol=tolerance
            )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.sampled_from([1, 5, 16, 63, 64, 65, 130]),
    st.sampled_from([1, 2, 7, 40]),
    st.sampled_from([1, 3, 17]),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([None, "bool", "int8"]),
)
@example(8, 200, 33, 5, "float32", None)
@example(6, 129, 33, 40, "float32", None)
@example(1, 64, 1, 1, "bfloat16", None)
def test_drawn_shapes(n, tokens, inputs, luts, dtype, bits_dtype):
    check(n, tokens, inputs, luts, dtype, bits_dtype)


@pytest.mark.parametrize(
    "weighting", [{"decay": "harmonic"}, {"alpha": 2.0, "beta": 0.75}], ids=str
)
def test_other_weightings(weighting):
    check(5, 70, 9, 6, **weighting)


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (2, 5, 3, 0), (1, 0, 1, 0)], ids=str)
def test_nothing_to_read(shape):
    bits, wiring, tables, grad = draw(*shape)
    inputs = jnp.asarray(bits, jnp.float32), jnp.asarray(tables, jnp.float32)
    out, to_bits, to_tables = value_and_vjp(
        lambda b, t: lut.lut_lookup_feature_major(b, wiring, t, implementation="native"),
        inputs,
        jnp.asarray(grad, jnp.float32),
    )
    assert out.shape == grad.shape
    assert (to_bits.shape, to_tables.shape) == (bits.shape, tables.shape)
    assert not np.asarray(to_bits).any() and not np.asarray(to_tables).any()


def test_order_of_sums():
    """An entry adds up every sixteenth token, then halves to halves; a bit its readers, by slot."""
    tokens, rng = 100, np.random.default_rng(0)
    grad = rng.normal(size=(3, tokens)).astype(np.float32)
    bits, wiring = jnp.zeros((2, tokens), jnp.float32), np.asarray([[1, 0], [0, 0], [0, 1]])
    tables = rng.normal(size=(3, 4)).astype(np.float32)

    def run(implementation):
        def read(b, t):
            return lut.lut_lookup_feature_major(b, wiring, t, implementation=implementation)

        return value_and_vjp(read, (bits, jnp.asarray(tables)), jnp.asarray(grad))

    parts = np.zeros((3, 16), np.float32)
    for t in range(tokens):
        parts[:, t % 16] += grad[:, t]
    while parts.shape[1] > 1:
        parts = parts[:, : parts.shape[1] // 2] + parts[:, parts.shape[1] // 2 :]
    for level in library.LEVELS:
        with library.using(level):
            _, to_bits, to_tables = jax.block_until_ready(run("native"))
        np.testing.assert_array_equal(to_tables[:, 0], parts[:, 0])
        if level == "portable" and jax.default_backend() == "cpu":
            np.testing.assert_allclose(to_bits, run("reference")[1], rtol=3e-7)


def arguments(n=3, tokens=70, inputs=10, luts=8):
    wiring = random_wiring(jax.random.key(0), inputs, luts, n)
    rng = np.random.default_rng(0)
    bits = jnp.asarray(rng.integers(0, 2, (tokens, inputs)), jnp.float32)
    return bits, wiring, jnp.asarray(rng.normal(size=(luts, 2**n)), jnp.float32)


def test_transformations():
    """jit, vmap of bits and of tables, remat and scan: XLA's values and gradients."""
    bits, wiring, tables = arguments()
    inverse = invert_wiring(wiring, bits.shape[1])
    many = jnp.stack([bits, 1 - bits])
    several = jnp.stack([tables, -2 * tables])

    def loss(implementation):
        def one(b, t):
            read = lut.lut_lookup(b, wiring, t, inverse=inverse, implementation=implementation)
            return (
                read * jnp.cos(jnp.arange(read.size, dtype=jnp.float32)).reshape(read.shape)
            ).sum()

        def every(b, many, t, several):
            _, scanned = jax.lax.scan(lambda c, x: (c, one(x, t)), 0.0, many)
            return (
                one(b, t)
                + jax.checkpoint(one)(b, t)
                + jax.vmap(one, (0, None))(many, t).sum()
                + jax.vmap(one, (None, 0))(b, several).sum()
                + jax.vmap(one)(many, several).sum()
                + scanned.sum()
            )

        return quick_jit(jax.value_and_grad(every, (0, 1, 2, 3)))(bits, many, tables, several)

    found, expected = loss("native"), loss("xla")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_inside_shard_map():
    """Each device reads its tokens; gradients to the tables are added over devices."""
    bits, wiring, tables = arguments(tokens=6)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))

    def loss(tables, bits, implementation):
        return (lut.lut_lookup(bits, wiring, tables, implementation=implementation) ** 2).sum()

    def of_part(tables, bits):
        return jax.lax.psum(loss(tables, bits, "native"), "data")

    by_token = PartitionSpec("data")
    sharded = jax.shard_map(
        of_part, mesh=mesh, in_specs=(PartitionSpec(), by_token), out_specs=PartitionSpec()
    )
    found = quick_jit(jax.value_and_grad(sharded, (0, 1)))(tables, bits)
    expected = jax.value_and_grad(loss, (0, 1))(tables, bits, "reference")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_wiring_to_bits_that_are_not_there():
    """Where it is not known until it runs: the nearest bit, as of XLA, and no other memory."""
    bits, _, tables = arguments(n=2)
    wiring = jnp.asarray([[-7, 3], [99, 2**30], [9, 10], *[[0, 1]] * 5])
    there = np.clip(wiring, 0, bits.shape[1] - 1)

    def read(bits, tables, wiring):
        return lut.lut_lookup(bits, wiring, tables, implementation="native")

    def run(wiring):
        out, pullback = jax.vjp(lambda b, t: read(b, t, wiring), bits, tables)
        return out, *pullback(jnp.ones_like(out))

    for level in library.LEVELS:
        with library.using(level):
            for a, b in zip(quick_jit(run)(wiring), quick_jit(run)(jnp.asarray(there))):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["bool", "bfloat16", "float32", "int32"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (70, 33), (3, 130), (64, 0)], ids=str)
def test_turned(shape, dtype):
    x = jnp.asarray(
        np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 99, shape), dtype
    )
    np.testing.assert_array_equal(calls.turned(x), np.asarray(x).T)


def test_where_it_is_chosen():
    bits, wiring, tables = arguments(tokens=64)

    def text(bits, implementation=None):
        def read(bits):
            return lut.lut_lookup(bits, wiring, tables, implementation=implementation)

        return jax.jit(read).lower(bits).as_text()

    name = "quweit_lut_forward"
    assert name in text(bits)
    assert name not in text(bits[:63]) and name in text(bits[:63], "native")
    with compiling_for("cpu", portable=True):
        assert name not in text(bits)
    with divided(Mesh(np.asarray(jax.devices()[:2]), ("data",)), "data"):
        assert name not in text(bits)
        with pytest.raises(InputError, match="cannot be divided"):
            text(bits, "native")
    (tokens,) = jax.export.symbolic_shape("t")
    assert "numbers" in str(lut_native.hindrance(jnp.float32, sizes_known=False)("cpu"))
    assert name not in text(jax.ShapeDtypeStruct((tokens, bits.shape[1]), jnp.float32))
    assert "at most 32 bits" in str(lut_native.hindrance(np.float64, sizes_known=True)("cpu"))


def test_a_block():
    """A weightless block is trained with it, and with XLA's gradients."""
    block, x = WeightlessBlock(6, num_luts=20), jax.random.normal(jax.random.key(0), (2, 40, 5))
    variables = quick_jit(block.init)(jax.random.key(1), x)

    def loss(params, x):
        return (jnp.asarray(block.apply({**variables, "params": params}, x)) ** 2).sum()

    both = jax.value_and_grad(loss, (0, 1))
    assert "quweit_lut_backward" in jax.jit(both).lower(variables["params"], x).as_text()
    found = quick_jit(both)(variables["params"], x)
    with compiling_for("cpu", portable=True):
        expected = quick_jit(both)(variables["params"], x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
