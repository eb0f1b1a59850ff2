"""How far one category tells another, against what chance shows on as many rows, as imbalanced."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import random_table

from data_loaders.index import Ints

Floats = NDArray[np.float64]
Counts = Ints | int
TABLES, FEWEST_TABLES = 9999, 999
"""Contingency tables drawn for a null, at most and at least."""
WORK = 2**25
"""Entries of all contingency tables that are drawn, or rows where those are permuted; more if FEWEST_TABLES need it."""
CHANCE = 0.95
"""Share of the permutations that stay below the number told as `by chance`."""
DENSE = 4
"""Rows for each cell from which tables are drawn; below, permuting the rows is cheaper."""
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
    information: float
    """Mutual information in nats, less its mean by chance."""
    information_by_chance: float
    """95th percentile of that."""
    told: float
    """The same as a share of the most that it could be: 1 is a function (Vinh et al. 2010)."""


def contingency(a: Ints, b: Ints, values: tuple[int, int]) -> Ints:
    """Rows by a (rows) and b (columns), each [N] in 0 … values - 1."""
    return np.bincount(a * values[1] + b, minlength=values[0] * values[1]).reshape(values)


def cramers_v(tables: Ints) -> Floats:
    """[…] of contingency tables […, R, C], corrected for bias (Bergsma 2013); values that never occur do not count."""
    row, column = tables.sum(-1), tables.sum(-2)
    n = np.maximum(row.sum(-1), 1)
    expected = row[..., :, None] * column[..., None, :] / n[..., None, None]
    squares = np.divide((tables - expected) ** 2, expected, out=np.zeros(tables.shape), where=expected > 0)
    return _v(squares.sum((-1, -2)) / n, (row > 0).sum(-1), (column > 0).sum(-1), n)


def _v(phi2: Floats, rows: Counts, columns: Counts, n: Counts) -> Floats:
    """[…] of Pearson's chi-squared over n, of so many values that occur."""
    least = np.maximum(n - 1, 1)
    free_rows, free_columns = np.asarray(rows) - 1, np.asarray(columns) - 1
    corrected = np.maximum(phi2 - free_rows * free_columns / least, 0)
    most = np.minimum(free_rows - free_rows**2 / least, free_columns - free_columns**2 / least)
    return np.sqrt(np.divide(corrected, most, out=np.full(np.shape(corrected), np.nan), where=most > ROUNDING))


def mutual_information(tables: Ints) -> Floats:
    """[…] in nats, of contingency tables […, R, C], not corrected for bias."""
    whole = tables.reshape(*tables.shape[:-2], -1)
    return _entropy(tables.sum(-1)) + _entropy(tables.sum(-2)) - _entropy(whole)


def association(table: Ints, seed: int = 0) -> Association:
    """Of a contingency table [R, C].

    Tables drawn with the same margins are those of permuted rows. Their number is TABLES, or as many as WORK allows,
    and FEWEST_TABLES at least.
    """
    n, v = int(table.sum()), float(cramers_v(table))
    if np.isnan(v):
        return Association(np.nan, np.nan, np.nan, n, np.nan, np.nan, np.nan)
    table = table[table.any(1)][:, table.any(0)]
    random = np.random.Generator(np.random.Philox(key=[seed, table.size]))
    draw, work = (_permuted, n) if n < table.size * DENSE else (_tables, table.size)
    null_v, null_nats = draw(table, int(np.clip(WORK // work, FEWEST_TABLES, TABLES)), random)
    mean, chance = null_nats.mean(), np.quantile([null_v, null_nats], CHANCE, axis=1)
    nats, most = mutual_information(table) - mean, min(_entropy(table.sum(1)), _entropy(table.sum(0))) - mean
    p, numbers = empirical_p(null_v, v), (float(x) for x in (nats, chance[1] - mean, nats / max(most, ROUNDING)))
    return Association(v, float(chance[0]), float(p), n, *numbers)


def _tables(table: Ints, replicates: int, random: np.random.Generator) -> tuple[Floats, Floats]:
    """V and mutual information of tables drawn with these margins, at a cost that no row adds to (Patefield 1981)."""
    margins, each = (table.sum(1), table.sum(0)), max(1, TABLES_AT_ONCE // table.size)
    sizes = (min(each, replicates - start) for start in range(0, replicates, each))
    drawn = (random_table.rvs(*margins, size=k, random_state=random) for k in sizes)
    found = [(cramers_v(part), mutual_information(part)) for part in drawn]
    return np.concatenate([v for v, _ in found]), np.concatenate([nats for _, nats in found])


def _permuted(table: Ints, replicates: int, random: np.random.Generator) -> tuple[Floats, Floats]:
    """The same by permuting rows, whose cells alone are looked at: most cells of a large table are empty."""
    row, column, n = table.sum(1), table.sum(0), int(table.sum())
    a, b = (np.repeat(np.arange(len(margin)), margin) for margin in (row, column))
    first, logs, inverse = a * len(column), np.log(np.arange(1, n + 1)), 1 / row[a]
    phi2, nats = np.empty(replicates), np.empty(replicates)
    for i in range(replicates):
        b = random.permutation(b)
        cell = first + b
        counts = np.bincount(cell, minlength=table.size)[cell]
        phi2[i], nats[i] = (counts / column[b]) @ inverse - 1, logs[counts - 1].sum() / n
    margins = _entropy(row) + _entropy(column)
    return _v(phi2, len(row), len(column), n), margins - np.log(n) + nats


def _entropy(counts: Ints) -> Floats:
    """[…] in nats, of counts […, M]."""
    n = np.maximum(counts.sum(-1), 1)
    logs = np.log(counts, out=np.zeros(counts.shape), where=counts > 0)
    return np.log(n) - (counts * logs).sum(-1) / n


def residuals(table: Ints) -> Floats:
    """[R, C] how many standard deviations each count lies above that of independence, given the margins (Haberman
    1973); 0 where a margin leaves no choice."""
    row, column, n = table.sum(1, keepdims=True), table.sum(0, keepdims=True), max(table.sum(), 1)
    expected = row * column / n
    variance = expected * (1 - row / n) * (1 - column / n)
    return np.divide(table - expected, np.sqrt(variance), out=np.zeros(table.shape), where=variance > ROUNDING)


def holm(p: Floats) -> Floats:
    """[M] p values for which one false alarm among M tests is as likely as they say (Holm 1979); NaN is no test."""
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def step_down(found: Floats, null: Floats) -> Floats:
    """[M] p values for which one false alarm among M tests is as likely as they say, of the statistics found, [M], and
    their joint null, [B, M] (Westfall & Young 1993, step-down maxT); NaN is no test.

    Each is standardised first, by all B + 1 of it.
    """
    every = np.concatenate([found[None], null])
    centre, spread = every.mean(0), every.std(0)
    every = np.divide(every - centre, spread, out=np.full(every.shape, np.nan), where=spread > ROUNDING)
    order = np.argsort(-every[0])[: np.count_nonzero(~np.isnan(every[0]))]
    largest = np.maximum.accumulate(every[1:, order[::-1]], axis=1)[:, ::-1]
    adjusted = np.full(len(found), np.nan)
    adjusted[order] = np.maximum.accumulate(empirical_p(largest, every[0, order]))
    return adjusted


def empirical_p(null: Floats, found: Floats | float) -> Floats:
    """Share of the replicates, along the first axis, that reach what was found, which is counted as one of them."""
    return (1 + (null >= found - ROUNDING).sum(0)) / (1 + len(null))
