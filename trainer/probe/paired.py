"""How sure a difference is when both sides saw the same rows, as a probe's always do."""

from typing import NamedTuple

import numpy as np

from trainer.metrics.catalogue import Floats
from trainer.metrics.intervals import LEVEL, REPLICATES, wilson
from trainer.metrics.tally import Ints


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


def rate(hits: np.ndarray) -> Number:
    """Of hits [N], with Wilson's interval."""
    low, high = wilson(np.array(hits.sum()), np.array(len(hits)))
    return Number(float(hits.mean()) if len(hits) else np.nan, float(low), float(high), len(hits))


def change(before: np.ndarray, after: np.ndarray) -> Number:
    """The rate of `after` less that of `before`, hits [N] of the same rows: Newcombe 1998 (paired), method 10.

    Unlike a bootstrap, it has width where no row changes.
    """
    n = len(before)
    if not n:
        return Number(np.nan, np.nan, np.nan, 0)
    (p, low, high, _), (q, q_low, q_high, _) = rate(after), rate(before)
    phi = _correlation(int((before & after).sum()), int(after.sum()), int(before.sum()), n)
    below = (p - low) ** 2 - 2 * phi * (p - low) * (q_high - q) + (q_high - q) ** 2
    above = (high - p) ** 2 - 2 * phi * (high - p) * (q - q_low) + (q - q_low) ** 2
    return Number(p - q, p - q - float(np.sqrt(max(below, 0))), p - q + float(np.sqrt(max(above, 0))), n)


def resampled(labels: Ints, values: Floats, seed: int) -> Floats:
    """Class means of values [N, V] in REPLICATES bootstraps of the rows, each class by itself, [REPLICATES, K, V].

    The classes are those that occur, in order. The same rows are drawn for all V, so their differences are paired.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, len(labels)]))
    means = []
    for k in np.unique(labels):
        of_class = values[labels == k]
        n = len(of_class)
        means.append(random.multinomial(n, np.full(n, 1 / n), REPLICATES) @ of_class / n)
    return np.stack(means, 1)


def percentiles(replicates: Floats) -> tuple[float, float]:
    """The interval at LEVEL of replicates [R]."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return float(low), float(high)


def _correlation(both: int, first: int, second: int, n: int) -> float:
    """Phi of two hits, corrected for continuity where it is positive."""
    neither = n - first - second + both
    product = first * (n - first) * second * (n - second)
    cross = both * neither - (first - both) * (second - both)
    return 0.0 if not product else (max(cross - n / 2, 0) if cross > 0 else cross) / float(np.sqrt(product))
