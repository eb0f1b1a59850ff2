"""The header of a JPEG (ITU-T T.81), and the count of its scans."""

import re
from collections.abc import Iterator
from struct import unpack_from
from typing import NamedTuple

import numpy as np

from data_loaders.formats.exif import orientation
from data_loaders.formats.header import CUT, DATA, MEMORY, PIXEL_CAP, Header, Kept, Undecodable, check_bytes, check_size

MAGIC = b"\xff\xd8\xff"
SCAN_CAP = 100
"""Scans. Encoders write some 10; one that is nearly empty is still a walk over the whole picture."""
SCANS_AT_CAP = 16
"""Scans of an image of as many pixels as the cap; a smaller one may have more."""
SEGMENT_CAP = 5000
"""Segments, which have up to 65,536 bytes each."""
STRAY_CAP = 256
"""Bytes before a segment that belong to none."""
TABLE_CAP = 2**16
"""Bytes of the segments that a decoder needs; a thousand are usual."""

SIZES = {0xC0: (), 0xC1: (), 0xC2: ("progressive",)}
"""Headers of frames, of the kinds that are read, and what is not plain about each."""
OTHERS = {0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xDE: "hierarchical"}
OTHERS |= dict.fromkeys((0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF), "arithmetic-coded")
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
QUANTISATION, SCAN, END = 0xDB, 0xDA, 0xD9
ALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers that no length follows."""
NOT_KEPT = {*range(0xE1, 0xEE), 0xEF, 0xFE}
"""Of applications, but for JFIF's and Adobe's, which say what the channels are; and comments."""
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""What ends the data of a scan: after FF, 00 stands for a byte FF of the data, and D0 to D7 restart it."""

LUMINANCE = np.array(
    [
        *(16, 11, 12, 14, 12, 10, 16, 14, 13, 14, 18, 17, 16, 19, 24, 40, 26, 24, 22, 22, 24, 49, 35, 37, 29, 40, 58),
        *(51, 61, 60, 57, 51, 56, 55, 64, 72, 92, 78, 64, 68, 87, 69, 55, 56, 80, 109, 81, 87, 95, 98, 103, 104, 103),
        *(62, 77, 113, 121, 112, 100, 120, 92, 101, 103, 99),
    ]
)
"""The standard table (T.81, K.1), in zigzag order, as files hold it."""
PERCENT = np.arange(1, 101)[:, None]
TABLES = (LUMINANCE * np.where(PERCENT < 50, 5000 // PERCENT, 200 - 2 * PERCENT) + 50) // 100
TABLES = TABLES.clip(1, 255)
"""[100, 64], what libjpeg makes of it at quality 1 … 100 (jpeg_quality_scaling, jpeg_add_quant_table)."""
QUALITIES = {table.astype(np.uint8).tobytes(): quality for quality, table in enumerate(TABLES, 1)}


class Frame(NamedTuple):
    """What the header of a frame says (T.81, B.2.2)."""

    width: int
    height: int
    channels: int
    share: float
    """Coefficients of all channels, for each pixel."""
    table: int
    """Quantisation of the first channel."""


def read(content: bytes, pixel_cap: int) -> Header:
    """Raises Undecodable, or IndexError or struct.error where it ends within a number."""
    frames, tables, tiff, notes, kept, first, stop = list[Frame](), bytearray(), b"", list[str](), Kept(2), 0, 2
    for marker, place, start, end in _segments(content):
        if marker in SIZES:
            frames.append(_frame(content[start:end]))
            notes += SIZES[marker]
        elif marker == QUANTISATION:
            tables += content[start:end]
        elif marker == 0xE1 and not tiff and content.startswith(b"Exif\0\0", start):
            tiff = content[start + 6 : end]
        elif marker == 0xE2 and content.startswith(b"MPF\0", start):
            notes.append("multi-picture")
        if marker not in NOT_KEPT:
            kept.add(place, end)
        first, stop = content[start], end
    if len(frames) != 1:
        raise Undecodable("claims two sizes" if frames else "does not say its size")
    (frame,), turn = frames, orientation(tiff)
    _check_scans(content, stop, frame, first < frame.channels or "progressive" in notes, pixel_cap)
    kept.add(stop, len(content))
    notes += ["CMYK"] * (frame.channels == 4) + ["grey"] * (frame.channels == 1) + ["turned"] * (turn != 1)
    quality = _quality(bytes(tables), frame.table)
    return Header(
        "JPEG",
        frame.width,
        frame.height,
        turn,
        quality,
        tuple(dict.fromkeys(notes)),
        MODES[frame.channels],
        kept.slices(),
    )


def _segments(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Marker, place of it, start and stop of what it holds, for all up to the header of the first scan."""
    at, needed = 2, 0
    for _ in range(SEGMENT_CAP):
        place = _marker(content, at)
        marker = content[place + 1]
        if marker in ALONE:
            at = place + 2
            continue
        if marker == END:
            raise Undecodable("has no picture")
        if marker in OTHERS:
            raise Undecodable(f"is a JPEG of a kind that is not read ({OTHERS[marker]}): store it as a common one")
        start, at = place + 4, place + 2 + unpack_from(">H", content, place + 2)[0]
        if at > len(content):
            raise Undecodable(CUT)
        needed += at - place if marker not in NOT_KEPT else 0
        if at < start or needed > TABLE_CAP:
            raise Undecodable("is damaged: a segment has a length that cannot be")
        yield marker, place, start, at
        if marker == SCAN:
            return
    raise Undecodable(f"has more than {SEGMENT_CAP:,} segments")


def _marker(content: bytes, at: int) -> int:
    """Where the next marker is."""
    for place in range(at, at + STRAY_CAP):
        if content[place] == 0xFF and content[place + 1] not in {0, 0xFF}:
            return place
    raise Undecodable("is damaged: a segment does not begin where the one before it ends")


def _frame(content: bytes) -> Frame:
    bits, height, width, channels = unpack_from(">BHHB", content)
    factors = [divmod(factor, 16) for factor in content[7 : 6 + 3 * channels : 3]]
    if bits != 8:
        raise Undecodable(f"has {bits} bits a channel, and of JPEG only 8 are read")
    if channels not in {1, 3, 4}:
        raise Undecodable(f"has {channels} channels, and of JPEG only 1, 3 or 4 are read")
    if len(content) != 6 + 3 * channels or not all(h and v for h, v in factors):
        raise Undecodable("is damaged: its header says what cannot be")
    most = max(h for h, _ in factors) * max(v for _, v in factors)
    return Frame(width, height, channels, sum(h * v for h, v in factors) / most, content[8])


def _check_scans(content: bytes, at: int, frame: Frame, many: bool, pixel_cap: int) -> None:
    """Refuses a file without an end, and one of too many scans; of `many`, all coefficients (of 2 bytes) are held."""
    width, height = frame.width, frame.height
    check_size(width, height, pixel_cap)
    check_bytes(len(content) - at, DATA, pixel_cap, "has behind its header")
    if many:
        check_bytes(
            width * height * (4 + 2 * frame.share), MEMORY, pixel_cap, "is in several scans and takes to decode"
        )
    if not many and content.endswith(b"\xff\xd9"):
        return
    scans, most = _scans(content, at), min(SCAN_CAP, SCANS_AT_CAP * max(pixel_cap, PIXEL_CAP) // (width * height))
    if many and scans > most:
        raise Undecodable(f"has {scans} scans, more than the {most} of a JPEG with {width} x {height} pixels")


def _scans(content: bytes, at: int) -> int:
    """How many there are; behind the marker of their end may come anything, as in a phone's moving pictures."""
    scans = 1
    for _ in range(SEGMENT_CAP):
        found = MARKER.search(content, at)
        if found is None:
            raise Undecodable(CUT)
        marker = content[found.end() - 1]
        if marker == END:
            return scans
        scans += marker == SCAN
        at = found.end() if marker in ALONE else found.end() + unpack_from(">H", content, found.end())[0]
    raise Undecodable(f"has more than {SEGMENT_CAP:,} segments")


def _quality(tables: bytes, wanted: int) -> int:
    """1 … 100, whose table is nearest to the one of the first channel; 0 if that is missing."""
    at = 0
    while at < len(tables):
        size = 128 if tables[at] >> 4 else 64
        table = tables[at + 1 : at + 1 + size]
        if tables[at] & 15 == wanted and len(table) == size:
            values = np.frombuffer(table, ">u2" if size == 128 else np.uint8)
            return QUALITIES.get(table) or 1 + int(np.abs(TABLES - values).sum(1).argmin())
        at += 1 + size
    return 0
