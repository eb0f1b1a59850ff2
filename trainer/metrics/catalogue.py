"""Every metric by name: a pure function of a Tally.

A rate has one value for each group, [G], or for each group and class one-vs-rest, [G, K]; where nothing was counted it
is NaN, never 0. A disparity compares a rate over the groups. A fairness metric is a rate and a disparity. To add one,
write the function and its line in the table.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.metrics.tally import BINS, SCALE, SQUARE_SCALE, Ints, Tally

Floats = NDArray[np.float64]
ECE_BINS = 15


class Proportion(NamedTuple):
    """Hits among trials, of the same shape."""

    hits: Ints
    trials: Ints


class Mean(NamedTuple):
    """Sum and sum of squares of n values."""

    total: Floats
    squares: Floats
    n: Ints


def accuracy(t: Tally) -> Proportion:
    """[G] decisions that are right."""
    return Proportion(_hits(t).sum(1), t.n)


def precision(t: Tally) -> Proportion:
    """[G, K] of those called k, the part that is k (positive predictive value)."""
    return Proportion(_hits(t), t.confusion.sum(1))


def recall(t: Tally) -> Proportion:
    """[G, K] of those that are k, the part called k (true positive rate)."""
    return Proportion(_hits(t), t.confusion.sum(2))


def selection_rate(t: Tally) -> Proportion:
    """[G, K] the part called k."""
    called = t.confusion.sum(1)
    return Proportion(called, np.broadcast_to(t.n[:, None], called.shape))


def f1(t: Tally) -> Floats:
    """[G, K] harmonic mean of precision and recall; NaN where k neither occurs nor is called."""
    return divide(2 * _hits(t), t.confusion.sum(1) + t.confusion.sum(2))


def balanced_accuracy(t: Tally) -> Floats:
    """[G] mean recall over the classes that occur in the group."""
    return _mean_over_classes(divide(*recall(t)))


def macro_f1(t: Tally) -> Floats:
    """[G] mean F1 over the classes that occur in the group."""
    return _mean_over_classes(np.where(t.confusion.sum(2) > 0, f1(t), np.nan))


def worst_recall(t: Tally) -> Floats:
    """[G] smallest recall over the classes that occur in the group."""
    values = divide(*recall(t))
    return np.where(np.isnan(values).all(1), np.nan, np.nanmin(np.where(np.isnan(values), np.inf, values), 1))


def nll(t: Tally) -> Mean:
    """[G] mean of -log p(label), in nats: the negative log-likelihood, a proper score."""
    return _score(t, 0)


def brier(t: Tally) -> Mean:
    """[G] mean squared distance of the probabilities from the one-hot label, in [0, 2]: a proper score (Brier 1950)."""
    return _score(t, 1)


def expected_calibration_error(t: Tally) -> Floats:
    """[G] mean gap between confidence and accuracy in 15 bins of equal width, by samples (Guo et al. 2017)."""
    return gap(coarse_bins(t))


def gap(bins: Floats) -> Floats:
    """[G] the calibration error of bins [G, M, 3] such as `coarse_bins` makes."""
    n, right, confidence = np.moveaxis(bins, 2, 0)
    return divide(np.abs(confidence - right).sum(1), n.sum(1))


def coarse_bins(t: Tally, weights: Floats | None = None, bins: int = ECE_BINS) -> Floats:
    """[G, bins, 3]: samples, samples right, sum of confidence, in bins of equal width; weights [K] of true classes."""
    by_class = t.confidence.reshape(*t.confidence.shape[:2], bins, BINS // bins, 3).sum(3)
    weights = np.ones(by_class.shape[1]) if weights is None else weights
    return np.einsum("k,gkbi->gbi", weights, by_class) / np.array([1.0, 1.0, SCALE])


def weights_to(prior: Floats, t: Tally) -> Floats:
    """[K] what a sample of each class must weigh for classes to count as in `prior`; NaN if a class was never seen."""
    seen = t.confusion.sum((0, 2))
    return divide(prior * seen.sum(), seen)


def score_by_class(t: Tally, score: Literal[0, 1]) -> Floats:
    """[G, K] mean NLL (0) or Brier score (1) of each true class."""
    return divide(t.scores[:, :, score, 0] / SCALE, t.confusion.sum(2))


def under_prior(by_class: Floats, prior: Floats) -> Floats:
    """[G] the mean that [G, K] class means have where classes occur as in prior [K]; NaN if a class was never seen."""
    return by_class @ prior


class Rate(NamedTuple):
    """A metric of one group."""

    of: Callable[[Tally], Proportion | Mean | Floats]
    better: Literal["higher", "lower", "neither"]

    def value(self, tally: Tally) -> Floats:
        """[G] or [G, K]."""
        counted = self.of(tally)
        if isinstance(counted, Proportion):
            return divide(counted.hits, counted.trials)
        return divide(counted.total, counted.n) if isinstance(counted, Mean) else counted


RATES: dict[str, Rate] = {
    "accuracy": Rate(accuracy, "higher"),
    "balanced_accuracy": Rate(balanced_accuracy, "higher"),
    "worst_recall": Rate(worst_recall, "higher"),
    "macro_f1": Rate(macro_f1, "higher"),
    "precision": Rate(precision, "higher"),
    "recall": Rate(recall, "higher"),
    "f1": Rate(f1, "higher"),
    "selection_rate": Rate(selection_rate, "neither"),
    "nll": Rate(nll, "lower"),
    "brier": Rate(brier, "lower"),
    "ece": Rate(expected_calibration_error, "lower"),
}

DISPARITIES: dict[str, Callable[[Floats], Floats]] = {  # [G, …] -> […]; groups without a value are left out
    "min": lambda r: _extreme(r, np.min, np.inf),
    "max": lambda r: _extreme(r, np.max, -np.inf),
    "difference": lambda r: _several(r, _extreme(r, np.max, -np.inf) - _extreme(r, np.min, np.inf)),
    "ratio": lambda r: _several(r, divide(_extreme(r, np.min, np.inf), _extreme(r, np.max, -np.inf))),
}

FAIRNESS: dict[str, tuple[str, str]] = {
    "disparate_impact": ("selection_rate", "ratio"),
    "demographic_parity_difference": ("selection_rate", "difference"),
    "equal_opportunity_difference": ("recall", "difference"),
    "predictive_parity_difference": ("precision", "difference"),
    "accuracy_difference": ("accuracy", "difference"),
    "worst_group_accuracy": ("accuracy", "min"),
    "worst_group_recall": ("recall", "min"),
}
"""Name -> (rate, disparity); a rate by class gives one value for each class, one-vs-rest."""


def disparity(name: str, tally: Tally) -> Floats:
    """[] or [K] a fairness metric over the groups of a tally."""
    rate, over_groups = FAIRNESS[name]
    return DISPARITIES[over_groups](RATES[rate].value(tally))


def better(name: str) -> Literal["higher", "lower", "neither"]:
    """In which direction a rate or a fairness metric is good."""
    if name in RATES:
        return RATES[name].better
    return "lower" if FAIRNESS[name][1] == "difference" else "higher"


def single(name: str, tally: Tally) -> float:
    """One number of a rate, over all samples, or of a fairness metric, over the groups of the tally; of a metric by
    class, that of the worst class, where a class that occurs and is never called has a precision of 0. NaN where
    nothing was counted."""
    if name in RATES:
        value = RATES[name].value(tally.overall())[0]
        if value.ndim:
            value = np.where(np.isnan(value) & (tally.overall().confusion[0].sum(1) > 0), 0.0, value)
    else:
        value = disparity(name, tally)
    values = np.asarray(value)[~np.isnan(value)]
    worst = np.max if better(name) == "lower" else np.min
    return float(worst(values)) if values.size else math.nan


def divide(part: NDArray, whole: NDArray) -> Floats:
    """part / whole, and NaN where the whole is 0."""
    whole = np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)


def _hits(t: Tally) -> Ints:
    return np.diagonal(t.confusion, axis1=1, axis2=2)


def _score(t: Tally, score: Literal[0, 1]) -> Mean:
    total, squares = np.moveaxis(t.scores[:, :, score].sum(1) / np.array([SCALE, SQUARE_SCALE]), 1, 0)
    return Mean(total, squares, t.n)


def _mean_over_classes(values: Floats) -> Floats:
    return divide(np.nansum(values, 1), (~np.isnan(values)).sum(1))


def _several(r: Floats, value: Floats) -> Floats:
    """The value where two groups or more have one: a single group is no parity."""
    return np.where((~np.isnan(r)).sum(0) > 1, value, np.nan)


def _extreme(r: Floats, which: Callable[..., Floats], absent: float) -> Floats:
    value = which(np.where(np.isnan(r), absent, r), axis=0)
    return np.where(np.isinf(value), np.nan, value)
