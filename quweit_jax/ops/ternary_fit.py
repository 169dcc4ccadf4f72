"""Ternary matrices by least squares: weights -1, 0 and 1 chosen together, so that later ones make
up for what earlier ones miss, where rounding looks at each by itself.

NumPy in double precision; nothing here is differentiated. The matrix only enters by its products
with itself and with what is wanted, as in GPTQ (arXiv 2210.17323), whose one pass these repeated
passes of coordinate descent refine.

Dimensions: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int8, Num

from quweit_jax.errors import InputError

# Of the mean magnitude: what goes over from 0 to 1 is at 1 / 2, floats of 0 stay below and others
# above.
_BELOW, _ABOVE = 0.4, 0.6
_TINY = 1e-12


def fit_ternary(
    gram: Float[np.ndarray, "I I"],
    cross: Float[np.ndarray, "I O"],
    scale: Float[np.ndarray, "#O"],
    start: Float[np.ndarray, "I O"],
    passes: int = 6,
) -> Int8[np.ndarray, "I O"]:
    """T of -1, 0, 1 (I, O) for which |X T scale - Y|^2 is small: no change of a single weight makes
    it smaller once a pass changes nothing.

    Args:
      gram, cross: X^T X and X^T Y, of X (N, I) and Y (N, O), or both divided by one number.
      scale: what a weight of 1 is worth, for all outputs or each; positive.
      start: weights in units of `scale`, which are rounded to begin with.
      passes: over all inputs, those of the largest squares first; fewer if nothing changes.

    Raises:
      InputError: the shapes do not belong together.
    """
    _check(gram, cross, scale, start)
    if not all(np.isfinite(each).all() for each in (gram, cross, start)) or not (scale > 0).all():
        raise InputError(
            "fit_ternary: expected finite products and positive scales, found others; do the "
            "activations overflow?"
        )
    weights = np.clip(np.round(start), -1, 1)
    answered, squares = gram @ weights, np.diag(gram)
    order = [i for i in np.argsort(-squares, kind="stable") if squares[i] > 0]
    for _ in range(passes):
        changed = False
        for i in order:
            missing = cross[i] - scale * answered[i]
            best = np.clip(np.round(weights[i] + missing / (scale * squares[i])), -1, 1)
            change = best - weights[i]
            if change.any():
                answered += np.outer(gram[:, i], change)
                weights[i], changed = best, True
        if not changed:
            break
    return weights.astype(np.int8)


def best_scale(
    gram: Float[np.ndarray, "I I"], cross: Float[np.ndarray, "I O"], weights: Num[np.ndarray, "I O"]
) -> float:
    """The one scale with which given weights come closest, 0 if they answer nothing."""
    whole = weights.astype(np.float64)
    answered = float((whole * (gram @ whole)).sum())
    return float((whole * cross).sum()) / answered if answered > 0 else 0.0


def fit_ternary_and_scale(
    gram: Float[np.ndarray, "I I"], cross: Float[np.ndarray, "I O"], ridge: float = 1e-3
) -> tuple[Int8[np.ndarray, "I O"], Float[np.ndarray, "I O"], float]:
    """T of -1, 0, 1 and one scale for which |X T scale - Y|^2 is small, found in turn from the
    float weights that answer best.

    Args:
      gram, cross: as for `fit_ternary`. ridge: of the inputs' mean square, added to their products
        with themselves.

    Returns:
      (T, those float weights in units of the scale, the scale).
    """
    gram = gram + (ridge * float(np.trace(gram)) / max(1, len(gram)) + _TINY) * np.eye(len(gram))
    dense = np.linalg.solve(gram, cross)
    scale = 1.5 * (float(np.abs(dense).mean()) if dense.size else 0.0) + _TINY
    weights = dense / scale
    for _ in range(4):
        weights = fit_ternary(gram, cross, np.asarray([scale]), weights)
        scale = best_scale(gram, cross, weights) or scale
    return weights, dense / scale, scale


def float_weights(
    weights: Num[np.ndarray, "I O"], wanted: Float[np.ndarray, "I O"], mean: float
) -> Float[np.ndarray, "I O"]:
    """Floats of mean magnitude `mean` that `ternary.quantize_weights` rounds to given weights; each
    as near to where it would go over to another as `wanted`, the weights in units of their scale,
    is, but never at it. float32.
    """
    near, some = np.abs(wanted), weights != 0
    if not some.any():
        return np.zeros(weights.shape, np.float32)
    sizes = np.where(some, np.maximum(near, _ABOVE), np.minimum(near, _BELOW))
    # All magnitudes together have the mean 1: those of -1 and 1 make up for the others.
    least, left = sizes[some].min(), weights.size - sizes[~some].sum()
    beyond = (sizes[some] - least).sum()
    if beyond > 0 and least * some.sum() < left:
        sizes[some] = least + (sizes[some] - least) * (left - least * some.sum()) / beyond
    else:
        sizes[some] = left / some.sum()
    signs = np.where(some, np.sign(weights), np.sign(wanted))
    return (mean * signs * sizes).astype(np.float32)


def _check(gram: np.ndarray, cross: np.ndarray, scale: np.ndarray, start: np.ndarray) -> None:
    inputs, outputs = cross.shape if cross.ndim == 2 else (-1, -1)
    fits = gram.shape == (inputs, inputs) and start.shape == cross.shape
    if not fits or scale.shape not in ((1,), (outputs,)) or not (scale > 0).all():
        raise InputError(
            "fit_ternary: expected gram (I, I), cross and start (I, O) and positive scales (O,) or "
            f"(1,), found {list(gram.shape)}, {list(cross.shape)}, {list(start.shape)} and "
            f"{list(scale.shape)}."
        )
