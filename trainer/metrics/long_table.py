"""Tallies as one long table: a row for each metric, class and group, with its interval and n."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainer.metrics.calibration import Gaps
from trainer.metrics.catalogue import FAIRNESS, JOINT, RATES, disparity
from trainer.metrics.cells import withheld
from trainer.metrics.comparisons import comparisons
from trainer.metrics.groups import Grouping, GroupValues, groupings
from trainer.metrics.intervals import Floats
from trainer.metrics.tally import Ints, Tally

NUMBERS = ("value", "low", "high", "chance")
SCHEMA = pa.schema(
    {"run": pa.string(), "split": pa.string(), "view": pa.string(), "step": pa.int64()}
    | dict.fromkeys(("metric", "class", "grouping", "group"), pa.string())
    | dict.fromkeys(NUMBERS, pa.float64())
    | {"n": pa.int64()}
)
"""`class` and `group` are empty where a metric has none. `chance` is what a calibration error stays below if the model
is calibrated, and a comparison if groups do not differ; elsewhere it is NaN. Numbers and n of groups that are too small
to be told are null."""


class Lines(NamedTuple):
    """Rows of one metric in one grouping, [G], [G, K], or of a comparison [] or [K]."""

    metric: str
    of_groups: bool
    numbers: tuple[Floats, ...]
    """NUMBERS, of one shape."""
    n: Ints


def table_of(
    tally: Tally,
    classes: tuple[str, ...],
    values: GroupValues,
    smallest_cell: int = 0,
    bands: bool = True,
    **key: Any,
) -> pa.Table:
    """Rows of SCHEMA for everything in the catalogue; `key` gives run, split, view and step. Groups and cells of fewer
    than `smallest_cell` samples are withheld, and what would give them away.

    Without bands, whose draws take a moment, comparisons and calibration errors have neither interval nor chance.
    """
    parts = []
    for grouping in groupings(values):
        grouped = grouping.of(tally)
        hidden = Hidden.of(grouped, grouping.is_intersection, smallest_cell)
        parts += [_table(lines, classes, grouping, hidden, key) for lines in _lines(grouped, bands)]
    return pa.concat_tables(parts)


def counts_of(metric: str, counts: Ints, classes: tuple[str, ...], values: GroupValues, **key: Any) -> pa.Table:
    """Rows of SCHEMA for those of the counts [cells, K] that are not 0, by class in each grouping."""
    rows = []
    for grouping in groupings(values):
        grouped = np.zeros((len(grouping.groups), len(classes)), np.int64)
        np.add.at(grouped, grouping.cells, counts)
        rows += [
            {**key, "metric": metric, "class": classes[k], "grouping": grouping.name, "group": grouping.groups[g]}
            | {"value": float(grouped[g, k]), "n": int(grouped[g, k])}
            for g, k in np.argwhere(grouped).tolist()
        ]
    return pa.Table.from_pylist(rows, SCHEMA)


class Hidden(NamedTuple):
    """What is not told of a grouping."""

    least: int
    groups: np.ndarray
    """[G]"""
    by_class: bool
    """All numbers by class: where a class has too few samples in some group, the others would give it away."""

    @classmethod
    def of(cls, tally: Tally, is_intersection: bool, least: int) -> "Hidden":
        """An intersection with one group too small is not told at all, since its margins are."""
        groups = withheld(tally.n, least)
        if is_intersection and groups.any():
            groups = np.ones_like(groups)
        few = (tally.actual > 0) & (tally.actual < least)
        return cls(least, groups, bool(len(groups) > 1 and (few.any() or groups.any())))

    def mask(self, lines: "Lines", by_class: bool, n: Ints) -> np.ndarray:
        """Of lines with samples n [G or 1, K or 1]."""
        hidden = np.broadcast_to(n < self.least, n.shape) | (by_class and self.by_class)
        return hidden | (self.groups[:, None] if lines.of_groups else self.groups.any())


def _lines(tally: Tally, bands: bool) -> list[Lines]:
    """Every rate of every group, and every comparison of the groups."""
    found = []
    for name, rate in RATES.items():
        statistic = rate.of(tally)
        absent = np.full(statistic.value.shape, np.nan)
        if isinstance(statistic, Gaps):
            around = (*statistic.interval(), statistic.calibrated()[1]) if bands else (absent, absent, absent)
        else:
            around = (*statistic.interval(), absent)
        found.append(Lines(name, True, (statistic.value, *around), statistic.n))
    if tally.shape.groups > 1 and bands:
        found += [Lines(name, False, tuple(c[:4]), c.n) for name, c in comparisons(tally).items()]
    elif tally.shape.groups > 1:
        values = {name: disparity(name, tally) for name in (*FAIRNESS, *JOINT)}
        n = int(tally.n.min())
        found += [
            Lines(name, False, (v, *(np.full(np.shape(v), np.nan),) * 3), np.full(np.shape(v), n))
            for name, v in values.items()
        ]
    return found


def _table(lines: Lines, classes: tuple[str, ...], grouping: Grouping, hidden: Hidden, key: dict[str, Any]) -> pa.Table:
    by_class = lines.n.ndim > lines.of_groups
    groups, names = grouping.groups if lines.of_groups else [""], classes if by_class else ("",)
    n = lines.n.reshape(len(groups), len(names))
    mask = hidden.mask(lines, by_class, n).ravel()
    same = {"metric": lines.metric, "grouping": grouping.name, **key}
    columns: dict[str, Any] = {k: pa.repeat(pa.scalar(v, SCHEMA.field(k).type), n.size) for k, v in same.items()}
    columns["group"] = pa.array(groups).take(pa.array(np.repeat(np.arange(len(groups)), len(names))))
    columns["class"] = pa.array(names).take(pa.array(np.tile(np.arange(len(names)), len(groups))))
    for name, values in zip(NUMBERS, lines.numbers, strict=True):
        columns[name] = pa.array(np.ravel(values).astype(np.float64), mask=mask)
    columns["n"] = pa.array(n.ravel(), mask=mask)
    return pa.table([columns[name] for name in SCHEMA.names], SCHEMA)
