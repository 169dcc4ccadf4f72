"""Look-up tables as deployed, against plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.ops import packed_lut
from tests.compiled import quick_jit
from tests.ops import naive


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


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_look_up(n, tokens):
    rng = np.random.default_rng(n)
    bits, wiring = rng.integers(0, 2, (11, tokens)), rng.integers(0, 11, (6, n))
    tables = rng.normal(size=(6, 2**n)).astype(np.float32)
    found = quick_jit(packed_lut.look_up)(
        bits.astype(bool), wiring.astype(np.uint8), packed_lut.pack_tables(tables)
    )
    expected = naive.lut_lookup(bits.T, wiring, tables) > 0
    assert found.dtype == bool and found.shape == (6, tokens)
    np.testing.assert_array_equal(found, np.asarray(expected).reshape(tokens, 6).T)


@pytest.mark.parametrize("luts, tokens, features", [(1, 1, 1), (32, 3, 5), (70, 2, 4), (5, 0, 3)])
def test_add_vectors(luts, tokens, features):
    rng = np.random.default_rng(luts)
    bits, vectors = rng.integers(0, 2, (luts, tokens)), rng.integers(-128, 128, (luts, features))
    found = quick_jit(packed_lut.add_vectors)(bits.astype(bool), vectors.astype(np.int8))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, bits.T @ vectors)
