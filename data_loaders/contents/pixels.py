"""Mean and standard deviation of the channels, exactly: sums of whole numbers, in any order the same."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_loaders.audit.reading import AT_ONCE, THREADS
from data_loaders.augment import centred
from data_loaders.decode import Pixels
from data_loaders.images import picture
from data_loaders.index import Index, Ints, Reader
from data_loaders.progress import Progress


class Channels(NamedTuple):
    """Of the pixels of one class, or of all; black is 0 and white is 1, as torchvision's Normalize has it."""

    name: str
    """Of the class; empty for all."""
    images: int
    pixels: int
    mean: tuple[float, ...]
    """Of red, green and blue; NaN where there is no pixel."""
    std: tuple[float, ...]
    """Of the pixels about that mean, divided by their number."""


def channels(index: Index, rows: Ints, size: int | None = None) -> list[Channels]:
    """Of all rows, then of each class that has some.

    With `size`, of their centred squares in so many pixels, as a model sees them: each image counts the same. Without
    it, of all pixels: each pixel does.
    """
    progress, done = Progress("pixels", len(rows), "images"), 0
    found = np.zeros((len(index.classes), 3, 256), np.int64)
    images = np.bincount(index.labels[rows], minlength=len(index.classes))
    with closing(Reader(index)) as reader, ThreadPoolExecutor(THREADS, "pixels") as pool:
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            histograms = pool.map(lambda row: _histogram(picture(reader, row), size), part.tolist())
            for label, histogram in zip(index.labels[part].tolist(), histograms, strict=True):
                found[label] += histogram
            done += len(part)
            progress.show(done)
    return [Channels("", len(rows), *_moments(found.sum(0))), *_by_class(index, images, found)]


def _by_class(index: Index, images: Ints, found: Ints) -> Iterator[Channels]:
    for name, count, histogram in zip(index.classes, images.tolist(), found, strict=True):
        if count:
            yield Channels(name, count, *_moments(histogram))


def _histogram(pixels: Pixels, size: int | None) -> Ints:
    """Pixels of each value of each channel, [3, 256]."""
    image = Image.fromarray(pixels if size is None else centred(pixels, size))
    return np.array(image.histogram(), np.int64).reshape(3, 256)


def _moments(histogram: Ints) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Pixels, mean and standard deviation of each channel, from whole numbers without bound."""
    n = int(histogram[0].sum())
    if not n:
        return 0, (math.nan,) * 3, (math.nan,) * 3
    sums = [
        [sum(count * value**power for value, count in enumerate(c)) for power in (1, 2)] for c in histogram.tolist()
    ]
    return (
        n,
        tuple(total / (255 * n) for total, _ in sums),
        tuple(math.sqrt((n * squares - total**2) / (255 * n) ** 2) for total, squares in sums),
    )
