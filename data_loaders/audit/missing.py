"""Whether a group value that is not known is missing by chance, or more often in some classes or groups.

Not known are values such as `unknown`, and those of rows that the ingest dropped since a group cell was empty, where
`rejects.allow` let it.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from data_loaders.audit.associations import Association, association, holm, residuals
from data_loaders.index import Index

NONE = "(none)"
"""An empty cell, as the counts of dropped rows have it."""
WORDS = frozenset(
    {"", NONE, "?", "-", "--", "n/a", "na", "nan", "none", "null", "nil", "missing", "unknown", "unspecified"}
    | {"undefined", "not known", "not recorded", "not specified", "prefer not to say"}
)
"""What stands for no value, in small letters."""
LABEL = "label"
LISTED = 20


class Missing(NamedTuple):
    """Whether a column is missing, against the label or another column."""

    column: str
    against: str
    association: Association
    adjusted: float
    """p, adjusted for all pairs (Holm)."""
    value: str
    """The value of `against` that differs most."""
    share: float
    """Of the `n` rows that have it, those without a value in the column."""
    others: float
    """The same of all other rows."""
    n: int


class Pattern(NamedTuple):
    columns: tuple[str, ...]
    """That are missing together, and no others."""
    rows: int


class Missingness(NamedTuple):
    """Of all splits, since dropped rows are of none."""

    rows: dict[str, int]
    """Column -> rows without a value in it, where there are any."""
    n: int
    patterns: list[Pattern]
    """The most frequent ones; of rows that lack something."""
    pairs: list[Missing]


def missingness(index: Index, dropped: Mapping[tuple[str, ...], int]) -> Missingness:
    """`dropped`: class and group values of rows that the ingest dropped, and how many, as its manifest has them."""
    cells = _cells(index, dropped)
    values = np.array(list(cells), dtype=object).reshape(len(cells), 1 + len(index.group_values))
    rows = np.array(list(cells.values()), np.int64)
    lacks = np.array([[value.lower() in WORDS for value in cell[1:]] for cell in cells], bool).reshape(len(cells), -1)
    names = [LABEL, *index.group_values]
    lacking = {name: int(rows[lacks[:, a]].sum()) for a, name in enumerate(names[1:]) if lacks[:, a].any()}
    patterns = Counter[tuple[str, ...]]()
    for row, count in zip(lacks, rows.tolist(), strict=True):
        patterns[tuple(name for name, lack in zip(names[1:], row, strict=True) if lack)] += count
    del patterns[()]
    found = [
        _pair(name, against, lacks[:, names.index(name) - 1], values[:, b], rows)
        for name in lacking
        for b, against in enumerate(names)
        if against != name
    ]
    adjusted = holm(np.array([line.association.p for line in found]))
    pairs = [line._replace(adjusted=float(p)) for line, p in zip(found, adjusted, strict=True)]
    listed = [Pattern(*pattern) for pattern in patterns.most_common(LISTED)]
    return Missingness(lacking, int(rows.sum()), listed, pairs)


def _cells(index: Index, dropped: Mapping[tuple[str, ...], int]) -> Counter[tuple[str, ...]]:
    """Class and group values -> rows, with those that were dropped for want of a group value alone."""
    names, cell = index.occurring_cells()
    keys, counts = np.unique(cell * len(index.classes) + index.labels, return_counts=True)
    places = zip(*(part.tolist() for part in (*np.divmod(keys, len(index.classes)), counts)), strict=True)
    found = Counter[tuple[str, ...]]({(index.classes[k], *names[c]): n for c, k, n in places})
    for line, n in dropped.items():
        if NONE in line[1:] and line[0] in index.classes:
            found[line] += n
    return found


def _pair(column: str, against: str, lacks: np.ndarray, values: np.ndarray, rows: np.ndarray) -> Missing:
    names, code = np.unique(values.astype(str), return_inverse=True)
    table = np.zeros((2, len(names)), np.int64)
    np.add.at(table, (lacks.astype(int), code), rows)
    worst = int(np.abs(residuals(table)[1]).argmax())
    own, others = table[:, worst], table.sum(1) - table[:, worst]
    share, rest = (float(part[1] / part.sum()) if part.sum() else np.nan for part in (own, others))
    return Missing(column, against, association(table), np.nan, str(names[worst]), share, rest, int(own.sum()))
