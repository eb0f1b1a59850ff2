"""How far confidence lies from accuracy, and how far it would seem to lie if it did not: ECE and its null band.

Bins are [G, …, M, 3]: samples, samples right, sum of confidence; samples may be weighted.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trainer.metrics.intervals import LEVEL, REPLICATES, Floats, divide, z_of
from trainer.metrics.tally import SCALE, Ints, Tally, equal_widths

ECE_BINS = 15
DRAWN = 2**24
"""Most binomials of a null band; a larger one is that of the normal limit."""


@dataclass(frozen=True, eq=False)
class Gaps:
    """Expected calibration error: the mean gap between confidence and accuracy, by samples (Guo et al. 2017)."""

    bins: Floats

    @property
    def value(self) -> Floats:
        n, right, confidence = np.moveaxis(self.bins, -1, 0)
        return divide(np.abs(confidence - right).sum(-1), n.sum(-1))

    @property
    def n(self) -> Ints:
        return np.rint(self.bins[..., 0].sum(-1)).astype(np.int64)

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        """Of the true error: normal, after taking off what chance adds to the sizes of gaps (a folded normal each);
        from 0 where a calibrated model would show as much, and up to the value at least."""
        from scipy.special import ndtr

        n, right, confidence = np.moveaxis(self.bins, -1, 0)
        likely = np.where(n > 0, (right + 1) / (n + 2), 0)  # a bin that is all right is not sure to be (Laplace)
        gap, sd = confidence - right, np.sqrt(n * likely * (1 - likely))
        ratio = np.divide(gap, sd, out=np.full(gap.shape, np.inf), where=sd > 0)
        seen = sd * np.sqrt(2 / np.pi) * np.exp(-(ratio**2) / 2) + np.abs(gap) * (1 - 2 * ndtr(-np.abs(ratio)))
        variance = np.maximum(gap**2 + sd**2 - seen**2, 0).sum(-1)
        whole = np.where(n.sum(-1) > 0, n.sum(-1), np.nan)
        centre, half = self.value - (seen - np.abs(gap)).sum(-1) / whole, z_of(level) * np.sqrt(variance) / whole
        low = np.where(self.value <= self.calibrated(level)[1], 0, np.maximum(centre - half, 0))
        return np.where(np.isnan(whole), np.nan, low), np.minimum(np.maximum(centre + half, self.value), 1)

    def calibrated(self, level: float = LEVEL, seed: int = 0) -> tuple[Floats, Floats]:
        """Mean and upper end, in `level` of cases, of the error that a perfectly calibrated model would show on as many
        samples with the same confidences: the plug-in error is biased upward, most where n is small."""
        n, whole = self.bins[..., 0], self.bins[..., 0].sum(-1)
        confidence = np.nan_to_num(divide(self.bins[..., 2], n)).clip(0, 1)
        if n.size * REPLICATES > DRAWN:
            sd = np.sqrt(n * confidence * (1 - confidence))
            mean, spread = sd.sum(-1) * np.sqrt(2 / np.pi), np.sqrt((sd**2).sum(-1) * (1 - 2 / np.pi))
            return divide(mean, whole), divide(mean + z_of(2 * level - 1) * spread, whole)
        values = self._drawn if seed == 0 else self.null(seed)
        return values.mean(0), np.percentile(values, 100 * level, axis=0)

    @cached_property
    def _drawn(self) -> Floats:
        return self.null()

    def null(self, seed: int = 0) -> Floats:
        """[REPLICATES, …] errors of a perfectly calibrated model."""
        random = np.random.Generator(np.random.Philox(key=[seed, self.bins.size]))
        n = np.rint(self.bins[..., 0]).astype(np.int64)
        confidence = np.nan_to_num(divide(self.bins[..., 2], self.bins[..., 0])).clip(0, 1)
        occurs = np.nonzero(n)
        gaps = np.zeros((REPLICATES, *n.shape))
        drawn = random.binomial(n[occurs], confidence[occurs], (REPLICATES, len(occurs[0])))
        gaps[(slice(None), *occurs)] = np.abs(n[occurs] * confidence[occurs] - drawn)
        return divide(gaps.sum(-1), n.sum(-1))


def top_label(t: Tally, weights: Floats | None = None) -> Gaps:
    """[G] of the most probable class, in 15 bins of equal width.

    With weights of true classes, [K], on as many samples as the weighted ones are worth (Kish 1965).
    """
    bins = coarse_bins(t, weights)
    if weights is not None:
        worth = divide((t.actual @ weights) ** 2, t.actual @ weights**2)
        bins = np.nan_to_num(bins * divide(worth, bins[..., 0].sum(1))[:, None, None])
    return Gaps(bins)


def of_each_class(t: Tally) -> Gaps:
    """[G, K] of the probability of each class, whatever is most probable, in 15 bins of equal width."""
    return Gaps(equal_widths(t.classwise, ECE_BINS) / np.array([1.0, 1.0, SCALE]))


def over_classes(t: Tally) -> Gaps:
    """[G] the mean of `of_each_class` over the classes (Kull et al. 2019), taken as independent."""
    return Gaps(of_each_class(t).bins.reshape(t.shape.groups, -1, 3))


def adaptive(t: Tally) -> Gaps:
    """[G] of the most probable class, in 15 bins of equal mass (Nixon et al. 2019).

    A bin of the tally that two of them share is divided as if its samples were alike.
    """
    bins = t.confidence.sum(1) / np.array([1.0, 1.0, SCALE])
    ends = bins[..., 0].cumsum(1)
    mass = ends[:, -1:] * np.arange(ECE_BINS + 1) / ECE_BINS
    before = np.concatenate([np.zeros((len(bins), 1, 3)), bins.cumsum(1)], 1)
    cut = np.empty((len(bins), ECE_BINS + 1, 3))
    for g in range(len(bins)):
        for part in range(3):
            cut[g, :, part] = np.interp(mass[g], before[g, :, 0], before[g, :, part])
    return Gaps(np.diff(cut, axis=1))


def coarse_bins(t: Tally, weights: Floats | None = None, bins: int = ECE_BINS) -> Floats:
    """[G, bins, 3]: samples, samples right, sum of confidence, in bins of equal width; weights [K] of true classes."""
    by_class = equal_widths(t.confidence, bins)
    weights = np.ones(by_class.shape[1]) if weights is None else weights
    return np.einsum("k,gkbi->gbi", weights, by_class) / np.array([1.0, 1.0, SCALE])


def weights_to(prior: Floats, t: Tally) -> Floats:
    """[K] what a sample of each class must weigh for classes to count as in `prior`; NaN if a class was never seen."""
    seen = t.actual.sum(0)
    return divide(prior * seen.sum(), seen)
