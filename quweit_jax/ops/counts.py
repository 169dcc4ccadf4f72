"""The counts of one inference: what a layer does, moves and stores, and their sums.

Nothing here knows a model; layers make these (`layers.costs`) and `costs.count` collects them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
from jaxtyping import PyTree

K = TypeVar("K", str, int)

FLOAT = "float32"  # of statistics, scales, thresholds and gates, whatever a model's type
INT = "int32"  # of integer sums, scales and constants
# Bytes of one number of a type.
BYTES = {"int8": 1, "int16": 2, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


def merge(*counts: Mapping[K, int]) -> dict[K, int]:
    """The sums of counts by key; keys that count nothing are left out."""
    total: dict[K, int] = {}
    for count in counts:
        for key, value in count.items():
            total[key] = total.get(key, 0) + value
    return {key: value for key, value in total.items() if value}


def packed_bits(count: int) -> int:
    """The bytes that so many bits take, eight a byte."""
    return -(-count // 8)


def stored_bytes(tree: PyTree) -> int:
    """Bytes of all arrays, or shapes and dtypes of arrays, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Types:
    """The number types of a layer, by name.

    operands: of matrix products and of their stored weights. activations: of what flows between
    layers.
    """

    operands: str
    activations: str

    @property
    def accumulator(self) -> str:
        """The type of sums of products: int32 of integers, float32 of floats of any width."""
        return "int32" if self.operands.startswith("int") else FLOAT

    def matrix(self, rows: int, columns: int) -> dict[str, int]:
        """Bytes of a stored matrix by type; one of int8 has a float32 scale a column."""
        stored = {self.operands: rows * columns * BYTES[self.operands]}
        scales = {FLOAT: columns * BYTES[FLOAT]} if self.operands == "int8" else {}
        return stored | scales


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """Operations outside matrix products and sums of vectors, by operand type: norms, softmax,
    activations, gates, rescaling, residuals.

    functions: exp, sigmoid, tanh, erf, cosine, 1 / sqrt, each one value. shifts: of integers by
    whole bits.
    """

    multiplications: Mapping[str, int] = dataclasses.field(default_factory=dict)
    additions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    divisions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    functions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    shifts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        operands: str,
        multiplications: int = 0,
        additions: int = 0,
        divisions: int = 0,
        functions: int = 0,
        shifts: int = 0,
    ) -> Elementwise:
        """The operations of a layer that has one operand type."""
        counts = (multiplications, additions, divisions, functions, shifts)
        return cls(*({operands: count} if count else {} for count in counts))


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """One layer, or a group of identical operations, of one inference: an image, or a token at a
    context length.

    name: its path, 'block_3/attention/query'. kind: what the energy is summed by: 'embedding',
      'projection', 'attention', 'mlp', 'lookup', 'thermometer', 'conditional_sum', 'norm',
      'activation', 'recurrence', 'requantize', 'residual', 'head'.
    multiplications, additions: of matrix products and of sums of vectors, by operand type, what
      papers count; 'int16xint8' has two different operands. A product of I inputs has I additions
      an output: the sum starts from the bias, or from zero. Additions of a conditional sum or of
      ternary weights are the most there can be: all bits set, no weight zero.
    elementwise: the operations outside them.
    lookups: reads of one-bit tables by n, the table's inputs. A table of 32-bit values counts as 32
      of them.
    comparisons: of two values of `comparison_type`: thermometers, clamping, largest values.
    bytes_moved: 'weights', 'activations' and 'state' (key-value cache or recurrent state, read and
      written). Each weight is read once per inference; every product, norm, softmax, thermometer,
      look-up layer and sum reads its inputs and writes its results once, while operations of one
      value at a time (activations, residuals, requantization, biases) happen on the way.
    bytes_stored: of the deployed form, by format: 'float32', 'bfloat16', 'float16', 'int8',
      'int16', 'int32', '2-bit', '1-bit', 'wiring'.
    state_bytes: kept between the tokens of one text. parameters: trained numbers, before
    deployment.
    """

    name: str
    kind: str
    multiplications: Mapping[str, int] = dataclasses.field(default_factory=dict)
    additions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    elementwise: Elementwise = Elementwise()
    lookups: Mapping[int, int] = dataclasses.field(default_factory=dict)
    comparisons: int = 0
    comparison_type: str = "float32"
    bytes_moved: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bytes_stored: Mapping[str, int] = dataclasses.field(default_factory=dict)
    state_bytes: int = 0
    parameters: int = 0


@dataclasses.dataclass(frozen=True)
class Costs:
    """The layers of one inference.

    unit: 'image' (any example of a classifier) or 'token'. context: tokens the token attends to,
      itself among them; None for images.
    assumptions: what was taken for granted about model and data, in sentences.
    """

    layers: tuple[LayerCosts, ...]
    unit: str
    context: int | None
    assumptions: tuple[str, ...] = ()

    @property
    def multiplications(self) -> dict[str, int]:
        """Multiplications of matrix products, by operand type."""
        return merge(*(layer.multiplications for layer in self.layers))

    @property
    def total_multiplications(self) -> int:
        """Multiplications of matrix products, of all operand types together."""
        return sum(self.multiplications.values())

    @property
    def additions(self) -> dict[str, int]:
        """Additions of matrix products and of sums of vectors, by operand type."""
        return merge(*(layer.additions for layer in self.layers))

    @property
    def elementwise(self) -> Elementwise:
        """Operations outside matrix products and sums of vectors."""
        parts = [layer.elementwise for layer in self.layers]
        names = [field.name for field in dataclasses.fields(Elementwise)]
        return Elementwise(**{n: merge(*(getattr(part, n) for part in parts)) for n in names})

    @property
    def lookups(self) -> dict[int, int]:
        """Look-ups, by the number of inputs of a table."""
        return merge(*(layer.lookups for layer in self.layers))

    @property
    def comparisons(self) -> dict[str, int]:
        """Comparisons, by operand type."""
        return merge(*({layer.comparison_type: layer.comparisons} for layer in self.layers))

    @property
    def bytes_moved(self) -> dict[str, int]:
        """Bytes read and written, of weights, activations and state."""
        return merge(*(layer.bytes_moved for layer in self.layers))

    @property
    def bytes_stored(self) -> dict[str, int]:
        """Bytes of the deployed form, by format."""
        return merge(*(layer.bytes_stored for layer in self.layers))

    @property
    def state_bytes(self) -> int:
        """Bytes kept between the tokens of one text."""
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(layer.parameters for layer in self.layers)

    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers there are, in the order of their first appearance."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers))

    def of_kind(self, *kinds: str) -> Costs:
        """The costs of the layers of some kinds alone."""
        layers = tuple(layer for layer in self.layers if layer.kind in kinds)
        return dataclasses.replace(self, layers=layers)

    def by_kind(self) -> dict[str, Costs]:
        """The costs of each kind of layers."""
        return {kind: self.of_kind(kind) for kind in self.kinds()}
