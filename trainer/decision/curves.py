"""What decisions are worth where what mistakes cost is not settled: over thresholds for each class, and over cost
matrices from equal to balanced ones for all together."""

from typing import NamedTuple

import numpy as np

from trainer.decision.regret import costs_of, shifted
from trainer.decision.strata import Means, Moments, Number, combined, means, moments
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EXPONENTS = tuple(step / 10 for step in range(11))


class Benefit(NamedTuple):
    """Calling an image a class where its probability is at least the threshold."""

    threshold: float
    """Odds of it are what a false call costs, in units of what a true one brings."""
    net: Number
    """True calls less false ones at those odds, per image (Vickers & Elkin 2006): pi TPR - (1 - pi) FPR t / (1 - t)."""
    treat_all: float
    """The same of calling every image so; that of calling none is 0."""


class CostPoint(NamedTuple):
    """Costs C[y, d] ~ pi_y ** -exponent of each mistake, scaled so that all mistakes cost 1 on average."""

    exponent: float
    """0 is equal costs, 1 balanced ones."""
    decided: Number
    """Expected cost of the decisions as they were made."""
    adapted: Number
    """That of the cheapest decisions for these costs, on the same probabilities."""
    constant: float
    """That of the best decision that is the same for every image."""


def net_benefit(log_p: Floats, labels: Ints, prior: Floats) -> list[list[Benefit]]:
    """[K][THRESHOLDS] of log p [N, K] where classes occur as in the prior [K]; NaN where a class has no row."""
    lines = [_net_benefit(log_p, labels, prior, t) for t in THRESHOLDS]
    all_called = [prior - (1 - prior) * t / (1 - t) for t in THRESHOLDS]
    return [
        [Benefit(t, line.at(k), float(every[k])) for t, line, every in zip(THRESHOLDS, lines, all_called, strict=True)]
        for k in range(len(prior))
    ]


def _net_benefit(log_p: Floats, labels: Ints, prior: Floats, threshold: float) -> Means:
    """[K]"""
    n, k = np.bincount(labels, minlength=len(prior)), len(prior)
    called = np.zeros((k, k))
    np.add.at(called, labels, log_p >= np.log(threshold))
    rows = np.broadcast_to(n, (k, k))  # by class that is called, and true class
    rates = means(Moments(rows, called.T, called.T), np.zeros(1), np.ones(1))
    odds = threshold / (1 - threshold)
    return combined(rates, prior * np.where(np.eye(k, dtype=bool), 1.0, -odds))


def cost_curve(log_p: Floats, decisions: Ints, labels: Ints, prior: Floats, abstain: Floats | None) -> list[CostPoint]:
    """[EXPONENTS] of decisions [N], and of log p [N, K]; what it costs to abstain, [K], stays the same."""
    return [_cost_point(log_p, decisions, labels, prior, abstain, exponent) for exponent in EXPONENTS]


def family(prior: Floats, exponent: float, abstain: Floats | None) -> Floats:
    """[K, K] or [K, K + 1] the costs."""
    each = prior**-exponent / (prior ** (1 - exponent)).sum()
    costs = each[:, None] * (1 - np.eye(len(prior)))
    return costs if abstain is None else np.column_stack([costs, abstain])


def _cost_point(
    log_p: Floats, decisions: Ints, labels: Ints, prior: Floats, abstain: Floats | None, exponent: float
) -> CostPoint:
    costs = family(prior, exponent, abstain)
    adapted = shifted(log_p, np.zeros(len(prior)), costs)
    decided, cheapest = (expected_cost(costs, labels, d, prior) for d in (decisions, adapted))
    return CostPoint(exponent, decided, cheapest, float((prior @ costs).min()))


def expected_cost(costs: Floats, labels: Ints, decisions: Ints, prior: Floats) -> Number:
    """Of decisions [N] where classes occur as in the prior [K]; NaN where one of them has no row."""
    values = moments(costs_of(costs, labels, decisions), labels, np.zeros_like(labels), (1, len(prior)))
    return combined(means(values, costs.min(1), costs.max(1)), prior).at(0)
