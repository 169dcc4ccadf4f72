"""Golden vectors: words that go into a circuit, and what must come out.

Dimensions: N examples, F features.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from quweit_jax.deploy.hardware.circuit import Circuit
from quweit_jax.deploy.hardware.description import Classifier, evaluate

_POOL = 4096  # candidates that golden examples are chosen from
_WORK = 1 << 22  # addresses compared at a time


def golden(
    classifier: Classifier, words: np.ndarray, count: int = 0, seed: int = 0
) -> tuple[np.ndarray, int]:
    """Golden words (M, F), and how many of the first are of real examples.

    Real examples are chosen so that ties and many addresses of many tables are seen where they
    decide. Behind them are as many mixtures of real examples, chosen likewise, among which classes
    win that rarely do, and extremes.

    Args:
      words: of real examples (N, F). count: how many to choose; 0: all.
    """
    draw = np.random.default_rng(seed)
    chosen = np.arange(len(words)) if not count else _chosen(classifier, words, count, draw)
    real = words[chosen]
    picks = draw.integers(0, len(words), (_POOL, classifier.features))
    mixed = words[picks, np.arange(classifier.features)]
    alone = draw.random(mixed.shape) < 0.3  # some words of some of them are any
    scaling = classifier.scaling
    mixed = np.where(alone, draw.integers(scaling.low, scaling.high + 1, mixed.shape), mixed)
    mixed = mixed[_chosen(classifier, mixed, min(len(real), 400), draw)]
    return np.concatenate([real, with_extremes(classifier, mixed, seed)]), len(real)


def _chosen(
    classifier: Classifier, words: np.ndarray, count: int, draw: np.random.Generator
) -> np.ndarray:
    """The places of `count` examples in words (N, F), in random order."""
    own = evaluate(classifier, words)
    tied = np.flatnonzero(_tied(classifier, words))[: max(1, count // 4)]
    tables = sum(len(layer.tables) for layer in classifier.layers)
    pool = draw.permutation(len(words))[: max(count, min(_POOL, _WORK // max(1, tables)))]
    pool = np.setdiff1d(pool, tied)
    pairs = _addresses(classifier, words[pool], own.decision[pool])
    seen = np.zeros(pairs.max(initial=0) + 1, bool)
    seen[0] = True
    found: list[int] = []
    left = np.ones(len(pool), bool)
    while left.any() and len(found) < count - len(tied):
        gains = np.where(left, (~seen[pairs]).sum(1), -1)
        best = int(gains.argmax())
        left[best] = False
        seen[pairs[best]] = True
        found.append(best)
    return draw.permutation(np.concatenate([tied, pool[np.asarray(found, np.int64)]]))


def _addresses(classifier: Classifier, words: np.ndarray, decision: np.ndarray) -> np.ndarray:
    """A number for each (table, address) that an example uses, (N, tables) int64; 0 where it makes
    no difference: in the last layer, for the tables of classes that lose.
    """
    bits = words[:, classifier.feature] > classifier.threshold
    found, first = [], 1
    for layer in classifier.layers:
        address = np.zeros((len(words), len(layer.tables)), np.int64)
        for place, column in enumerate(layer.wiring.T):
            address |= bits[:, column].astype(np.int64) << place
        bits = layer.tables[np.arange(len(layer.tables)), address]
        places = np.arange(len(layer.tables)) * layer.tables.shape[1]
        found.append(first + places + address)
        first += layer.tables.size
    found[-1] = np.where(classifier.group == decision[:, None], found[-1], 0)
    return np.concatenate(found, 1)


def _tied(classifier: Classifier, words: np.ndarray) -> np.ndarray:
    """Whether two classes share the largest count, bool (N,)."""
    order = np.arange(classifier.classes)[::-1]
    mirrored = dataclasses.replace(
        classifier, group=order[classifier.group], offset=classifier.offset[::-1]
    )
    last = evaluate(mirrored, words).decision
    return order[last] != evaluate(classifier, words).decision


def with_extremes(classifier: Classifier, words: np.ndarray, seed: int = 0) -> np.ndarray:
    """Words (N, F) of real examples, and behind them a few that no example has: all at the lowest
    and highest value, at 0 and -1, either side of every threshold, and random ones.
    """
    scaling, draw = classifier.scaling, np.random.default_rng(seed)
    levels = sorted({scaling.low, scaling.high, 0, scaling.low + scaling.high})
    rows = [np.full(classifier.features, level) for level in levels]
    rows += [draw.integers(scaling.low, scaling.high + 1, classifier.features) for _ in range(8)]
    for nearby in (0, 1):  # the bit of a comparator is 0 at its threshold, and 1 just above
        for turn in range(4):
            row = draw.integers(scaling.low, scaling.high + 1, classifier.features)
            for f in np.unique(classifier.feature):
                own = classifier.threshold[classifier.feature == f]
                row[f] = own[turn % len(own)] + nearby
            rows.append(row)
    return np.concatenate([words, np.clip(np.stack(rows), scaling.low, scaling.high)])


def text(circuit: Circuit, words: np.ndarray) -> tuple[str, str]:
    """(inputs, expected outputs) as hexadecimal numbers for the benches: a line an example, of
    each word that is read, and of decision and score.
    """
    found = evaluate(circuit.classifier, words)
    mask = (1 << circuit.classifier.scaling.bits) - 1
    rows = words[:, circuit.ports()] & mask
    inputs = "".join(" ".join(f"{word:x}" for word in row) + "\n" for row in rows)
    pairs = zip(found.decision, found.score)
    return inputs, "".join(f"{decision:x} {score:x}\n" for decision, score in pairs)
