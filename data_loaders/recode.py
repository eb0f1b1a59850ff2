"""Images made smaller before they are stored: a model sees few pixels, and decoding them all costs most of a step."""

import io
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field, PositiveInt

from data_loaders.decode import Pixels, load, pillow, pixels_of, upright
from data_loaders.formats.header import PIXEL_CAP
from data_loaders.formats.read import read_header
from data_loaders.settings import Settings

OVERSAMPLED = 2
"""A JPEG is decoded at a fraction of its size if that is still so many times the size wanted."""
OPTIONS = {"jpeg": {}, "webp": {"method": 4}, "png": {"compress_level": 6}}
"""Of the encoders, beside the quality: named, so that bytes do not change with Pillow's defaults."""


def png(pixels: Pixels) -> bytes:
    """A file of exactly these pixels; one version of Pillow always writes the same bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", **OPTIONS["png"])
    return file.getvalue()


class Resize(Settings):
    """Images are stored upright, as RGB and no larger than this."""

    longest: PositiveInt
    """Longest side in pixels; a smaller image keeps its size."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Of JPEG and lossy WebP; a PNG has none."""
    format: Literal["jpeg", "webp", "png"] = "jpeg"
    """What is written."""

    def __call__(self, content: bytes, pixel_cap: int = PIXEL_CAP) -> bytes:
        """The file of the image made smaller, without tags; one version of Pillow always writes the same bytes.

        One that is small enough, upright, RGB or grey of 8 bits and of this format stays as it is, byte for byte: it is
        not encoded again, and not decoded. Raises Undecodable.
        """
        header = read_header(content, pixel_cap)
        longest = max(header.width, header.height)
        if longest <= self.longest and header.format == self.format.upper() and header.plain:
            return content
        scale = next((s for s in (8, 4, 2) if longest >= s * OVERSAMPLED * self.longest), 1)
        with pillow():
            image = Image.fromarray(pixels_of(upright(load(content, header, scale), header)))
            if longest > self.longest:
                width, height = (max(1, round(side * self.longest / longest)) for side in header.upright)
                image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
            file = io.BytesIO()
            image.save(file, self.format, quality=self.quality, **OPTIONS[self.format])
        return file.getvalue()
