"""The ways in which samples are grouped in a report: all together, by each group column, by all columns at once."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from trainer.metrics.tally import Ints, Tally

GroupValues = dict[str, tuple[str, ...]]
"""Group column -> its values, in the order in which `Index.cells` numbers them."""


class Grouping(NamedTuple):
    """Cells of all group columns, gathered to groups."""

    name: str
    """`all`, a group column, or the columns joined by x."""
    groups: list[str]
    cells: Ints
    """Group of each cell, [cells]."""

    @property
    def is_intersection(self) -> bool:
        """Whether it has several columns."""
        return " x " in self.name

    def of(self, tally: Tally) -> Tally:
        return tally.regroup(self.cells, len(self.groups))


def groupings(values: GroupValues) -> Iterator[Grouping]:
    """Every grouping of these columns; only `all` when there are none."""
    sizes = [len(v) for v in values.values()]
    cells = int(np.prod(sizes, dtype=np.int64))
    yield Grouping("all", ["all"], np.zeros(cells, np.int64))
    codes = np.indices(sizes).reshape(len(sizes), cells)
    for code, (column, names) in zip(codes, values.items(), strict=True):
        yield Grouping(column, [f"{column}={name}" for name in names], code.astype(np.int64))
    if len(values) > 1:
        names = [
            ", ".join(f"{column}={v[c]}" for (column, v), c in zip(values.items(), cell, strict=True))
            for cell in codes.T
        ]
        yield Grouping(" x ".join(values), names, np.arange(cells))
