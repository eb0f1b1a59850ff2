"""What a data set alone says of bias: the sizes of classes, groups and properties of images against them, and copies.

Each number comes with the rows it rests on and with what chance shows on as many.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_loaders import manifest
from data_loaders.audit.associations import Association, Floats, association, contingency, holm, residuals
from data_loaders.audit.contrasts import Contrast, Skill, contrasts
from data_loaders.audit.coverage import Coverage, Reference, coverage
from data_loaders.audit.duplicates import Duplicates, duplicates
from data_loaders.audit.missing import Missingness, missingness
from data_loaders.audit.properties import PROPERTIES, Property, measure
from data_loaders.audit.reading import of_images
from data_loaders.audit.units import Divided, divided
from data_loaders.augment import rng
from data_loaders.index import Index, Ints

BETA = 0.999
"""Of the effective number: rows beyond some 1 / (1 - BETA) of a class add little."""


DRAWS = 999
MOST_ENTRIES = 2**23
"""Of the table of classes and values of a grouping."""
GROUP_REPLICATES = 499
"""Permutations for properties against groups, of which there may be many: the smallest p value is 1 / 500."""


class ClassCount(NamedTuple):
    name: str
    rows: dict[str, int]
    """Split -> rows."""
    effective: float
    """Effective number of training rows (Cui et al. 2019)."""


class Classes(NamedTuple):
    """How many rows each class has."""

    counts: list[ClassCount]
    imbalance: float
    """Rows of the largest class over those of the smallest, in the training split; NaN where a class has none."""
    effective: float
    """Classes of equal size that would be as even as these: exp of the entropy of the training labels."""
    by_chance: float = math.nan
    """99th percentile of the imbalance of as many rows whose classes are drawn evenly; all rows, where one may have
    none."""


class Group(NamedTuple):
    """A grouping against the label, in one split."""

    split: str
    grouping: str
    """A group column, or the columns joined by x."""
    association: Association
    adjusted: float
    """p, adjusted for the groupings of the split (Holm)."""
    label: str
    group: str
    """Class and group whose rows differ most from independence, in standard deviations."""
    share: float
    """Rows of that class which are in that group, among `n`."""
    others: float
    """The same of all other classes."""
    n: int


class Shown(NamedTuple):
    """A property of images against the label, or against a group column, in the training split."""

    property: Property
    label: str
    """Class, or group, that stands out; empty where nothing can be told, as of a property that is the same in all."""
    contrast: Contrast
    skill: Skill


class OfGroup(NamedTuple):
    """The properties against a group column, within classes. Groups may differ so by their nature: no finding."""

    column: str
    properties: list[Shown]


class Audit(NamedTuple):
    """Of one data set."""

    data: str
    """Fingerprint of the data set."""
    train: str
    """The split that a model learns from."""
    classes: Classes
    groups: list[Group]
    duplicates: Duplicates
    properties: list[Shown]
    measured: int
    """Training rows whose images were measured."""
    at_most: int | None
    """Rows of a class that were measured at most; None where all were."""
    of_groups: Sequence[OfGroup] = ()
    missing: Missingness | None = None
    units: Sequence[Divided] = ()
    coverage: Coverage | None = None
    """Of the training split, if a reference population was given."""


class Asked(NamedTuple):
    """What an audit is told beside the data set."""

    reference: Reference | None = None
    unit: str = ""
    """A group column, or a column of `units`."""
    units: Path | None = None
    """CSV with the ids of rows as `path`, and their units."""


def audit(index: Index, train: str, cap: int, asked: Asked = Asked(), seed: int = 0) -> Audit:
    """Of a data set whose training split is `train`; images of at most `cap` rows are measured."""
    rows = index.rows_of(train)
    most = quota(index.labels[rows], cap)
    measured = rows[sample(index.labels[rows], most, seed)]
    units = divided(index, train, asked.unit, asked.units)
    values = np.array(of_images(index, measured, measure, "measure"))
    return Audit(
        data=index.fingerprint,
        train=train,
        classes=class_counts(index, train),
        groups=[line for split in (train, *(s for s in index.splits if s != train)) for line in groups(index, split)],
        duplicates=duplicates(index, train),
        properties=properties(index, measured, values),
        measured=len(measured),
        at_most=most if len(measured) < len(rows) else None,
        of_groups=of_groups(index, measured, values),
        missing=missingness(index, _dropped(index)),
        units=units,
        coverage=coverage(index, train, asked.reference, seed) if asked.reference else None,
    )


def _dropped(index: Index) -> dict[tuple[str, ...], int]:
    """Class and group values of dropped rows -> how many; of an index that is not of the newest generation, none."""
    made = manifest.read(index.folder)
    return dict(made.rejected.by_cell) if made.fingerprint == index.fingerprint else {}


def class_counts(index: Index, train: str) -> Classes:
    counts = contingency(index.split, index.labels, (len(index.splits), len(index.classes)))
    n = counts[index.splits.index(train)]
    share = n[n > 0] / n.sum()
    return Classes(
        [
            ClassCount(name, dict(zip(index.splits, counts[:, k].tolist(), strict=True)), effective_number(int(n[k])))
            for k, name in enumerate(index.classes)
        ],
        float(n.max() / n.min()) if n.min() else math.nan,
        math.exp(-float(share @ np.log(share))),
        _imbalance_by_chance(int(n.sum()), len(n)),
    )


def _imbalance_by_chance(n: int, classes: int, seed: int = 0) -> float:
    random = np.random.Generator(np.random.Philox(key=[seed, n]))
    counts = random.multinomial(n, np.full(classes, 1 / classes), DRAWS)
    least, most = counts.min(1), counts.max(1)
    ratios = np.divide(most, least, out=np.full(DRAWS, float(n)), where=least > 0)
    return float(np.quantile(ratios, 0.99, method="higher"))


def effective_number(n: int, beta: float = BETA) -> float:
    """(1 - beta^n) / (1 - beta): rows that n are worth when each new one overlaps the old (Cui et al. 2019)."""
    return (1 - beta**n) / (1 - beta)


def groups(index: Index, split: str) -> list[Group]:
    """Each grouping against the label; without numbers where classes and values are too many for a table."""
    rows, found = index.rows_of(split), list[Group]()
    for name, values, code in _groupings(index):
        if len(index.classes) * len(values) > MOST_ENTRIES:
            nothing = Association(math.nan, math.nan, math.nan, len(rows), math.nan, math.nan, math.nan)
            found.append(Group(split, name, nothing, math.nan, "", "", math.nan, math.nan, len(rows)))
            continue
        table = contingency(index.labels[rows], code[rows], (len(index.classes), len(values)))
        told = association(table)
        k, g = np.unravel_index(np.abs(residuals(table)).argmax(), table.shape)
        own, others = table[k], table.sum(0) - table[k]
        share, rest = (float(part[g] / part.sum()) if part.sum() else math.nan for part in (own, others))
        found.append(Group(split, name, told, math.nan, index.classes[k], values[g], share, rest, int(own.sum())))
    adjusted = holm(np.array([line.association.p for line in found]))
    return [line._replace(adjusted=float(p)) for line, p in zip(found, adjusted, strict=True)]


def properties(index: Index, rows: Ints, values: Floats) -> list[Shown]:
    """Each of the PROPERTIES [N, P] against the label of these rows, beyond what the groups explain."""
    return _shown(contrasts(values, index.labels[rows], index.occurring_cells()[1][rows]), index.classes)


def of_groups(index: Index, rows: Ints, values: Floats) -> list[OfGroup]:
    """The same against each group column, beyond what the classes explain."""
    found = list[OfGroup]()
    for a, (column, names) in enumerate(index.group_values.items()):
        told = contrasts(values, index.groups[rows, a], index.labels[rows], replicates=GROUP_REPLICATES)
        found.append(OfGroup(column, _shown(told, names)))
    return found


def _shown(found: list[tuple[Contrast, Skill]], names: Sequence[str]) -> list[Shown]:
    told = [names[contrast.label] if contrast.label >= 0 else "" for contrast, _ in found]
    return [Shown(p, name, *line) for p, name, line in zip(PROPERTIES, told, found, strict=True)]


def quota(labels: Ints, cap: int) -> int:
    """How many rows of a class may be taken so that there are at most `cap` in all; one at least."""
    counts = np.bincount(labels)
    return max(1, bisect.bisect(range(1, int(counts.max()) + 1), cap, key=lambda n: int(np.minimum(counts, n).sum())))


def sample(labels: Ints, most: int, seed: int) -> Ints:
    """Places, in order, of at most `most` rows of each class, drawn at random, the same for the same seed."""
    order = rng(seed, len(labels)).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return np.sort(order[place < most])


def _groupings(index: Index) -> Iterator[tuple[str, list[str], Ints]]:
    """Name, values and value of each row, [N], of every group column, and of all columns at once."""
    for a, (column, values) in enumerate(index.group_values.items()):
        yield column, list(values), index.groups[:, a]
    if len(index.group_values) > 1:
        cells, cell = index.occurring_cells()
        yield " x ".join(index.group_values), [", ".join(names) for names in cells], cell
