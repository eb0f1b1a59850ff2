"""How many rows of each class and group every split has, the worst first."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_loaders.index import Index, Ints

DENSE = 10_000
"""Most cells of class and groups of which those without any row are listed, too."""


class Line(NamedTuple):
    """A class, a group, or a class in groups."""

    name: tuple[str, ...]
    rows: dict[str, int]
    """Split -> rows."""


class Counts(NamedTuple):
    """Of a data set; each table begins with the line that has the fewest rows of the first split."""

    splits: dict[str, int]
    """Split -> rows."""
    classes: list[Line]
    groups: dict[str, list[Line]]
    """Group column -> a line for each of its values."""
    cells: list[Line]
    """A line for each class in each intersection of the groups; none where there are no groups."""
    empty: int
    """Cells that have no row in any split."""


def counts(index: Index, first: str) -> Counts:
    """`first` is the split that decides about the order: the one that a model learns from."""
    splits = [first, *(split for split in index.splits if split != first)]
    rows = {split: index.rows_of(split) for split in splits}

    def lines(names: list[tuple[str, ...]], code: Ints) -> list[Line]:
        table = {split: np.bincount(code[part], minlength=len(names)).tolist() for split, part in rows.items()}
        found = [Line(name, {split: table[split][n] for split in splits}) for n, name in enumerate(names)]
        return sorted(found, key=lambda line: tuple(line.rows.values()))

    groups = {
        name: lines([(value,) for value in values], index.groups[:, a])
        for a, (name, values) in enumerate(index.group_values.items())
    }
    cells, empty = list[Line](), 0
    if groups:
        possible = len(index.classes) * math.prod(map(len, index.group_values.values()))
        dense = possible <= DENSE
        names, cell = (index.cell_names, index.cells) if dense else index.occurring_cells()
        every = index.labels * len(names) + cell
        occurring = np.unique(every)
        there = np.arange(possible) if dense else occurring
        labelled = [(index.classes[c // len(names)], *names[c % len(names)]) for c in there.tolist()]
        cells = lines(labelled, np.searchsorted(there, every))
        empty = possible - len(occurring)
    classes = lines([(name,) for name in index.classes], index.labels)
    return Counts({split: len(part) for split, part in rows.items()}, classes, groups, cells, empty)


def tables(found: Counts, group_names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Line]]]:
    """Names of the columns, and the lines, of each table."""
    yield ("class",), found.classes
    for name, lines in found.groups.items():
        yield (name,), lines
    if found.cells:
        yield ("class", *group_names), found.cells
