"""Thermometer bits and the surrogate gradient on a TPU, feature-major.

The rows of bits of a feature are neighbors, so registers of a threshold's bits, of eight features,
are stored row by row among those of the others; the compiler moves every row by itself.

Dimensions: D features, z thresholds, T tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float32

from quweit_jax.ops.kernels import dividing
from quweit_jax.ops.kernels.choice import Division
from quweit_jax.ops.kernels.tpu import common
from quweit_jax.ops.kernels.tpu.common import LANES, ROWS

_FEATURES, _TOKENS = 64, 512  # of a block


def encode(
    x_DT: Float32[Array, "D T"], thresholds: Float32[Array, "D z"], division: Division | None = None
) -> Float32[Array, "bits T"]:
    """`x > threshold`, (D * z, T); no dimension is 0."""
    axes = (1, None)
    return dividing.over_devices(_encode, division, x_DT.shape[1], axes, 1)(x_DT, thresholds)


def gradients(
    x_DT: Float32[Array, "D T"],
    thresholds: Float32[Array, "D z"],
    grad: Float32[Array, "bits T"],
    window: float,
    shape: str,
    division: Division | None = None,
) -> tuple[Float32[Array, "D T"], Float32[Array, "D z"]]:
    """The gradients to x and to the thresholds, see `ops.thermometer.encode_ste`."""
    tokens = x_DT.shape[1]

    def here(x_DT: Array, thresholds: Array, grad: Array) -> tuple[Array, Array]:
        to_x, to_thresholds = _gradients(x_DT, thresholds, grad, window, shape)
        return to_x, dividing.total(to_thresholds, division, tokens)

    axes = (1, None, 1)
    return dividing.over_devices(here, division, tokens, axes, (1, None))(x_DT, thresholds, grad)


def slope(
    x: Float32[Array, "*shape"], threshold: Float32[Array, "*#shape"], window: float, shape: str
) -> Float32[Array, "*shape"]:
    """d bit / d x."""
    distance = jnp.abs(x - threshold) * (1 / window)
    if shape == "triangular":
        return jnp.maximum(0.0, 1.0 - distance) * (1 / window)
    return jnp.where(distance < 1.0, 0.5 / window, 0.0)


def _blocks(features: int, tokens: int) -> tuple[int, int, tuple[int, int]]:
    """Features and tokens of a block, and the grid."""
    block = min(_FEATURES, dividing.round_up(features, ROWS))
    width = common.even_block(tokens, _TOKENS, LANES)
    return block, width, (-(-features // block), -(-tokens // width))


def _encode(x_DT: Array, thresholds: Array) -> Array:
    (features, tokens), steps = x_DT.shape, thresholds.shape[1]
    block, width, grid = _blocks(features, tokens)

    def kernel(x_ref, thresholds_ref, bits_ref, mixed_ref):
        @pl.loop(0, block // ROWS)
        def _(i):
            rows = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
            columns = [thresholds_ref[rows, k : k + 1] for k in range(steps)]
            for c in range(0, width, LANES):
                x, start = x_ref[rows, pl.ds(c, LANES)], (c // LANES % 2) * ROWS * steps
                for k, threshold in enumerate(columns):
                    bits = jnp.where(x > threshold, 1.0, 0.0)
                    mixed_ref[pl.ds(start + k, ROWS, stride=steps)] = bits
                for k in range(steps):
                    at = pl.ds(pl.multiple_of((i * steps + k) * ROWS, ROWS), ROWS)
                    bits_ref[at, pl.ds(c, LANES)] = mixed_ref[pl.ds(start + k * ROWS, ROWS)]

    return common.call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((block, width), lambda d, t: (d, t)),
            pl.BlockSpec((block, steps), lambda d, t: (d, 0)),
        ],
        out_specs=pl.BlockSpec((block * steps, width), lambda d, t: (d, t)),
        out_shape=jax.ShapeDtypeStruct((features * steps, tokens), jnp.float32),
        scratch=[pltpu.VMEM((2 * ROWS * steps, LANES), jnp.float32)],
        semantics=("parallel", "parallel"),
        name="thermometer_encode",
    )(x_DT, thresholds)


def _gradients(
    x_DT: Array, thresholds: Array, grad: Array, window: float, shape: str
) -> tuple[Array, Array]:
    (features, tokens), steps = x_DT.shape, thresholds.shape[1]
    block, width, grid = _blocks(features, tokens)
    if end := grid[1] * width - tokens:
        x_DT, grad = (jnp.pad(a, ((0, 0), (0, end))) for a in (x_DT, grad))

    def kernel(x_ref, thresholds_ref, grad_ref, to_x_ref, to_thresholds_ref, mixed_ref):
        @pl.when(pl.program_id(1) == 0)
        def _():
            to_thresholds_ref[...] = jnp.zeros_like(to_thresholds_ref)

        @pl.loop(0, block // ROWS)
        def _(i):
            rows = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
            sums = [jnp.zeros((ROWS, LANES), jnp.float32) for _ in range(steps)]
            for c in range(0, width, LANES):
                x, start = x_ref[rows, pl.ds(c, LANES)], (c // LANES % 2) * ROWS * steps
                for k in range(steps):
                    at = pl.ds(pl.multiple_of((i * steps + k) * ROWS, ROWS), ROWS)
                    mixed_ref[pl.ds(start + k * ROWS, ROWS)] = grad_ref[at, pl.ds(c, LANES)]
                to_x = jnp.zeros((ROWS, LANES), jnp.float32)
                for k in range(steps):
                    own = mixed_ref[pl.ds(start + k, ROWS, stride=steps)]
                    own = own * slope(x, thresholds_ref[rows, k : k + 1], window, shape)
                    to_x, sums[k] = to_x + own, sums[k] + own
                to_x_ref[rows, pl.ds(c, LANES)] = to_x
            for k in range(steps):
                to_thresholds_ref[rows, k : k + 1] -= jnp.sum(sums[k], axis=1, keepdims=True)

    to_x, to_thresholds = common.call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((block, width), lambda d, t: (d, t)),
            pl.BlockSpec((block, steps), lambda d, t: (d, 0)),
            pl.BlockSpec((block * steps, width), lambda d, t: (d, t)),
        ],
        out_specs=[
            pl.BlockSpec((block, width), lambda d, t: (d, t)),
            pl.BlockSpec((block, steps), lambda d, t: (d, 0)),
        ],
        out_shape=[jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (x_DT, thresholds)],
        scratch=[pltpu.VMEM((2 * ROWS * steps, LANES), jnp.float32)],
        semantics=("parallel", "arbitrary"),
        name="thermometer_gradients",
    )(x_DT, thresholds, grad)
    return to_x[:, :tokens], to_thresholds
