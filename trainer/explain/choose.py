"""Which rows are worth a picture: what goes wrong in the worst cells, and what the model is surest of and wrong."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.metrics.catalogue import Floats
from trainer.metrics.groups import GroupValues, groupings
from trainer.metrics.tally import Ints


class Cell(NamedTuple):
    """A class in a group."""

    label: str
    group: str
    """As `trainer.metrics.groups.groupings` names it."""
    recall: float
    n: int


class Wrong(NamedTuple):
    """A row that is called what it is not."""

    row: int
    id: str
    label: str
    called: str
    probability: float
    """Of `called`, calibrated, where classes occur as in use."""
    decision: str
    """Which costs can turn away from the most probable class."""
    groups: dict[str, str]
    """Group column -> value."""


class Section(NamedTuple):
    """Rows that belong together."""

    title: str
    rows: list[Wrong]


def worst_cells(
    predictions: pa.Table, classes: tuple[str, ...], groups: GroupValues, cells: list[Cell], count: int, per_cell: int
) -> list[Section]:
    """For the first `count` of the cells that have any left, the wrong decisions of highest probability. A row that an
    earlier cell shows, since groups of one column hold those of several, is not shown again."""
    label, decision = (_places(predictions, name, classes) for name in ("label", "decision.ledger"))
    probability = _probabilities(predictions, classes)[np.arange(len(label)), decision]
    left = label != decision
    sections: list[Section] = []
    for cell in cells:
        inside = left & (label == classes.index(cell.label)) & _members(predictions, groups, cell.group)
        if len(sections) < count and per_cell and inside.any():
            highest = _highest(probability, inside, per_cell)
            left[highest] = False
            title = f"{cell.label}, {cell.group}: recall {cell.recall:.2f}, n = {cell.n:,}"
            sections.append(Section(title, _rows(predictions, highest, decision, probability, classes)))
    return sections


def most_confident(predictions: pa.Table, classes: tuple[str, ...], count: int) -> Section:
    """The rows whose most probable class is wrong, those of highest probability first."""
    p = _probabilities(predictions, classes)
    called, probability = p.argmax(1), p.max(1)
    highest = _highest(probability, called != _places(predictions, "label", classes), count)
    return Section("Most confidently wrong", _rows(predictions, highest, called, probability, classes))


def _highest(values: Floats, among: NDArray[np.bool_], count: int) -> Ints:
    """Places of the highest values among some; of equal ones, the first."""
    places = np.flatnonzero(among)
    return places[np.argsort(-values[places], kind="stable")[:count]]


def _rows(
    predictions: pa.Table, places: Ints, called: Ints, probability: Floats, classes: tuple[str, ...]
) -> list[Wrong]:
    columns = [name for name in predictions.column_names if name.startswith("group.")]
    return [
        Wrong(
            line["row"],
            line["id"],
            line["label"],
            classes[called[place]],
            float(probability[place]),
            line["decision.ledger"],
            {name.removeprefix("group."): line[name] for name in columns},
        )
        for place, line in zip(places.tolist(), predictions.take(places).to_pylist(), strict=True)
    ]


def _members(predictions: pa.Table, groups: GroupValues, group: str) -> NDArray[np.bool_]:
    """Whether each row lies in a group."""
    cells = np.zeros(len(predictions), np.int64)
    for column, values in groups.items():
        cells = cells * len(values) + _places(predictions, f"group.{column}", values)
    grouping = next(g for g in groupings(groups) if group in g.groups)
    return grouping.cells[cells] == grouping.groups.index(group)


def _places(predictions: pa.Table, column: str, names: tuple[str, ...]) -> Ints:
    """Position of each value of a column among names, [N]."""
    place = {name: k for k, name in enumerate(names)}
    return np.array([place[value] for value in predictions[column].to_pylist()], np.int64)


def _probabilities(predictions: pa.Table, classes: tuple[str, ...]) -> Floats:
    """[N, K]"""
    return np.stack([predictions[f"p.{name}"].to_numpy() for name in classes], 1)
