"""How sure a difference is when both sides saw the same rows, as a probe's always do."""

from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr
from scipy.stats import t

from trainer.metrics.catalogue import Floats, divide
from trainer.metrics.intervals import LEVEL, REPLICATES, wilson
from trainer.metrics.tally import Ints

LEAST = 20
"""Rows of a cell that is tested and may be named."""
ROUNDING = 1e-12


class Number(NamedTuple):
    """A value with its 95 % interval and n."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def signed(self) -> str:
        return "–" if np.isnan(self.value) else f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


class Standing(NamedTuple):
    """Means of C cells against what they are where the rows of a stratum change cells at random, [C]."""

    others: Floats
    """Mean of the other rows of the stratum; NaN where there are none."""
    expected: Floats
    """Mean by chance: that of the stratum."""
    deviation: Floats
    """Standard deviation of the cell's mean by chance."""
    p: Floats
    """Two-sided; NaN of cells of fewer than LEAST rows, of cells with as few other rows in the stratum, and where all
    values are the same."""


def rate(hits: np.ndarray) -> Number:
    """Of hits [N], with Wilson's interval."""
    low, high = wilson(np.array(hits.sum()), np.array(len(hits)))
    return Number(float(hits.mean()) if len(hits) else np.nan, float(low), float(high), len(hits))


def rates(hits: np.ndarray, cell: Ints, cells: int) -> list[Number]:
    """Of hits [N] in each of the cells, [C], with Wilson's interval."""
    n, right = np.bincount(cell, minlength=cells), np.bincount(cell[hits], minlength=cells)
    return numbers(divide(right, n), *wilson(right, n), n)


def change(before: np.ndarray, after: np.ndarray) -> Number:
    """The rate of `after` less that of `before`, hits [N] of the same rows: Newcombe 1998 (paired), method 10.

    Unlike a bootstrap, it has width where no row changes.
    """
    return changes(before, after, np.zeros(len(before), np.int64), 1)[0]


def changes(before: np.ndarray, after: np.ndarray, cell: Ints, cells: int) -> list[Number]:
    """The `change` in each of the cells, [C], of hits [N] whose cell is [N]; rows of cell -1 are in none."""
    listed = cell >= 0
    both, later, former, n = (
        np.bincount(cell[listed & hits], minlength=cells) for hits in (before & after, after, before, listed)
    )
    return paired(both, later, former, n)


def paired(both: Ints, after: Ints, before: Ints, n: Ints) -> list[Number]:
    """The change of a rate, [C], from counts [C] of rows that hit both times, after, before, and of all rows."""
    p, q = divide(after, n), divide(before, n)
    (low, high), (q_low, q_high) = wilson(after, n), wilson(before, n)
    phi = _correlation(both, after, before, n)
    below = (p - low) ** 2 - 2 * phi * (p - low) * (q_high - q) + (q_high - q) ** 2
    above = (high - p) ** 2 - 2 * phi * (high - p) * (q - q_low) + (q - q_low) ** 2
    bounds = p - q - np.sqrt(np.maximum(below, 0)), p - q + np.sqrt(np.maximum(above, 0))
    return numbers(p - q, *bounds, n)


def mean(values: Floats, cell: Ints, cells: int) -> list[Number]:
    """Of values [N] in each of the cells, [C], with Student's interval, which needs two rows; cell -1 is none."""
    listed = cell >= 0
    values, cell = values[listed], cell[listed]
    n = np.bincount(cell, minlength=cells)
    middle = divide(np.bincount(cell, values, cells), n)
    squares = np.bincount(cell, (values - middle[cell]) ** 2, cells)
    half = t.ppf((1 + LEVEL) / 2, np.maximum(n - 1, 1)) * np.sqrt(divide(divide(squares, np.maximum(n - 1, 0)), n))
    return numbers(middle, middle - half, middle + half, n)


def numbers(value: Floats, low: Floats, high: Floats, n: Ints) -> list[Number]:
    """Arrays [C] as a list."""
    columns = (column.tolist() for column in np.broadcast_arrays(value, low, high, n))
    return [Number(*line) for line in zip(*columns, strict=True)]


def standing(values: Floats, cell: Ints, cells: int, stratum: Ints, step: float = 0.0) -> Standing:
    """Of values [N] in cells [N], each within one stratum [N]; cell -1 is none, but counts for its stratum.

    The moments of the permutation distribution are exact and its shape is taken as normal (Hoeffding 1951). `step` is
    the distance of neighbouring values where there are few, for the correction for continuity (Yates 1934).
    """
    listed, of = cell >= 0, np.zeros(cells, np.int64)
    of[cell[listed]] = stratum[listed]
    n, size = np.bincount(cell[listed], minlength=cells), np.bincount(stratum, minlength=1)
    total, sums = np.bincount(cell[listed], values[listed], cells), np.bincount(stratum, values, len(size))
    middle = divide(sums, size)
    variance = divide(np.bincount(stratum, (values - middle[stratum]) ** 2, len(size)), size)[of]
    rest = np.where(n > 0, size[of] - n, 0)
    deviation = np.sqrt(variance * divide(rest, n * np.maximum(size[of] - 1, 1)))
    tested = (np.minimum(n, rest) >= LEAST) & (deviation > ROUNDING)
    off = np.abs(divide(total, n) - middle[of]) - divide(np.full(cells, step / 2), n)
    z = divide(np.maximum(off, 0), np.where(tested, deviation, 0))
    return Standing(divide(sums[of] - total, rest), np.where(n > 0, middle[of], np.nan), deviation, 2 * ndtr(-z))


def by_chance(s: Standing) -> tuple[Floats, Floats]:
    """Where the means of the cells lie by chance in 95 of 100 cases, [C] each."""
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * s.deviation
    return s.expected - half, s.expected + half


def resampled(labels: Ints, values: Floats, seed: int) -> Iterator[Floats]:
    """Means of values [N, V] in REPLICATES bootstraps of the rows of each class that occurs, in order: [REPLICATES, V].

    The same rows are drawn for all V, so their differences are paired.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, len(labels)]))
    for k in np.unique(labels):
        of_class = values[labels == k]
        n = len(of_class)
        yield random.multinomial(n, np.full(n, 1 / n), REPLICATES) @ of_class / n


def percentiles(replicates: Floats) -> tuple[float, float]:
    """The interval at LEVEL of replicates [R]."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return float(low), float(high)


def _correlation(both: Ints, first: Ints, second: Ints, n: Ints) -> Floats:
    """Phi of two hits, [C], corrected for continuity where it is positive; 0 where a margin is empty."""
    neither = n - first - second + both
    product = 1.0 * first * (n - first) * second * (n - second)  # beyond int64 from 100,000 rows on
    cross = 1.0 * both * neither - 1.0 * (first - both) * (second - both)
    corrected = np.where(cross > 0, np.maximum(cross - n / 2, 0), cross)
    return np.divide(corrected, np.sqrt(product), out=np.zeros(len(n)), where=product > 0)
