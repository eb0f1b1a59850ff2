"""Which row of the data set stands at a position of the endless training stream: a pure function.

A step takes the next `batch` positions and each rank its slice of them, so the order of the data does not depend on the
number of workers, and all that a resume needs is the step.

Every stratum (say, a class) holds tickets. A cycle deals every ticket once, in an order keyed by the cycle; the d-th
ticket of a stratum takes the d-th row of an endless shuffled walk over its rows. So the mix is exact over each cycle,
and the rows of a stratum repeat evenly. Where a cycle of an epoch or less cannot hold the shares exactly, several take
turns, which do so together. There is no state, and no table but of the strata: the rows of a whole split lie on the
disk in the order of their classes (`Index.by_class`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_loaders import native
from data_loaders.index import Ints

Floats = NDArray[np.float64]
ROUNDS = 8
LEAST_HALF_BITS = 3
"""Six rounds, or fewer bits, are measurably not uniform over the orders of a stratum of two to seven rows."""
CHUNK = 2**20
DRAWN = 2**12
"""Positions whose rows are drawn at a time: as many as take hardly longer than a few."""
LEAST_TICKETS = 100
"""Of the rarest stratum before its tickets come again as they were: its share is right to within 1 %."""
MOST_TURNS = 128
SLACK = 1e-6
"""A share that falls short of a whole number by less is that number, rounded."""
GOLDEN = 0x9E3779B97F4A7C15
"""The golden ratio as a fraction of 2**64, odd: steps of it meet every word (splitmix64)."""
SHIFTS = tuple(np.array(n, np.uint64) for n in (30, 27, 31))
FACTORS = tuple(np.array(n, np.uint64) for n in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
WALKED = 2**13
"""Places that are permuted at a time: what belongs to them stays in the cache."""
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
    """Rows of the data set, those of one stratum side by side; there may be others."""
    first: Ints
    """Where in `rows` each stratum begins, [S]."""
    sizes: Ints
    """Rows of each stratum, [S]."""
    label: Ints
    """Class of the first row of each stratum, [S]."""
    pure: bool
    """Whether each stratum has one class."""
    labels: NDArray[Any]
    """Class of every row of the data set, in 0 … classes-1."""
    classes: int

    @classmethod
    def of(cls, rows: Ints, strata: Ints, labels: NDArray[Any], classes: int) -> "Strata":
        """From the stratum of each row, [N], in 0 … S-1."""
        sizes = np.bincount(strata)
        order = np.argsort(strata.astype(np.min_scalar_type(len(sizes))), kind="stable")  # small numbers sort fast
        return cls._side_by_side(rows[order], sizes, labels, classes)

    @classmethod
    def _side_by_side(cls, rows: Ints, sizes: Ints, labels: NDArray[Any], classes: int) -> "Strata":
        first = np.cumsum(sizes) - sizes
        label = labels[rows[first]].astype(np.int64)
        pure = bool((np.repeat(label, sizes) == labels[rows]).all())
        return cls(rows, first, sizes, label, pure, labels, classes)

    def __len__(self) -> int:
        """Rows, N."""
        return int(self.sizes.sum())

    @property
    def places(self) -> Ints:
        """Of each row within its stratum, [N]."""
        return np.arange(len(self)) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)

    @property
    def members(self) -> Ints:
        """The rows, stratum by stratum, [N]."""
        return self.rows[np.repeat(self.first, self.sizes) + self.places]

    def only(self, kept: NDArray[np.bool_]) -> "Strata":
        """Without the rows that are not kept, [N], and the strata of which none is."""
        sizes = np.bincount(np.repeat(np.arange(len(self.sizes)), self.sizes)[kept])
        return self._side_by_side(self.members[kept], sizes[sizes > 0], self.labels, self.classes)

    @cached_property
    def class_sizes(self) -> Ints:
        """Rows of each class, [K]."""
        if self.pure:
            return _sums(self.label, self.sizes, self.classes)
        return np.bincount(self.labels[self.members], minlength=self.classes)


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
        return self.strata.members

    @cached_property
    def cycle(self) -> int:
        """Positions after which every stratum has had exactly its share."""
        return int(self.tickets[0].sum())

    def rows(self, positions: Ints) -> Ints:
        return self._walk(*self._draws(positions))

    def counts(self, start: int, stop: int) -> Ints:
        if self.strata.pure:
            return self._counts_of_pure(start, stop)
        first, last = -(-start // self.cycle), stop // self.cycle
        if first >= last or self.lap is not None:
            return self._drawn(start, stop)
        whole = self._whole_cycles(first, last)
        return whole + self._drawn(start, first * self.cycle) + self._drawn(last * self.cycle, stop)

    def _draws(self, positions: Ints) -> tuple[Ints, Ints]:
        """Stratum at each position, and how often it is drawn before, both [P]."""
        cycle, place = np.divmod(np.asarray(positions, np.int64), self.cycle)
        lap, turn = np.divmod(cycle, len(self.tickets))
        ticket = turn * self.cycle + permute(place, self.cycle, self.seed, cycle)
        cell = np.searchsorted(self._first_ticket, ticket, side="right") - 1
        stratum = cell % len(self.strata.sizes)
        before = lap * self._before[-1][stratum] + self._before.ravel()[cell]
        return stratum, before + ticket - self._first_ticket[cell]

    def _walk(self, stratum: Ints, draw: Ints) -> Ints:
        """The row that a draw of a stratum takes, all [P]."""
        sizes = self.strata.sizes
        lap, place = np.divmod(draw, (sizes if self.lap is None else self.lap)[stratum])
        place = permute(place, sizes[stratum], self.seed, stratum + 1, lap)
        return self.strata.rows[self.strata.first[stratum] + place]

    def _counts_of_pure(self, start: int, stop: int) -> Ints:
        """Without drawing what is known: how often a stratum, and so its class, is drawn in whole cycles."""
        to_draw = sum(min(position % self.cycle, -position % self.cycle) for position in (start, stop))
        if stop - start <= to_draw:
            return self._counted(start, stop, self._classes)
        return self._until(stop) - self._until(start)

    def _until(self, position: int) -> Ints:
        """Classes at all positions before this one, [K]: from the nearest of a cycle's ends on, or back from it."""
        cycle, place = divmod(position, self.cycle)
        nearest = cycle + (2 * place > self.cycle)
        whole, end = _sums(self.strata.label, self._before_cycle(nearest), self.strata.classes), nearest * self.cycle
        if end <= position:
            return whole + self._counted(end, position, self._classes)
        return whole - self._counted(position, end, self._classes)

    def _classes(self, positions: Ints) -> Ints:
        return self.strata.label[self._draws(positions)[0]]

    def _drawn(self, start: int, stop: int) -> Ints:
        return self._counted(start, stop, lambda positions: self.strata.labels[self.rows(positions)])

    def _whole_cycles(self, first: int, last: int) -> Ints:
        """Without drawing whole laps, each of which has every row once."""
        begin, end = self._before_cycle(first), self._before_cycle(last)
        laps = np.maximum(end // self.strata.sizes - -(-begin // self.strata.sizes), 0)
        drawn = end - begin - laps * self.strata.sizes
        before = np.where(laps, -begin % self.strata.sizes, drawn)  # draws that precede the whole laps
        starts = np.cumsum(drawn) - drawn

        def broken(places: Ints) -> Ints:
            stratum = np.searchsorted(starts, places, side="right") - 1
            draw = places - starts[stratum]
            skipped = np.where(draw < before[stratum], 0, (laps * self.strata.sizes)[stratum])
            return self.strata.labels[self._walk(stratum, begin[stratum] + draw + skipped)]

        labels = self.strata.labels[self.strata.members]
        of_rows = _sums(labels, np.repeat(laps, self.strata.sizes), self.strata.classes)
        return of_rows + self._counted(0, int(drawn.sum()), broken)

    def _counted(self, start: int, stop: int, classes: Callable[[Ints], Ints]) -> Ints:
        """Of those at start … stop-1, [K]."""
        total = np.zeros(self.strata.classes, np.int64)
        for begin in range(start, stop, CHUNK):
            total += np.bincount(classes(np.arange(begin, min(begin + CHUNK, stop))), minlength=self.strata.classes)
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


def drawn(stream: Sampler, batches: Iterable[Ints]) -> Iterator[tuple[Ints, Ints]]:
    """The rows at the positions of each batch, and these; of several small batches at a time."""
    waiting = list[Ints]()
    for positions in batches:
        waiting.append(positions)
        if sum(map(len, waiting)) >= DRAWN:
            yield from _together(stream, waiting)
            waiting = []
    if waiting:
        yield from _together(stream, waiting)


def _together(stream: Sampler, batches: list[Ints]) -> Iterator[tuple[Ints, Ints]]:
    ends = np.cumsum([len(positions) for positions in batches])
    return zip(np.split(stream.rows(np.concatenate(batches)), ends[:-1]), batches, strict=True)


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
    out, count = np.empty(place.shape, np.int64), len(place)
    given = [
        np.broadcast_to(np.asarray(values), place.shape) if np.ndim(values) else values for values in (size, *keys)
    ]
    for start in range(0, count, WALKED):
        part = slice(start, start + WALKED)
        out[part] = _permuted(place[part], *(v[part] if isinstance(v, np.ndarray) else v for v in given))
    return out


def _permuted(place: Ints, size: Ints | int, *keys: Ints | int) -> NDArray[np.uint64] | Ints:
    sizes = np.broadcast_to(np.asarray(size, np.uint64), place.shape)
    key = np.zeros(1, np.uint64)
    for k in keys:
        key = scramble(key + np.asarray(k).astype(np.uint64) + np.uint64(GOLDEN))
    key = np.broadcast_to(key, place.shape)
    if native.NAME:
        return native.permute(place.astype(np.uint64), sizes, key, ROUNDS, LEAST_HALF_BITS)
    bits = np.frexp(np.maximum(sizes, 2).astype(np.float64) - 1)[1]  # of the largest place; exact below 2**53
    half = np.maximum((bits + 1) // 2, LEAST_HALF_BITS).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    turns = scramble(key + np.arange(ROUNDS, dtype=np.uint64)[:, None])
    out, todo = place.astype(np.uint64), np.arange(len(place))
    walking = out
    while True:
        left, right, word, aside = walking >> half, walking & mask, np.empty_like(walking), np.empty_like(walking)
        for turn in turns:  # left, right = right, left ^ (scramble(right + turn) & mask)
            np.add(right, turn, word)
            _scramble(word, aside)
            np.bitwise_and(word, mask, word)
            np.bitwise_xor(word, left, word)
            left, right, word = right, word, left
        walking = (left << half) | right
        out[todo] = walking
        outside = np.flatnonzero(walking >= sizes)
        if not len(outside):
            return out
        walking, todo, turns = walking[outside], todo[outside], turns[:, outside]
        half, mask, sizes = half[outside], mask[outside], sizes[outside]


def uniform(seed: int, positions: Ints, purpose: int, count: int) -> Floats:
    """Random numbers of positions of the stream, [P, count] in [0, 1): each a function of the seed, its position, what
    it is for, and its place among `count`. Positions have keys of their own, so no two of them share a number by
    construction, as they would if counters were added to seeds."""
    key = scramble(np.array([seed & 2**64 - 1], np.uint64) + np.uint64(GOLDEN))
    streams = scramble(
        scramble(key + np.uint64(purpose)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    )
    of_position = scramble(key + np.asarray(positions).astype(np.uint64) * np.uint64(GOLDEN))
    words = scramble(scramble(of_position)[:, None] ^ streams)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words that mixes every bit."""
    scrambled = x.copy()
    _scramble(scrambled, np.empty_like(scrambled))
    return scrambled


def _scramble(x: NDArray[np.uint64], aside: NDArray[np.uint64]) -> None:
    """In place, with room for as many words: getting memory takes longer than what is done to a few words."""
    for shift, factor in zip(SHIFTS, FACTORS, strict=False):
        np.right_shift(x, shift, aside)
        np.bitwise_xor(x, aside, x)
        np.multiply(x, factor, x)
    np.right_shift(x, SHIFTS[-1], aside)
    np.bitwise_xor(x, aside, x)
