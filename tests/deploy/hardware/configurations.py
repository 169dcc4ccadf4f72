"""Random classifiers for hypothesis, drawn so that edges are common: thresholds beyond the words'
range, constant tables, repeated wiring, classes of unequal size.
"""

import dataclasses

import numpy as np
from hypothesis import strategies

from quweit_jax.deploy.hardware.circuit import Circuit, build
from quweit_jax.deploy.hardware.description import Classifier, Layer, Scaling
from quweit_jax.deploy.hardware.vectors import with_extremes


@dataclasses.dataclass(frozen=True)
class Configuration:
    seed: int
    features: int
    bits: int
    signed: bool
    comparators: int
    widths: tuple[int, ...]
    lut_inputs: int
    classes: int
    pruned: bool
    pipeline: int

    def classifier(self) -> Classifier:
        draw = np.random.default_rng(self.seed)
        scaling = Scaling(self.bits, self.signed, 0.0, 1.0)
        ends = [scaling.low - 1, scaling.low, scaling.high - 1, scaling.high]
        threshold = draw.integers(scaling.low - 1, scaling.high + 1, self.comparators)
        edge = draw.random(self.comparators) < 0.2
        threshold = np.where(edge, draw.choice(ends, self.comparators), threshold)
        last = -(-self.widths[-1] // self.classes) * self.classes
        widths = [*self.widths[:-1], last]
        layers, below = [], self.comparators
        for width in widths:
            tables = draw.random((width, 2**self.lut_inputs)) < 0.5
            tables[draw.random(width) < 0.1] = draw.random() < 0.5  # constant
            wiring = draw.integers(0, below, (width, self.lut_inputs))
            repeated = draw.random(width) < 0.2
            wiring[repeated] = wiring[repeated, :1]
            layers.append(Layer(tables, wiring))
            below = width
        group, offset = np.arange(last) // (last // self.classes), np.zeros(self.classes, np.int64)
        if self.pruned:
            group = draw.integers(0, self.classes, last)
            offset = draw.integers(0, 4, self.classes)
        feature = draw.integers(0, self.features, self.comparators)
        return Classifier(self.features, scaling, feature, threshold, tuple(layers), group, offset)

    def circuit(self) -> Circuit:
        return build(self.classifier(), self.pipeline)

    def words(self, classifier: Classifier, count: int = 24) -> np.ndarray:
        draw, scaling = np.random.default_rng(self.seed + 1), classifier.scaling
        random = draw.integers(scaling.low, scaling.high + 1, (count, self.features))
        return with_extremes(classifier, random)


def configurations(most_tables: int = 30, most_classes: int = 100):
    """Configurations: n 1 to 8, 1 to 3 layers, words of 2 to 16 bits, 2 to `most_classes`."""
    whole = strategies.integers
    return strategies.builds(
        Configuration,
        seed=whole(0, 2**32 - 1),
        features=whole(1, 9),
        bits=whole(2, 16),
        signed=strategies.booleans(),
        comparators=whole(1, 25),
        widths=strategies.lists(whole(1, most_tables), min_size=1, max_size=3).map(tuple),
        lut_inputs=whole(1, 8),
        classes=strategies.one_of(whole(2, 12), whole(2, most_classes)),
        pruned=strategies.booleans(),
        pipeline=whole(0, 3),
    )
