"""Which row of the data set stands at a position of the endless training stream: a pure function.

A step takes the next `batch` positions and each rank its slice of them, so the order of the data does not depend on the
number of workers, and all that a resume needs is the step.

Every stratum (say, a class) holds tickets. A cycle deals every ticket once, in an order keyed by the cycle; the d-th
ticket of a stratum takes the d-th row of an endless shuffled walk over its rows. So the mix is exact over each cycle,
and the rows of a stratum repeat evenly. There is no state, and no table longer than the rows themselves.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index, Ints
from data_loaders.settings import Settings

ROUNDS = 8
LEAST_HALF_BITS = 3
"""Six rounds, or fewer bits, are measurably not uniform over the orders of a stratum of two to seven rows."""
CHUNK = 2**20
KEEP = 2**63
"""Keys the choice of the rows that are kept, apart from all strata and cycles."""


class Sampler(Protocol):
    """An endless training stream."""

    def rows(self, positions: Ints) -> Ints:
        """Row of the data set at each position of the stream, both of shape [P]."""
        ...

    def counts(self, start: int, stop: int) -> Ints:
        """How often each class is drawn at positions start … stop-1, [K], without reading an image."""
        ...


class Strata(Settings):
    """What all samplers have: the rows are divided into strata."""

    by: Literal["label", "group", "label_and_group"] = "label"
    """What makes two rows belong to one stratum."""
    columns: tuple[str, ...] = ()
    """Group columns that count for `by`; by default all, intersected."""

    @abstractmethod
    def tickets(self, sizes: Ints) -> Ints:
        """How often each stratum is drawn in a cycle, [S], where so many rows of each are drawn from, [S]."""

    def kept(self, strata: Ints, seed: int) -> Ints:
        """Which of the N rows are drawn at all, in order; strata [N]."""
        return np.arange(len(strata))

    def over(self, index: Index, rows: Ints, seed: int) -> "TicketSampler":
        """The stream over these rows of the data set."""
        labels = index.labels[rows]
        absent = sorted(set(range(len(index.classes))) - set(labels.tolist()))
        if absent:
            faults = [Fault("data", f"no training row of {index.classes[k]!r}", "add images of it") for k in absent]
            raise Refusal("A class cannot be learned:", faults, 65)
        strata = self._strata(index, rows)
        kept = self.kept(strata, seed)
        lost = sorted(set(labels.tolist()) - set(labels[kept].tolist()))
        if lost:
            fix = "set data.sampler.by=label_and_group, or another keep"
            faults = [Fault("data.sampler", f"keeps no row of {index.classes[k]!r}", fix) for k in lost]
            raise Refusal("A class cannot be learned:", faults)
        return TicketSampler(rows[kept], labels[kept], strata[kept], len(index.classes), self, seed)

    def _strata(self, index: Index, rows: Ints) -> Ints:
        names = list(index.group_values)
        faults = [
            Fault("data.sampler.columns", f"no group column {c!r}", f"there are: {', '.join(names) or 'none'}")
            for c in self.columns
            if c not in names
        ]
        if self.by != "label" and not names:
            faults.append(Fault("data.sampler.by", f"{self.by!r} needs a group column", "ingest with group_columns=…"))
        if faults:
            raise Refusal("The sampler does not fit the data:", faults)
        used = [index.groups[rows, names.index(c)] for c in self.columns or names] if self.by != "label" else []
        used += [index.labels[rows]] if self.by != "group" else []
        return np.unique(np.stack(used, 1), axis=0, return_inverse=True)[1].reshape(-1)


class Stratified(Strata):
    """Draws each stratum in proportion to (its size) ** temper; below 1, that oversamples the rare ones."""

    kind: Literal["stratified"] = "stratified"
    temper: float = Field(default=0.0, ge=0.0, le=1.0)
    """0 draws every stratum equally often (class-balanced), 1 as often as it occurs (natural order)."""

    def tickets(self, sizes: Ints) -> Ints:
        """Exact at temper 0 and 1, within 1 % of the smallest share between."""
        scaled = np.rint(100 * sizes**self.temper * float(sizes.min()) ** (1 - self.temper)).astype(np.int64)
        return scaled // np.gcd.reduce(scaled)


class Undersampled(Strata):
    """Keeps as many rows of each stratum as the smallest one has, chosen once, and draws the strata equally often. Each
    member of an ensemble keeps others: balanced bagging (EasyEnsemble, Liu et al. 2009)."""

    kind: Literal["undersampled"] = "undersampled"
    keep: PositiveInt | None = None
    """Most rows that are kept of a stratum; by default as many as the smallest has."""

    def tickets(self, sizes: Ints) -> Ints:
        return np.ones(len(sizes), np.int64)

    def kept(self, strata: Ints, seed: int) -> Ints:
        """The rows that a walk of its own through each stratum meets first."""
        sizes = np.bincount(strata)
        order = np.argsort(strata, kind="stable")
        place = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of each row within its stratum
        place = permute(place, np.repeat(sizes, sizes), seed, KEEP, np.repeat(np.arange(len(sizes)), sizes))
        return np.sort(order[place < (self.keep or sizes.min())])


AnySampler = Annotated[Stratified | Undersampled, Field(discriminator="kind")]


@dataclass(frozen=True)
class TicketSampler:
    """The stream that the module's text describes, over N rows in S strata."""

    row_ids: Ints
    """Rows of the data set, [N]."""
    labels: Ints
    """Their classes, [N]."""
    strata: Ints
    """Their strata, [N], in 0 … S-1, none empty."""
    classes: int
    settings: Strata
    seed: int
    sizes: Ints = field(init=False)
    tickets: Ints = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", np.bincount(self.strata))
        object.__setattr__(self, "tickets", self.settings.tickets(self.sizes))

    @property
    def cycle(self) -> int:
        """Positions after which every stratum has had exactly its share."""
        return int(self.tickets.sum())

    def rows(self, positions: Ints) -> Ints:
        return self.row_ids[self._members(positions)]

    def counts(self, start: int, stop: int) -> Ints:
        total = np.zeros(self.classes, np.int64)
        if self.settings.by != "group":  # then a stratum has one class, and whole cycles need no drawing
            first, last = -(-start // self.cycle), stop // self.cycle
            if first < last:
                each = np.bincount(self.labels[self._first_member], weights=self.tickets, minlength=self.classes)
                total += (last - first) * each.astype(np.int64)
                return total + self._drawn(start, first * self.cycle) + self._drawn(last * self.cycle, stop)
        return total + self._drawn(start, stop)

    def _drawn(self, start: int, stop: int) -> Ints:
        total = np.zeros(self.classes, np.int64)
        for begin in range(start, stop, CHUNK):
            members = self._members(np.arange(begin, min(begin + CHUNK, stop)))
            total += np.bincount(self.labels[members], minlength=self.classes)
        return total

    def _members(self, positions: Ints) -> Ints:
        """Which of the N rows stands at each position, [P]."""
        cycle, turn = np.divmod(np.asarray(positions, np.int64), self.cycle)
        ticket = permute(turn, self.cycle, self.seed, cycle)
        stratum = np.searchsorted(self._first_ticket, ticket, side="right") - 1
        draw = cycle * self.tickets[stratum] + ticket - self._first_ticket[stratum]
        lap, place = np.divmod(draw, self.sizes[stratum])
        place = permute(place, self.sizes[stratum], self.seed, stratum + 1, lap)
        return self._by_stratum[self._first_row[stratum] + place]

    @cached_property
    def _by_stratum(self) -> Ints:
        """[N], the rows of one stratum side by side."""
        return np.argsort(self.strata, kind="stable")

    @cached_property
    def _first_row(self) -> Ints:
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def _first_ticket(self) -> Ints:
        return np.cumsum(self.tickets) - self.tickets

    @cached_property
    def _first_member(self) -> Ints:
        """A row of each stratum, [S]."""
        return self._by_stratum[self._first_row]


def permute(place: Ints, size: Ints | int, *keys: Ints | int) -> Ints:
    """A keyed pseudo-random bijection of range(size), elementwise: a balanced Feistel cipher over a power of four
    (Luby & Rackoff 1988), walked until it lands inside (Black & Rogaway 2002)."""
    sizes = np.broadcast_to(np.asarray(size, np.uint64), place.shape)
    bits = np.frexp(np.maximum(sizes, 2).astype(np.float64) - 1)[1]  # of the largest place; exact below 2**53
    half = np.maximum((bits + 1) // 2, LEAST_HALF_BITS).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = np.zeros(place.shape, np.uint64)
    for k in keys:
        key = scramble(key + np.asarray(k).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    out, todo = place.astype(np.uint64), np.arange(len(place))
    while len(todo):
        left, right = out[todo] >> half[todo], out[todo] & mask[todo]
        for turn in range(ROUNDS):
            left, right = right, left ^ (scramble(right + scramble(key[todo] + np.uint64(turn))) & mask[todo])
        out[todo] = (left << half[todo]) | right
        todo = todo[out[todo] >= sizes[todo]]
    return out.astype(np.int64)


def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words that mixes every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
