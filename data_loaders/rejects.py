"""Rows that cannot be used: all of them listed, counted by class and group, and refused where the loss is not even."""

import csv
import io
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_loaders import durable
from data_loaders.faults import SHOWN, Fault, Refusal
from data_loaders.manifest import Dropped
from data_loaders.progress import say
from data_loaders.settings import Fraction, Settings
from data_loaders.sources.rows import Rejected

COLUMNS = ["where", "reason", "fix", "id", "label"]
NONE = "(none)"
LEVEL = 0.01
DRAWS = 9_999
AT_ONCE = 2**20
"""Counts that are drawn at a time."""
Cell = tuple[str, ...]
"""Class, and the value of each group column."""


class Rejects(Settings):
    """What happens when rows are bad."""

    allow: Fraction = 0.0
    """Largest share of the rows that may be dropped; above it, no data set is made, only the list of them."""
    uneven: Literal["refuse", "allow"] = "refuse"
    """Whether rows may be dropped from some classes or groups more often than chance would (p < 0.01)."""


class Uneven(NamedTuple):
    """That the dropped rows are not spread over the values of an attribute as chance would."""

    attribute: str
    p: float
    value: str
    """The value that lost most beyond its share."""
    dropped: int
    rows: int
    """Of that value."""


class Rejections:
    """Takes rejected rows one by one; only counts and the first faults stay in memory."""

    def __init__(self, folder: Path, group_names: tuple[str, ...]) -> None:
        self.group_names = group_names
        self.cells = Counter[Cell]()
        self._faults: tuple[list[Fault], list[Fault]] = [], []
        self._chapters = [folder / f"rejected-{n}.csv" for n in range(2)]
        self._files = [path.open("w", newline="", encoding="utf-8") for path in self._chapters]
        self._writers = [csv.writer(file) for file in self._files]

    @property
    def total(self) -> int:
        return self.cells.total()

    @property
    def faults(self) -> list[Fault]:
        """The first ones."""
        return [*self._faults[0], *self._faults[1]]

    @property
    def unnamed(self) -> int:
        """How many faults there are beside those."""
        return self.total - len(self.faults)

    def add(self, rejected: Rejected, image: bool = False) -> None:
        """`image`: it was its image that could not be used. Those are listed behind the others, so that the list does
        not depend on how far workers are."""
        row, fault = rejected
        if not self.total:
            say(f"a bad row — {fault}; going on to find the others")
        if len(self._faults[image]) < 50 * SHOWN:
            self._faults[image].append(fault)
        groups = (*row.groups, *[""] * len(self.group_names))[: len(self.group_names)]
        self.cells[(row.label or NONE, *(value or NONE for value in groups))] += 1
        self._writers[image].writerow(_record(rejected))

    def write(self, path: Path) -> None:
        """Publishes all of them as CSV, each with its reason and repair."""
        with durable.writing(path) as aside, aside.open("wb") as out:
            header = io.StringIO()
            csv.writer(header).writerow([*COLUMNS, *self.group_names])
            out.write(header.getvalue().encode())
            for file, chapter in zip(self._files, self._chapters, strict=True):
                file.flush()
                with chapter.open("rb") as part:
                    shutil.copyfileobj(part, out)

    def refusal(self, allow: float, kept: int, where: Path, found: Sequence[Uneven] = ()) -> Refusal | None:
        """If more than the allowed share was dropped; `found` is what would be refused besides."""
        total = kept + self.total
        if not self.total or self.total / total <= allow:
            return None
        enough = math.ceil(self.total / total * 1000) / 1000
        title = f"{self.total:,} of {total:,} rows cannot be used, all listed in {where}"
        if enough < 1:
            most = f"most are of {found[0].attribute} {found[0].value!r}" if found else ""
            besides = f" with rejects.uneven=allow ({most})" if found else ""
            title += f"; rejects.allow={enough:g}{besides} would drop them:"
        else:
            title += "; is source.root right?" if self._faults[True] and not kept else ":"
        return Refusal(title, self.faults, 65, self.unnamed)

    def dropped(self) -> Dropped:
        """The counts for the manifest."""
        by_class, by_group = Counter[str](), {name: Counter[str]() for name in self.group_names}
        for (label, *values), rows in self.cells.items():
            by_class[label] += rows
            for name, value in zip(self.group_names, values, strict=True):
                by_group[name][value] += rows
        return Dropped(
            rows=self.total, by_class=by_class, by_group={**by_group}, by_cell=tuple(sorted(self.cells.items()))
        )

    def close(self) -> None:
        for file in self._files:
            with suppress(OSError):  # what is not in the list by now is not wanted, or the disk was full already
                file.close()


def write_rejected(path: Path, rejected: list[Rejected]) -> None:
    """Publishes rows of a source without groups as such a CSV."""
    with durable.writing(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS)
        out.writerows(map(_record, rejected))


def _record(rejected: Rejected) -> list[str]:
    row, fault = rejected
    return [fault.where, fault.what, fault.fix, row.id, row.label, *row.groups]


def uneven(dropped: Mapping[Cell, int], kept: Mapping[Cell, int], names: tuple[str, ...]) -> list[Uneven]:
    """Attributes (class, group columns, and all of them at once) over whose values the dropped rows are not spread as
    chance would, at LEVEL after Holm's correction. Rows whose value is not known are left out."""
    attributes: list[tuple[str, list[int]]] = [("label", [0]), *((name, [a + 1]) for a, name in enumerate(names))]
    attributes += [("label x " + " x ".join(names), list(range(len(names) + 1)))] if names else []
    found: list[Uneven] = []
    for attribute, places in attributes:
        lost, left = Counter[str](), Counter[str]()
        for cells, counts in ((dropped, lost), (kept, left)):
            for cell, rows in cells.items():
                if NONE not in (values := [cell[place] for place in places]):
                    counts[", ".join(values)] += rows
        known = sorted(left.keys() | lost.keys())
        found.append(_spread(attribute, known, [lost[v] for v in known], [lost[v] + left[v] for v in known]))
    found.sort(key=lambda u: u.p)
    for rank, line in enumerate(found):
        if line.p * (len(found) - rank) >= LEVEL:
            return found[:rank]
    return found


def _spread(attribute: str, values: list[str], dropped: list[int], rows: list[int]) -> Uneven:
    """Pearson's chi-squared of dropped against kept, its p-value from draws of as many rows without replacement."""
    lost, size = np.array(dropped), np.array(rows)
    if len(values) < 2 or not lost.any():
        return Uneven(attribute, 1.0, "", 0, 0)
    expected = lost.sum() * size / size.sum()
    chi2 = ((lost - expected) ** 2 / expected).sum() * (1 - 1e-9)
    random, at_once, as_far = np.random.default_rng(0), max(1, AT_ONCE // len(size)), 0
    for start in range(0, DRAWS, at_once):
        some = min(at_once, DRAWS - start)
        drawn = random.multivariate_hypergeometric(size, lost.sum(), some, method="marginals")
        as_far += np.count_nonzero(((drawn - expected) ** 2 / expected).sum(-1) >= chi2)
    p = (1 + as_far) / (1 + DRAWS)
    worst = int(((lost - expected) / np.sqrt(expected)).argmax())
    return Uneven(attribute, float(p), values[worst], dropped[worst], rows[worst])
