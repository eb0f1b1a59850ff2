"""Means of bounded values, such as costs, by group and class, brought to any prior, with intervals in closed form.

An interval of one stratum has width even where its rows agree, as a bootstrap has not. Strata are added by the
distances from each mean to its limits (MOVER: Zou & Donner 2008), as Newcombe's interval of a difference does.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_loaders.faults import Fault, Refusal
from trainer.metrics.catalogue import Floats, divide
from trainer.metrics.intervals import LEVEL
from trainer.metrics.tally import Ints


class Number(NamedTuple):
    """A value with its interval at LEVEL and n; NaN where it is missing."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Means(NamedTuple):
    """Values with their intervals at LEVEL and the rows they rest on; arrays of one shape, NaN where there is none."""

    value: Floats
    low: Floats
    high: Floats
    n: Ints

    def at(self, *place: int) -> Number:
        """One of them; without a place, the only one."""
        value, low, high, n = (part[place] for part in self)
        return Number(float(value), float(low), float(high), int(n))


class Moments(NamedTuple):
    """Rows, sum and sum of squares of values by group and class, [G, K] each."""

    n: Ints
    total: Floats
    squares: Floats

    def others(self) -> "Moments":
        """Of all groups but each."""
        return Moments(*(part.sum(0) - part for part in self))


def moments(values: Floats, labels: Ints, groups: Ints, shape: tuple[int, int]) -> Moments:
    """Of values, labels and groups [N]; `shape` is (G, K)."""
    place = groups * shape[1] + labels
    cells = shape[0] * shape[1]
    total, squares = np.bincount(place, values, cells), np.bincount(place, values**2, cells)
    n = np.bincount(place, minlength=cells)
    return Moments(n.reshape(shape), total.astype(np.float64).reshape(shape), squares.astype(np.float64).reshape(shape))


def means(m: Moments, least: Floats, most: Floats) -> Means:
    """Of values that lie between `least` and `most`, which broadcast to [G, K].

    Wilson's interval (1927) where they are 0 and 1; else the same with their own variance in place of p (1 - p).
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    mean, n = divide(m.total, m.n), np.where(m.n > 0, m.n, np.nan)
    variance = np.maximum(divide(m.squares, m.n) - mean**2, 0)
    middle = (n * mean + z**2 * (least + most) / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(n * variance + z**2 * (most - least) ** 2 / 4)
    low, high = np.minimum(np.maximum(middle - half, least), mean), np.maximum(np.minimum(middle + half, most), mean)
    return Means(mean, low, high, m.n.astype(np.int64))


def combined(m: Means, weights: Floats) -> Means:
    """Sum over the last axis of weights times means; NaN where a mean that has weight is missing."""
    weights = np.broadcast_to(weights, np.broadcast_shapes(weights.shape, m.value.shape))
    value = np.where(weights != 0, weights * m.value, 0).sum(-1)
    below, above = m.value - m.low, m.high - m.value
    down = np.where(weights != 0, weights * np.where(weights > 0, below, above), 0)
    up = np.where(weights != 0, weights * np.where(weights > 0, above, below), 0)
    low, high = value - np.sqrt((down**2).sum(-1)), value + np.sqrt((up**2).sum(-1))
    return Means(value, low, high, np.where(weights != 0, m.n, 0).sum(-1))


def difference(a: Means, b: Means) -> Means:
    """a less b, of rows that are independent."""
    value = a.value - b.value
    low = value - np.hypot(a.value - a.low, b.high - b.value)
    return Means(value, low, value + np.hypot(a.high - a.value, b.value - b.low), a.n + b.n)


def by_group(m: Moments, least: Floats, most: Floats, prior: Floats) -> Means:
    """[G] the mean that a group has where its classes are as frequent as they are in its rows, once all rows count as
    the prior [K] has it."""
    weights = m.n * divide(prior, m.n.sum(0))
    weights = np.where(m.n > 0, weights, 0)
    shares = np.where(m.n > 0, divide(weights, weights.sum(1, keepdims=True)), 0)
    found = combined(means(m, least, most), shares)
    return _without(found, m.n.sum(1) == 0)


def group_gaps(m: Moments, least: Floats, most: Floats, prior: Floats) -> Means:
    """[G] the mean of a group less that of all others, both with the same mix of classes: the prior [K] over classes
    that both have (direct standardisation). NaN where they share none."""
    others = m.others()
    shared = (m.n > 0) & (others.n > 0)
    weights = np.where(shared, prior, 0)
    weights = np.where(shared, divide(weights, weights.sum(1, keepdims=True)), 0)
    gap = difference(combined(means(m, least, most), weights), combined(means(others, least, most), weights))
    return _without(gap, shared.sum(1) == 0)


def _without(m: Means, absent: NDArray[np.bool_]) -> Means:
    value, low, high = (np.where(absent, np.nan, part) for part in m[:3])
    return Means(value, low, high, np.where(absent, 0, m.n))


def refuse_no_numbers(logits: Floats, whose: str) -> None:
    """Refuses logits [N, K] of which a row is not finite."""
    wrong = int((~np.isfinite(logits)).any(1).sum())
    if wrong:
        fault = Fault(
            whose, f"{wrong:,} of {len(logits):,} rows have logits that are no numbers", "train the model anew"
        )
        raise Refusal("The model gives no numbers:", [fault], 65)


def evenly(labels: Ints, most: int, random: np.random.Generator) -> Ints:
    """At most `most` places, in order, of the labels [N], of each class the same number if it has it."""
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return np.sort(order[np.argsort(rank, kind="stable")][:most])
