"""What a packed classifier made of tables computes, in integers and plain NumPy: the one thing that
Verilog, C and their checks are made from.

An input is a fixed-point word q of a few bits. A comparator says `q > threshold`, tables read
comparators and one another, each class counts its bits of the last layer, and the largest count
wins, ties to the lowest class.

Dimensions: N examples, F features, C comparators, L tables, n inputs a table, A = 2**n entries.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from quweit_jax.deploy.tables import Block, Tree, find_blocks
from quweit_jax.errors import InputError
from quweit_jax.models.dwn import DWN

MAX_INPUT_BITS = 16
_AT_ONCE = 1 << 26  # bits looked up at a time


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a real number x becomes a word: `q = clip(round((x - offset) / step), low, high)` in
    float64, halves to even.

    bits: of a word, in two's complement if `signed`.
    """

    bits: int
    signed: bool
    offset: float
    step: float

    @property
    def low(self) -> int:
        """The smallest word."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest word."""
        return self.low + (1 << self.bits) - 1

    def words(self, x: np.ndarray) -> np.ndarray:
        """The words of real numbers of any shape, int64.

        Raises:
          InputError: something is not a number.
        """
        if np.isnan(x).any():
            raise InputError("hardware: expected inputs that are numbers, found NaN; clean them.")
        return np.clip(self.unclipped(x), self.low, self.high).astype(np.int64)

    def unclipped(self, x: np.ndarray) -> np.ndarray:
        """The words before saturation, float64."""
        return np.rint((np.asarray(x, np.float64) - self.offset) / self.step)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of tables. tables: bool (L, A); wiring: int (L, n), into the bits below, of which the
    first is the lowest bit of a table's address.
    """

    tables: np.ndarray
    wiring: np.ndarray


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier in integers.

    features: F, of which `feature` names those that are read. feature, threshold: int (C,), of each
      comparator; a threshold of `scaling.high` or more never fires, one below `scaling.low` always.
    group: int (L,), the class that each table of the last layer votes for. offset: int (classes,),
      where the counts begin.
    """

    features: int
    scaling: Scaling
    feature: np.ndarray
    threshold: np.ndarray
    layers: tuple[Layer, ...]
    group: np.ndarray
    offset: np.ndarray

    @property
    def classes(self) -> int:
        """How many classes."""
        return len(self.offset)

    @property
    def decision_bits(self) -> int:
        """Bits that hold any class, at least 1."""
        return max(1, (self.classes - 1).bit_length())

    @property
    def score_bits(self) -> int:
        """Bits that hold any class's count, at least 1."""
        most = self.offset + np.bincount(self.group, minlength=self.classes)
        return max(1, int(most.max()).bit_length())


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the classifier says: the class of each example, and that class's count; int64 (N,)."""

    decision: np.ndarray
    score: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fit:
    """How the words of a classifier were chosen.

    exact: no comparator changes on any training example. changed: training examples whose decision
    differs from the packed model's, of `examples`.
    """

    exact: bool
    changed: int
    examples: int


def evaluate(classifier: Classifier, words: np.ndarray) -> Outputs:
    """The classifier's outputs for words (N, F), bit for bit."""
    bits = words[:, classifier.feature] > classifier.threshold
    return _decide(classifier, look_up(classifier.layers, bits))


def look_up(layers: tuple[Layer, ...], bits: np.ndarray) -> np.ndarray:
    """Bits of comparators (N, C) through all layers: bool (N, L)."""
    widest = max(layer.wiring.size for layer in layers)
    size, found = max(1, _AT_ONCE // max(1, widest)), []
    for start in range(0, max(1, len(bits)), size):
        part = bits[start : start + size]
        for layer in layers:
            address = np.zeros((len(part), len(layer.wiring)), np.int64)
            for place, column in enumerate(layer.wiring.T):
                address |= part[:, column].astype(np.int64) << place
            part = layer.tables[np.arange(len(layer.tables)), address]
        found.append(part)
    return np.concatenate(found)


def _decide(classifier: Classifier, bits: np.ndarray) -> Outputs:
    votes = classifier.group[:, None] == np.arange(classifier.classes)
    counts = bits.astype(np.int64) @ votes.astype(np.int64) + classifier.offset
    decision = counts.argmax(1)  # the first of the largest
    return Outputs(decision, counts[np.arange(len(counts)), decision])


def from_packed(
    model: object, packed: Tree, training: np.ndarray, input_bits: int | None = None
) -> tuple[Classifier, Fit]:
    """The integer description of a packed DWN classifier, and how its words were chosen.

    Args:
      training: inputs (N, ...) that fix the words' range, offset and step.
      input_bits: 1 to 16; None: the fewest for which no comparator changes on the training inputs,
        or else the fewest for which no decision does.

    Raises:
      InputError: a model of another kind, one whose scores are no counts, or no number of bits will
        do.
    """
    if not isinstance(model, DWN):
        raise InputError(
            f"hardware: expected a classifier made of tables (model dwn), found "
            f"{type(model).__name__}; other models export as StableHLO (leave --to out)."
        )
    if input_bits is not None and not 1 <= input_bits <= MAX_INPUT_BITS:
        raise InputError(
            f"--input_bits: expected 1 to {MAX_INPUT_BITS} bits, found {input_bits}; leave it out "
            "to have it chosen."
        )
    features = training.reshape(len(training), -1).astype(np.float32)
    block = find_blocks(model, packed, training[:1])[""]
    group, offset = _reduction(model, packed, len(block.tables[-1]))
    thresholds = np.asarray(packed["packed"]["thresholds"], np.float32)
    thresholds = thresholds.reshape(-1, thresholds.shape[-1])
    thresholds = np.broadcast_to(thresholds, (features.shape[1], thresholds.shape[1]))
    wired = _Wired(block, features, thresholds, group, offset)
    return wired.chosen() if input_bits is None else wired.with_bits(input_bits)


def _reduction(model: DWN, packed: Tree, tables: int) -> tuple[np.ndarray, np.ndarray]:
    """The class of each table of the last layer, and where the classes' counts begin."""
    c = model.config
    if c.reduction != "group_sum":
        raise InputError(
            "hardware: expected model.reduction=group_sum, whose scores are counts, found "
            f"{c.reduction}; train with group_sum."
        )
    held = packed["packed"].get("reduction")
    if held:  # tables were pruned
        vectors, offset = np.asarray(held["vectors"]), np.asarray(held["offset"], np.int64)
        if (vectors.sum(1) != 1).any() or vectors.min(initial=0) < 0 or offset.min() < 0:
            raise InputError("hardware: expected tables that add one to one class each.")
        group = vectors.argmax(1)
    else:
        group = np.arange(tables) // (tables // c.num_classes)
        offset = np.zeros(c.num_classes, np.int64)
    # float32 keeps counts apart and in order: a DWN's tau is between 1e-30 and 1e30
    return group.astype(np.int64), offset


@dataclasses.dataclass(frozen=True)
class _Wired:
    """A packed classifier and the training inputs (N, F), from which the words are chosen."""

    block: Block
    inputs: np.ndarray
    thresholds: np.ndarray  # (F, z)
    group: np.ndarray
    offset: np.ndarray

    def chosen(self) -> tuple[Classifier, Fit]:
        widest = self._quantized(MAX_INPUT_BITS)
        if not widest[1]:  # an encoder that is exact
            bits = next(b for b in range(1, MAX_INPUT_BITS + 1) if not self._quantized(b)[1])
            return self.with_bits(bits)
        for bits in range(1, MAX_INPUT_BITS + 1):
            made = self.with_bits(bits)
            if not made[1].changed:
                return made
        raise InputError(
            f"--input_bits: with {MAX_INPUT_BITS} bits {made[1].changed} of {made[1].examples} "
            "training decisions change; give --input_bits to take that, or bring the features to "
            "one scale."
        )

    def with_bits(self, bits: int) -> tuple[Classifier, Fit]:
        classifier, changed_bits = self._quantized(bits)
        found = evaluate(classifier, classifier.scaling.words(self.inputs)).decision
        changed = int((found != self._reference(classifier)).sum())
        return classifier, Fit(not changed_bits, changed, len(self.inputs))

    def _reference(self, classifier: Classifier) -> np.ndarray:
        """The packed model's decisions on the training inputs."""
        encoded = (self.inputs[:, :, None] > self.thresholds).reshape(len(self.inputs), -1)
        layers = tuple(Layer(t, w) for t, w in zip(self.block.tables, self.block.wiring))
        return _decide(classifier, look_up(layers, encoded)).decision

    def _quantized(self, bits: int) -> tuple[Classifier, int]:
        """The classifier with words of so many bits, and how many wired training bits that
        changes.
        """
        wired, places = np.unique(self.block.wiring[0], return_inverse=True)
        feature, rank = np.divmod(wired, self.thresholds.shape[1])
        scaling = _fit(self.inputs[:, np.unique(feature)], bits)
        threshold = np.empty(len(wired), np.int64)
        changed = 0
        for f in np.unique(feature):
            mine = np.flatnonzero(feature == f)
            column = np.sort(self.inputs[:, f])
            threshold[mine], wrong = _thresholds(scaling, column, self.thresholds[f, rank[mine]])
            changed += wrong
        pairs, same = np.unique(np.stack([feature, threshold]), axis=1, return_inverse=True)
        wiring = same.reshape(-1)[places.reshape(self.block.wiring[0].shape)]
        layers = (wiring, *self.block.wiring[1:])
        made = Classifier(
            self.inputs.shape[1],
            scaling,
            pairs[0],
            pairs[1],
            tuple(Layer(t, w) for t, w in zip(self.block.tables, layers)),
            self.group,
            self.offset,
        )
        return made, changed


def _fit(inputs: np.ndarray, bits: int) -> Scaling:
    """Words that spread evenly from the smallest to the largest input."""
    least, most = float(inputs.min()), float(inputs.max())
    if not math.isfinite(least) or not math.isfinite(most):
        raise InputError("hardware: expected finite training inputs; clean them.")
    step = (most - least) / ((1 << bits) - 1) or 1.0
    unsigned = Scaling(bits, least < 0, 0.0, step)
    return dataclasses.replace(unsigned, offset=least - step * unsigned.low)


def _thresholds(
    scaling: Scaling, column: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, int]:
    """Thresholds (k,) on words that stand for those on a feature's sorted values (N,), and how many
    of the values' bits they change.

    A word threshold is the threshold's own word, but below that of the next larger training value.
    """
    words = scaling.words(column)
    own = np.clip(scaling.unclipped(thresholds), scaling.low - 1, scaling.high).astype(np.int64)
    above = np.searchsorted(column, thresholds, side="right")  # the first value above each
    before = np.concatenate([[scaling.low - 1], words])[above]
    after = np.concatenate([words, [scaling.high + 1]])[above]
    found = np.where(after > before, np.minimum(own, after - 1), own)
    wrong = np.searchsorted(words, found, side="right") - above
    return found, int(np.abs(wrong).sum())
