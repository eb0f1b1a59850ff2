"""An audit in words, in short tables for the terminal, and as JSON."""

import math
from collections.abc import Iterator
from typing import Any

from data_loaders.audit.audit import Audit, Group, Shown
from data_loaders.audit.coverage import Coverage, Covered
from data_loaders.audit.duplicates import Near
from data_loaders.audit.findings import findings
from data_loaders.audit.missing import Missing, Missingness
from data_loaders.audit.units import Divided
from data_loaders.look import LOOKS_ALIKE

ENDS = 10
"""Classes that are shown from either end of a long list."""
TOLD = 3
"""Properties that are shown for each group column."""
GROUP_HEAD = ("split", "group", "V", "by chance <", "nats", "by chance <", "of the most", "adjusted p", "n")
PROPERTY_HEAD = ("above others", "by chance", "adjusted p", "n", "skill", "by chance <", "adjusted p")


def summary(a: Audit) -> str:
    """Short tables for the terminal, the largest class first, and what they say in words."""
    splits = list(a.classes.counts[0].rows)
    by_size = sorted(a.classes.counts, key=lambda c: -c.rows[a.train])
    ends = by_size if len(by_size) <= 2 * ENDS else [*by_size[:ENDS], *by_size[-ENDS:]]
    classes = [(c.name, *(f"{c.rows[s]:,}" for s in splits), f"{c.effective:,.0f}") for c in ends]
    which = "all" if a.at_most is None else f"{a.measured:,}, at most {a.at_most:,} of a class,"
    d = a.duplicates
    lines = [
        aligned(("class", *splits, f"effective in {a.train}"), classes),
        f"{len(by_size):,} classes, imbalance {number(a.classes.imbalance, 1)}, as even as {a.classes.effective:.1f} "
        "classes of equal size",
        "",
        *([aligned(GROUP_HEAD, [_group(line) for line in a.groups]), ""] if a.groups else []),
        *([*_coverage(a.coverage), ""] if a.coverage else []),
        *([*_missing(a.missing), ""] if a.missing and a.missing.rows else []),
        *map(_units, a.units),
        f"copies: {d.rows:,} rows in {d.sets:,} sets, {d.across_splits:,} of them across splits, "
        f"{d.across_labels:,} across labels",
        f"near copies: {near(d.near)}",
        "",
        f"properties of images against the label, within groups, over {which} rows of {a.train}:",
        aligned(("property", "class", *PROPERTY_HEAD), [_property(line) for line in a.properties if line.label]),
        *(line for of in a.of_groups for line in _of_group(of.column, of.properties)),
        "",
        *(f"- {finding.text}" for finding in findings(a)),
    ]
    return "\n".join(lines)


def _group(g: Group) -> tuple[str, ...]:
    t = g.association
    nats = number(t.information, 3), number(t.information_by_chance, 3), number(t.told)
    return g.split, g.grouping, number(t.v), number(t.by_chance), *nats, number(g.adjusted, 4), f"{t.n:,}"


def _property(s: Shown) -> tuple[str, ...]:
    c, k = s.contrast, s.skill
    ranked = number(c.above), f"{number(c.low)} to {number(c.high)}", number(c.adjusted, 4), f"{c.n:,}"
    return s.property.name, s.label, *ranked, number(k.value), number(k.by_chance), number(k.adjusted, 4)


def _of_group(column: str, properties: list[Shown]) -> Iterator[str]:
    lines = sorted((s for s in properties if s.label), key=lambda s: -s.skill.value)[:TOLD]
    if lines:
        yield f"\nwhat tells {column} best, within classes:"
        yield aligned(("property", column, *PROPERTY_HEAD), [_property(line) for line in lines])


def _coverage(c: Coverage) -> Iterator[str]:
    chance = f"by chance < {c.by_chance:.1%}, p = {c.p:.2g}"
    yield f"{c.distance:.1%} of {c.n:,} rows are of another cell than in the population ({chance}):"
    ends = c.cells if len(c.cells) <= 2 * ENDS else [*c.cells[:ENDS], *c.cells[-ENDS:]]
    head = " x ".join(c.attributes), "share / reference", "95 %", "reference", "images needed", "n"
    yield aligned(head, [_cell(cell) for cell in ends])


def _cell(c: Covered) -> tuple[str, ...]:
    needed = "–" if c.needed is None else f"{c.needed:,}"
    interval = f"{number(c.low)} to {number(c.high)}"
    return ", ".join(c.values), number(c.ratio), interval, f"{c.reference:.2%}", needed, f"{c.n:,}"


def _missing(m: Missingness) -> Iterator[str]:
    told = ", ".join(f"{column} of {rows:,}" for column, rows in m.rows.items())
    yield f"missing group values, of {m.n:,} rows: {told}"
    for pattern in m.patterns:
        yield f"  {' and '.join(pattern.columns)} of {pattern.rows:,}"
    head = "missing", "against", "V", "by chance <", "adjusted p", "n", "share missing"
    yield aligned(head, [_pair(pair) for pair in m.pairs])


def _pair(p: Missing) -> tuple[str, ...]:
    t, shares = p.association, f"{p.value}: {number(p.share)}, others {number(p.others)}"
    return p.column, p.against, number(t.v), number(t.by_chance), number(p.adjusted, 4), f"{t.n:,}", shares


def _units(d: Divided) -> str:
    why = "" if d.asked else " looks like a column of units;"
    leaked = ", ".join(f"{n:,} of {d.rows[split]:,} rows of {split}" for split, n in d.leaked.items())
    return (
        f"{d.name}:{why} {d.divided:,} of {d.units:,} units stand in several splits, those of {leaked} in training too"
    )


def near(n: Near) -> str:
    """What was found of near copies, and what was not looked at."""
    if n.bits < 0 and n.left_out:
        return "not looked for, since too many rows look the same"
    if n.bits < 0:
        return f"not looked for, since no row has a look ({n.unknown:,} are flat, or were ingested with check=header)"
    left = [f"{n.unknown:,} rows that have no look (flat, or ingested with check=header)"] * bool(n.unknown)
    left += [f"{n.left_out:,} of very many that look the same"] * bool(n.left_out)
    left += [f"pairs that differ in more than {n.bits} of 64 bits, being too many"] * (n.bits < LOOKS_ALIKE)
    rows = f"{sum(n.leaked.values()):,} rows with the training split, and {n.by_chance:,} with its mirrored images"
    return f"{n.pairs:,} pairs across splits ({rows})" + f"; not compared: {', '.join(left)}" * bool(left)


def to_json(a: Audit) -> dict[str, Any]:
    return {**plain(a), "findings": plain(list(findings(a)))}


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
