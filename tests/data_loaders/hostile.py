"""Hostile images, built here, and what is to become of each: python tests/data_loaders/hostile.py FOLDER runs those in
a folder in this very process, which may crash or hang."""

import io
import json
import pickle
import re
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_loaders.decode import decode
from data_loaders.examine import examine
from data_loaders.formats.header import Undecodable
from data_loaders.recode import Resize
from data_loaders.shards import squared

CALLS = {
    "header": lambda content: examine(content, check="header")[1:3],
    "examine": lambda content: examine(content)[1:3],
    "decode": decode,
    "resize": lambda content: decode(Resize(longest=16)(content)).shape[1::-1],
    "raw": lambda content: squared(content, 16)[1][1:3],
}
SMALL = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
SMOOTH = np.kron(np.array([[[200, 30, 60], [20, 160, 90]], [[40, 60, 220], [240, 240, 30]]]), np.ones((16, 24, 1)))
SMOOTH = SMOOTH.astype(np.uint8)
"""Of 32 x 48 pixels, red, green, blue and yellow: its corners tell how it is turned."""
UNTURNED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: np.rot90,
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
"""EXIF orientation -> how a camera stores an upright picture under it."""
CUT, DAMAGED, NONE, TWO = "is cut short", "is damaged", "has no picture", "claims two sizes"
PEAK = re.compile(r"VmHWM:\s*(\d+) kB")
NO_IMAGE = "is not a JPEG, PNG, WEBP image"


class Case(NamedTuple):
    """An image, and what is to become of it."""

    name: str
    content: bytes
    size: tuple[int, int] = (0, 0)
    """Width and height, upright, of one that is read."""
    corners: tuple[tuple[int, ...], ...] = ()
    """Its colours at the upper left, upper right, lower left and lower right, of one that is read."""
    refusal: str = ""
    """How the sentence begins, of one that is refused."""
    deep: bool = False
    """Whether what is wrong is found only where it is decoded."""


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes = b"", wrong: int = 0) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content) ^ wrong)


def ihdr(width: int, height: int, bits: int = 8, colour: int = 2, *rest: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, *(rest or (0, 0, 0))))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def rows(width: int, height: int, byte: int = 7, filtered: int = 0) -> bytes:
    """Image data of a PNG: rows of `width` bytes, under a filter."""
    pack, row = zlib.compressobj(1), bytes([filtered]) + bytes([byte]) * width
    return b"".join([*(pack.compress(row) for _ in range(height)), pack.flush()])


END = chunk(b"IEND")
IDAT = chunk(b"IDAT", rows(15, 4))
"""Of 5 x 4 pixels of RGB."""


def segment(marker: int, content: bytes = b"") -> bytes:
    """Of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def sof(marker: int, width: int, height: int, channels: int = 1, bits: int = 8, factors: int = 0x11) -> bytes:
    each = b"".join(bytes([c + 1, factors, 0]) for c in range(channels))
    return segment(marker, struct.pack(">BHHB", bits, height, width, channels) + each)


def scans(width: int, height: int, count: int) -> bytes:
    """A progressive grey JPEG whose scans say, after the first, that there is nothing more, in few bytes."""
    blocks = -(-width // 8) * -(-height // 8)
    runs = "".join("0" + "1" * 14 for _ in range(-(-blocks // 32767)))  # each says: nothing in 32,767 blocks
    runs += "1" * (-len(runs) % 8)
    empty = int(runs, 2).to_bytes(len(runs) // 8, "big").replace(b"\xff", b"\xff\0")
    tables = segment(0xDB, b"\0" + b"\x10" * 64) + segment(0xC4, b"\0\1" + bytes(15) + b"\0")
    tables += segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    first = segment(0xDA, b"\1\1\0\0\0\0") + bytes(blocks // 8 + 1)
    others = (segment(0xDA, b"\1\1\0" + bytes([1 + n % 63, 1 + n % 63, 0])) + empty for n in range(count - 1))
    return b"\xff\xd8" + tables + sof(0xC2, width, height) + first + b"".join(others) + b"\xff\xd9"


def riff(*parts: tuple[bytes, bytes], more: int = 0) -> bytes:
    """A WebP."""
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(c)) + c + bytes(len(c) % 2) for name, c in parts)
    return b"RIFF" + struct.pack("<I", len(body) + more) + body


def canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", struct.pack("<I", flags) + sides


def lossless(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14) + bytes(20)


def tiff(*entries: tuple[int, int, int, bytes], then: int = 0, order: str = "<") -> bytes:
    """EXIF of entries (tag, type, count, value), whatever they hold, and where the next directory is."""
    packed = b"".join(struct.pack(order + "HHI4s", *entry) for entry in entries)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IH", 8, len(entries)) + packed + struct.pack(order + "I", then)


def with_exif(content: bytes, *exif: bytes) -> bytes:
    """A JPEG with EXIF, whatever it holds."""
    return content[:2] + b"".join(segment(0xE1, b"Exif\0\0" + part) for part in exif) + content[2:]


def corners(pixels: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(pixels[y, x].tolist()) for y in (0, -1) for x in (0, -1))


def cases() -> Iterator[Case]:
    yield from no_images()
    yield from cuts()
    yield from jpegs()
    yield from pngs()
    yield from webps()
    yield from turned()
    yield from bombs()
    yield from thin()


def no_images() -> Iterator[Case]:
    yield Case("nothing", b"", refusal="is empty")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.jpg", encoded(SMALL, "JPEG"))
    for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM", "PDF", "JPEG2000", "TGA"):
        yield Case(kind, encoded(SMALL, kind), refusal=NO_IMAGE)
    upside = bytearray(encoded(SMALL, "BMP"))
    upside[22:26] = struct.pack("<i", -12)
    for name, content in {
        "one byte": b"\0",
        "a BMP of negative height": bytes(upside),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "HTML": b"<!doctype html><title>404</title>",
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(64),
        "MP4": b"\0\0\0\x18ftypisom" + bytes(64),
        "ELF": b"\x7fELF\2\1\1" + bytes(64),
        "zip": archive.getvalue(),
        "gzip": b"\x1f\x8b\x08" + bytes(64),
        "pickle": pickle.dumps({"a": 1}),
        "text": b"404: not found\n",
        "a JPEG behind a blank": b" " + encoded(SMALL, "JPEG"),
        "RIFF of sound": b"RIFF\x24\0\0\0WAVEfmt " + bytes(64),
        "a JPEG turned to text": encoded(SMALL, "JPEG").replace(b"\xff", b"\xef\xbf\xbd"),
        "a PNG whose line ends were changed": encoded(SMALL, "PNG").replace(b"\r\n", b"\n"),
    }.items():
        yield Case(name, content, refusal=NO_IMAGE)
    yield Case("JPEG magic", b"\xff\xd8\xff", refusal=CUT)
    yield Case("PNG magic", b"\x89PNG\r\n\x1a\n", refusal=CUT)
    yield Case("WebP magic", b"RIFF\4\0\0\0WEBP", refusal=NONE)
    for seed in range(3):
        noise = np.random.default_rng(seed).bytes(5000)
        yield Case(f"noise behind the magic of JPEG {seed}", b"\xff\xd8\xff" + noise, refusal="")
        yield Case(f"noise behind the magic of PNG {seed}", png(noise), refusal=CUT)
        yield Case(f"noise behind the magic of WebP {seed}", riff((b"VP8 ", noise)), refusal=DAMAGED)


def cuts() -> Iterator[Case]:
    for kind in ("JPEG", "PNG", "WEBP"):
        content = encoded(SMOOTH, kind)
        for share in (0.3, 0.45, 0.6, 0.75, 0.9, 0.97):
            yield Case(f"{kind} cut at {share:.0%}", content[: int(len(content) * share)], refusal=CUT)
        yield Case(f"{kind} without its last byte", content[:-1], refusal=CUT)
    yield Case(
        "progressive JPEG cut at 60%",
        (p := encoded(SMOOTH, "JPEG", progressive=True))[: int(len(p) * 0.6)],
        refusal=CUT,
    )


def jpegs() -> Iterator[Case]:
    good = encoded(SMOOTH, "JPEG", quality=95, subsampling=0)
    size, colours = (48, 32), corners(SMOOTH)
    sos = good.index(b"\xff\xda")
    yield Case("JPEG", good, size, colours)
    yield Case("progressive JPEG", encoded(SMOOTH, "JPEG", quality=95, progressive=True), size)
    yield Case("JPEG of many restarts", encoded(SMOOTH, "JPEG", restart_marker_blocks=1), size)
    yield Case("JPEG with data behind it", good + np.random.default_rng(1).bytes(10**5), size, colours)
    yield Case("JPEG with a JPEG behind it", good + encoded(SMALL, "JPEG"), size, colours)
    yield Case("JPEG with zeros behind it", good + bytes(999), size, colours)
    second = Image.fromarray(255 - SMOOTH)
    multi = encoded(Image.fromarray(SMOOTH), "MPO", save_all=True, append_images=[second], quality=95, subsampling=0)
    yield Case("MPO", multi, size, colours)
    yield Case("MPO whose second picture is cut", multi[:-99], size, colours)
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    yield Case("CMYK", encoded(ink, "JPEG", quality=100), (16, 16), ((0, 255, 255),) * 4)
    ycck = encoded(ink, "JPEG", quality=100)
    at = ycck.find(b"Adobe")
    yield Case("YCCK", ycck if at < 0 else ycck[: at + 11] + b"\2" + ycck[at + 12 :], (16, 16))
    yield Case("grey JPEG", encoded(Image.new("L", (9, 9), 77), "JPEG"), (9, 9), ((77, 77, 77),) * 4)
    yield Case("JPEG without an end", good[:-2], refusal=CUT)
    yield Case("JPEG of nothing", b"\xff\xd8\xff\xd9", refusal=NONE)
    yield Case("JPEG without a frame", b"\xff\xd8" + good[sos:], refusal="does not say its size")
    frame = good.index(b"\xff\xc0")
    yield Case("JPEG of two frames", good[:frame] + sof(0xC0, 9, 9) + good[frame:], refusal=TWO)
    for name, marker in {"lossless": 0xC3, "hierarchical": 0xC5, "arithmetic-coded": 0xC9}.items():
        yield Case(
            f"{name} JPEG", b"\xff\xd8" + sof(marker, 8, 8), refusal=f"is a JPEG of a kind that is not read ({name})"
        )
    yield Case("JPEG of 12 bits", b"\xff\xd8" + sof(0xC1, 8, 8, bits=12) + good[sos:], refusal="has 12 bits a channel")
    yield Case("JPEG of 2 channels", b"\xff\xd8" + sof(0xC0, 8, 8, 2) + good[sos:], refusal="has 2 channels")
    for width, height in ((0, 8), (8, 0)):
        found = f"claims {width} x {height} pixels, which is no picture"
        yield Case(f"JPEG of {width} x {height}", b"\xff\xd8" + sof(0xC0, width, height) + good[sos:], refusal=found)
    for factors in (0x00, 0x10):
        bad = b"\xff\xd8" + sof(0xC0, 8, 8, factors=factors) + good[sos:]
        yield Case(f"JPEG sampled {factors:02x}", bad, refusal=f"{DAMAGED}: its header")
    swapped = bytearray(good)
    swapped[frame + 11] = 0x55
    yield Case("JPEG sampled 5 x 5", bytes(swapped), refusal=DAMAGED, deep=True)
    yield Case("JPEG without quantisation", good.replace(b"\xff\xdb", b"\xff\xef"), refusal=DAMAGED, deep=True)
    table = good.index(b"\xff\xc4")
    broken = good[: table + 5] + b"\xff" * 16 + good[table + 21 :]
    yield Case("JPEG of bad Huffman tables", broken, refusal=DAMAGED, deep=True)
    yield Case("JPEG of a short segment", good[:2] + b"\xff\xe1\0\1" + good[2:], refusal=f"{DAMAGED}: a segment")
    yield Case("JPEG of a long segment", good[:2] + b"\xff\xe1\xff\xff" + good[2:], refusal=CUT)
    yield Case("JPEG with a few stray bytes", good[:sos] + bytes(9) + good[sos:], size, colours)
    yield Case("JPEG with many stray bytes", good[:sos] + bytes(10**6) + good[sos:], refusal=f"{DAMAGED}: a segment")
    yield Case("JPEG with many fill bytes", good[:sos] + b"\xff" * 10**6 + good[sos:], refusal=f"{DAMAGED}: a segment")
    yield Case(
        "JPEG of many comments", good[:2] + segment(0xFE) * 10**5 + good[2:], refusal="has more than 5,000 segments"
    )
    tables = segment(0xDB, (b"\0" + b"\x10" * 64) * 900)
    yield Case("JPEG of many tables", good[:2] + tables * 20 + good[2:], refusal=f"{DAMAGED}: a segment")
    yield Case("JPEG of large comments", good[:2] + segment(0xFE, bytes(60_000)) * 200 + good[2:], size, colours)


def pngs() -> Iterator[Case]:
    good, size, colours = encoded(SMALL, "PNG"), (20, 12), corners(SMALL)
    yield Case("PNG", good, size, colours)
    yield Case("PNG with data behind it", good + bytes(99), size, colours)
    rgba = np.dstack([SMALL, np.full(SMALL.shape[:2], 255, np.uint8)])
    rgba[-1, -1, 3] = 0
    white = (*colours[:3], (255, 255, 255))
    yield Case("RGBA", encoded(rgba, "PNG"), size, white)
    faint = Image.merge("LA", [Image.new("L", (2, 1), 40), Image.fromarray(np.array([[255, 0]], np.uint8))])
    yield Case("grey with alpha", encoded(faint, "PNG"), (2, 1), ((40,) * 3, (255,) * 3) * 2)
    deep = Image.fromarray(np.array([[0, 32768], [256, 65535]], np.uint16))
    yield Case("16-bit grey", encoded(deep, "PNG"), (2, 2), tuple((v,) * 3 for v in (0, 128, 1, 255)))
    wide = png(
        ihdr(1, 1, 16, 6), chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">4H", 65535, 32768, 0, 65535))), END
    )
    yield Case("16-bit RGBA", wide, (1, 1), ((255, 128, 0),) * 4)
    yield Case("16-bit RGB", png(ihdr(1, 1, 16, 2), chunk(b"IDAT", rows(6, 1, 64)), END), (1, 1), ((64,) * 3,) * 4)
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    yield Case("one bit", encoded(bits, "PNG"), (2, 1), ((0,) * 3, (255,) * 3) * 2)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 0, 80, 160])
    palette.putpixel((1, 0), 1)
    yield Case("palette", encoded(palette, "PNG"), (2, 1), ((200, 10, 20), (0, 80, 160)) * 2)
    for name, clear in {"one clear colour": 1, "a table of them": b"\xff\0"}.items():
        yield Case(
            f"palette of {name}", encoded(palette, "PNG", transparency=clear), (2, 1), ((200, 10, 20), (255,) * 3) * 2
        )
    colour = chunk(b"PLTE", b"\1\2\3")
    yield Case("palette that is too short", png(ihdr(5, 4, 8, 3), colour, chunk(b"IDAT", rows(5, 4)), END), (5, 4))
    clear = chunk(b"tRNS", bytes(999))
    content = png(ihdr(5, 4, 8, 3), colour, clear, chunk(b"IDAT", rows(5, 4)), END)
    yield Case("more clear colours than there are", content, refusal=DAMAGED, deep=True)
    yield Case("no palette", png(ihdr(5, 4, 8, 3), chunk(b"IDAT", rows(5, 4)), END), refusal="has no palette")
    black = png(ihdr(2000, 2), chunk(b"IDAT", rows(6000, 2, 0)), END)
    yield Case("black", black, (2000, 2), ((0,) * 3,) * 4)
    half = b"".join(b"\0" + bytes([9]) * 3 * n for n in (1, 1, 2, 2, 2))  # 4 x 4, all but the last pass
    for name, last in {"whole": (b"\0" + bytes(12)) * 2, "without its last pass": b""}.items():
        content = png(ihdr(4, 4, 8, 2, 0, 0, 1), chunk(b"IDAT", zlib.compress(half + last)), END)
        yield Case(f"interlaced, {name}", content, (4, 4)) if last else Case(name, content, refusal=CUT, deep=True)
    laced = png(ihdr(1, 1, 8, 2, 0, 0, 1), chunk(b"IDAT", rows(3, 1)), END)
    yield Case("interlaced", laced, (1, 1), ((7,) * 3,) * 4)
    animated = {"save_all": True, "append_images": [Image.fromarray(255 - SMALL)]}
    yield Case("APNG", encoded(Image.fromarray(SMALL), "PNG", **animated), refusal="is animated: store its first frame")
    single = chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(
        b"fcTL", struct.pack(">5I2H2B", 0, 5, 4, 0, 0, 1, 1, 0, 0)
    )
    yield Case("APNG of one frame", png(ihdr(5, 4), single, IDAT, END), (5, 4), ((7,) * 3,) * 4)
    yield Case(
        "wrong sum of the header",
        png(ihdr(5, 4)[:-1] + b"?", IDAT, END),
        refusal=f"{DAMAGED}: the checksum of its IHDR",
    )
    wrong = png(ihdr(5, 4), chunk(b"IDAT", rows(15, 4), wrong=1), END)
    yield Case("wrong sum of the pixels", wrong, refusal=f"{DAMAGED}: the checksum of its IDAT", deep=True)
    yield Case("wrong sum of a text", png(ihdr(5, 4), chunk(b"tEXt", b"a\0b", wrong=1), IDAT, END), (5, 4))
    yield Case("no pixels", png(ihdr(5, 4), END), refusal=NONE)
    yield Case("no end", png(ihdr(5, 4), IDAT), refusal=CUT)
    yield Case("no header", png(IDAT, END), refusal="does not begin with its header")
    yield Case("two headers", png(ihdr(5, 4), ihdr(9, 9), IDAT, END), refusal=TWO)
    yield Case("a header of 12 bytes", png(chunk(b"IHDR", bytes(12)), IDAT, END), refusal=f"{DAMAGED}: its header")
    for odd in ((3, 2), (8, 5), (16, 3), (8, 2, 1, 0, 0), (8, 2, 0, 1, 0), (8, 2, 0, 0, 2)):
        yield Case(f"a header that says {odd}", png(ihdr(5, 4, *odd), IDAT, END), refusal=f"{DAMAGED}: its header")
    for width, height in ((0, 5), (5, 0)):
        found = f"claims {width} x {height} pixels, which is no picture"
        yield Case(f"PNG of {width} x {height}", png(ihdr(width, height), IDAT, END), refusal=found)
    yield Case(
        "unknown part that is needed", png(ihdr(5, 4), chunk(b"CgBI"), IDAT, END), refusal=f"{DAMAGED}: it has a part"
    )
    yield Case(
        "part without a name", png(ihdr(5, 4), chunk(b"\0\0\0\0"), IDAT, END), refusal=f"{DAMAGED}: it has a part"
    )
    for name, data, found in (
        ("no zlib", b"not zlib at all", DAMAGED),
        ("unknown filter", rows(15, 4, filtered=9), DAMAGED),
        ("rows that are missing", rows(15, 2), CUT),
        ("no rows at all", zlib.compress(b""), CUT),
        ("wrong sum of zlib", rows(15, 4)[:-1] + b"?", DAMAGED),
    ):
        yield Case(f"pixels of {name}", png(ihdr(5, 4), chunk(b"IDAT", data), END), refusal=found, deep=True)
    yield Case("more rows than it says", png(ihdr(5, 4), chunk(b"IDAT", rows(15, 10**5)), END), (5, 4))
    split = rows(15, 4)
    parts = [chunk(b"IDAT", split[i : i + 1]) for i in range(len(split))]
    yield Case("a byte in each part", png(ihdr(5, 4), *parts, END), (5, 4), ((7,) * 3,) * 4)
    gap = png(ihdr(5, 4), *parts[:5], chunk(b"tEXt", b"a\0b"), *parts[5:], END)
    yield Case("a text between the pixels", gap, (5, 4), ((7,) * 3,) * 4)
    yield Case("many empty parts", png(ihdr(5, 4), chunk(b"IDAT") * 50_000, IDAT, END), (5, 4))
    yield Case(
        "too many empty parts", png(ihdr(5, 4), chunk(b"tEXt") * 10**5, IDAT, END), refusal="has more than 65,536 parts"
    )


def webps() -> Iterator[Case]:
    good = encoded(SMALL, "WEBP", lossless=True)
    yield Case("lossless WebP", good, (20, 12), corners(SMALL))
    yield Case("WebP", encoded(SMOOTH, "WEBP", quality=100), (48, 32))
    rgba = np.dstack([SMALL, np.full(SMALL.shape[:2], 255, np.uint8)])
    rgba[-1, -1, 3] = 0
    clear = encoded(rgba, "WEBP", lossless=True, exact=True)
    yield Case("WebP with alpha", clear, (20, 12), (*corners(SMALL)[:3], (255, 255, 255)))
    yield Case("WebP with lossy colours and alpha", encoded(rgba, "WEBP"), (20, 12))
    yield Case("WebP with data behind it", good + bytes(99), (20, 12), corners(SMALL))
    animated = {"save_all": True, "append_images": [Image.fromarray(255 - SMALL)]}
    yield Case(
        "animated WebP",
        encoded(Image.fromarray(SMALL), "WEBP", **animated),
        refusal="is animated: store its first frame",
    )
    yield Case("WebP that is longer than it is", riff(lossless(5, 4), more=99), refusal=CUT)
    yield Case("WebP of no frame", riff(canvas(5, 4)), refusal=NONE)
    yield Case("WebP of two sizes", riff(canvas(9, 9), lossless(5, 4)), refusal=TWO)
    yield Case("WebP without a size", riff((b"ANMF", bytes(30))), refusal="does not say its size")
    yield Case("lossy WebP that begins wrong", riff((b"VP8 ", bytes(30))), refusal=f"{DAMAGED}: its frame")
    yield Case("lossless WebP that begins wrong", riff((b"VP8L", bytes(30))), refusal=f"{DAMAGED}: its frame")
    yield Case("WebP of no data", riff(lossless(5, 4)), refusal="", deep=True)
    noise = np.random.default_rng(2).bytes(300)
    yield Case("WebP of noise", riff((b"VP8 ", b"\x30\1\0\x9d\1\x2a\x20\0\x20\0" + noise)), refusal="", deep=True)
    yield Case(
        "WebP of many parts", riff(lossless(5, 4), *[(b"junk", b"")] * 10**5), refusal="has more than 65,536 parts"
    )


def turned() -> Iterator[Case]:
    size, colours = (48, 32), corners(SMOOTH)
    for kind in ("JPEG", "PNG", "WEBP"):
        for orientation, turn in UNTURNED.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            options = {"quality": 100, "subsampling": 0, "lossless": True, "exif": exif}
            yield Case(f"{kind} turned {orientation}", encoded(turn(SMOOTH), kind, **options), size, colours)
    good = encoded(SMOOTH, "JPEG", quality=95, subsampling=0)
    six = (0x0112, 3, 1, b"\6\0\0\0")
    sideways = corners(np.rot90(SMOOTH, -1))
    for name, exif in {
        "big end first": (tiff((0x0112, 3, 1, b"\0\6\0\0"), order=">"),),
        "that circle": (tiff(six, then=8),),
        "of many entries": (tiff(*[(1 + n, 7, 60_000, struct.pack("<I", 8)) for n in range(200)], six),),
        "in many segments": (tiff(six), *[bytes(60_000)] * 100),
        "of two minds": (tiff(six), tiff((0x0112, 3, 1, b"\3\0\0\0"))),
        "as a long": (tiff((0x0112, 4, 1, b"\6\0\0\0")),),
    }.items():
        yield Case(f"EXIF {name}", with_exif(good, *exif), (32, 48), sideways)
    for name, exif in {
        "of orientation 0": tiff((0x0112, 3, 1, b"\0\0\0\0")),
        "of orientation 9": tiff((0x0112, 3, 1, b"\x09\0\0\0")),
        "of orientation 65535": tiff((0x0112, 3, 1, b"\xff\xff\0\0")),
        "of orientation as text": tiff((0x0112, 2, 2, b"6\0\0\0")),
        "of two orientations": tiff((0x0112, 3, 2, b"\6\0\6\0")),
        "of nothing": b"",
        "of four bytes": b"II*\0",
        "of noise": np.random.default_rng(3).bytes(300),
        "that begins outside": b"II*\0\xff\xff\xff\xff" + bytes(50),
        "that says more than it holds": b"II*\0\x08\0\0\0\xff\xff" + bytes(50),
        "that begins at its end": b"II*\0\x3b\0\0\0" + bytes(51),
    }.items():
        yield Case(f"EXIF {name}", with_exif(good, exif), size, colours)
    yield Case("eXIf of noise", png(ihdr(5, 4), chunk(b"eXIf", b"II*\0" + bytes(3)), IDAT, END), (5, 4))


def bombs() -> Iterator[Case]:
    for width, height in ((30_000, 30_000), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (8000, 8001)):
        found = f"claims {width} x {height} pixels, more than the cap of 64,000,000"
        yield Case(f"PNG of {width} x {height}", png(ihdr(width, height), IDAT, END), refusal=found)
    good = encoded(SMALL, "JPEG")
    frame = good.index(b"\xff\xc0")
    huge = good[: frame + 5] + struct.pack(">HH", 65500, 65500) + good[frame + 9 :]
    yield Case("JPEG of 65500 x 65500", huge, refusal="claims 65500 x 65500 pixels, more than the cap")
    claims = "claims 16384 x 16384 pixels, more than the cap"
    yield Case("lossless WebP of 16384 x 16384", riff(lossless(2**14, 2**14)), refusal=claims)
    yield Case("WebP canvas of 16384 x 16384", riff(canvas(2**14, 2**14), (b"VP8L", bytes(9))), refusal=DAMAGED)
    yield Case("WebP canvas of 2^24", riff(canvas(2**24, 2**24), lossless(2**14, 2**14)), refusal=TWO)
    yield Case("WebP of 8000 x 8000", riff(lossless(8000, 8000)), refusal="is a WebP and takes to decode 1,280 MB")
    three = sof(0xC2, 8000, 8000, 3) + segment(0xDA, b"\3\1\0\2\0\3\0\0\0\0") + b"\xff\xd9"
    found = "is in several scans and takes to decode 640 MB, more than the cap of 512 MB"
    yield Case("progressive JPEG of 8000 x 8000", b"\xff\xd8" + three, refusal=found)
    for width, count, most in ((64, 101, 100), (64, 5000, 100), (8000, 17, 16)):
        found = f"has {count} scans, more than the {most}"
        yield Case(f"JPEG of {width} x {width} with {count} scans", scans(width, width, count), refusal=found)
    yield Case("JPEG of 64 x 64 with 100 scans", scans(64, 64, 100), (64, 64))
    yield Case("JPEG of 2500 x 2500 with 100 scans", scans(2500, 2500, 100), (2500, 2500))
    yield Case("JPEG with 99 MB of data", good + bytes(99 * 10**6), refusal="has behind its header 99 MB")
    deep = png(ihdr(8000, 8000, 16, 6), IDAT, END)
    yield Case("16-bit RGBA of 8000 x 8000", deep, refusal="is unpacked to 512 MB, more than the cap of 192 MB")
    yield Case(
        "PNG that swells a thousandfold", png(ihdr(4000, 4000), chunk(b"IDAT", rows(12_000, 4000)), END), (4000, 4000)
    )
    yield Case("JPEG of 8000 x 8000", encoded(Image.new("L", (8000, 8000), 90), "JPEG"), (8000, 8000), ((90,) * 3,) * 4)
    zeros = zlib.compress(bytes(10**8), 9)
    for name, text in {"iCCP": b"a\0\0", "zTXt": b"a\0\0", "iTXt": b"a\0\1\0\0\0"}.items():
        bomb = chunk(name.encode(), text + zeros)
        yield Case(f"{name} that swells", png(ihdr(5, 4), bomb * 50, IDAT, bomb * 50, END), (5, 4), ((7,) * 3,) * 4)
    yield Case(
        "JPEG of a large profile",
        good[:2] + segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000)) * 255 + good[2:],
        (20, 12),
    )


def thin() -> Iterator[Case]:
    for width, height in ((1, 1), (1, 5000), (5000, 1), (2, 3)):
        pixels = np.full((height, width, 3), 90, np.uint8)
        for kind in ("JPEG", "PNG", "WEBP"):
            yield Case(
                f"{kind} of {width} x {height}", encoded(pixels, kind, lossless=True), (width, height), ((90,) * 3,) * 4
            )


def flips(seed: int) -> Iterator[tuple[str, bytes]]:
    """Images with a bit of their first bytes turned over, of which nothing is foretold."""
    random = np.random.default_rng(seed)
    seeds = [
        encoded(SMOOTH, kind, **o)
        for kind, o in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}))
    ]
    for n in range(200):
        content = bytearray(seeds[n % len(seeds)])
        bit = int(random.integers(0, 8 * min(len(content), 700)))
        content[bit // 8] ^= 1 << bit % 8
        yield f"flip {n}", bytes(content)


def run(folder: Path) -> Iterator[dict[str, object]]:
    """What became of each file, call by call: its size or the refusal, the seconds, and the memory so far."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for name, call in CALLS.items():
            yield {"case": path.name, "call": name}
            began = time.process_time()
            told: dict[str, object] = {}
            try:
                found = call(content)
                told = (
                    {"size": list(found)}
                    if isinstance(found, tuple)
                    else {"size": found.shape[1::-1], "corners": corners(found)}
                )
            except Undecodable as wrong:
                told = {"refusal": str(wrong)}
            peak = 1024 * int(PEAK.findall(Path("/proc/self/status").read_text())[0])
            yield {"case": path.name, "call": name, "seconds": time.process_time() - began, "peak": peak, **told}


if __name__ == "__main__":
    for line in run(Path(sys.argv[1])):
        print(json.dumps(line), flush=True)
