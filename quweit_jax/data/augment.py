"""Random changes of training images: crops, flips, RandAugment and erasing; each a function of an
image and a NumPy generator.

Pillow does the pixel work. torchvision would bring PyTorch, Keras's layers TensorFlow;
albumentations' successor is under the AGPL, imgaug and dm-pix are no longer kept up. Images are
uint8 arrays (H, W, C) until they are normalized.

RandAugment: Cubuk et al. 2020, with the operations and strengths of timm's 'rand-mM-inc1', which
  DeiT trains with. Random erasing:
Zhong et al. 2020. Random resized crop: Szegedy et al. 2015.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from quweit_jax.errors import InputError, check_choice, needed

with needed("for images"):
    from PIL import Image, ImageEnhance, ImageOps

CROPS = ("none", "pad", "resized")
Fill = int | tuple[int, ...]

_ASPECT = (3 / 4, 4 / 3)  # width to height of a resized crop
_ATTEMPTS = 10  # at a random rectangle that fits the image
_ERASED_SHARE = (0.02, 1 / 3)  # of the image's area
_ERASED_ASPECT = (0.3, 1 / 0.3)
_APPLIED = 0.5  # how often RandAugment applies an operation that it has drawn
_MAX_MAGNITUDE = 10


def check_number(
    what: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    whole: bool = False,
    above: bool = False,
) -> None:
    """Raises InputError unless `value` is a (whole) number from `low` (with `above`: more than
    `low`) to `high`.
    """
    right_kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if right_kind and (low < value if above else low <= value) and value <= high:  # type: ignore[operator]
        return
    kind = "a whole number" if whole else "a number"
    if high == math.inf:
        span = f"above {low}" if above else f"of {low} or more"
    else:
        span = f"above {low} and up to {high}" if above else f"from {low} to {high}"
    raise InputError(f"{what}: expected {kind} {span}, found {value!r}.")


def check_flag(what: str, value: object) -> None:
    """Raises InputError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{what}: expected True or False, found {value!r}.")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied.

    crop: 'none' (the evaluation's view), 'pad' (the evaluation's view with `pad` black pixels
    around it, cut out at random) or 'resized' (a random part of the image, `crop_scale` to 1 of its
    area and 3/4 to 4/3 wide to high, resized). flip: left to right, every second time.
    randaugment_layers: operations drawn for each image, 0 for none; randaugment_magnitude: 0 to 10;
      randaugment_std: the magnitude's
    standard deviation from one operation to the next. erasing: how often a rectangle of the
      normalized image becomes standard normal noise.

    The train step mixes whole batches: mixup and cutmix are the parameters of their Beta
    distributions, 0 for off; mix_probability: how often a batch is mixed; mix_switch: how often by
    cutmix when both are on; label_smoothing: the share spread over all classes.
    """

    crop: str = "none"
    pad: int = 4
    crop_scale: float = 0.08
    flip: bool = False
    randaugment_layers: int = 0
    randaugment_magnitude: int = 9
    randaugment_std: float = 0.5
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    mix_switch: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_choice("data.augment.crop", self.crop, CROPS)
        check_number("data.augment.pad", self.pad, 0, whole=True)
        check_number("data.augment.crop_scale", self.crop_scale, 0, 1, above=True)
        check_flag("data.augment.flip", self.flip)
        check_number("data.augment.randaugment_layers", self.randaugment_layers, 0, whole=True)
        check_number(
            "data.augment.randaugment_magnitude",
            self.randaugment_magnitude,
            0,
            _MAX_MAGNITUDE,
            whole=True,
        )
        check_number("data.augment.mixup", self.mixup, 0)
        check_number("data.augment.cutmix", self.cutmix, 0)
        check_number("data.augment.randaugment_std", self.randaugment_std, 0)
        for name in ("erasing", "mix_probability", "mix_switch", "label_smoothing"):
            check_number(f"data.augment.{name}", getattr(self, name), 0, 1)


def from_pixels(pixels: np.ndarray) -> Image.Image:
    """Makes a Pillow image of uint8 (H, W, C)."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def to_pixels(image: Image.Image) -> np.ndarray:
    """Makes uint8 (H, W, C) of a Pillow image of 8-bit channels."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def pad_crop(pixels: np.ndarray, pad: int, rng: np.random.Generator) -> np.ndarray:
    """Moves `pixels` (H, W, C) by up to `pad` pixels each way at random; what comes in from outside
    is black.
    """
    if not pad:
        return pixels
    height, width, channels = pixels.shape
    top, left = (int(draw * (2 * pad + 1)) for draw in rng.random(2))
    canvas = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
    canvas[pad : pad + height, pad : pad + width] = pixels
    return canvas[top : top + height, left : left + width]


def _rectangle(
    height: int,
    width: int,
    share: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of a random part of an area: its share uniform, its aspect uniform
    in the logarithm; None if none fitted.
    """
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*share)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
    return None


def resized_crop(
    pixels: np.ndarray, size: tuple[int, int], crop_scale: float, rng: np.random.Generator
) -> np.ndarray:
    """A random part of `pixels`, resized (bicubic) to `size` (height, width); of very long images
    that no part fitted, the middle.
    """
    height, width = pixels.shape[:2]
    part = _rectangle(height, width, (crop_scale, 1.0), _ASPECT, rng)
    if part is None:
        h, w = min(height, round(width / _ASPECT[0])), min(width, round(height * _ASPECT[1]))
        part = ((height - h) // 2, (width - w) // 2, h, w)
    top, left, h, w = part
    # Cut out first: Pillow's resize with a box also looks at pixels just outside it.
    image = from_pixels(pixels[top : top + h, left : left + w])
    return to_pixels(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def erase(inputs: np.ndarray, rng: np.random.Generator) -> None:
    """Writes normal noise over a random rectangle of `inputs` (H, W, C) float32, in place."""
    part = _rectangle(inputs.shape[0], inputs.shape[1], _ERASED_SHARE, _ERASED_ASPECT, rng)
    if part is not None:
        top, left, h, w = part
        inputs[top : top + h, left : left + w] = rng.standard_normal(
            (h, w, inputs.shape[2]), np.float32
        )


def _warp(
    image: Image.Image,
    fill: Fill,
    *,
    x: tuple[float, float, float] = (1, 0, 0),
    y: tuple[float, float, float] = (0, 1, 0),
) -> Image.Image:
    """Each pixel taken from (x0 column + x1 row + x2, y0 column + y1 row + y2); `fill` from
    outside.
    """
    return image.transform(
        image.size, Image.Transform.AFFINE, (*x, *y), Image.Resampling.BICUBIC, fillcolor=fill
    )


def _enhanced(
    enhancer: Callable[[Image.Image], ImageEnhance._Enhance],
) -> Callable[[Image.Image, float, Fill], Image.Image]:
    """An operation that takes away (0.1 of it is left at -1) or adds (1.9 of it at 1) what Pillow's
    enhancer controls.
    """
    return lambda image, strength, fill: enhancer(image).enhance(1 + 0.9 * strength)


def _posterize(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    # One bit always stays: an image all black has nothing to learn from.
    return ImageOps.posterize(image, max(1, 4 - int(4 * abs(strength))))


def _solarize_add(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    add = int(110 * abs(strength))
    return image.point([v + add if v < 128 else v for v in range(256)] * len(image.getbands()))


# RandAugment's operations: (image, strength, fill) -> image of the same size and mode. The strength
# is the magnitude divided by 10, with a random sign; operations that know no direction look at its
# absolute value only, the first three not at all.
OPERATIONS: dict[str, Callable[[Image.Image, float, Fill], Image.Image]] = {
    "auto_contrast": lambda image, strength, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, fill: ImageOps.equalize(image),
    "invert": lambda image, strength, fill: ImageOps.invert(image),
    "rotate": lambda image, strength, fill: image.rotate(
        30 * strength, Image.Resampling.BICUBIC, fillcolor=fill
    ),
    "posterize": _posterize,
    "solarize": lambda image, strength, fill: ImageOps.solarize(
        image, 256 - int(256 * abs(strength))
    ),
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, fill: _warp(image, fill, x=(1, 0.3 * strength, 0)),
    "shear_y": lambda image, strength, fill: _warp(image, fill, y=(0.3 * strength, 1, 0)),
    "translate_x": lambda image, strength, fill: _warp(
        image, fill, x=(1, 0, 0.45 * strength * image.width)
    ),
    "translate_y": lambda image, strength, fill: _warp(
        image, fill, y=(0, 1, 0.45 * strength * image.height)
    ),
}
_NAMES = tuple(OPERATIONS)


def rand_augment(
    pixels: np.ndarray, config: AugmentConfig, fill: Fill, rng: np.random.Generator
) -> np.ndarray:
    """Varies `pixels` (H, W, 1 or 3) by `randaugment_layers` operations drawn with replacement,
    each applied every second time.
    """
    image = None  # Pillow's view is made when the first operation is applied
    for _ in range(config.randaugment_layers):
        which, applied, sign = rng.random(3)
        magnitude = rng.normal(config.randaugment_magnitude, config.randaugment_std)
        if applied >= _APPLIED:
            continue
        strength = (
            min(max(magnitude, 0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE * (1 if sign < 0.5 else -1)
        )
        image = OPERATIONS[_NAMES[int(which * len(_NAMES))]](
            from_pixels(pixels) if image is None else image, strength, fill
        )
    return pixels if image is None else to_pixels(image)
