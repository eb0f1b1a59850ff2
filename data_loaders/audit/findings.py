"""What an audit tells from chance, as findings.

Imbalance, near copies, selection, coverage, missing values and properties are a family of tests each, adjusted within
itself; each tells something of data without bias in at most LEVEL of cases, so all of them in at most 6 of 100. What is
counted, such as exact copies, needs no test.
"""

import math
from collections.abc import Iterator

from scipy.stats import binom

from data_loaders.audit.audit import Audit, Shown
from data_loaders.audit.coverage import Coverage, wilson
from data_loaders.audit.finding import Finding
from data_loaders.audit.missing import Missingness

RATIO = 2.0
"""Imbalance that is told as a finding."""
LEVEL = 0.01
"""A finding has an adjusted p value of at most this."""
SMALL_CONTRAST, SMALL_SKILL = 0.06, 0.05
"""Less is not told, however sure it is, since no two classes of a large data set are quite alike: an effect is called
small from 0.56 on (Vargha and Delaney 2000)."""
NAN = math.nan


def findings(a: Audit) -> Iterator[Finding]:
    """What is told from chance, the hardest to explain away first."""
    yield from _imbalance(a)
    yield from _leakage(a)
    if sets := a.duplicates.across_labels:
        text = f"{sets:,} sets of copies stand under several labels"
        yield Finding("label noise", "copies", text, sets, NAN, NAN, NAN, a.duplicates.rows)
    yield from _selection(a)
    if a.coverage:
        yield from _coverage(a.coverage)
    if a.missing:
        yield from _missing(a.missing)
    told = [s for s in a.properties if stands_out(s)]
    yield from map(_property, sorted(told, key=lambda s: (s.property.of_object, -_strength(s))))


def beyond_chance(found: int, mirrored: int) -> bool:
    """Whether more rows are near training images than near mirrored ones: by chance, either is as likely."""
    return bool(binom.sf(found - 1, found + mirrored, 0.5) <= LEVEL)


def stands_out(s: Shown) -> bool:
    return _ranked(s) or _guessed(s)


def _ranked(s: Shown) -> bool:
    return s.contrast.adjusted <= LEVEL and abs(s.contrast.above - 0.5) >= SMALL_CONTRAST


def _guessed(s: Shown) -> bool:
    return s.skill.adjusted <= LEVEL and s.skill.value >= SMALL_SKILL


def _strength(s: Shown) -> float:
    return max(abs(s.contrast.above - 0.5), s.skill.value)


def _imbalance(a: Audit) -> Iterator[Finding]:
    by_size = sorted(a.classes.counts, key=lambda c: c.rows[a.train])
    n = sum(c.rows[a.train] for c in by_size)
    if absent := [c.name for c in by_size if not c.rows[a.train]]:
        text = f"{a.train} has no row of {', '.join(absent)}"
        yield Finding("class imbalance", ", ".join(absent), text, 0, NAN, NAN, NAN, n)
    ratio, chance = a.classes.imbalance, a.classes.by_chance
    if ratio >= RATIO and not ratio <= chance:
        few, many = (f"{c.name} ({c.rows[a.train]:,})" for c in (by_size[0], by_size[-1]))
        text = f"{a.train} has {ratio:.1f} times as many rows of {many} as of {few}"
        yield Finding("class imbalance", by_size[0].name, text, ratio, NAN, NAN, chance, n)


def _leakage(a: Audit) -> Iterator[Finding]:
    sizes = {split: sum(c.rows[split] for c in a.classes.counts) for split in a.duplicates.leaked}

    def leak(split: str, rows: int, n: int, text: str) -> Finding:
        return Finding("leakage", split, text, rows / n, *wilson(rows, n), NAN, n)

    for split, rows in a.duplicates.leaked.items():
        if rows:
            yield leak(split, rows, sizes[split], f"{rows:,} rows of {split} are copies of images of {a.train}")
    near, chance = a.duplicates.near, a.duplicates.near.by_chance
    for split, rows in near.leaked.items():
        if rows and beyond_chance(sum(near.leaked.values()), chance):
            text = f"{rows:,} more rows of {split} are near copies of images of {a.train}"
            yield leak(split, rows, sizes[split], text + f", {chance:,} of all such by chance" * bool(chance))
    for kind in (kind for kind in a.units if kind.asked):
        for split, rows in kind.leaked.items():
            if rows:
                n = kind.rows[split]
                text = f"{rows:,} of {n:,} rows of {split} have a unit that {a.train} has, by {kind.name}"
                yield leak(split, rows, n, text)


def _selection(a: Audit) -> Iterator[Finding]:
    for g in a.groups:
        if g.split == a.train and g.adjusted <= LEVEL:
            t = g.association
            chance = f"by chance below {t.by_chance:.2f}, p = {t.p:.2g}, n = {t.n:,}"
            most = f"{g.group} has {g.share:.0%} of {g.label} and {g.others:.0%} of the others"
            text = f"{g.grouping} goes with the label: V = {t.v:.2f} ({chance}); most of all, {most}"
            yield Finding("selection", g.grouping, text, t.v, NAN, NAN, t.by_chance, t.n)


def _coverage(c: Coverage) -> Iterator[Finding]:
    if c.p <= LEVEL:
        names, least = " x ".join(c.attributes), c.cells[0]
        chance = f"by chance below {c.by_chance:.1%}, p = {c.p:.2g}, n = {c.n:,}"
        ratio = f"{least.ratio:.2f} [{least.low:.2f}, {least.high:.2f}] of its share of the population"
        more = "" if least.needed is None else f", and needs {least.needed:,} more images"
        most = f"least covered, {', '.join(least.values)} has {ratio}{more}"
        text = f"{c.distance:.1%} of the rows are of another {names} than in the population ({chance}); {most}"
        yield Finding("selection", names, text, c.distance, NAN, NAN, c.by_chance, c.n)


def _missing(m: Missingness) -> Iterator[Finding]:
    for pair in m.pairs:
        if pair.adjusted <= LEVEL:
            t = pair.association
            chance = f"V = {t.v:.2f}, by chance below {t.by_chance:.2f}, p = {t.p:.2g}, n = {t.n:,}"
            most = f"it is of {pair.share:.1%} of {pair.value} and of {pair.others:.1%} of the others"
            text = f"whether {pair.column} is missing goes with {pair.against} ({chance}): {most}"
            yield Finding("selection", pair.column, text, t.v, NAN, NAN, t.by_chance, t.n)


def _property(s: Shown) -> Finding:
    c, bias, name = s.contrast, s.property.bias, s.property.name
    why = "; it may be the objects themselves" if s.property.of_object else ""
    if _ranked(s):
        chance = f"by chance {c.low:.0%} to {c.high:.0%}, p = {c.p:.2g}, n = {c.n:,}"
        more = f"it is higher than in {c.above:.0%} of the other images of its groups"
        text = f"{name} sets {s.label} apart: {more} ({chance}){why}"
        return Finding(bias, name, text, c.above, NAN, NAN, c.high if c.above > 0.5 else c.low, c.n)
    k = s.skill
    chance = f"by chance below {k.by_chance:.2f}, p = {k.p:.2g}, n = {k.n:,}"
    text = f"{name} alone tells the classes, {k.value:.2f} of the way from chance to certainty ({chance}){why}"
    return Finding(bias, name, text, k.value, NAN, NAN, k.by_chance, k.n)
