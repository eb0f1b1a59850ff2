"""Bytes of an image file -> uint8 RGB; format and pixels are checked in the header before anything is decoded."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
PIXEL_CAP = 64_000_000

Pixels = NDArray[np.uint8]
"""An image, [height, width, 3], RGB."""


class Undecodable(ValueError):
    """Bytes that are not a still JPEG, PNG or WebP image of a sane size."""


def decode(content: bytes, pixel_cap: int = PIXEL_CAP) -> Pixels:
    """The upright image: EXIF orientation is applied, transparency laid over white, 16 bits and CMYK brought to RGB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the stricter cap
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check(image, pixel_cap)
                return np.asarray(_as_rgb(ImageOps.exif_transpose(image)))
        except UnidentifiedImageError as wrong:
            raise Undecodable(f"is not a {', '.join(FORMATS)} image") from wrong
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as wrong:
            raise Undecodable(str(wrong)) from wrong


def _check(image: Image.Image, pixel_cap: int) -> None:
    if image.width * image.height > pixel_cap:
        raise Undecodable(f"claims {image.width} x {image.height} pixels, more than the cap of {pixel_cap:,}")
    if getattr(image, "n_frames", 1) > 1:
        raise Undecodable("is animated")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion would clip, not scale
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
