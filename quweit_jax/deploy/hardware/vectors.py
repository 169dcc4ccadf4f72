"""Golden vectors: words that go into a circuit, and what must come out.

Dimensions: N examples, F features.
"""

from __future__ import annotations

import numpy as np

from quweit_jax.deploy.hardware.circuit import Circuit
from quweit_jax.deploy.hardware.description import Classifier, evaluate


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


def ties_first(classifier: Classifier, words: np.ndarray, count: int) -> np.ndarray:
    """The places of `count` of the examples (N, F): those in which two classes share the largest
    count, as far as a quarter goes, then the others as they come.
    """
    tied = np.zeros(len(words), bool)
    own = evaluate(classifier, words)
    order = np.arange(classifier.classes)[::-1]
    group = order[classifier.group]
    mirrored = Classifier(**{**vars(classifier), "group": group, "offset": classifier.offset[::-1]})
    tied = order[evaluate(mirrored, words).decision] != own.decision
    first = np.flatnonzero(tied)[: max(1, count // 4)]
    rest = np.setdiff1d(np.arange(len(words)), first)[: max(0, count - len(first))]
    return np.concatenate([first, rest])


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
