"""Draws train, validation and test rows, stratified by class and group, never dividing a unit such as a patient."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping

from pydantic import model_validator

from data_loaders.settings import Fraction, Settings
from data_loaders.sources.rows import Row

TRAIN = "train"


class Splits(Settings):
    """Share of the rows without a given split that each split draws; the rest is `train`."""

    val: Fraction = 0.1
    test: Fraction = 0.1
    """Nothing is drawn for a split that the source gives already."""
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_rows_to_train(self) -> "Splits":
        if self.val + self.test >= 1:
            raise ValueError(f"val + test = {self.val + self.test:g} leaves no row to train on")
        return self

    def draw(self, rows: list[Row]) -> list[Row]:
        """The rows, each with its split. Every stratum (class and groups) is divided to within one row of its share,
        or as nearly as whole units allow."""
        given = {row.split for row in rows}
        shares = {name: share for name, share in (("val", self.val), ("test", self.test)) if name not in given}
        alone = [i for i, row in enumerate(rows) if not row.split and not row.unit]
        drawn = dict(zip(alone, self._divide([rows[i] for i in alone], shares), strict=True))
        units: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            if row.unit and not row.split:
                units[row.unit].append(i)
        for unit, split in self._assign(
            {u: [rows[i] for i in members] for u, members in units.items()}, shares
        ).items():
            drawn |= dict.fromkeys(units[unit], split)
        return [row if row.split else row._replace(split=drawn[i]) for i, row in enumerate(rows)]

    def _divide(self, rows: list[Row], shares: Mapping[str, float]) -> list[str]:
        strata: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            strata[_stratum(row)].append(i)
        split = [TRAIN] * len(rows)
        shares = {**shares, TRAIN: 1 - sum(shares.values())}
        owed = dict.fromkeys(shares, 0.0)
        for stratum in sorted(strata):
            members = sorted(strata[stratum], key=lambda i: self._order(rows[i].path))
            names = [name for name, count in _whole(len(members), shares, owed).items() for _ in range(count)]
            for i, name in zip(members, names, strict=True):
                split[i] = name
        return split

    def _assign(self, units: Mapping[str, list[Row]], shares: Mapping[str, float]) -> dict[str, str]:
        """Largest units first, each to the split that most lacks rows of its strata."""
        total = Counter(_stratum(row) for rows in units.values() for row in rows)
        shares = {TRAIN: 1 - sum(shares.values()), **shares}
        lack = {name: {s: share * n for s, n in total.items()} for name, share in shares.items()}
        split: dict[str, str] = {}
        for unit in sorted(units, key=lambda u: (-len(units[u]), self._order(u))):
            content = Counter(sorted(_stratum(row) for row in units[unit]))  # sorted: float sums depend on the order
            split[unit] = max(lack, key=lambda name: _gain(lack[name], content, total))
            for stratum, n in content.items():
                lack[split[unit]][stratum] -= n
        return split

    def _order(self, name: str) -> bytes:
        return hashlib.blake2b(f"{self.seed}\0{name}".encode(), digest_size=8).digest()


def _whole(n: int, shares: Mapping[str, float], owed: dict[str, float]) -> dict[str, int]:
    """The shares of n rows, each rounded down or up: up where most is owed. What is owed is carried from stratum to
    stratum, so that small ones do not all round alike, and stays below one row."""
    exact = {name: share * n for name, share in shares.items()}
    count = {name: math.floor(rows + 1e-9) for name, rows in exact.items()}
    for name, rows in exact.items():
        owed[name] += rows - count[name]
    broken = [name for name, rows in exact.items() if rows - count[name] > 1e-9]
    for name in sorted(broken, key=lambda name: -owed[name])[: n - sum(count.values())]:
        count[name] += 1
        owed[name] -= 1
    return count


def _stratum(row: Row) -> tuple[str, ...]:
    return (row.label, *row.groups)


def _gain(lack: Mapping[tuple[str, ...], float], content: Mapping[tuple[str, ...], int], total: Counter) -> float:
    """By how much the squared distance from the wanted counts shrinks, in shares of each stratum."""
    return sum((lack[s] ** 2 - (lack[s] - n) ** 2) / total[s] for s, n in content.items())
