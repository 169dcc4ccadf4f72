"""`ops.pair_table` and `ops.vector_lut`: values and every gradient against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops import pair_table, vector_lut
from tests.compiled import quick_jit
from tests.ops.gradients import value_and_vjp


def naive_codes(sums, step, code_bits):
    """The number of halfway points at or below, less half the codes."""
    half = 2 ** (code_bits - 1)
    halfway = [step * (k - 0.5) for k in range(1 - half, half)]
    return np.asarray([sum(v >= h for h in halfway) - half for v in np.ravel(sums)], float).reshape(
        np.shape(sums)
    )


def naive_pair_lookup(first, second, tables, gradient):
    """(values, gradient to the first codes, to the second, to the tables)."""
    groups, side, _ = tables.shape
    tokens, units = first.shape
    out, entries = np.zeros((3, tokens, units)), np.zeros(tables.shape)
    for t in range(tokens):
        for j in range(units):
            g, a, b = j // (units // groups), *(int(c[t, j]) + side // 2 for c in (first, second))
            table = tables[g]
            out[0, t, j] = table[a, b]
            low, high = max(a - 1, 0), min(a + 1, side - 1)
            out[1, t, j] = gradient[t, j] * (table[high, b] - table[low, b]) / (high - low)
            low, high = max(b - 1, 0), min(b + 1, side - 1)
            out[2, t, j] = gradient[t, j] * (table[a, high] - table[a, low]) / (high - low)
            entries[g, a, b] += gradient[t, j]
    return (*out, entries)


@pytest.mark.parametrize("step,code_bits", [(1, 1), (7, 3), (74, 4), (2, 4), (5, 6)])
def test_codes_count_the_halfway_points(step, code_bits):
    reach = step * 2 ** (code_bits - 1) + 3 * step
    sums = np.arange(-reach, reach + 1, dtype=np.float32)
    codes, gradient = value_and_vjp(
        lambda s: pair_table.codes(s, step, code_bits), (sums,), np.ones_like(sums)
    )
    np.testing.assert_array_equal(codes, naive_codes(sums, step, code_bits))
    halfway = pair_table.halfway_points(step, code_bits)
    counted = pair_table.count_codes(jnp.asarray(sums, jnp.int32), halfway)
    assert counted.dtype == jnp.int32
    np.testing.assert_array_equal(counted, codes)
    # the gradient is that of sums / step where the nearest multiple is in the range
    nearest, half = np.floor(sums / step + 0.5), 2 ** (code_bits - 1)
    inside = (nearest >= -half) & (nearest < half)
    np.testing.assert_allclose(gradient, np.where(inside, 1 / step, 0), rtol=1e-6)


@pytest.mark.parametrize(
    "tokens,units,groups,code_bits", [(5, 6, 1, 2), (7, 6, 3, 3), (3, 4, 4, 1), (1, 1, 1, 4)]
)
def test_pair_lookup(tokens, units, groups, code_bits):
    draw, side = np.random.default_rng(tokens), 2**code_bits
    tables = draw.normal(size=(groups, side, side)).astype(np.float32)
    codes = draw.integers(-side // 2, side // 2, (2, tokens, units)).astype(np.float32)
    gradient = draw.normal(size=(tokens, units)).astype(np.float32)
    found = value_and_vjp(pair_table.pair_lookup, (*codes, tables), gradient)
    for value, expected in zip(found, naive_pair_lookup(*codes, tables, gradient)):
        np.testing.assert_allclose(value, expected, atol=1e-5)
    whole = np.round(30 * tables).astype(np.int8)
    read = quick_jit(pair_table.pair_lookup)(*codes.astype(np.int32), whole)
    assert read.dtype == np.int8
    np.testing.assert_array_equal(read, naive_pair_lookup(*codes, whole, gradient)[0])


def test_pair_lookup_takes_any_leading_shape_and_none():
    tables = jnp.arange(32.0).reshape(2, 4, 4)
    for lead in ((), (0,), (2, 0, 3), (2, 3)):
        codes = jnp.ones((*lead, 6))
        assert pair_table.pair_lookup(codes, codes, tables).shape == (*lead, 6)
    assert pair_table.pair_lookup(jnp.ones((3, 0)), jnp.ones((3, 0)), tables).shape == (3, 0)


@pytest.mark.parametrize(
    "first,second,tables",
    [
        ((2, 6), (2, 5), (1, 4, 4)),
        ((2, 6), (2, 6), (4, 4, 4)),
        ((2, 6), (2, 6), (1, 4, 8)),
        ((2, 6), (2, 6), (4, 4)),
        ((), (), (1, 4, 4)),
    ],
)
def test_shapes_that_do_not_belong_together(first, second, tables):
    with pytest.raises(InputError, match="pair_lookup"):
        pair_table.pair_lookup(jnp.zeros(first), jnp.zeros(second), jnp.zeros(tables))


def test_the_gate_at_the_start():
    gate = pair_table.silu_gate(4, 0.25)
    a = 0.25 * np.arange(-8, 8)
    for i, j in ((0, 0), (0, 15), (15, 15), (8, 3), (11, 2)):
        expected = 2 * a[i] / (1 + np.exp(-2 * a[i])) * a[j]
        np.testing.assert_allclose(gate[i, j], expected, rtol=1e-6)
    scale = pair_table.entry_scale(gate)
    assert scale == 16 and 127 / 2 < np.abs(gate * scale).max() <= 127
    # no entry is so near a half that two platforms could round it to different numbers
    assert np.abs(gate * scale % 1 - 0.5).min() > 1e-3
    with pytest.raises(InputError, match="code_bits"):
        pair_table.silu_gate(7, 0.25)


@pytest.mark.parametrize("code_bits,step", [(4, 0.25), (2, 0.7), (1, 1.0), (6, 0.05)])
def test_the_gate_is_the_same_read_and_computed(code_bits, step, monkeypatch):
    side = 2**code_bits
    codes = np.arange(side, dtype=np.float32) - side // 2
    first, second = (a.reshape(1, -1) for a in np.meshgrid(codes, codes, indexing="ij"))
    gradient = np.random.default_rng(0).normal(size=first.shape).astype(np.float32)
    gate = pair_table.silu_gate(code_bits, step)
    whole = np.round(gate * pair_table.entry_scale(gate))[None]
    expected = naive_pair_lookup(first, second, whole, gradient)[:3]

    def gated(first, second):
        return pair_table.gated(first, second, code_bits, step)

    for value, right in zip(value_and_vjp(gated, (first, second), gradient), expected):
        np.testing.assert_allclose(value, right, atol=1e-4)
    # as on other platforms
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    for value, right in zip(value_and_vjp(gated, (first, second), gradient), expected):
        np.testing.assert_allclose(value, right, atol=1e-4)


def test_entries_are_rounded_with_a_gradient():
    tables = jnp.asarray([[-200.0, 0.4, 0.6, 300.0]])
    rounded, gradient = value_and_vjp(pair_table.round_entries, (tables,), jnp.full((1, 4), 3.0))
    np.testing.assert_array_equal(rounded, [[-127, 0, 1, 127]])
    np.testing.assert_array_equal(gradient, [[3, 3, 3, 3]])


def naive_vector_lookup(bits, vectors, gradient):
    """(sums, gradient to the bits, to the vectors)."""
    num, n, tokens = bits.shape
    out, slopes = np.zeros((tokens, vectors.shape[2])), np.zeros(bits.shape)
    entries = np.zeros(vectors.shape)
    for t in range(tokens):
        for j in range(num):
            address = sum(int(bits[j, l, t]) << l for l in range(n))
            out[t] += vectors[j, address]
            entries[j, address] += gradient[t]
            for l in range(n):
                change = vectors[j, address | (1 << l)] - vectors[j, address & ~(1 << l)]
                slopes[j, l, t] = change @ gradient[t]
    return out, slopes, entries


@pytest.mark.parametrize("num,n,tokens,d", [(3, 2, 5, 4), (1, 1, 1, 1), (5, 4, 3, 7), (2, 3, 0, 3)])
def test_vector_lookup(num, n, tokens, d):
    draw = np.random.default_rng(num)
    bits = draw.integers(0, 2, (num, n, tokens)).astype(np.float32)
    vectors = draw.normal(size=(num, 2**n, d)).astype(np.float32)
    gradient = draw.normal(size=(tokens, d)).astype(np.float32)
    found = value_and_vjp(vector_lut.vector_lookup, (bits, vectors), gradient)
    for value, expected in zip(found, naive_vector_lookup(bits, vectors, gradient)):
        np.testing.assert_allclose(value, expected, atol=1e-5)
    whole = np.round(40 * vectors).clip(-127, 127).astype(np.int8)
    total = quick_jit(vector_lut.packed_vector_lookup)(bits, whole)
    assert total.dtype == np.int32
    np.testing.assert_array_equal(total, naive_vector_lookup(bits, whole.astype(int), gradient)[0])


def test_vector_lookup_refuses_other_shapes():
    with pytest.raises(InputError, match="vector_lookup"):
        vector_lut.vector_lookup(jnp.zeros((3, 2, 5)), jnp.zeros((3, 8, 4)))


def test_the_ternary_weights_gradient_is_in_units_of_the_scale():
    from quweit_jax.ops import ternary

    weight = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    upstream = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    whole, gradient = value_and_vjp(ternary.ternary_weights, (weight,), upstream)
    scale = np.abs(weight).mean()
    np.testing.assert_array_equal(whole, np.clip(np.round(weight / scale), -1, 1))
    np.testing.assert_allclose(gradient, upstream / scale, rtol=1e-5)
    assert jax.eval_shape(ternary.ternary_weights, jnp.zeros((0, 3))).shape == (0, 3)
