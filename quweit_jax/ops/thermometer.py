"""Thermometer encoders: z thresholds turn a number into z bits, bit i = x > threshold_i (strict).

Dimensions: N examples to fit on, F features, z thresholds a feature.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.scipy.special import ndtri
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from quweit_jax.errors import InputError, check_choice
from quweit_jax.ops.kernels.choice import (
    Division,
    Hindrance,
    anywhere,
    choose,
    division,
    kernels_for,
)

Thresholds = Float[ArrayLike, "F z"] | Float[ArrayLike, "1 z"] | Float[ArrayLike, " z"]

WINDOWS = ("triangular", "boxcar")
_MANY_TOKENS = 1024  # worth a kernel


def _fit_input(name: str, x: ArrayLike, num_bits: int, per_feature: bool) -> Array:
    x = _floating(x)
    if x.ndim != 2 or x.shape[0] == 0 or (x.size == 0 and not per_feature):
        raise InputError(f"{name}: expected at least one example, x (N, F), found {list(x.shape)}.")
    if num_bits < 1:
        raise InputError(f"{name}: expected num_bits >= 1, found {num_bits}.")
    # Half precision has neither the range nor the steps for thresholds: bfloat16 has 128 numbers
    # from 0.5 to 1.
    if not isinstance(x, Tracer) and bool(jnp.isnan(x).any()):
        raise InputError(
            f"{name}: expected numbers, found some that are none (NaN); clean the data."
        )
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _floating(x: ArrayLike) -> Array:
    """An array, 64-bit whole numbers of the host in float32: JAX would drop their upper bits.

    Raises:
      InputError: complex numbers, which have no order.
    """
    if not isinstance(x, jax.Array) and np.asarray(x).dtype.kind in "iu":
        x = np.asarray(x).astype(np.float32)
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise InputError(f"thermometer: expected real numbers, found {x.dtype}.")
    return x


def _finite(name: str, thresholds: Array) -> Array:
    """The thresholds; raises InputError where known ones are no numbers."""
    if not isinstance(thresholds, Tracer) and not bool(jnp.isfinite(thresholds).all()):
        raise InputError(
            f"{name}: expected values that are numbers, with a spread that fits "
            f"{thresholds.dtype}, found thresholds that are not; clean or rescale the data."
        )
    return thresholds


def uniform_thresholds(
    x: Shaped[ArrayLike, "N F"], num_bits: int, *, per_feature: bool = True
) -> Float[Array, "features z"]:
    """`min + i (max - min) / (z + 1)`, i = 1..z: (F, z), or (1, z) over all features together;
    float32 of half precision and whole numbers, else x's dtype.

    Raises:
      InputError: no examples, no bits, or values (where known) that are not finite.
    """
    x = _fit_input("uniform_thresholds", x, num_bits, per_feature)
    x = x if per_feature else x.reshape(-1, 1)
    low, high = x.min(axis=0)[:, None], x.max(axis=0)[:, None]
    steps = jnp.arange(1, num_bits + 1, dtype=x.dtype)
    thresholds, part = low + steps * (high - low) / (num_bits + 1), steps / (num_bits + 1)
    # where the spread times a step is too large, each end by itself is not
    thresholds = jnp.where(jnp.isfinite(thresholds), thresholds, low * (1 - part) + high * part)
    return _finite("uniform_thresholds", thresholds)


def gaussian_thresholds(
    x: Shaped[ArrayLike, "N F"], num_bits: int, *, per_feature: bool = True
) -> Float[Array, "*features z"]:
    """`mean + std * Phi^-1(i / (z + 1))`, std with Bessel's correction: (F, z), or (z,) over all
    features together; dtype and errors as of `uniform_thresholds`.

    Raises:
      InputError: also a single value, which has no spread.
    """
    x = _fit_input("gaussian_thresholds", x, num_bits, per_feature)
    if (x.shape[0] if per_feature else x.size) < 2 and x.size:
        raise InputError(
            "gaussian_thresholds: expected at least 2 examples, whose standard deviation can be "
            f"told, found {x.shape[0]}; fit on more, or use uniform_thresholds."
        )
    quantiles = normal_quantiles(num_bits).astype(x.dtype)
    if per_feature:
        thresholds = x.mean(axis=0)[:, None] + x.std(axis=0, ddof=1)[:, None] * quantiles
    else:
        thresholds = x.mean() + x.std(ddof=1) * quantiles
    return _finite("gaussian_thresholds", thresholds)


def normal_quantiles(num_bits: int) -> Float[Array, " z"]:
    """`Phi^-1(i / (z + 1))`, i = 1..z: the gaussian thresholds of N(0, 1), float32 (z,)."""
    if num_bits < 1:
        raise InputError(f"normal_quantiles: expected num_bits >= 1, found {num_bits}.")
    return ndtri(jnp.arange(1, num_bits + 1, dtype=jnp.float32) / (num_bits + 1))


def distributive_thresholds(
    x: Shaped[ArrayLike, "N F"], num_bits: int, *, per_feature: bool = True
) -> Float[Array, "*features z"]:
    """`sorted(x)[int(N i / (z + 1))]`, thresholds that split the data evenly: (F, z), or (z,) over
    all features together; dtype and errors as of `uniform_thresholds`.
    """
    x = _fit_input("distributive_thresholds", x, num_bits, per_feature)
    x = x if per_feature else x.reshape(-1)
    places = jnp.asarray([x.shape[0] * i // (num_bits + 1) for i in range(1, num_bits + 1)])
    return _finite("distributive_thresholds", jnp.sort(x, axis=0)[places].T)


FITS: dict[str, Callable[..., Array]] = {
    "uniform": uniform_thresholds,
    "gaussian": gaussian_thresholds,
    "distributive": distributive_thresholds,
}


def _check_thresholds(name: str, x: Array, thresholds: Array) -> None:
    if (
        thresholds.ndim < 1
        or thresholds.ndim > 2
        or (thresholds.ndim == 2 and thresholds.shape[0] not in (1, x.shape[-1] if x.ndim else 1))
    ):
        raise InputError(
            f"{name}: expected thresholds (z,), (1, z) or (F, z) for x (..., F), found "
            f"{list(thresholds.shape)} for {list(x.shape)}."
        )


def encode(
    x: Shaped[ArrayLike, "*tokens F"], thresholds: Thresholds
) -> Float[Array, "*tokens F z"]:
    """`x > threshold`, strictly: x (..., F) and thresholds (F, z), (1, z) or (z,) give (..., F, z)
    in x's dtype (float32 if x is not floating).
    """
    x, thresholds = _floating(x), jnp.asarray(thresholds)
    _check_thresholds("encode", x, thresholds)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    return (x[..., None] > thresholds).astype(dtype)


def encode_ste(
    x: Float[ArrayLike, "*tokens F"],
    thresholds: Thresholds,
    *,
    window: float | str = 1.0,
    shape: str = "triangular",
) -> Float[Array, "*tokens F z"]:
    """`encode` with a surrogate gradient, for use inside a network.

    d bit / d x is a window of unit area around the threshold, `max(0, 1 - |x - threshold| / window)
    / window` (triangular) or `1 / (2 window)` where `|x - threshold| < window` (boxcar); d bit / d
    threshold is its negative.

    Args:
      x: (..., F) floating. thresholds: (F, z), (1, z) or (z,). window: half-width, in units of x.
        shape: 'triangular' or 'boxcar'.

    Returns:
      (..., F, z) in x's dtype.
    """
    x, thresholds = jnp.asarray(x), jnp.asarray(thresholds)
    if isinstance(window, str):  # the shape alone, at half-width 1
        shape, window = window, 1.0
    check_choice("encode_ste: shape", shape, WINDOWS)
    _check_thresholds("encode_ste", x, thresholds)
    if not float(np.finfo(np.float32).tiny) <= window < math.inf:
        raise InputError(
            f"encode_ste: window is a half-width and must be positive and finite, found {window}."
        )
    return step_ste(x[..., None], thresholds, float(window), shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def step_ste(
    x: Float[Array, "*#shape"], threshold: Float[Array, "*#shape"], window: float, shape: str
) -> Float[Array, "*shape"]:
    """`x > threshold` after broadcasting, in x's dtype, with the surrogate gradient of
    `encode_ste`.
    """
    return (x > threshold).astype(x.dtype)


def _step_forward(x, threshold, window, shape):
    return step_ste(x, threshold, window, shape), (x, threshold)


def _step_backward(window, shape, saved, grad):
    x, threshold = saved
    distance = jnp.abs(x.astype(jnp.float32) - threshold.astype(jnp.float32)) / window
    slope = jnp.maximum(0.0, 1.0 - distance) if shape == "triangular" else 0.5 * (distance < 1.0)
    grad = grad.astype(jnp.float32) * slope / window
    return _sum_to(grad, x.shape).astype(x.dtype), _sum_to(-grad, threshold.shape).astype(
        threshold.dtype
    )


step_ste.defvjp(_step_forward, _step_backward)


def _sum_to(grad: Array, shape: tuple[int, ...]) -> Array:
    """Undoes broadcasting from `shape`."""
    extra = grad.ndim - len(shape)
    grad = grad.sum(tuple(range(extra)))
    stretched = tuple(i for i, size in enumerate(shape) if size == 1 and grad.shape[i] != 1)
    return grad.sum(stretched, keepdims=True)


def encode_feature_major(
    x_DT: Float[Array, "D T"],
    thresholds: Float[Array, "D z"],
    *,
    window: float = 1.0,
    shape: str = "triangular",
    implementation: str | None = None,
) -> Float[Array, "bits T"]:
    """`encode_ste` for tokens side by side, as a block of look-ups wants its bits: x (D, T) and
    thresholds (D, z) -> (D * z, T) in x's dtype.

    Args:
      window, shape: see `encode_ste`. implementation: 'xla' or 'pallas' (a kernel for TPUs), see
        `ops.kernels`; None for the fastest.

    Raises:
      InputError: thresholds of other features, or an implementation that the platform lacks.
    """
    check_choice("encode_feature_major: shape", shape, WINDOWS)
    if x_DT.ndim != 2 or thresholds.ndim != 2 or thresholds.shape[0] != x_DT.shape[0]:
        raise InputError(
            "encode_feature_major: expected x (D, T) and thresholds (D, z), found "
            f"{list(x_DT.shape)} and {list(thresholds.shape)}."
        )
    (features, tokens), steps = x_DT.shape, thresholds.shape[1]
    known = not any(map(jax.export.is_symbolic_dim, x_DT.shape))
    kernels = kernels_for("tpu")

    def hindrance(at: str) -> str | None:
        return kernels(at) if known else "needs sizes that are numbers"

    offered: dict[str, Hindrance] = {"xla": anywhere}
    if implementation or (known and tokens >= _MANY_TOKENS):
        offered = {"pallas": hindrance} | offered
    chosen = choose("encode_feature_major", implementation, offered)
    if chosen == "xla" or not (features and tokens and steps):
        bits_DzT: Array = step_ste(x_DT[:, None, :], thresholds[:, :, None], window, shape)
        return bits_DzT.reshape(features * steps, tokens)
    how = _How(window, shape, division())
    bits: Array = _encode(x_DT.astype(jnp.float32), thresholds.astype(jnp.float32), how)
    return bits.astype(x_DT.dtype)


class _How(NamedTuple):
    """What of a thermometer is no array."""

    window: float
    shape: str
    division: Division | None


def _kernels() -> ModuleType:
    from quweit_jax.ops.kernels.tpu import thermometer  # importing Pallas takes half a second

    return thermometer


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _encode(x_DT: Array, thresholds: Array, how: _How) -> Array:
    return _kernels().encode(x_DT, thresholds, how.division)


def _encode_forward(x_DT, thresholds, how):
    return _encode(x_DT, thresholds, how), (x_DT, thresholds)


def _encode_backward(how, saved, grad):
    return _kernels().gradients(*saved, grad, how.window, how.shape, how.division)


_encode.defvjp(_encode_forward, _encode_backward)
