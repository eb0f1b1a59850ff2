"""What samples add to the evaluation: integer sums of fixed shape, which add up over batches, ranks and runs.

Sums of scores are 64-bit fixed point, so that a sum has the same bits in any order; every metric is a function of them.
Shapes: B samples, G groups (the finest: cells of all group columns), K classes, BINS bins.
"""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

BINS = 60
"""Of equal width over [0, 1]; a multiple of the 10, 15 and 20 that are in use."""
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

    @property
    def parts(self) -> list[tuple[int, ...]]:
        g, k = self
        return [(g, k, k), (g, k, BINS, 3), (g, k, 2, 2)]

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.parts))


@dataclass(frozen=True)
class Tally:
    """Sums over samples."""

    confusion: Ints
    """Samples by group, true class and decision, [G, K, K]."""
    confidence: Ints
    """By group, true class and bin of the largest probability, [G, K, BINS, 3]: samples, samples whose most probable
    class is right, and the sum of that probability, in units of 1 / SCALE."""
    scores: Ints
    """By group and true class, for NLL (nats) and Brier score, [G, K, 2, 2]: sum, in units of 1 / SCALE, and sum of
    squares, in units of 1 / SQUARE_SCALE."""

    @property
    def shape(self) -> Shape:
        return Shape(*self.confusion.shape[:2])

    @property
    def n(self) -> Ints:
        """Samples by group, [G]."""
        return self.confusion.sum((1, 2))

    def __add__(self, other: Tally) -> Tally:
        return Tally.of(self.vector() + other.vector(), self.shape)

    def __sub__(self, other: Tally) -> Tally:
        return Tally.of(self.vector() - other.vector(), self.shape)

    def regroup(self, group: Ints, groups: int) -> Tally:
        """The tally in which old group g belongs to new group group[g], of `groups`."""
        parts = []
        for part in (self.confusion, self.confidence, self.scores):
            merged = np.zeros((groups, *part.shape[1:]), np.int64)
            np.add.at(merged, group, part)
            parts.append(merged)
        return Tally(*parts)

    def overall(self) -> Tally:
        """The tally as if all samples were one group."""
        return self.regroup(np.zeros(self.shape.groups, np.int64), 1)

    def vector(self) -> Ints:
        """All sums in one row, [Shape.size]: what is added, reduced over ranks, stored and sent."""
        return np.concatenate([self.confusion.ravel(), self.confidence.ravel(), self.scores.ravel()])

    @classmethod
    def of(cls, vector: Ints, shape: Shape) -> Tally:
        ends = np.cumsum([math.prod(part) for part in shape.parts])[:-1]
        return cls(*(v.reshape(part) for v, part in zip(np.split(vector, ends), shape.parts, strict=True)))

    def pack(self) -> str:
        """A short text from which `unpack` makes an equal tally."""
        return base64.b85encode(zlib.compress(self.vector().astype("<i8").tobytes())).decode()

    @classmethod
    def unpack(cls, text: str, shape: Shape) -> Tally:
        return cls.of(np.frombuffer(zlib.decompress(base64.b85decode(text)), "<i8").astype(np.int64), shape)


def count(
    log_probabilities: Tensor, decisions: Tensor, labels: Tensor, cells: Tensor, valid: Tensor, shape: Shape
) -> Tensor:
    """The tally of a batch as a vector, int64 [Shape.size], on its device and without waiting for it.

    `log_probabilities` [B, K] in nats; `decisions`, `labels`, `cells`, `valid` [B]. Rows not valid count nowhere.
    """
    import torch

    classes = shape.classes
    log_p = log_probabilities.double()
    p = log_p.exp()
    top, most_probable = p.max(1)
    one = valid.long()
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    brier = p.square().sum(1) - 2 * p.gather(1, labels[:, None])[:, 0] + 1
    score = torch.stack([nll.nan_to_num(SCORE_CAP).clamp(max=SCORE_CAP), brier.nan_to_num(2.0)], 1)
    top = top.nan_to_num(0.0)  # a model that has diverged must not end in an index out of range
    bins = (top * BINS).long().clamp(max=BINS - 1)

    out = torch.zeros(shape.size, dtype=torch.int64, device=log_p.device)
    confusion, confidence, scores = out.split([math.prod(part) for part in shape.parts])
    confusion.index_add_(0, (cells * classes + labels) * classes + decisions, one)
    in_bin = torch.stack([torch.ones_like(one), (most_probable == labels).long(), _fixed(top)], 1)
    confidence.view(-1, 3).index_add_(0, (cells * classes + labels) * BINS + bins, in_bin * one[:, None])
    moments = torch.stack([_fixed(score), (score.square() * SQUARE_SCALE).round().long()], 2).flatten(1)
    scores.view(-1, 4).index_add_(0, cells * classes + labels, moments * one[:, None])
    return out


def _fixed(x: Tensor) -> Tensor:
    return (x * SCALE).round().long()
