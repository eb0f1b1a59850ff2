"""Tallies as one long table: a row for each metric, class and group, with its interval and n."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.metrics.catalogue import FAIRNESS, RATES, disparity
from trainer.metrics.groups import GroupValues, groupings
from trainer.metrics.intervals import estimate, resample
from trainer.metrics.tally import Tally

SCHEMA = pa.schema(
    {"run": pa.string(), "split": pa.string(), "view": pa.string(), "step": pa.int64()}
    | dict.fromkeys(("metric", "class", "grouping", "group"), pa.string())
    | dict.fromkeys(("value", "low", "high"), pa.float64())
    | {"n": pa.int64()}
)
"""`class` and `group` are empty where a metric has none; `n` is null for a comparison of groups."""


def rows(
    tally: Tally, classes: tuple[str, ...], values: GroupValues, bootstrap: bool = True, **key: Any
) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA for everything in the catalogue; `key` gives run, split, view and step.

    Without the bootstrap, which takes a moment, only proportions and means have intervals.
    """
    for grouping in groupings(values):
        grouped = grouping.of(tally)
        resampled = resample(grouped) if bootstrap else None
        for name in RATES:
            e = estimate(name, grouped, resampled)
            for place in np.ndindex(e.value.shape):
                known = {"metric": name, "grouping": grouping.name, "group": grouping.groups[place[0]]}
                known |= {"class": classes[place[1]] if len(place) > 1 else "", "n": int(e.n[place])}
                yield key | known | {"value": e.value[place], "low": e.low[place], "high": e.high[place]}
        for name in FAIRNESS if len(grouping.groups) > 1 else ():
            value = disparity(name, grouped)
            for place in np.ndindex(value.shape):
                known = {"metric": name, "grouping": grouping.name, "group": ""}
                yield key | known | {"class": classes[place[0]] if place else "", "value": value[place]}


def table(rows_of_schema: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows_of_schema, SCHEMA)
