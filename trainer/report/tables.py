"""Evaluations as tables for people: a value, its interval and its n; the worst comes first."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.decision.ledger import Ledger
from trainer.metrics.catalogue import (
    FAIRNESS,
    Proportion,
    coarse_bins,
    disparity,
    divide,
    gap,
    recall,
    score_by_class,
    under_prior,
    weights_to,
)
from trainer.metrics.groups import Grouping, GroupValues, groupings
from trainer.metrics.intervals import Estimate, calibrated_ece, difference, estimate, resample
from trainer.metrics.tally import Tally

LEAST_N = 10
"""Cells of fewer samples are shown, but never named the worst: their recall says nothing."""
BY_CLASS = ("recall", "precision", "f1", "selection_rate")
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
        found = estimate("recall", self.tally.overall())
        return [(name, cell(found, 0, k)) for k, name in enumerate(self.classes)]

    def worst_class(self) -> tuple[str, Cell]:
        return min(self.recalls(), key=lambda item: (np.isnan(item[1].value), item[1].value))

    def cells(self) -> list[tuple[str, str, Cell]]:
        """Class, group and recall of every class in every group, the lowest first."""
        found: list[tuple[str, str, Cell]] = []
        for grouping in list(groupings(self.group_values))[1:]:
            recall = estimate("recall", grouping.of(self.tally))
            for g, group in enumerate(grouping.groups):
                found += [(name, group, cell(recall, g, k)) for k, name in enumerate(self.classes)]
        return sorted((f for f in found if f[2].n), key=lambda item: (item[2].n < LEAST_N, item[2].value))

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
        weights = weights_to(self.ledger.deployment_prior, overall)
        return float(gap(coarse_bins(overall, weights))[0]), float(calibrated_ece(overall, weights)[1][0])

    def cost(self) -> float:
        """Mean cost of the decisions, where classes occur as in use; NaN if a class is not in the split."""
        confusion = self.tally.overall().confusion[0]
        by_class = divide((confusion * self.ledger.costs).sum(1), confusion.sum(1))
        return float(by_class @ self.ledger.deployment_prior)

    def class_table(self) -> Table:
        overall = self.tally.overall()
        resampled = resample(overall)
        found = [estimate(name, overall, resampled) for name in BY_CLASS]
        lines = [Line(name, tuple(cell(e, 0, k) for e in found)) for k, name in enumerate(self.classes)]
        lines.sort(key=lambda line: _order(line.cells[0]))
        return Table("By class", ("class", *BY_CLASS), lines, BY_CLASS[0])

    def group_tables(self) -> Iterator[Table]:
        """One for each way to group, the worst group first."""
        for grouping in list(groupings(self.group_values))[1:]:
            yield self._group_table(grouping)

    def fairness(self) -> list[tuple[str, str, str, float]]:
        """Grouping, metric, class (or empty) and value of every comparison of groups."""
        return [
            (grouping.name, name, self.classes[place[0]] if place else "", float(value[place]))
            for grouping in list(groupings(self.group_values))[1:]
            if len(grouping.groups) > 1
            for name in FAIRNESS
            for value in [np.asarray(disparity(name, grouping.of(self.tally)))]
            for place in np.ndindex(value.shape)
        ]

    def _group_table(self, grouping: Grouping) -> Table:
        grouped = grouping.of(self.tally)
        resampled = resample(grouped)
        found = [estimate(name, grouped, resampled) for name in BY_GROUP]
        lines = [Line(name, tuple(cell(e, g) for e in found)) for g, name in enumerate(grouping.groups)]
        lines.sort(key=lambda line: _order(line.cells[1]))
        return Table(f"By {grouping.name}", ("group", *BY_GROUP), lines, BY_GROUP[1])


def cell(found: Estimate, *place: int) -> Cell:
    value, low, high = (float(part[place]) for part in (found.value, found.low, found.high))
    return Cell(value, low, high, int(found.n[place]))


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
        recalls.append(Proportion(counted.hits[0, k], counted.trials[0, k]))
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
