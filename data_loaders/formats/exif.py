"""EXIF: the orientation, and nothing else of it."""

import struct

TAG = 0x0112
SHORT, LONG = 3, 4
ORDER = {b"II*\0": "<", b"MM\0*": ">"}


def orientation(tiff: bytes) -> int:
    """1 … 8, from the first directory; 1 where there is none, or one that means nothing."""
    order = ORDER.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind, count = struct.unpack_from(order + "HHI", tiff, at)
        if tag == TAG:
            (value,) = struct.unpack_from(order + ("H" if kind == SHORT else "I"), tiff, at + 8)
            return value if kind in {SHORT, LONG} and count == 1 and 1 <= value <= 8 else 1
    return 1
