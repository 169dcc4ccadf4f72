"""`data.augment`: each change of an image against plain NumPy, and the policy that draws them."""

import math

import numpy as np
import pytest

from quweit_jax.data import augment
from quweit_jax.data.augment import OPERATIONS, AugmentConfig
from quweit_jax.errors import InputError

GREY = (124, 116, 104)


def picture(height=12, width=10, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(size=32):
    """Slopes of three colors, on which bicubic sampling is nearly exact."""
    row, column = np.mgrid[:size, :size] * (200 / size)
    return np.stack([row + 20, column + 20, (row + column) / 2], axis=-1).astype(np.uint8)


def changed(name, pixels, strength, fill=GREY):
    image = augment.from_pixels(pixels)
    result = OPERATIONS[name](image, strength, fill)
    assert result.mode == image.mode and result.size == image.size
    assert augment.to_pixels(image).tobytes() == pixels.tobytes()  # the given image stays
    return augment.to_pixels(result).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", [0, 1, 4, 15])
def test_pad_crop(pad, channels):
    pixels = picture(channels=channels)
    padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
    windows = {
        padded[y : y + 12, x : x + 10].tobytes(): (y, x)
        for y in range(2 * pad + 1)
        for x in range(2 * pad + 1)
    }
    found = [
        windows[
            np.ascontiguousarray(augment.pad_crop(pixels, pad, np.random.default_rng(i))).tobytes()
        ]
        for i in range(200)
    ]
    for axis in range(2):
        places = {place[axis] for place in found}
        assert places <= set(range(2 * pad + 1)) and (
            pad > 4 or len(places) == 2 * pad + 1
        )  # every shift turns up


def test_resized_crop_covers_its_scale():
    # Pixels that tell their own place, so that the part's size can be read from the slopes of the
    # result.
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(200)[:, None], np.arange(200)[None]
    shares, aspects = [], []
    for seed in range(100):
        view = augment.resized_crop(pixels, (40, 40), 0.25, np.random.default_rng(seed)).astype(
            float
        )
        assert view.shape == (40, 40, 3)
        height, width = ((view[30, 30, c] - view[10, 10, c]) / 20 * 40 for c in range(2))
        shares.append(height * width / 200**2)
        aspects.append(width / height)
    assert 0.2 < min(shares) < 0.35 and 0.85 < max(shares) < 1.05 and 0.5 < np.mean(shares) < 0.7
    assert 0.7 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.42


def test_resized_crop_of_everything_and_of_long_images():
    square = smooth()
    whole = augment.resized_crop(square, (32, 32), 1.0, np.random.default_rng(0))
    assert whole.shape == (32, 32, 3)
    for shape in (
        (4, 90),
        (90, 4),
        (1, 50),
    ):  # no part of a whole long image has an aspect of 3/4 to 4/3
        view = augment.resized_crop(picture(*shape), (16, 24), 1.0, np.random.default_rng(0))
        assert view.shape == (16, 24, 3)
    long = np.zeros((30, 100, 1), np.uint8)
    long[:, 30:70] = 9
    assert (
        augment.resized_crop(long, (8, 8), 1.0, np.random.default_rng(0)) == 9
    ).all()  # the middle


def test_erase():
    shares = []
    for seed in range(100):
        inputs = np.full((32, 24, 3), 7, np.float32)
        augment.erase(inputs, np.random.default_rng(seed))
        gone = (inputs != 7).all(-1)
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        assert gone[
            rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1
        ].all() and gone.sum() == len(rows) * len(columns)  # one rectangle
        shares.append(gone.mean())
        assert 0.2 < len(columns) / len(rows) < 5
        if gone.sum() > 100:
            noise = inputs[gone]
            assert abs(noise.mean()) < 0.3 and 0.8 < noise.std() < 1.2
    assert 0.01 < min(shares) < 0.06 and 0.25 < max(shares) < 0.36


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "name", sorted(set(OPERATIONS) - {"auto_contrast", "equalize", "invert", "posterize"})
)
def test_no_strength_changes_nothing(name, channels):
    pixels = picture(channels=channels)
    np.testing.assert_array_equal(
        changed(name, pixels, 0.0, GREY if channels == 3 else 128), pixels
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_full_strength_changes_something(name, sign):
    pixels = (
        picture(32, 32) // 4 + 30
    )  # few levels, so that auto_contrast and equalize have something to do
    assert (changed(name, pixels, sign * 0.9) != pixels).mean() > 0.1


def test_operations_without_a_direction_ignore_the_sign():
    for name in ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"):
        np.testing.assert_array_equal(changed(name, picture(), 0.6), changed(name, picture(), -0.6))


def test_operations_on_levels():
    pixels = picture().astype(int)
    np.testing.assert_array_equal(changed("invert", picture(), 0.5), 255 - pixels)
    np.testing.assert_array_equal(
        changed("solarize", picture(), 0.5), np.where(pixels < 128, pixels, 255 - pixels)
    )
    np.testing.assert_array_equal(
        changed("solarize_add", picture(), 0.5), np.where(pixels < 128, pixels + 55, pixels)
    )
    for strength, bits in ((0, 4), (0.3, 3), (0.9, 1), (1, 1)):
        np.testing.assert_array_equal(
            changed("posterize", picture(), strength), pixels >> (8 - bits) << (8 - bits)
        )
    narrow = changed("auto_contrast", picture() // 4 + 50, 0)
    assert narrow.min() == 0 and narrow.max() == 255
    flat = np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 16, 3))
    spread = changed("equalize", flat, 0)[:, 0, 0]
    assert (np.diff(spread) >= 0).all() and spread.max() - spread.min() > 200
    np.testing.assert_allclose(changed("brightness", picture(), -0.5), pixels * 0.55, atol=1)
    np.testing.assert_allclose(
        changed("brightness", picture(), 0.5), np.minimum(pixels * 1.45, 255), atol=1
    )
    gray = changed("color", picture(), -1)
    assert (
        np.ptp(gray, axis=-1).mean() < 0.15 * np.ptp(pixels, axis=-1).mean()
    )  # a tenth of the color is left
    assert changed("contrast", picture(), -1).std() < 0.15 * pixels.std()
    assert (
        changed("sharpness", picture(), -1).std()
        < pixels.std()
        < changed("sharpness", picture(), 1).std()
    )


def test_operations_on_places():
    pixels = smooth()
    moved = changed("translate_x", pixels, 0.625)  # 0.45 * 0.625 * 32 = 9 pixels
    np.testing.assert_array_equal(moved[:, :23], pixels[:, 9:])
    np.testing.assert_array_equal(moved[:, 23:], np.broadcast_to(GREY, (32, 9, 3)))
    moved = changed("translate_y", pixels, -0.625)
    np.testing.assert_array_equal(moved[9:], pixels[:23])
    np.testing.assert_array_equal(moved[:9], np.broadcast_to(GREY, (9, 32, 3)))
    for name, transposed in (("shear_x", False), ("shear_y", True)):
        sheared = changed(name, pixels, 0.5)
        sheared, before = (
            x.swapaxes(0, 1) if transposed else x for x in (sheared, pixels.astype(int))
        )
        shift = round(0.15 * 20.5)
        np.testing.assert_allclose(sheared[20, 2:24], before[20, 2 + shift : 24 + shift], atol=3)
        assert (sheared[-1, -3:] == GREY).all()
    turned = changed("rotate", pixels, 0.5)  # by 15 degrees about the middle
    across = np.cos(np.radians(15)) * 5 - np.sin(np.radians(15)) * 3
    down = np.sin(np.radians(15)) * 5 + np.cos(np.radians(15)) * 3
    np.testing.assert_allclose(
        turned[16 + 3, 16 + 5, 1] - turned[16, 16, 1], across * 200 / 32, atol=4
    )
    np.testing.assert_allclose(
        turned[16 + 3, 16 + 5, 0] - turned[16, 16, 0], down * 200 / 32, atol=4
    )
    assert (turned[0, 0] == GREY).all()


def test_rand_augment_is_drawn_from_the_generator():
    config = AugmentConfig(randaugment_layers=2)
    pixels = picture()
    views = [
        augment.rand_augment(pixels, config, GREY, np.random.default_rng(i)) for i in range(200)
    ]
    for i in range(20):
        np.testing.assert_array_equal(
            views[i], augment.rand_augment(pixels, config, GREY, np.random.default_rng(i))
        )
    unchanged = np.mean([np.array_equal(view, pixels) for view in views])
    assert 0.15 < unchanged < 0.4  # neither of two operations: one time in four
    assert len({view.tobytes() for view in views}) > 100 and all(
        view.shape == pixels.shape and view.dtype == np.uint8 for view in views
    )
    gray = augment.rand_augment(
        picture(channels=1), AugmentConfig(randaugment_layers=9), 128, np.random.default_rng(0)
    )
    assert gray.shape == (12, 10, 1)


def test_rand_augment_draws_every_operation_at_about_its_magnitude(monkeypatch):
    seen = {name: [] for name in OPERATIONS}
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS,
            name,
            lambda image, strength, fill, name=name: seen[name].append(strength) or image,
        )
    rng = np.random.default_rng(0)
    for _ in range(150):
        augment.rand_augment(
            picture(2, 2), AugmentConfig(randaugment_layers=4, randaugment_magnitude=9), GREY, rng
        )
    strengths = np.concatenate(list(seen.values()))
    assert all(len(values) >= 8 for values in seen.values()) and 250 < len(strengths) < 350
    assert (
        abs(np.abs(strengths).mean() - 0.9) < 0.02
        and 0.03 < np.abs(strengths).std() < 0.06
        and np.abs(strengths).max() <= 1
    )
    assert abs((strengths > 0).mean() - 0.5) < 0.1


BAD = [
    (
        "crop",
        "middle",
        r"data\.augment\.crop: expected one of \['none', 'pad', 'resized'\], found 'middle'",
    ),
    ("pad", -1, r"data\.augment\.pad: expected a whole number of 0 or more, found -1"),
    ("pad", 1.5, r"data\.augment\.pad: expected a whole number of 0 or more, found 1\.5"),
    (
        "crop_scale",
        0.0,
        r"data\.augment\.crop_scale: expected a number above 0 and up to 1, found 0\.0",
    ),
    ("crop_scale", 1.1, r"data\.augment\.crop_scale: .*, found 1\.1"),
    ("flip", 1, r"data\.augment\.flip: expected True or False, found 1"),
    ("randaugment_layers", -2, r"data\.augment\.randaugment_layers: .*, found -2"),
    (
        "randaugment_magnitude",
        11,
        r"data\.augment\.randaugment_magnitude: expected a whole number from 0 to 10, found 11",
    ),
    ("randaugment_std", -0.5, r"data\.augment\.randaugment_std: .*, found -0\.5"),
    ("erasing", 1.5, r"data\.augment\.erasing: expected a number from 0 to 1, found 1\.5"),
    ("erasing", "often", r"data\.augment\.erasing: expected a number from 0 to 1, found 'often'"),
    ("mixup", -0.1, r"data\.augment\.mixup: expected a number of 0 or more, found -0\.1"),
    ("cutmix", math.nan, r"data\.augment\.cutmix: .*, found nan"),
    ("mix_probability", 2, r"data\.augment\.mix_probability: .*, found 2"),
    ("mix_switch", -1, r"data\.augment\.mix_switch: .*, found -1"),
    ("label_smoothing", True, r"data\.augment\.label_smoothing: .*, found True"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), BAD, ids=[f"{name}={value}" for name, value, _ in BAD]
)
def test_bad_values(name, value, message):
    with pytest.raises(InputError, match=message):
        AugmentConfig(**{name: value})
