"""Units (patients, sessions, photographers) whose rows stand in several splits: a test on them asks for no more than to
know them again."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_loaders.audit.associations import contingency
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index, Ints
from data_loaders.settings import nearest
from data_loaders.sources.lines import records

LISTED = 20
PATH = "path"
MANY, SMALL = 20, 0.05
"""A group column looks like one of units if it has so many values, none with more than this share of the rows."""


class Divided(NamedTuple):
    """A kind of unit."""

    name: str
    asked: bool
    """Whether it is known to be one: it was asked for, or the ingest was told never to divide it."""
    units: int
    divided: int
    """Units with rows in several splits."""
    leaked: dict[str, int]
    """Split -> rows of it whose unit has rows in the training split."""
    rows: dict[str, int]
    """Split -> rows of it that have a unit."""
    listed: list[str]
    """The first units that are divided; empty where the data set keeps their hashes alone."""


def divided(index: Index, train: str, unit: str = "", table: Path | None = None) -> list[Divided]:
    """Of the units of the ingest, of group columns that look like units, and of the one that is asked for: a group
    column, or a column of a CSV (`table`) that has the ids of the rows as `path`.

    Raises Refusal where there is no such column, or no row of the data set is in the table.
    """
    kinds = [*_known(index, unit), *([_listed(index, unit, table)] if table else [])]
    if unit and not any(name == unit and asked for name, asked, _, _ in kinds):
        fix = f"{nearest(unit, index.group_values)}; or give units=TABLE.csv with the columns {PATH} and {unit}"
        raise Refusal("The units cannot be told:", [Fault("unit", f"no group column {unit!r}", fix)])
    return [_divided(index, train, *kind) for kind in kinds]


def _known(index: Index, unit: str) -> Iterator[tuple[str, bool, Ints, list[str]]]:
    """Name, whether it is known to be of units, the unit of each row [N], -1 of none, and their names."""
    if index.unit.any():
        code = np.unique(index.unit, return_inverse=True)[1] + (index.unit != 0).all()
        yield "units of the ingest", True, code - 1, []
    for a, (name, values) in enumerate(index.group_values.items()):
        largest = np.bincount(index.groups[:, a]).max(initial=0)
        if name == unit or (len(values) >= MANY and largest <= SMALL * len(index.labels)):
            yield name, name == unit, index.groups[:, a], list(values)


def _divided(index: Index, train: str, name: str, asked: bool, code: Ints, names: list[str]) -> Divided:
    has = code >= 0
    units = int(code.max(initial=-1)) + 1
    table = contingency(code[has], index.split[has], (units, len(index.splits)))
    across, in_train = (table > 0).sum(1) > 1, table[:, index.splits.index(train)] > 0
    leaked, rows = (dict(zip(index.splits, t.sum(0).tolist(), strict=True)) for t in (table[in_train], table))
    leaked.pop(train)
    listed = [names[u] for u in np.flatnonzero(across)[:LISTED].tolist()] if names else []
    return Divided(name, asked, int((table.sum(1) > 0).sum()), int(across.sum()), leaked, rows, listed)


def _listed(index: Index, unit: str, table: Path) -> tuple[str, bool, Ints, list[str]]:
    lines = records(str(table))
    header = [name.strip() for name in next(lines, (1, []))[1]]
    faults = [
        Fault(f"{table}:1", f"column {name!r} stands {header.count(name)} times", f"there are: {', '.join(header)}")
        for name in (PATH, unit)
        if header.count(name) != 1
    ]
    if faults:
        raise Refusal("The units cannot be told:", faults, 65)
    path, column = header.index(PATH), header.index(unit)
    unit_of = {cells[path].strip(): cells[column].strip() for _, cells in lines if len(cells) == len(header)}
    found = [unit_of.get(name, "") for name in index.ids.to_pylist()]
    names = sorted(set(found) - {""})
    if not names:
        fix = f"{PATH} must be as in the data set, such as {index.ids[0].as_py()}" if found else ""
        raise Refusal("The units cannot be told:", [Fault(str(table), "has no row of the data set", fix)], 65)
    place = {name: i for i, name in enumerate(names)}
    return unit, True, np.array([place.get(name, -1) for name in found], np.int64), names
