"""Classes within groups: the cells that probed rows fall in, by each group column and by all columns at once."""

from typing import NamedTuple

import numpy as np

from data_loaders.index import Index
from trainer.metrics.tally import Ints

MOST = 1000
"""Cells of a grouping that are listed, those of most rows first: there may be as many as rows."""


class Cell(NamedTuple):
    """Rows of a class in a group."""

    label: int
    """Class."""
    name: str
    """Of the class."""
    group: str
    """Such as `venue=street`; empty in the grouping that has all rows in one group."""

    def __str__(self) -> str:
        return f"{self.name}, {self.group}" if self.group else self.name


class Grouping(NamedTuple):
    """N rows by group, and by class within group."""

    cells: list[Cell]
    """C, in order of class and group."""
    cell: Ints
    """Of each row, [N]; -1 where it is not listed."""
    group: Ints
    """Of each row, [N]."""


def groupings(index: Index, rows: Ints) -> list[Grouping]:
    """Of these rows [N]: all in one group, then by each group column, then by all of them if there are several."""
    found = [_grouping(index, rows, [""], np.zeros(len(rows), np.int64))]
    for a, (column, values) in enumerate(index.group_values.items()):
        found.append(_grouping(index, rows, [f"{column}={value}" for value in values], index.groups[rows, a]))
    if len(index.group_values) > 1:
        cells, place = index.occurring_cells()
        names = [", ".join(map("=".join, zip(index.group_values, values, strict=True))) for values in cells]
        found.append(_grouping(index, rows, names, place[rows]))
    return found


def _grouping(index: Index, rows: Ints, groups: list[str], group: Ints) -> Grouping:
    numbers, cell, counts = np.unique(index.labels[rows] * len(groups) + group, return_inverse=True, return_counts=True)
    listed = np.zeros(len(numbers), bool)
    listed[np.argsort(-counts, kind="stable")[:MOST]] = True
    place = np.where(listed, np.cumsum(listed) - 1, -1)
    labels, of = np.divmod(numbers[listed], len(groups))
    named = zip(labels.tolist(), of.tolist(), strict=True)
    return Grouping([Cell(k, index.classes[k], groups[g]) for k, g in named], place[cell], group)
