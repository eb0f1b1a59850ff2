"""What each remedy did, class by class and group by group, harm included: runs against a first one, on the same images.

A remedy is what a run was given that the first was not, and the way of deciding counts as one. Each image is seen by
both sides, so every interval is paired; a remedy may help on average and harm a cell, as crops and penalties do
(Balestriero, Bottou, LeCun 2022).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet
from scipy.stats import binom, t

from data_loaders.audit.summary import aligned
from data_loaders.faults import Fault, Refusal
from data_loaders.settings import flat, parse
from trainer.config import Config
from trainer.decision.ledger import log_softmax
from trainer.metrics.groups import GroupValues, groupings
from trainer.metrics.intervals import Floats, benjamini_hochberg
from trainer.metrics.tally import Ints
from trainer.probe.paired import LEAST, Number, changes, mean
from trainer.report.page import EvaluatedRun, read_run

LEVEL = 0.05
"""Of false verdicts among those that are told of a remedy."""
SHOWN = 12
IGNORED = ("name", "folder", "tracking", "cluster", "data.path", "data.generation")
Verdict = Literal["helps", "harms", "helps and harms", "not settled", "too few"]


class Effect(NamedTuple):
    """On a class, on a group, on a class in a group, or on all."""

    grouping: str
    group: str
    name: str
    """Class; empty for all classes."""
    recall: Number
    """Change of the recall; for all classes, of the accuracy."""
    p_recall: float
    """Of no change (McNemar's test, exact), adjusted over the cells of the remedy (Benjamini & Hochberg 1995)."""
    nll: Number
    """Change of the mean NLL, in nats."""
    p_nll: float
    """Of no change (Student's test), likewise adjusted."""
    verdict: Verdict


class Remedy(NamedTuple):
    """One run and way of deciding against the first."""

    split: str
    before: str
    after: str
    changed: list[str]
    """Settings that differ: `data.sampler.temper: 1.0 -> 0.0`."""
    effects: list[Effect]


class Side(NamedTuple):
    """A run under one view, on N images."""

    run: str
    view: str
    settings: dict[str, Any]
    """Path -> value."""
    right: np.ndarray
    """[N]"""
    nll: Floats
    """[N], nats."""

    @property
    def title(self) -> str:
        return f"{self.run}, {self.view}"


class Images(NamedTuple):
    """The N images that all sides have seen."""

    ids: list[str]
    labels: Ints
    cells: Ints
    classes: tuple[str, ...]
    groups: GroupValues


def remedies(folders: Sequence[Path], split: str) -> list[Remedy]:
    """Every run, and every way of deciding, against a bare argmax of the first; refuses runs that saw other images."""
    runs = [read_run(folder) for folder in folders]
    absent = [folder for folder, run in zip(folders, runs, strict=True) if split not in {s.split for s in run.subjects}]
    if absent:
        faults = [
            Fault(str(f), f"was not evaluated on {split}", f"jobs.evaluate run={f} splits=[{split}]") for f in absent
        ]
        raise Refusal("The runs cannot be compared:", faults, 65)
    read = [_read(folder, run, split) for folder, run in zip(folders, runs, strict=True)]
    images = read[0][0]
    others = [folder for folder, (seen, _) in zip(folders, read, strict=True) if not _same(seen, images)]
    if others:
        faults = [Fault(str(f), f"saw other images in {split}", "evaluate it on the same data set") for f in others]
        raise Refusal("The runs cannot be compared:", faults, 65)
    sides = [side for _, of_run in read for side in of_run]
    return [_remedy(split, sides[0], side, images) for side in sides[1:]]


def common(folders: Sequence[Path]) -> list[str]:
    """Splits on which all runs saw the same images, but for the split that the first was trained on."""
    runs = [read_run(folder) for folder in folders]
    splits = [s.split for s in runs[0].subjects if s.view == "argmax" and s.split != runs[0].train]
    everywhere = [split for split in splits if all(split in {s.split for s in run.subjects} for run in runs)]
    found = []
    for split in everywhere:
        first, *others = (_read(folder, run, split)[0] for folder, run in zip(folders, runs, strict=True))
        found += [split] * all(_same(first, other) for other in others)
    return found


def effects(before: Side, after: Side, images: Images) -> list[Effect]:
    """Of all, by each grouping and class; verdicts hold for all cells of LEAST images at once."""
    found = [line for grouping in _cells(images) for line in _effects(before, after, *grouping)]
    enough = np.array([e.recall.n >= LEAST for e in found])
    p = np.array([[e.p_recall, e.p_nll] for e in found])
    p[~enough] = np.nan
    p = benjamini_hochberg(p.ravel()).reshape(p.shape)
    return [
        e._replace(p_recall=float(a), p_nll=float(b), verdict=_verdict(e, float(a), float(b)) if told else "too few")
        for e, (a, b), told in zip(found, p, enough, strict=True)
    ]


def _effects(before: Side, after: Side, grouping: str, names: list[tuple[str, str]], cell: Ints) -> Iterator[Effect]:
    recalls = changes(before.right, after.right, cell, len(names))
    nlls = mean(after.nll - before.nll, cell, len(names))
    gained, lost = (
        np.bincount(cell[hits], minlength=len(names))
        for hits in (after.right & ~before.right, before.right & ~after.right)
    )
    p = np.minimum(2 * binom.cdf(np.minimum(gained, lost), gained + lost, 0.5), 1)
    for (group, name), recall, chance, nll in zip(names, recalls, p.tolist(), nlls, strict=True):
        if recall.n:
            yield Effect(grouping, group, name, recall, chance, nll, _p_of_mean(nll), "not settled")


def _p_of_mean(number: Number) -> float:
    """Two-sided, of a mean of 0, from its Student's interval."""
    if number.n < 2:
        return np.nan
    half = number.high - number.value
    statistic = abs(number.value) / half * t.ppf(0.975, number.n - 1) if half > 0 else (np.inf if number.value else 0.0)
    return float(2 * t.sf(statistic, number.n - 1))


def _verdict(e: Effect, p_recall: float, p_nll: float) -> Verdict:
    good = (p_recall <= LEVEL and e.recall.value > 0) or (p_nll <= LEVEL and e.nll.value < 0)
    bad = (p_recall <= LEVEL and e.recall.value < 0) or (p_nll <= LEVEL and e.nll.value > 0)
    return "helps and harms" if good and bad else "helps" if good else "harms" if bad else "not settled"


def _cells(images: Images) -> Iterator[tuple[str, list[tuple[str, str]], Ints]]:
    """Grouping, group and class of each cell, and the cell of each image [N]: without and with the class."""
    k = len(images.classes)
    for grouping in groupings(images.groups):
        group = grouping.cells[images.cells]
        yield grouping.name, [(name, "") for name in grouping.groups], group
        names = [(name, label) for name in grouping.groups for label in images.classes]
        yield grouping.name, names, group * k + images.labels


def _remedy(split: str, before: Side, after: Side, images: Images) -> Remedy:
    paths = sorted({*before.settings, *after.settings})
    differ = [p for p in paths if before.settings.get(p) != after.settings.get(p)]
    changed = [f"{p}: {before.settings.get(p, '–')} -> {after.settings.get(p, '–')}" for p in differ]
    if before.view != after.view:
        changed.append(f"decision: {before.view} -> {after.view}")
    return Remedy(split, before.title, after.title, changed, effects(before, after, images))


def _read(folder: Path, run: EvaluatedRun, split: str) -> tuple[Images, list[Side]]:
    table = pyarrow.parquet.read_table(folder / "evaluation" / split / "predictions.parquet")
    subject = next(s for s in run.subjects if s.split == split)
    classes, groups = subject.classes, subject.group_values
    labels = _codes(table["label"].to_pylist(), classes)
    codes = [_codes(table[f"group.{column}"].to_pylist(), values) for column, values in groups.items()]
    cells = np.ravel_multi_index(codes, [len(v) for v in groups.values()]) if codes else np.zeros(len(labels), np.int64)
    log_p = {
        "argmax": log_softmax(np.stack([table[f"logit.{name}"].to_numpy() for name in classes], 1)),
        "ledger": np.log(np.maximum([table[f"p.{name}"].to_numpy() for name in classes], 1e-300)).T,
    }
    settings = flat(parse(Config, [str(folder / "model" / "config.yaml")]).model_dump(mode="json"))
    settings = {p: v for p, v in settings.items() if not p.startswith(IGNORED)} | {"data": run.facts["data"]}
    sides = [
        Side(
            run.name,
            view,
            settings,
            np.array(table[f"decision.{view}"].to_pylist()) == np.array(table["label"].to_pylist()),
            -p[np.arange(len(labels)), labels],
        )
        for view, p in log_p.items()
    ]
    return Images(table["id"].to_pylist(), labels, cells.astype(np.int64), classes, groups), sides


def _codes(names: list[str], known: Sequence[str]) -> Ints:
    number = {name: k for k, name in enumerate(known)}
    return np.array([number[name] for name in names], np.int64)


def _same(a: Images, b: Images) -> bool:
    return a.classes == b.classes and a.groups == b.groups and a.ids == b.ids and np.array_equal(a.labels, b.labels)


def summary(r: Remedy) -> str:
    """A short table for the terminal: classes first, then the cells that are surest to be helped or harmed."""
    settled = [e for e in r.effects if e.verdict not in {"not settled", "too few"} and e.grouping != "all"]
    settled.sort(key=lambda e: ("harms" not in e.verdict, np.nanmin([e.p_recall, e.p_nll])))
    lines = [e for e in r.effects if e.grouping == "all"] + settled[:SHOWN]
    cells = [
        (
            e.name or "all classes",
            "" if e.group == "all" else e.group,
            e.recall.signed(),
            e.nll.signed(),
            f"{e.recall.n:,}",
            e.verdict,
        )
        for e in lines
    ]
    counts = {
        v: sum(e.verdict == v for e in r.effects)
        for v in ("helps", "harms", "helps and harms", "not settled", "too few")
    }
    head = f"{r.after} against {r.before}, on {r.split}"
    what = "\n".join(f"  {line}" for line in r.changed[:SHOWN])
    tail = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    return f"{head}\n{what}\n{aligned(('class', 'group', 'recall', 'NLL', 'n', ''), cells)}\ncells: {tail}"
