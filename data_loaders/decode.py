"""Bytes of an image file -> uint8 RGB; format and pixels are checked in the header before anything is decoded."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
PIXEL_CAP = 64_000_000
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it. (ImageOps.exif_transpose writes all tags anew, and fails at an odd one.)"""

Pixels = NDArray[np.uint8]
"""An image, [height, width, 3], RGB."""


class Undecodable(ValueError):
    """Bytes that are not a still JPEG, PNG or WebP image of a sane size."""


def decode(content: bytes, pixel_cap: int = PIXEL_CAP) -> Pixels:
    """The upright image: EXIF orientation is applied, transparency laid over white, 16 bits and CMYK brought to RGB."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check(image, pixel_cap)
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            return np.asarray(_as_rgb(image if turn is None else image.transpose(turn)))
    except Undecodable:
        raise
    except UnidentifiedImageError as wrong:
        raise Undecodable(f"is not a {', '.join(FORMATS)} image") from wrong
    except Exception as wrong:  # Pillow's parsers raise nearly anything at hostile bytes: struct.error, TypeError, …
        raise Undecodable(str(wrong) or type(wrong).__name__) from wrong


def _check(image: Image.Image, pixel_cap: int) -> None:
    if image.width * image.height > pixel_cap:
        raise Undecodable(f"claims {image.width} x {image.height} pixels, more than the cap of {pixel_cap:,}")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a phone's JPEG, with more behind it
        raise Undecodable("is animated")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion would clip, not scale
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
