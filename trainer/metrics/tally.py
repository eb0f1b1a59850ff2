"""What samples add to the evaluation: integer sums of fixed shape, which add up over batches, ranks and runs.

Sums of scores are 64-bit fixed point, so that a sum has the same bits in any order; every metric is a function of them.
Shapes: B samples, G groups (the finest: cells of all group columns), K classes, D decisions (the classes and, where
abstaining is one, K for it), BINS bins.
"""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = 60
"""Bins of equal width over [0, 1]; a multiple of the 10, 15 and 20 that are in use."""
HALVINGS = 20
"""The first and the last of them are cut further, at powers of two down to 2**-25, as AUROC and bins of equal mass
need: most probabilities are close to 0 or 1."""
BINS = WIDTHS + 2 * HALVINGS
SCALE = 2.0**28
"""One in fixed point: an error of 2**-29 a row, and room for 10**9 rows of 10 nats."""
SQUARE_SCALE = 2.0**12
"""One in the sums of squares, which would overflow sooner."""
SCORE_CAP = 2.0**10
"""Largest NLL of a row that is counted, in nats; reached only where a probability underflows."""

Ints = NDArray[np.int64]


class Shape(NamedTuple):
    """Of a tally."""

    groups: int
    classes: int
    abstains: bool = False

    @property
    def decisions(self) -> int:
        return self.classes + self.abstains

    @property
    def parts(self) -> list[tuple[int, ...]]:
        g, k = self.groups, self.classes
        return [(g, k, self.decisions), (g, k, BINS, 3), (g, k, BINS, 3), (g, k, 2, 2)]

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.parts))


@dataclass(frozen=True)
class Tally:
    """Sums over samples."""

    confusion: Ints
    """Samples by group, true class and decision, [G, K, D]."""
    confidence: Ints
    """By group, true class and bin of the largest probability, [G, K, BINS, 3]: samples, samples whose most probable
    class is right, and the sum of that probability, in units of 1 / SCALE."""
    classwise: Ints
    """By group, class k and bin of its probability p(k), whatever the true class, [G, K, BINS, 3]: samples, samples
    that are k, and the sum of p(k), in units of 1 / SCALE."""
    scores: Ints
    """By group and true class, for NLL (nats) and Brier score, [G, K, 2, 2]: sum, in units of 1 / SCALE, and sum of
    squares, in units of 1 / SQUARE_SCALE."""

    @property
    def parts(self) -> tuple[Ints, ...]:
        return self.confusion, self.confidence, self.classwise, self.scores

    @property
    def shape(self) -> Shape:
        groups, classes, decisions = self.confusion.shape
        return Shape(groups, classes, decisions > classes)

    @cached_property
    def n(self) -> Ints:
        """Samples by group, [G]."""
        return self.actual.sum(1)

    @cached_property
    def actual(self) -> Ints:
        """Samples that are k, [G, K]."""
        return self.confusion.sum(2)

    @cached_property
    def called(self) -> Ints:
        """Samples called k, [G, K]."""
        return self.confusion.sum(1)[:, : self.shape.classes]

    @property
    def hits(self) -> Ints:
        """Samples that are k and called so, [G, K]."""
        return np.diagonal(self.confusion, axis1=1, axis2=2)

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __sub__(self, other: Tally) -> Tally:
        return Tally(*(a - b for a, b in zip(self.parts, other.parts, strict=True)))

    def regroup(self, group: Ints, groups: int) -> Tally:
        """The tally in which old group g belongs to new group group[g], of `groups`."""
        if np.array_equal(group, np.arange(groups)):
            return self
        return Tally(*(_gathered(part, group, groups) for part in self.parts))

    def overall(self) -> Tally:
        """The tally as if all samples were one group."""
        return self.regroup(np.zeros(self.shape.groups, np.int64), 1)

    def vector(self) -> Ints:
        """All sums in one row, [Shape.size]: what is added, reduced over ranks, stored and sent."""
        return np.concatenate([part.ravel() for part in self.parts])

    @classmethod
    def of(cls, vector: Ints, shape: Shape) -> Tally:
        """The tally whose parts are views of a vector."""
        ends = np.cumsum([math.prod(part) for part in shape.parts])[:-1]
        return cls(*(v.reshape(part) for v, part in zip(np.split(vector, ends), shape.parts, strict=True)))

    def pack(self) -> str:
        """A short text from which `unpack` makes an equal tally."""
        return base64.b85encode(zlib.compress(self.vector().astype("<i8").tobytes())).decode()

    @classmethod
    def unpack(cls, text: str, shape: Shape) -> Tally:
        return cls.of(np.frombuffer(zlib.decompress(base64.b85decode(text)), "<i8").astype(np.int64), shape)


def count(
    sums: Tensor,
    log_probabilities: Tensor,
    decisions: Tensor,
    labels: Tensor,
    cells: Tensor,
    valid: Tensor,
    shape: Shape,
) -> None:
    """Adds a batch to the vector of a tally, int64 [Shape.size], on its device and without waiting for it.

    `log_probabilities` [B, K] in nats; `decisions`, `labels`, `cells`, `valid` [B]. Rows not valid count nowhere.
    """
    import torch

    log_p = log_probabilities.double()
    raw = log_p.exp()
    p = raw.nan_to_num(0.0)  # a model that has diverged must not end in an index out of range
    top, most_probable = p.max(1)
    one, own = valid.long(), cells * shape.classes + labels
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    brier = raw.square().sum(1) - 2 * raw.gather(1, labels[:, None])[:, 0] + 1
    score = torch.stack([nll.nan_to_num(SCORE_CAP).clamp(max=SCORE_CAP), brier.nan_to_num(2.0)], 1)

    # all flat: torch adds rows to a matrix one by one on a CPU, which takes four times as long
    confusion, confidence, classwise, scores = sums.split([math.prod(part) for part in shape.parts])
    confusion.index_add_(0, own * shape.decisions + decisions, one)
    top_bin = (top * WIDTHS).long().clamp(max=WIDTHS - 1) + HALVINGS - _halvings(top) + _halvings(1 - top)
    place = (own * BINS + top_bin) * 3
    for k, value in enumerate((one, (most_probable == labels) * one, _fixed(top) * one)):
        confidence.index_add_(0, place + k, value)
    every = cells[:, None] * shape.classes + torch.arange(shape.classes, device=labels.device)
    bins = ((p * WIDTHS).long() + HALVINGS - _halvings(p)).scatter(1, most_probable[:, None], top_bin[:, None])
    place = (every * BINS + bins) * 3
    classwise.index_add_(0, place.flatten(), one.repeat_interleave(shape.classes))
    classwise.index_add_(0, place.gather(1, labels[:, None])[:, 0] + 1, one)
    classwise.index_add_(0, place.flatten() + 2, (_fixed(p) * one[:, None]).flatten())
    moments = torch.stack([_fixed(score), (score.square() * SQUARE_SCALE).round().long()], 2).flatten(1)
    scores.index_add_(
        0, ((own * 4)[:, None] + torch.arange(4, device=own.device)).flatten(), (moments * one[:, None]).flatten()
    )


def equal_widths(counts: Ints, bins: int) -> Ints:
    """Counts of […, BINS, C] gathered to `bins` of equal width, […, bins, C]."""
    first = np.arange(0, WIDTHS, WIDTHS // bins)
    return np.add.reduceat(counts, np.where(first > 0, first + HALVINGS, 0), axis=-2)


def _halvings(x: Tensor) -> Tensor:
    """Powers of two by which each float64 is below 2**-6, at most HALVINGS; from its exponent."""
    import torch

    return (1017 - (x.view(torch.int64) >> 52)).clamp(0, HALVINGS)


def _fixed(x: Tensor) -> Tensor:
    return (x * SCALE).round().long()


def _gathered(part: Ints, group: Ints, groups: int) -> Ints:
    merged = np.zeros((groups, *part.shape[1:]), np.int64)
    for old, new in enumerate(group.tolist()):
        merged[new] += part[old]
    return merged
