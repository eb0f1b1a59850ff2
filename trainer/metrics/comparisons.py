"""Groups against one another: every fairness metric with an interval and with what it is where groups do not differ.

The largest of many groups is large by chance: with eight groups of 50, the difference of recalls is 0.12 where there is
none. So intervals hold for all groups at once (Šidák 1967), and each value stands beside its null band.
"""

from typing import NamedTuple

import numpy as np

from trainer.metrics.calibration import Gaps
from trainer.metrics.catalogue import DISPARITIES, FAIRNESS, JOINT, RATES, bias_amplification, disparity
from trainer.metrics.intervals import (
    LEVEL,
    REPLICATES,
    Floats,
    Statistic,
    divide,
    highest,
    log_of,
    lowest,
    simultaneous,
    z_of,
)
from trainer.metrics.statistics import Proportion
from trainer.metrics.tally import Ints, Tally

DRAWN = 2**22
"""Binomials that are drawn of a null at most; larger ones have its normal limit, which takes a tenth of the time."""
AT_ONCE = 50


class Comparison(NamedTuple):
    """A fairness metric over the groups, [] or [K]."""

    value: Floats
    low: Floats
    high: Floats
    chance: Floats
    """Where no two groups differ, the value that 95 of 100 such data sets do not pass in the bad direction; NaN where
    there is no such question."""
    n: Ints
    """Samples of the group that has fewest, among those that are compared."""


Ends = tuple[Floats, Floats]
"""Least and greatest value over the groups, [R, …]."""


def comparisons(tally: Tally, level: float = LEVEL, seed: int = 0) -> dict[str, Comparison]:
    """Every fairness metric of a tally of two groups or more."""
    found: dict[str, Comparison] = {}
    ends: dict[str, Ends] = {}
    for number, rate in enumerate(dict.fromkeys(rate for rate, _ in FAIRNESS.values())):
        statistic = RATES[rate].of(tally)
        ends[rate] = null_ends(statistic, (seed << 8) + number)  # rates of the same samples are drawn apart
        at = simultaneous(level, _groups(statistic))
        interval = statistic.interval(at)
        for name in (name for name, (of, _) in FAIRNESS.items() if of == rate):
            over = FAIRNESS[name][1]
            value, chance = disparity(name, tally), _chance(ends[rate], over, level)
            found[name] = _comparison(value, _bounds(*interval, over), chance, statistic)
    found[JOINT[0]] = _equalised_odds(tally, ends, level)
    value, se = bias_amplification(tally)
    half = z_of(level) * se
    found[JOINT[1]] = Comparison(
        value, value - half, value + half, np.full(len(value), np.nan), _least(RATES["recall"].of(tally))
    )
    return {name: found[name] for name in (*FAIRNESS, *JOINT)}


def null_ends(statistic: Statistic, seed: int = 0) -> Ends:
    """Ends over the groups where all have the same true value, in REPLICATES data sets with as many samples.

    A calibration error has a perfectly calibrated model in every group: small groups seem worse calibrated.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, statistic.n.size]))
    if isinstance(statistic, Gaps):
        each = [Gaps(bins[None]).null((seed << 24) + g)[:, 0] for g, bins in enumerate(statistic.bins)]
        values = np.stack(each, 1)
        return lowest(values, 1), highest(values, 1)
    if isinstance(statistic, Proportion) and statistic.n.size * REPLICATES <= DRAWN:
        trials = statistic.trials
        pooled = np.nan_to_num(divide(statistic.hits.sum(0), trials.sum(0)))
        values = divide(random.binomial(trials, pooled, (REPLICATES, *trials.shape)), trials)
        return lowest(values, 1), highest(values, 1)
    return _normal_ends(*_pooled(statistic), random)


def _normal_ends(mean: Floats, sd: Floats, random: np.random.Generator) -> Ends:
    """Of normal values with mean […] and standard deviation [G, …]; the same draws for every class."""
    z = random.standard_normal((REPLICATES, len(sd), 1), np.float32)
    flat = sd.reshape(len(sd), -1).astype(np.float32)
    low, high = (
        np.full((REPLICATES, flat.shape[1]), np.inf, np.float32),
        np.full((REPLICATES, flat.shape[1]), -np.inf, np.float32),
    )
    for start in range(0, REPLICATES, AT_ONCE):  # as much as stays in the cache
        part = slice(start, start + AT_ONCE)
        for g, spread in enumerate(flat):
            drawn = z[part, g] * spread
            np.fmin(low[part], drawn, out=low[part])
            np.fmax(high[part], drawn, out=high[part])
    shape = (REPLICATES, *sd.shape[1:])
    return (mean + low.reshape(shape)).clip(0), (mean + high.reshape(shape)).clip(0)


def _pooled(statistic: Statistic) -> tuple[Floats, Floats]:
    """Mean over the groups, and the standard deviation that each group has around it; NaN for a group of nothing."""
    n = np.where(statistic.n > 0, statistic.n, np.nan)
    if isinstance(statistic, Proportion):
        mean = divide(statistic.hits.sum(0), statistic.trials.sum(0))
        return mean, np.sqrt(mean * (1 - mean) / n)
    low, high = statistic.interval()
    mean = divide(np.nansum(statistic.value * n, 0), np.nansum(n, 0))
    return mean, (high - low) / (2 * z_of(LEVEL))


def _bounds(low: Floats, high: Floats, over: str) -> Ends:
    """Of a disparity, where the value of each group lies from low to high, [G, …], all at once."""
    if over in {"min", "max"}:
        return DISPARITIES[over](low), DISPARITIES[over](high)
    if over == "difference":
        return np.maximum(highest(low) - lowest(high), 0), highest(high) - lowest(low)
    ratio = divide(lowest(low), highest(high)), np.minimum(divide(lowest(high), highest(low)), 1)
    return ratio if over == "ratio" else (-log_of(ratio[1]), -log_of(ratio[0]))


def _chance(ends: Ends, over: str, level: float) -> Floats:
    """The value of a disparity that replicates with these ends do not pass in the bad direction."""
    if over == "log_ratio":  # of a ratio of 0 it is infinite, which has no quantiles
        return -log_of(_chance(ends, "ratio", level))
    replicates = DISPARITIES[over](np.stack(ends))
    if over == "ratio":
        replicates = np.where(ends[1] == 0, 1, replicates)  # none in any group is parity
    return np.quantile(replicates, level if over in {"difference", "max"} else 1 - level, axis=0)


def _comparison(value: Floats, bounds: Ends, chance: Floats, statistic: Statistic) -> Comparison:
    absent = np.isnan(value)
    low, high, chance = (np.where(absent, np.nan, part) for part in (*bounds, chance))
    return Comparison(value, low, high, chance, np.where(absent, 0, _least(statistic)))


def _equalised_odds(tally: Tally, ends: dict[str, Ends], level: float) -> Comparison:
    """The larger of the differences of recall and of the false positive rate."""
    parts = [RATES[rate].of(tally) for rate in ("recall", "false_positive_rate")]
    bounds = [_bounds(*s.interval(simultaneous(level, 2 * _groups(s))), "difference") for s in parts]
    null = np.maximum(*(high - low for low, high in (ends["recall"], ends["false_positive_rate"])))
    low, high = (np.maximum(a, b) for a, b in zip(*bounds, strict=True))
    return _comparison(disparity(JOINT[0], tally), (low, high), np.quantile(null, level, axis=0), parts[0])


def _groups(statistic: Statistic) -> int:
    """Most groups that have a value, of any class."""
    return int((statistic.n > 0).sum(0).max())


def _least(statistic: Statistic) -> Ints:
    n = statistic.n
    return np.where(n > 0, n, np.iinfo(np.int64).max).min(0)
