"""Counting bits with look-up tables of 6 inputs: a tree of counters, then one addition.

A counter takes some bits of one weight, and at times some of twice that weight, and gives their sum
as a number; each bit of the number is a table. Six bits of one weight (or five and one of twice it)
become three, so that a table takes one bit away; smaller counters take away less. Such counters are
the generalized parallel counters of Kumm and Zipf, "Pipelined compressor tree optimization using
integer linear programming" (FPL 2014); here a tree ends with what a search finds, from columns
of at most twelve bits on.

A column is the bits of one weight, lowest weight first; columns are given by how many they hold.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
from collections.abc import Sequence

LUT_INPUTS = 6  # of the tables of most FPGAs
COLUMNS_ABOVE = 3  # its own, to which a counter's bits reach: it gives at most 4
_SEARCHED = 12  # bits of a column from which on the rest is searched for
_ADDED = 2  # bits of a column that the addition takes


@dataclasses.dataclass(frozen=True)
class Counter:
    """Adds `size` bits of weight 2**column, and `upper` bits of the next; each of its `outputs`
    bits, from that column upwards, is a table. Bits are the first that their columns held before
    the level; those that cannot be set are left out.
    """

    column: int
    size: int
    upper: int
    outputs: int


# (size, upper) of the counters that give fewer bits than they take
_SHAPES = [
    (size, upper)
    for size in range(LUT_INPUTS, 1, -1)
    for upper in range(LUT_INPUTS - size + 1)
    if (size + 2 * upper).bit_length() < size + upper
]


# Where a search stands: the lowest column that is still counted, and the columns.
_Node = tuple[int, tuple[int, ...]]


def count_width(columns: Sequence[int]) -> int:
    """Bits of the largest sum of the columns, at least 1."""
    return max(1, sum(size << column for column, size in enumerate(columns)).bit_length())


def counter_levels(columns: Sequence[int]) -> list[list[Counter]]:
    """A tree's counters by level, until no column has more than two bits; [] if none has.

    A level's counters take bits that were there before it.
    """
    width, state, levels = count_width(columns), _trimmed(columns), []
    while max(state, default=0) > _SEARCHED:
        levels.append(
            [
                _counter(column, LUT_INPUTS, 0, width)
                for column, size in enumerate(state)
                for _ in range(size // LUT_INPUTS)
            ]
        )
        state = counted(state, levels[-1])
    waiting = list(_cheapest(tuple(state), width))
    while waiting:
        level, waiting = _ready(state, waiting)
        levels.append(level)
        state = counted(state, level)
    return levels


def _ready(
    columns: Sequence[int], waiting: Sequence[Counter]
) -> tuple[list[Counter], list[Counter]]:
    """The counters that find all their bits in the columns, in turn, and those that do not yet."""
    left = collections.defaultdict(int, enumerate(columns))
    now: list[Counter] = []
    later: list[Counter] = []
    for counter in waiting:
        own, next_one = counter.column, counter.column + 1
        if left[own] >= counter.size and left[next_one] >= counter.upper:
            left[own] -= counter.size
            left[next_one] -= counter.upper
            now.append(counter)
        else:
            later.append(counter)
    return now, later


def counted(columns: Sequence[int], level: Sequence[Counter]) -> list[int]:
    """The columns behind a level of counters."""
    left = [*columns, *[0] * COLUMNS_ABOVE]
    for counter in level:
        left[counter.column] -= counter.size
        left[counter.column + 1] -= counter.upper
        for place in range(counter.outputs):
            left[counter.column + place] += 1
    return _trimmed(left)


def adder_luts(columns: Sequence[int], width: int) -> int:
    """Tables that add columns of at most two bits to a number of `width` bits; 0 where no column
    has two.
    """
    start = next((i for i, size in enumerate(columns) if size > 1), width)
    count = 0
    for low in range(start, min(width, len(columns)), 2):  # two, and the carry from below
        size = min(2, width - low)
        count += size + (low + size < width)  # the carry out is a table, too
    return count


def _counter(column: int, size: int, upper: int, width: int) -> Counter:
    return Counter(column, size, upper, min((size + 2 * upper).bit_length(), width - column))


def _trimmed(columns: Sequence[int]) -> list[int]:
    found = list(columns)
    while found and not found[-1]:
        found.pop()
    return found


@functools.lru_cache(maxsize=1024)
def _cheapest(columns: tuple[int, ...], width: int) -> tuple[Counter, ...]:
    """Counters, in an order in which each finds its bits, that together with the addition take
    few tables: A* search, whose bound is that a table takes one bit away. (At the top, where the
    highest bit of a sum cannot be set, one can take two; so the fewest are not assured.) Lower
    columns come first, which loses nothing.
    """
    start: _Node = (0, columns)
    cost: dict[_Node, int] = {start: 0}
    before: dict[_Node, tuple[_Node, Counter]] = {}
    heap: list[tuple[int, int, int, _Node]] = [(0, 0, 0, start)]
    while True:
        _, paid, ended, node = heapq.heappop(heap)
        if ended:
            break
        if paid > cost[node]:
            continue
        first, state = node
        if max(state, default=0) <= _ADDED:
            total = paid + adder_luts(state, width)
            heapq.heappush(heap, (total, total, 1, node))
        for column in range(first, len(state)):
            above = state[column + 1] if column + 1 < len(state) else 0
            for size, upper in _SHAPES:
                if size > state[column] or upper > above:
                    continue
                counter = _counter(column, size, upper, width)
                reached: _Node = (column, tuple(counted(state, [counter])))
                own = paid + counter.outputs
                if own < cost.get(reached, own + 1):
                    cost[reached], before[reached] = own, (node, counter)
                    bound = own + max(0, sum(reached[1]) - width)
                    heapq.heappush(heap, (bound, own, 0, reached))
            if state[column] > _ADDED:
                break  # nothing higher can end it
    path: list[Counter] = []
    while node in before:
        node, counter = before[node]
        path.append(counter)
    return tuple(reversed(path))
