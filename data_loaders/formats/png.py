"""The header of a PNG (third edition), and the walk over its chunks."""

import zlib
from collections.abc import Iterator
from struct import unpack_from

from data_loaders.formats.exif import orientation
from data_loaders.formats.header import CUT, PART_CAP, RAW, Header, Kept, Undecodable, check_bytes, check_size

MAGIC = b"\x89PNG\r\n\x1a\n"
BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Type of colour -> bits that a channel may have (table 11.1)."""
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""Of an interlaced image: first pixel and row, and how many to the next ones (8.2)."""
MODES = {(8, 0): "L", (8, 2): "RGB"}
"""Of bits and type of colour."""
GREY, PALETTE, ALPHA = {0, 4}, 3, {4, 6}
ANIMATED = "is animated: store its first frame as a still image"
PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
"""Chunks that a decoder needs."""


def read(content: bytes, pixel_cap: int, whole: bool) -> Header:
    """With `whole`, the checksum of the pixels is compared too. Raises Undecodable, or struct.error at a cut."""
    seen, turn, kept, pixels = set[bytes](), 1, Kept(8), list[slice]()
    notes: list[str] = []
    width = height = 0
    for name, at, start, stop in _chunks(content):
        if (name == b"IHDR") == bool(seen):
            raise Undecodable("claims two sizes" if seen else "does not begin with its header")
        if name in PICTURE:
            kept.add(at, stop + 4)
            if (whole or name != b"IDAT") and not _intact(content, start, stop):
                raise Undecodable(f"is damaged: the checksum of its {name.decode()} does not agree")
        if name == b"IHDR":
            width, height, notes = _header(content[start:stop], pixel_cap)
        elif name == b"IDAT":
            pixels.append(slice(start, stop))
        elif name == b"eXIf":
            turn = orientation(content[start:stop])
        elif name == b"acTL" and stop == start + 8 and unpack_from(">I", content, start)[0] > 1:
            raise Undecodable(ANIMATED)
        seen.add(name)
    if b"IDAT" not in seen:
        raise Undecodable("has no picture")
    if "palette" in notes and b"PLTE" not in seen:
        raise Undecodable("has no palette, though its colours are those of one")
    notes += ["transparent"] * (b"tRNS" in seen) + ["turned"] * (turn != 1)
    mode = MODES.get((content[24], content[25]), "") if b"tRNS" not in seen else ""
    parts = tuple(pixels) if mode else kept.slices()
    return Header("PNG", width, height, turn, 0, tuple(dict.fromkeys(notes)), mode, parts)


def check_rows(content: bytes, header: Header) -> None:
    """Refuses pixels that end before the last row, which needs all of them unpacked."""
    packed = b"".join(content[start:stop] for name, _, start, stop in _chunks(content) if name == b"IDAT")
    bits, colour = content[24], content[25]
    missing, unpack = 0, zlib.decompressobj()
    for left, top, right, down in PASSES if "progressive" in header.notes else [(0, 0, 1, 1)]:
        width, height = -(-(header.width - left) // right), -(-(header.height - top) // down)
        missing += height * (1 + -(-width * bits * CHANNELS[colour] // 8)) if width > 0 < height else 0
    while missing > 0 and not unpack.eof:
        found = unpack.decompress(packed, 2**20)
        packed, missing = unpack.unconsumed_tail, missing - len(found)
        if not found:
            break
    if missing > 0:
        raise Undecodable(CUT)


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, place, start and stop of what it holds, for each chunk up to the end of the picture."""
    at = 8
    for _ in range(PART_CAP):
        length, name = unpack_from(">I4s", content, at)
        start, stop = at + 8, at + 8 + length
        if stop + 4 > len(content):
            raise Undecodable(CUT)
        if not name.isalpha() or (name[:1].isupper() and name not in PICTURE):
            raise Undecodable("is damaged: it has a part that no reader knows")
        yield name, at, start, stop
        if name == b"IEND":
            return
        at = stop + 4
    raise Undecodable(f"has more than {PART_CAP:,} parts")


def _intact(content: bytes, start: int, stop: int) -> bool:
    """Whether a chunk is as it was written; its name counts."""
    return zlib.crc32(memoryview(content)[start - 4 : stop]) == unpack_from(">I", content, stop)[0]


def _header(content: bytes, pixel_cap: int) -> tuple[int, int, list[str]]:
    """Width, height, and what is not plain."""
    if len(content) != 13:
        raise Undecodable("is damaged: its header says what cannot be")
    width, height, bits, colour, compression, filters, interlaced = unpack_from(">IIBBBBB", content)
    if bits not in BITS.get(colour, ()) or compression or filters or interlaced > 1:
        raise Undecodable("is damaged: its header says what cannot be")
    check_size(width, height, pixel_cap)
    check_bytes(width * height * bits * CHANNELS[colour] / 8, RAW, pixel_cap, "is unpacked to")
    notes = ["16-bit"] * (bits == 16) + ["palette"] * (colour == PALETTE) + ["grey"] * (colour in GREY)
    return width, height, notes + ["transparent"] * (colour in ALPHA) + ["progressive"] * interlaced
