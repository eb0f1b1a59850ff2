"""How large the images of a split are, of all and of each class, from the index alone."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_loaders.index import Index, Ints


class Spread(NamedTuple):
    """Of n numbers; NaN where there are none."""

    n: int
    least: float
    median: float
    most: float


class Sizes(NamedTuple):
    """Of the images of one class, or of all."""

    name: str
    """Of the class; empty for all."""
    width: Spread
    """Pixels, of the upright image."""
    height: Spread
    aspect: Spread
    """Width / height."""
    bytes: Spread
    """Of the image file."""
    quality: Spread
    """Of the JPEGs among them, 1 … 100."""


def sizes(index: Index, rows: Ints) -> list[Sizes]:
    """Of all these rows, then of each class that has some."""
    labels = index.labels[rows]
    parts = [("", rows), *((name, rows[labels == k]) for k, name in enumerate(index.classes))]
    return [_sizes(index, name, part) for name, part in parts if len(part) or not name]


def _sizes(index: Index, name: str, rows: Ints) -> Sizes:
    width, height, quality = index.width[rows], index.height[rows], index.quality[rows]
    return Sizes(
        name,
        spread(width),
        spread(height),
        spread(width / height),
        spread(index.length[rows]),
        spread(quality[quality > 0]),
    )


def spread(values: NDArray[np.generic]) -> Spread:
    """The median is the lower of two middle ones, so that it is one of the values."""
    if not len(values):
        return Spread(0, float("nan"), float("nan"), float("nan"))
    ordered = np.sort(values)
    least, median, most = (float(ordered[place]) for place in (0, (len(values) - 1) // 2, -1))
    return Spread(len(values), least, median, most)
