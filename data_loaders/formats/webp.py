"""The header of a WebP (RFC 9649), and the walk over its chunks."""

from collections.abc import Iterator
from struct import unpack_from

from data_loaders.formats.exif import orientation
from data_loaders.formats.header import CUT, DATA, MEMORY, PART_CAP, Header, Undecodable, check_bytes, check_size
from data_loaders.formats.png import ANIMATED

LOSSY, LOSSLESS, EXTENDED = b"VP8 ", b"VP8L", b"VP8X"
TAKES = {LOSSY: 16, LOSSLESS: 20}
"""Bytes that decoding takes for each pixel: libwebp's canvas and the one before it, the frame, and Pillow's copy."""


def read(content: bytes, pixel_cap: int) -> Header:
    """Raises Undecodable, or struct.error where it ends within a number."""
    sizes, kinds, alpha, turn, frames = set[tuple[int, int]](), list[bytes](), False, 1, 0
    stop = 8 + unpack_from("<I", content, 4)[0]
    for name, start, end in _chunks(content, stop):
        if name in FRAME and not kinds:
            width, height, transparent = FRAME[name](content, start)
            sizes.add((width, height))
            alpha |= transparent
        if name in TAKES:
            kinds.append(name)
        elif name == b"ANMF":
            frames += 1
            kinds.append(LOSSLESS)
        elif name == b"EXIF":
            turn = orientation(content[start:end].removeprefix(b"Exif\0\0"))
    if frames > 1:
        raise Undecodable(ANIMATED)
    if not kinds:
        raise Undecodable("has no picture")
    if len(sizes) != 1:
        raise Undecodable("claims two sizes" if sizes else "does not say its size")
    ((width, height),) = sizes
    check_size(width, height, pixel_cap)
    check_bytes(width * height * TAKES[kinds[0]], MEMORY, pixel_cap, "is a WebP and takes to decode")
    check_bytes(stop, DATA, pixel_cap, "has")
    notes = ("transparent",) * alpha + ("turned",) * (turn != 1)
    return Header("WEBP", width, height, turn, 0, notes, "", (slice(0, stop),))


def _chunks(content: bytes, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and stop of what it holds, for each chunk."""
    if stop > len(content):
        raise Undecodable(CUT)
    at = 12
    for _ in range(PART_CAP):
        if at + 8 > stop:
            return
        name, length = unpack_from("<4sI", content, at)
        start, at = at + 8, at + 8 + length + length % 2
        if start + length > stop:
            raise Undecodable(CUT)
        yield name, start, start + length
    raise Undecodable(f"has more than {PART_CAP:,} parts")


def _extended(content: bytes, start: int) -> tuple[int, int, bool]:
    """Width and height of the canvas, and whether there is an alpha channel."""
    flags, width, height = unpack_from("<B3x3s3s", content, start)
    return 1 + int.from_bytes(width, "little"), 1 + int.from_bytes(height, "little"), bool(flags & 0x10)


def _lossy(content: bytes, start: int) -> tuple[int, int, bool]:
    """As above, of a frame (RFC 6386, 9.1)."""
    magic, width, height = unpack_from("<3x3sHH", content, start)
    if magic != b"\x9d\x01\x2a":
        raise Undecodable("is damaged: its frame does not begin as one does")
    return width & 0x3FFF, height & 0x3FFF, False


def _lossless(content: bytes, start: int) -> tuple[int, int, bool]:
    magic, bits = unpack_from("<BI", content, start)
    if magic != 0x2F:
        raise Undecodable("is damaged: its frame does not begin as one does")
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bool(bits >> 28 & 1)


FRAME = {EXTENDED: _extended, LOSSY: _lossy, LOSSLESS: _lossless}
"""What the first of them says of width, height and transparency; an extended file says it twice."""
