"""`report.insight`: kinds of tables against counts from the literature and against planes drawn
at random.
"""

import itertools

import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.report import insight

# Linear-threshold functions of n labelled inputs, constants included (OEIS A000609).
THRESHOLD_FUNCTIONS = {0: 2, 1: 4, 2: 14, 3: 104, 4: 1882}


@pytest.mark.parametrize("inputs", [0, 1, 2, 3, 4])
def test_threshold_functions_are_as_many_as_known(inputs):
    size = 2**inputs
    tables = (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(bool)
    kinds = insight.count_kinds(tables, np.tile(np.arange(inputs), (len(tables), 1)))
    assert kinds["constant"] == 2 and kinds["copy"] == 2 * inputs
    assert sum(kinds.values()) - kinds["other"] == THRESHOLD_FUNCTIONS[inputs]


@pytest.mark.parametrize("inputs", [5, 6, 8])
def test_planes_are_found_and_parities_are_not(inputs):
    draw = np.random.default_rng(inputs)
    corners = np.asarray(list(itertools.product([0, 1], repeat=inputs)))[:, ::-1]
    for _ in range(20):
        weights = draw.integers(-4, 5, inputs)
        assert insight.is_linear_threshold(corners @ weights > draw.integers(-6, 6) + 0.5)
    assert insight.kind_of(corners.sum(1) % 2) == "other"


def test_a_unate_function_that_no_plane_separates():
    """x0 x1 + x2 x3: passes the quick check, and the linear program has to find that it is none."""
    x = np.arange(16)[:, None] >> np.arange(4) & 1
    table = (x[:, 0] & x[:, 1]) | (x[:, 2] & x[:, 3])
    for flips in range(16):  # nor is it one with some of its inputs negated
        assert insight.kind_of(table[np.arange(16) ^ flips]) == "other"


def test_inputs_read_twice_count_once():
    parity = np.asarray([0, 1, 1, 0], bool)  # of an input and itself: always 0
    assert insight.kind_of(parity) == "other"
    assert insight.count_kinds(parity[None], np.asarray([[3, 3]]))["constant"] == 1
    table = np.asarray([0, 9, 9, 9, 9, 1, 9, 1])[
        :, None
    ]  # slots 0 and 2 read input 7: entries 0, 2, 5, 7
    table[2] = 0
    np.testing.assert_array_equal(insight.reduce_repeated(table[:, 0], [7, 4, 7]), [0, 1, 0, 1])


def test_reads_are_counted():
    np.testing.assert_array_equal(
        insight.count_reads(np.asarray([[0, 2], [2, 2]]), 4), [1, 0, 3, 0]
    )


def test_wrong_lengths():
    with pytest.raises(InputError, match=r"kind_of: expected a table of 1, 2, 4, \.\.\. 256 bits"):
        insight.kind_of(np.zeros(12))
