"""`ops.ternary_fit` against all matrices there are, and against rounding."""

import itertools

import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops import ternary, ternary_fit


def problem(inputs=12, outputs=5, rows=40, seed=0):
    """X, what is wanted of it, and the products of both."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, inputs)) @ draw.normal(size=(inputs, inputs))
    weights = draw.normal(size=(inputs, outputs))
    return x, weights, x.T @ x / rows, x.T @ x @ weights / rows


def error(x, found, scale, wanted):
    return np.square(x @ (found * scale - wanted)).sum(0)


@pytest.mark.parametrize("seed", range(3))
def test_no_change_of_one_weight_is_better(seed):
    x, weights, gram, cross = problem(seed=seed)
    scale = np.linspace(0.8, 1.6, 5)
    found = ternary_fit.fit_ternary(gram, cross, scale, weights / scale, 50)
    assert found.dtype == np.int8 and set(np.unique(found)) <= {-1, 0, 1}
    best = error(x, found, scale, weights)
    for i, other in itertools.product(range(12), (-1, 0, 1)):
        moved = found.copy()
        moved[i] = other
        assert (error(x, moved, scale, weights) >= best * (1 - 1e-9)).all()
    rounded = np.clip(np.round(weights / scale), -1, 1)
    before = error(x, rounded, scale, weights)
    assert (best <= before * (1 + 1e-9)).all() and best.sum() < 0.9 * before.sum()


def test_inputs_that_do_not_correlate_give_the_best_of_all_matrices():
    draw = np.random.default_rng(1)
    squares, weights = np.asarray([2.0, 0.3, 1.0, 0.7]), draw.normal(size=(4, 3))
    gram, scale = np.diag(squares), np.asarray([0.9])
    found = ternary_fit.fit_ternary(gram, gram @ weights, scale, np.zeros((4, 3)))
    every = np.asarray(list(itertools.product((-1, 0, 1), repeat=4)))
    for j in range(3):
        errors = (squares * np.square(every * 0.9 - weights[:, j])).sum(1)
        np.testing.assert_array_equal(found[:, j], every[errors.argmin()])


def test_an_input_that_is_never_seen_keeps_its_rounding():
    gram = np.diag([1.0, 0.0])
    found = ternary_fit.fit_ternary(gram, gram @ np.ones((2, 1)), np.ones(1), np.full((2, 1), -1.0))
    assert found.tolist() == [[1], [-1]]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)])
def test_edges(shape):
    inputs = shape[0]
    cross = np.full(shape, 0.9)
    found = ternary_fit.fit_ternary(np.eye(inputs), cross, np.ones(1), np.zeros(shape))
    assert found.shape == shape and (found == 1).all()
    assert ternary_fit.best_scale(np.eye(inputs), cross, found) == pytest.approx(
        0.9 * bool(cross.size)
    )
    assert ternary_fit.float_weights(found, cross, 0.5).shape == shape


def test_the_best_scale_is_that_of_least_squares():
    x, weights, gram, cross = problem()
    whole = np.clip(np.round(weights), -1, 1)
    expected = np.linalg.lstsq((x @ whole).reshape(-1, 1), (x @ weights).ravel(), rcond=None)[0][0]
    assert ternary_fit.best_scale(gram, cross, whole) == pytest.approx(expected)
    assert ternary_fit.best_scale(gram, cross, np.zeros_like(whole)) == 0


@pytest.mark.parametrize("zeros", [0.02, 0.4, 0.97])
def test_float_weights_are_rounded_to_what_was_asked(zeros):
    draw = np.random.default_rng(0)
    whole = np.where(draw.random((30, 20)) < zeros, 0, draw.choice([-1, 1], (30, 20)))
    wanted = 0.8 * draw.normal(size=(30, 20))
    made = ternary_fit.float_weights(whole, wanted, 0.02)
    found, scale = ternary.quantize_weights(made)
    np.testing.assert_array_equal(found, whole)
    assert made.dtype == np.float32 and float(scale) == pytest.approx(0.02, rel=1e-5)
    # a weight that wanted to be another one is nearer to becoming it than one that did not
    some = (whole == 0) & (wanted > 0)
    order = np.argsort(wanted[some])
    assert (np.diff(made[some][order]) >= 0).all()


def test_shapes_that_do_not_belong_together():
    good = [np.eye(3), np.ones((3, 2)), np.ones(2), np.zeros((3, 2))]
    for place, wrong in enumerate([np.eye(2), np.ones((2, 3)), np.ones(3), np.zeros((3, 3))]):
        given = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(InputError, match="fit_ternary: expected"):
            ternary_fit.fit_ternary(*given)
    with pytest.raises(InputError, match="positive scales"):
        ternary_fit.fit_ternary(*good[:2], np.zeros(2), good[3])


@pytest.mark.parametrize("seed", range(3))
def test_weights_and_their_scale_are_found_together(seed):
    x, weights, gram, cross = problem(inputs=24, seed=seed)
    found, near, scale = ternary_fit.fit_ternary_and_scale(gram, cross, ridge=0.0)
    np.testing.assert_allclose(near * scale, weights, rtol=1e-4, atol=1e-5)
    mean = np.abs(weights).mean()  # as `ternary.quantize_weights` rounds
    rounded = error(x, np.clip(np.round(weights / mean), -1, 1), mean, weights).sum()
    best = error(x, found, scale, weights).sum()
    assert best < 0.6 * rounded
    for other in (0.9, 1.1):
        assert error(x, found, other * scale, weights).sum() > best
    kernel = ternary_fit.float_weights(found, near, scale)
    again, mean = ternary.quantize_weights(kernel)
    np.testing.assert_array_equal(again, found)
    np.testing.assert_allclose(mean, scale, rtol=1e-5)


def test_weights_and_scale_of_one_weight_of_none_and_of_nothing_wanted():
    one = ternary_fit.fit_ternary_and_scale(np.asarray([[4.0]]), np.asarray([[-2.0]]))
    assert one[0].tolist() == [[-1]] and one[2] == pytest.approx(0.5, rel=1e-2)
    for shape in ((3, 0), (3, 2)):
        found, near, scale = ternary_fit.fit_ternary_and_scale(np.eye(3), np.zeros(shape))
        assert found.shape == near.shape == shape and not found.any() and 0 < scale < 1e-6
