"""How well the scores alone tell each class from the others: AUROC, which no threshold changes."""

import numpy as np
from scipy.stats import rankdata

from trainer.decision.strata import Means, combined, means, moments
from trainer.metrics.catalogue import Floats, divide
from trainer.metrics.tally import Ints


def auroc(log_p: Floats, labels: Ints, prior: Floats) -> Means:
    """[K] probability that a row of a class has more of its p than one of another class, ties counting half, where the
    others occur as in the prior [K]; n is the rows of the class. NaN where a class, or one of the others, has no row.

    The interval adds those of both sides' placement values (DeLong et al. 1988), each as of a bounded mean.
    """
    counts = np.bincount(labels, minlength=len(prior))
    parts = [_auroc(log_p[:, k], labels, prior, counts, k) for k in range(len(prior))]
    return Means(*(np.array(column) for column in zip(*parts, strict=True)))


def _auroc(score: Floats, labels: Ints, prior: Floats, counts: Ints, k: int) -> tuple[float, float, float, int]:
    own, rest = labels == k, np.where(np.arange(len(prior)) == k, 0, prior)
    rest = rest / rest.sum() if rest.any() else rest
    if not counts[k] or not (counts[rest > 0] > 0).all() or not rest.any():
        return np.nan, np.nan, np.nan, 0
    weight = np.nan_to_num(divide(rest, counts))[labels]
    placed = np.where(own, _below(score, weight), 1 - _below(score, own / counts[k]))
    value = moments(np.nan_to_num(placed.clip(0, 1)), labels, np.zeros_like(labels), (1, len(prior)))
    found = means(value, np.zeros(1), np.ones(1))
    mine, others = combined(found, np.eye(len(prior))[k]).at(0), combined(found, rest).at(0)
    low = mine.value - np.hypot(mine.value - mine.low, others.value - others.low)
    high = mine.value + np.hypot(mine.high - mine.value, others.high - others.value)
    return mine.value, max(low, 0.0), min(high, 1.0), int(counts[k])


def _below(score: Floats, weight: Floats) -> Floats:
    """[N] weight of all rows whose score is below that of each, half of those whose score is the same."""
    place = rankdata(score, "dense").astype(np.int64) - 1
    at = np.bincount(place, weight)
    return (at.cumsum() - at / 2)[place]
