"""What a decision costs, and how much of that a threshold would mend.

With costs C[y, d], scores p(y | x) and the prior pi of use, decisions d cost R(d) = sum_y pi_y E[C[y, d(x)] | y], each
expectation a mean over the evaluated rows of class y. The oracle on the same scores decides

    argmin_d sum_y C[y, d] w_y p(y | x),   w > 0 (for two classes a threshold, Elkan 2001; w = 1 is the Bayes decision),

with w fitted to least R on other rows than those that it decides (cross-fitting), so that it is not flattered. Then

    decision bias = R(decisions) - R(oracle)    the regret, which other priors, costs or thresholds mend
    score bias    = what R(oracle) still is     by class and by group: no threshold mends a gap between these

The same split is read off a cost curve as the distance of an operating point to the lower envelope (Drummond & Holte
2006). The regret is a lower bound on average, since w is not known but fitted; it may come out below 0.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array

from trainer.metrics.catalogue import Floats, divide
from trainer.metrics.tally import Ints

FOLDS = 2
SOFTNESS = (0.3, 0.1)
"""Of the smooth decisions that w is fitted with, in turn, in units of what deciding at random costs."""
RIDGE = 1e-3
"""On log w, in the same units: it holds a class that is best never decided."""
MANY = 64
"""Classes from which on the costs are kept sparse."""

Objective = Callable[[Floats], tuple[float, Floats]]
"""Decisions as shares [N, D] -> loss, and its gradient [N, D]."""


def costs_of(costs: Floats, labels: Ints, decisions: Ints) -> Floats:
    """[N] what each decision costs."""
    return costs[labels, decisions]


def shifted(log_p: Floats, shift: Floats, costs: Floats) -> Ints:
    """[N] the cheapest decisions under costs [K, D] once log p [N, K] is shifted by log w, [K] or [N, K]."""
    p = np.exp(log_p + shift - (log_p + shift).max(1, keepdims=True))
    return (p @ _reduced(costs)).argmin(1)


def row_weights(labels: Ints, prior: Floats) -> Floats:
    """[N] what each row must weigh for the classes that occur to count as in the prior [K]; they sum to 1."""
    seen = np.bincount(labels, minlength=len(prior))
    weights = np.where(seen > 0, divide(prior, seen), 0)[labels]
    return weights / weights.sum()


def oracle(log_p: Floats, labels: Ints, costs: Floats, prior: Floats, seed: int = 0) -> Ints:
    """[N] decisions of the oracle, each row by a w that was fitted on other folds."""
    fold, decisions = _folds(labels, seed), np.zeros(len(labels), np.int64)
    for number in range(FOLDS):
        held = fold == number
        if held.any():
            shift = np.zeros(len(prior)) if held.all() else best_shift(log_p[~held], labels[~held], costs, prior)
            decisions[held] = shifted(log_p[held], shift, costs)
    return decisions


def best_shift(log_p: Floats, labels: Ints, costs: Floats, prior: Floats) -> Floats:
    """[K] log w of least cost on these rows; 0 of a class that they lack."""
    per_row = row_weights(labels, prior)[:, None] * costs[labels]
    known = np.bincount(labels, minlength=len(prior)) > 0
    start = _likeliest_shift(log_p, labels, prior, known)
    return fit_shift(log_p, costs, prior, known, lambda q: (float((q * per_row).sum()), per_row), start)


def fit_shift(
    log_p: Floats,
    costs: Floats,
    prior: Floats,
    free: NDArray[np.bool_],
    objective: Objective,
    start: Floats | None = None,
) -> Floats:
    """[K] log w of least objective, 0 where it is not `free` [K].

    Costs of hard decisions are piecewise constant in w, so shares softmin(expected cost / softness) take their place,
    ever harder; what they lead to is kept only where it is better for hard decisions than w = 1.
    """
    reduced = _reduced(costs)
    unit = float(prior @ costs[:, : len(prior)].mean(1)) or 1.0

    def loss(shift: Floats, softness: float) -> tuple[float, Floats]:
        value, gradient = _smooth(log_p, shift, reduced, softness * unit, objective)
        ridge = RIDGE * unit
        return (value + float(ridge * shift @ shift / 2)) / unit, np.where(free, gradient + ridge * shift, 0) / unit

    found = [np.zeros(len(prior)), np.zeros(len(prior)) if start is None else start]
    for softness in SOFTNESS:
        found.append(minimize(loss, found[-1], (softness,), "L-BFGS-B", jac=True, options={"maxiter": 30}).x)
    hard = [objective(np.eye(costs.shape[1])[shifted(log_p, shift, costs)])[0] for shift in found]
    return found[int(np.argmin(hard))]


def _likeliest_shift(log_p: Floats, labels: Ints, prior: Floats, free: NDArray[np.bool_]) -> Floats:
    """[K] that of least NLL, which is convex: a start from which the costs have a slope, however far off scores are."""
    weights = row_weights(labels, prior)[:, None]
    wanted = np.bincount(labels, weights[:, 0], len(prior))

    def loss(shift: Floats) -> tuple[float, Floats]:
        p = _softmax(log_p + shift)
        own = np.maximum(p[np.arange(len(labels)), labels], np.finfo(np.float64).tiny)
        gradient = (weights * p).sum(0) - wanted + RIDGE * shift
        return float(RIDGE * shift @ shift / 2 - weights[:, 0] @ np.log(own)), np.where(free, gradient, 0)

    return minimize(loss, np.zeros(len(prior)), method="L-BFGS-B", jac=True, options={"maxiter": 30}).x


def _smooth(
    log_p: Floats, shift: Floats, reduced: Floats, softness: float, objective: Objective
) -> tuple[float, Floats]:
    """Objective of smooth decisions, and its gradient by the shift, [K]."""
    p = _softmax(log_p + shift)
    q = _softmax(-(p @ reduced) / softness)
    value, by_share = objective(q)
    by_cost = q * (by_share - (q * by_share).sum(1, keepdims=True)) / -softness
    by_p = by_cost @ reduced.T
    return value, (p * (by_p - (p * by_p).sum(1, keepdims=True))).sum(0)


def _reduced(costs: Floats) -> Any:
    """Costs less the usual one of each row, which decides nothing; sparse where there are many, nearly all then 0."""
    reduced = costs - np.median(costs, 1, keepdims=True)
    return reduced if len(costs) <= MANY else csr_array(reduced)


def _softmax(x: Floats) -> Floats:
    x = np.exp(x - x.max(1, keepdims=True))
    x /= x.sum(1, keepdims=True)
    return x


def _folds(labels: Ints, seed: int) -> Ints:
    """[N] one of FOLDS, of each class evenly."""
    order = np.random.Generator(np.random.Philox(key=[seed, len(labels)])).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % FOLDS
    return fold
