"""How sure a number is: intervals of proportions, of means and of what is made of them, and the bootstrap of counts.

Arrays of any shape; a number that nothing was counted for is NaN, and so is its interval.
"""

from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.metrics.tally import Ints

Floats = NDArray[np.float64]
LEVEL = 0.95
REPLICATES = 2000
DRAWN = 2**23
"""Entries that a bootstrap holds at once."""


class Statistic(Protocol):
    """What a metric rests on."""

    @property
    def value(self) -> Floats: ...
    @property
    def n(self) -> Ints:
        """Samples that it rests on."""
        ...

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]: ...


def divide(part: NDArray | float, whole: NDArray | float) -> Floats:
    """part / whole, and NaN where the whole is 0."""
    whole = np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)


def log_of(values: NDArray) -> Floats:
    """Natural logarithm; of 0 it is minus infinity."""
    return np.log(values, out=np.full(np.shape(values), -np.inf), where=~(np.asarray(values) <= 0))


def z_of(level: float) -> float:
    """Standard deviations to either side of a normal interval."""
    return NormalDist().inv_cdf((1 + level) / 2)


def wilson(hits: NDArray, trials: NDArray, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Score interval of a proportion (Wilson 1927)."""
    z = z_of(level)
    p, n = divide(hits, trials), np.where(trials > 0, trials, np.nan)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(np.maximum(p * (1 - p), 0) / n + z**2 / (4 * n**2))
    return np.where(p <= 0, 0, middle - half), np.where(p >= 1, 1, middle + half)


def difference(a: Statistic, b: Statistic, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Interval of a less b, of independent samples: method 10 of Newcombe (1998)."""
    (la, ha), (lb, hb) = a.interval(level), b.interval(level)
    return a.value - b.value - np.hypot(a.value - la, hb - b.value), a.value - b.value + np.hypot(
        ha - a.value, b.value - lb
    )


def mean_of(value: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Interval of the mean over the last axis of independent numbers with these intervals, those that are NaN left out:
    Newcombe's method for more than two (Zou & Donner 2008)."""
    n = (~np.isnan(value)).sum(-1)
    mean = divide(np.nansum(value, -1), n)
    below, above = (divide(np.sqrt(np.nansum((value - end) ** 2, -1)), n) for end in (low, high))
    return mean - below, mean + above


def lowest(values: Floats, axis: int = 0) -> Floats:
    """Smallest along an axis, those without a value left out; NaN where none has one."""
    found = np.min(np.where(np.isnan(values), np.inf, values), axis, initial=np.inf)
    return np.where(np.isinf(found), np.nan, found)


def highest(values: Floats, axis: int = 0) -> Floats:
    """Largest, likewise."""
    return -lowest(-values, axis)


def simultaneous(level: float, parts: int) -> float:
    """Level of each of several independent intervals that all hold at once at `level` (Šidák 1967)."""
    return level ** (1 / max(parts, 1))


def bootstrap(
    metric: Callable[[Ints], Floats], counts: Ints, level: float = LEVEL, seed: int = 0
) -> tuple[Floats, Floats]:
    """Percentile interval, [G, …], of a metric of counts [G, cells]: counts [R, G, cells] -> [R, G, …].

    A multinomial draw of the counts of a group has the distribution of resampled rows, without the rows.
    """
    values = np.concatenate([metric(drawn) for drawn in resampled(counts, seed)])
    tail = 100 * (1 - level) / 2
    absent = np.isnan(values).all(0)
    low, high = np.nanpercentile(np.where(absent, 0.0, values), [tail, 100 - tail], axis=0)
    return np.where(absent, np.nan, low), np.where(absent, np.nan, high)


def resampled(counts: Ints, seed: int = 0) -> Iterator[Ints]:
    """REPLICATES draws of counts [G, cells], each group by itself, in parts [R, G, cells]."""
    random = np.random.Generator(np.random.Philox(key=[seed, counts.size]))
    occurs = np.flatnonzero(counts.any(0)) if counts.any() else np.zeros(1, np.int64)
    n, shares = counts.sum(1), np.where(counts.any(1, keepdims=True), counts, 1)[:, occurs].astype(np.float64)
    shares /= shares.sum(1, keepdims=True)
    each = max(1, DRAWN // counts.size)
    for start in range(0, REPLICATES, each):
        drawn = np.zeros((min(each, REPLICATES - start), *counts.shape), np.int64)
        drawn[..., occurs] = random.multinomial(n, shares, drawn.shape[:2])
        yield drawn


def benjamini_hochberg(p: Floats) -> Floats:
    """[M] p values adjusted so that, of those told at a level, that share is false on average (Benjamini & Hochberg
    1995); NaN is no test."""
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))][::-1]
    steps = p[order] * len(order) / np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.minimum.accumulate(steps), 1)
    return adjusted
