"""The records of a CSV as a stream in little memory, whatever its length: a huge line, cell or record ends it."""

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.places import plain, shown
from data_loaders.sources.rows import Unreadable
from data_loaders.sources.storage import open_place, reason

BLOCK = 2**20
"""Bytes that are read at once, and most bytes of a record."""
BOMB_RATIO, BOMB_BYTES = 250, 2**20
"""A list that unpacks to so many times its size, and to so many bytes, was made to do harm."""
UTF16 = b"\xff\xfe", b"\xfe\xff"
AS_UTF8 = "save the file as UTF-8 CSV"


UNPACK: dict[str, Callable[[Any], Any]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zst": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
}


class _Wrong(Exception):
    """What is wrong with a block of lines: line within the block, reason, repair."""


def records(place: str) -> Iterator[tuple[int, list[str]]]:
    """Every record of a CSV with the number of its first line: a quoted cell may hold several.

    Raises Refusal where the file cannot be read, or be read on.
    """
    name, line, base = plain(shown(place)), 1, 0

    def lines() -> Iterator[str]:
        nonlocal base
        record = 0
        while True:
            base = reader.line_num
            block = next(blocks, None)
            if block is None:
                return
            if record == line:
                raise _Wrong(0, f"a record of more than {BLOCK:,} bytes", 'close every quote; a quote inside is ""')
            record = line if line != base + 1 else 0
            yield from io.StringIO(_text(block), newline="")

    try:
        with _unpacked(place) as file:
            blocks = _blocks(file)
            reader = csv.reader(lines(), strict=True)
            for cells in reader:
                yield line, cells
                line = reader.line_num + 1
        return
    except _Wrong as wrong:
        within, what, fix = wrong.args
        fault = Fault(f"{name}:{base + 1 + within}", what, fix)
    except csv.Error as wrong:
        fault = Fault(f"{name}:{line}", f"is not CSV: {wrong}", 'close every quote; a quote inside of quotes is ""')
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, pa.ArrowInvalid) as wrong:
        fault = Fault(f"{name}:{line}", f"cannot be unpacked: {wrong}", "pack the file anew")
    except (OSError, Unreadable) as wrong:
        fault = Fault(name, f"cannot be read: {reason(wrong)}", "give the path of a CSV file")
        if isinstance(wrong, OSError) and not wrong.errno:  # as bz2 and Arrow tell of what they cannot unpack
            fault = Fault(f"{name}:{line}", f"cannot be unpacked: {wrong}", "pack the file anew")
    raise Refusal("The CSV cannot be read:", [fault], 65)


@contextmanager
def _unpacked(place: str) -> Iterator[io.BufferedIOBase]:
    with open_place(place) as file:
        unpack = UNPACK.get(shown(place).rpartition(".")[2])
        if unpack is None:
            yield file
        else:
            with unpack(file) as unpacked:
                yield _Wary(unpacked, file)


class _Wary(io.BufferedIOBase):
    """An unpacked file that ends where it grows far beyond its packed size."""

    def __init__(self, unpacked: Any, packed: io.BufferedIOBase) -> None:
        self._unpacked, self._packed, self._read = unpacked, packed, 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = self._unpacked.read(size)
        self._read += len(content)
        if self._read > max(BOMB_BYTES, BOMB_RATIO * self._packed.tell()):
            raise _Wrong(0, f"unpacks to more than {BOMB_RATIO} times its size", "give the unpacked file")
        return content


def _blocks(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The file in blocks that end with a line. Raises _Wrong at a line longer than a block."""
    rest = file.read(BLOCK)
    if rest.startswith(UTF16):
        raise _Wrong(0, "is UTF-16, not UTF-8", AS_UTF8)
    rest = rest.removeprefix(b"\xef\xbb\xbf")
    while rest:
        more = file.read(BLOCK)
        end = (max(rest.rfind(b"\n"), rest.rfind(b"\r", 0, -1)) + 1) if more else len(rest)
        if end:
            yield rest[:end]
        elif len(rest) > BLOCK:
            raise _Wrong(0, f"a line of more than {BLOCK:,} bytes", "give a CSV file, with an image in each line")
        rest = rest[end:] + more


def _text(block: bytes) -> str:
    try:
        text = block.decode()
    except UnicodeDecodeError as wrong:
        raise _Wrong(_lines_in(block[: wrong.start]), "is not UTF-8", AS_UTF8) from None
    if "\0" in text:
        raise _Wrong(_lines_in(block[: block.index(b"\0")]), "holds a NUL byte", AS_UTF8)
    return text


def _lines_in(block: bytes) -> int:
    return len((block + b"x").splitlines()) - 1
