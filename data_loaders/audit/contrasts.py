"""How far simple properties of images tell a category (class, or group), against what chance shows on as many rows, as
imbalanced and as tied. The null permutes the category within cells, so what the cells explain is no finding.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from data_loaders.audit.associations import CHANCE, ROUNDING, Floats, contingency, empirical_p, step_down
from data_loaders.index import Ints

REPLICATES = 1999
"""Permutations: the smallest p value is 1 / 2,000."""
BINS = 10
"""Into which the ranks of a property are put to guess from."""
FOLDS = 5


class Contrast(NamedTuple):
    """The class that stands out most from the others of the same cells, by the rank of a property."""

    label: int
    """That class; -1 where no class can be told from another, as of a property that is the same in all images."""
    above: float
    """Probability that an image of it has more of the property than one of another class in its cell: 0.5 is chance."""
    low: float
    high: float
    """Where `above` lies by chance in 95 of 100 data sets, whichever class stands out."""
    p: float
    adjusted: float
    """p, adjusted for both tests of all properties."""
    n: int
    """Images of that class, or of all where none can be told."""


class Skill(NamedTuple):
    """How well the property alone tells the class of images that the guess was not made from."""

    value: float
    """Mean recall of the classes, from 0 by chance to 1; NaN where nothing can be told."""
    by_chance: float
    """95th percentile where the property has nothing to do with the class."""
    p: float
    adjusted: float
    """p, adjusted for both tests of all properties."""
    n: int


def contrasts(
    values: Floats, labels: Ints, cells: Ints, seed: int = 0, replicates: int | None = None
) -> list[tuple[Contrast, Skill]]:
    """For each of P properties [N, P], what it tells of the class beyond what the cells explain. Classes and cells are
    [N].

    Two tests: the largest standardised rank sum of a class, ranks taken and classes permuted within cells (van Elteren
    1960), which finds what is higher or lower in a class; and the skill of guessing the class from the bin of the rank,
    which also finds what is neither. No majority and no class of few rows decides them. All are adjusted together.
    """
    names, label, in_class = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(cells, kind="stable")
    label, cell = label[order], np.unique(cells[order], return_inverse=True)[1]
    ranks = _ranks(values[order], cell)
    table = contingency(label, cell, (len(names), int(cell.max()) + 1))
    pairs = table * (table.sum(0) - table) / table.sum(0)
    deviation = np.sqrt(pairs @ _variance(ranks, cell))
    scale = np.divide(1, deviation, out=np.zeros(deviation.shape), where=deviation > ROUNDING)
    by_label, starts = np.argsort(label, kind="stable"), np.cumsum(in_class) - in_class
    guess = _Guess(ranks, label, in_class)

    def standing_out(rows: Ints) -> Floats:
        return np.add.reduceat(ranks[rows[by_label]], starts) * scale

    def both(rows: Ints) -> Floats:
        return np.concatenate([np.abs(standing_out(rows)).max(0), guess.skill(rows)])

    random = np.random.Generator(np.random.Philox(key=[seed, len(labels)]))
    shuffles = (np.argsort(cell + random.random(len(cell))) for _ in range(replicates or REPLICATES))
    null, rows = np.stack([both(shuffle) for shuffle in shuffles]), np.arange(len(label))
    found = standing_out(rows)
    k, place = np.abs(found).argmax(0), np.arange(values.shape[1])
    sd, weight = deviation[k, place], pairs.sum(1)[k]
    told = np.tile(sd > ROUNDING, 2)
    observed = np.where(told, both(rows), np.nan)
    p, chance = (np.where(told, x, np.nan) for x in (empirical_p(null, observed), np.quantile(null, CHANCE, axis=0)))
    tests = np.stack([observed, chance, p, step_down(observed, null)]).reshape(4, 2, -1)
    unit = np.divide(sd, weight, out=np.full(len(k), np.nan), where=sd > ROUNDING)
    beyond, half, *ranked = tests[:, 0] * np.array([unit, unit, np.ones(len(k)), np.ones(len(k))])
    above = 0.5 + np.sign(found[k, place]) * beyond
    of = np.where(sd > ROUNDING, names[k], -1), np.where(sd > ROUNDING, in_class[k], len(labels))
    columns = of[0], above, np.maximum(0.5 - half, 0), np.minimum(0.5 + half, 1), *ranked, of[1]
    above_others = (Contrast._make(line) for line in zip(*(column.tolist() for column in columns), strict=True))
    skills = (Skill._make([*line, len(labels)]) for line in tests[:, 1].T.tolist())
    return list(zip(above_others, skills, strict=True))


class _Guess:
    """The class that is most frequent, by its own size, in a bin of the ranks of the other folds."""

    def __init__(self, ranks: Floats, label: Ints, in_class: Ints) -> None:
        """Ranks [N, P], classes [N]; every class has rows in as many folds as it can."""
        classes, self.in_class, self.shape = len(in_class), in_class, (ranks.shape[1], FOLDS, len(in_class), BINS)
        by_label = np.argsort(label, kind="stable")
        place = np.empty(len(label), np.int64)
        place[by_label] = np.arange(len(label)) - np.repeat(np.cumsum(in_class) - in_class, in_class)
        fold = place % FOLDS
        self.bins = np.minimum(((ranks + 0.5) * BINS).astype(np.int64), BINS - 1)
        self.bins += np.arange(self.shape[0]) * (FOLDS * classes * BINS)
        self.first = ((fold * classes + label) * BINS)[:, None]
        learnt = in_class - contingency(fold, label, (FOLDS, classes))
        self.weight = np.divide(1, learnt, out=np.zeros(learnt.shape), where=learnt > 0)[None, :, :, None]

    def skill(self, rows: Ints) -> Floats:
        """[P] of rows [N] that stand in the places of the rows that the classes are of."""
        keys = (self.bins[rows] + self.first).ravel()
        counts = np.bincount(keys, minlength=int(np.prod(self.shape))).reshape(self.shape)
        guess = ((counts.sum(1, keepdims=True) - counts) * self.weight).argmax(2)
        right = np.take_along_axis(counts, guess[:, :, None], 2)[:, :, 0]
        recalled, k = np.zeros((self.shape[0], self.shape[2])), self.shape[2]
        np.add.at(recalled, (np.arange(self.shape[0])[:, None, None], guess), right)
        return ((recalled / self.in_class).mean(1) - 1 / k) / max(1 - 1 / k, ROUNDING)


def _ranks(values: Floats, cell: Ints) -> Floats:
    """[N, P] place of each value among those of its cell, ties sharing theirs, from -0.5 to 0.5; cells come in turn."""
    ranks = np.empty(values.shape)
    edges = np.flatnonzero(np.diff(cell, prepend=-1, append=cell[-1] + 1))
    for start, stop in pairwise(edges.tolist()):
        ranks[start:stop] = (rankdata(values[start:stop], axis=0) - 0.5) / (stop - start) - 0.5
    return ranks


def _variance(ranks: Floats, cell: Ints) -> Floats:
    """[C, P] within each cell, whose mean rank is 0; 0 in a cell of one row."""
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    sizes = np.diff(starts, append=len(cell))
    return np.add.reduceat(ranks**2, starts) / np.maximum(sizes - 1, 1)[:, None]
