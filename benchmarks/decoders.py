"""How fast JPEG files become training images, by whom: python -m benchmarks.decoders photos=FOLDER [cifar=FOLDER]

From files in the page cache to uint8 [size, size, 3]: photographs cropped at random, 8 to 100 % of the area, to
224 x 224 and flipped; CIFAR's moved by up to 4 pixels and flipped. All take turns in this process; CPU time of one
thread, the median and the best of all turns. Ours reads the files and compares checksums, the others have the bytes in
memory. What the pixels differ by is counted against Pillow's whole decoding and resampling.
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import IO

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from data_loaders import native
from data_loaders.augment import PadCrop, Placing, Standard, placed
from data_loaders.decode import decode
from data_loaders.formats.read import read_header

TURNS, BATCH, MOST = 7, 64, 20_000
Images = NDArray[np.uint8]


class Files:
    """JPEG files, and how they come into their places."""

    def __init__(self, folder: Path, augmentation: Standard | PadCrop, size: int) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})[:MOST]
        if not paths:
            sys.exit(f"{folder} has no JPEG file")
        self.contents, self.size = [path.read_bytes() for path in paths], size
        sizes = np.array([read_header(content).upright for content in self.contents])
        self.placing: Placing = augmentation.place(sizes[:, 0], sizes[:, 1], size, 0, np.arange(len(paths)))
        self.file, self.rows = self._stored(sizes)

    def _stored(self, sizes: NDArray[np.int64]) -> tuple[IO[bytes], NDArray[np.void]]:
        file, rows = TemporaryFile(), np.zeros(len(sizes), native.ROW)  # noqa: SIM115
        lengths = np.array([len(content) for content in self.contents])
        rows["fd"], rows["length"], rows["offset"] = file.fileno(), lengths, np.cumsum(lengths) - lengths
        rows["crc32c"] = [google_crc32c.value(content) for content in self.contents]
        rows["width"], rows["height"] = sizes.T
        rows["place"] = np.arange(len(sizes)) % BATCH
        rows["box"], rows["shift"], rows["flip"] = self.placing
        file.write(b"".join(self.contents))
        file.flush()
        return file, rows

    def natively(self, fast: bool = True) -> float:
        images = np.zeros((BATCH, self.size, self.size, 3), np.uint8)
        began = time.thread_time()
        for start in range(0, len(self.rows), BATCH):
            native.load(self.rows[start : start + BATCH], images, fast)
        return time.thread_time() - began

    def one_by_one(self, work: Callable[[bytes, int], object]) -> float:
        began = time.thread_time()
        for place, content in enumerate(self.contents):
            work(content, place)
        return time.thread_time() - began

    def by_pillow(self, content: bytes, place: int) -> Images:
        """The slow path of the loader."""
        boxes, shifts, flips = self.placing
        return placed(decode(content), boxes[place], shifts[place], flips[place], self.size)

    def by_torchvision(self, content: bytes, place: int) -> torch.Tensor:
        boxes, shifts, flips = self.placing
        found = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        assert isinstance(found, torch.Tensor)
        left, top, width, height = np.rint(boxes[place]).astype(int).tolist()
        if found.shape[1:] != (self.size, self.size) or (width, height) != (self.size, self.size):
            found = functional.resized_crop(found, top, left, height, width, [self.size] * 2, antialias=True)
        down, right = shifts[place].tolist()
        if down or right:
            found = functional.crop(found, -down, -right, self.size, self.size)
        return found.flip(-1) if flips[place] & 1 else found

    def differences(self) -> str:
        """Of ours from Pillow's, in levels."""
        images, found = np.zeros((BATCH, self.size, self.size, 3), np.uint8), list[Images]()
        for start in range(0, min(len(self.rows), 1000), BATCH):
            rows = self.rows[start : start + BATCH]
            native.load(rows, images)
            expected = [self.by_pillow(self.contents[start + place], start + place) for place in range(len(rows))]
            found += [np.abs(image.astype(int) - wanted) for image, wanted in zip(images, expected, strict=False)]
        levels = np.stack(found)
        high = np.quantile(levels, 0.999)
        return f"mean {levels.mean():.3f}, 99.9 % are within {high:.0f}, the greatest is {levels.max()}"


def main(words: list[str]) -> None:
    folders = dict(word.split("=", 1) for word in words)
    if not folders or folders.keys() - {"photos", "cifar"}:
        sys.exit("which? photos=FOLDER [cifar=FOLDER]")
    torch.set_num_threads(1)
    if "photos" in folders:
        table("photographs", Files(Path(folders["photos"]), Standard(area=(0.08, 1.0)), 224))
    if "cifar" in folders:
        table("CIFAR", Files(Path(folders["cifar"]), PadCrop(), 32))


def table(name: str, files: Files) -> None:
    works: dict[str, Callable[[], float]] = {
        "Pillow, decoding alone": lambda: files.one_by_one(lambda c, _: np.asarray(Image.open(io.BytesIO(c)))),
        "Pillow, the slow path": lambda: files.one_by_one(files.by_pillow),
        "torchvision.io, resized_crop": lambda: files.one_by_one(files.by_torchvision),
    }
    if native.NAME:
        works |= {native.NAME: files.natively, "  without vector instructions": lambda: files.natively(fast=False)}
    taken: dict[str, list[float]] = {what: [] for what in works}
    for _ in range(TURNS):
        for what, work in works.items():
            taken[what].append(work())
    count, base = len(files.contents), taken["Pillow, the slow path"]
    print(
        f"{count:,} files of {name}, {np.mean([len(c) for c in files.contents]) / 1e3:.1f} KB, to {files.size} pixels"
    )
    for what, seconds in taken.items():
        ratios = [theirs / ours for theirs, ours in zip(base, seconds, strict=True)]
        best, usual = count / min(seconds), count / median(seconds)
        print(f"{what:34}{usual:10,.0f}/s, best {best:9,.0f}/s; {median(ratios):5.2f} times the slow path")
    if native.NAME:
        left = int((files.rows["status"] != 0).sum())
        print(f"{left} of {count:,} left to the slow path; levels from Pillow's: {files.differences()}")


if __name__ == "__main__":
    main(sys.argv[1:])
