"""The trials of the search that a run won, as a table, the best first."""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet

TABLE = "trials.parquet"
PREFIX = "winner-"


class Trials(NamedTuple):
    """Of one search."""

    objective: str
    columns: list[str]
    lines: list[list[Any]]
    """Values in the order of the columns; the first is the trial's name."""
    winner: str
    """The trial that the run repeats."""
    is_best: bool
    """False if the search was extended, and another trial won."""


def read_trials(run: Path) -> Trials | None:
    """The trials beside a run that `jobs.tune` trained as the winner; None for any other run."""
    path = run.parent / TABLE
    if not run.name.startswith(PREFIX) or not path.exists():
        return None
    table = pyarrow.parquet.read_table(path)
    facts = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    table = table.sort_by([("objective", "ascending" if facts["mode"] == "min" else "descending")])
    winner = "trial-" + run.name.removeprefix(PREFIX)
    lines = [list(line.values()) for line in table.to_pylist()]
    return Trials(facts["objective"], table.column_names, lines, winner, facts["winner"] in ("", winner))
