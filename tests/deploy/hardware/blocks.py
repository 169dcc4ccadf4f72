"""Random blocks, and golden tokens for them: odd sizes, several tables of codes, thresholds beyond
the words' range, scales with ties, sums that overflow what a branch is clamped to.
"""

import numpy as np

from quweit_jax.deploy.hardware.blocks import activations, description
from quweit_jax.deploy.hardware.description import Classifier, Layer, Scaling

WORDS, STREAM = (-128, 128), (-(2**15), 2**15)


def branch(draw, features, one=False):
    """A branch with one scale a feature, or one in all; some round, so that halves occur."""
    count = 1 if one else features
    multiplier = draw.integers(2**30, 2**31, count)
    multiplier = np.where(draw.random(count) < 0.3, 2**30, multiplier)
    shift = np.where(draw.random(count) < 0.2, draw.integers(20, 45, count), 32)
    pair = (np.broadcast_to(part.astype(np.int64), features) for part in (multiplier, shift))
    return description.Branch(*pair)


def glu(seed):
    draw = np.random.default_rng(seed)
    features, bits, groups = (int(draw.integers(1, high)) for high in (10, 5, 4))
    units = groups * int(draw.integers(1, 6))
    halfway = np.sort(draw.choice(np.arange(-90 * features, 90 * features), 2**bits - 1, False))
    return description.GLUBlock(
        draw.integers(-1, 2, (features, 2 * units)).astype(np.int8),
        draw.integers(-50, 51, 2 * units),
        halfway,
        draw.integers(-127, 128, (groups, 2**bits, 2**bits)).astype(np.int8),
        draw.integers(-1, 2, (units, features)).astype(np.int8),
        draw.integers(-3000, 3001, features),
        (branch(draw, features), branch(draw, features, one=True)),
    )


def tables(seed, grouped):
    draw = np.random.default_rng(seed)
    features, inputs, layers = (int(draw.integers(1, high)) for high in (8, 8, 3))
    comparators = int(draw.integers(1, 4 * features + 1))
    count = features * int(draw.integers(1, 5))
    below, found = comparators, []
    for width in [*draw.integers(1, 20, layers - 1), count]:
        wiring = draw.integers(0, below, (width, inputs))
        found.append(Layer(draw.random((width, 2**inputs)) < 0.5, wiring))
        below = width
    encoder = Classifier(
        features,
        Scaling(8, True, 0.0, 1.0),
        draw.integers(0, features, comparators),
        draw.choice([-129, -128, -1, 0, 126, 127, *draw.integers(*WORDS, 8)], comparators),
        tuple(found),
        np.zeros(count, np.int64),
        np.zeros(1, np.int64),
    )
    shape = (count,) if grouped else (count, features)
    return description.TableBlock(
        encoder,
        draw.integers(-127, 128, shape).astype(np.int8),
        bool(draw.integers(2)),
        draw.integers(-3000, 3001, features),
        (branch(draw, features), branch(draw, features, one=True)),
    )


def block(seed):
    """One of the three kinds."""
    return glu(seed) if seed % 3 == 0 else tables(seed, seed % 3 == 1)


def options(made, seed):
    """Units or vectors a cycle, and levels between registers."""
    draw = np.random.default_rng([seed, 1])
    one = getattr(made, "units", None) or len(made.vectors)
    most = 1 if isinstance(made, description.TableBlock) and made.vectors.ndim == 1 else one
    return {"parallel": int(draw.integers(1, most + 1)), "pipeline": int(draw.integers(4))}


def tokens(made, count=12, seed=0):
    draw = np.random.default_rng(seed)
    x, residual = (draw.integers(*ends, (count, made.features)) for ends in (WORDS, STREAM))
    residual[: count // 2] //= 256  # most of a stream is small
    given = activations.Tokens(x, residual, description.evaluate(made, x, residual), count)
    return activations.with_extremes(made, given, 0)
