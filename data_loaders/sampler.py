"""What the endless training stream is a mix of: how the rows are divided into strata, and how often each is drawn.

`stream.py` tells how a stream keeps its mix exactly, as a pure function of the position.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveInt

from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index, Ints, Rows, Whole, numbered
from data_loaders.settings import Fraction, Settings, nearest
from data_loaders.stream import (
    Floats,
    Schedule,
    Strata,
    TicketSampler,
    apportion,
    branch,
    permute,
    tickets,
)

By = Literal["label", "group", "label_and_group"]
KEEP = 2**63
"""Keys the choice of the rows that are kept, apart from all strata and cycles."""
LEAST_SHARE = 1e-9
"""A cell of less would make a cycle too long to count."""


class Mix(Settings):
    """What all samplers have whose mix never changes."""

    @abstractmethod
    def divided(self, index: Index, rows: Rows) -> Strata:
        """These rows of the data set in their strata. Raises Refusal where the data have no such strata."""

    @abstractmethod
    def weights(self, strata: Strata, index: Index) -> Floats:
        """How often each stratum is drawn, [S], up to a factor."""

    def over(self, index: Index, rows: Rows, seed: int, positions: int | None = None) -> TicketSampler:
        """The stream over these rows of the data set. `positions`, those of the whole run, change nothing."""
        strata = self.divided(index, rows)
        return TicketSampler(strata, tickets(self.weights(strata, index), len(rows)), seed)


class Divided(Mix):
    """What samplers have that treat strata of any kind alike."""

    by: By = "label"
    """What makes two rows belong to one stratum."""
    columns: tuple[str, ...] = ()
    """Group columns that count for `by`; by default all, intersected."""

    def divided(self, index: Index, rows: Rows) -> Strata:
        return _divided(index, rows, self.by, self.columns)


class Stratified(Divided):
    """Draws each stratum in proportion to (its size) ** temper; below 1, that oversamples the rare ones (Kang et al.
    2020, eq. 1)."""

    kind: Literal["stratified"] = "stratified"
    temper: float = Field(default=0.0, ge=0.0, le=1.0)
    """0 draws every stratum equally often (class-balanced), 1 as often as it occurs (natural order)."""

    def weights(self, strata: Strata, index: Index) -> Floats:
        return strata.sizes.astype(np.float64) ** self.temper


class Undersampled(Divided):
    """Draws the strata equally often, and of each only as many rows as the smallest one has. Each member of an ensemble
    keeps others: balanced bagging (EasyEnsemble, Liu et al. 2009)."""

    kind: Literal["undersampled"] = "undersampled"
    keep: PositiveInt | None = None
    """Most rows that are kept of a stratum; by default as many as the smallest has."""
    redraw: bool = False
    """Choose other rows each time that all which were chosen of a stratum have been drawn (SUBG, Idrissi et al. 2022);
    by default they are chosen once."""

    def weights(self, strata: Strata, index: Index) -> Floats:
        return np.ones(len(strata.sizes))

    def over(self, index: Index, rows: Rows, seed: int, positions: int | None = None) -> TicketSampler:
        stream = super().over(index, rows, seed)
        if self.redraw:
            return replace(stream, lap=self._most(stream.strata))
        kept = self.kept(stream.strata, seed)
        fault = Fault("data.sampler", "keeps no row of", "set data.sampler.by=label_and_group, or another keep")
        _refuse_lost(index, kept.class_sizes == 0, fault, 2)
        return replace(stream, strata=kept)

    def kept(self, strata: Strata, seed: int) -> Strata:
        """Of the rows that a walk of its own through each stratum meets first."""
        sizes = strata.sizes
        place = permute(strata.places, np.repeat(sizes, sizes), seed, KEEP, np.repeat(np.arange(len(sizes)), sizes))
        return strata.only(place < np.repeat(self._most(strata), sizes))

    def _most(self, strata: Strata) -> Ints:
        return np.minimum(strata.sizes, self.keep or strata.sizes.min())


class EffectiveNumber(Divided):
    """Draws each row with a weight of 1 / (effective number of rows of its stratum) (Cui et al. 2019)."""

    kind: Literal["effective_number"] = "effective_number"
    beta: Fraction = 0.9999
    """0 is the natural order; towards 1, every stratum is drawn equally often."""

    def weights(self, strata: Strata, index: Index) -> Floats:
        """Size / ((1 - beta ** size) / (1 - beta)), eq. 2 and 4."""
        return strata.sizes * (1 - self.beta) / (1 - self.beta**strata.sizes)


class RepeatFactor(Divided):
    """Repeats the rows of strata that are rarer than a threshold, sqrt(threshold / share) times on average (LVIS, Gupta
    et al. 2019)."""

    kind: Literal["repeat_factor"] = "repeat_factor"
    threshold: float = Field(default=0.001, gt=0.0, le=1.0)
    """Share of the rows below which a stratum is repeated."""

    def weights(self, strata: Strata, index: Index) -> Floats:
        sizes = strata.sizes.astype(np.float64)
        return sizes * np.maximum(1.0, np.sqrt(self.threshold * sizes.sum() / sizes))


class GroupConditional(Mix):
    """Draws the groups that occur in a class equally often within it, while the mix of classes stays: where all groups
    occur, they say nothing of the class (as after reweighing, Kamiran & Calders 2012, here with equal groups)."""

    kind: Literal["group_conditional"] = "group_conditional"
    columns: tuple[str, ...] = ()
    """Group columns that count; by default all, intersected."""
    temper: float = Field(default=1.0, ge=0.0, le=1.0)
    """Classes are drawn in proportion to (their size) ** temper: 1 keeps the natural mix, 0 balances them."""

    def divided(self, index: Index, rows: Rows) -> Strata:
        return _divided(index, rows, "label_and_group", self.columns)

    def weights(self, strata: Strata, index: Index) -> Floats:
        groups = np.bincount(strata.label, minlength=strata.classes)
        return (strata.class_sizes**self.temper / groups)[strata.label]


class Joint(Mix):
    """Draws each class in each group as often as is said."""

    kind: Literal["joint"] = "joint"
    columns: tuple[str, ...] = ()
    """Group columns that count; by default all, intersected."""
    shares: dict[str, dict[str, NonNegativeFloat]] = Field(min_length=1)
    """Class -> group -> its share, up to a common factor; one that is left out is never drawn. A group of several
    columns is called by its values, as in "home, phone"."""

    def divided(self, index: Index, rows: Rows) -> Strata:
        return _divided(index, rows, "label_and_group", self.columns)

    def weights(self, strata: Strata, index: Index) -> Floats:
        used = _columns(index, self.columns)
        some = strata.rows[strata.first]  # one of each stratum
        values = np.stack([index.group[column][some] for column, _ in used], 1)
        groups = [", ".join(names[v] for (_, names), v in zip(used, row, strict=True)) for row in values.tolist()]
        cells = list(zip([index.classes[k] for k in strata.label.tolist()], groups, strict=True))
        known = {", ".join(names) for names in product(*(names for _, names in used))}
        if faults := list(self._faults(index, known, set(cells))):
            raise Refusal("The sampler does not fit the data:", faults)
        return np.array([self.shares[label].get(group, 0.0) for label, group in cells])

    def _faults(self, index: Index, groups: set[str], cells: set[tuple[str, str]]) -> Iterator[Fault]:
        least = LEAST_SHARE * sum(sum(shares.values()) for shares in self.shares.values())
        for label, shares in self.shares.items():
            where = f"data.sampler.shares.{label}"
            if label not in index.classes:
                yield Fault(where, f"no class {label!r}", nearest(label, index.classes))
            for group, share in shares.items():
                if group not in groups:
                    yield Fault(f"{where}.{group}", f"no group {group!r}", nearest(group, sorted(groups)))
                elif label in index.classes and share and (label, group) not in cells:
                    fix = "set its share to 0, or add images of it"
                    yield Fault(f"{where}.{group}", f"no training row of {label!r} in {group!r}", fix)
                elif 0 < share < least:
                    yield Fault(f"{where}.{group}", f"{share} is less than {LEAST_SHARE} of all", "set it to 0")
        for label in index.classes:
            if not any(self.shares.get(label, {}).values()):
                yield Fault("data.sampler.shares", f"class {label!r} is never drawn", "give it a share")


AnyMix = Annotated[
    Stratified | Undersampled | EffectiveNumber | RepeatFactor | GroupConditional | Joint, Field(discriminator="kind")
]


class Progressive(Settings):
    """Goes from the natural mix to the balanced one, an epoch at a time (progressively balanced, Kang et al. 2020)."""

    kind: Literal["progressive"] = "progressive"
    by: Literal["label", "label_and_group"] = "label"
    """What makes two rows belong to one stratum."""
    columns: tuple[str, ...] = ()
    """Group columns that count for `by`; by default all, intersected."""

    def over(self, index: Index, rows: Rows, seed: int, positions: int | None = None) -> Schedule:
        """The stream of a run of so many positions over these rows; each epoch draws as often as there are rows. Less
        than half an epoch at the end belongs to the one before."""
        epochs = max(1, round(_known(positions, self.kind) / len(rows)))
        firsts = range(0, epochs * len(rows), len(rows))
        strata = _divided(index, rows, self.by, self.columns)
        ways = np.linspace(0, 1, len(firsts)).tolist()
        mixes = [apportion(self.weights(strata.sizes, way), len(rows)) for way in ways]
        streams = [TicketSampler(strata, mix, branch(seed, phase)) for phase, mix in enumerate(mixes)]
        return Schedule(tuple(firsts), streams)

    def weights(self, sizes: Ints, way: float) -> Floats:
        """Draws of each stratum in an epoch, [S], when so much of the way is gone: 0 in the first, 1 in the last."""
        return (1 - way) * sizes + way * sizes.mean()


class Deferred(Settings):
    """Draws one mix first and another one later (deferred re-sampling, DRS, Cao et al. 2019)."""

    kind: Literal["deferred"] = "deferred"
    first: AnyMix = Stratified(temper=1.0)
    """The mix at the beginning, by default the natural one."""
    then: AnyMix = Stratified(temper=0.0)
    """The mix at the end, by default the class-balanced one."""
    after: Fraction = 0.8
    """Share of the run that is drawn from the first mix."""

    def over(self, index: Index, rows: Rows, seed: int, positions: int | None = None) -> Schedule:
        """The stream of a run of so many positions over these rows."""
        change = int(self.after * _known(positions, self.kind))
        firsts = (0, change) if change else (0,)
        mixes = (self.first, self.then)[-len(firsts) :]
        return Schedule(firsts, [mix.over(index, rows, branch(seed, phase)) for phase, mix in enumerate(mixes)])


AnySampler = Annotated[AnyMix | Progressive | Deferred, Field(discriminator="kind")]


def _known(positions: int | None, kind: str) -> int:
    if positions is None:
        what, fix = f"{kind!r} changes over a run, and its length is not known here", "choose a mix that stays the same"
        raise Refusal("The sampler has no end:", [Fault("data.sampler.kind", what, fix)])
    return positions


def _divided(index: Index, rows: Rows, by: By, columns: tuple[str, ...]) -> Strata:
    """These rows in the strata that occur, in the order of their groups, and of their classes within.

    Raises Refusal where there is no such column, or a class has no row.
    """
    _refuse_lost(index, _sizes(index, rows) == 0, Fault("data", "no training row of", "add images of it"), 65)
    groups = _columns(index, columns) if by != "label" or columns else []
    if isinstance(rows, Whole) and (by == "label" or (by == "label_and_group" and _is_all(index, groups))):
        return _stored(index, rows, by)
    listed = np.asarray(rows)
    used = [(index.group[c], len(names)) for c, names in groups] if by != "label" else []
    used += [(index.label, len(index.classes))] if by != "group" else []
    number = numbered([(values[listed], count) for values, count in used], len(listed))
    occurs = np.bincount(number) > 0
    return Strata.of(listed, (np.cumsum(occurs) - 1)[number], index.label, len(index.classes))


def _sizes(index: Index, rows: Rows) -> Ints:
    """Rows of each class, [K]."""
    if isinstance(rows, Whole):
        return index.class_sizes(rows)
    return np.bincount(index.label[rows], minlength=len(index.classes))


def _is_all(index: Index, groups: list[tuple[int, tuple[str, ...]]]) -> bool:
    """Whether these are all group columns, in their order."""
    return [column for column, _ in groups] == list(range(len(index.group_values)))


def _stored(index: Index, rows: Whole, by: By) -> Strata:
    """The same strata as the data set has them: in memory are the strata, but none of their rows."""
    order = index.by_class if by == "label" else index.by_cell
    of, k = order.of(rows.split), len(index.classes)
    first, sizes, label = order.first[of], order.sizes[of], order.label[of]
    turn = np.lexsort((label, *order.groups[of].T[::-1]))  # by the first group column, and by class at last
    return Strata(order.rows, first[turn], sizes[turn], label[turn], True, index.label, k)


def _columns(index: Index, columns: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Number and values of these group columns, or of all."""
    names = list(index.group_values)
    faults = [
        Fault("data.sampler.columns", f"no group column {c!r}", f"there are: {', '.join(names) or 'none'}")
        for c in columns
        if c not in names
    ]
    if not names:
        faults.append(Fault("data.sampler", "groups need a group column", "ingest with group_columns=…"))
    if faults:
        raise Refusal("The sampler does not fit the data:", faults)
    return [(names.index(c), index.group_values[c]) for c in columns or names]


def _refuse_lost(index: Index, lost: NDArray[np.bool_], fault: Fault, exit_code: int) -> None:
    """Raises Refusal with this fault for each class that is lost, [K]."""
    if lost.any():
        names = [index.classes[k] for k in np.flatnonzero(lost)]
        faults = [fault._replace(what=f"{fault.what} {name!r}") for name in names]
        raise Refusal("A class cannot be learned:", faults, exit_code)
