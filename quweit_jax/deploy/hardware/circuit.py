"""A classifier's circuit: comparators, tables, counters and a tournament, cut by registers.

Stages are the encoder, each layer of tables, each level of counters, the addition that ends a
count, and each round of the tournament. All registers lie between stages, all at once, so that
every way from the inputs to the outputs has as many.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from quweit_jax.deploy.hardware.description import Classifier
from quweit_jax.deploy.hardware.network import FALSE, TRUE, Network
from quweit_jax.errors import InputError
from quweit_jax.ops import area, counters

MODULES = ("encoder", "tables", "reduction")


@dataclasses.dataclass(frozen=True)
class Circuit:
    """A network with its outputs, lowest bits first.

    latency: edges of the clock from an input to its outputs. stages: their names, in order.
    """

    classifier: Classifier
    network: Network
    decision: tuple[int, ...]
    score: tuple[int, ...]
    latency: int
    stages: tuple[str, ...]

    @property
    def outputs(self) -> tuple[int, ...]:
        """All output bits."""
        return (*self.decision, *self.score)

    def ports(self) -> list[int]:
        """The features that are read, in order."""
        nodes = self.network.nodes
        names = {nodes[s].name for s in self.network.used(self.outputs) if nodes[s].kind == "input"}
        return sorted({int(name.split("_")[1]) for name in names})

    def area(self) -> dict[str, area.Area]:
        """What each module takes, exactly as drawn; comparators are the encoder's distinct ones."""
        nodes = [self.network.nodes[s] for s in self.network.used(self.outputs)]
        return {
            module: area.Area(
                sum(n.kind == "table" and n.module == module for n in nodes),
                sum(n.kind == "register" and n.module == module for n in nodes),
                len(self.classifier.feature) if module == "encoder" else 0,
            )
            for module in MODULES
        }


def build(classifier: Classifier, pipeline: int = 0) -> Circuit:
    """The circuit of a classifier. pipeline: registers after every so many stages and behind the
    last; 0 for none.

    Raises:
      InputError: a negative pipeline.
    """
    if pipeline < 0:
        raise InputError(f"--pipeline: expected 0 or more stages, found {pipeline}.")
    made = _Builder(classifier, pipeline)
    decision, score = made.largest(made.count(made.look_up()))
    decision, score = made.finish([decision, score])
    return Circuit(
        classifier,
        made.network,
        tuple(_padded(decision, classifier.decision_bits)),
        tuple(_padded(score, classifier.score_bits)),
        made.latency,
        tuple(made.stages),
    )


def lookups(classifier: Classifier) -> tuple[Network, list[int]]:
    """The comparators and tables of a classifier alone, without registers, and the bits of its last
    layer.
    """
    made = _Builder(classifier, 0)
    bits = made.look_up()
    return made.network, bits


def _padded(bits: Sequence[int], width: int) -> list[int]:
    return [*bits, *[FALSE] * (width - len(bits))]


def _sizes(columns: Sequence[Sequence[int]]) -> list[int]:
    return [len(column) for column in columns]


def _address(inputs: int) -> list[np.ndarray]:
    """Every input bit of every address of a table, lowest first."""
    return [np.arange(1 << inputs) >> i & 1 for i in range(inputs)]


def _number(bits: Sequence[np.ndarray]) -> np.ndarray:
    total = np.zeros(len(bits[0]), np.int64)
    for place, bit in enumerate(bits):
        total += bit << place
    return total


class _Builder:
    """Adds a classifier's parts to a network, stage by stage."""

    def __init__(self, classifier: Classifier, every: int):
        self.classifier, self.every = classifier, every
        self.network = Network()
        self.stages: list[str] = []
        self.latency = 0

    def end(self, module: str, bits: list[int], stage: str = "") -> list[int]:
        """A stage is complete, and these bits leave it: through registers, if here are any."""
        self.stages.append(stage or module)
        if not self.every or len(self.stages) % self.every:
            return bits
        self.latency += 1
        return [self.network.register(bit, module) for bit in bits]

    def end_groups(self, groups: list[list[int]], stage: str) -> list[list[int]]:
        """The same for groups of bits of the reduction."""
        flat = iter(self.end("reduction", [bit for group in groups for bit in group], stage))
        return [[next(flat) for _ in group] for group in groups]

    def finish(self, groups: list[list[int]]) -> list[list[int]]:
        """Behind the last stage there are registers."""
        if not self.every or not len(self.stages) % self.every:
            return groups
        self.latency += 1
        return [[self.network.register(bit, "reduction") for bit in group] for group in groups]

    def look_up(self) -> list[int]:
        """The bits of the last layer of tables."""
        bits = self.end("encoder", self.encode())
        for i, layer in enumerate(self.classifier.layers):
            found = [
                self.network.table(
                    entries, [bits[w] for w in wiring], "tables", f"layer {i}, table {j}"
                )
                for j, (entries, wiring) in enumerate(zip(layer.tables, layer.wiring))
            ]
            bits = self.end("tables", found, f"layer {i}")
        return bits

    def encode(self) -> list[int]:
        """The bit of each comparator."""
        c = self.classifier
        return [self.above(int(f), int(t)) for f, t in zip(c.feature, c.threshold)]

    def above(self, feature: int, threshold: int) -> int:
        """`word > threshold`, from the lowest bits up."""
        scaling = self.classifier.scaling
        if threshold < scaling.low or threshold >= scaling.high:
            return TRUE if threshold < scaling.low else FALSE
        bits = [self.network.input(f"x_{feature}_{i}") for i in range(scaling.bits)]
        level = threshold - scaling.low  # in offset binary: two's complement with its sign flipped
        start = 0
        while level >> start & 1:  # ones at the end decide nothing
            start += 1
        result = FALSE
        for size in area.comparator_chunks(scaling.bits - start):
            address = _address(size + 1)
            if scaling.signed and start + size == scaling.bits:
                address[size - 1] = 1 - address[size - 1]
            value, own = _number(address[:size]), level >> start & ((1 << size) - 1)
            entries = (value > own) | ((value == own) & (address[size] > 0))
            note = f"x_{feature} > {threshold}"
            result = self.network.table(
                entries, [*bits[start : start + size], result], "encoder", note
            )
            start += size
        return result

    def count(self, bits: list[int]) -> list[list[int]]:
        """The count of each class, lowest bit first."""
        c = self.classifier
        classes = []
        for k in range(c.classes):
            columns = [[bit for bit, group in zip(bits, c.group) if group == k]]
            for place in range(int(c.offset[k]).bit_length()):
                columns += [[] for _ in range(place + 1 - len(columns))]
                columns[place] += [TRUE] * (int(c.offset[k]) >> place & 1)
            classes.append(columns)
        trees = [counters.counter_levels(_sizes(columns)) for columns in classes]
        widths = [counters.count_width(_sizes(columns)) for columns in classes]
        for number, levels in enumerate(itertools.zip_longest(*trees, fillvalue=())):
            classes = [self.counted(*pair) for pair in zip(classes, levels)]
            classes = self._end_columns(classes, f"counters {number}")
        if any(len(column) > 1 for columns in classes for column in columns):
            sums = [self.added(*pair) for pair in zip(classes, widths)]
            return self.end_groups(sums, "addition")
        return [[column[0] if column else FALSE for column in columns] for columns in classes]

    def _end_columns(self, classes: list[list[list[int]]], stage: str) -> list[list[list[int]]]:
        flat = [column for columns in classes for column in columns]
        ended = iter(self.end_groups(flat, stage))
        return [[next(ended) for _ in columns] for columns in classes]

    def counted(
        self, columns: list[list[int]], level: Sequence[counters.Counter]
    ) -> list[list[int]]:
        """One level of counters over columns of bits."""
        left = [list(column) for column in columns]
        left += [[] for _ in range(counters.COLUMNS_ABOVE)]
        fresh: list[list[int]] = [[] for _ in left]
        for counter in level:
            taken: list[int] = []
            for above, size in enumerate((counter.size, counter.upper)):
                column = left[counter.column + above]
                taken += column[:size]
                del column[:size]
            address = _address(len(taken))
            total = sum(address[: counter.size]) + 2 * sum(address[counter.size :])
            for place in range(counter.outputs):
                note = f"bit {place} of a count of {counter.size} bits"
                note += f" and {counter.upper} of twice the weight" if counter.upper else ""
                entries = np.asarray(total) >> place & 1
                made = self.network.table(entries.astype(bool), taken, "reduction", note)
                fresh[counter.column + place].append(made)
        joined = [[*old, *new] for old, new in zip(left, fresh)]
        while joined and not joined[-1]:
            joined.pop()
        return joined

    def added(self, columns: list[list[int]], width: int) -> list[int]:
        """The number that columns of at most two bits make, two columns at a time."""
        pairs = [[*column, FALSE, FALSE][:2] for column in (columns + [[]] * width)[:width]]
        carry = FALSE
        start = next((i for i, column in enumerate(columns) if len(column) > 1), width)
        total = [pair[0] for pair in pairs[:start]]
        while start < width:
            taken = pairs[start : start + 2]
            inputs = [carry, *(bit for pair in taken for bit in pair)]
            address = _address(len(inputs))
            value = address[0] + _number(address[1::2]) + _number(address[2::2])
            made = [
                self.network.table(
                    (value >> place & 1).astype(bool), inputs, "reduction", "addition"
                )
                for place in range(len(taken) + 1)
            ]
            total, carry = [*total, *made[:-1]], made[-1]
            start += 2
        return total[:width]

    def largest(self, counts: list[list[int]]) -> tuple[list[int], list[int]]:
        """(class, count) of the largest count, ties to the lowest class: a tournament of
        neighbors.
        """
        width = self.classifier.score_bits
        players = [([], _padded(count, width)[:width], k) for k, count in enumerate(counts)]
        players = [(index, count) for index, count, _ in players]
        level = 0
        while len(players) > 1:
            pairs = zip(players[::2], players[1::2])
            joined = [self.winner(low, high, level) for low, high in pairs]
            if len(players) % 2:
                index, count = players[-1]
                joined.append(([*index, FALSE], count))
            groups = self.end_groups(
                [bits for player in joined for bits in player], f"round {level}"
            )
            players = list(zip(groups[::2], groups[1::2]))
            level += 1
        return players[0]

    def winner(
        self, low: tuple[list[int], list[int]], high: tuple[list[int], list[int]], level: int
    ) -> tuple[list[int], list[int]]:
        """The (index, count) of two players of which `high` must be larger to win."""
        choose = self.larger(high[1], low[1])
        mux = np.asarray([0, 1, 0, 1, 0, 0, 1, 1], bool)  # of (low, high, choose)

        def chosen(pair: tuple[int, int]) -> int:
            return self.network.table(mux, [*pair, choose], "reduction", f"round {level}")

        index = [chosen(pair) for pair in zip(low[0], high[0])]
        return [*index, choose], [chosen(pair) for pair in zip(low[1], high[1])]

    def larger(self, high: list[int], low: list[int]) -> int:
        """`high > low` of two counts, from the lowest bits up."""
        result, start = FALSE, 0
        for size in area.larger_chunks(len(high)):
            inputs = [*high[start : start + size], *low[start : start + size]]
            if result != FALSE:
                inputs.append(result)
            address = _address(len(inputs))
            a, b = _number(address[:size]), _number(address[size : 2 * size])
            entries = a > b
            if result != FALSE:
                entries |= (a == b) & (address[-1] > 0)
            result = self.network.table(entries, inputs, "reduction", "larger count")
            start += size
        return result
