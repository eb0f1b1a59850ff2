"""What a data set alone says of bias: the sizes of classes, groups and properties of images against them, and copies.

Each number comes with the rows it rests on and with what chance shows on as many.
"""

import bisect
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_loaders.audit.associations import (
    Association,
    Contrast,
    Floats,
    association,
    contingency,
    contrasts,
    holm,
    residuals,
)
from data_loaders.audit.duplicates import Duplicates, duplicates
from data_loaders.audit.properties import PROPERTIES, Property, measure
from data_loaders.audit.reading import of_images
from data_loaders.augment import rng
from data_loaders.index import Index, Ints

BETA = 0.999
"""Of the effective number: rows beyond some 1 / (1 - BETA) of a class add little."""


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
    """A property of images against the label, in the training split, beyond what the groups explain."""

    property: Property
    label: str
    """Class that stands out; empty where nothing can be told, as of a property that is the same in all images."""
    contrast: Contrast
    adjusted: float
    """p, adjusted for the properties (Holm)."""


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


def audit(index: Index, train: str, cap: int, seed: int = 0) -> Audit:
    """Of a data set whose training split is `train`; images of at most `cap` rows are measured."""
    rows = index.rows_of(train)
    most = quota(index.labels[rows], cap)
    measured = rows[sample(index.labels[rows], most, seed)]
    return Audit(
        data=index.fingerprint,
        train=train,
        classes=class_counts(index, train),
        groups=[line for split in (train, *(s for s in index.splits if s != train)) for line in groups(index, split)],
        duplicates=duplicates(index, train),
        properties=properties(index, measured),
        measured=len(measured),
        at_most=most if len(measured) < len(rows) else None,
    )


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
    )


def effective_number(n: int, beta: float = BETA) -> float:
    """(1 - beta^n) / (1 - beta): rows that n are worth when each new one overlaps the old (Cui et al. 2019)."""
    return (1 - beta**n) / (1 - beta)


def groups(index: Index, split: str) -> list[Group]:
    """Each grouping against the label."""
    rows, found = index.rows_of(split), list[Group]()
    for name, values, code in _groupings(index):
        table = contingency(index.labels[rows], code[rows], (len(index.classes), len(values)))
        told = association(table)
        k, g = np.unravel_index(np.abs(residuals(table)).argmax(), table.shape)
        own, others = table[k], table.sum(0) - table[k]
        share, rest = (float(part[g] / part.sum()) if part.sum() else math.nan for part in (own, others))
        found.append(Group(split, name, told, math.nan, index.classes[k], values[g], share, rest, int(own.sum())))
    adjusted = holm(np.array([line.association.p for line in found]))
    return [line._replace(adjusted=float(p)) for line, p in zip(found, adjusted, strict=True)]


def properties(index: Index, rows: Ints) -> list[Shown]:
    """Each of the PROPERTIES against the label of these rows."""
    values = np.array(of_images(index, rows, measure, "measure"))
    found = contrasts(values, index.labels[rows], index.occurring_cells()[1][rows])
    adjusted: Floats = holm(np.array([contrast.p for contrast in found]))
    names = [index.classes[contrast.label] if contrast.label >= 0 else "" for contrast in found]
    return [Shown(*line) for line in zip(PROPERTIES, names, found, adjusted.tolist(), strict=True)]


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
