"""Error slices: which images the model gets wrong more often than others of the same class, in words.

Slices are looked for in one half of the rows and tested in the other, so that looking at thousands of them makes none
stand out. A slice is one condition, or two at once, on properties of images, group columns and the class. Its rows are
compared with the other rows of the same classes: a property that only marks a hard class is no slice.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_loaders.audit.finding import Finding
from data_loaders.audit.properties import PROPERTIES, measure
from data_loaders.audit.reading import of_images
from data_loaders.audit.summary import aligned
from data_loaders.index import Index
from trainer.metrics.intervals import LEVEL as INTERVAL
from trainer.metrics.intervals import Floats, benjamini_hochberg, wilson
from trainer.metrics.tally import Ints
from trainer.probe.paired import Number

CUTS = np.arange(1, 8) / 8
"""Quantiles of a property, below or above which a condition may lie."""
LEAST = 20
"""Rows of a slice, in either half, and of others that it is compared with."""
MOST_CONDITIONS = 500
"""Conditions that are combined; those of most rows."""
LOOKED_AT = 10_000
"""Slices of highest score that are looked through, for those that are not alike."""
TESTED = 10
"""Slices that the second half is asked about."""
LEVEL = 0.05
"""Share of the slices told that are false, on average."""
NOTABLE = 0.05
"""Excess of wrong decisions above which all of the interval of a slice that is told must lie."""
SIMPLER = 0.9
"""A condition alone is preferred to two if it has this part of their score."""
ALIKE = 0.5
"""Two slices that share more of their rows (Jaccard) are one."""
SEED = 4


class Condition(NamedTuple):
    """On one attribute."""

    text: str
    """Such as `brightness > 120`, `venue = street` or `class = food`."""
    holds: np.ndarray
    """Of each row, bool [N]."""


class Slice(NamedTuple):
    """Rows in which decisions are wrong more often, by the half of the rows that it was not found in."""

    text: str
    """Its conditions."""
    wrong: Number
    """Share of its decisions that are wrong; this interval and the next two are those of Newcombe (1998), at a level
    that allows for the choice of the slices that are told (Benjamini & Yekutieli 2005)."""
    others: Number
    """The same of other rows, of the same classes in the same shares."""
    excess: Number
    """The difference."""
    p: float
    """That as many are wrong by chance: exact, one-sided, given the class of each row (Birch 1964)."""
    adjusted: float
    """p, adjusted for the slices tested (Benjamini & Hochberg 1995)."""


def of_rows(index: Index, rows: Ints, decided: Ints, seed: int = SEED) -> list[Slice]:
    """Of decisions [N] about rows [N], by what the audit measures of their images, by group column and by class."""
    labels = index.labels[rows]
    values = np.array(of_images(index, rows, measure, "measure")).reshape(len(rows), -1)
    found = half(index.unit[rows], seed)
    conditions = [
        *(c for p, v in zip(PROPERTIES, values.T, strict=True) for c in of_property(p.name, v, found)),
        *(c for a, (name, of) in enumerate(index.group_values.items()) for c in equal(name, index.groups[rows, a], of)),
        *equal("class", labels, index.classes),
    ]
    return slices(conditions, decided != labels, labels, found)


def half(units: np.ndarray, seed: int = SEED) -> np.ndarray:
    """Which rows slices are looked for in, bool [N]: half of them at random, those of one unit, if not 0, together."""
    unit = np.unique(units, return_inverse=True)[1]
    unit = np.unique(np.where(units == 0, len(units) + np.arange(len(units)), unit), return_inverse=True)[1]
    several = int(unit.max(initial=-1)) + 1
    random = np.random.Generator(np.random.Philox(key=[seed, len(units)]))
    return (random.permutation(several) < several / 2)[unit]


def of_property(name: str, values: Floats, found: np.ndarray) -> Iterator[Condition]:
    """Above or not above each of the CUTS of the rows that slices are found in; NaN is neither."""
    known = values[found & ~np.isnan(values)]
    for cut in np.unique(np.quantile(known, CUTS)) if len(known) else ():
        yield Condition(f"{name} > {cut:.3g}", values > cut)
        yield Condition(f"{name} <= {cut:.3g}", values <= cut)


def equal(name: str, codes: Ints, values: tuple[str, ...]) -> Iterator[Condition]:
    """One for each value that occurs."""
    for code in np.unique(codes).tolist():
        yield Condition(f"{name} = {values[code]}", codes == code)


def slices(conditions: list[Condition], wrong: np.ndarray, labels: Ints, found: np.ndarray) -> list[Slice]:
    """Of decisions that are wrong or not, bool [N], about rows of these labels [N]: looked for where `found`, bool [N],
    and tested in the others; the least p first."""
    holds = np.array([c.holds for c in conditions], bool).reshape(len(conditions), len(labels))
    pairs = _candidates(holds[:, found], wrong[found], labels[found])
    tables = [_strata(holds[i] & holds[j], wrong, labels, ~found) for i, j in pairs]
    kept = [n for n, table in enumerate(tables) if table[:, :2].sum() >= LEAST and table[:, 2:].sum() >= LEAST]
    p = np.array([_exact(tables[n]) for n in kept])
    adjusted = benjamini_hochberg(p)
    level = 1 - (1 - INTERVAL) * max((adjusted <= LEVEL).sum(), 1) / max(len(kept), 1)
    told = []
    for n, own, all_tested in zip(kept, p.tolist(), adjusted.tolist(), strict=True):
        text = " and ".join(dict.fromkeys(conditions[i].text for i in pairs[n]))
        told.append(Slice(text, *_compared(tables[n], level), own, all_tested))
    return sorted(told, key=lambda s: s.p)


def findings(found: list[Slice]) -> Iterator[Finding]:
    """The slices that stand out by more than chance and by more than a little."""
    for s in found:
        if s.adjusted <= LEVEL and s.excess.low > NOTABLE:
            text = (
                f"where {s.text}, {s.wrong.value:.0%} of the decisions are wrong, n = {s.wrong.n:,}: "
                f"{100 * s.excess.value:+.0f} [{100 * s.excess.low:+.0f}, {100 * s.excess.high:+.0f}] points to other "
                f"images of the same classes, p = {s.adjusted:.2g} among the slices tested"
            )
            yield Finding("feature", s.text, text, *s.excess[:3], np.nan, s.wrong.n)


def summary(found: list[Slice]) -> str:
    """A short table for the terminal."""
    lines = [
        (s.text, str(s.wrong), str(s.others), s.excess.signed(), f"{s.adjusted:.2g}", f"{s.wrong.n:,}") for s in found
    ]
    return aligned(("slice", "wrong", "others of its classes", "excess", "adjusted p", "n"), lines)


def _candidates(holds: np.ndarray, wrong: np.ndarray, labels: Ints) -> list[tuple[int, int]]:
    """Conditions, one or two, of rows [M, N] that stand out most from their classes, none much the same as another."""
    n = holds.sum(1)
    usable = np.flatnonzero((n >= LEAST) & (n <= holds.shape[1] - LEAST))
    usable = np.sort(usable[np.argsort(-n[usable], kind="stable")][:MOST_CONDITIONS])
    mean = (np.bincount(labels, wrong) / np.maximum(np.bincount(labels), 1))[labels]
    inside = holds[usable].astype(np.float64)
    rows, above, spread = (inside * weight @ inside.T for weight in (1.0, wrong - mean, mean * (1 - mean)))
    score = np.divide(above, np.sqrt(spread), out=np.zeros(above.shape), where=(spread > 0) & (rows >= LEAST))
    chosen: list[tuple[int, int]] = []
    for place in np.argsort(-np.triu(score), axis=None, kind="stable")[:LOOKED_AT].tolist():
        i, j = divmod(place, len(usable))
        if score[i, j] <= 0 or len(chosen) == TESTED:
            break
        alone = i if score[i, i] >= score[j, j] else j
        i, j = (alone, alone) if score[alone, alone] >= SIMPLER * score[i, j] else (i, j)
        pair = int(usable[i]), int(usable[j])
        if not any(_alike(holds, pair, other) for other in chosen):
            chosen.append(pair)
    return chosen


def _alike(holds: np.ndarray, one: tuple[int, int], other: tuple[int, int]) -> bool:
    a, b = (holds[i] & holds[j] for i, j in (one, other))
    return bool((a & b).sum() > ALIKE * (a | b).sum())


def _strata(inside: np.ndarray, wrong: np.ndarray, labels: Ints, tested: np.ndarray) -> Ints:
    """[K', 4] right and wrong inside, right and wrong outside, of each class that has tested rows in and out."""
    column = 2 * ~inside[tested] + wrong[tested]
    counts = np.bincount(4 * labels[tested] + column, minlength=4 * (labels.max(initial=0) + 1)).reshape(-1, 4)
    return counts[(counts[:, :2].sum(1) > 0) & (counts[:, 2:].sum(1) > 0)]


def _exact(table: Ints) -> float:
    """That chance puts as many wrong ones inside: a sum of hypergeometric counts, one for each stratum [K', 4]."""
    from scipy.stats import hypergeom

    law, least = np.ones(1), 0
    for right_in, wrong_in, right_out, wrong_out in table.tolist():
        n, inside, wrong = right_in + wrong_in + right_out + wrong_out, right_in + wrong_in, wrong_in + wrong_out
        counts = np.arange(max(0, inside + wrong - n), min(inside, wrong) + 1)
        law, least = np.convolve(law, hypergeom.pmf(counts, n, wrong, inside)), least + int(counts[0])
    return float(min(law[int(table[:, 1].sum()) - least :].sum(), 1.0))


def _compared(table: Ints, level: float) -> tuple[Number, Number, Number]:
    """Wrong ones inside, outside and the difference, of strata [K', 4]; those outside as if of the classes inside."""
    inside, outside = table[:, :2].sum(1), table[:, 2:].sum(1)
    share = inside / inside.sum()
    worth = 1 / (share**2 / outside).sum()  # rows of one stratum that would settle the mean of all as well (Kish 1965)
    ours, theirs = table[:, 1].sum() / inside.sum(), float(share @ (table[:, 3] / outside))
    (low, high), (low_out, high_out) = (
        wilson(np.array(r * n), np.array(n), level) for r, n in ((ours, inside.sum()), (theirs, worth))
    )
    gap, below, above = ours - theirs, np.hypot(ours - low, high_out - theirs), np.hypot(high - ours, theirs - low_out)
    return (
        Number(float(ours), float(low), float(high), int(inside.sum())),
        Number(theirs, float(low_out), float(high_out), int(outside.sum())),
        Number(float(gap), float(gap - below), float(gap + above), int(inside.sum())),
    )
