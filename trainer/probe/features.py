"""What does the model look at? How its decisions change when colour, light, detail, the order of the parts or the
background is changed."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from data_loaders.audit.finding import Finding
from data_loaders.audit.summary import aligned
from data_loaders.augment import rng
from trainer.metrics.intervals import REPLICATES, benjamini_hochberg
from trainer.metrics.tally import Ints
from trainer.probe.cells import Grouping
from trainer.probe.filters import blurred, pixels
from trainer.probe.paired import LEAST, Number, changes, paired, percentiles, rate, rates, resampled, standing
from trainer.probe.passes import Shown

LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue (ITU-R BT.601)."""
SEED = 1


class Swap(NamedTuple):
    """What is behind the object."""

    name: str
    meaning: str


class Perturbation(NamedTuple):
    """What is done to the images."""

    name: str
    meaning: str
    apply: Callable[[Tensor, Ints], Tensor]
    """Of uint8 [B, 3, S, S] and the rows [B]."""


def grey(images: Tensor, rows: Ints) -> Tensor:
    """Every pixel its luma: what is left is shape and texture."""
    luma = (images.float() * _by_channel(LUMA, images)).sum(1, keepdim=True)
    return pixels(luma).expand_as(images)


def hue(thirds: int) -> Callable[[Tensor, Ints], Tensor]:
    """Turns the colour wheel by thirds, exactly: the channels change places."""
    return lambda images, rows: images.roll(thirds, 1)


def grey_world(images: Tensor, rows: Ints) -> Tensor:
    """Takes the cast out of each image: gains that make its mean colour grey (Buchsbaum 1980)."""
    means = images.float().mean((2, 3), keepdim=True)
    return pixels(images.float() * means.mean(1, keepdim=True) / means.clamp(min=1))


def light(gains: tuple[float, float, float]) -> Callable[[Tensor, Ints], Tensor]:
    """A coloured light: gains of red, green and blue."""
    return lambda images, rows: pixels(images.float() * _by_channel(gains, images))


def low_pass(share: float) -> Callable[[Tensor, Ints], Tensor]:
    """Blurs by a Gaussian whose standard deviation is a share of the side: what is left is what one sees from afar."""
    return lambda images, rows: pixels(blurred(images.float(), share))


def high_pass(share: float) -> Callable[[Tensor, Ints], Tensor]:
    """What such a blur takes away, on the mean colour of each image: edges and texture."""

    def apply(images: Tensor, rows: Ints) -> Tensor:
        values = images.float()
        return pixels(values - blurred(values, share) + values.mean((2, 3), keepdim=True))

    return apply


def shuffled(parts: int) -> Callable[[Tensor, Ints], Tensor]:
    """Cuts each image into parts x parts patches, which change places by a permutation of the row's own.

    Pixels beyond a whole number of patches stay where they are.
    """

    def apply(images: Tensor, rows: Ints) -> Tensor:
        n, channels, size, _ = images.shape
        k = min(parts, size)
        side = size // k
        whole = images[:, :, : side * k, : side * k]
        patches = whole.reshape(n, channels, k, side, k, side).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        orders = np.stack([rng(k, row).permutation(k**2) for row in rows.tolist()])
        moved = patches[torch.arange(n, device=images.device)[:, None], torch.from_numpy(orders).to(images.device)]
        out = images.clone()
        out[:, :, : side * k, : side * k] = moved.unflatten(1, (k, k)).permute(0, 3, 1, 4, 2, 5).reshape(whole.shape)
        return out

    return apply


PERTURBATIONS = (
    Perturbation("grey", "without colour", grey),
    Perturbation("hue 1/3", "the colour wheel turned by a third", hue(1)),
    Perturbation("hue 2/3", "the colour wheel turned by two thirds", hue(2)),
    Perturbation("grey world", "without the cast of each image", grey_world),
    Perturbation("warm", "in a light of 10 % more red and less blue", light((1.1, 1.0, 0.9))),
    Perturbation("cool", "in a light of 10 % more blue and less red", light((0.9, 1.0, 1.1))),
    Perturbation("green", "in a light of 10 % more green", light((0.95, 1.1, 0.95))),
    Perturbation("magenta", "in a light of 10 % less green", light((1.05, 0.9, 1.05))),
    Perturbation("low-pass 1/64", "blurred by 1/64 of the side", low_pass(1 / 64)),
    Perturbation("low-pass 1/32", "blurred by 1/32 of the side", low_pass(1 / 32)),
    Perturbation("high-pass 1/32", "without what a blur by 1/32 of the side leaves", high_pass(1 / 32)),
    Perturbation("patches 2", "in 2 x 2 patches, shuffled", shuffled(2)),
    Perturbation("patches 4", "in 4 x 4 patches, shuffled", shuffled(4)),
    Perturbation("patches 8", "in 8 x 8 patches, shuffled", shuffled(8)),
)
SWAPS = (
    Swap("background same", "before the background of another image of the class"),
    Swap("background other", "before the background of an image of another class"),
)
"""In the order of `background.partners`."""
NOTABLE = 0.2
"""Share of decisions moved by the light that is told. On the built-in images, the class that moves most moves by 0.34
to 0.64 in ten models that met a cast for each class, and by 0.11 to 0.14 in three that did not."""
NOTABLE_FALL = 0.3
"""Fall of a recall at a slight change that is told, by the end of its interval that is nearer to 0."""
NOTABLE_GAP = 0.1
"""Gap that is told."""
NOTABLE_CELL = 0.4
"""Difference that a group makes to a change of recall that is told."""
ALPHA = 0.01
"""Of a false finding of backgrounds, and of cells."""
SLIGHT = ("warm", "cool", "green", "magenta", "low-pass 1/64")
"""Changes that a person hardly notices. All others take something away that may well be the object's."""
LIGHTS = (("cool", "warm"), ("green", "magenta"))
NAMED = 6
"""Classes that the terminal has room for."""
NAMES = [p.name for p in PERTURBATIONS]


class CellChange(NamedTuple):
    """What a perturbation does to the recall of a class in a group."""

    label: str
    group: str
    recall: Number
    """Change."""
    others: float
    """Change of the recall of the same class in all other groups; NaN where it is in no other."""
    p: float
    """That the group makes no difference, adjusted for all cells and perturbations (Benjamini & Hochberg 1995); NaN of
    a cell that is too small to be tested."""


class Change(NamedTuple):
    """What a perturbation does to decisions about the same rows."""

    name: str
    meaning: str
    recalls: list[Number]
    """Change of the recall of each class."""
    balanced: Number
    """Change of the mean recall over the classes that occur."""
    flipped: Number
    """Share of the rows that are decided otherwise."""
    cells: list[CellChange]


class Sway(NamedTuple):
    """How far the colour of the light alone moves decisions."""

    before: str
    after: str
    name: str
    moved: Number
    """Share of the rows called so in the light `after` less that in the light `before`."""


class Gap(NamedTuple):
    """What the background is worth to a class."""

    name: str
    gap: Number
    """Recall before the background of another image of the class less that before one of another class's (Xiao et al.
    2021, mixed-same less mixed-rand)."""
    p: float
    """Of so great a gap where the background makes no difference (McNemar 1947, exact, one-sided), adjusted for the
    classes (Benjamini & Hochberg 1995)."""


class Features(NamedTuple):
    """Decisions with and without a feature."""

    recalls: list[Number]
    """Of each class, unperturbed."""
    changes: list[Change]
    sways: list[Sway]
    """The largest first."""
    gaps: list[Gap]
    """Of each class that has rows with a foreground, the largest first."""


def perturbed(shown: Shown) -> Iterator[Tensor]:
    """The images as they are, then in each of the PERTURBATIONS."""
    yield shown.images
    for perturbation in PERTURBATIONS:
        yield perturbation.apply(shown.images, shown.rows)


def features(
    decided: Ints, swaps: Ints, labels: Ints, classes: tuple[str, ...], groupings: Sequence[Grouping]
) -> Features:
    """From the decisions [1 + PERTURBATIONS, N] and [SWAPS, N] about rows of these labels [N]; the decision -1 is none.

    The groupings are of the same rows; one of all rows in one group says nothing more.
    """
    plain, after = decided[0], dict(zip(NAMES, decided[1:], strict=True))
    both = (swaps >= 0).all(0)
    within = [grouping._replace(cell=grouping.cell[both], group=grouping.group[both]) for grouping in groupings]
    found = [
        *_changes(PERTURBATIONS, decided, labels, classes, groupings),
        *_changes(SWAPS, np.stack([plain, *swaps])[:, both], labels[both], classes, within),
    ]
    return Features(
        rates(plain == labels, labels, len(classes)),
        _adjusted(found),
        sorted(_sways(after, classes), key=lambda s: -abs(s.moved.value)),
        sorted(_gaps(swaps[:, both] == labels[both], labels[both], classes), key=lambda g: -g.gap.value),
    )


def findings(f: Features, classes: tuple[str, ...]) -> Iterator[Finding]:
    """What stands out."""
    for one, other, name, moved in f.sways:
        if abs(moved.value) >= NOTABLE and not moved.low <= 0 <= moved.high and moved.n >= LEAST:
            share = f"the share of images called {name} changes by {moved.signed()}"
            text = f"the light sways decisions: from {one} to {other}, {share}, n = {moved.n:,}"
            yield Finding("feature", name, text, *moved[:3], math.nan, moved.n)
    for name, gap, p in f.gaps:
        if p <= ALPHA and gap.value >= NOTABLE_GAP and gap.n >= LEAST:
            text = f"{name} is told by its background: its recall changes by {gap.signed()} from the background of "
            text += f"another class to that of its own, p = {p:.2g}, n = {gap.n:,}"
            yield Finding("feature", name, text, *gap[:3], math.nan, gap.n)
    for change in f.changes:
        for name, recall in zip(classes, change.recalls, strict=True):
            if change.name in SLIGHT and recall.high <= -NOTABLE_FALL and recall.n >= LEAST:
                text = f"{name} hangs by a thread: {change.meaning}, its recall changes by {recall.signed()}"
                yield Finding("feature", name, f"{text}, n = {recall.n:,}", *recall[:3], math.nan, recall.n)
        for name, group, recall, others, p in change.cells:
            apart = abs(recall.value - others) >= NOTABLE_CELL and abs(recall.value) > abs(others)
            if p <= ALPHA and apart:
                text = f"{name} in {group} is told otherwise than elsewhere: {change.meaning}, its recall changes by "
                text += f"{recall.signed()} there and by {others:+.2f} in other groups, p = {p:.2g}, n = {recall.n:,}"
                yield Finding("feature", f"{name}, {group}", text, *recall[:3], math.nan, recall.n)


def summary(f: Features, classes: tuple[str, ...]) -> str:
    """A short table for the terminal; many classes leave room for the mean only."""
    named = classes if len(classes) <= NAMED else ()
    head = ("perturbation", "decided otherwise", "mean recall", *(f"recall of {name}" for name in named))
    lines = [
        (c.name, f"{c.flipped.value:.1%}", c.balanced.signed(), *(r.signed() for r in c.recalls[: len(named)]))
        for c in f.changes
    ]
    return aligned(head, lines)


def _changes(
    done: Sequence[Perturbation | Swap],
    decided: Ints,
    labels: Ints,
    classes: tuple[str, ...],
    groupings: Sequence[Grouping],
) -> Iterator[Change]:
    """Of decisions [1 + done, N], the first unperturbed; p of cells not adjusted."""
    right = decided == labels
    values, names = right.T.astype(np.float64), np.unique(labels)
    means = sum(resampled(labels, values, SEED), np.zeros((REPLICATES, len(decided)))) / max(len(names), 1)
    balanced = np.array([values[labels == k].mean(0) for k in names]).reshape(len(names), len(decided))
    for i, (name, meaning, *_) in enumerate(done, 1):
        moved = float((balanced[:, i] - balanced[:, 0]).mean()) if len(names) else np.nan
        interval = percentiles(means[:, i] - means[:, 0]) if len(labels) else (np.nan, np.nan)
        recalls = changes(right[0], right[i], labels, len(classes))
        cells = [cell for grouping in groupings for cell in _cells(right[0], right[i], labels, grouping)]
        flipped = rate(decided[i] != decided[0])
        yield Change(name, meaning, recalls, Number(moved, *interval, len(labels)), flipped, cells)


def _cells(before: np.ndarray, after: np.ndarray, labels: Ints, grouping: Grouping) -> list[CellChange]:
    """p not adjusted."""
    cells = grouping.cells
    stood = standing(after.astype(np.float64) - before, grouping.cell, len(cells), labels, step=1)
    recalls = changes(before, after, grouping.cell, len(cells))
    lines = zip(cells, recalls, stood.others.tolist(), stood.p.tolist(), strict=True)
    return [CellChange(cell.name, cell.group, recall, others, p) for cell, recall, others, p in lines]


def _adjusted(found: list[Change]) -> list[Change]:
    """With p of all their cells adjusted together."""
    p = iter(benjamini_hochberg(np.array([cell.p for change in found for cell in change.cells])).tolist())
    return [change._replace(cells=[cell._replace(p=next(p)) for cell in change.cells]) for change in found]


def _sways(after: dict[str, Ints], classes: tuple[str, ...]) -> Iterator[Sway]:
    k = len(classes)
    for one, other in LIGHTS:
        both = np.bincount(after[one][after[one] == after[other]], minlength=k)
        called, before = (np.bincount(after[light], minlength=k) for light in (other, one))
        moved = paired(both[:k], called[:k], before[:k], np.full(k, len(after[one])))
        yield from (Sway(one, other, *line) for line in zip(classes, moved, strict=True))


def _gaps(right: np.ndarray, labels: Ints, classes: tuple[str, ...]) -> Iterator[Gap]:
    """From hits [SWAPS, N]."""
    same, other = right
    gaps = changes(other, same, labels, len(classes))
    for_it, against = (np.bincount(labels[hits], minlength=len(classes)) for hits in (same & ~other, other & ~same))
    p = np.where([gap.n > 0 for gap in gaps], binom.sf(for_it - 1, for_it + against, 0.5), np.nan)
    lines = zip(classes, gaps, benjamini_hochberg(p).tolist(), strict=True)
    return (Gap(*line) for line in lines if line[1].n)


def _by_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device).view(1, 3, 1, 1)
