"""What a proper score is made of: how far probabilities are from what happens (miscalibration), how well they tell rows
apart (discrimination or resolution), and how hard the rows are (uncertainty).

Each class is judged against the rest. Rows may weigh by their true class, such that classes count as in use; forecasts
must then be under that prior.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from trainer.metrics.intervals import LEVEL, REPLICATES, Floats
from trainer.metrics.tally import Ints

Rule = Literal["brier", "log"]
NEARLY_0, NEARLY_1 = 2.0**-1022, 1 - 2.0**-53
"""Nearest to 0 and 1 that the log score takes a forecast to be, so that it is a number."""


class Corp(NamedTuple):
    """score = miscalibration - discrimination + uncertainty, of each class and, last, their sum, [K + 1].

    The recalibrated forecast is isotonic regression's, so there are no bins (Dimitriadis, Gneiting & Jordan 2021). NaN
    without rows. The sum of the Brier scores is that of the multi-class one; that of log scores is not its NLL.
    """

    score: Floats
    miscalibration: Floats
    discrimination: Floats
    uncertainty: Floats
    n: int


class Sure(NamedTuple):
    """How sure a decomposition is, [K + 1] each."""

    miscalibration: tuple[Floats, Floats]
    """Interval at LEVEL, by a bootstrap of the rows, less its bias; from 0 where the value is within chance."""
    discrimination: tuple[Floats, Floats]
    chance: Floats
    """Mean miscalibration that calibrated forecasts would show on as many rows: never 0, and more on fewer."""
    chance_high: Floats
    """What they exceed in 5 of 100 cases."""


class Murphy(NamedTuple):
    """score = reliability - resolution + uncertainty + within - covariance, [K]; NaN without rows.

    Of bins of equal width (Murphy 1973); the last two are what bins leave out (Stephenson et al. 2008): the variance of
    forecasts within a bin, and twice their covariance with what happens.
    """

    score: Floats
    reliability: Floats
    resolution: Floats
    uncertainty: Floats
    within: Floats
    covariance: Floats
    n: int


def corp(p: Floats, labels: Ints, weights: Floats | None = None, rule: Rule = "brier") -> Corp:
    """Of forecasts p [N, K] and labels [N], rows weighted by true class, [K]."""
    if not len(labels):
        return Corp(*np.full((4, p.shape[1] + 1), np.nan), n=0)
    weight = _weights(p, weights)[labels]
    return Corp(*_with_sum(np.stack([one(labels, weight) for one in _forecasts(p, rule)], 1)), n=len(labels))


def sure(
    p: Floats,
    labels: Ints,
    weights: Floats | None = None,
    rule: Rule = "brier",
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Sure:
    """Interval and null band of `corp` of the same arguments; takes as long as 2 * replicates of it."""
    forecasts, by_class = _forecasts(p, rule), _weights(p, weights)
    if not len(labels):
        absent = np.full(p.shape[1] + 1, np.nan)
        return Sure((absent, absent), (absent, absent), absent, absent)
    found, weight = corp(p, labels, weights, rule), by_class[labels]
    drawn = [[one(labels, weight * times) for one in forecasts] for times in _resampled(len(labels), replicates, seed)]
    null = [[one(y, by_class[y]) for one in forecasts] for y in labels_of(p, by_class, replicates, seed)]
    (_, mcb, dsc, _), (_, chance, _, _) = (_with_sum(np.moveaxis(np.array(r), 2, 0)) for r in (drawn, null))
    chance_high = np.percentile(chance, 100 * LEVEL, axis=0)
    low, high = _basic(found.miscalibration, mcb)
    low = np.where(found.miscalibration <= chance_high, 0, low)
    return Sure((low, high), _basic(found.discrimination, dsc), chance.mean(0), chance_high)


def murphy(p: Floats, labels: Ints, weights: Floats | None = None, bins: int = 15) -> Murphy:
    """Of the Brier scores of forecasts p [N, K], labels [N], rows weighted by true class, [K]."""
    if not len(labels):
        return Murphy(*np.full((6, p.shape[1]), np.nan), n=0)
    weight = _weights(p, weights)[labels]
    weight = weight / weight.sum()
    parts = [_murphy(p[:, k], labels == k, weight, bins) for k in range(p.shape[1])]
    return Murphy(*np.array(parts).T, n=len(labels))


def by_cell(of: Callable[[Floats, Ints], Corp], p: Floats, labels: Ints, cells: Ints, count: int) -> list[Corp]:
    """A decomposition of each of `count` cells [N], such as `partial(corp, weights=…)` makes."""
    return [of(p[cells == cell], labels[cells == cell]) for cell in range(count)]


def labels_of(p: Floats, weights: Floats, replicates: int, seed: int) -> Iterator[Ints]:
    """Labels [N] drawn from the forecasts, brought from the prior in use to the mix of the rows: the prior in use gives
    a class `weights` times what it has there."""
    random = np.random.Generator(np.random.Philox(key=[seed, len(p) + 2**32]))
    here = np.divide(p, weights, out=np.zeros(p.shape), where=weights > 0)
    ends = (here / here.sum(1, keepdims=True)).cumsum(1)[:, :-1]
    for _ in range(replicates):
        yield (random.random(len(p))[:, None] > ends).sum(1)


class _Forecast:
    """Forecasts of one class, sorted once, for many draws of labels and weights."""

    def __init__(self, q: Floats, k: int, rule: Rule) -> None:
        self.k = k
        self.rule: Rule = rule
        self.levels, self.at = np.unique(q, return_inverse=True)

    def __call__(self, labels: Ints, weight: Floats) -> tuple[float, float, float, float]:
        """Score, miscalibration, discrimination and uncertainty of labels [N] under weights [N]."""
        from scipy.optimize import isotonic_regression

        total = np.bincount(self.at, weight, len(self.levels))
        seen = total > 0
        hits = np.bincount(self.at, weight * (labels == self.k), len(self.levels))[seen] / weight.sum()
        total = total[seen] / weight.sum()
        again = isotonic_regression(hits / total, weights=total).x
        score, least, most = (
            _score(q, hits, total, self.rule) for q in (self.levels[seen], again, np.full(len(total), hits.sum()))
        )
        return score, score - least, most - least, most


def _score(q: Floats, hits: Floats, total: Floats, rule: Rule) -> float:
    """Mean score of forecasts q [L], of which `hits` of `total` [L] came true; both are shares of all."""
    if rule == "brier":
        return float((total * q**2 - 2 * hits * q + hits).sum())
    q = q.clip(NEARLY_0, NEARLY_1)
    return -float((hits * np.log(q) + (total - hits) * np.log1p(-q)).sum())


def _forecasts(p: Floats, rule: Rule) -> list[_Forecast]:
    return [_Forecast(p[:, k], k, rule) for k in range(p.shape[1])]


def _weights(p: Floats, weights: Floats | None) -> Floats:
    return np.ones(p.shape[1]) if weights is None else np.asarray(weights, np.float64)


def _with_sum(parts: Floats) -> Floats:
    return np.concatenate([parts, parts.sum(-1, keepdims=True)], -1)


def _resampled(n: int, replicates: int, seed: int) -> Iterator[Ints]:
    """How often each of n rows is drawn, [N], again and again."""
    random = np.random.Generator(np.random.Philox(key=[seed, n]))
    for _ in range(replicates):
        yield np.bincount(random.integers(n, size=n), minlength=n)


def _basic(value: Floats, replicates: Floats) -> tuple[Floats, Floats]:
    """The basic bootstrap interval, at least 0: it takes off the bias that recalibrating on few rows has, where the
    percentile one would double it (Davison & Hinkley 1997, section 5.2)."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(replicates, [tail, 100 - tail], axis=0)
    return np.maximum(2 * value - high, 0), np.maximum(2 * value - low, 0)


def _murphy(q: Floats, hit: np.ndarray, weight: Floats, bins: int) -> Floats:
    """[6]"""
    at = np.minimum((q * bins).astype(np.int64), bins - 1)
    share = np.bincount(at, weight, bins)
    full = np.where(share > 0, share, 1)
    forecast, happens = (np.bincount(at, weight * x, bins) / full for x in (q, hit))
    base = weight @ hit
    off, apart = q - forecast[at], hit - happens[at]
    score = weight @ (q - hit) ** 2
    reliability, resolution = share @ (forecast - happens) ** 2, share @ (happens - base) ** 2
    return np.array([score, reliability, resolution, base * (1 - base), weight @ off**2, 2 * weight @ (off * apart)])
