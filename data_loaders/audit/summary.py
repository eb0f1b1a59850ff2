"""An audit in words, in short tables for the terminal, and as JSON."""

import math
from collections.abc import Iterator
from typing import Any

from data_loaders.audit.audit import Audit
from data_loaders.audit.duplicates import Near
from data_loaders.look import LOOKS_ALIKE

RATIO = 2.0
"""Imbalance that is told as a finding."""
LEVEL = 0.01
"""A finding has an adjusted p value of at most this."""
ENDS = 10
"""Classes that are shown from either end of a long list."""


def findings(a: Audit) -> Iterator[str]:
    """What is told from chance, in words, the hardest to explain away first."""
    by_size = sorted(a.classes.counts, key=lambda c: c.rows[a.train])
    if math.isnan(a.classes.imbalance):
        yield f"{a.train} has no row of {', '.join(c.name for c in by_size if not c.rows[a.train])}"
    if a.classes.imbalance >= RATIO:
        few, many = (f"{c.name} ({c.rows[a.train]:,})" for c in (by_size[0], by_size[-1]))
        yield f"{a.train} has {a.classes.imbalance:.1f} times as many rows of {many} as of {few}"
    for split, rows in a.duplicates.leaked.items():
        if rows:
            yield f"{rows:,} rows of {split} are copies of images of {a.train}"
    for split, rows in a.duplicates.near.leaked.items():
        if rows:
            yield f"{rows:,} more rows of {split} are near copies of images of {a.train}"
    if a.duplicates.across_labels:
        yield f"{a.duplicates.across_labels:,} sets of copies stand under several labels"
    for g in a.groups:
        if g.split == a.train and g.adjusted <= LEVEL:
            told = g.association
            chance = f"by chance below {told.by_chance:.2f}, p = {told.p:.2g}, n = {told.n:,}"
            most = f"{g.group} has {g.share:.0%} of {g.label} and {g.others:.0%} of the others"
            yield f"{g.grouping} goes with the label: V = {told.v:.2f} ({chance}); most of all, {most}"
    told = [shown for shown in a.properties if shown.adjusted <= LEVEL]
    for s in sorted(told, key=lambda s: (s.property.of_object, -abs(s.contrast.above - 0.5))):
        c, why = s.contrast, "; it may be the objects themselves" if s.property.of_object else ""
        chance = f"by chance {c.low:.0%} to {c.high:.0%}, p = {c.p:.2g}, n = {c.n:,}"
        more = f"it is higher than in {c.above:.0%} of the other images of its groups"
        yield f"{s.property.name} sets {s.label} apart: {more} ({chance}){why}"


def summary(a: Audit) -> str:
    """Short tables for the terminal, the largest class first, and what they say in words."""
    splits = list(a.classes.counts[0].rows)
    by_size = sorted(a.classes.counts, key=lambda c: -c.rows[a.train])
    ends = by_size if len(by_size) <= 2 * ENDS else [*by_size[:ENDS], *by_size[-ENDS:]]
    classes = [(c.name, *(f"{c.rows[s]:,}" for s in splits), f"{c.effective:,.0f}") for c in ends]
    grouped = [
        (g.split, g.grouping, number(t.v), number(t.by_chance), number(t.p, 4), number(g.adjusted, 4), f"{t.n:,}")
        for g in a.groups
        for t in [g.association]
    ]
    shown = [
        (s.property.name, s.label, number(c.above), chance, number(c.p, 4), number(s.adjusted, 4), f"{c.n:,}")
        for s in a.properties
        for c in [s.contrast]
        for chance in [f"{number(c.low)} to {number(c.high)}"]
        if s.label
    ]
    which = "all" if a.at_most is None else f"{a.measured:,}, at most {a.at_most:,} of a class,"
    d = a.duplicates
    lines = [
        aligned(("class", *splits, f"effective in {a.train}"), classes),
        f"{len(by_size):,} classes, imbalance {number(a.classes.imbalance, 1)}, as even as {a.classes.effective:.1f} "
        "classes of equal size",
        "",
        *([aligned(("split", "group", "V", "by chance <", "p", "adjusted", "n"), grouped), ""] if grouped else []),
        f"copies: {d.rows:,} rows in {d.sets:,} sets, {d.across_splits:,} of them across splits, "
        f"{d.across_labels:,} across labels",
        f"near copies: {near(d.near)}",
        "",
        f"properties of images against the label, within groups, over {which} rows of {a.train}:",
        aligned(("property", "class", "above others", "by chance", "p", "adjusted", "n"), shown),
        "",
        *(f"- {finding}" for finding in findings(a)),
    ]
    return "\n".join(lines)


def near(n: Near) -> str:
    """What was found of near copies, and what was not looked at."""
    if n.bits < 0 and n.left_out:
        return "not looked for, since too many rows look the same"
    if n.bits < 0:
        return f"not looked for, since no row has a look ({n.unknown:,} are flat, or were ingested with check=header)"
    left = [f"{n.unknown:,} rows that have no look (flat, or ingested with check=header)"] * bool(n.unknown)
    left += [f"{n.left_out:,} of very many that look the same"] * bool(n.left_out)
    left += [f"pairs that differ in more than {n.bits} of 64 bits, being too many"] * (n.bits < LOOKS_ALIKE)
    return f"{n.pairs:,} pairs across splits" + f"; not compared: {', '.join(left)}" * bool(left)


def to_json(a: Audit) -> dict[str, Any]:
    return {**plain(a), "findings": list(findings(a))}


def plain(tree: Any) -> Any:
    """Named tuples, lists and numbers as JSON has them: NaN is null."""
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        return {name: plain(value) for name, value in tree._asdict().items()}  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def aligned(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A table in plain text."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    )


def number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
