"""What look-up tables learned: the functions they compute, and the inputs they read.

Everything here is about tables as deployed, one bit an entry. Dimensions: L tables, n inputs a
table, A = 2**n entries, F input bits, d features, z thresholds a feature (input f * z + t is
threshold t of feature f).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from quweit_jax.errors import InputError, needed

with needed("for reports"):
    from scipy.optimize import linprog

# Kinds of functions, each table in the first that fits.
KINDS: tuple[str, ...] = ("constant", "copy", "threshold", "other")
# A linear-threshold function of n <= 8 inputs has integer weights of at most 77 (Muroga 1971: 2**-n
# (n + 1)**((n + 1) / 2)), so that with weights in [-1, 1] the two sides are at least 1 / 154 away
# from some plane between them; for all other functions it is 0.
_LEAST_MARGIN = 1e-4


@dataclasses.dataclass(frozen=True)
class LayerInsight:
    """One look-up layer of one block.

    block: its path in the model. layer: 0 for the first.
    kinds: how many tables are of each of KINDS. reads: (F,), how many slots read each input.
    influence: (F,), see `influences`.
    thresholds: z of the thermometer whose bits the layer reads, 0 where it reads another layer's.
    balance: (L,), the share of evaluated tokens for which each table gave 1; None without data.
    kept: tables that cannot be dropped without changing an output on that data; None without data.
    """

    block: str
    layer: int
    lut_inputs: int
    kinds: dict[str, int]
    reads: np.ndarray
    influence: np.ndarray
    thresholds: int = 0
    balance: np.ndarray | None = None
    kept: int | None = None

    @property
    def tables(self) -> int:
        """L."""
        return sum(self.kinds.values())

    @property
    def name(self) -> str:
        """Block and layer, for people."""
        return (self.block or "model") + (f", layer {self.layer}" if self.layer else "")


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The model without the tables that were constant on some data, compared with the whole there.

    outputs: images, or tokens of text. tables, dropped: of all blocks.
    same_decisions: outputs of the same class, or the same likeliest next token.
    same_logits: outputs of which every logit has the same bits.
    """

    outputs: int
    same_decisions: int
    same_logits: int
    tables: int
    dropped: int


@dataclasses.dataclass(frozen=True)
class Insight:
    """What is known of one model's tables; without data `pruned` is None, and `note` says why."""

    layers: tuple[LayerInsight, ...]
    pruned: Pruned | None = None
    note: str = ""


def reduce_repeated(table: np.ndarray, wiring: Sequence[int]) -> np.ndarray:
    """A table (A,) whose slots read inputs `wiring` (n,), without the entries that cannot be
    reached as two slots read the same input.
    """
    slots = [int(place) for place in wiring]
    if len(set(slots)) == len(slots):
        return table
    distinct = list(dict.fromkeys(slots))
    values = np.arange(2 ** len(distinct))
    address = sum(
        ((values >> distinct.index(place)) & 1) << slot for slot, place in enumerate(slots)
    )
    return table[address]


def kind_of(table: np.ndarray) -> str:
    """The first of KINDS that a truth table (A,) of bits fits; entry a has input l = bit l of a.

    'copy': of one input or its negation. 'threshold': the table says on which side of a plane its
    inputs lie, w . x > b for real w and b, as one artificial neuron would.

    Raises:
      InputError: the length isn't a power of two up to 256.
    """
    table = np.asarray(table).astype(bool)
    inputs = len(table).bit_length() - 1
    if table.ndim != 1 or len(table) != 1 << max(inputs, 0) or inputs > 8:
        raise InputError(
            f"kind_of: expected a table of 1, 2, 4, ... 256 bits, found shape {list(table.shape)}."
        )
    if table.all() or not table.any():
        return "constant"
    columns = np.arange(len(table))[:, None] >> np.arange(inputs) & 1
    if ((table[:, None] == columns).all(0) | (table[:, None] != columns).all(0)).any():
        return "copy"
    return "threshold" if is_linear_threshold(table) else "other"


def is_linear_threshold(table: np.ndarray) -> bool:
    """Whether a truth table (A,) of n <= 8 inputs is a linear-threshold function, decided exactly.

    First the necessary condition that it is unate: no input pushes the output up at one place and
    down at another. Then a linear program looks for the plane with the widest margin; a plane it
    finds is checked against every entry, and a margin of 0 means there is none.
    """
    table = np.asarray(table).astype(bool)
    inputs = len(table).bit_length() - 1
    cube = table.reshape((2,) * inputs)  # axis k is input n - 1 - k
    for axis in range(inputs):
        low, high = np.take(cube, 0, axis), np.take(cube, 1, axis)
        if (high & ~low).any():
            if (low & ~high).any():
                return False
        elif (low & ~high).any():
            # Decreasing: turned round, so that tables that differ by negations are decided once.
            cube = np.flip(cube, axis)
    # The order of the inputs doesn't matter either: the more an input decides (its Chow parameter),
    # the earlier it stands.
    order = np.argsort([int(np.take(cube, 1, axis).sum()) for axis in range(inputs)], kind="stable")
    return _separable(cube.transpose(order).astype(np.uint8).tobytes())


@functools.lru_cache(maxsize=65536)
def _separable(bits: bytes) -> bool:
    sides = np.frombuffer(bits, np.uint8).astype(float) * 2 - 1
    inputs = len(bits).bit_length() - 1
    corners = (np.arange(len(bits))[:, None] >> np.arange(inputs) & 1).astype(float)
    # Maximize t with side * (w . x - b) >= t, |w| <= 1: variables w, b, t.
    constraints = np.column_stack([-sides[:, None] * corners, sides, np.ones(len(bits))])
    bounds = [(-1.0, 1.0)] * inputs + [(None, None), (None, 1.0 + inputs)]
    goal = [0.0] * (inputs + 1) + [-1.0]
    found = linprog(goal, A_ub=constraints, b_ub=np.zeros(len(bits)), bounds=bounds, method="highs")
    if not found.success:
        raise RuntimeError(
            f"the linear program of a table of {inputs} inputs was not solved: {found.message}"
        )
    weights, offset, margin = found.x[:inputs], found.x[inputs], found.x[-1]
    return bool(margin >= _LEAST_MARGIN and (sides * (corners @ weights - offset) > 0).all())


def count_kinds(tables: np.ndarray, wiring: np.ndarray) -> dict[str, int]:
    """How many of bool tables (L, A), wired to inputs `wiring` (L, n), are of each of KINDS."""
    kinds = dict.fromkeys(KINDS, 0)
    known: dict[bytes, str] = {}
    for table, places in zip(np.asarray(tables).astype(bool), np.asarray(wiring)):
        function = reduce_repeated(table, places)
        key = function.tobytes()
        if key not in known:
            known[key] = kind_of(function)
        kinds[known[key]] += 1
    return kinds


def count_reads(wiring: np.ndarray, num_inputs: int) -> np.ndarray:
    """How many slots of `wiring` (L, n) read each of the inputs: int (F,)."""
    return np.bincount(np.asarray(wiring, np.int64).ravel(), minlength=num_inputs)


def influences(tables: np.ndarray, wiring: np.ndarray, num_inputs: int) -> np.ndarray:
    """How much bool tables (L, A), wired to inputs `wiring` (L, n), depend on each: float (F,).

    A slot's influence is the share of the table's entries whose bit changes when the slot's input
    does (O'Donnell, Analysis of Boolean Functions, section 2.2): 0 for an input that doesn't
    matter, 1 for a copy's or a parity's. Those of all slots that read an input are summed.
    """
    tables, wiring = np.asarray(tables).astype(bool), np.asarray(wiring, np.int64)
    entries = np.arange(tables.shape[1])
    slots = range(wiring.shape[1])
    each = np.stack([(tables != tables[:, entries ^ (1 << slot)]).mean(1) for slot in slots], 1)
    return np.bincount(wiring.ravel(), each.ravel(), minlength=num_inputs)
