"""The plan of an ingest of given rows."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_loaders.faults import Fault
from data_loaders.plan import Plan
from data_loaders.sources.rows import Row, Source
from data_loaders.splits import Splits


class Given(Source):
    """A source of these rows, without images."""

    given: tuple[Any, ...]

    @property
    def group_names(self) -> tuple[str, ...]:
        return tuple(f"g{a}" for a in range(len(self.given[0].groups))) if self.given else ()

    def rows(self, labelled: bool = True) -> Iterator[Row]:
        return iter(self.given)

    def reader(self) -> Any:
        raise AssertionError("no image is read")


def planned(splits: Splits, rows: list[Row], classes: tuple[str, ...] = ()) -> tuple[list[Row], list[Fault]]:
    """The good rows, and what is wrong with the others."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(Path(folder), Given(given=tuple(rows)), splits, classes, None)
        good = list(plan.rows())
        plan.rejections.close()
        refusal = plan.rejections.refusal(0.0, len(good), Path())
        return good, refusal.faults if refusal else []
