"""More data, or more capacity? How the error of each class falls as a model learns from more rows.

The error after learning from n rows of a class is taken to be a + b n^-c, with a, b >= 0 (Cortes et al. 1993; Hestness
et al. 2017): a is what is left with any number of rows. Runs that differ in nothing but their rows give the points.

- more data: twice the rows lower the error by more than GAIN;
- more capacity: more rows leave more than LEFT of it, and the error on the rows learnt from is above LEFT too;
- neither: twice the rows lower it by less than GAIN, and the rows learnt from are fitted: what is left is noise in
  labels or images, another distribution, or for regularisation to lower;
- not settled: the intervals leave it open; too few: fewer than LEAST rows of the class to see the error on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_loaders.audit.finding import Finding
from data_loaders.audit.summary import aligned
from data_loaders.index import Index, Rows
from trainer.checkpoint import load_model
from trainer.context import Local, device_for
from trainer.evaluate import logits_of, view
from trainer.metrics.intervals import REPLICATES, Floats
from trainer.metrics.tally import Ints
from trainer.probe.paired import Number, percentiles, rate

GAIN, LEFT = 0.01, 0.05
LEAST = 10
EXPONENTS = np.geomspace(0.05, 2, 40)
"""That are tried; those measured for images lie between 0.1 and 0.7 (Hestness et al. 2017)."""
SEED = 5

Verdict = Literal["too few", "more data", "more capacity", "neither", "not settled"]


class Run(NamedTuple):
    """A model that learnt from a share of the rows of each class."""

    share: float
    wrong: np.ndarray
    """Whether its decision is wrong, bool [N], of the same N rows in all runs, none of which it learnt from."""


class Curve(NamedTuple):
    """Of a class, or of all: the mean over the classes."""

    name: str
    rows: list[int]
    """Learnt from, in each run."""
    errors: list[Number]
    """Of each run."""
    learnt: Number
    """Error on the rows learnt from, all of them."""
    limit: Number
    """The error a that is left."""
    exponent: Number
    """How fast it falls, c."""
    gain: Number
    """By how much twice the rows lower the error."""
    verdict: Verdict


class Points(NamedTuple):
    """Errors of M runs, of one class or of all."""

    shares: Floats
    """[M] of the most rows."""
    errors: Floats
    """[M]"""
    resampled: Floats
    """[R, M] the same on other rows, drawn from those seen."""
    n: int
    """Rows seen."""


class Law(NamedTuple):
    """a + b (n / most n)^-c, of R replicates, [R]."""

    a: Floats
    b: Floats
    c: Floats

    @property
    def gain(self) -> Floats:
        """By how much twice the most rows lower the error."""
        return self.b * (1 - 2**-self.c)


def learning_curves(
    runs: list[Run], labels: Ints, learnt: tuple[Ints, np.ndarray], classes: tuple[str, ...]
) -> list[Curve]:
    """Of all classes, then of each, from M runs of three shares or more about rows of these labels [N].

    `learnt` has the labels of the rows that a run of the largest share learnt from, and whether its decisions about
    them are wrong, both [N'].
    """
    shares = np.array([run.share for run in runs])
    wrong = np.stack([run.wrong for run in runs], 1)
    own = [rate(learnt[1][learnt[0] == k]) for k in range(len(classes))]
    points = [_points(shares, wrong[labels == k], k) for k in range(len(classes))]
    curves = [_curve(name, line, of) for name, line, of in zip(classes, own, points, strict=True)]
    seen = [of for of in points if of.n]
    if not seen:
        return curves
    errors, resampled = np.mean([of.errors for of in seen], 0), np.mean([of.resampled for of in seen], 0)
    return [_curve("all", _mean(own), Points(shares, errors, resampled, len(labels))), *curves]


def wrong_of(run: Path, index: Index, rows: Rows) -> np.ndarray:
    """Whether the decision of the model in a run's folder is wrong about each of the rows, bool [N]."""
    rows = np.asarray(rows)
    trained = load_model(run / "model", device_for("auto"))
    context = Local(run, next(trained.model.parameters()).device)
    logits = logits_of(trained.model, index, trained.config.data, rows, context)
    return view("ledger", trained.ledger, logits, index.cells_of(rows)).decisions != index.labels_of(rows)


def of_several(runs: list[Run]) -> bool:
    """Whether a share has several runs, so that the intervals hold the chance of training too."""
    return len({run.share for run in runs}) < len(runs)


def fit(shares: Floats, errors: Floats, n: int) -> Law:
    """The laws nearest to errors [R, M] after these shares [M] of the most rows, each seen on n rows: least squares,
    weighted by the binomial variance of the mean errors, in a and b exactly, over the EXPONENTS."""
    mean = (errors.mean(0) * n + 1) / (n + 2)
    weight = 1 / (mean * (1 - mean))
    weight /= weight.sum()
    x = (shares / shares.max()) ** -EXPONENTS[:, None]
    x_mean, y_mean = x @ weight, errors @ weight
    centred = (x - x_mean[:, None]) * weight
    slope = np.maximum((errors @ centred.T) / (centred * x).sum(1), 0)
    level = y_mean[:, None] - slope * x_mean
    through_0 = (errors @ (x * weight).T) / (x**2 @ weight)
    slope, level = np.where(level < 0, through_0, slope), np.maximum(level, 0)
    residual = ((errors[:, None] - level[..., None] - slope[..., None] * x) ** 2 @ weight[:, None])[..., 0]
    best = residual.argmin(1)
    r = np.arange(len(errors))
    return Law(level[r, best], slope[r, best], EXPONENTS[best])


def findings(found: list[Curve]) -> Iterator[Finding]:
    """Classes that more data or more capacity would help."""
    for c in found:
        if c.verdict == "more data":
            text = f"{c.name}: twice the rows would lower the error by {c.gain}, from {c.errors[-1]}; it lacks data"
            yield Finding("overfitting", c.name, text, *c.gain[:3], np.nan, c.gain.n)
        if c.verdict == "more capacity":
            text = (
                f"{c.name}: any number of rows would leave an error of {c.limit}, and on the rows learnt from it is "
                f"{c.learnt}; it lacks capacity or training"
            )
            yield Finding("underfitting", c.name, text, *c.limit[:3], np.nan, c.limit.n)


def summary(found: list[Curve]) -> str:
    """A table for the terminal."""
    lines = [
        (c.name, f"{c.rows[-1]:,}", str(c.errors[-1]), str(c.learnt), str(c.gain), str(c.limit), c.verdict)
        for c in found
    ]
    head = ("class", "rows", "error", "on rows learnt", "less by twice the rows", "left in the limit", "verdict")
    return aligned(head, lines)


def _points(shares: Floats, wrong: np.ndarray, label: int) -> Points:
    """Of rows of one class, bool [N, M]; they are drawn anew by the pattern of the runs that are wrong about them."""
    n, m = wrong.shape
    patterns, counts = np.unique(wrong, axis=0, return_counts=True)
    if not n:
        return Points(shares, np.full(m, np.nan), np.full((REPLICATES, m), np.nan), 0)
    random = np.random.Generator(np.random.Philox(key=[SEED, label]))
    drawn = random.multinomial(n, counts / n, REPLICATES) @ patterns.astype(np.float64) / n
    return Points(shares, wrong.mean(0), drawn, n)


def _curve(name: str, learnt: Number, of: Points) -> Curve:
    rows = np.rint(learnt.n * of.shares / of.shares.max()).astype(np.int64).tolist()
    intervals = [percentiles(drawn) for drawn in of.resampled.T] if of.n else [(np.nan, np.nan)] * len(rows)
    errors = [Number(float(e), *ends, of.n) for e, ends in zip(of.errors, intervals, strict=True)]
    if of.n < LEAST or not learnt.n:
        none = Number(np.nan, np.nan, np.nan, of.n)
        return Curve(name, rows, errors, learnt, none, none, none, "too few")
    random = np.random.Generator(np.random.Philox(key=[SEED, of.n + 2**32]))
    chance = of.resampled + random.normal(0, _between_runs(of), of.resampled.shape)
    best, others = fit(of.shares, of.errors[None], of.n), fit(of.shares, chance, of.n)
    limit, exponent, gain = (
        Number(float(value[0]), *percentiles(values), of.n)
        for value, values in ((best.a, others.a), (best.c, others.c), (best.gain, others.gain))
    )
    return Curve(name, rows, errors, learnt, limit, exponent, gain, _verdict(learnt, limit, gain))


def _verdict(learnt: Number, limit: Number, gain: Number) -> Verdict:
    if gain.low > GAIN:
        return "more data"
    if limit.low > LEFT and learnt.low > LEFT:
        return "more capacity"
    return "neither" if gain.high < GAIN and learnt.high < LEFT else "not settled"


def _between_runs(of: Points) -> float:
    """Standard deviation of the error between runs of the same share, over all shares; 0 where each has one."""
    share = np.unique(of.shares, return_inverse=True)[1]
    mean = np.bincount(share, of.errors) / np.bincount(share)
    free = len(share) - len(mean)
    return float(np.sqrt(((of.errors - mean[share]) ** 2).sum() / free)) if free else 0.0


def _mean(numbers: list[Number]) -> Number:
    """Of independent numbers (Zou & Donner 2008)."""
    value, low, high = np.array([line[:3] for line in numbers if line.n]).reshape(-1, 3).T
    below, above = (float(np.sqrt(((end - value) ** 2).sum())) / max(len(value), 1) for end in (low, high))
    mean = float(value.mean()) if len(value) else np.nan
    return Number(mean, mean - below, mean + above, sum(line.n for line in numbers))
