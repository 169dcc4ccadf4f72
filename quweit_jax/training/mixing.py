"""Mixing a batch of images in the train step: mixup, cutmix and label smoothing, on the device and
on the global batch.

Deterministic in the step's key, hence in (seed, step), whatever the number of processes. Every
example is mixed with the one at the mirrored place of the batch.

mixup: Zhang et al. 2018. cutmix: Yun et al. 2019. One coefficient a batch and the switch between
  the two: as in timm, which DeiT trains with.

Dimensions: B batch, H x W pixels, C channels, V classes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from quweit_jax.data.augment import AugmentConfig


def mixes(config: AugmentConfig) -> bool:
    """Whether there is anything to do."""
    return config.mixup > 0 or config.cutmix > 0 or config.label_smoothing > 0


def mix(
    inputs: Array, targets: Array, num_classes: int, config: AugmentConfig, key: Array
) -> tuple[Array, Array]:
    """inputs (B, H, W, C), targets (B,) int -> mixed inputs and targets (B, V) float32 that sum to
    1.
    """
    smoothing = config.label_smoothing
    soft = jax.nn.one_hot(targets, num_classes) * (1 - smoothing) + smoothing / num_classes
    if config.mixup == 0 and config.cutmix == 0:
        return inputs, soft
    apply_key, switch_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
    partner = inputs[::-1]
    applied = jax.random.bernoulli(apply_key, config.mix_probability)
    cut = (
        jax.random.bernoulli(switch_key, config.mix_switch)
        if config.mixup > 0
        else jnp.asarray(True)
    )
    cut = cut & (config.cutmix > 0)
    share = jnp.where(cut, _beta(cutmix_key, config.cutmix), _beta(mixup_key, config.mixup))
    share = jnp.where(applied, share, 1.0)
    inside = _box(box_key, inputs.shape[1], inputs.shape[2], share)
    blended = share * inputs + (1 - share) * partner
    inputs = jnp.where(cut, jnp.where(inside[:, :, None], partner, inputs), blended).astype(
        inputs.dtype
    )
    share = jnp.where(cut, 1 - inside.mean(dtype=jnp.float32), share)
    return inputs, share * soft + (1 - share) * soft[::-1]


def _beta(key: Array, parameter: float) -> Array:
    return jax.random.beta(key, parameter, parameter) if parameter > 0 else jnp.ones(())


def _box(key: Array, height: int, width: int, share: Array) -> Array:
    """A rectangle about a random center, cut at the image's edge, of (1 - share) of the area before
    that: bool (H, W).
    """
    side = jnp.sqrt(1 - share)
    row_key, column_key = jax.random.split(key)

    def span(key: Array, size: int) -> Array:
        center, half = jax.random.randint(key, (), 0, size), (side * size).astype(jnp.int32) // 2
        places = jnp.arange(size)
        return (places >= center - half) & (places < center + half)

    return span(row_key, height)[:, None] & span(column_key, width)[None, :]
