"""Which row of the data set stands at a position of the endless training stream: a pure function.

A step takes the next `batch` positions and each rank its slice of them, so the order of the data does not depend on the
number of workers, and all that a resume needs is the step.

Every stratum (say, a class) holds tickets. A cycle deals every ticket once, in an order keyed by the cycle; the d-th
ticket of a stratum takes the d-th row of an endless shuffled walk over its rows. So the mix is exact over each cycle,
and the rows of a stratum repeat evenly. Where a cycle of an epoch or less cannot hold the shares exactly, several take
turns, which do so together. There is no state, and no table longer than the rows themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_loaders.index import Ints

Floats = NDArray[np.float64]
ROUNDS = 8
LEAST_HALF_BITS = 3
"""Six rounds, or fewer bits, are measurably not uniform over the orders of a stratum of two to seven rows."""
CHUNK = 2**20
LEAST_TICKETS = 100
"""Of the rarest stratum before its tickets come again as they were: its share is right to within 1 %."""
MOST_TURNS = 128
SLACK = 1e-6
"""A share that falls short of a whole number by less is that number, rounded."""
MOST_MULTIPLE = 1000
"""Weights of three decimals are whole numbers times as many."""


class Sampler(Protocol):
    """An endless training stream."""

    @property
    def phases(self) -> tuple[int, ...]:
        """First position of each phase; the mix is the same throughout a phase."""
        ...

    def rows(self, positions: Ints) -> Ints:
        """Row of the data set at each position of the stream, both of shape [P]."""
        ...

    def counts(self, start: int, stop: int) -> Ints:
        """How often each class is drawn at positions start … stop-1, [K], without reading an image."""
        ...


@dataclass(frozen=True)
class Strata:
    """N rows of a data set, divided into S strata, none of them empty."""

    rows: Ints
    """Rows of the data set, [N], those of one stratum side by side."""
    sizes: Ints
    """Rows of each stratum, [S]."""
    labels: Ints
    """Class of every row of the data set, in 0 … classes-1."""
    classes: int

    @classmethod
    def of(cls, rows: Ints, strata: Ints, labels: Ints, classes: int) -> "Strata":
        """From the stratum of each row, [N], in 0 … S-1."""
        sizes = np.bincount(strata)
        order = np.argsort(strata.astype(np.min_scalar_type(len(sizes))), kind="stable")  # small numbers sort fast
        return cls(rows[order], sizes, labels, classes)

    def only(self, kept: NDArray[np.bool_]) -> "Strata":
        """Without the rows that are not kept, [N], and the strata of which none is."""
        sizes = np.bincount(np.repeat(np.arange(len(self.sizes)), self.sizes)[kept])
        return replace(self, rows=self.rows[kept], sizes=sizes[sizes > 0])

    @cached_property
    def first(self) -> Ints:
        """Where in `rows` each stratum begins, [S]."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def label(self) -> Ints:
        """Class of the first row of each stratum, [S]."""
        return self.labels[self.rows[self.first]]

    @cached_property
    def pure(self) -> bool:
        """Whether each stratum has one class."""
        return bool((np.repeat(self.label, self.sizes) == self.labels[self.rows]).all())

    @cached_property
    def class_sizes(self) -> Ints:
        """Rows of each class, [K]."""
        return np.bincount(self.labels[self.rows], minlength=self.classes)


@dataclass(frozen=True)
class TicketSampler:
    """The stream that the module's text describes."""

    strata: Strata
    tickets: Ints
    """How often each stratum is drawn in each of the M cycles that take turns, [M, S]; all are equally long."""
    seed: int
    lap: Ints | None = None
    """Rows of each stratum that are drawn before it is shuffled anew, [S]; by default all."""

    phases = (0,)

    @property
    def row_ids(self) -> Ints:
        """The rows that may be drawn, [N]."""
        return self.strata.rows

    @cached_property
    def cycle(self) -> int:
        """Positions after which every stratum has had exactly its share."""
        return int(self.tickets[0].sum())

    def rows(self, positions: Ints) -> Ints:
        cycle, place = np.divmod(np.asarray(positions, np.int64), self.cycle)
        lap, turn = np.divmod(cycle, len(self.tickets))
        ticket = turn * self.cycle + permute(place, self.cycle, self.seed, cycle)
        cell = np.searchsorted(self._first_ticket, ticket, side="right") - 1
        stratum = cell % len(self.strata.sizes)
        before = lap * self._before[-1][stratum] + self._before.ravel()[cell]
        return self._walk(stratum, before + ticket - self._first_ticket[cell])

    def counts(self, start: int, stop: int) -> Ints:
        first, last = -(-start // self.cycle), stop // self.cycle
        if first >= last or not (self.strata.pure or self.lap is None):
            return self._drawn(start, stop)
        whole = self._whole_cycles(first, last)
        return whole + self._drawn(start, first * self.cycle) + self._drawn(last * self.cycle, stop)

    def _walk(self, stratum: Ints, draw: Ints) -> Ints:
        """The row that a draw of a stratum takes, all [P]."""
        sizes = self.strata.sizes
        lap, place = np.divmod(draw, (sizes if self.lap is None else self.lap)[stratum])
        place = permute(place, sizes[stratum], self.seed, stratum + 1, lap)
        return self.strata.rows[self.strata.first[stratum] + place]

    def _drawn(self, start: int, stop: int) -> Ints:
        return self._counted(start, stop, self.rows)

    def _whole_cycles(self, first: int, last: int) -> Ints:
        """Without drawing what is known: a stratum of one class, or whole laps, each of which has every row once."""
        begin, end = self._before_cycle(first), self._before_cycle(last)
        if self.strata.pure:
            return _sums(self.strata.label, end - begin, self.strata.classes)
        laps = np.maximum(end // self.strata.sizes - -(-begin // self.strata.sizes), 0)
        drawn = end - begin - laps * self.strata.sizes
        before = np.where(laps, -begin % self.strata.sizes, drawn)  # draws that precede the whole laps
        starts = np.cumsum(drawn) - drawn

        def broken(places: Ints) -> Ints:
            stratum = np.searchsorted(starts, places, side="right") - 1
            draw = places - starts[stratum]
            skipped = np.where(draw < before[stratum], 0, (laps * self.strata.sizes)[stratum])
            return self._walk(stratum, begin[stratum] + draw + skipped)

        of_rows = _sums(self.strata.labels[self.strata.rows], np.repeat(laps, self.strata.sizes), self.strata.classes)
        return of_rows + self._counted(0, int(drawn.sum()), broken)

    def _counted(self, start: int, stop: int, rows: Callable[[Ints], Ints]) -> Ints:
        """Classes of the rows at start … stop-1, [K]."""
        total = np.zeros(self.strata.classes, np.int64)
        for begin in range(start, stop, CHUNK):
            drawn = rows(np.arange(begin, min(begin + CHUNK, stop)))
            total += np.bincount(self.strata.labels[drawn], minlength=self.strata.classes)
        return total

    def _before_cycle(self, cycle: int) -> Ints:
        """How often each stratum is drawn before this cycle, [S]."""
        laps, cycle = divmod(cycle, len(self.tickets))
        return laps * self._before[-1] + self._before[cycle]

    @cached_property
    def _before(self) -> Ints:
        """How often each stratum is drawn in the cycles before the one whose turn it is, and in all, [M + 1, S]."""
        return np.pad(np.cumsum(self.tickets, axis=0), ((1, 0), (0, 0)))

    @cached_property
    def _first_ticket(self) -> Ints:
        """Number of the first ticket of each stratum in each cycle, [M * S]."""
        return np.cumsum(self.tickets) - self.tickets.ravel()


@dataclass(frozen=True)
class Schedule:
    """One stream after another, of which the last is endless."""

    phases: tuple[int, ...]
    """First position of each, in order from 0."""
    streams: Sequence[TicketSampler]
    """Each begins with its phase."""

    def rows(self, positions: Ints) -> Ints:
        positions = np.asarray(positions, np.int64)
        phase = np.searchsorted(self._firsts, positions, side="right") - 1
        rows = np.empty(len(positions), np.int64)
        for p in np.unique(phase).tolist():
            rows[phase == p] = self.streams[p].rows(positions[phase == p] - self.phases[p])
        return rows

    def counts(self, start: int, stop: int) -> Ints:
        ends = [*self.phases[1:], max(stop, self.phases[-1])]
        total = np.zeros(self.streams[0].strata.classes, np.int64)
        for first, end, stream in zip(self.phases, ends, self.streams, strict=True):
            if max(start, first) < min(stop, end):
                total += stream.counts(max(start, first) - first, min(stop, end) - first)
        return total

    @cached_property
    def _firsts(self) -> Ints:
        return np.array(self.phases, np.int64)


def tickets(weights: Floats, rows: int) -> Ints:
    """Tickets of each stratum in cycles that take turns, [M, S], in proportion to its weight, [S].

    One cycle, the shortest that is exact, where that is no longer than an epoch of so many rows; otherwise as many
    epochs as it takes for the rarest stratum to have its `LEAST_TICKETS`.
    """
    exact = _whole(weights)
    if exact is not None and exact.sum() <= rows:
        return exact[None]
    draws = LEAST_TICKETS * weights.sum() / weights[weights > 0].min()
    turns = min(ceil(draws / rows), MOST_TURNS)
    return apportion(weights, max(rows, ceil(draws / turns)), turns)


def apportion(weights: Floats, total: int, turns: int = 1) -> Ints:
    """Whole numbers that add up to a total in each turn, in proportion to the weights, [M, S]: within one of the shares
    in each turn, and over all of them (systematic sampling, Madow 1949, from evenly spaced starts)."""
    ends = np.cumsum(weights, dtype=np.float64)
    ends *= total / ends[-1]
    starts = np.arange(turns)[:, None] / turns + SLACK
    return np.diff(np.floor(ends + starts), axis=1, prepend=0).astype(np.int64)


def _whole(weights: Floats) -> Ints | None:
    """The smallest whole numbers in the very ratios of the weights, if a small multiple of them is whole."""
    for unit in (1.0, weights[weights > 0].min()):
        factors = np.arange(1, MOST_MULTIPLE + 1)
        for weight in np.unique(weights / unit):
            multiples = factors * weight
            factors = factors[np.abs(multiples - np.rint(multiples)) <= 1e-12 * multiples]
            if not len(factors):
                break
        else:
            whole = np.rint(factors[0] * (weights / unit)).astype(np.int64)
            return whole // np.gcd.reduce(whole)
    return None


def branch(seed: int, phase: int) -> int:
    """Seed of a phase of a schedule; that of the first is the seed itself."""
    return int(scramble(scramble(np.array([seed], np.uint64)) + np.uint64(phase))[0]) if phase else seed


def _sums(classes: Ints, weights: Ints, length: int) -> Ints:
    """Sum of the weights of each class, [K]; exact below 2**53."""
    return np.bincount(classes, weights=weights, minlength=length).astype(np.int64)


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
