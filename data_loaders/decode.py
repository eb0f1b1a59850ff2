"""Bytes of an image file -> uint8 RGB; format and pixels are checked in the header before anything is decoded."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from data_loaders.formats.header import CUT, PIXEL_CAP, Header, Undecodable
from data_loaders.formats.png import check_rows
from data_loaders.formats.read import read_header

READER = {"PNG": PngImageFile, "WEBP": WebPImageFile}
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
STRIP = 2**18
"""Pixels that are brought to RGB at once: larger strips take 3 times as long, and more memory."""

Pixels = NDArray[np.uint8]
"""An image, [height, width, 3], RGB."""


def decode(content: bytes, pixel_cap: int = PIXEL_CAP, side: int = 0) -> Pixels:
    """The upright image: EXIF orientation is applied, transparency laid over white, 16 bits and CMYK brought to RGB.

    With a `side`, the content is no file but pixels [side, side, 3], which are given back. Raises Undecodable.
    """
    if side:
        return np.frombuffer(content, np.uint8).reshape(side, side, 3)
    header = read_header(content, pixel_cap)
    with pillow():
        return pixels_of(upright(load(content, header), header))


@contextmanager
def pillow() -> Iterator[None]:
    """All that Pillow raises within is Undecodable."""
    try:
        yield
    except Undecodable:
        raise
    except MemoryError as wrong:
        raise Undecodable("takes more memory to decode than there is") from wrong
    except Exception as wrong:  # its parsers raise nearly anything at hostile bytes: struct.error, TypeError, …
        short = "truncated" in str(wrong) or "not enough" in str(wrong)
        raise Undecodable(CUT if short else "is damaged: its data cannot be decoded") from wrong


def load(content: bytes, header: Header, scale: int = 1, mode: str = "") -> Image.Image:
    """The whole picture, as stored. A JPEG may be had at 1/`scale` (2, 4 or 8) of its size, and as grey `mode` L."""
    picture, size = header.picture(content), (header.width, header.height)
    if header.mode and header.format == "JPEG":
        mode = mode if header.mode == "RGB" and mode else header.mode
        size = -(-header.width // scale), -(-header.height // scale)
        inks = "CMYK;I" if mode == "CMYK" else mode  # stored inverted, as Adobe does
        return Image.frombytes(mode, size, picture, "jpeg", (inks, "", scale, 0))
    if header.mode:
        image = Image.frombytes(header.mode, size, picture, "zip", (header.mode, "progressive" in header.notes))
    else:
        with io.BytesIO(picture) as file, READER[header.format](file) as image:
            if image.size != size:
                raise Undecodable("claims two sizes")
            image.load()
    if header.format == "PNG" and _ends_black(image):
        check_rows(content, header)
    return image


def _ends_black(image: Image.Image) -> bool:
    """Whether either of the last two rows is, as Pillow leaves those that are missing; interlaced, every other is."""
    top = max(0, image.height - 2)
    seen = image.crop((0, top, *image.size)).getbbox()
    return seen is None or (seen[1], seen[3]) != (0, image.height - top)


def upright(image: Image.Image, header: Header) -> Image.Image:
    """Turned as its EXIF says."""
    if header.orientation == 1:
        return image
    turned = image.transpose(UPRIGHT[header.orientation])
    image.close()  # which gives its memory back
    return turned


def as_rgb(image: Image.Image) -> Image.Image:
    """Transparency laid over white, and 16 bits and CMYK brought to RGB."""
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion would clip, not scale
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def pixels_of(image: Image.Image) -> Pixels:
    """In RGB."""
    width, height = image.size
    if width * height <= STRIP:
        return np.asarray(as_rgb(image))
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        pixels[top : top + rows] = np.asarray(as_rgb(image.crop((0, top, width, min(top + rows, height)))))
    return pixels
