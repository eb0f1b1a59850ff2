"""Where a model underfits and where it overfits: by class, by group and by class within group.

A cell is a class in a group. A line about a whole group, or about all rows, is the mean over its classes, each as
heavy, so it is the same quantity in splits of other class mixes. `before` is the split that the model learnt from,
`after` another one.

- overfit: from before to after, the recall falls by more than FALL, or the NLL rises by more than RISE;
- underfit: the recall before is short of what the labels admit by more than SHORT;
- too few: a cell has fewer than LEAST rows in either split, or a group no other cells than such: nothing is said;
- fine: neither of them can be told, which says little where there are few rows.

Told is what one-sided tests of these bounds reject, adjusted over all lines of a grouping (Benjamini & Hochberg 1995),
at LEVEL. What the labels admit is 1 less the share of wrong labels of the class, and 1 where nothing is known of it.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from data_loaders.audit.finding import Finding
from data_loaders.audit.summary import aligned
from trainer.metrics.groups import GroupValues, groupings
from trainer.metrics.intervals import LEVEL as INTERVAL
from trainer.metrics.intervals import Floats, benjamini_hochberg, divide, wilson, z_of
from trainer.metrics.tally import SCALE, SQUARE_SCALE, Ints, Tally
from trainer.probe.paired import Number

LEAST = 10
LEVEL = 0.05
FALL, RISE = 0.05, 0.1
"""Of the recall, and of the NLL in nats."""
SHORT = 0.1
SHOWN = 20

Verdict = Literal["too few", "fine", "underfit", "overfit", "underfit and overfit"]
VERDICTS: tuple[Verdict, ...] = ("fine", "underfit", "overfit", "underfit and overfit")


class Change(NamedTuple):
    """Of one measure."""

    before: Number
    after: Number
    change: Number
    """After less before, as of independent rows (Newcombe 1998)."""


class Fit(NamedTuple):
    """Of a cell or of a group."""

    grouping: str
    """`all`, a group column, or the columns joined by x."""
    group: str
    name: str
    """Class; empty of a whole group."""
    recall: Change
    nll: Change
    """In nats."""
    admitted: float
    """Recall that the labels admit."""
    p_overfit: float
    """Of a fall of the recall or a rise of the NLL within the bounds; adjusted."""
    p_underfit: float
    """Of a shortfall within its bound; adjusted."""
    verdict: Verdict

    @property
    def where(self) -> str:
        return ", ".join(part for part in (self.name, self.group) if part and part != "all") or "all"


class Band(NamedTuple):
    """Numbers with their intervals and standard errors; arrays of one shape."""

    value: Floats
    low: Floats
    high: Floats
    error: Floats
    n: Ints

    def number(self, place: tuple[int, ...]) -> Number:
        value, low, high, _, n = (part[place].item() for part in self)
        return Number(value, low, high, n)


def fits(
    before: Tally, after: Tally, classes: tuple[str, ...], values: GroupValues, admitted: Floats | None = None
) -> list[Fit]:
    """Every group and cell, from the tallies of two splits under one view; `admitted` [K] is the recall that the labels
    admit."""
    ceiling = np.ones(len(classes)) if admitted is None else admitted
    return [
        fit
        for grouping in groupings(values)
        for fit in _of(grouping.of(before), grouping.of(after), classes, ceiling, grouping.name, grouping.groups)
    ]


def findings(found: list[Fit], split: str) -> Iterator[Finding]:
    """What is told of classes and groups; of a class in a group only where it is not told of the class."""
    everywhere = {(fit.name, fit.verdict) for fit in found if fit.grouping == "all"}
    for fit in found:
        if fit.grouping != "all" and fit.name and (fit.name, fit.verdict) in everywhere:
            continue
        recall, nll = fit.recall, fit.nll
        if fit.verdict.startswith("underfit"):
            text = (
                f"{fit.where}: the recall on the rows learnt from is {recall.before}, n = {recall.before.n:,}, "
                f"where their labels admit {fit.admitted:.2f}"
            )
            yield Finding("underfitting", fit.where, text, *recall.before[:3], np.nan, recall.before.n)
        if fit.verdict.endswith("overfit"):
            text = (
                f"{fit.where}: from the rows learnt from to {split}, the recall changes by {recall.change.signed()} "
                f"and the NLL by {nll.change.signed()}, n = {recall.after.n:,}"
            )
            yield Finding("overfitting", fit.where, text, *recall.change[:3], np.nan, recall.after.n)


def summary(found: list[Fit], split: str) -> str:
    """A short table for the terminal, what is told of all classes and groups first."""
    order = sorted(found, key=lambda fit: fit.verdict in ("fine", "too few"))[:SHOWN]
    lines = [
        (f.where, str(f.recall.before), str(f.recall.after), f.nll.change.signed(), f"{f.recall.after.n:,}", f.verdict)
        for f in order
    ]
    return aligned(("", "recall learnt", f"in {split}", "NLL rises by", "n", "verdict"), lines)


def _of(
    before: Tally, after: Tally, classes: tuple[str, ...], admitted: Floats, grouping: str, groups: list[str]
) -> list[Fit]:
    """Of the groups of a grouping: each as a whole, then its classes."""
    known = np.minimum(before.confusion.sum(2), after.confusion.sum(2)) >= LEAST
    seen = before.confusion.sum(2) + after.confusion.sum(2) > 0
    ceiling = np.broadcast_to(admitted, known.shape)
    ceiling = np.concatenate([_mean(ceiling, known)[:, None], ceiling], 1)
    recall, nll = ([_with_mean(of(tally), known) for tally in (before, after)] for of in (_recall, _nll))
    changes = [_less(b, a) for a, b in (recall, nll)]
    told = np.concatenate([known.any(1, keepdims=True), known], 1)
    fall, rise = _p(-changes[0].value - FALL, changes[0].error), _p(changes[1].value - RISE, changes[1].error)
    p_over = _adjusted(np.minimum(2 * np.fmin(fall, rise), 1), told)
    p_under = _adjusted(_p(ceiling - SHORT - recall[0].value, recall[0].error), told)
    verdict = (p_under <= LEVEL) + 2 * (p_over <= LEVEL)
    return [
        Fit(
            grouping,
            group,
            name,
            Change(*(band.number((g, k)) for band in (*recall, changes[0]))),
            Change(*(band.number((g, k)) for band in (*nll, changes[1]))),
            float(ceiling[g, k]),
            float(p_over[g, k]),
            float(p_under[g, k]),
            VERDICTS[verdict[g, k]] if told[g, k] else "too few",
        )
        for g, group in enumerate(groups)
        for k, name in enumerate(("", *classes))
        if k == 0 or seen[g, k - 1]
    ]


def _recall(t: Tally) -> Band:
    """[G, K]; the error is of a rate with two more rows, one of them right (Agresti & Caffo 2000)."""
    hits, n = np.diagonal(t.confusion, axis1=1, axis2=2), t.confusion.sum(2)
    shrunk = (hits + 1) / (n + 2)
    return Band(divide(hits, n), *wilson(hits, n), np.sqrt(shrunk * (1 - shrunk) / (n + 2)), n)


def _nll(t: Tally) -> Band:
    """[G, K] in nats, with a normal interval."""
    n = t.confusion.sum(2)
    mean = divide(t.scores[:, :, 0, 0] / SCALE, n)
    squares = (t.scores[:, :, 0, 1] + n / 2) / SQUARE_SCALE - n * mean**2  # half a unit a row for its rounding
    error = np.sqrt(divide(np.maximum(squares, 0), n * np.maximum(n - 1, 0)))
    return Band(mean, np.maximum(mean - z_of(INTERVAL) * error, 0), mean + z_of(INTERVAL) * error, error, n)


def _less(a: Band, b: Band) -> Band:
    """a - b, of independent rows: Newcombe 1998, method 10."""
    below, above = np.hypot(a.value - a.low, b.high - b.value), np.hypot(a.high - a.value, b.value - b.low)
    gap = a.value - b.value
    return Band(gap, gap - below, gap + above, np.hypot(a.error, b.error), np.minimum(a.n, b.n))


def _with_mean(band: Band, known: np.ndarray) -> Band:
    """[G, 1 + K] with the mean of the classes that are known, [G, K], ahead of them (Zou & Donner 2008)."""

    def beside(own: np.ndarray, part: np.ndarray) -> np.ndarray:
        return np.concatenate([own[:, None], part], 1)

    mean = _mean(band.value, known)
    below, above, error = (
        divide(np.sqrt(np.where(known, part**2, 0.0).sum(1)), known.sum(1))
        for part in (band.value - band.low, band.high - band.value, band.error)
    )
    return Band(
        beside(mean, band.value),
        beside(mean - below, band.low),
        beside(mean + above, band.high),
        beside(error, band.error),
        beside(np.where(known, band.n, 0).sum(1), band.n),
    )


def _mean(values: Floats, known: np.ndarray) -> Floats:
    return divide(np.where(known, values, 0.0).sum(1), known.sum(1))


def _p(above: Floats, error: Floats) -> Floats:
    """That chance lifts a number of this standard error so far above a bound; NaN where there is none."""
    from scipy.special import ndtr

    far = np.divide(above, error, out=np.where(above > 0, np.inf, -np.inf), where=error > 0)
    return np.where(np.isnan(above), np.nan, ndtr(-far))


def _adjusted(p: Floats, told: np.ndarray) -> Floats:
    return benjamini_hochberg(np.where(told, p, np.nan).ravel()).reshape(p.shape)
