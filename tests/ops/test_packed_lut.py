"""Look-up tables as deployed, against plain NumPy."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quweit_jax.errors import InputError
from quweit_jax.ops import packed_lut, vector_lut
from quweit_jax.ops.kernels import choice, packed_sums
from tests.compiled import quick_jit
from tests.ops import naive

drawn = settings(deadline=None, max_examples=12, derandomize=True)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_tables_round_trip_through_bits(n):
    tables = np.random.default_rng(n).normal(size=(5, 2**n)).astype(np.float32)
    tables[0, 0] = 0  # not above zero: the bit is 0
    bits = packed_lut.pack_tables(tables)
    assert bits.dtype == np.uint8 and bits.shape == (5, max(1, 2**n // 8))
    every = np.tile(np.arange(2**n, dtype=np.int32), (5, 1))
    np.testing.assert_array_equal(
        packed_lut.read_packed(jnp.asarray(bits), jnp.asarray(every)), tables > 0
    )


@drawn
@given(st.integers(0, 4), st.integers(0, 140), st.sampled_from(["bool", "int32", "bfloat16"]))
def test_bits_round_trip_through_words(features, tokens, dtype):
    bits = np.random.default_rng(tokens).integers(0, 2, (features, tokens))
    packed = packed_lut.pack_bits(jnp.asarray(bits, dtype))
    assert packed.words.dtype == jnp.uint32 and packed.shape == (features, tokens)
    assert packed.words.shape == (features, -(-tokens // 32))
    np.testing.assert_array_equal(packed.unpack(), bits.astype(bool))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8"])
@pytest.mark.parametrize("width, tokens, steps, shared", [(3, 1, 2, False), (2, 70, 3, True)])
def test_thermometer_bits_are_packed_as_they_are_made(width, tokens, steps, shared, dtype):
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.integers(0, 9, (width, tokens)), dtype)
    thresholds = jnp.asarray(rng.integers(0, 9, (1 if shared else width, steps)), jnp.float32)
    found = quick_jit(packed_lut.pack_above)(x, thresholds).unpack()
    expected = np.asarray(x, np.float32)[:, None] > np.asarray(thresholds)[:, :, None]
    np.testing.assert_array_equal(found, expected.reshape(-1, tokens))


def test_a_number_that_is_none_is_above_nothing():
    x = jnp.asarray([[np.nan, -np.inf, np.inf, 1.0]])
    found = packed_lut.pack_above(x, jnp.zeros((1, 1))).unpack()
    np.testing.assert_array_equal(found, [[False, False, True, True]])


@pytest.mark.parametrize("width, tokens, steps", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_no_thermometer_bits(width, tokens, steps):
    bits = packed_lut.pack_above(jnp.zeros((width, tokens)), jnp.zeros((width, steps)))
    assert bits.unpack().shape == bits.shape == (width * steps, tokens)


def look_up_case(n, inputs, luts, tokens):
    rng = np.random.default_rng(n)
    bits, wiring = rng.integers(0, 2, (inputs, tokens)), rng.integers(0, inputs, (luts, n))
    return bits, wiring.astype(np.uint8), rng.normal(size=(luts, 2**n)).astype(np.float32)


@drawn
@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 6), st.sampled_from([0, 1, 7, 32, 67]))
def test_look_up(n, inputs, luts, tokens):
    bits, wiring, tables = look_up_case(n, inputs, luts, tokens)
    expected = naive.lut_lookup(bits.T, wiring, tables) > 0
    for implementation in (None, "xla", "reference"):
        found = quick_jit(functools.partial(packed_lut.look_up, implementation=implementation))(
            bits.astype(bool), wiring, packed_lut.pack_tables(tables)
        )
        assert found.dtype == bool and found.shape == (luts, tokens)
        np.testing.assert_array_equal(found, np.asarray(expected).reshape(tokens, luts).T)


@pytest.mark.parametrize("mapped", [0, 1, 2], ids=["bits", "wiring", "tables"])
def test_look_up_under_vmap_and_scan(mapped):
    bits, wiring, tables = look_up_case(3, 8, 5, 40)
    arguments = [jnp.asarray(bits, bool), jnp.asarray(wiring), packed_lut.pack_tables(tables)]
    several = [jnp.stack([a, a[::-1]]) if i == mapped else a for i, a in enumerate(arguments)]
    axes = tuple(0 if i == mapped else None for i in range(3))
    found = quick_jit(jax.vmap(packed_lut.look_up, axes))(*several)

    def one(carry, given):
        arguments_of_one = [given if i == mapped else a for i, a in enumerate(arguments)]
        return carry, packed_lut.look_up(*arguments_of_one)

    scanned = quick_jit(lambda x: jax.lax.scan(one, 0, x)[1])(several[mapped])
    for i in range(2):
        own = [a[i] if j == mapped else a for j, a in enumerate(several)]
        expected = packed_lut.look_up(*own, implementation="reference")
        np.testing.assert_array_equal(found[i], expected)
        np.testing.assert_array_equal(scanned[i], expected)


def add_case(luts, tokens, features):
    rng = np.random.default_rng(luts)
    bits, vectors = rng.integers(0, 2, (luts, tokens)), rng.integers(-128, 128, (luts, features))
    return bits.astype(bool), vectors.astype(np.int8)


@pytest.mark.parametrize("packed", [False, True], ids=["bool", "words"])
@pytest.mark.parametrize(
    "luts, tokens, features", [(1, 1, 1), (32, 3, 5), (70, 40, 4), (5, 0, 3), (0, 4, 2), (3, 16, 0)]
)
def test_add_vectors(luts, tokens, features, packed):
    bits, vectors = add_case(luts, tokens, features)
    given_bits = packed_lut.pack_bits(jnp.asarray(bits)) if packed else bits
    for implementation in (None, "xla", "reference"):
        add = functools.partial(packed_lut.add_vectors, implementation=implementation)
        found = quick_jit(add)(given_bits, vectors)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, bits.T.astype(np.int32) @ vectors.astype(np.int32))


@pytest.mark.parametrize("tokens", [1, 33, packed_sums._MANY_TOKENS + 1])
def test_every_way_to_add_gives_the_same_integers(tokens):
    bits, vectors = add_case(13, tokens, 3)
    vectors[:, 0], vectors[:, 1] = -128, 127  # the largest sums of a group
    bits[:, 0] = True
    expected = bits.T.astype(np.int32) @ vectors.astype(np.int32)
    words = packed_lut.pack_bits(jnp.asarray(bits)).words
    for found in (
        packed_sums.select_and_add(bits, vectors),
        packed_sums.product_of_bits(jnp.asarray(bits), vectors),
        packed_sums.subset_sums(words, vectors, tokens),
    ):
        np.testing.assert_array_equal(found, expected)


def test_sums_beyond_16_bits():
    bits, vectors = np.ones((600, 20), bool), np.full((600, 2), -128, np.int8)
    np.testing.assert_array_equal(packed_lut.add_vectors(bits, vectors), np.full((20, 2), -76800))
    tables, bits = np.full((300, 2, 3), 127, np.int8), np.ones((300, 1, 5))
    found = vector_lut.packed_vector_lookup(jnp.asarray(bits), jnp.asarray(tables))
    np.testing.assert_array_equal(found, np.full((5, 3), 300 * 127))


def test_vectors_of_no_tokens_add_up_to_nothing():
    found = vector_lut.packed_vector_lookup(jnp.zeros((17, 2, 0)), jnp.zeros((17, 4, 3), jnp.int8))
    assert found.shape == (0, 3) and found.dtype == jnp.int32


def test_a_number_of_tokens_that_is_only_a_name():
    bits, wiring, tables = look_up_case(3, 8, 20, 75)
    packed = packed_lut.pack_tables(tables)
    vectors = np.random.default_rng(0).integers(-128, 128, (20, 6)).astype(np.int8)

    def block(bits_TF):
        out = packed_lut.look_up_words(packed_lut.pack_bits(bits_TF.T), wiring, packed)
        return packed_lut.add_vectors(out, vectors), out.unpack()

    (tokens,) = jax.export.symbolic_shape("t", constraints=["t >= 1"])
    program = jax.export.export(jax.jit(block), platforms=("cpu", "tpu"))(
        jax.ShapeDtypeStruct((tokens, 8), bool)
    )
    for count in (75, 1, 32):
        found = program.call(jnp.asarray(bits.T[:count], bool))
        for one, other in zip(found, block(jnp.asarray(bits.T[:count], bool))):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("at", ["gpu", "tpu"])
@pytest.mark.parametrize("n, tokens, inputs, luts", [(1, 1, 1, 1), (4, 70, 5, 9), (7, 4200, 9, 3)])
def test_kernels_equal_the_reference(at, n, tokens, inputs, luts):
    rng = np.random.default_rng(n)
    bits, wiring = rng.integers(0, 2, (inputs, tokens)), rng.integers(0, inputs, (luts, n))
    packed = packed_lut.pack_tables(rng.normal(size=(luts, 2**n)))
    with choice.interpreted(), choice.compiling_for(at):
        found = jax.jit(functools.partial(packed_lut.look_up, implementation="pallas"))(
            bits, wiring, packed
        )
    expected = packed_lut.look_up(bits, wiring, packed, implementation="reference")
    np.testing.assert_array_equal(found, expected)


def test_kernels_divide_words_over_devices():
    rng = np.random.default_rng(0)
    bits, wiring = rng.integers(0, 2, (3, 128)), rng.integers(0, 3, (5, 2))
    packed = packed_lut.pack_tables(rng.normal(size=(5, 4)))
    read = functools.partial(packed_lut.look_up, implementation="pallas")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("data",))
    with choice.interpreted(), choice.compiling_for("gpu"), choice.divided(mesh, "data"):
        found = jax.jit(read)(bits, wiring, packed)
    expected = packed_lut.look_up(bits, wiring, packed, implementation="reference")
    np.testing.assert_array_equal(found, expected)


def test_unknown_implementations_are_refused():
    bits, wiring, tables = look_up_case(2, 3, 2, 4)
    with pytest.raises(InputError, match="implementation='cuda' does not exist"):
        packed_lut.look_up(bits, wiring, packed_lut.pack_tables(tables), implementation="cuda")
    with pytest.raises(InputError, match="look_up_words: expected bits"):
        packed_lut.look_up_words(packed_lut.pack_bits(jnp.zeros((0, 3), bool)), wiring, tables)
