"""Evaluations as tables for people: a value, its interval and its n; the worst comes first."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trainer.decision.ledger import Ledger
from trainer.metrics.calibration import top_label, weights_to
from trainer.metrics.catalogue import RATES, recall, score_by_class, under_prior
from trainer.metrics.cells import cells as many_cells
from trainer.metrics.comparisons import comparisons
from trainer.metrics.groups import Grouping, GroupValues, groupings
from trainer.metrics.intervals import Statistic, difference, divide
from trainer.metrics.statistics import Proportion
from trainer.metrics.tally import Tally

LEAST_N = 10
"""Cells of fewer samples are shown, but never named the worst: their recall says nothing."""
BY_CLASS = ("recall", "precision", "f1", "false_positive_rate", "selection_rate", "auroc")
BY_GROUP = ("accuracy", "balanced_accuracy", "worst_recall", "nll", "brier", "ece")


class Cell(NamedTuple):
    """A number with its interval and n."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "–"
        interval = "" if np.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{interval}"


class Compared(NamedTuple):
    """A comparison of groups."""

    grouping: str
    metric: str
    name: str
    """Class, or empty."""
    cell: Cell
    chance: float
    """What it does not pass, in the bad direction, in 95 of 100 splits where groups do not differ."""


class Beside(NamedTuple):
    """The recall of a class in a group, beside that of the same class elsewhere."""

    gap: Cell
    """Less that of all other groups."""
    p: float
    """Of no difference, adjusted over the cells of the grouping."""
    shrunk: Cell
    """As the other groups make it probable."""
    needed: int
    """Images that are lacking to settle the gap; -1 where none would."""


class Line(NamedTuple):
    """A row of a table."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def n(self) -> int:
        return self.cells[0].n


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    lines: list[Line]
    by: str
    """The column in whose order they are."""


@dataclass(frozen=True)
class Subject:
    """One model on one split, under one view."""

    run: str
    split: str
    view: str
    tally: Tally
    ledger: Ledger
    group_values: GroupValues

    @property
    def classes(self) -> tuple[str, ...]:
        return self.ledger.classes

    def recalls(self) -> list[tuple[str, Cell]]:
        """Of each class."""
        found = cells_of(recall(self.tally.overall()))[0]
        return list(zip(self.classes, found, strict=True))

    def worst_class(self) -> tuple[str, Cell]:
        return min(self.recalls(), key=lambda item: (np.isnan(item[1].value), item[1].value))

    def cells(self) -> list[tuple[str, str, Cell]]:
        """Class, group and recall of every class in every group, the lowest first."""
        found: list[tuple[str, str, Cell]] = []
        for grouping in list(groupings(self.group_values))[1:]:
            for group, recalls in zip(grouping.groups, cells_of(recall(grouping.of(self.tally))), strict=True):
                found += [(name, group, value) for name, value in zip(self.classes, recalls, strict=True)]
        return sorted((f for f in found if f[2].n), key=lambda item: (item[2].n < LEAST_N, item[2].value))

    def beside(self) -> dict[tuple[str, str], Beside]:
        """Class and group -> the same against the rest of the class."""
        found: dict[tuple[str, str], Beside] = {}
        for grouping in list(groupings(self.group_values))[1:]:
            c = many_cells(recall(grouping.of(self.tally)))
            for g, k in np.ndindex(c.n.shape):
                at, n = (g, k), int(c.n[g, k])
                gap = Cell(float(c.value[at] - c.rest[at]), float(c.low[at]), float(c.high[at]), n)
                shrunk = Cell(float(c.shrunk[at]), float(c.shrunk_low[at]), float(c.shrunk_high[at]), n)
                key = self.classes[k], grouping.groups[g]
                found[key] = Beside(gap, float(c.p[at]), shrunk, int(c.needed[at]))
        return found

    def worst_cell(self) -> tuple[str, str, Cell] | None:
        """The class and group of lowest recall among those with LEAST_N samples."""
        cells = [c for c in self.cells() if c[2].n >= LEAST_N]
        return cells[0] if cells else None

    def nll(self) -> float:
        """Nats, where classes occur as in use; NaN if a class is not in the split."""
        return float(under_prior(score_by_class(self.tally.overall(), 0), self.ledger.deployment_prior)[0])

    def ece(self) -> tuple[float, float]:
        """The calibration error where classes occur as in use, and the value that a calibrated model stays below in 95
        of 100 such splits; NaN if a class is not in the split."""
        overall = self.tally.overall()
        error = top_label(overall, weights_to(self.ledger.deployment_prior, overall))
        return float(error.value[0]), float(error.calibrated()[1][0])

    def cost(self) -> float:
        """Mean cost of the decisions, where classes occur as in use; NaN if a class is not in the split."""
        confusion = self.tally.overall().confusion[0]
        by_class = divide((confusion * self.ledger.costs).sum(1), confusion.sum(1))
        return float(by_class @ self.ledger.deployment_prior)

    def class_table(self) -> Table:
        overall = self.tally.overall()
        found = [cells_of(RATES[name].of(overall))[0] for name in BY_CLASS]
        lines = [Line(name, values) for name, values in zip(self.classes, zip(*found, strict=True), strict=True)]
        lines.sort(key=lambda line: _order(line.cells[0]))
        return Table("By class", ("class", *BY_CLASS), lines, BY_CLASS[0])

    def group_tables(self) -> Iterator[Table]:
        """One for each way to group, the worst group first."""
        for grouping in list(groupings(self.group_values))[1:]:
            yield self._group_table(grouping)

    def fairness(self) -> list["Compared"]:
        """Every comparison of groups."""
        return [
            Compared(
                grouping.name,
                name,
                self.classes[place[0]] if place else "",
                Cell(float(found.value[place]), float(found.low[place]), float(found.high[place]), int(found.n[place])),
                float(found.chance[place]),
            )
            for grouping in list(groupings(self.group_values))[1:]
            if len(grouping.groups) > 1
            for name, found in comparisons(grouping.of(self.tally)).items()
            for place in np.ndindex(found.value.shape)
        ]

    def _group_table(self, grouping: Grouping) -> Table:
        grouped = grouping.of(self.tally)
        found = [cells_of(RATES[name].of(grouped)) for name in BY_GROUP]
        lines = [Line(name, values) for name, values in zip(grouping.groups, zip(*found, strict=True), strict=True)]
        lines.sort(key=lambda line: _order(line.cells[1]))
        return Table(f"By {grouping.name}", ("group", *BY_GROUP), lines, BY_GROUP[1])


def cells_of(found: Statistic) -> list[Any]:
    """A Cell for each of its values, in lists nested as its shape is."""
    parts = (found.value, *found.interval(), found.n)
    each = np.empty(found.value.shape, object)
    for place in np.ndindex(each.shape):
        value, low, high, n = (part[place] for part in parts)
        each[place] = Cell(float(value), float(low), float(high), int(n))
    return each.tolist()


class Fit(NamedTuple):
    """The same model on the training split and on others: low on both is underfitting, a gap is overfitting."""

    split: str
    nll: tuple[float, float]
    """In use, on the training split and on this one."""
    lines: list[tuple[str, Cell, Cell, Cell]]
    """Class, its recall on the training split and on this one, and the difference; the largest gap first."""


def fits(subjects: list[Subject], train: str) -> list[Fit]:
    """Of the ledger's view on every other split, if the training split was evaluated."""
    seen = [s for s in subjects if (s.split, s.view) == (train, "ledger")]
    others = [s for s in subjects if s.split != train and s.view == "ledger"]
    return [_fit(before, after) for before in seen for after in others]


def _fit(before: Subject, after: Subject) -> Fit:
    low, high = difference(recall(before.tally.overall()), recall(after.tally.overall()))
    lines = []
    for k, ((name, own), (_, other)) in enumerate(zip(before.recalls(), after.recalls(), strict=True)):
        lines.append((name, own, other, Cell(own.value - other.value, float(low[0, k]), float(high[0, k]), other.n)))
    lines.sort(key=lambda line: (np.isnan(line[3].value), -line[3].value))
    return Fit(after.split, (before.nll(), after.nll()), lines)


def recall_gain(old: Subject, new: Subject) -> tuple[float, float]:
    """Interval of the worst class recall of `new` less that of `old`, as if of independent samples (Newcombe)."""
    recalls = []
    for subject in (new, old):
        counted = recall(subject.tally.overall())
        k = subject.classes.index(subject.worst_class()[0])
        recalls.append(Proportion(*(part[0, k] for part in counted)))
    low, high = difference(*recalls)
    return float(low), float(high)


def summary(subjects: list[Subject]) -> str:
    """A small table for the terminal: a column for each model, split and decision."""
    names = ["run", "split", "decision", *(f"recall of {name}" for name in subjects[0].classes)]
    columns = [[*names, "worst class x group", "NLL in use", "ECE in use", "  if calibrated, below", "cost in use"]]
    for s in subjects:
        worst, (ece, calibrated) = s.worst_cell(), s.ece()
        cells = [s.run, s.split, s.view, *(str(value) for _, value in s.recalls())]
        cells += [f"{worst[2].value:.2f} (n={worst[2].n})" if worst else "–"]
        columns.append([*cells, *map(_text, (s.nll(), ece, calibrated, s.cost()))])
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _text(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def _order(value: Cell) -> tuple[bool, float]:
    return np.isnan(value.value), value.value
