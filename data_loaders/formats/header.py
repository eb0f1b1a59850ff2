"""What the header of an image says, and the caps that keep decoding it small and quick.

Whatever can make a decoder slow or large is bounded before one is called. A decoder is then handed only those parts of
the file that make up the picture: EXIF, profiles and texts are not, since they can be bombs of their own.
"""

from typing import NamedTuple

FORMATS = ("JPEG", "PNG", "WEBP")
PIXEL_CAP = 64_000_000
"""Of other caps too, for each pixel of this one, or of a higher one; a lower one does not lower them:"""
MEMORY = 8
"""bytes that decoding takes: 4 of a picture, and once more to turn it;"""
RAW = 3
"""bytes of pixels, as a PNG holds them before they are compressed;"""
DATA = 1
"""bytes of data, as a JPEG or a WebP holds them: to decode that many takes as long as a picture of that many pixels."""
PART_CAP = 2**16
"""Parts of a file: each costs some microseconds, however few bytes it has."""
CUT = "is cut short"


class Undecodable(ValueError):
    """Bytes that are not a still JPEG, PNG or WebP image of a sane size."""


class Header(NamedTuple):
    """Of an image that may be decoded."""

    format: str
    """One of FORMATS."""
    width: int
    """In pixels, as stored: before it is turned."""
    height: int
    orientation: int
    """Of EXIF, 1 … 8; 1 where there is none, or one that means nothing."""
    quality: int
    """Of a JPEG, 1 … 100; 0 of other formats."""
    notes: tuple[str, ...]
    """What is not plain about it."""
    mode: str
    """Pillow's name of the pixels (L, RGB, CMYK) where their codec can be called at once, without another reader of the
    header; empty where a reader is needed."""
    kept: tuple[slice, ...]
    """The bytes that the codec, or the reader, needs."""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height once it is turned."""
        return (self.width, self.height) if self.orientation < 5 else (self.height, self.width)

    @property
    def plain(self) -> bool:
        """Whether its pixels are stored upright, as RGB or grey of 8 bits."""
        return not {"CMYK", "16-bit", "palette", "transparent", "turned"}.intersection(self.notes)

    def picture(self, content: bytes) -> bytes:
        """The bytes that are kept, as one."""
        if len(self.kept) == 1 and self.kept[0] == slice(0, len(content)):
            return content
        view = memoryview(content)
        return b"".join(view[part] for part in self.kept)


class Kept:
    """Collects the bytes that are kept, those side by side as one part."""

    def __init__(self, stop: int) -> None:
        self._ends = [0, stop]

    def add(self, start: int, stop: int) -> None:
        if self._ends[-1] == start:
            self._ends[-1] = stop
        else:
            self._ends += [start, stop]

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(*ends) for ends in zip(self._ends[::2], self._ends[1::2], strict=True))


def check_size(width: int, height: int, pixel_cap: int) -> None:
    """Refuses what has no pixels or too many."""
    if not width * height:
        raise Undecodable(f"claims {width} x {height} pixels, which is no picture")
    if width * height > pixel_cap:
        raise Undecodable(f"claims {width} x {height} pixels, more than the cap of {pixel_cap:,}")


def check_bytes(count: float, each: int, pixel_cap: int, what: str) -> None:
    """Refuses more bytes than so many for `each` pixel of the cap."""
    most = each * max(pixel_cap, PIXEL_CAP)
    if count > most:
        raise Undecodable(f"{what} {count / 1e6:,.0f} MB, more than the cap of {most / 1e6:,.0f} MB")
