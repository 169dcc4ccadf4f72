"""Trees of counters take bits that are there, and few tables; that they count, circuits test."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quweit_jax.ops import counters

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def luts(columns):
    """Tables of a tree and of the addition behind it."""
    levels, left = counters.counter_levels(columns), list(columns)
    for level in levels:
        left = counters.counted(left, level)
    made = sum(counter.outputs for level in levels for counter in level)
    return made + counters.adder_luts(left, counters.count_width(columns))


@FEW
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4))
@example([12] * 6)
def test_every_level_takes_bits_that_were_there(columns):
    left = list(columns)
    for level in counters.counter_levels(columns):
        assert level
        taken = np.zeros(len(left) + 1, int)
        for counter in level:
            assert counter.size + counter.upper <= counters.LUT_INPUTS
            taken[counter.column] += counter.size
            taken[counter.column + 1] += counter.upper
        assert (taken <= [*left, 0]).all()
        left = counters.counted(left, level)
    assert max(left, default=0) <= 2
    assert not any(left[counters.count_width(columns) :])


@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_few_bits_take_what_can_be_counted_by_hand(bits):
    assert luts([bits]) == [0, 0, 2, 2][bits]


# The fewest by the sums of an integer program, which knows no levels: a bound from below.
@pytest.mark.parametrize(
    "bits, fewest, taken", [(36, 33, 33), (69, 65, 66), (94, 87, 89), (110, 104, 104)]
)
def test_few_tables_are_wasted(bits, fewest, taken):
    assert fewest <= luts([bits]) == taken


def test_a_thousand_bits_take_hardly_more_than_a_table_each():
    for bits in range(4, 1000, 83):
        ideal = bits - bits.bit_length()
        assert ideal <= luts([bits]) <= 1.03 * ideal + 4
