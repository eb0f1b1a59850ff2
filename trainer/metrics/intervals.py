"""How sure a metric is: an interval and the number of samples for every rate.

Proportions have Wilson's score interval (Wilson 1927), means a normal one, all others the bootstrap. The bootstrap of a
function of counts is a multinomial draw of the counts: the same distribution as resampling rows, without the rows.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from trainer.metrics.catalogue import RATES, Floats, Mean, Proportion, coarse_bins, divide
from trainer.metrics.tally import BINS, Ints, Tally

LEVEL = 0.95
REPLICATES = 1000


class Estimate(NamedTuple):
    """A value, its interval at LEVEL and the samples it rests on; arrays of one shape."""

    value: Floats
    low: Floats
    high: Floats
    n: Ints


def estimate(name: str, tally: Tally, resampled: Tally | None = None) -> Estimate:
    """A rate of the catalogue, [G] or [G, K]; n is what the rate divides by, or the samples of the group.

    `resampled` is what `resample` made of the tally; without it, rates that need the bootstrap have no interval.
    """
    counted = RATES[name].of(tally)
    if isinstance(counted, Proportion):
        return Estimate(divide(*counted), *wilson(*counted), counted.trials)
    if isinstance(counted, Mean):
        return Estimate(divide(counted.total, counted.n), *normal(counted), counted.n)
    n = tally.n if counted.ndim == 1 else tally.confusion.sum(2)
    absent = np.full(counted.shape, np.nan)
    low, high = (absent, absent) if resampled is None else bootstrap(RATES[name].value, tally, resampled)
    return Estimate(counted, low, high, n)


def wilson(hits: Ints, trials: Ints, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Score interval of a proportion; NaN where there was no trial."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, n = divide(hits, trials), np.where(trials > 0, trials, np.nan)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)


def normal(mean: Mean, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Normal interval of a mean of scores, which are never negative; NaN below two samples."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = divide(mean.total, mean.n)
    variance = np.maximum(divide(mean.squares - mean.n * centre**2, np.maximum(mean.n - 1, 0)), 0)
    half = z * np.sqrt(divide(variance, mean.n))
    return np.maximum(centre - half, 0), centre + half


def difference(a: Proportion, b: Proportion, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Interval of a's proportion less b's, of independent samples: Newcombe 1998, method 10."""
    pa, pb = divide(*a), divide(*b)
    (la, ha), (lb, hb) = wilson(*a, level), wilson(*b, level)
    below = np.sqrt((pa - la) ** 2 + (hb - pb) ** 2)
    above = np.sqrt((ha - pa) ** 2 + (pb - lb) ** 2)
    return pa - pb - below, pa - pb + above


def resample(tally: Tally, seed: int = 0) -> Tally:
    """REPLICATES tallies drawn from one, as the groups of a single tally, [REPLICATES * G, …].

    Confusion and confidence are drawn apart, which is right for a metric that uses one of them; scores are left out.
    Within a bin of confidence, the mean confidence stays as it was.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, tally.shape.groups]))
    n, (_, k) = tally.n, tally.shape
    confusion = random.multinomial(n, _shares(tally.confusion.reshape(-1, k * k)), (REPLICATES, len(n)))
    samples, right, confidence = np.moveaxis(tally.confidence.reshape(len(n), k * BINS, 3), 2, 0)
    drawn = random.multinomial(n, _shares(np.concatenate([samples - right, right], 1)), (REPLICATES, len(n)))
    wrong, right = drawn.reshape(-1, 2, k * BINS).swapaxes(0, 1)
    mean = np.nan_to_num(divide(confidence, samples))
    total = np.rint(np.tile(mean, (REPLICATES, 1)) * (wrong + right)).astype(np.int64)
    groups = REPLICATES * len(n)
    bins = np.stack([wrong + right, right, total], 2).reshape(groups, k, BINS, 3)
    return Tally(confusion.reshape(groups, k, k), bins, np.zeros((groups, k, 2, 2), np.int64))


def bootstrap(metric: Callable[[Tally], Floats], tally: Tally, resampled: Tally) -> tuple[Floats, Floats]:
    """Percentile interval, [G] or [G, K], of a metric of confusion or confidence, over the replicates that have it."""
    values = metric(resampled)
    values = values.reshape(REPLICATES, len(tally.n), *values.shape[1:])
    tail = 100 * (1 - LEVEL) / 2
    absent = np.isnan(values).all(0)
    low, high = np.nanpercentile(np.where(absent, 0.0, values), [tail, 100 - tail], axis=0)
    return np.where(absent, np.nan, low), np.where(absent, np.nan, high)


def calibrated_ece(tally: Tally, weights: Floats | None = None, seed: int = 0) -> tuple[Floats, Floats]:
    """[G] mean and 95th percentile of the ECE that a perfectly calibrated model would show on as many samples with
    the same confidences: the plug-in ECE is biased upward, most where n is small.

    With weights of true classes, [K], on as many samples as the weighted ones are worth (Kish 1965).
    """
    random = np.random.Generator(np.random.Philox(key=[seed, tally.shape.groups + 2**32]))
    bins = coarse_bins(tally, weights)
    if weights is not None:
        worth = divide((tally.confusion.sum(2) @ weights) ** 2, tally.confusion.sum(2) @ weights**2)
        bins = bins * divide(worth, bins[..., 0].sum(1))[:, None, None]
    n = np.nan_to_num(np.rint(bins[..., 0])).astype(np.int64)
    confidence = np.nan_to_num(divide(bins[..., 2], bins[..., 0])).clip(0, 1)
    right = random.binomial(n, confidence, (REPLICATES, *n.shape))
    values = divide(np.abs(n * confidence - right).sum(2), n.sum(1))
    return values.mean(0), np.percentile(values, 95, axis=0)


def _shares(counts: Ints) -> Floats:
    """Probabilities of each row; an empty group keeps its (unused) mass in the first cell."""
    shares = counts.astype(np.float64)
    shares[shares.sum(1) == 0, 0] = 1
    return shares / shares.sum(1, keepdims=True)
