"""Does a class need to stand in the centre? Accuracy by the place of the picture in the frame.

Each image is shown at 3/4 of its size on a canvas of its border's mean colour, at a grid of places. Nothing is cut off
and nothing comes in, so only the place differs. (Shifting an image loses what leaves the frame, which costs recall of
every class and hides what a place costs.)
"""

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from data_loaders.audit.finding import Finding
from data_loaders.audit.summary import aligned
from trainer.metrics.catalogue import Floats
from trainer.metrics.intervals import LEVEL, REPLICATES
from trainer.metrics.tally import Ints
from trainer.probe.filters import border, pixels
from trainer.probe.paired import LEAST, ROUNDING, Number, percentiles, rates, resampled
from trainer.probe.passes import Shown

SCALE = 0.75
"""Side of the picture, of the frame's."""
STEPS = (-1, 0, 1)
"""More of them make a finer grid, and each place costs a pass over the images."""
PLACES = [(x, y) for y in STEPS for x in STEPS]
"""Right and down of the centre, in steps as far as the frame goes; in the order in which one reads."""
CENTRE = PLACES.index((0, 0))
RIM = [i for i in range(len(PLACES)) if i != CENTRE]
NOTABLE = 0.04
"""Gain of the centre that is told. On the built-in images, eleven models that met desserts only in the centre have
0.039 to 0.103 there, and ten that met them anywhere 0.002 to 0.032: padding with zeros tells a network a little of
place."""
ALPHA = 0.01
"""Of a false finding of either kind."""
CHANCE = 95
SEED = 0


class Place(NamedTuple):
    """The picture at one place of the frame."""

    x: float
    """Right of the centre, as a share of the frame's side."""
    y: float
    """Down from the centre, likewise."""
    balanced: Number
    """Balanced accuracy."""
    recalls: list[Number]
    """Of each class."""


class ClassPlace(NamedTuple):
    """What the centre is worth to a class."""

    name: str
    gain: Number
    """Recall in the centre less the mean recall at the places of the rim, of the same images."""


class Spatial(NamedTuple):
    """Accuracy by place."""

    places: list[Place]
    spread: Number
    """Greatest less smallest balanced accuracy of all places; above 0 by chance, as its interval is."""
    by_chance: float
    """95th percentile of the spread where no place matters."""
    p: float
    """Of so great a spread where no place matters."""
    centre: list[ClassPlace]
    """Of each class, the most centred one first."""


def placed(shown: Shown) -> Iterator[Tensor]:
    """The images at each of the PLACES."""
    images, size = shown.images, shown.images.shape[-1]
    side = round(size * SCALE)
    small = pixels(interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True))
    canvas = _border_colour(images).expand_as(images)
    for x, y in PLACES:
        left, top = _offset(size - side, x), _offset(size - side, y)
        placed = canvas.clone()
        placed[:, :, top : top + side, left : left + side] = small
        yield placed


def spatial(decided: Ints, labels: Ints, classes: tuple[str, ...], size: int) -> Spatial:
    """From the decisions [PLACES, N] about rows of these labels [N], in a frame of `size` pixels."""
    right = decided == labels
    values = right.T.astype(np.float64)
    names, counts = np.unique(labels, return_counts=True)
    own = np.stack([values[labels == k].mean(0) for k in names])
    balanced, means, centre = own.mean(0), np.zeros((REPLICATES, len(PLACES))), list[ClassPlace]()
    for k, n, recalls, drawn in zip(names, counts, own, resampled(labels, values, SEED), strict=True):
        means += drawn / len(names)
        gain = float(recalls[CENTRE] - recalls[RIM].mean())
        low, high = percentiles(drawn[:, CENTRE] - drawn[:, RIM].mean(1))
        centre.append(ClassPlace(classes[k], Number(gain, low, high, int(n))))
    spread, null = float(np.ptp(balanced)), _spread_by_chance(right, labels)
    return Spatial(
        [
            Place(x, y, Number(float(value), *percentiles(drawn), len(labels)), rates(hits, labels, len(classes)))
            for (x, y), value, drawn, hits in zip(_shifts(size), balanced, means.T, right, strict=True)
        ],
        Number(spread, *percentiles(np.ptp(means, axis=1)), len(labels)),
        float(np.percentile(null, CHANCE)),
        float((1 + (null >= spread - ROUNDING).sum()) / (1 + len(null))),
        sorted(centre, key=lambda c: -c.gain.value),
    )


def findings(s: Spatial) -> Iterator[Finding]:
    """What stands out; with many classes, a gain must be surer for each (Bonferroni)."""
    sure = NormalDist().inv_cdf(1 - ALPHA / len(s.centre)) / NormalDist().inv_cdf((1 + LEVEL) / 2)
    for name, gain in s.centre:
        if gain.n >= LEAST and gain.value >= max(NOTABLE, sure * (gain.high - gain.low) / 2):
            text = (
                f"{name} is seen best in the centre: recall {gain} above that at the rim of the frame, n = {gain.n:,}"
            )
            yield Finding("spatial", name, text, gain.value, gain.low, gain.high, math.nan, gain.n)
    if s.p <= ALPHA:
        text = f"balanced accuracy differs by {s.spread} over the frame (by chance below {s.by_chance:.3f})"
        yield Finding("spatial", "all classes", text, *s.spread[:3], s.by_chance, s.spread.n)


def summary(s: Spatial) -> str:
    """A short table for the terminal."""
    return aligned(
        ("class", "recall in the centre less at the rim", "n"), [(c, str(g), f"{g.n:,}") for c, g in s.centre]
    )


def _spread_by_chance(right: np.ndarray, labels: Ints) -> Floats:
    """The spread when the places of each row change places with one another, [REPLICATES]."""
    random = np.random.Generator(np.random.Philox(key=[SEED, right.size]))
    mixed = right.any(0) & ~right.all(0)
    names, code, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weight = 1 / (len(names) * counts[code])
    always, changing = right[:, ~mixed] @ weight[~mixed], right[:, mixed].T.astype(np.float32)
    return np.array([np.ptp(always + weight[mixed] @ random.permuted(changing, axis=1)) for _ in range(REPLICATES)])


def _border_colour(images: Tensor) -> Tensor:
    """Mean colour of the border, uint8 [B, 3, 1, 1]."""
    outer = border(images.shape[-1]).to(images.device)
    return pixels(images[:, :, outer].float().mean(2))[:, :, None, None]


def _shifts(size: int) -> Iterator[tuple[float, float]]:
    """What each of the PLACES is off the centre by, as shares of the frame's side."""
    spare = size - round(size * SCALE)
    for place in PLACES:
        x, y = ((_offset(spare, step) - spare / 2) / size for step in place)
        yield x, y


def _offset(spare: int, step: int) -> int:
    """Pixels before the picture, of `spare` ones."""
    return round(spare * (step + max(STEPS)) / (2 * max(STEPS)))
