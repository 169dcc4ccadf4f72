"""`data.images`: what a stored image becomes, the same for every run, and what is said of one that
cannot be used.
"""

import dataclasses
import io
import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from quweit_jax.data import image_sources, images, pipeline
from quweit_jax.data.augment import AugmentConfig
from quweit_jax.data.images import ImageExamples
from quweit_jax.data.registry import DataConfig
from quweit_jax.errors import InputError
from tests.pictures import picture

ALL = AugmentConfig(crop="pad", pad=2, flip=True, randaugment_layers=2, erasing=0.5)


def encoded(pixels, kind="PNG", mode=None):
    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    (image if mode is None else image.convert(mode)).save(file, kind)
    return file.getvalue()


class Stored:
    """Images in memory, as a TFDS set would hold them."""

    def __init__(self, items, channels=3, num_classes=10):
        self.items, self.channels, self.num_classes, self.reads = items, channels, num_classes, 0

    def __len__(self):
        return len(self.items)

    def read(self, index):
        self.reads += 1
        return self.items[index]

    def describe(self, index):
        return f"animals, split train, image {index}"

    def identity(self):
        return "animals"


def stored(count=12, **config):
    return ImageExamples(
        Stored([(encoded(picture(seed=i)), i % 10) for i in range(count)]), DataConfig(**config)
    )


def with_bad(data, place=1, target=1, *, count=4, channels=3, **config):
    """Good images but for one."""
    items = [(encoded(picture(channels=channels, seed=i)), i % 10) for i in range(count)]
    items[place] = (data, target)
    return ImageExamples(Stored(items, channels), DataConfig(**config))


def take(examples, count, seed=0, batch_size=4, **share):
    return list(
        itertools.islice(pipeline.train_batches(examples, batch_size, seed, **share), count)
    )


def same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


# What a stored image becomes.


def test_inputs_are_pixels_over_255():
    for kind in ("PNG", "BMP", "WEBP"):
        data = encoded(picture(), kind)
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        example = ImageExamples(Stored([(data, 3)]), DataConfig())[0]
        assert (
            example["inputs"].dtype == np.float32
            and example["targets"].dtype == np.int32
            and example["targets"] == 3
        )
        np.testing.assert_array_equal(
            example["inputs"], pixels.astype(np.float32) / np.float32(255)
        )


@pytest.mark.parametrize(
    ("shape", "channels"), [((8, 6), 1), ((8, 6, 1), 1), ((8, 6, 3), 3), ((8, 6, 4), 4)]
)
def test_arrays_need_no_decoding(shape, channels):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    examples = ImageExamples(Stored([(pixels, 0)], channels), DataConfig())
    assert examples.shape == (8, 6, channels)
    np.testing.assert_array_equal(
        examples[0]["inputs"], pixels.reshape(8, 6, channels).astype(np.float32) / np.float32(255)
    )


@pytest.mark.parametrize("normalize", images.NORMALIZATIONS)
def test_normalization(normalize):
    mean, deviation = images.NORMALIZATIONS[normalize]
    inputs = stored(normalize=normalize)[0]["inputs"]
    np.testing.assert_allclose(inputs, (picture() / 255 - mean) / deviation, atol=1e-5)


def test_normalization_of_grey_images():
    gray = [(encoded(picture(channels=1)), 0)]
    assert ImageExamples(Stored(gray, 1), DataConfig(normalize="half"))[0]["inputs"].min() < -0.9
    with pytest.raises(
        InputError,
        match=r"data\.normalize: 'imagenet' is for RGB images, found 1 channel; use none or half, "
        r"or .*to_rgb=True",
    ):
        ImageExamples(Stored(gray, 1), DataConfig(normalize="imagenet"))
    converted = ImageExamples(Stored(gray, 1), DataConfig(normalize="imagenet", to_rgb=True))
    assert converted.shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("height", "width"), [(40, 40), (60, 40), (40, 61), (16, 16), (7, 90), (16, 25)]
)
@pytest.mark.parametrize("fraction", [1.0, 0.875, 0.5])
def test_evaluation_view(height, width, fraction):
    row, column = np.mgrid[:height, :width]
    pixels = np.stack(
        [(row + 0.5) * 255 / height, (column + 0.5) * 255 / width, 0 * row], axis=-1
    ).astype(np.uint8)
    view = images.evaluation_view(pixels, 16, fraction)
    assert view.shape == (16, 16, 3)
    # The middle of the image stays in the middle, and the shorter side shows the fraction of
    # itself.
    np.testing.assert_allclose(view[7:9, 7:9, :2].mean(axis=(0, 1)), 127.5, atol=10)
    axis = 0 if height <= width else 1
    slope = view[..., axis].astype(float).mean(1 - axis)
    np.testing.assert_allclose((slope[-3] - slope[2]) / 11 * 16 / 255, fraction, rtol=0.12)


def test_evaluation_view_is_bicubic_and_centred():
    pixels = picture(37, 50)
    resized = np.asarray(
        Image.fromarray(pixels).resize((int(18 * 50 / 37), 18), Image.Resampling.BICUBIC)
    )
    np.testing.assert_array_equal(images.evaluation_view(pixels, 16, 16 / 18), resized[1:17, 4:20])
    assert images.evaluation_view(pixels[:16, :16], 16) is not None
    np.testing.assert_array_equal(
        images.evaluation_view(pixels[:16, :20], 16), pixels[:16, 2:18]
    )  # nothing to resize


def test_decoded_images_are_kept_as_far_as_they_fit():
    examples = stored(cache_megabytes=1)
    before = examples.source.reads
    for _ in range(3):
        examples[5]
    assert examples.source.reads == before + 1
    examples = stored(cache_megabytes=0)
    before, first = examples.source.reads, examples[5]
    np.testing.assert_array_equal(examples[5]["inputs"], first["inputs"])
    assert examples.source.reads == before + 2
    examples = stored(count=12)
    examples._room = 3 * 192
    for i in range(12):
        examples[i]
    assert len(examples._kept) == 4  # the first, and as many as fitted


def test_indices():
    examples = stored(5)
    np.testing.assert_array_equal(examples[-1]["inputs"], examples[4]["inputs"])
    assert len(list(examples)) == 5
    with pytest.raises(IndexError):
        examples[5]


# Views to train on.


def test_training_views_without_augmentation_are_the_evaluations():
    examples = stored(image_size=6, crop_fraction=0.8, normalize="half")
    for i in range(3):
        np.testing.assert_array_equal(
            examples.augmented(i, np.random.default_rng(i))["inputs"], examples[i]["inputs"]
        )


def test_flip():
    examples = stored(augment=AugmentConfig(flip=True))
    flipped = 0
    for seed in range(100):
        view = examples.augmented(2, np.random.default_rng(seed))["inputs"]
        turned = np.array_equal(view, examples[2]["inputs"][:, ::-1])
        assert turned or np.array_equal(view, examples[2]["inputs"])
        flipped += turned
    assert 30 < flipped < 70


def test_padding_is_black_before_normalization():
    examples = stored(normalize="half", augment=AugmentConfig(crop="pad", pad=3))
    padded = np.pad(
        picture().astype(np.float32) / 127.5 - 1, ((3, 3), (3, 3), (0, 0)), constant_values=-1
    )
    for seed in range(5):
        view = examples.augmented(0, np.random.default_rng(seed))["inputs"]
        assert any(
            np.allclose(view, padded[y : y + 8, x : x + 8], atol=1e-6)
            for y in range(7)
            for x in range(7)
        )


def test_erasing_is_after_normalization():
    plain, erased = (stored(normalize="half", augment=AugmentConfig(erasing=p)) for p in (0.0, 1.0))
    changed = [
        erased.augmented(0, np.random.default_rng(i))["inputs"] != plain[0]["inputs"]
        for i in range(20)
    ]
    assert all(0 < c.mean() < 0.5 for c in changed) and len({c.tobytes() for c in changed}) > 5
    half = stored(augment=AugmentConfig(erasing=0.5))
    assert (
        60
        < sum(
            np.array_equal(half.augmented(0, np.random.default_rng(i))["inputs"], half[0]["inputs"])
            for i in range(200)
        )
        < 140
    )


@pytest.mark.parametrize(
    "augment", [ALL, dataclasses.replace(ALL, crop="resized")], ids=["pad", "resized"]
)
@pytest.mark.parametrize("size", [0, 6])
def test_batches_are_the_same_after_a_resume_and_for_any_number_of_processes_and_threads(
    augment, size
):
    config = {"augment": augment, "image_size": size}
    whole = take(stored(**config), 9)
    assert (
        whole[0]["inputs"].shape == (4, size or 8, size or 8, 3)
        and whole[0]["inputs"].dtype == np.float32
    )
    same(take(stored(**config), 9), whole)
    same(take(stored(**config, threads=3), 9), whole)
    same(take(stored(**config), 9, prefetch=0), whole)
    iterator = pipeline.train_batches(stored(**config), 4, 0)
    list(itertools.islice(iterator, 4))
    other = pipeline.train_batches(stored(**config), 4, 0)
    other.set_state(iterator.get_state())
    same(list(itertools.islice(other, 5)), whole[4:])
    shares = [take(stored(**config), 9, process_index=p, process_count=2) for p in range(2)]
    for step in range(9):
        for p in range(2):
            np.testing.assert_array_equal(shares[p][step]["inputs"], whole[step]["inputs"][p::2])


def test_each_epoch_varies_images_anew():
    batches = take(stored(4, augment=AugmentConfig(crop="pad", pad=3)), 8)
    views = {batch["inputs"][list(batch["targets"]).index(1)].tobytes() for batch in batches}
    assert len(views) >= 6
    assert not np.array_equal(
        take(stored(augment=ALL), 1, seed=1)[0]["inputs"],
        take(stored(augment=ALL), 1, seed=0)[0]["inputs"],
    )


# Images that cannot be used.

BAD = {
    "gray": (
        encoded(picture(channels=1)),
        r"expected an image of mode RGB, found gray of 8 x 8 pixels",
        True,
    ),
    "transparent": (
        encoded(picture(channels=4)),
        "found RGB with transparency of 8 x 8 pixels",
        True,
    ),
    "palette": (encoded(picture(), "GIF"), "found palette of 8 x 8 pixels", True),
    "cmyk": (encoded(picture(), "JPEG", "CMYK"), "found CMYK of 8 x 8 pixels", True),
    "two colors": (
        encoded(picture(channels=1), mode="1"),
        "found black and white of 8 x 8 pixels",
        True,
    ),
    "deep": (
        encoded(picture(channels=1), "TIFF", "I;16"),
        "found one of mode I;16 of 8 x 8 pixels",
        False,
    ),
    "truncated": (
        encoded(picture(64, 64), "JPEG")[:1500],
        r"found a damaged image \(image file is truncated",
        False,
    ),
    "damaged": (encoded(picture())[:60], r"found a damaged image \(", False),
    "empty": (b"", "found an empty file", False),
    "no image": (
        b"<html>404</html>",
        r"found no image that Pillow can read \(it begins with b'<html>404</h'\)",
        False,
    ),
    "zero-sized": (np.zeros((0, 8, 3), np.uint8), "found an image of 0 x 8 pixels", False),
    "floats": (np.zeros((8, 8, 3), np.float32), r"found an array float32\[8, 8, 3\]", False),
    "channels": (np.zeros((8, 8, 5), np.uint8), r"found an array uint8\[8, 8, 5\]", False),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_named(kind):
    data, message, convertible = BAD[kind]
    examples = with_bad(data)
    whole = (
        rf"data: animals, split train, image 1: .*{message}.*leave such images out with "
        r"--config\.data\.skip_bad=True"
    )
    with pytest.raises(InputError, match=whole) as caught:
        examples[1]
    assert (
        "convert such images with --config.data.to_rgb=True" in str(caught.value)
    ) == convertible
    examples[0]
    for prefetch in (0, 4):  # through Grain's thread too
        with pytest.raises(InputError, match=whole):
            take(examples, 2, prefetch=prefetch)
    with pytest.raises(InputError, match=whole):
        list(pipeline.eval_batches(examples, 2))
    converted = with_bad(data, to_rgb=True)
    if convertible:
        assert converted[1]["inputs"].shape == (8, 8, 3) and not converted.bad
    else:
        with pytest.raises(InputError, match=message):
            converted[1]


def test_conversion_to_rgb():
    gray = picture(channels=1)
    inputs = with_bad(encoded(gray), to_rgb=True)[1]["inputs"]
    np.testing.assert_array_equal(
        inputs, np.repeat(gray, 3, -1).astype(np.float32) / np.float32(255)
    )
    clear = picture(channels=4)
    inputs = with_bad(encoded(clear), to_rgb=True)[1]["inputs"]
    np.testing.assert_array_equal(inputs, clear[..., :3].astype(np.float32) / np.float32(255))
    file = io.BytesIO()
    Image.fromarray(picture()).quantize(16).save(file, "PNG", transparency=bytes(range(16)))
    assert with_bad(file.getvalue(), to_rgb=True)[1]["inputs"].shape == (
        8,
        8,
        3,
    )  # without Pillow's warning


def test_color_where_grey_is_expected():
    with pytest.raises(
        InputError,
        match="expected an image of mode L, found RGB of 8 x 8 pixels; leave such images out",
    ):
        with_bad(encoded(picture()), channels=1)[1]


@pytest.mark.parametrize(
    ("target", "note"),
    [(10, ""), (-1, r" \(a hidden label: a test split without classes\?\)"), (-7, "")],
)
def test_classes_out_of_range(target, note):
    with pytest.raises(
        InputError,
        match=rf"image 2: expected a class from 0 to 9, found {target}{note}; leave such",
    ):
        with_bad(encoded(picture()), 2, target)[2]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_differing_sizes(skip_bad):
    examples = with_bad(encoded(picture(9, 8)), skip_bad=skip_bad)
    with pytest.raises(
        InputError,
        match=r"image 1: expected 8 x 8 pixels like the first images, found 9 x 8; .* "
        r"--config\.data\.image_size=SIZE",
    ):
        take(examples, 2)
    assert with_bad(encoded(picture(9, 8)), image_size=6)[1]["inputs"].shape == (6, 6, 3)
    with pytest.raises(
        InputError, match="expected 8 x 8 pixels like the training images, found 9 x 9"
    ):
        ImageExamples(Stored([(encoded(picture(9, 9)), 0)]), DataConfig(), (8, 8, 3))[0]


def test_skipped_in_training(caplog):
    examples = with_bad(b"", 0, count=6, skip_bad=True, augment=ALL)
    assert examples.bad == {
        0: "expected an image of mode RGB, found an empty file"
    } and examples.shape == (8, 8, 3)
    batches = take(examples, 6, batch_size=6)
    for batch in batches:  # the next one stands in
        np.testing.assert_array_equal(np.bincount(batch["targets"]), [0, 2, 1, 1, 1, 1])
    same(take(with_bad(b"", 0, count=6, skip_bad=True, augment=ALL), 6, batch_size=6), batches)
    last = with_bad(b"", 5, count=6, skip_bad=True)
    assert set(take(last, 1, batch_size=6)[0]["targets"]) == {0, 1, 2, 3, 4} and list(last.bad) == [
        5
    ]
    assert (
        caplog.text.count("image 0 is left out: expected an image of mode RGB, found an empty file")
        == 2
    )  # once for each reader
    with pytest.raises(InputError, match=r"image 0: .*found an empty file; it is left out"):
        examples[0]


def test_skipped_in_evaluation():
    examples = with_bad(b"<html>", 2, count=7, skip_bad=True)
    batches = list(pipeline.eval_batches(examples, 4))
    np.testing.assert_array_equal(
        np.concatenate([b["weights"] for b in batches]), [1, 1, 0, 1, 1, 1, 1, 0]
    )
    np.testing.assert_array_equal(
        np.concatenate([b["targets"] for b in batches])[[0, 1, 3, 4, 5, 6]], [0, 1, 3, 4, 5, 6]
    )
    assert all(b["inputs"].shape == (4, 8, 8, 3) for b in batches)
    same(
        list(pipeline.eval_batches(with_bad(b"<html>", 2, count=7, skip_bad=True, threads=2), 4)),
        batches,
    )
    data = pipeline.Dataset(examples, examples, 10, "", image_shape=examples.shape)
    assert data.fit_batch().shape == (6, 8, 8, 3)


def test_nothing_but_bad_images(caplog):
    with pytest.raises(
        InputError,
        match=r"none of the 9 images can be used; the first: animals, split train, image 0: .*an "
        r"empty file",
    ):
        ImageExamples(Stored([(b"", 0)] * 9), DataConfig(skip_bad=True))
    assert (
        caplog.text.count("is left out") == 5 and caplog.text.count("No more warnings follow") == 1
    )
    first_ones_bad = ImageExamples(
        Stored([(b"", 0)] * 4 + [(encoded(picture()), 7)]), DataConfig(skip_bad=True)
    )
    data = pipeline.Dataset(first_ones_bad, first_ones_bad, 10, "", image_shape=(8, 8, 3))
    assert first_ones_bad.first["targets"] == 7 and data.fit_batch().shape == (1, 8, 8, 3)


def test_bad_images_are_counted_once_by_many_threads(caplog):
    items = [(b"" if i % 3 else encoded(picture(seed=i)), i % 10) for i in range(60)]
    examples = ImageExamples(Stored(items), DataConfig(skip_bad=True, cache_megabytes=0))
    workers = [
        threading.Thread(target=lambda: [examples.get(i) for i in range(60)]) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (
        sorted(examples.bad) == [i for i in range(60) if i % 3]
        and caplog.text.count("is left out") == 5
    )


def test_an_empty_split():
    with pytest.raises(InputError, match=r"expected at least one image, found none"):
        ImageExamples(Stored([]), DataConfig())


def test_a_test_split_without_classes_is_no_trouble_until_it_is_read():
    good, hidden = Stored([(encoded(picture()), 0)]), Stored([(encoded(picture()), -1)])
    splits = image_sources.image_splits(good, good, hidden, (), DataConfig())
    with pytest.raises(InputError, match="a hidden label"):
        splits.test[0]
    with pytest.raises(InputError, match="a hidden label"):
        image_sources.image_splits(good, hidden, None, (), DataConfig())


# Configs that make no sense.

CONFIGS = [
    ("limit_bytes", -1, r"data\.limit_bytes: expected a whole number of 0 or more, found -1"),
    ("image_size", -32, r"data\.image_size: expected a whole number of 0 or more, found -32"),
    ("image_size", 32.5, r"data\.image_size: .*, found 32\.5"),
    ("crop_fraction", 0, r"data\.crop_fraction: expected a number above 0 and up to 1, found 0"),
    (
        "crop_fraction",
        0.9,
        r"data\.crop_fraction: expected 1 without data\.image_size, found 0\.9; add "
        r"--config\.data\.image_size=SIZE",
    ),
    (
        "normalize",
        "cifar",
        r"data\.normalize: expected one of .*, found 'cifar'\. Did you mean 'cifar10'\?",
    ),
    ("to_rgb", "yes", r"data\.to_rgb: expected True or False, found 'yes'"),
    ("skip_bad", None, r"data\.skip_bad: expected True or False, found None"),
    ("threads", 0, r"data\.threads: expected a whole number of 1 or more, found 0"),
    (
        "cache_megabytes",
        -1,
        r"data\.cache_megabytes: expected a whole number of 0 or more, found -1",
    ),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), CONFIGS, ids=[f"{name}={value}" for name, value, _ in CONFIGS]
)
def test_bad_config_values(name, value, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**{name: value})


def test_randaugment_of_four_channels():
    with pytest.raises(
        InputError,
        match=r"data\.augment\.randaugment_layers: for images of 1 or 3 channels, found 4",
    ):
        ImageExamples(Stored([(picture(channels=4), 0)], 4), DataConfig(augment=ALL))
