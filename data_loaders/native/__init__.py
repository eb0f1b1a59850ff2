"""Rows of a batch -> pixels in their places, by a small library of our own in C (rows.c).

It is built when the package is installed, where there is a C compiler and libjpeg-turbo (hatch_build.py). Without it
`NAME` is empty, nobody may call `load`, and Pillow makes all images.
"""

import ctypes
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
LIBRARY = HERE / "rows.so"
ROW = np.dtype(
    [
        ("fd", "<i4"),
        ("length", "<i4"),
        ("offset", "<i8"),
        ("crc32c", "<u4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("place", "<i4"),
        ("box", "<f8", 4),
        ("shift", "<i4", 2),
        ("flip", "<i4"),
        ("raw", "<i4"),
        ("status", "<i4"),
    ],
    align=True,
)
"""One image: an open file, bytes of the image there, where they begin, their checksum; pixels of the upright image;
place in `images`; box, shift and flip as in `augment.Placing`. `raw` is 0 of a JPEG file, else the side of a square of
RGB pixels. `status` is set to 0 where the image lies in its place, else to what is not plain about it."""

UNSURE = (1, 2, 6)
"""Status of a row that was not read, or not as it was written, or for which there was no memory: another time it may
be, unlike what is not plain."""


def _library() -> ctypes.CDLL | None:
    """The library, if it was made of the source that lies beside it: another would take other rows."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.evenkeel_source.restype = ctypes.c_uint32
        library.evenkeel_name.restype = ctypes.c_char_p
        whole, number = ctypes.c_void_p, ctypes.c_int64
        library.evenkeel_load.argtypes = [whole, number, whole, number, number, ctypes.c_int, whole]
        library.evenkeel_load.restype = None
        library.evenkeel_permute.argtypes = [whole, whole, whole, number, ctypes.c_uint64, ctypes.c_int, whole]
        library.evenkeel_permute.restype = None
        return library if library.evenkeel_source() == zlib.crc32((HERE / "rows.c").read_bytes()) else None
    except (OSError, AttributeError):
        return None


_LIBRARY = _library()
NAME = _LIBRARY.evenkeel_name().decode() if _LIBRARY else ""
"""What decodes, with its version; empty where it was not built."""


def load(rows: NDArray[np.void], images: NDArray[np.uint8], fast: bool = True) -> tuple[int, int]:
    """Fills `images` [B, size, size, 3] for all `rows` (of type ROW), and sets the status of each. Returns nanoseconds:
    of reading with the checksum, and of decoding with the resampling. Without `fast` the library's own vector
    instructions are not used, and the pixels are the same.

    Needs no lock, and holds none: Python's is released. Only the places of the rows are written to.
    """
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if not square or images.dtype != np.uint8 or not images.flags.c_contiguous or not images.flags.writeable:
        raise ValueError("images are not contiguous bytes of [B, size, size, 3]")
    if rows.dtype != ROW or rows.ndim != 1 or not rows.flags.c_contiguous or not rows.flags.writeable:
        raise ValueError("rows are not a contiguous array of ROW")
    if _LIBRARY is None:
        raise RuntimeError("the native library was not built")
    spent = np.zeros(2, np.int64)
    count, size = images.shape[:2]
    _LIBRARY.evenkeel_load(rows.ctypes.data, len(rows), images.ctypes.data, count, size, fast, spent.ctypes.data)
    return int(spent[0]), int(spent[1])


def permute(
    places: NDArray[np.uint64], sizes: NDArray[np.uint64], keys: NDArray[np.uint64], rounds: int, least_half_bits: int
) -> NDArray[np.int64]:
    """What `stream.permute` describes, of [P] places below their sizes and with a key each."""
    given = [np.ascontiguousarray(values, np.uint64) for values in (places, sizes, keys)]
    if _LIBRARY is None or len({values.shape for values in given}) > 1 or (given[0] >= given[1]).any():
        raise ValueError("the native library was not built, or places do not fit their sizes")
    out = np.empty(given[0].shape, np.int64)
    pointers = [values.ctypes.data for values in given]
    _LIBRARY.evenkeel_permute(*pointers, out.size, rounds, least_half_bits, out.ctypes.data)
    return out
