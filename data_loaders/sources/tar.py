"""The members of a tar, told by its headers alone: nothing is extracted, followed or trusted to be where it says.

tarfile is not used, since it reads an extended header of any size into memory, and takes several times as long.
"""

import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from data_loaders.sources.rows import Unreadable

BLOCK = 512
LONGEST_HEADER = 2**16
"""Bytes of an extended header, which holds long names."""
NO_DATA = b"123456"
"""Types of members without data: links, devices, folders, pipes; whatever size they claim."""
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    name: str
    is_file: bool
    """A regular file; else a link, a device, a pipe or something newer, and never read."""
    is_folder: bool
    offset: int
    """Of its first byte in the tar."""
    size: int
    """Bytes."""


def members(file: io.BufferedIOBase) -> Iterator[Member]:
    """Every member, in order; the file may be read elsewhere in between. Raises Unreadable where it is no whole tar."""
    size = file.seek(0, io.SEEK_END)
    at, name, told = 0, "", -1
    while True:
        if at == 0:
            _refuse_packed(_read(file, 0, min(size, 6), size))
        header = _read(file, at, BLOCK, size)
        if not header.strip(b"\0"):
            return
        kind, claimed = _checked(header, at)
        data = at + BLOCK
        if kind in b"xgLK":
            content = _extended(file, data, claimed, size)
            name = _text(content.rstrip(b"\0")) if kind == b"L" else name
            records = dict(_records(content)) if kind in b"x" else {}
            name, told = records.get("path", name), int(records.get("size", told))
        else:
            claimed = 0 if kind in NO_DATA else claimed if told < 0 else told
            if data + claimed > size:
                raise Unreadable(f"is cut short: a member at byte {at:,} says that it has {claimed:,} bytes")
            yield Member(name or _name(header), kind in b"0\0", kind == b"5", data, claimed)
            name, told = "", -1
        at = data + -(-claimed // BLOCK) * BLOCK


def _read(file: io.BufferedIOBase, at: int, count: int, size: int) -> bytes:
    file.seek(at)
    content = file.read(count)
    if len(content) != count:
        raise Unreadable(f"is cut short at byte {size:,}: it does not end as a tar does")
    return content


def _checked(header: bytes, at: int) -> tuple[bytes, int]:
    """Type and size of a member. Raises Unreadable where its header is none."""
    plain = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if plain != _number(header[148:156]):
        raise Unreadable(f"is no tar, or damaged at byte {at:,}")
    size = _number(header[124:136])
    if size < 0:
        raise Unreadable(f"is damaged: the member at byte {at:,} has no size")
    return header[156:157], size


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else -1


def _extended(file: io.BufferedIOBase, at: int, claimed: int, size: int) -> bytes:
    if claimed > LONGEST_HEADER:
        raise Unreadable(f"has an extended header of {claimed:,} bytes at byte {at:,}")
    return _read(file, at, claimed, size) if claimed else b""


def _records(content: bytes) -> Iterator[tuple[str, str]]:
    """Keys and values of an extended header: lines of LENGTH KEY=VALUE, the length being that of the whole line."""
    while content:
        match = re.match(rb"(\d{1,5}) ([^=]+)=", content)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(content):
            raise Unreadable("has a damaged extended header")
        key, value = match[2], content[match.end() : length - 1]
        if key == b"size" and not re.fullmatch(rb"\d{1,18}", value):
            raise Unreadable("has a damaged extended header")
        yield _text(key), _text(value)
        content = content[length:]


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _refuse_packed(header: bytes) -> None:
    for magic, packing in PACKED.items():
        if header.startswith(magic):
            raise Unreadable(f"is packed with {packing}, so its images have no place of their own")
