"""How calibrators are fitted, each variant with its settings: on validation rows, weighted to the prior of use.

All but isotonic ones are drawn towards plain temperature or towards no change at all, so that a class of few rows stays
near it. A variant gives candidates, the simplest first; trainer/decision/calibrate.py chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveFloat

from data_loaders.settings import Settings
from data_loaders.stream import scramble
from trainer.decision.calibrators import Affine, Betas, Curves, Fitted, Temperatures, against_rest, log_softmax, sloped
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

BOUNDS = (0.05, 20.0)
"""Of a temperature."""
FEW = 100
"""Rows below which plain temperature is all that they can bear."""
Spreads = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
SPREADS = (0.1, 0.3, 1.0)
WEAK = 3.0
"""Nats; the spread of what a beta curve may be: only settles classes that are told apart without a mistake."""
MATRIX_CLASSES = 50
"""A matrix has K² numbers, and a step of its fit takes N K² products; above, hours would go into noise."""
CURVE_CLASSES = 100
"""Above, each class's own curve would rest on a hundredth of the rows."""


class Rows(NamedTuple):
    """N validation rows, in an order that depends on nothing but themselves."""

    logits: Floats
    """[N, K], float64."""
    labels: Ints
    """[N]"""
    cells: Ints
    """[N], -1 where unknown."""
    prior: Floats
    """[K], in use."""
    logit_prior: Floats
    """[K], that the logits are conditioned on."""

    @property
    def weights(self) -> Floats:
        """[N], of sum 1, that make classes count as in use; a class without rows has none."""
        seen = np.bincount(self.labels, minlength=len(self.prior))
        weights = (self.prior / np.maximum(seen, 1))[self.labels]
        return weights / weights.sum()

    @property
    def worth(self) -> float:
        """Rows of equal weight that tell as much (Kish 1965)."""
        return 1 / float((self.weights**2).sum())

    @property
    def shift(self) -> Floats:
        """[K], from the logits to the prior in use, nats."""
        return np.log(self.prior) - np.log(self.logit_prior)

    @property
    def seen_shift(self) -> Floats:
        """[K], to the prior in use of the classes that have rows; -inf for others, which these rows can say nothing of:
        else any fit would learn that they never occur."""
        return np.where(np.bincount(self.labels, minlength=len(self.prior)) > 0, self.shift, -np.inf)

    def take(self, which: Ints | slice) -> Rows:
        return self._replace(logits=self.logits[which], labels=self.labels[which], cells=self.cells[which])

    def losses(self, calibrator: Fitted, shift: Floats | None = None) -> Floats:
        """[N] -log p(label) in nats, under the prior in use of the classes that have rows."""
        logits = calibrator(self.logits, self.cells) + (self.seen_shift if shift is None else shift)
        logits -= logits.max(1, keepdims=True)
        own = logits[np.arange(len(self.labels)), self.labels]
        return np.log(np.exp(logits, out=logits).sum(1)) - own


def ordered(rows: Rows) -> Rows:
    """By class, and within it by a hash of the logits: so sums, and the parts of a cross-validation, are the same for
    any order of the rows and of the classes."""
    own = rows.logits[np.arange(len(rows.labels)), rows.labels]
    low, high = rows.logits.min(1), rows.logits.max(1)
    key = scramble((own - low).view(np.uint64) + scramble((high - low).view(np.uint64)))
    return rows.take(np.lexsort((rows.cells, key, rows.labels)))


class Candidate(NamedTuple):
    """One way to fit a calibrator."""

    kind: str
    spread: float | None
    """Nats that calibrated logits may be expected to lie from those of a temperature."""
    fit: Callable[[Rows], Fitted]


class Nothing(Settings):
    """Leaves the logits as they are."""

    kind: Literal["none"] = "none"

    def candidates(self, rows: Rows) -> list[Candidate]:
        return [Candidate(self.kind, None, lambda _: Temperatures(1.0))]


class Temperature(Settings):
    """One number that divides all logits (Guo et al. 2017), and so keeps their order."""

    kind: Literal["temperature"] = "temperature"

    def candidates(self, rows: Rows) -> list[Candidate]:
        return [Candidate(self.kind, None, lambda rows: Temperatures(temperature(rows)))]


class BiasCorrected(Settings):
    """Temperature and a bias for each class (Alexandari et al. 2020): mends what a model holds of how often classes
    occur, such as where a class that is rare in training is known by heart."""

    kind: Literal["bias_corrected"] = "bias_corrected"
    spreads: Spreads = SPREADS
    """Nats that biases may be expected to have; one is chosen by cross-validation."""

    def candidates(self, rows: Rows) -> list[Candidate]:
        return _affine_candidates(self.kind, 0, self.spreads)


class Vector(Settings):
    """A slope and a bias for each class (Guo et al. 2017), of its log-probability."""

    kind: Literal["vector"] = "vector"
    spreads: Spreads = SPREADS
    """Nats by which biases, and slopes, may be expected to move a logit; one is chosen by cross-validation."""

    def candidates(self, rows: Rows) -> list[Candidate]:
        return _affine_candidates(self.kind, 1, self.spreads)


class Dirichlet(Settings):
    """A slope of each class by each, and biases (Kull et al. 2019, ODIR; the diagonal is drawn to its mean too)."""

    kind: Literal["dirichlet"] = "dirichlet"
    spreads: Spreads = SPREADS
    """Nats by which biases, own slopes, and slopes of others, may be expected to move a logit; one is chosen by
    cross-validation."""

    def candidates(self, rows: Rows) -> list[Candidate]:
        return _affine_candidates(self.kind, 2, self.spreads)


class Beta(Settings):
    """A curve of three numbers for each class against the rest (Kull et al. 2017), normalised."""

    kind: Literal["beta"] = "beta"

    def candidates(self, rows: Rows) -> list[Candidate]:
        return [Candidate(self.kind, None, betas)]


class Isotonic(Settings):
    """Any rising curve for each class against the rest (Zadrozny & Elkan 2002), normalised; needs many rows."""

    kind: Literal["isotonic"] = "isotonic"

    def candidates(self, rows: Rows) -> list[Candidate]:
        return [Candidate(self.kind, None, curves)]


class GroupTemperature(Settings):
    """A temperature for each cell of the groups, drawn to that of all the more, the fewer rows a cell has.

    It needs the group of a row in use, and treats two persons with the same image differently by their group. Where
    groups are protected, that may be unlawful (disparate treatment, direct discrimination), whomever it favours.
    """

    kind: Literal["group_temperature"] = "group_temperature"

    def candidates(self, rows: Rows) -> list[Candidate]:
        return [Candidate(self.kind, None, group_temperatures)]


class Best(Settings):
    """Of bias_corrected, vector, dirichlet, beta and isotonic, the one that in cross-validation surely gains the most
    NLL over plain temperature; plain temperature where none does, and below 100 rows."""

    kind: Literal["best"] = "best"

    def candidates(self, rows: Rows) -> list[Candidate]:
        n, classes = rows.logits.shape
        kinds: list[AnyCalibrator] = [Temperature()]
        if n >= FEW:
            kinds += [BiasCorrected(), Vector()]
            kinds += [Dirichlet()] if classes <= MATRIX_CLASSES else []
            kinds += [Beta(), Isotonic()] if classes <= CURVE_CLASSES else []
        return [candidate for kind in kinds for candidate in kind.candidates(rows)]


AnyCalibrator = Annotated[
    Best | Nothing | Temperature | BiasCorrected | Vector | Dirichlet | Beta | Isotonic | GroupTemperature,
    Field(discriminator="kind"),
]


def _affine_candidates(kind: str, dimensions: int, spreads: Sequence[float]) -> list[Candidate]:
    return [Candidate(kind, s, partial(affine, dimensions=dimensions, spread=s)) for s in sorted(spreads)]


def temperature(rows: Rows) -> float:
    """Of least NLL, which is convex in 1 / temperature, so there is one."""
    weights = rows.weights
    return _least(lambda t: float(weights @ rows.losses(Temperatures(t))))


def affine(rows: Rows, dimensions: int, spread: float) -> Affine:
    """Of least NLL with a ridge: convex, so there is one; slopes have 0, 1 or 2 dimensions.

    The ridge is a normal prior: biases, deviations of the slopes of classes from their mean, and slopes by other
    classes each move a logit by about `spread` nats. A class without rows gets the mean slope and no bias.
    """
    from scipy.optimize import minimize

    log_q, weights, shift = log_softmax(rows.logits), rows.weights, rows.seen_shift
    every, (_, k) = np.arange(len(rows.labels)), log_q.shape
    shape, numbers = (k,) * dimensions, k**dimensions
    size = float(weights @ (log_q**2).mean(1))
    pull = 1 / (2 * spread**2 * rows.worth)

    def loss(numbers_and_biases: Floats) -> tuple[float, Floats]:
        slopes, biases = numbers_and_biases[:numbers].reshape(shape), numbers_and_biases[numbers:]
        log_p = log_softmax(sloped(log_q, slopes) + biases + shift)
        nll = -float(weights @ log_p[every, rows.labels])
        slope = np.exp(log_p) * weights[:, None]
        slope[every, rows.labels] -= weights
        ridge, of_slopes = _ridge(slopes, size)
        by_slopes = slope.T @ log_q if dimensions == 2 else (slope * log_q).sum(0)
        if not dimensions:
            by_slopes = by_slopes.sum()
        gradient = np.append(by_slopes + pull * of_slopes, slope.sum(0) + 2 * pull * biases)
        return nll + pull * (ridge + float(biases @ biases)), gradient

    start = np.append(np.eye(k) if dimensions == 2 else np.ones(numbers), np.zeros(k))
    options = {"maxiter": 1000, "maxcor": 30, "ftol": 1e-11, "gtol": 1e-7}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return Affine(found[:numbers].reshape(shape), found[numbers:])


def betas(rows: Rows) -> Betas:
    """Each class against the rest, by a logistic regression whose a and b are not negative, drawn weakly to no change;
    a class without rows, or alone, stays as it is."""
    log_q, log_rest = against_rest(rows.logits, rows.shift)
    numbers = [_beta(log_q[:, k], log_rest[:, k], rows.labels == k, rows) for k in range(log_q.shape[1])]
    return Betas(*np.array(numbers).T, shift=rows.shift)


def _beta(log_q: Floats, log_rest: Floats, hit: np.ndarray, rows: Rows) -> Floats:
    """[3] a, b and c."""
    from scipy.optimize import minimize

    same = np.array([1.0, 1.0, 0.0])
    if hit.all() or not hit.any():
        return same
    weights, sign = rows.weights, np.where(hit, 1.0, -1.0)
    design = np.stack([log_q, -log_rest, np.ones(len(hit))], 1)
    pull = weights @ design**2 / (2 * WEAK**2 * rows.worth)

    def loss(numbers: Floats) -> tuple[float, Floats]:
        against = -sign * (design @ numbers)
        off = numbers - same
        gradient = -(weights * sign * np.exp(-np.logaddexp(0, -against))) @ design
        return float(weights @ np.logaddexp(0, against) + pull @ off**2), gradient + 2 * pull * off

    bounds = [(0, None), (0, None), (None, None)]
    return minimize(loss, same, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12, "gtol": 1e-8}).x


def curves(rows: Rows) -> Curves:
    """Each class against the rest, by isotonic regression (pool adjacent violators), within what Laplace's rule of
    succession gives to a class that never, or always, occurs; a class without rows, or alone, stays as it is."""
    from scipy.optimize import isotonic_regression

    q, weights, least = np.exp(against_rest(rows.logits, rows.shift)[0]), rows.weights, 1 / (rows.worth + 2)
    knots: list[Floats] = [np.zeros((3, 0))]
    for k in range(q.shape[1]):
        hit = rows.labels == k
        if hit.all() or not hit.any():
            continue
        inputs, at = np.unique(q[:, k], return_inverse=True)
        weight = np.bincount(at, weights)
        level = isotonic_regression(np.bincount(at, weights * hit) / weight, weights=weight).x
        turns = np.flatnonzero(np.diff(level))
        ends = np.unique(np.concatenate([[0], turns, turns + 1, [len(level) - 1]]))
        knots.append(np.stack([np.full(len(ends), k), inputs[ends], level[ends].clip(least, 1 - least)]))
    return Curves(*np.concatenate(knots, 1), shift=rows.shift)


def group_temperatures(rows: Rows) -> Temperatures:
    """log T of each cell, drawn to that of all rows by empirical Bayes: by the variance that an estimate from its rows
    has, against the variance between cells (DerSimonian & Laird 1986, of one Newton step from that of all rows)."""
    overall = temperature(rows)
    cells = np.unique(rows.cells[rows.cells >= 0])
    parts = [_Part.of(rows, rows.cells == cell, overall) for cell in cells]
    between = _between(np.array([p.score for p in parts]), np.array([p.information for p in parts]))
    by_cell = np.full(int(cells.max(initial=-1)) + 1, overall)
    if between > 0:
        by_cell[cells] = [p.drawn(overall, between) for p in parts]
    return Temperatures(overall, by_cell)


class _Part(NamedTuple):
    """Rows of one cell, weighted so that they count as many as they are worth."""

    rows: Rows
    weights: Floats
    shift: Floats
    score: float
    """Of log T, at the temperature of all."""
    information: float
    """Fisher's."""

    @classmethod
    def of(cls, rows: Rows, mine: np.ndarray, overall: float) -> _Part:
        part, weights = rows.take(mine), rows.weights[mine]
        weights = weights * weights.sum() / (weights**2).sum()
        scaled = part.logits / overall
        p = np.exp(log_softmax(scaled + rows.seen_shift))
        mean = (p * scaled).sum(1)
        score = weights @ (mean - scaled[np.arange(len(weights)), part.labels])
        information = weights @ (p * (scaled - mean[:, None]) ** 2).sum(1)
        return cls(part, weights, rows.seen_shift, float(score), float(information))

    def drawn(self, overall: float, between: float) -> float:
        """The temperature of most posterior density."""

        def loss(t: float) -> float:
            far = np.log(t / overall) ** 2 / (2 * between)
            return float(self.weights @ self.rows.losses(Temperatures(t), self.shift) + far)

        return _least(loss)


def _between(score: Floats, information: Floats) -> float:
    """Variance of log T between cells, from scores and informations at the common one; 0 if chance explains them."""
    told = information > 0
    step, weight = score[told] / information[told], information[told]
    if len(step) < 2:
        return 0.0
    mean = weight @ step / weight.sum()
    excess = weight @ (step - mean) ** 2 - (len(step) - 1)
    return max(float(excess / (weight.sum() - (weight**2).sum() / weight.sum())), 0.0)


def _least(loss: Callable[[float], float]) -> float:
    """The temperature of least loss."""
    from scipy.optimize import minimize_scalar

    bounds = np.log(BOUNDS)
    found = minimize_scalar(lambda log_t: loss(float(np.exp(log_t))), bounds=bounds, method="bounded", options=_EXACT)
    return float(np.exp(found.x))


_EXACT = {"xatol": 1e-5}


def _ridge(slopes: Floats, size: float) -> tuple[float, Floats]:
    """What slopes cost, and the gradient: `size` is the mean square of what they multiply."""
    if slopes.ndim == 0:
        return 0.0, np.zeros(())
    own = np.diagonal(slopes) if slopes.ndim == 2 else slopes
    apart = own - own.mean()
    if slopes.ndim == 1:
        return size * float(apart @ apart), 2 * size * apart
    others, k = slopes - np.diag(own), len(own)
    ridge = size * (float(apart @ apart) + (k - 1) * float((others**2).sum()))
    return ridge, 2 * size * (np.diag(apart) + (k - 1) * others)
