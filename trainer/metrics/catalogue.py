"""Every metric by name: a pure function of a Tally.

A rate has one value for each group, [G], or for each group and class one-vs-rest, [G, K]; where nothing was counted it
is NaN, never 0. A comparison sets the groups against one another (`comparisons.py`). To add one, write the function and
its line in the table: it can be had of every tally that was ever stored.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from trainer.metrics import calibration
from trainer.metrics.intervals import Floats, Statistic, divide, highest, log_of, lowest
from trainer.metrics.statistics import Area, Average, Lowest, Mean, Overlap, Proportion
from trainer.metrics.tally import SCALE, SQUARE_SCALE, Ints, Tally


def accuracy(t: Tally) -> Proportion:
    """[G] decisions that are right."""
    return Proportion(t.hits.sum(1), t.n)


def coverage(t: Tally) -> Proportion:
    """[G] samples that are decided: all, unless abstaining is a decision."""
    return Proportion(t.called.sum(1), t.n)


def precision(t: Tally) -> Proportion:
    """[G, K] of those called k, the part that is k (positive predictive value)."""
    return Proportion(t.hits, t.called)


def recall(t: Tally) -> Proportion:
    """[G, K] of those that are k, the part called k (true positive rate, sensitivity)."""
    return Proportion(t.hits, t.actual)


def false_negative_rate(t: Tally) -> Proportion:
    """[G, K] of those that are k, the part not called k."""
    return Proportion(t.actual - t.hits, t.actual)


def false_positive_rate(t: Tally) -> Proportion:
    """[G, K] of those that are not k, the part called k."""
    return Proportion(t.called - t.hits, t.n[:, None] - t.actual)


def selection_rate(t: Tally) -> Proportion:
    """[G, K] the part called k."""
    return Proportion(t.called, _of_all(t))


def prevalence(t: Tally) -> Proportion:
    """[G, K] the part that is k."""
    return Proportion(t.actual, _of_all(t))


def f1(t: Tally) -> Overlap:
    """[G, K] harmonic mean of precision and recall; NaN where k neither occurs nor is called."""
    return Overlap(t.hits, t.actual + t.called - t.hits)


def auroc(t: Tally) -> Area:
    """[G, K] area under the ROC curve of p(k), k against the rest, as far as the bins of the tally tell."""
    samples, right, _ = np.moveaxis(t.classwise, -1, 0)
    return Area(right, samples - right)


def micro_precision(t: Tally) -> Proportion:
    """[G] precision over all classes at once: of the samples that are decided, those decided rightly."""
    return Proportion(t.hits.sum(1), t.called.sum(1))


def micro_f1(t: Tally) -> Overlap:
    """[G] F1 over all classes at once; the accuracy, as micro recall is, unless abstaining is a decision."""
    hits = t.hits.sum(1)
    return Overlap(hits, t.n + t.called.sum(1) - hits)


def macro_f1(t: Tally) -> Average:
    """[G] mean F1 over the classes that occur in the group.

    An error lowers the F1 of two classes, so they are not independent: the interval is widened to the standard error of
    the infinitesimal jackknife (Efron 1982), to which the bootstrap comes.
    """
    sizes = (t.actual + t.called) * (t.actual > 0)
    inverse = np.nan_to_num(divide(1, sizes))
    slope = -np.nan_to_num(divide(2 * t.hits, sizes)) * inverse  # of F1 by either of its margins
    own = t.hits * (2 * inverse + 2 * slope) ** 2
    apart = own + (t.actual + t.called - 2 * t.hits) * slope**2
    padded = np.pad(slope, ((0, 0), (0, t.shape.abstains)))
    crossed = np.array(
        [c @ p for c, p in zip(t.confusion, padded, strict=True)]
    )  # by group: floats of all would not fit
    together = apart + 2 * slope * (crossed - t.hits * slope)
    inflation = np.sqrt(divide(np.maximum(together.sum(1), 0), apart.sum(1)))
    present = t.actual > 0
    return Average(Overlap(t.hits * present, f1(t).union * present), np.nan_to_num(inflation, nan=1.0))


def nll(t: Tally) -> Mean:
    """[G] mean of -log p(label), in nats: the negative log-likelihood, a proper score."""
    return _score(t, 0)


def brier(t: Tally) -> Mean:
    """[G] mean squared distance of the probabilities from the one-hot label, in [0, 2]: a proper score (Brier 1950)."""
    return _score(t, 1)


def score_by_class(t: Tally, score: Literal[0, 1]) -> Floats:
    """[G, K] mean NLL (0) or Brier score (1) of each true class."""
    return divide(t.scores[:, :, score, 0] / SCALE, t.actual)


def under_prior(by_class: Floats, prior: Floats) -> Floats:
    """[G] the mean that [G, K] class means have where classes occur as in prior [K]; NaN if a class was never seen."""
    return by_class @ prior


class Rate(NamedTuple):
    """A metric of one group."""

    of: Callable[[Tally], Statistic]
    better: Literal["higher", "lower", "neither"]

    def value(self, tally: Tally) -> Floats:
        """[G] or [G, K]."""
        return self.of(tally).value


RATES: dict[str, Rate] = {
    "accuracy": Rate(accuracy, "higher"),
    "balanced_accuracy": Rate(lambda t: Average(recall(t)), "higher"),
    "worst_recall": Rate(lambda t: Lowest(recall(t)), "higher"),
    "macro_precision": Rate(lambda t: Average(precision(t)), "higher"),
    "worst_precision": Rate(lambda t: Lowest(precision(t)), "higher"),
    "micro_precision": Rate(micro_precision, "higher"),
    "macro_f1": Rate(macro_f1, "higher"),
    "worst_f1": Rate(lambda t: Lowest(f1(t)), "higher"),
    "micro_f1": Rate(micro_f1, "higher"),
    "coverage": Rate(coverage, "neither"),
    "precision": Rate(precision, "higher"),
    "recall": Rate(recall, "higher"),
    "f1": Rate(f1, "higher"),
    "false_positive_rate": Rate(false_positive_rate, "lower"),
    "false_negative_rate": Rate(false_negative_rate, "lower"),
    "selection_rate": Rate(selection_rate, "neither"),
    "prevalence": Rate(prevalence, "neither"),
    "auroc": Rate(auroc, "higher"),
    "nll": Rate(nll, "lower"),
    "brier": Rate(brier, "lower"),
    "ece": Rate(calibration.top_label, "lower"),
    "adaptive_ece": Rate(calibration.adaptive, "lower"),
    "classwise_ece": Rate(calibration.over_classes, "lower"),
    "class_ece": Rate(calibration.of_each_class, "lower"),
}


DISPARITIES: dict[str, Callable[[Floats], Floats]] = {  # [G, …] -> […]; groups without a value are left out
    "min": lowest,
    "max": highest,
    "difference": lambda r: _several(r, highest(r) - lowest(r)),
    "ratio": lambda r: _several(r, divide(lowest(r), highest(r))),
    "log_ratio": lambda r: _several(r, -log_of(divide(lowest(r), highest(r)))),
}

FAIRNESS: dict[str, tuple[str, str]] = {
    "disparate_impact": ("selection_rate", "ratio"),
    "demographic_parity_difference": ("selection_rate", "difference"),
    "differential_fairness": ("selection_rate", "log_ratio"),
    "equal_opportunity_difference": ("recall", "difference"),
    "false_positive_rate_difference": ("false_positive_rate", "difference"),
    "predictive_parity_difference": ("precision", "difference"),
    "accuracy_difference": ("accuracy", "difference"),
    "nll_difference": ("nll", "difference"),
    "calibration_gap": ("ece", "difference"),
    "worst_group_accuracy": ("accuracy", "min"),
    "worst_group_recall": ("recall", "min"),
}
"""Name -> (rate, disparity); a rate by class gives one value for each class, one-vs-rest. The epsilon of differential
fairness is the largest log ratio of the classes (Foulds et al. 2020); over all group columns at once it is that of
their intersections. The smallest worst_group_recall is that of the worst class x group."""

JOINT = ("equalised_odds_difference", "bias_amplification")
"""Fairness metrics that are more than one rate compared."""


def disparity(name: str, tally: Tally) -> Floats:
    """[] or [K] a fairness metric over the groups of a tally."""
    if name == "equalised_odds_difference":
        both = [disparity(part, tally) for part in ("equal_opportunity_difference", "false_positive_rate_difference")]
        return np.maximum(*both)
    if name == "bias_amplification":
        return bias_amplification(tally)[0]
    rate, over_groups = FAIRNESS[name]
    found = RATES[rate].of(tally)
    alone = isinstance(found, Mean) & (found.n < 2)  # a single score is no mean of a group
    return DISPARITIES[over_groups](np.where(alone, np.nan, found.value))


def bias_amplification(t: Tally) -> tuple[Floats, Floats]:
    """[K] how much further than the labels decisions go in what already sets groups apart, and its standard error.

    Of class k, over the groups: the mean of P(called k | group) - P(k | group) where k is more frequent in the group
    than it would be independently, and of its negative where it is not (A -> T of Wang & Russakovsky 2021).
    """
    rise = divide(t.called - t.actual, t.n[:, None])
    variance = divide(divide(t.called + t.actual - 2 * t.hits, t.n[:, None]) - rise**2, t.n[:, None])
    more = t.actual * t.n.sum() > t.n[:, None] * t.actual.sum(0)
    groups = (t.n > 0).sum()
    value = divide(np.nansum(np.where(more, rise, -rise), 0), groups)
    absent = (groups < 2) | (t.actual.sum(0) == 0)
    se = divide(np.sqrt(np.nansum(variance, 0)), groups)
    return np.where(absent, np.nan, value), np.where(absent, np.nan, se)


def better(name: str) -> Literal["higher", "lower", "neither"]:
    """In which direction a rate or a fairness metric is good."""
    if name in RATES:
        return RATES[name].better
    return "higher" if name in FAIRNESS and FAIRNESS[name][1] in {"ratio", "min"} else "lower"


def single(name: str, tally: Tally) -> float:
    """One number of a rate, over all samples, or of a fairness metric, over the groups of the tally; of a metric by
    class, that of the worst class, where a class that occurs and is never called has a precision of 0. NaN where
    nothing was counted."""
    if name in RATES:
        overall = tally.overall()
        never = (overall.called[0] == 0) & (overall.actual[0] > 0)
        value = RATES[name].value(overall)[0]
        if name in {"macro_precision", "worst_precision"}:
            parts = np.where(never, 0.0, RATES["precision"].value(overall)[0])
            mean = divide(np.nansum(parts), (~np.isnan(parts)).sum())
            value = lowest(parts) if name == "worst_precision" else mean
        elif value.ndim:
            value = np.where(np.isnan(value) & (overall.actual[0] > 0), 0.0, value)
    else:
        value = disparity(name, tally)
    values = np.asarray(value)[~np.isnan(value)]
    worst = np.max if better(name) == "lower" else np.min
    return float(worst(values)) if values.size else math.nan


def _of_all(t: Tally) -> Ints:
    return np.broadcast_to(t.n[:, None], t.actual.shape)


def _score(t: Tally, score: Literal[0, 1]) -> Mean:
    total, squares = np.moveaxis(t.scores[:, :, score].sum(1) / np.array([SCALE, SQUARE_SCALE]), 1, 0)
    return Mean(total, squares, t.n)


def _several(r: Floats, value: Floats) -> Floats:
    """The value where two groups or more have one: a single group is no parity."""
    return np.where((~np.isnan(r)).sum(0) > 1, value, np.nan)
