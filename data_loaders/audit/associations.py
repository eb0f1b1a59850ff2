"""How far one thing tells another, against what chance shows on as many rows, as imbalanced and as tied.

Every null is a permutation of the labels: of all rows for groups, within the group cells for properties of images.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import random_table, rankdata

from data_loaders.index import Ints

Floats = NDArray[np.float64]
REPLICATES = 1999
"""Permutations of rows: the smallest p value is 1 / 2,000."""
TABLES = 9999
"""Contingency tables drawn instead of permutations, which cost less."""
CHANCE = 0.95
"""Share of the permutations that stay below the number told as `by chance`."""
TABLES_AT_ONCE = 2**22
"""Entries of the contingency tables that are drawn together."""
ROUNDING = 1e-9


class Association(NamedTuple):
    """Of two categories, such as class and group."""

    v: float
    """Cramér's V, corrected for bias: 0 is none, 1 is a function; NaN where either has one value only."""
    by_chance: float
    """95th percentile of V where the two have nothing to do with each other."""
    p: float
    """Share of the permutations with as large a V, this one counted."""
    n: int


def contingency(a: Ints, b: Ints, values: tuple[int, int]) -> Ints:
    """Rows by a (rows) and b (columns), each [N] in 0 … values - 1."""
    return np.bincount(a * values[1] + b, minlength=values[0] * values[1]).reshape(values)


def cramers_v(tables: Ints) -> Floats:
    """[…] of contingency tables […, R, C], corrected for bias (Bergsma 2013); values that never occur do not count."""
    row, column = tables.sum(-1), tables.sum(-2)
    n = np.maximum(row.sum(-1), 1)
    expected = row[..., :, None] * column[..., None, :] / n[..., None, None]
    squares = np.divide((tables - expected) ** 2, expected, out=np.zeros(tables.shape), where=expected > 0)
    free_rows, free_columns, least = (row > 0).sum(-1) - 1, (column > 0).sum(-1) - 1, np.maximum(n - 1, 1)
    phi2 = np.maximum(squares.sum((-1, -2)) / n - free_rows * free_columns / least, 0)
    most = np.minimum(free_rows - free_rows**2 / least, free_columns - free_columns**2 / least)
    absent = np.full(np.shape(most), np.nan)
    return np.sqrt(np.divide(phi2, most, out=absent, where=most > ROUNDING))


def association(table: Ints, seed: int = 0) -> Association:
    """Of a contingency table [R, C].

    A table drawn with the same margins is the table of permuted rows, so the null costs the same for any number of rows
    (Patefield 1981).
    """
    n, v = int(table.sum()), cramers_v(table)
    if np.isnan(v):
        return Association(np.nan, np.nan, np.nan, n)
    random = np.random.Generator(np.random.Philox(key=[seed, table.size]))
    margins = table.sum(1), table.sum(0)
    each = max(1, TABLES_AT_ONCE // table.size)
    parts = [min(each, TABLES - start) for start in range(0, TABLES, each)]
    null = np.concatenate([cramers_v(random_table.rvs(*margins, size=k, random_state=random)) for k in parts])
    return Association(float(v), float(np.quantile(null, CHANCE)), float(_p(null, v)), n)


def residuals(table: Ints) -> Floats:
    """[R, C] how many standard deviations each count lies above that of independence, given the margins (Haberman
    1973); 0 where a margin leaves no choice."""
    row, column, n = table.sum(1, keepdims=True), table.sum(0, keepdims=True), max(table.sum(), 1)
    expected = row * column / n
    variance = expected * (1 - row / n) * (1 - column / n)
    return np.divide(table - expected, np.sqrt(variance), out=np.zeros(table.shape), where=variance > ROUNDING)


class Contrast(NamedTuple):
    """Of a property of images and the label: the class that stands out most from the others of the same group cells."""

    label: int
    """That class; -1 where no class can be told from another, as of a property that is the same in all images."""
    above: float
    """Probability that an image of it has more of the property than one of another class in its cell: 0.5 is chance."""
    low: float
    high: float
    """Where `above` lies by chance in 95 of 100 data sets, whichever class stands out."""
    p: float
    n: int
    """Images of that class, or of all where none can be told."""


def contrasts(values: Floats, labels: Ints, cells: Ints, seed: int = 0) -> list[Contrast]:
    """For each of P properties [N, P], the class that it sets apart, beyond what the cells explain.

    The test is the largest standardised rank sum of a class, ranks taken and labels permuted within cells (van Elteren
    1960; Westfall & Young 1993 for the largest), so neither a majority nor a class of few rows decides it. Classes and
    cells are [N].
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

    def standing_out(rows: Ints) -> Floats:
        return np.add.reduceat(ranks[rows[by_label]], starts) * scale

    random = np.random.Generator(np.random.Philox(key=[seed, len(labels)]))
    found = standing_out(np.arange(len(label)))
    shuffles = (np.argsort(cell + random.random(len(cell))) for _ in range(REPLICATES))
    null = np.stack([np.abs(standing_out(rows)).max(0) for rows in shuffles])
    k, place = np.abs(found).argmax(0), np.arange(values.shape[1])
    weight, sd = pairs.sum(1)[k], deviation[k, place]
    told = sd > ROUNDING
    unit = np.divide(sd, weight, out=np.full(len(k), np.nan), where=told)
    above, chance = 0.5 + found[k, place] * unit, np.quantile(null, CHANCE, axis=0) * unit
    p = np.where(told, _p(null, np.abs(found).max(0)), np.nan)
    low, high = np.maximum(0.5 - chance, 0), np.minimum(0.5 + chance, 1)
    label, n = np.where(told, names[k], -1), np.where(told, in_class[k], len(labels))
    columns = (column.tolist() for column in (label, above, low, high, p, n))
    return [Contrast._make(line) for line in zip(*columns, strict=True)]


def holm(p: Floats) -> Floats:
    """[M] p values for which one false alarm among M tests is as likely as they say (Holm 1979); NaN is no test."""
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def _p(null: Floats, found: Floats) -> Floats:
    """Share of the replicates, along the first axis, that reach what was found, which is counted as one of them."""
    return (1 + (null >= found - ROUNDING).sum(0)) / (1 + len(null))


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
