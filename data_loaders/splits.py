"""Draws train, validation and test rows, stratified by class and group, never dividing a unit such as a patient.

Within a stratum, rows stand in the order of a hash of their ids; the first ones go to `val`, the next to `test`. So the
order of a file changes nothing. Rows of an earlier generation keep their splits, and new ones fill up what is lacking.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TypeVar

from pydantic import model_validator

from data_loaders.settings import Fraction, Settings

TRAIN = "train"
S = TypeVar("S", bound=Hashable)
Held = Mapping[S, Mapping[str, int]]
"""Stratum -> split -> rows that are in it already."""


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

    def shares(self, given: set[str]) -> dict[str, float]:
        """Split -> share of the rows that are drawn, where these splits are given; in the order of their drawing."""
        shares = {name: share for name, share in (("val", self.val), ("test", self.test)) if name not in given}
        return {**shares, TRAIN: 1 - sum(shares.values())}

    def quotas(self, sizes: Mapping[S, int], shares: Mapping[str, float], held: Held[S]) -> dict[S, dict[str, int]]:
        """How many of the new rows of each stratum every split draws, so that with those that it holds it is within one
        row of its share, and the splits as a whole are, too."""
        owed = dict.fromkeys(shares, 0.0)
        quotas: dict[S, dict[str, int]] = {}
        for stratum in sorted(sizes, key=repr):
            former = held.get(stratum, {})
            wanted = _whole(sizes[stratum] + sum(former.get(name, 0) for name in shares), shares, owed)
            quota = {name: max(0, rows - former.get(name, 0)) for name, rows in wanted.items()}
            excess = sum(quota.values()) - sizes[stratum]  # where a split holds more than its share, others get less
            for name in sorted(quota, key=lambda name: -quota[name]):
                cut = min(excess, quota[name])
                quota[name], excess = quota[name] - cut, excess - cut
            quotas[stratum] = quota
        return quotas

    def assign(self, units: Mapping[str, Counter[S]], shares: Mapping[str, float], held: Held[S]) -> dict[str, str]:
        """Split of each unit: largest units first, each to the split that most lacks rows of its strata."""
        total = Counter[S]()
        for content in units.values():
            total.update(content)
        former = {s: held.get(s, {}) for s in total}
        lack = {
            name: {s: share * (n + sum(former[s].values())) - former[s].get(name, 0) for s, n in total.items()}
            for name, share in sorted(shares.items(), key=lambda item: item[0] != TRAIN)
        }
        split: dict[str, str] = {}
        for unit in sorted(units, key=lambda u: (-units[u].total(), self.place(u))):
            ordered = sorted(units[unit].items(), key=repr)  # float sums depend on the order
            split[unit] = max(lack, key=lambda name: sum(_gain(lack[name][s], n) / total[s] for s, n in ordered))
            for stratum, n in ordered:
                lack[split[unit]][stratum] -= n
        return split

    def place(self, name: str) -> int:
        """64 bits by which rows, or units, are ordered."""
        return int.from_bytes(hashlib.blake2b(f"{self.seed}\0{name}".encode(), digest_size=8).digest())


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


def _gain(lack: float, n: int) -> float:
    """By how much the squared distance from a wanted count shrinks when n rows come."""
    return lack**2 - (lack - n) ** 2
