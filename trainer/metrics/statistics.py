"""The kinds of numbers that metrics are: each knows its value, what it rests on, and its interval.

`value`, `n` and both ends of the interval have one shape, [G] or [G, K].
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.metrics.intervals import LEVEL, Floats, Statistic, divide, lowest, mean_of, simultaneous, wilson, z_of
from trainer.metrics.tally import SQUARE_SCALE, Ints


class Proportion(NamedTuple):
    """Hits among independent trials."""

    hits: Ints
    trials: Ints

    @property
    def value(self) -> Floats:
        return divide(self.hits, self.trials)

    @property
    def n(self) -> Ints:
        return self.trials

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        return wilson(self.hits, self.trials, level)


class Mean(NamedTuple):
    """Of n values that are never negative, from their sum and sum of squares."""

    total: Floats
    squares: Floats
    samples: Ints

    @property
    def value(self) -> Floats:
        return divide(self.total, self.samples)

    @property
    def n(self) -> Ints:
        return self.samples

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        """Normal; NaN below two samples."""
        rounding = self.samples / (2 * SQUARE_SCALE)  # a square of less than that counts as none
        squares = self.squares + rounding - self.samples * self.value**2
        variance = np.maximum(divide(squares, np.maximum(self.samples - 1, 0)), 0)
        half = z_of(level) * np.sqrt(divide(variance, self.samples))
        return np.maximum(self.value - half, 0), self.value + half


class Overlap(NamedTuple):
    """F1 = 2 J / (1 + J) of the Jaccard index J: the hits among all samples that are k or are called k."""

    hits: Ints
    union: Ints

    @property
    def value(self) -> Floats:
        return _f1(divide(self.hits, self.union))

    @property
    def n(self) -> Ints:
        return self.union

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        """Exact as Wilson's of J is, since given the union the hits are binomial."""
        low, high = wilson(self.hits, self.union, level)
        return _f1(low), _f1(high)


class Average(NamedTuple):
    """Mean over the last axis of numbers with their own intervals, those without a value left out."""

    parts: Statistic
    """[…, K]"""
    inflation: Floats | float = 1.0
    """[…] standard deviation of the mean over what it were if the parts were independent."""

    @property
    def value(self) -> Floats:
        value = self.parts.value
        return divide(np.nansum(value, -1), (~np.isnan(value)).sum(-1))

    @property
    def n(self) -> Ints:
        return self.parts.n.sum(-1)

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        low, high = mean_of(self.parts.value, *self.parts.interval(level))
        low, high = (self.value + self.inflation * (end - self.value) for end in (low, high))
        return np.maximum(low, 0), np.minimum(high, 1)


class Lowest(NamedTuple):
    """Smallest over the last axis, those without a value left out."""

    parts: Statistic
    """[…, K], independent"""

    @property
    def value(self) -> Floats:
        return lowest(self.parts.value, -1)

    @property
    def n(self) -> Ints:
        """Of the smallest."""
        value = self.parts.value
        which = np.where(np.isnan(value), np.inf, value).argmin(-1)
        n = np.take_along_axis(self.parts.n, which[..., None], -1)[..., 0]
        return np.where(np.isnan(self.value), 0, n)

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        """From intervals that hold for all parts at once, since the smallest is seen to be so on the same samples."""
        several = int((~np.isnan(self.parts.value)).sum(-1).max(initial=0))
        low, high = self.parts.interval(simultaneous(level, several))
        return lowest(low, -1), lowest(high, -1)


class Area(NamedTuple):
    """Under the ROC curve of two histograms [G, K, BINS] over the same score, rising bins: P(a positive has a higher
    score than a negative), ties counted half."""

    positives: Ints
    negatives: Ints

    @property
    def value(self) -> Floats:
        below = self.negatives.cumsum(-1) - self.negatives / 2
        return divide((self.positives * below).sum(-1), self.positives.sum(-1) * self.negatives.sum(-1))

    @property
    def n(self) -> Ints:
        """Of the fewer, positives or negatives."""
        return np.minimum(self.positives.sum(-1), self.negatives.sum(-1))

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        """Wilson's, on as many trials as DeLong's variance (1988) is worth; wider by what ties within bins may hide."""
        area, (m, n) = self.value, (part.sum(-1) for part in (self.positives, self.negatives))
        below = divide(self.negatives.cumsum(-1) - self.negatives / 2, n[..., None])
        above = divide(m[..., None] - self.positives.cumsum(-1) + self.positives / 2, m[..., None])
        variance = np.zeros(area.shape) + sum(
            divide((part * (place - area[..., None]) ** 2).sum(-1), size * np.maximum(size - 1, 1))
            for part, place, size in ((self.positives, below, m), (self.negatives, above, n))
        )
        trials = np.where(variance > 0, divide(area * (1 - area), variance), self.n)
        low, high = wilson(area * trials, trials, level)
        hidden = divide((self.positives * self.negatives).sum(-1), 2 * m * n)
        return np.maximum(low - hidden, 0), np.minimum(high + hidden, 1)


def _f1(jaccard: NDArray) -> Floats:
    return 2 * jaccard / (1 + jaccard)
