"""What is learnt of an image before it is stored: that it can be decoded, what is not plain about it, and its look."""

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from data_loaders.decode import Pixels, as_rgb, load, pillow, upright
from data_loaders.formats.header import PIXEL_CAP, Header
from data_loaders.formats.read import read_header
from data_loaders.look import SIDE, look_of, small

Check = Literal["decode", "header"]
LARGE = 1024
"""Longest side of an image, in pixels, up to which all of its pixels are looked at if they cannot be averaged."""


class Seen(NamedTuple):
    """Of an image that may be stored."""

    format: str
    """JPEG, PNG or WEBP."""
    width: int
    """In pixels, upright."""
    height: int
    quality: int
    """Of a JPEG, 1 … 100, estimated by its quantisation; 0 where there is none."""
    notes: tuple[str, ...]
    """What is not plain: of CMYK, 16-bit, palette, transparent, grey, turned, progressive, multi-picture."""
    look: int
    """See data_loaders/look.py; 0 is unknown: not looked at, or flat."""


def examine(content: bytes, pixel_cap: int = PIXEL_CAP, check: Check = "decode") -> Seen:
    """Raises Undecodable.

    `decode` reads the whole picture, but for a JPEG at a fraction of its size: all its data is read and the broken is
    found, at less than half the cost. `header` reads the header and walks to the end of the file.
    """
    header = read_header(content, pixel_cap, whole=check == "decode")
    seen = look_of(small_grey(content, header)) if check == "decode" else 0
    return Seen(header.format, *header.upright, header.quality, header.notes, seen)


def small_grey_of(pixels: Pixels) -> np.ndarray:
    """The same of an image that is decoded."""
    return np.asarray(small(Image.fromarray(pixels)).convert("L"))


def small_grey(content: bytes, header: Header) -> np.ndarray:
    """The upright picture as [SIDE, SIDE] uint8; all data of the file is decoded. Raises Undecodable."""
    enough = min(header.width, header.height) // SIDE
    scale = next((s for s in (8, 4, 2) if header.format == "JPEG" and s <= enough), 1)
    with pillow():
        image = load(content, header, scale, "L")
        box = (0, 0, header.width / scale, header.height / scale)  # of which the last pixel may be a part
        if image.mode not in {"L", "RGB", "RGBA", "LA", "CMYK"} or "transparency" in image.info:
            image.thumbnail((LARGE, LARGE), Image.Resampling.NEAREST)
            image, box = as_rgb(image), None
        return np.asarray(upright(as_rgb(small(image, box)), header).convert("L"))
