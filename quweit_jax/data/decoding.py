"""Image files and arrays as pixels: decoded, turned upright, converted.

Dimensions: H height, W width, C channels.
"""

from __future__ import annotations

import io

import numpy as np

from quweit_jax.data import augment
from quweit_jax.errors import needed

with needed("for images"):
    from PIL import Image, UnidentifiedImageError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MODE_NAMES = {
    "1": "black and white",
    "L": "gray",
    "LA": "gray with transparency",
    "P": "palette",
    "RGB": "RGB",
    "RGBA": "RGB with transparency",
    "CMYK": "CMYK",
}
_CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_ORIENTATION = 0x0112  # the tag of EXIF; its values, and what undoes them
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusableError(Exception):
    """What was found instead of an image of the expected mode; `convertible`: to_rgb helps."""

    def __init__(self, found: str, convertible: bool = False):
        super().__init__(found)
        self.convertible = convertible


def decode(data: bytes | np.ndarray, mode: str, to_rgb: bool, exif: bool = True) -> np.ndarray:
    """An image file's content (or pixels) as uint8 (H, W, C) of Pillow's `mode`; `exif` turns it
    the way its EXIF orientation says.
    """
    if isinstance(data, np.ndarray):
        image = _from_array(data)
    elif not data:
        raise UnusableError("an empty file")
    else:
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except UnidentifiedImageError:
            raise UnusableError(
                f"no image that Pillow can read (it begins with {data[:12]!r})"
            ) from None
        except Exception as error:  # Pillow's decoders raise many kinds
            raise UnusableError(f"a damaged image ({str(error).strip()})") from None
        image = _upright(image) if exif else image
    if not image.width or not image.height:
        raise UnusableError(f"an image of {image.height} x {image.width} pixels")
    if image.mode != mode:
        convertible = image.mode in _CONVERTIBLE and mode == "RGB"
        if not (to_rgb and convertible):
            raise UnusableError(
                f"{_MODE_NAMES.get(image.mode, f'one of mode {image.mode}')} of {image.height} x "
                f"{image.width} pixels",
                convertible,
            )
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the way that Pillow asks for
        image = image.convert(mode)
    return augment.to_pixels(image)


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says it should be seen; as stored where nothing says so."""
    try:
        turned = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF data that is damaged leaves the pixels as good as they are
        return image
    return image if turned is None else image.transpose(turned)


def _from_array(data: np.ndarray) -> Image.Image:
    if (
        data.dtype != np.uint8
        or data.ndim not in (2, 3)
        or (data.ndim == 3 and data.shape[2] not in (1, 3, 4))
    ):
        raise UnusableError(f"an array {data.dtype}{list(data.shape)}")
    if not data.size:
        raise UnusableError(f"an image of {data.shape[0]} x {data.shape[1]} pixels")
    return augment.from_pixels(data if data.ndim == 3 else data[..., None])
