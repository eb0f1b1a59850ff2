"""Where in the frame does the evidence for a class lie? Two ways, over many images: what it costs to cover a place up,
and where the heat of Grad-CAM is.

What is in the centre of most images makes the centre count for most models, which is no bias. So a class is told where
covering up a place at the rim costs it more than the centre, or where its heat lies elsewhere than that of the others.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_loaders.audit.audit import quota, sample
from data_loaders.audit.finding import Finding
from data_loaders.audit.summary import aligned
from trainer.decision.ledger import Ledger
from trainer.explain.heatmaps import grad_cam
from trainer.metrics.catalogue import Floats, divide
from trainer.metrics.intervals import REPLICATES, benjamini_hochberg
from trainer.metrics.tally import Ints
from trainer.probe.cells import Grouping
from trainer.probe.filters import border, pixels
from trainer.probe.paired import LEAST, ROUNDING, Number, by_chance, mean, percentiles, resampled, standing
from trainer.probe.passes import Part, Shown, log_probabilities

GRID = 5
"""Places in a row and in a column."""
WINDOW = 0.25
"""Side of the square that covers a place up, of the frame's; squares overlap by a fourth."""
PLACES = [(x, y) for y in range(GRID) for x in range(GRID)]
"""Of the squares, to the right and down, in the order in which one reads."""
MIDDLES = [tuple(WINDOW / 2 + (1 - WINDOW) * step / (GRID - 1) for step in place) for place in PLACES]
"""Of each square, right and down from the corner of the frame, in sides of it."""
CENTRAL = np.array([max(abs(x - 0.5), abs(y - 0.5)) <= 0.25 for x, y in MIDDLES])
"""Whether the middle of a square lies in the central quarter of the frame, [PLACES]."""
COVERED = 400
"""Rows that are covered up at most, of each class the same number if it has it, or a quarter of the rows if that is
more: each takes as many passes as there are PLACES."""
NOTABLE = 0.25
"""Nats by which a place at the rim costs more than the centre, at least, if it is told. On the built-in images it is at
most 0.10 in models of any bias."""
NOWHERE = 0.05
"""Share of its heat in the centre below which a class is told. On the built-in images it is 0.14 to 0.55 in models of
any bias: classes differ much, and the one that a model falls back on has most of its heat at the border."""
ALPHA = 0.01
"""Of a false finding of either kind."""
SEED = 3


class Covered(NamedTuple):
    """What it costs a class to cover up each of the PLACES."""

    name: str
    drops: list[Number]
    """By how much the log-probability of the class falls at each place, in nats."""
    centre: Number
    """Share of the central places in what is lost, of falls above 0; NaN where nothing is lost."""
    low: float
    high: float
    """Where that share lies in 95 of 100 cases if all places count the same."""
    place: int
    """Of the rim, where most is lost."""
    excess: Number
    """What is lost there less the mean of the central places, in nats; the interval takes the place as given."""
    p: float
    """Of so great an excess anywhere at the rim if all places count the same, for all classes (Westfall & Young
    1993)."""


class Share(NamedTuple):
    """Share of the heat that lies in a part of the frame."""

    share: Number
    """Mean over images."""
    others: float
    """The same of other classes in the group."""
    low: float
    high: float
    """Where it lies in 95 of 100 cases when the labels of the group are shuffled."""
    p: float
    """Adjusted for all cells and both parts (Benjamini & Hochberg 1995); NaN of a cell too small to be tested."""


class Heat(NamedTuple):
    """Where the heat for a class in a group lies."""

    label: str
    group: str
    """Empty for all rows."""
    centre: Share
    """In the central quarter of the frame."""
    border: Share
    """In the outer eighth of each side, 7/16 of the frame."""


class Attention(NamedTuple):
    """Where evidence lies."""

    covered: list[Covered]
    """Of each class that occurs."""
    places: list[tuple[float, ...]]
    """MIDDLES, in the order of `Covered.drops`."""
    heat: list[Heat]
    """Of each class, and of each class in a group."""


def to_cover(labels: Ints) -> np.ndarray:
    """Whether each of these rows is covered up, [N]."""
    chosen = np.zeros(len(labels), bool)
    chosen[sample(labels, quota(labels, max(COVERED, len(labels) // 4)), SEED)] = True
    return chosen


def covered(images: Tensor) -> Iterator[Tensor]:
    """Images uint8 [B, 3, S, S] with each of the PLACES in the mean colour of the image (Zeiler & Fergus 2014)."""
    size = images.shape[-1]
    side = max(round(size * WINDOW), 1)
    colour = pixels(images.float().mean((2, 3), keepdim=True))
    for x, y in PLACES:
        left, top = (round((size - side) * step / (GRID - 1)) for step in (x, y))
        hidden = images.clone()
        hidden[:, :, top : top + side, left : left + side] = colour
        yield hidden


def drops(model: Callable[[Tensor], Tensor], ledger: Ledger, labels: Ints, chosen: np.ndarray) -> Part:
    """Keeps how far the log-probability of the label falls with each place covered up, [PLACES, B], nats; NaN of rows
    that are not chosen."""

    def part(shown: Shown) -> Floats:
        found = np.full((len(PLACES), len(shown.rows)), np.nan)
        kept = np.flatnonzero(chosen[shown.places])
        if len(kept):
            images = shown.images[torch.from_numpy(kept).to(shown.images.device)]
            own, cells = labels[shown.places[kept]], shown.cells[kept]
            of = [
                log_probabilities(model, ledger, variant, cells)[np.arange(len(own)), own]
                for variant in (images, *covered(images))
            ]
            found[:, kept] = of[0] - np.stack(of[1:])
        return found

    return part


def heat(model: nn.Module, labels: Ints) -> Part:
    """Keeps the share of the heat for the label that lies in the central quarter and at the border, [2, B]; NaN where
    there is no heat."""

    def part(shown: Shown) -> Floats:
        own = torch.from_numpy(labels[shown.places]).to(shown.images.device)
        return shares(grad_cam(model, shown.images, own))

    return part


def shares(heat: Tensor) -> Floats:
    """Shares of heat [B, S, S] in the central quarter of the frame and at the border, [2, B]."""
    size = heat.shape[-1]
    inner = slice(round(size / 4), size - round(size / 4))
    outer = heat[:, border(size).to(heat.device)].sum(1)
    parts = torch.stack([heat[:, inner, inner].sum((1, 2)), outer]).double().cpu().numpy()
    return divide(parts, np.broadcast_to(heat.sum((1, 2)).double().cpu().numpy(), parts.shape))


def attention(
    fallen: Floats, heated: Floats, labels: Ints, classes: tuple[str, ...], groupings: Sequence[Grouping]
) -> Attention:
    """From the `drops` [PLACES, N] and the shares of `heat` [2, N] of rows of these labels [N]."""
    rows = ~np.isnan(fallen).any(0)
    return Attention(_covered(fallen[:, rows].T, labels[rows], classes), MIDDLES, _heat(heated, groupings))


def findings(a: Attention) -> Iterator[Finding]:
    """What stands out."""
    for c in a.covered:
        if c.p <= ALPHA and c.excess.value >= NOTABLE and c.excess.n >= LEAST:
            x, y = MIDDLES[c.place]
            text = (
                f"{c.name} is told by what lies {x:.0%} from the left and {y:.0%} from the top of the frame: covering "
            )
            text += f"it up costs {c.excess} nats more than to cover up the centre, p = {c.p:.2g}, n = {c.excess.n:,}"
            yield Finding("spatial", c.name, text, *c.excess[:3], np.nan, c.excess.n)
    for h in a.heat:
        share, others, low, _, p = h.centre
        if p <= ALPHA and share.value <= min(NOWHERE, others):
            cell = f"{h.label}, {h.group}" if h.group else h.label
            text = (
                f"the evidence for {cell} is not in the centre of the frame: {share} of its heat, {others:.2f} of that "
            )
            text += f"for other classes, p = {p:.2g}, n = {share.n:,}"
            yield Finding("spatial", cell, text, *share[:3], low, share.n)


def summary(a: Attention) -> str:
    """A short table for the terminal."""
    of_class = {h.label: h for h in a.heat if not h.group}
    lines = [
        (
            c.name,
            str(c.centre),
            f"{c.low:.2f} to {c.high:.2f}",
            f"{c.centre.n:,}",
            str(h.centre.share),
            f"{h.centre.low:.2f} to {h.centre.high:.2f}",
            f"{h.centre.share.n:,}",
        )
        for c in a.covered
        for h in [of_class[c.name]]
    ]
    return aligned(("class", "lost in the centre", "by chance", "n", "heat in the centre", "by chance", "n"), lines)


def _covered(values: Floats, labels: Ints, classes: tuple[str, ...]) -> list[Covered]:
    """From falls [N, PLACES]. By chance, the places of each row change places with one another."""
    names, code, n = np.unique(labels, return_inverse=True, return_counts=True)
    order, starts = np.argsort(code, kind="stable"), np.cumsum(n) - n
    noise = np.sqrt(np.bincount(code, values.var(1), len(n))) / n  # which the permutations leave as it is
    random = np.random.Generator(np.random.Philox(key=[SEED, values.size]))

    def told(falls: Floats) -> tuple[Floats, Floats]:
        means = np.add.reduceat(falls[order], starts) / n[:, None]
        excess = means[:, ~CENTRAL].max(1) - means[:, CENTRAL].mean(1)
        return _central(means), divide(excess, np.where(noise > ROUNDING, noise, 0))

    _, found = told(values)
    central, null = map(np.array, zip(*(told(random.permuted(values, axis=1)) for _ in range(REPLICATES)), strict=True))
    most = np.where(np.isnan(null), -np.inf, null).max(1)
    p = np.where(np.isnan(found), np.nan, (1 + (most[:, None] >= found - ROUNDING).sum(0)) / (1 + REPLICATES))
    low, high = np.array([_known(of_class) for of_class in central.T]).T
    drawn = resampled(labels, values, SEED)
    return [
        _of_class(classes[k], values[labels == k], of_class, *chance)
        for k, of_class, *chance in zip(names, drawn, low.tolist(), high.tolist(), p.tolist(), strict=True)
    ]


def _of_class(name: str, values: Floats, drawn: Floats, low: float, high: float, p: float) -> Covered:
    """From falls [n, PLACES], and means of them [REPLICATES, PLACES]."""
    n, means = len(values), values.mean(0)
    place = int(np.where(CENTRAL, -np.inf, means).argmax())
    interval = _known(_central(drawn)) if n > 1 else (np.nan, np.nan)
    excess = values[:, place] - values[:, CENTRAL].mean(1)
    return Covered(
        name,
        [_mean(of_place) for of_place in values.T],
        Number(float(_central(means)), *interval, n),
        low,
        high,
        place,
        _mean(excess),
        p,
    )


def _central(means: Floats) -> Floats:
    """Share of the central places in falls above 0, of means [..., PLACES]."""
    lost = np.maximum(means, 0)
    return divide(lost[..., CENTRAL].sum(-1), lost.sum(-1))


def _known(replicates: Floats) -> tuple[float, float]:
    """The interval of the replicates in which something is lost."""
    known = replicates[~np.isnan(replicates)]
    return percentiles(known) if len(known) else (np.nan, np.nan)


def _mean(values: Floats) -> Number:
    return mean(values, np.zeros(len(values), np.int64), 1)[0]


def _heat(heated: Floats, groupings: Sequence[Grouping]) -> list[Heat]:
    """p adjusted."""
    hot = np.isfinite(heated.sum(0))
    found = [
        Heat(cell.name, cell.group, *parts)
        for grouping in groupings
        for cell, *parts in zip(grouping.cells, *(_shares(part[hot], grouping, hot) for part in heated), strict=True)
    ]
    p = benjamini_hochberg(np.array([part.p for h in found for part in (h.centre, h.border)])).reshape(-1, 2)
    return [
        h._replace(centre=h.centre._replace(p=centre), border=h.border._replace(p=border))
        for h, (centre, border) in zip(found, p.tolist(), strict=True)
    ]


def _shares(values: Floats, grouping: Grouping, hot: np.ndarray) -> list[Share]:
    """Of each cell, p not adjusted, from the values of the rows that have heat."""
    cell, cells = grouping.cell[hot], len(grouping.cells)
    stood = standing(values, cell, cells, grouping.group[hot])
    low, high = by_chance(stood)
    columns = (column.tolist() for column in (stood.others, low, high, stood.p))
    return [Share(*line) for line in zip(mean(values, cell, cells), *columns, strict=True)]
