"""A circuit as a network of small look-up tables and registers, simplified while it is built.

Every signal is a number: 0 and 1 are the constants, the others are inputs, tables and registers in
the order they were made, so that a signal's inputs come before it. Simplification keeps each
signal's function of the inputs: constant and repeated inputs of a table are folded into it, inputs
that make no difference dropped, equal tables made once, tables that pass on an input replaced by it
and inverters moved into their readers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from quweit_jax.ops.area import LUT_INPUTS, split_inputs

FALSE, TRUE = 0, 1


@dataclasses.dataclass(frozen=True)
class Node:
    """A signal. kind: 'constant', 'input', 'table' or 'register'. inputs: signals; the first is the
    lowest bit of a table's address. table: its entries, entry 0 in the lowest bit. module: the part
    of the circuit it belongs to. note: what it means.
    """

    kind: str
    name: str
    inputs: tuple[int, ...] = ()
    table: int = 0
    module: str = ""
    note: str = ""


class Network:
    """See the module. nodes: by signal."""

    def __init__(self) -> None:
        self.nodes = [Node("constant", "1'b0"), Node("constant", "1'b1", table=1)]
        self._known: dict[tuple[object, ...], int] = {}
        self._counts: dict[str, int] = {}

    def input(self, name: str) -> int:
        """An input bit; the same one for the same name."""
        return self._made(("input", name), lambda: Node("input", name))

    def register(self, signal: int, module: str) -> int:
        """What the signal was before the last edge of the clock; a constant is one at all times."""
        if self.nodes[signal].kind == "constant":
            return signal
        key = ("register", signal)
        return self._made(
            key, lambda: Node("register", self._name(module, "r"), (signal,), 0, module)
        )

    def table(self, entries: np.ndarray, inputs: Sequence[int], module: str, note: str = "") -> int:
        """A table, bool (2**n,), of n signals, the first the lowest bit of the address; any n."""
        values, signals = self._simplified(entries, list(inputs))
        if not signals:
            return TRUE if values.item() else FALSE
        if len(signals) == 1 and not values[0]:
            return signals[0]
        if len(signals) > LUT_INPUTS:
            return self._split(values, signals, module, note)
        order = sorted(range(len(signals)), key=signals.__getitem__)
        values = values.transpose(order)
        wired = tuple(signals[i] for i in order)
        packed = np.packbits(values.reshape(-1, order="F"), bitorder="little").tobytes()
        table = int.from_bytes(packed, "little")
        return self._made(
            ("table", table, wired),
            lambda: Node("table", self._name(module, "t"), wired, table, module, note),
        )

    def used(self, outputs: Sequence[int]) -> list[int]:
        """The signals that outputs depend on, themselves among them, in order."""
        found = set(outputs)
        for signal in range(len(self.nodes) - 1, -1, -1):
            if signal in found:
                found.update(self.nodes[signal].inputs)
        return sorted(found)

    def _made(self, key: tuple[object, ...], make: Callable[[], Node]) -> int:
        if key not in self._known:
            self._known[key] = len(self.nodes)
            self.nodes.append(make())
        return self._known[key]

    def _name(self, module: str, kind: str) -> str:
        name = f"{module[:3]}_{kind}"
        self._counts[name] = self._counts.get(name, -1) + 1
        return f"{name}{self._counts[name]}"

    def _split(self, values: np.ndarray, signals: list[int], module: str, note: str) -> int:
        """A table that is too large: parts of it, and one that chooses among them."""
        split = split_inputs(len(signals))
        parts = [
            values[..., i] if split == 1 else values[..., i & 1, i >> 1] for i in range(1 << split)
        ]
        made = [
            self.table(part.reshape(-1, order="F"), signals[:-split], module, note)
            for part in parts
        ]
        choices = len(made)
        address = np.arange(1 << (choices + split))
        chosen = address >> (address >> choices) & 1
        return self.table(chosen.astype(bool), [*made, *signals[-split:]], module, note)

    def _simplified(self, entries: np.ndarray, signals: list[int]) -> tuple[np.ndarray, list[int]]:
        """A table with axis i for signal i, and the distinct signals it depends on."""
        values = np.asarray(entries, bool).reshape((2,) * len(signals), order="F")
        place = 0
        while place < len(signals):
            node = self.nodes[signals[place]]
            if node.kind == "table" and len(node.inputs) == 1:  # an inverter
                signals[place], values = node.inputs[0], np.flip(values, place)
                continue
            low, high = values.take(0, place), values.take(1, place)
            if node.kind == "constant":
                values = high if node.table else low
            elif signals[place] in signals[:place]:
                first = signals.index(signals[place])
                same = np.arange(2).reshape([-1 if i == first else 1 for i in range(low.ndim)])
                values = np.where(same, high, low)
            else:
                place += 1
                continue
            del signals[place]
        for place in reversed(range(len(signals))):
            low, high = values.take(0, place), values.take(1, place)
            if (low == high).all():
                values = low
                del signals[place]
        return values, signals


def simulate(
    network: Network, outputs: Sequence[int], given: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """Output bits (N,) for input bits (N,) by name, as if registers were wires; bool."""
    examples = next(iter(given.values())).shape if given else ()
    found: dict[int, np.ndarray] = {}
    for signal in network.used([*outputs, FALSE, TRUE]):
        node = network.nodes[signal]
        if node.kind == "constant":
            found[signal] = np.full(examples, bool(node.table))
        elif node.kind == "input":
            found[signal] = np.asarray(given[node.name], bool)
        elif node.kind == "register":
            found[signal] = found[node.inputs[0]]
        else:
            address = sum(found[s].astype(np.int64) << i for i, s in enumerate(node.inputs))
            entries = [node.table >> i & 1 for i in range(1 << len(node.inputs))]
            found[signal] = np.asarray(entries, bool)[address]
    return [found[signal] for signal in outputs]
