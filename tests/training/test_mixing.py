"""Mixup, cutmix and label smoothing in the train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.data.augment import AugmentConfig
from quweit_jax.training import losses, mixing

IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
TARGETS = np.asarray([0, 1, 2, 3, 0, 1])


def mix(seed, **config):
    return mixing.mix(
        jnp.asarray(IMAGES), jnp.asarray(TARGETS), 4, AugmentConfig(**config), jax.random.key(seed)
    )


def test_label_smoothing_alone():
    inputs, targets = mix(0, label_smoothing=0.2)
    np.testing.assert_array_equal(inputs, IMAGES)
    np.testing.assert_allclose(targets, np.eye(4)[TARGETS] * 0.8 + 0.05, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_mixup_blends_pixels_and_targets_alike(seed):
    inputs, targets = mix(seed, mixup=0.8)
    share = (np.asarray(inputs) - IMAGES[::-1])[0, 0, 0, 0] / (IMAGES - IMAGES[::-1])[0, 0, 0, 0]
    np.testing.assert_allclose(inputs, share * IMAGES + (1 - share) * IMAGES[::-1], atol=1e-5)
    np.testing.assert_allclose(
        targets, share * np.eye(4)[TARGETS] + (1 - share) * np.eye(4)[TARGETS[::-1]], atol=1e-5
    )


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_pastes_a_box_and_counts_its_area(seed):
    inputs, targets = (np.asarray(a) for a in mix(seed, cutmix=1.0))
    pasted = (inputs != IMAGES).any((0, 3))
    rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
    box = np.zeros((8, 8), bool)
    if len(rows):
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    np.testing.assert_array_equal(inputs, np.where(box[None, :, :, None], IMAGES[::-1], IMAGES))
    share = 1 - box.mean()
    np.testing.assert_allclose(
        targets, share * np.eye(4)[TARGETS] + (1 - share) * np.eye(4)[TARGETS[::-1]], atol=1e-6
    )


def test_switch_and_probability():
    off = mix(0, mixup=0.8, cutmix=1.0, mix_probability=0.0)
    np.testing.assert_array_equal(off[0], IMAGES)
    np.testing.assert_array_equal(off[1], np.eye(4)[TARGETS])
    kinds = set()
    for seed in range(12):
        inputs = np.asarray(mix(seed, mixup=0.8, cutmix=1.0)[0])
        kinds.add(bool(np.isin(inputs[0], [IMAGES[0], IMAGES[-1]]).all()))
    assert kinds == {True, False}


def test_same_key_same_batch():
    first, second = mix(3, mixup=0.8, cutmix=1.0), mix(3, mixup=0.8, cutmix=1.0)
    assert all((a == b).all() for a, b in zip(first, second))


def test_soft_targets_in_the_loss():
    logits = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    hard, soft = (
        losses.cross_entropy(jnp.asarray(logits), jnp.asarray(TARGETS)),
        losses.cross_entropy(jnp.asarray(logits), jnp.eye(4)[TARGETS]),
    )
    for name in hard:
        np.testing.assert_allclose(hard[name], soft[name], rtol=1e-6)
