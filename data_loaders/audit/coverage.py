"""How far the groups of a data set are those of a population it is to stand for, which a table describes.

The table (CSV or Parquet) has a column for each attribute, `label` or a group column, and `share` or `count`. It is
taken to be exact: what is uncertain is the sample.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from data_loaders.audit.associations import CHANCE, FEWEST_TABLES, ROUNDING, TABLES, WORK, Floats, empirical_p
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index, Ints
from data_loaders.settings import nearest
from data_loaders.sources.lines import records

LABEL = "label"
REFUSED = "The reference population cannot be used:"
AMOUNTS = ("share", "count")
TOLERANCE = 1e-3
"""By which shares may miss 1, being rounded."""
LEVEL = 0.95


class Covered(NamedTuple):
    """A cell of the population."""

    values: tuple[str, ...]
    n: int
    """Rows of the data set in it."""
    reference: float
    """Its share of the population."""
    ratio: float
    """Its share of the data set over that; NaN where the population has none of it."""
    low: float
    high: float
    """Interval of the ratio at 95 % (Wilson 1927)."""
    needed: int | None
    """Images of it to add, and of no other, to bring it up to its share; None where it is to be all there is."""


class Coverage(NamedTuple):
    """A split against a population."""

    attributes: tuple[str, ...]
    cells: list[Covered]
    """The least ratio first."""
    distance: float
    """Total variation: the share of the rows that would have to be of other cells."""
    by_chance: float
    """95th percentile of it in samples of the population of as many rows."""
    p: float
    n: int


class Reference(NamedTuple):
    """A population by C cells."""

    attributes: tuple[str, ...]
    cells: list[tuple[str, ...]]
    shares: Floats
    """[C], sum 1."""


def read_reference(path: Path, index: Index) -> Reference:
    """Raises Refusal with all that is wrong with the table."""
    lines = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    where, header = next(lines, (f"{path}:1", []))
    known = {LABEL: index.classes, **index.group_values}
    amounts = [name for name in header if name in AMOUNTS]
    attributes = tuple(name for name in header if name not in AMOUNTS)
    faults = [
        Fault(f"{where}:{header.index(a) + 1}", f"no column {a!r}", nearest(a, known))
        for a in attributes
        if a not in known
    ]
    faults += [
        Fault(f"{where}:{i + 1}", f"{name!r} stands twice", "keep one of the two")
        for i, name in enumerate(header)
        if name in header[:i]
    ]
    if len(amounts) != 1:
        fix = f"give one column of {' or '.join(AMOUNTS)}"
        faults.append(Fault(where, f"has {' and '.join(amounts) or 'no share'}", fix))
    if not attributes:
        faults.append(Fault(where, "describes no attribute", f"there are: {', '.join(known)}"))
    if faults:
        raise Refusal(REFUSED, faults, 65)
    read = _Cells(path, header, attributes, amounts[0], known)
    for place, cells in lines:
        read.add(place, cells)
    return read.reference()


class _Cells:
    """Takes the lines of a table one by one and remembers what is wrong with them."""

    def __init__(
        self, path: Path, header: list[str], attributes: tuple[str, ...], amount: str, known: dict[str, tuple[str, ...]]
    ) -> None:
        self.path, self.header, self.attributes, self.amount, self.known = path, header, attributes, amount, known
        self.found: dict[tuple[str, ...], tuple[str, float]] = {}
        self.faults: list[Fault] = []
        self.strange: list[tuple[str, str, str]] = []
        self.seen: dict[str, set[str]] = {name: set() for name in attributes}

    def add(self, where: str, cells: list[str]) -> None:
        if len(cells) != len(self.header):
            what, fix = f"{len(cells)} cells under {len(self.header)} columns", "add or quote cells"
            self.faults.append(Fault(where, what, fix))
            return
        line = dict(zip(self.header, cells, strict=True))
        at = {name: f"{where}:{i + 1}" for i, name in enumerate(self.header)}
        for name in self.attributes:
            self.seen[name].add(line[name])
            if line[name] not in self.known[name]:
                self.strange.append((at[name], name, line[name]))
        values = tuple(line[name] for name in self.attributes)
        if values in self.found:
            self.faults.append(Fault(where, f"{', '.join(values)} stands twice, first at {self.found[values][0]}"))
        self.found.setdefault(values, (where, self._number(at[self.amount], line[self.amount])))

    def _number(self, where: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            self.faults.append(Fault(where, f"{text!r} is no {self.amount}", "give a number that is not negative"))
        return value

    def reference(self) -> Reference:
        """A class that the data set does not know is refused. So is a group value, unless the table has all those that
        the data set knows besides: then it is no misspelling, but one that the data set has no row of."""
        for where, name, value in self.strange:
            lacking = set(self.known[name]) - self.seen[name]
            if name == LABEL or lacking:
                fix = nearest(value, sorted(lacking) or self.known[name])
                self.faults.append(Fault(where, f"no {name} {value!r} in the data set", fix))
        amounts = np.array([amount for _, amount in self.found.values()])
        total = float(amounts.sum())
        if not self.faults and (total <= 0 or (self.amount == "share" and abs(total - 1) > TOLERANCE)):
            what = f"the {self.amount}s sum to {total:g}"
            self.faults.append(Fault(str(self.path), what, "give all cells, so that shares sum to 1"))
        if self.faults:
            raise Refusal(REFUSED, self.faults, 65)
        return Reference(self.attributes, list(self.found), amounts / total)


def coverage(index: Index, split: str, reference: Reference, seed: int = 0) -> Coverage:
    """Of a split against a population. Cells that the population has none of come last, with no ratio."""
    counted, rest = _counts(index, split, reference)
    shares, n = reference.shares, int(counted.sum() + sum(rest.values()))
    cells = [_covered(*line, n) for line in zip(reference.cells, counted.tolist(), shares.tolist(), strict=True)]
    cells += [_covered(values, count, 0.0, n) for values, count in rest.items()]
    cells.sort(key=lambda c: math.inf if math.isnan(c.ratio) else c.ratio)
    if not n:
        return Coverage(reference.attributes, cells, math.nan, math.nan, math.nan, n)
    distance = float(np.abs(counted / n - shares).sum() + sum(rest.values()) / n) / 2
    null = _null(n, shares, seed)
    p, chance = float(empirical_p(null, distance)), float(np.quantile(null, CHANCE))
    return Coverage(reference.attributes, cells, distance, chance, p, n)


def _counts(index: Index, split: str, reference: Reference) -> tuple[Ints, dict[tuple[str, ...], int]]:
    """Rows of the split in each cell of the population, [C], and in each that it does not have."""
    rows, names = index.rows_of(split), {LABEL: index.classes, **index.group_values}
    groups = list(index.group_values)
    codes = [index.labels[rows] if a == LABEL else index.groups[rows, groups.index(a)] for a in reference.attributes]
    present, counts = np.unique(np.stack(codes, 1), axis=0, return_counts=True)
    values = [tuple(names[a][v] for a, v in zip(reference.attributes, row, strict=True)) for row in present.tolist()]
    found = dict(zip(values, counts.tolist(), strict=True))
    return np.array([found.pop(cell, 0) for cell in reference.cells], np.int64), found


def _null(n: int, shares: Floats, seed: int) -> Floats:
    """Total variation of samples of the population."""
    random = np.random.Generator(np.random.Philox(key=[seed, n]))
    replicates, done = int(np.clip(WORK // len(shares), FEWEST_TABLES, TABLES)), list[Floats]()
    each = max(1, 2**22 // len(shares))
    for start in range(0, replicates, each):
        drawn = random.multinomial(n, shares / shares.sum(), min(each, replicates - start))
        done.append(np.abs(drawn / n - shares).sum(1) / 2)
    return np.concatenate(done)


def _covered(values: tuple[str, ...], count: int, share: float, n: int) -> Covered:
    low, high = wilson(count, n)
    lacks = share * n - count
    needed = (
        None
        if share >= 1 - ROUNDING and lacks > 0
        else max(0, math.ceil(lacks / (1 - share) - ROUNDING))
        if share < 1
        else 0
    )
    if share <= 0:
        return Covered(values, count, share, math.nan, math.nan, math.nan, needed)
    return Covered(values, count, share, count / n / share if n else math.nan, low / share, high / share, needed)


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Score interval of a proportion at 95 % (Wilson 1927); NaN where there was no trial."""
    if not trials:
        return math.nan, math.nan
    z, p = NormalDist().inv_cdf((1 + LEVEL) / 2), hits / trials
    middle, scale = p + z**2 / (2 * trials), 1 + z**2 / trials
    half = z * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def _csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    for line, cells in records(str(path)):
        if cells:
            yield f"{path}:{line}", [cell.strip() for cell in cells]


def _parquet(path: Path) -> Iterator[tuple[str, list[str]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as wrong:
        raise Refusal(
            "The reference population cannot be used:", [Fault(str(path), f"cannot be read: {wrong}")], 65
        ) from wrong
    yield f"{path}:0", list(table.column_names)
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}:{number}", ["" if value is None else str(value) for value in row.values()]
