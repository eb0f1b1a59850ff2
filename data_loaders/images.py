"""Rows -> images in their places: read, checked, decoded no further than the crop needs, resampled and augmented.

A JPEG goes through the native library if that was built; whatever it leaves (other formats and kinds, and all that is
damaged) goes through Pillow, row by row, which either makes the image or says what is wrong with which row.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple, TypeVar

import google_crc32c
import numpy as np
import PIL
from numpy.typing import NDArray

from data_loaders import native
from data_loaders.augment import AnyAugmentation, Placing, centre, centred, placed
from data_loaders.decode import Pixels, Undecodable, decode
from data_loaders.faults import Fault
from data_loaders.formats.header import PIXEL_CAP
from data_loaders.formats.read import read_header
from data_loaders.index import DamagedRow, Index, Ints, Reader, Samples
from data_loaders.manifest import SHARDS
from data_loaders.staging import StagedReader
from data_loaders.stream import Floats

T = TypeVar("T")
Decoder = Literal["auto", "pillow", "gpu"]
CAUSES = ("read", "decode", "augment")
"""What a thread spends its time on."""
PROBES = 8
"""Rows of a batch that are looked for in the memory of the system."""


def decoder_name(decoder: Decoder) -> str:
    """Of what makes pixels of a JPEG here: two of them may differ by some levels."""
    return native.NAME if decoder != "pillow" and native.NAME else f"Pillow {PIL.__version__}"


@dataclass(frozen=True)
class Recipe:
    """What becomes of a row, wherever that is done."""

    size: int
    """Height and width, in pixels."""
    decoder: Decoder
    augmentation: AnyAugmentation | None = None
    """None is the centred square that evaluation sees."""
    seed: int = 0
    cache: Path | None = None
    """Of copies of shards."""
    alters: bool = False
    """Whether pixels are altered too; where it is not, the device does that."""

    def placing(self, widths: Ints, heights: Ints, positions: Ints) -> Placing:
        if self.augmentation is None:
            return centre(widths, heights)
        return self.augmentation.place(widths, heights, self.size, self.seed, positions)

    def alter(self, images: NDArray[np.uint8], positions: Ints) -> None:
        """Images [B, size, size, 3], in place."""
        if self.alters and self.augmentation is not None:
            import torch

            found = self.augmentation.alter(torch.from_numpy(images).permute(0, 3, 1, 2), self.seed, positions)
            images[:] = found.permute(0, 2, 3, 1).numpy()


class Filled(NamedTuple):
    """What it took to fill places, and what could not be had."""

    seconds: Floats
    """Of each of CAUSES, [3]."""
    damaged: list[tuple[int, DamagedRow]]
    """Place, and what is wrong with its row."""
    files: list[tuple[int, bytes]]
    """Place, and the JPEG that a GPU is to decode."""


class Encoded(NamedTuple):
    """JPEGs of a batch that are still to be decoded, by a GPU."""

    rows: list[int]
    """Of the data set, [N]."""
    places: list[int]
    """Of the batch, [N]."""
    files: list[bytes]
    """[N]"""
    placing: Placing
    """Of all places of the batch."""


class Filler:
    """Makes images of rows. Safe to call from several threads."""

    def __init__(self, index: Index, recipe: Recipe) -> None:
        self.index, self.recipe = index, recipe
        self.reader = StagedReader(index, recipe.cache) if recipe.cache else Reader(index)
        self._is_native = recipe.decoder != "pillow" and bool(native.NAME)

    def fill(self, rows: Ints, positions: Ints, images: NDArray[np.uint8]) -> Filled:
        """The images of rows [B] at positions of the stream, into [B, size, size, 3]."""
        samples = self.index.samples(rows)
        placing = self.recipe.placing(samples.width, samples.height, positions)
        began, read, files = perf_counter(), 0.0, list[tuple[int, bytes]]()
        left, unsure = list(range(len(rows))), set[int]()
        if self.recipe.decoder == "gpu":
            files = [(place, file) for place in left if (file := self._plain(int(rows[place]), placing.boxes[place]))]
            left = sorted({*left} - {place for place, _ in files})
        elif self._is_native:
            status, read = self._natively(samples, placing, images)
            left, unsure = np.flatnonzero(status).tolist(), set(np.flatnonzero(np.isin(status, native.UNSURE)).tolist())
        damaged = list[tuple[int, DamagedRow]]()
        for place in left:
            wrong, seconds = self._one(int(rows[place]), placing, images, place, place in unsure)
            damaged += [(place, wrong)] if wrong else []
            read += seconds
        then = perf_counter()
        if len(damaged) < len(rows):
            self.recipe.alter(images, positions)
        return Filled(np.array([read, then - began - read, perf_counter() - then]), damaged, files)

    def expect(self, rows: Ints) -> None:
        """Has the system read these rows ahead, all at once, if one of a few of them is not in its memory: to ask for
        each costs a small image as much as to read it."""
        probes = self.index.samples(rows[:: max(len(rows) // PROBES, 1)])
        with suppress(OSError):  # which the one who reads meets again
            if any(self._is_far(probes, place) for place in range(len(probes.shard))):
                samples = self.index.samples(rows)
                for place in np.lexsort((samples.offset, samples.shard)).tolist():
                    handle = self.reader.handle(int(samples.shard[place]))
                    span = int(samples.offset[place]), int(samples.length[place])
                    os.posix_fadvise(handle.number, *span, os.POSIX_FADV_WILLNEED)

    def _is_far(self, samples: Samples, place: int) -> bool:
        """Whether a row would have to be waited for, or the file system does not tell."""
        handle = self.reader.handle(int(samples.shard[place]))
        try:
            os.preadv(handle.number, [bytearray(1)], int(samples.offset[place]), os.RWF_NOWAIT)
        except OSError as wrong:
            return wrong.errno in {errno.EAGAIN, errno.EOPNOTSUPP}
        return False

    def close(self) -> None:
        self.reader.close()

    def _natively(self, samples: Samples, placing: Placing, images: NDArray[np.uint8]) -> tuple[Ints, float]:
        """Status of each place, [B], and the seconds that it took to read."""
        shards = samples.shard.tolist()
        handles = {}  # held until the library is done: another thread may close what nobody holds
        for shard in set(shards):
            with suppress(OSError):  # which the slow path meets again, and names
                handles[shard] = self.reader.handle(shard)
        todo = np.zeros(len(shards), native.ROW)
        todo["fd"] = [handles[shard].number if shard in handles else -1 for shard in shards]
        for name in ("offset", "length", "width", "height"):
            todo[name] = getattr(samples, name)
        todo["crc32c"], todo["raw"], todo["place"] = samples.image_crc32c, self.index.side, np.arange(len(shards))
        todo["box"], todo["shift"], todo["flip"] = placing.boxes, placing.shifts, placing.flips
        read, _ = native.load(todo, images)
        return todo["status"], read / 1e9

    def _plain(self, row: int, box: Floats) -> bytes | None:
        """The file of a row, where a GPU decodes it as the host does: an upright JPEG, RGB or grey, of which the box is
        a part."""
        if self.index.side:
            return None
        width, height = self.index.width[row], self.index.height[row]
        is_inside = box[:2].min() >= 0 and box[0] + box[2] <= width and box[1] + box[3] <= height
        with suppress(DamagedRow, Undecodable):
            content = self.reader.read(row)
            header = read_header(content, pixel_cap(self.index, row))
            if is_inside and header.format == "JPEG" and header.mode in {"RGB", "L"} and header.orientation == 1:
                return content
        return None

    def _again(self, content: bytes, row: int, placing: Placing, place: int, images: NDArray[np.uint8]) -> bool:
        size = int(self.index.width[row]), int(self.index.height[row])
        return natively(content, size, placing, place, images[place], self.index.side)

    def _one(
        self, row: int, placing: Placing, images: NDArray[np.uint8], place: int, unsure: bool
    ) -> tuple[DamagedRow | None, float]:
        """What is wrong with a row, and the seconds that it took to read. Where the library could not read it, it gets
        another chance, so that pixels do not depend on luck."""
        began = then = perf_counter()
        try:
            content = self.reader.read(row)
            then = perf_counter()
            if not unsure or not self._again(content, row, placing, place, images):
                image = made(self.index, row, content, decode)
                box, shift, flip = placing.boxes[place], placing.shifts[place], int(placing.flips[place])
                images[place] = placed(image, box, shift, flip, self.recipe.size)
        except DamagedRow as wrong:
            return wrong, then - began
        return None, then - began


def natively(
    content: bytes, size: tuple[int, int], placing: Placing, place: int, image: NDArray[np.uint8], side: int = 0
) -> bool:
    """Whether the library brings the file of an upright image of this width and height into its place, [S, S, 3]."""
    todo = np.zeros(1, native.ROW)
    todo["length"], todo["crc32c"], todo["raw"] = len(content), google_crc32c.value(content), side
    (todo["width"], todo["height"]), todo["box"] = size, placing.boxes[place]
    todo["shift"], todo["flip"] = placing.shifts[place], placing.flips[place]
    with open(os.memfd_create("row", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        file.write(content)
        todo["fd"] = file.fileno()
        native.load(todo, image[None])
    return not todo["status"][0]


def evaluated(content: bytes, size: int, decoder: Decoder) -> Pixels:
    """The image of a file as evaluation sees it, [size, size, 3]. Raises Undecodable."""
    if decoder != "pillow" and native.NAME:
        width, height = read_header(content, PIXEL_CAP).upright
        image = np.empty((size, size, 3), np.uint8)
        if natively(content, (width, height), centre(np.array([width]), np.array([height])), 0, image):
            return image
    return centred(decode(content), size)


def picture(reader: Reader, row: int) -> Pixels:
    """The upright image of a row. Raises DamagedRow."""
    return made_of(reader, row, decode)


def made_of(reader: Reader, row: int, work: Callable[[bytes, int, int], T]) -> T:
    """What `work` makes of the image file of a row and of the most pixels that it may have. Raises DamagedRow, also
    where `work` raises Undecodable."""
    return made(reader.index, row, reader.read(row), work)


def made(index: Index, row: int, content: bytes, work: Callable[[bytes, int, int], T]) -> T:
    """As `made_of`, of a file that was read. The ingest may have had a higher cap than the usual one."""
    try:
        return work(content, pixel_cap(index, row), index.side)
    except Undecodable as wrong:
        raise undecodable(index, row, wrong) from wrong


def pixel_cap(index: Index, row: int) -> int:
    """Most pixels that the image of a row may have: those that the ingest has seen, which may have had a higher cap."""
    return max(PIXEL_CAP, int(index.width[row]) * int(index.height[row]))


def undecodable(index: Index, row: int, wrong: Undecodable) -> DamagedRow:
    """What is wrong with the image file of a row."""
    short = isinstance(wrong.__cause__, MemoryError)
    fix = "give it more memory, or fewer threads" if short else "ingest again with shards.check=decode"
    where = index.folder / SHARDS / index.shards[index.shard[row]]
    fault = Fault(str(where), f"row {row} ({index.id_of(row)}) {wrong}", fix)
    damaged = DamagedRow("An image cannot be decoded:", [fault], 65)
    damaged.lasts = not short
    return damaged
