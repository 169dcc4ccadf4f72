"""`ops.wiring` against the golden cases and the naive reference: wiring, its inverse, and the two
learnable kinds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops.wiring import (
    arange_wiring,
    invert_wiring,
    learnable_wiring,
    marginal_inputs,
    random_candidates,
    random_wiring,
    sparse_learnable_wiring,
    strongest,
)
from tests.compiled import quick_jit
from tests.ops import naive
from tests.ops.gradients import value_and_vjp

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "luts", "n"), [(7, 5, 3), (6, 4, 3), (40, 3, 2), (2, 3, 5), (1, 4, 2), (5, 0, 3)]
)
def test_random_mapping_uses_inputs_equally_often(inputs, luts, n):
    wiring = np.asarray(random_wiring(jax.random.key(0), inputs, luts, n))
    assert wiring.shape == (luts, n) and wiring.dtype == np.int32
    uses = np.bincount(wiring.reshape(-1), minlength=inputs)
    assert len(uses) == inputs and uses.max() - uses.min() <= 1


def test_random_mapping_depends_on_its_key_alone():
    draw = functools.partial(random_wiring, num_inputs=20, num_luts=10, lut_inputs=4)
    first = np.asarray(draw(jax.random.key(0)))
    np.testing.assert_array_equal(first, draw(jax.random.key(0)))
    assert (first != np.asarray(draw(jax.random.key(1)))).any()
    rounds = first.reshape(2, 20)
    assert (
        (np.sort(rounds, axis=1) == np.arange(20)).all()
        and (rounds[0] != rounds[1]).any()
        and (rounds[0] != np.arange(20)).any()
    )


def test_arange_mapping():
    np.testing.assert_array_equal(arange_wiring(5, 4, 2), [[0, 1], [2, 3], [4, 0], [1, 2]])


@pytest.mark.parametrize(
    ("inputs", "luts", "n"), [(7, 5, 3), (6, 4, 3), (40, 3, 2), (2, 3, 5), (5, 0, 3)]
)
@pytest.mark.parametrize("traced", [False, True])
def test_invert_mapping_finds_every_slot_once(inputs, luts, n, traced):
    wiring = random_wiring(jax.random.key(1), inputs, luts, n)
    invert = functools.partial(invert_wiring, num_inputs=inputs)
    inverse = np.asarray((quick_jit(invert) if traced else invert)(wiring))
    assert inverse.shape == (inputs, -(-luts * n // inputs))
    flat = np.asarray(wiring).T.reshape(-1)  # slot l * L + j
    for f in range(inputs):
        np.testing.assert_array_equal(
            [s for s in inverse[f] if s < luts * n], np.flatnonzero(flat == f)
        )
    assert set(inverse.reshape(-1)) <= set(range(luts * n + 1))


@pytest.mark.parametrize("tau", [0.001, 0.1])
def test_golden_learnable_mapping(shared, tau):
    golden = np.load(shared / "golden" / "dwn.npz")
    bits, scores, grad = (
        golden[f"learnable_mapping_tau{tau}/{key}"] for key in ("bits", "scores", "grad_out")
    )
    results = value_and_vjp(lambda b, s: learnable_wiring(b, s, tau=tau), (bits, scores), grad)
    for found, key in zip(results, ("out", "grad_bits", "grad_scores")):
        np.testing.assert_allclose(
            found, golden[f"learnable_mapping_tau{tau}/{key}"], atol=1e-5, rtol=0
        )


def learnable_case(tokens, inputs, slots, choices=None, seed=0):
    draw = np.random.default_rng(seed)
    bits = draw.integers(0, 2, (tokens, inputs)).astype(np.float32)
    scores = draw.uniform(size=(inputs, slots) if choices is None else (slots, choices)).astype(
        np.float32
    )
    return (
        bits,
        scores,
        draw.normal(size=(tokens, slots)).astype(np.float32),
        draw.integers(0, inputs, (slots, choices or 1)).astype(np.int32),
    )


@pytest.mark.parametrize("tau", [0.001, 0.3])
@pytest.mark.parametrize(
    ("tokens", "inputs", "slots"), [(5, 7, 4), (1, 1, 3), (3, 9, 1), (0, 4, 2)]
)
def test_learnable_mapping(tokens, inputs, slots, tau):
    bits, scores, grad, _ = learnable_case(tokens, inputs, slots)
    results = value_and_vjp(lambda b, s: learnable_wiring(b, s, tau=tau), (bits, scores), grad)
    for found, expected in zip(results, naive.learnable_wiring(bits, scores, grad, tau)):
        close(found, expected)


@pytest.mark.parametrize("tau", [0.001, 0.3])
@pytest.mark.parametrize(
    ("tokens", "inputs", "slots", "choices"),
    [(5, 7, 4, 3), (1, 1, 3, 2), (3, 9, 1, 1), (4, 3, 6, 8), (0, 4, 2, 2)],
)
def test_candidates(tokens, inputs, slots, choices, tau):
    bits, scores, grad, candidates = learnable_case(tokens, inputs, slots, choices)
    results = value_and_vjp(
        lambda b, s: sparse_learnable_wiring(b, s, candidates, tau=tau), (bits, scores), grad
    )
    for found, expected in zip(
        results, naive.sparse_learnable_wiring(bits, scores, candidates, grad, tau)
    ):
        close(found, expected)


def test_all_inputs_as_candidates_is_the_dense_form():
    bits, scores, grad, _ = learnable_case(6, 5, 4)
    every = np.tile(np.arange(5, dtype=np.int32), (4, 1))
    dense = value_and_vjp(lambda b, s: learnable_wiring(b, s, tau=0.2), (bits, scores), grad)
    sparse = value_and_vjp(
        lambda b, s: sparse_learnable_wiring(b, s.T, every, tau=0.2), (bits, scores), grad
    )
    jax.tree.map(close, dense, sparse)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "candidates"])
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions_and_dtypes(lead, sparse):
    bits, scores, grad, candidates = learnable_case(int(np.prod(lead)), 6, 4, 3 if sparse else None)
    read = (lambda b, s: sparse_learnable_wiring(b, s, candidates)) if sparse else learnable_wiring
    reference = naive.sparse_learnable_wiring if sparse else naive.learnable_wiring
    expected = reference(bits, scores, *((candidates, grad) if sparse else (grad,)), 0.001)
    half = jnp.bfloat16
    out, grad_bits, grad_scores = value_and_vjp(
        read, (bits.reshape(*lead, 6).astype(half), scores), grad.reshape(*lead, 4).astype(half)
    )
    assert out.shape == (*lead, 4) and (out.dtype, grad_bits.dtype, grad_scores.dtype) == (
        half,
        half,
        jnp.float32,
    )
    np.testing.assert_array_equal(np.asarray(out, np.float32).reshape(-1, 4), expected[0])
    np.testing.assert_allclose(
        np.asarray(grad_bits, np.float32).reshape(-1, 6), expected[1], rtol=0.02, atol=0.02
    )
    np.testing.assert_allclose(grad_scores, expected[2], rtol=0.02, atol=0.05)
    for dtype in (bool, np.int32):
        whole = read(bits.reshape(*lead, 6).astype(dtype), scores)
        assert whole.dtype == jnp.float32
        np.testing.assert_array_equal(whole, np.asarray(out, np.float32))


def test_ties_go_to_the_lowest():
    bits = np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(
        learnable_wiring(bits, np.ones((3, 1), np.float32))[:, 0], [1, 0, 0]
    )
    chosen = sparse_learnable_wiring(bits, np.ones((1, 2), np.float32), np.asarray([[2, 1]]))
    np.testing.assert_array_equal(chosen[:, 0], [0, 0, 1])


def test_random_candidates_are_an_even_wiring_column_by_column():
    candidates = np.asarray(random_candidates(jax.random.key(0), 6, 9, 4))
    assert candidates.shape == (9, 4) and candidates.dtype == np.int32
    uses = np.bincount(candidates.reshape(-1), minlength=6)
    assert len(uses) == 6 and uses.max() - uses.min() <= 1


ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: random_wiring(jax.random.key(0), 0, 2, 2),
            "random_wiring: expected num_inputs >= 1.*found 0, 2 and 2",
        ),
        (lambda: arange_wiring(3, -1, 2), "arange_wiring: .*found 3, -1 and 2"),
        (lambda: arange_wiring(3, 1, 0), "arange_wiring: .*found 3, 1 and 0"),
        (
            lambda: invert_wiring(np.asarray([[0, 0], [0, 1]]), 2),
            "invert_wiring: input 0 is read 3 times, more than .* = 2",
        ),
        (
            lambda: invert_wiring(np.asarray([[0, 5]]), 3),
            r"invert_wiring: wiring refers to inputs 0\.\.5, of 3 \(valid: 0\.\.2\)",
        ),
        (
            lambda: invert_wiring(np.asarray([[0, -1]]), 3),
            r"invert_wiring: wiring refers to inputs -1\.\.0, of 3",
        ),
        (
            lambda: learnable_wiring(ONES, np.ones((4, 2), np.float32)),
            r"learnable_wiring: .*found \[2, 3\] and \[4, 2\]",
        ),
        (
            lambda: sparse_learnable_wiring(ONES, ONES, np.zeros((2, 2), int)),
            r"must both be \(M, C\), found \[2, 3\] and \[2, 2\]",
        ),
        (
            lambda: sparse_learnable_wiring(ONES, ONES, np.full((2, 3), 3)),
            r"candidates refer to inputs 3\.\.3 but bits has 3 \(valid: 0\.\.2\)",
        ),
        (
            lambda: sparse_learnable_wiring(ONES, ONES, np.full((2, 3), -1)),
            "candidates refer to inputs -1",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("choices", [None, 3])
@pytest.mark.parametrize(("inputs", "slots"), [(7, 12), (40, 12), (1, 1)])
def test_marginal_inputs_are_those_that_a_slot_reads_alone(inputs, slots, choices):
    draw = np.random.default_rng(inputs)
    shape = (inputs, slots) if choices is None else (slots, choices)
    scores = draw.normal(size=shape).astype(np.float32)
    candidates = None if choices is None else draw.integers(0, inputs, shape)
    reads = np.asarray(strongest(scores, candidates))
    expected, gradient = 0.0, np.zeros(shape)
    for m in range(slots):
        own = scores[:, m] if choices is None else scores[m]
        chance = np.exp(2 * own) / np.exp(2 * own).sum()  # at a temperature of a half
        of = np.arange(inputs) if choices is None else candidates[m]
        alone = np.array([f not in np.delete(reads, m) for f in of])
        expected += chance @ alone
        slope = 2 * chance * (alone - chance @ alone)
        gradient[(slice(None), m) if choices is None else m] = slope
    found = jax.value_and_grad(marginal_inputs)(scores, candidates, tau=0.5)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-4, atol=1e-6)
    hard = marginal_inputs(scores, candidates, tau=1e-6)
    np.testing.assert_allclose(hard, (np.bincount(reads) == 1).sum(), atol=1e-5)


@pytest.mark.parametrize(("inputs", "slots"), [(7, 12), (1, 5), (40, 0), (300, 1)])
def test_each_slot_reads_the_first_of_its_largest_scores(inputs, slots):
    scores = np.random.default_rng(inputs).integers(0, 3, (inputs, slots)).astype(np.float32)
    assert np.array_equal(strongest(scores), scores.argmax(0))
    columns = np.tile(np.arange(inputs)[::-1], (slots, 1))
    assert np.array_equal(strongest(scores.T, columns), inputs - 1 - scores.argmax(0))


def test_scores_that_are_no_numbers_choose_an_input_that_is_there():
    assert int(strongest(np.full((3, 1), np.nan, np.float32))[0]) in range(3)
