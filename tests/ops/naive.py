"""Plain references in float64 with loops, each written from its formula; slow on purpose and
independent of `quweit_jax`.

Dimensions: T tokens, F inputs, L tables, n inputs a table, M slots, C candidates, z thresholds, d
outputs.
"""

from __future__ import annotations

import math
import statistics

import numpy as np


def address(bits_F: np.ndarray, slots_n: np.ndarray) -> int:
    """Slot 0 is the least significant bit."""
    return sum((1 << l) for l, source in enumerate(slots_n) if bits_F[source] != 0)


def lut_lookup(bits_TF: np.ndarray, mapping_Ln: np.ndarray, tables_LA: np.ndarray) -> np.ndarray:
    """out[t, j] = tables[j, sum_l bits[t, mapping[j, l]] << l]."""
    out = np.zeros((len(bits_TF), len(mapping_Ln)))
    for t in range(len(bits_TF)):
        for j in range(len(mapping_Ln)):
            out[t, j] = tables_LA[j, address(bits_TF[t], mapping_Ln[j])]
    return out


def efd_weight(distance: int, n: int, decay: str, alpha: float | None, beta: float | None) -> float:
    if decay == "exponential":
        alpha = 0.5 * 0.75 ** (n - 1) if alpha is None else alpha
        beta = 1 / 3 if beta is None else beta
        return alpha * beta**distance
    return (1.0 if alpha is None else alpha) / (distance + 1)


def lut_gradients(
    bits_TF: np.ndarray,
    mapping_Ln: np.ndarray,
    tables_LA: np.ndarray,
    grad_TL: np.ndarray,
    decay: str = "exponential",
    alpha: float | None = None,
    beta: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The extended finite difference: (gradient to the bits (T, F),
    gradient to the tables (L, A)).
    """
    num_luts, n = mapping_Ln.shape
    grad_bits, grad_tables = np.zeros(bits_TF.shape), np.zeros((num_luts, 2**n))
    weight = [efd_weight(distance, n, decay, alpha, beta) for distance in range(n)]
    for t in range(len(bits_TF)):
        for j in range(num_luts):
            here, g = address(bits_TF[t], mapping_Ln[j]), float(grad_TL[t, j])
            grad_tables[j, here] += g
            for l in range(n):
                total = 0.0
                for a in range(2**n):
                    sign = 1.0 if (a >> l) & 1 else -1.0
                    distance = ((a ^ here) & ~(1 << l)).bit_count()
                    total += sign * float(tables_LA[j, a]) * weight[distance]
                grad_bits[t, mapping_Ln[j, l]] += g * total
    return grad_bits, grad_tables


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = [math.exp(v - max(values)) for v in values]
    return np.asarray(exponentials) / sum(exponentials)


def learnable_wiring(bits_TF: np.ndarray, scores_FM: np.ndarray, grad_TM: np.ndarray, tau: float):
    """(out (T, M), gradient to the bits (T, F), gradient to the scores (F, M))."""
    num_inputs, slots = scores_FM.shape
    out, grad_bits, grad_scores = (
        np.zeros((len(bits_TF), slots)),
        np.zeros(bits_TF.shape),
        np.zeros(scores_FM.shape),
    )
    for m in range(slots):
        column = np.asarray(scores_FM[:, m], np.float64)
        best, weights = int(np.argmax(column)), softmax(column / tau)
        for t in range(len(bits_TF)):
            out[t, m] = bits_TF[t, best]
            for f in range(num_inputs):
                grad_scores[f, m] += (2 * float(bits_TF[t, f]) - 1) * float(grad_TM[t, m])
                grad_bits[t, f] += float(grad_TM[t, m]) * weights[f]
    return out, grad_bits, grad_scores


def sparse_learnable_wiring(
    bits_TF: np.ndarray,
    scores_MC: np.ndarray,
    candidates_MC: np.ndarray,
    grad_TM: np.ndarray,
    tau: float,
):
    """(out (T, M), gradient to the bits (T, F), gradient to the scores (M, C))."""
    slots, choices = scores_MC.shape
    out, grad_bits, grad_scores = (
        np.zeros((len(bits_TF), slots)),
        np.zeros(bits_TF.shape),
        np.zeros(scores_MC.shape),
    )
    for m in range(slots):
        row = np.asarray(scores_MC[m], np.float64)
        best, weights = int(np.argmax(row)), softmax(row / tau)
        for t in range(len(bits_TF)):
            out[t, m] = bits_TF[t, candidates_MC[m, best]]
            for c in range(choices):
                source = candidates_MC[m, c]
                grad_scores[m, c] += (2 * float(bits_TF[t, source]) - 1) * float(grad_TM[t, m])
                grad_bits[t, source] += float(grad_TM[t, m]) * weights[c]
    return out, grad_bits, grad_scores


def thresholds(kind: str, x_NF: np.ndarray, z: int, per_feature: bool) -> np.ndarray:
    """(F, z), or (1, z) for all features together."""
    columns = (
        [sorted(map(float, x_NF[:, f])) for f in range(x_NF.shape[1])]
        if per_feature
        else [sorted(map(float, x_NF.reshape(-1)))]
    )
    out = np.zeros((len(columns), z))
    for f, values in enumerate(columns):
        for i in range(1, z + 1):
            if kind == "uniform":
                out[f, i - 1] = values[0] + i * (values[-1] - values[0]) / (z + 1)
            elif kind == "gaussian":
                out[f, i - 1] = statistics.mean(values) + statistics.stdev(
                    values
                ) * statistics.NormalDist().inv_cdf(i / (z + 1))
            else:
                out[f, i - 1] = values[int(len(values) * i / (z + 1))]
    return out


def encode(x_TF: np.ndarray, thresholds_Fz: np.ndarray) -> np.ndarray:
    """bit[t, f, i] = x[t, f] > threshold[f, i]; one row of thresholds serves every feature."""
    thresholds_Fz = np.atleast_2d(thresholds_Fz)
    out = np.zeros((*x_TF.shape, thresholds_Fz.shape[1]))
    for t in range(x_TF.shape[0]):
        for f in range(x_TF.shape[1]):
            row = thresholds_Fz[0 if len(thresholds_Fz) == 1 else f]
            for i, threshold in enumerate(row):
                out[t, f, i] = 1.0 if x_TF[t, f] > threshold else 0.0
    return out


def surrogate_slope(distance: float, window: float, shape: str) -> float:
    """A window of unit area, `window` its half-width."""
    if shape == "triangular":
        return max(0.0, 1.0 - abs(distance) / window) / window
    return 1.0 / (2.0 * window) if abs(distance) < window else 0.0


def encode_gradients(
    x_TF: np.ndarray, thresholds_Fz: np.ndarray, grad_TFz: np.ndarray, window: float, shape: str
):
    """(gradient to x (T, F), gradient to the thresholds, in their shape)."""
    rows = np.atleast_2d(thresholds_Fz)
    grad_x, grad_thresholds = np.zeros(x_TF.shape), np.zeros(rows.shape)
    for t in range(x_TF.shape[0]):
        for f in range(x_TF.shape[1]):
            row = 0 if len(rows) == 1 else f
            for i in range(rows.shape[1]):
                step = float(grad_TFz[t, f, i]) * surrogate_slope(
                    float(x_TF[t, f]) - float(rows[row, i]), window, shape
                )
                grad_x[t, f] += step
                grad_thresholds[row, i] -= step
    return grad_x, grad_thresholds.reshape(np.shape(thresholds_Fz))


def group_sum(bits_TL: np.ndarray, groups: int, tau: float) -> np.ndarray:
    """Contiguous groups of ceil(L / groups), the last ones short or empty."""
    size = math.ceil(bits_TL.shape[1] / groups)
    out = np.zeros((len(bits_TL), groups))
    for t in range(len(bits_TL)):
        for i in range(bits_TL.shape[1]):
            out[t, i // size] += float(bits_TL[t, i]) / tau
    return out


def group_sum_gradient(grad_TG: np.ndarray, num_bits: int, tau: float) -> np.ndarray:
    size = math.ceil(num_bits / grad_TG.shape[1])
    return np.asarray(
        [[float(row[i // size]) / tau for i in range(num_bits)] for row in grad_TG]
    ).reshape(len(grad_TG), num_bits)


def conditional_sum(
    bits_TL: np.ndarray, vectors: np.ndarray, bias_d: np.ndarray | None, outputs: int
) -> np.ndarray:
    """bias + sum_i bit_i E_i; vectors (L,) are grouped: bit i serves output i // (L / d)."""
    out = np.zeros((len(bits_TL), outputs)) + (
        0.0 if bias_d is None else np.asarray(bias_d, np.float64)
    )
    for t in range(len(bits_TL)):
        for i in range(bits_TL.shape[1]):
            if vectors.ndim == 2:
                for k in range(outputs):
                    out[t, k] += float(bits_TL[t, i]) * float(vectors[i, k])
            else:
                out[t, i // (bits_TL.shape[1] // outputs)] += float(bits_TL[t, i]) * float(
                    vectors[i]
                )
    return out


def conditional_sum_gradients(bits_TL: np.ndarray, vectors: np.ndarray, grad_Td: np.ndarray):
    """(gradient to the bits (T, L), to the vectors, to the bias (d,))."""
    grad_bits, grad_vectors, grad_bias = (
        np.zeros(bits_TL.shape),
        np.zeros(vectors.shape),
        np.zeros(grad_Td.shape[1]),
    )
    for t in range(len(bits_TL)):
        for k in range(grad_Td.shape[1]):
            g = float(grad_Td[t, k])
            grad_bias[k] += g
            for i in range(bits_TL.shape[1]):
                if vectors.ndim == 2:
                    grad_bits[t, i] += g * float(vectors[i, k])
                    grad_vectors[i, k] += g * float(bits_TL[t, i])
                elif i // (bits_TL.shape[1] // grad_Td.shape[1]) == k:
                    grad_bits[t, i] += g * float(vectors[i])
                    grad_vectors[i] += g * float(bits_TL[t, i])
    return grad_bits, grad_vectors, grad_bias


def walsh_hadamard(tables_LA: np.ndarray) -> np.ndarray:
    """coefficient[j, s] = 2**-n sum_a tables[j, a] (-1)**popcount(a & s)."""
    out = np.zeros(tables_LA.shape)
    size = tables_LA.shape[1]
    for j in range(len(tables_LA)):
        for s in range(size):
            out[j, s] = (
                sum(float(tables_LA[j, a]) * (-1) ** (a & s).bit_count() for a in range(size))
                / size
            )
    return out
