"""Weights of classes for each group, so that decisions are even between groups; opt-in, and after training.

Decisions then depend on the group as well as on the image. In some places and uses that is unlawful (disparate
treatment), in others it is asked for: whoever turns it on must know which. Better scores for the group that they are
worse for need no such weights.
"""

from typing import Literal, NamedTuple

import numpy as np

from trainer.decision.regret import Objective, best_shift, fit_shift, shifted
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

Aim = Literal["recall", "selection_rate", "cost"]

SHRINK = 20
"""Rows at which the weights of a group go half the way; those of fewer stay nearer to 1."""


class GroupThresholds(NamedTuple):
    """Of G groups."""

    shift: Floats
    """[G + 1, K] nats added to log p before the cheapest decision; the last row, 0, is of an unknown group (-1)."""
    n: Ints
    """[G, K] validation rows that each rests on."""

    def decide(self, log_p: Floats, costs: Floats, groups: Ints) -> Ints:
        """[N] decisions of log p [N, K] in groups [N]."""
        return shifted(log_p, self.shift[groups], costs)


def equalise(
    log_p: Floats, labels: Ints, groups: Ints, shape: tuple[int, int], costs: Floats, prior: Floats, aim: Aim
) -> GroupThresholds:
    """From validation rows [N] of `shape` (G, K) groups and classes.

    `recall` brings the recall of each class (equal opportunity: Hardt et al. 2016), `selection_rate` how often it is
    decided (demographic parity), to what it is over all groups; `cost` takes the cheapest weights within each group.
    A class, or group, of few rows is drawn to no change, and one without rows gets none.
    """
    n = np.bincount(groups * shape[1] + labels, minlength=shape[0] * shape[1]).reshape(shape)
    decided = np.eye(costs.shape[1])[shifted(log_p, np.zeros(shape[1]), costs)][:, : shape[1]]
    rests_on = np.broadcast_to(n.sum(1, keepdims=True), shape) if aim == "selection_rate" else n
    shift = np.zeros((shape[0] + 1, shape[1]))
    for g in np.flatnonzero(n.sum(1)):
        rows = groups == g
        if aim == "cost":
            shift[g] = best_shift(log_p[rows], labels[rows], costs, prior)
            continue
        objective = _evenness(decided, labels, rows, aim)
        shift[g] = fit_shift(log_p[rows], costs, prior, rests_on[g] > 0, objective)
    shift[:-1] *= rests_on / (rests_on + SHRINK)
    return GroupThresholds(shift, n)


def _evenness(decided: Floats, labels: Ints, rows: np.ndarray, aim: Aim) -> Objective:
    """Half the squared distance of the rates of a group's rows to those of all rows, summed over the classes."""
    every, own = (_rate_weights(part, decided.shape[1], aim) for part in (labels, labels[rows]))
    wanted = (every * decided).sum(0)

    def objective(q: Floats) -> tuple[float, Floats]:
        off = np.where(own.any(0), (own * q[:, : len(wanted)]).sum(0) - wanted, 0)
        gradient = np.zeros_like(q)
        gradient[:, : len(wanted)] = own * off
        return float(off @ off) / 2, gradient

    return objective


def _rate_weights(labels: Ints, classes: int, aim: Aim) -> Floats:
    """[N, K] what deciding each class for a row adds to the rate of that class."""
    if aim == "selection_rate":
        return np.full((len(labels), classes), 1 / max(len(labels), 1))
    mine = np.eye(classes)[labels]
    return mine / np.maximum(mine.sum(0), 1)
