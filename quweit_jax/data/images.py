"""Labelled images as float32 examples: checking, the evaluation's view and the varied views to
train on.

Dimensions: H height, W width, C channels.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from quweit_jax.data import augment
from quweit_jax.data.augment import AugmentConfig, check_flag, check_number
from quweit_jax.data.decoding import MODES, UnusableError, decode
from quweit_jax.errors import InputError, check_choice, needed
from quweit_jax.reading import why

with needed("for images"):
    from PIL import Image

# (mean, standard deviation) of the channels of pixels in [0, 1]; inputs are (pixel - mean) /
# deviation.
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
# Warnings of images left out: enough to see what is wrong, not one for every image of a large set.
_WARNINGS = 5

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How stored images become inputs.

    image_size: height and width, 0 for as stored. crop_fraction: in evaluation the shorter side is
    resized to image_size / crop_fraction (bicubic) before the middle is cut out. normalize: 'none'
    (values in [0, 1]), 'half' ([-1, 1]), or by the mean and standard deviation of 'imagenet' or
    'cifar10'. to_rgb: convert gray, palette, CMYK and transparent images to RGB (transparency is
    dropped).
    exif: turn photographs the way their EXIF orientation says, as every viewer shows them.
    skip_bad: leave images out that cannot be used, instead of stopping. threads: that read training
      batches; the batches do not depend on it.
    cache_megabytes: of decoded images kept in memory, per split; what does not fit is decoded each
    time.
    """

    image_size: int = 0
    crop_fraction: float = 1.0
    normalize: str = "none"
    to_rgb: bool = False
    exif: bool = True
    skip_bad: bool = False
    threads: int = 1
    cache_megabytes: int = 256
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        check_number("data.image_size", self.image_size, 0, whole=True)
        check_number("data.crop_fraction", self.crop_fraction, 0, 1, above=True)
        if self.crop_fraction < 1 and not self.image_size:
            raise InputError(
                "data.crop_fraction: expected 1 without data.image_size, found "
                f"{self.crop_fraction}; add --config.data.image_size=SIZE."
            )
        check_choice("data.normalize", self.normalize, NORMALIZATIONS)
        check_flag("data.to_rgb", self.to_rgb)
        check_flag("data.exif", self.exif)
        check_flag("data.skip_bad", self.skip_bad)
        check_number("data.threads", self.threads, 1, whole=True)
        check_number("data.cache_megabytes", self.cache_megabytes, 0, whole=True)


class ImageSource(Protocol):
    """Stored images with their classes, by index."""

    channels: int
    num_classes: int

    def __len__(self) -> int:
        """How many."""
        ...

    def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """An image file's content, or uint8 pixels (H, W), (H, W, C); and its class. Raises OSError
        when it cannot be read.
        """
        ...

    def describe(self, index: int) -> str:
        """Data set, split and index (and file) of an image, for messages."""
        ...

    def identity(self) -> str:
        """A text that differs for other images, as far as that can be told without reading them."""
        ...


class BadImageError(InputError):
    """An image that cannot be used; `reason` says what was expected and found."""

    def __init__(self, place: str, reason: str, advice: str):
        super().__init__(f"data: {place}: {reason}; {advice}.")
        self.reason = reason


def evaluation_view(pixels: np.ndarray, image_size: int, crop_fraction: float = 1.0) -> np.ndarray:
    """Pixels (H, W, C) with the shorter side resized to image_size / crop_fraction, and of that the
    middle: (image_size, image_size, C).
    """
    height, width = pixels.shape[:2]
    short = int(image_size / crop_fraction)
    size = (
        (short, int(short * width / height))
        if height <= width
        else (int(short * height / width), short)
    )
    if size != (height, width):
        pixels = augment.to_pixels(
            augment.from_pixels(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        )
    top, left = (round((side - image_size) / 2) for side in size)
    return pixels[top : top + image_size, left : left + image_size]


class ImageExamples(Sequence):
    """Examples {'inputs': float32 (H, W, C), 'targets': int32} of a source, decoded when asked for.

    `examples[i]` is the evaluation's view; `augmented(i, rng)` one to train on. All have the same
    `shape`: the configured size or, without one, `shape` (the training split's) or the first usable
    image's. `bad` tells of each image found unusable why.

    Raises:
      InputError: an image cannot be used (unless config.skip_bad); images differ in size and no
        image_size is configured.
    """

    def __init__(
        self, source: ImageSource, config: ImageConfig, shape: tuple[int, int, int] | None = None
    ):
        self.source, self.config = source, config
        self.bad: dict[int, str] = {}
        self._lock = threading.Lock()
        self._kept: dict[int, tuple[np.ndarray, np.int32]] = {}
        self._room = config.cache_megabytes << 20
        channels = 3 if config.to_rgb else source.channels
        self._mode = MODES[channels]
        mean, deviation = NORMALIZATIONS[config.normalize]
        if len(mean) not in (1, channels):
            raise InputError(
                f"data.normalize: '{config.normalize}' is for RGB images, found {channels} "
                f"channel{'s' * (channels > 1)}; "
                "use none or half, or convert with --config.data.to_rgb=True."
            )
        if channels == 4 and config.augment.randaugment_layers:
            raise InputError(
                "data.augment.randaugment_layers: for images of 1 or 3 channels, found 4; convert "
                "with --config.data.to_rgb=True."
            )
        size = config.image_size
        self._given = shape is not None
        self.shape: tuple[int, int, int] | None = (size, size, channels) if size else shape
        if not len(source):
            raise InputError(
                f"data: {source.describe(0)}: expected at least one image, found none; use another "
                "split."
            )
        if self.shape is None:
            self.shape = self._usable(0)[0].shape  # type: ignore[assignment]
        # One row of means and deviations, so that normalizing runs along whole rows; in 0..255, so
        # that 'none' is exactly pixel / 255.
        row = self.shape[1] * channels  # type: ignore[index]
        self._mean, self._deviation = (
            np.resize(np.float32(255) * np.asarray(v, np.float32), row) for v in (mean, deviation)
        )
        gray = (0.5,) if config.normalize == "none" else mean
        fill = tuple(round(255 * v) for v in np.resize(gray, channels))
        self._fill = fill if channels > 1 else fill[0]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):  # type: ignore[override]
        pixels, target = self._stored(range(len(self))[index])
        return {"inputs": self._normalized(self._view(pixels)), "targets": target}

    @functools.cached_property
    def first(self) -> Example:
        """The evaluation's view of the first usable image."""
        pixels, target = self._usable(0)
        return {"inputs": self._normalized(self._view(pixels)), "targets": target}

    def get(self, index: int) -> Example | None:
        """`examples[index]`, or None for an image that is left out (skip_bad)."""
        try:
            return self[index]
        except BadImageError:
            if not self.config.skip_bad:
                raise
            return None

    def blank(self) -> Example:
        """What stands, with weight 0, where an image is left out."""
        return {"inputs": np.zeros(self.shape or (), np.float32), "targets": np.int32(0)}

    def augmented(self, index: int, rng: np.random.Generator) -> Example:
        """A view to train on, drawn from `rng`; the next usable image's where this one is left out
        (skip_bad).
        """
        how = self.config.augment
        pixels, target = self._usable(index)
        if how.crop == "resized":
            pixels = augment.resized_crop(pixels, self.shape[:2], how.crop_scale, rng)  # type: ignore[index]
        else:
            pixels = self._view(pixels)
            if how.crop == "pad":
                pixels = augment.pad_crop(pixels, how.pad, rng)
        if how.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        if how.randaugment_layers:
            pixels = augment.rand_augment(pixels, how, self._fill, rng)
        inputs = self._normalized(pixels)
        if how.erasing and rng.random() < how.erasing:
            augment.erase(inputs, rng)
        return {"inputs": inputs, "targets": target}

    def content(self) -> bytes:
        """What tells this split from another, without reading every image: its identity and a few
        images as they are stored.
        """
        pieces = [os.fsencode(self.source.identity()), repr((len(self), self.shape)).encode()]
        for index in sorted({i * len(self) // 8 for i in range(8)}):
            try:
                data, target = self.source.read(index)
            except OSError:
                continue
            pieces += [
                data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes(),
                str(target).encode(),
            ]
        return b"\n".join(pieces)

    def _view(self, pixels: np.ndarray) -> np.ndarray:
        return (
            evaluation_view(pixels, self.config.image_size, self.config.crop_fraction)
            if self.config.image_size
            else pixels
        )

    def _normalized(self, pixels: np.ndarray) -> np.ndarray:
        height, width, channels = pixels.shape
        inputs = pixels.reshape(height, width * channels).astype(np.float32)
        inputs -= self._mean
        inputs /= self._deviation
        return inputs.reshape(height, width, channels)

    def _usable(self, index: int) -> tuple[np.ndarray, np.int32]:
        """Pixels and class of an image or, with skip_bad, of the next one that can be used."""
        for step in range(len(self)):
            try:
                return self._stored((index + step) % len(self))
            except BadImageError:
                if not self.config.skip_bad:
                    raise
        raise InputError(
            f"data: none of the {len(self)} images can be used; the first: "
            f"{self.source.describe(0)}: {self.bad.get(0, 'missing')}."
        )

    def _stored(self, index: int) -> tuple[np.ndarray, np.int32]:
        """Pixels uint8 (H, W, C) as stored, and class."""
        if (kept := self._kept.get(index)) is not None:
            return kept
        if self.config.skip_bad and index in self.bad:  # known: no need to decode it again
            raise BadImageError(self.source.describe(index), self.bad[index], "it is left out")
        try:
            data, target = self.source.read(index)
            pixels = decode(data, self._mode, self.config.to_rgb, self.config.exif)
        except (UnusableError, OSError) as error:
            found = (
                f"an unreadable file ({why(error)})" if isinstance(error, OSError) else str(error)
            )
            convertible = isinstance(error, UnusableError) and error.convertible
            raise self._refused(
                index, f"expected an image of mode {self._mode}, found {found}", convertible
            ) from None
        if not 0 <= target < self.source.num_classes:
            hidden = " (a hidden label: a test split without classes?)" if target == -1 else ""
            raise self._refused(
                index,
                f"expected a class from 0 to {self.source.num_classes - 1}, found {target}{hidden}",
            )
        if not self.config.image_size and self.shape is not None and pixels.shape != self.shape:
            (height, width), (first_height, first_width) = pixels.shape[:2], self.shape[:2]
            raise InputError(
                f"data: {self.source.describe(index)}: expected {first_height} x {first_width} "
                "pixels like the "
                f"{'training' if self._given else 'first'} images, found {height} x {width}; "
                "images of differing sizes cannot be batched: "
                "give them one with --config.data.image_size=SIZE."
            )
        stored = pixels, np.int32(target)
        with self._lock:
            if pixels.nbytes <= self._room and index not in self._kept:
                self._room -= pixels.nbytes
                self._kept[index] = stored
        return stored

    def _refused(self, index: int, reason: str, convertible: bool = False) -> BadImageError:
        """Notes a bad image, once, and makes the error that tells of it."""
        advice = "leave such images out with --config.data.skip_bad=True"
        if convertible:
            advice = f"convert such images with --config.data.to_rgb=True, or {advice}"
        with self._lock:
            new = index not in self.bad
            self.bad[index] = reason
            number = len(self.bad)
        if new and self.config.skip_bad and number <= _WARNINGS:
            logging.warning(
                "data: %s is left out: %s.%s",
                self.source.describe(index),
                reason,
                " No more warnings follow." * (number == _WARNINGS),
            )
        return BadImageError(self.source.describe(index), reason, advice)
