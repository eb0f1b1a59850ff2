"""What the checksum of every row costs: the training stream's work for a row, with and without it, in turns.

CPU time of one thread. Whether a row comes with or without the checksum first changes from row to row.
"""

import csv
import time
from contextlib import closing
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from data_loaders.decode import decode
from data_loaders.index import Reader
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.loader import Data
from data_loaders.sources.csv_file import Csv

PHOTOS, PAIRS = 100, 6000


class Unchecked(Reader):
    """Takes what it reads as it is."""

    def agrees(self, row: int, content: bytes) -> bool:
        return True


class Timed(Reader):
    """Knows how long its checks took, between the decoding of one image and the next, with the caches as they are."""

    seconds = 0.0

    def agrees(self, row: int, content: bytes) -> bool:
        began = time.thread_time()
        whole = super().agrees(row, content)
        self.seconds += time.thread_time() - began
        return whole


def measure(photos: Path | None) -> str:
    """Of a folder of photographs, or else of synthetic ones."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, photos or synthetic(folder / "photos"))
        data = Data(path=folder / "data")
        index = data.index()
        rows = len(index.labels)
        turns = max(2, PAIRS // rows)
        with closing(Reader(index)) as checked, closing(Unchecked(index)) as unchecked, closing(Timed(index)) as timed:

            def seconds(reader: Reader, row: int) -> float:
                began = time.thread_time()
                data.augmentation.augmented(decode(reader.read(row)), data.size, 0, row)
                return time.thread_time() - began

            took = np.zeros((2, turns * rows))
            for turn, row in product(range(turns), range(rows)):
                for side in (0, 1) if (turn + row) % 2 else (1, 0):
                    took[side, turn * rows + row] = seconds((checked, unchecked)[side], row)
            for row in range(rows):
                seconds(timed, row)
        us, more = took.mean(1) * 1e6, (took[0] - took[1]) * 1e6
        kind = "photographs" if photos else "synthetic photographs"
        error, inside = more.std() / np.sqrt(len(more)), timed.seconds / rows * 1e6
        return "\n".join(
            [
                f"{rows} {kind} of {index.length.mean() / 1e3:.0f} KB, {turns} turns: {us[0]:.0f} us a row with the "
                f"checksum, {us[1]:.0f} without; ratio {us[0] / us[1]:.4f}",
                f"share of the checksum: {more.mean() / us[0]:.2%} ± {error / us[0]:.2%} (standard error) by the "
                f"difference, whose median is {np.median(more) / us[0]:.2%}; {inside / us[0]:.2%} by the clock "
                f"around it ({inside:.0f} us)",
            ]
        )


def make(folder: Path, photos: Path) -> None:
    """A data set of all JPEG files under `photos`, which have no labels: every other one is of the other class."""
    files = sorted(path for path in photos.resolve().rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    with (folder / "photos.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["path", "label", "split"])
        out.writerows([path, "ab"[number % 2], "train"] for number, path in enumerate(files))
    source = Csv(path=folder / "photos.csv", root=photos.resolve(), split_column="split")
    ingest(Ingest(source=source, out=folder / "data"), in_processes(1))


def synthetic(folder: Path) -> Path:
    """JPEG files of 500 x 375 with structure at every scale, of some 110 KB."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(PHOTOS):
        pixels = np.zeros((375, 500, 3))
        for side in (4, 16, 64, 256):
            noise = Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8))
            pixels += np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) / 4
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)
    return folder
