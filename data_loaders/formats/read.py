"""The header of an image file of any format that is read."""

import struct

from data_loaders.formats import jpeg, png, webp
from data_loaders.formats.header import CUT, FORMATS, PIXEL_CAP, Header, Undecodable


def read_header(content: bytes, pixel_cap: int = PIXEL_CAP, whole: bool = True) -> Header:
    """Walks over the parts of the file, to its end; `whole` also compares the checksum of a PNG's pixels.

    Raises Undecodable.
    """
    try:
        if content.startswith(jpeg.MAGIC):
            return jpeg.read(content, pixel_cap)
        if content.startswith(png.MAGIC):
            return png.read(content, pixel_cap, whole)
        if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            return webp.read(content, pixel_cap)
    except (IndexError, struct.error):  # it ends within a number
        raise Undecodable(CUT) from None
    raise Undecodable(f"is not a {', '.join(FORMATS)} image" if content else "is empty: it has 0 bytes")
