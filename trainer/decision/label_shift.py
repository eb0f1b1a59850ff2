"""Label shift: rows in which only the frequency of classes differs from the validation rows, p(x | y) as it was.

Classes are called under a uniform prior, so that a rare class is called at all, and M, how often class j is called i,
is conditional on the class: its condition number says how well classes are told apart, not how imbalanced they are.
"""

from typing import Literal, NamedTuple

import numpy as np

from trainer.decision.calibrators import log_softmax
from trainer.decision.ledger import Ledger
from trainer.decision.strata import evenly
from trainer.decision.validation import Validation
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

Method = Literal["em", "bbse"]
MOST_ENTRIES = 2**21
"""Entries of logits, rows times classes, that an estimate uses; of more rows a sample."""
ROUNDS, SETTLED = 500, 1e-7
"""Of the fixed-point iteration, and the largest change of a share at which it ends."""
RIDGE = 1.0
"""Rows that the prior of calibration, N(1, 1) on the slope and N(0, 1) on biases, is worth."""
UNSEEN = 1.0
"""Validation rows of each class that are called at random: Dirichlet draws with a prior of that mass (Perks 1947), or a
class of few rows that are all called alike would be taken for one that always is."""
NEWTON, LARGE = 50, 100.0
"""Steps of a fit, and nats below which a log-probability counts as that many."""


class Sample(NamedTuple):
    """What both estimates are made from: N images and V validation rows."""

    images: Floats
    """[N, K] log p where classes occur as in the validation rows."""
    validation: Floats
    """[V, K] likewise."""
    labels: Ints
    """[V]"""
    reference: Floats
    """[K] share of each class in the validation rows."""


class Calls(NamedTuple):
    """The class that each row is called by argmax under the uniform prior, plus K where surely so."""

    images: Ints
    """[N]"""
    validation: Ints
    """[V]"""
    labels: Ints
    """[V]"""
    k: int


class Counts(NamedTuple):
    """How often each row counts."""

    images: Floats
    """[N]"""
    validation: Floats
    """[V]"""
    unseen: Floats | float
    """[2 K, K] validation rows that might be called so, by call and class."""


def sampled(
    ledger: Ledger, logits: Floats, validation: Validation, cells: Ints | None, random: np.random.Generator
) -> Sample:
    """All rows, or as many as MOST_ENTRIES leaves: of the images any, of the validation rows the same of each class."""
    k = len(ledger.classes)
    kept = np.sort(random.permutation(len(logits))[: MOST_ENTRIES // k])
    held = evenly(validation.labels, max(MOST_ENTRIES // k, k), random)
    labels = validation.labels[held]
    reference = np.bincount(labels, minlength=k) / len(labels)
    own = (None, None) if cells is None else (cells[kept], validation.cells[held])
    parts = zip((logits[kept], validation.logits[held]), own, strict=True)
    images, rows = (np.maximum(ledger.log_probabilities(z, reference, c), -LARGE) for z, c in parts)
    return Sample(images, rows, labels, reference)


def called(s: Sample, calibration: "Calibration") -> Calls:
    """Surely is more surely than half of the validation rows that are called so."""
    slope, bias = calibration.parameters[0], calibration.parameters[1:] - np.log(s.reference)
    parts = [log_softmax(slope * log_p + bias) for log_p in (s.images, s.validation)]
    k, (validation, top) = len(s.reference), (parts[1].argmax(1), parts[1].max(1))
    half = np.array([np.median(top[validation == c]) if (validation == c).any() else 0.0 for c in range(k)])
    images, rows = (p.argmax(1) + k * (p.max(1) > half[p.argmax(1)]) for p in parts)
    return Calls(images, rows, s.labels, k)


def by_class(c: Calls, counts: Counts) -> Floats:
    """[2 K, K] the part of the validation rows of each class that is called so."""
    calls = np.bincount(c.validation * c.k + c.labels, counts.validation, 2 * c.k**2).reshape(2 * c.k, c.k)
    calls += counts.unseen
    return calls / calls.sum(0)


def seen(c: Calls, counts: Counts) -> Floats:
    """[2 K] the part of the images that is called so."""
    return np.bincount(c.images, counts.images, 2 * c.k) / counts.images.sum()


def condition(c: Calls, counts: Counts, classes: tuple[str, ...]) -> tuple[float, tuple[str, ...]]:
    """Condition number of M, and the two classes that change most in the direction that changes the calls least."""
    _, singular, directions = np.linalg.svd(merged(by_class(c, counts)))
    weakest = tuple(classes[k] for k in np.argsort(-np.abs(directions[-1]), kind="stable")[:2])
    return float(singular[0] / singular[-1]) if singular[-1] > 0 else np.inf, weakest


def merged(bins: Floats) -> Floats:
    """[K, …] calls of each class, sure or not, of bins [2 K, …]."""
    return bins[: len(bins) // 2] + bins[len(bins) // 2 :]


def misfit(c: Calls, counts: Counts, prior: Floats) -> Floats:
    """[2 K] how much oftener each bin is met among the images than in the mixture of the validation classes."""
    return seen(c, counts) - by_class(c, counts) @ prior


def drawn(s: Sample, random: np.random.Generator) -> Counts:
    """A bootstrap of the images, and of the validation rows of each class, so that none goes missing."""
    n, k, order = len(s.images), len(s.reference), np.argsort(s.labels, kind="stable")
    counts = np.bincount(s.labels, minlength=k)
    starts = counts.cumsum() - counts
    label = s.labels[order]
    rows = order[starts[label] + (random.random(len(label)) * counts[label]).astype(np.int64)]
    images, held = np.bincount(random.integers(n, size=n), minlength=n), np.bincount(rows, minlength=len(label))
    unseen = random.standard_gamma(UNSEEN / (2 * k), (2 * k, k))
    return Counts(images.astype(np.float64), held.astype(np.float64), unseen)


def whole(s: Sample, unseen: float = 0.0) -> Counts:
    """Every row once, and as many more of each class called at random."""
    return Counts(np.ones(len(s.images)), np.ones(len(s.labels)), unseen / (2 * len(s.reference)))


def fit(method: Method, s: Sample, calibration: "Calibration", calls: Calls, counts: Counts, start: Floats) -> Floats:
    """[K] the estimate on counted rows."""
    if method == "bbse":
        confusion, met = merged(by_class(calls, counts)), merged(seen(calls, counts))
        found = np.maximum(np.linalg.lstsq(confusion, met, rcond=None)[0], 0)
        return found / found.sum()
    slope, bias = calibration.at(counts.validation)
    rows = counts.images > 0
    log_ratio = slope * s.images[rows] + bias - np.log(s.reference)
    return expectation_maximisation(log_ratio, counts.images[rows], start)


def expectation_maximisation(log_ratio: Floats, counts: Floats, start: Floats) -> Floats:
    """[K] the prior pi of greatest sum_i n_i log sum_y pi_y r_iy (Saerens et al. 2002), in rows of likelihood ratios r
    [N, K] up to a factor, with extrapolation of every three steps (SQUAREM: Varadhan & Roland 2008)."""
    ratio = np.exp(log_ratio - log_ratio.max(1, keepdims=True))
    share = counts / counts.sum()

    def step(prior: Floats) -> Floats:
        return prior * ((share / (ratio @ prior)) @ ratio)

    prior = np.maximum(start, 1e-3 / len(start))  # a share that is 0 would stay so
    prior = prior / prior.sum()
    for _ in range(ROUNDS):
        first = step(prior)
        second = step(first)
        if np.abs(second - first).max() < SETTLED:
            return second
        r, v = first - prior, second - 2 * first + prior
        length = max(float(np.linalg.norm(r) / max(np.linalg.norm(v), 1e-300)), 1.0)
        further = prior + 2 * length * r + length**2 * v
        prior = step(further / further.sum()) if (further > 0).all() else second
    return prior


class Calibration(NamedTuple):
    """Bias-corrected temperature scaling of log p, softmax(slope log p + bias), fitted on the validation rows: without
    it EM is biased (Alexandari et al. 2020)."""

    parameters: Floats
    """[1 + K] slope and biases."""
    gradients: Floats
    """[V, 1 + K] of the NLL of each row there."""
    hessian: Floats
    """[1 + K, 1 + K] of the penalised NLL of all rows."""

    def at(self, counts: Floats) -> tuple[float, Floats]:
        """Slope and biases [K] on rows counted [V]: one Newton step from those of all."""
        slope, *bias = self.parameters - np.linalg.solve(self.hessian, (counts - 1) @ self.gradients)
        return float(slope), np.array(bias)


def calibrated(s: Sample) -> Calibration:
    """By Newton's method with halved steps; the penalised NLL is convex."""
    centre = np.r_[1.0, np.zeros(len(s.reference))]
    found, now = centre, _penalised(s, centre, centre)
    for _ in range(NEWTON):
        gradients, hessian = _derivatives(s, found)
        step = np.linalg.solve(hessian, gradients.sum(0) + RIDGE * (found - centre))
        halves = (found - step / 2**k for k in range(20))
        later = next((x for x in halves if _penalised(s, x, centre) < now - 1e-9), None)
        if later is None:
            break
        found, now = later, _penalised(s, later, centre)
    return Calibration(found, *_derivatives(s, found))


def _penalised(s: Sample, parameters: Floats, centre: Floats) -> float:
    log_p = log_softmax(parameters[0] * s.validation + parameters[1:])
    return float(RIDGE / 2 * ((parameters - centre) ** 2).sum() - log_p[np.arange(len(s.labels)), s.labels].sum())


def _derivatives(s: Sample, parameters: Floats) -> tuple[Floats, Floats]:
    """Gradient of each row's NLL, [V, 1 + K], and Hessian of the penalised sum."""
    x, p = s.validation, np.exp(log_softmax(parameters[0] * s.validation + parameters[1:]))
    mean = (p * x).sum(1)
    hessian = RIDGE * np.eye(1 + x.shape[1])
    hessian[0, 0] += (p * x**2).sum() - (mean**2).sum()
    hessian[0, 1:] += (p * (x - mean[:, None])).sum(0)
    hessian[1:, 0] = hessian[0, 1:]
    hessian[1:, 1:] += np.diag(p.sum(0)) - p.T @ p
    p[np.arange(len(p)), s.labels] -= 1
    return np.column_stack([(p * x).sum(1), p]), hessian
