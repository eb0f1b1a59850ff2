"""Images blended with one another, on the device, a batch at a time: each then has two labels, by shares of sum 1.

Pairs are the neighbours 2i and 2i + 1 of the batch over all workers, which one worker has both, and what is drawn for a
batch is a function of (seed, step): so the images are the same for any number of workers.
"""

from __future__ import annotations

from abc import abstractmethod
from math import exp, lgamma
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveFloat

from data_loaders.augment import Probability
from data_loaders.index import Ints
from data_loaders.sampler import AnySampler, Stratified
from data_loaders.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STREAM = 1
"""Last word of the counter: sets these random numbers apart from those of the augmentation, whose key is alike."""


class Images(NamedTuple):
    """B images and what is known of them."""

    images: Tensor
    """uint8 [B, 3, h, w]."""
    labels: Tensor
    """[B]"""
    cells: Tensor
    """[B]"""


class Mixed(NamedTuple):
    """B images of two labels each."""

    images: Tensor
    """uint8, or float32 from 0 to 255, [B, 3, h, w]."""
    share: Tensor
    """Of the image's own label, float32 [B]; the rest is the other one's."""
    labels: Tensor
    """The other labels, [B]."""
    cells: Tensor
    """The other cells, [B]."""


class Mixing(Settings):
    """What all ways to mix have."""

    @property
    def own_share(self) -> float:
        """How much the stream's own labels count, in expectation; the rest is that of the stream of partners."""
        return 1.0

    @property
    def partners(self) -> AnySampler | None:
        """The stream of the images that are blended in; None where these are the neighbours."""
        return None

    @abstractmethod
    def blend(self, own: Images, other: Images, random: np.random.Generator, places: slice, batch: int) -> Mixed:
        """Images at these places of a batch, each with the one that is blended in; draws for the whole batch."""

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        cells: Tensor,
        partners: Images | None,
        seed: int,
        step: int,
        start: int,
        batch: int,
    ) -> Mixed:
        """A worker's uint8 images of a step, mixed, of which the first has the place `start` in the whole `batch`, an
        even one. `partners` are those at the same places of the stream of partners, if there is one."""
        own = Images(images, labels, cells)
        random = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, STREAM]))
        places = slice(start, start + len(labels))
        return self.blend(own, neighbours(own) if partners is None else partners, random, places, batch)


class Unmixed(Mixing):
    """Every image stays as it is."""

    kind: Literal["none"] = "none"

    def blend(self, own: Images, other: Images, random: np.random.Generator, places: slice, batch: int) -> Mixed:
        import torch

        return Mixed(own.images, torch.ones(len(own.labels), device=own.images.device), own.labels, own.cells)


class Mixup(Mixing):
    """share a + (1 - share) b, and for b the reverse, with one share ~ Beta(alpha, alpha) for each pair (Zhang et al.
    2018). On long tails the strongest single lever on calibration (Zhong et al. 2021)."""

    kind: Literal["mixup"] = "mixup"
    alpha: PositiveFloat = 1.0
    """1 draws shares evenly (MiSLAS); less, nearer to 0 or 1 (BalPoE: 0.4)."""

    def blend(self, own: Images, other: Images, random: np.random.Generator, places: slice, batch: int) -> Mixed:
        shares = _of_pairs(random.beta(self.alpha, self.alpha, (batch + 1) // 2), batch, alone=1)
        share = _sent(shares[places], own.images.device).float()
        weight = share[:, None, None, None]
        return Mixed(weight * own.images + (1 - weight) * other.images, share, other.labels, other.cells)


class CutMix(Mixing):
    """A box of each image of a pair is replaced by the same box of the other (Yun et al. 2019); the share is what is
    left of the area, in whole pixels."""

    kind: Literal["cutmix"] = "cutmix"
    alpha: PositiveFloat = 1.0
    """The area that is left ~ Beta(alpha, alpha), before the box is clipped at the border."""
    probability: Probability = 0.5
    """Of a pair being mixed (1 for ImageNet)."""

    def blend(self, own: Images, other: Images, random: np.random.Generator, places: slice, batch: int) -> Mixed:
        boxes = _boxes(random, (batch + 1) // 2, self.alpha, self.probability, *own.images.shape[2:])
        return _paste(own, other, _of_pairs(boxes, batch, alone=0)[places])


class Cmo(Mixing):
    """A box of an image is replaced by that of one from a stream that favours the minority, which so appears before
    many a background of the majority (Park et al. 2022)."""

    kind: Literal["cmo"] = "cmo"
    alpha: PositiveFloat = 1.0
    """The area that is left ~ Beta(alpha, alpha), before the box is clipped at the border."""
    probability: Probability = 0.5
    """Of an image being mixed; the paper draws once for a whole batch."""
    sampler: AnySampler = Stratified()
    """The stream of foregrounds. By default all classes equally often, as images weighted by 1 / n of their class are
    drawn: the paper's own choice."""

    @property
    def partners(self) -> AnySampler:
        return self.sampler

    @property
    def own_share(self) -> float:
        """A box of area s**2, whose middle is anywhere, keeps (s - s**2 / 4)**2 of it inside; s**2 ~ Beta."""
        area = _moment(self.alpha, 1) - _moment(self.alpha, 1.5) / 2 + _moment(self.alpha, 2) / 16
        return 1 - self.probability * area

    def blend(self, own: Images, other: Images, random: np.random.Generator, places: slice, batch: int) -> Mixed:
        boxes = _boxes(random, batch, self.alpha, self.probability, *own.images.shape[2:])
        return _paste(own, other, boxes[places])


AnyMixing = Annotated[Unmixed | Mixup | CutMix | Cmo, Field(discriminator="kind")]


def _moment(alpha: float, power: float) -> float:
    """Mean of x ** power, where x ~ Beta(alpha, alpha)."""
    return exp(lgamma(alpha + power) + lgamma(2 * alpha) - lgamma(alpha) - lgamma(2 * alpha + power))


def neighbours(own: Images) -> Images:
    """The other one of each pair; an odd last image is its own."""
    import torch

    n = len(own.labels)
    other = (torch.arange(n, device=own.labels.device) ^ 1).clamp_max(n - 1)
    return Images(own.images[other], own.labels[other], own.cells[other])


def _of_pairs(drawn: np.ndarray, batch: int, alone: float) -> np.ndarray:
    """What was drawn for each pair, for each image of the batch; an odd last image has `alone`."""
    each = np.repeat(drawn, 2, axis=0)[:batch]
    each[batch - batch % 2 :] = alone
    return each


def _boxes(random: np.random.Generator, n: int, alpha: float, probability: float, height: int, width: int) -> Ints:
    """Top, bottom, left and right of n boxes, [n, 4], in pixels, clipped; empty for those that are not mixed."""
    side = np.sqrt(1 - random.beta(alpha, alpha, n))
    size = (np.array([[height], [width]]) * side).astype(np.int64)  # [2, n]
    first = random.integers(0, [[height], [width]], (2, n)) - size // 2  # the middle is anywhere
    size *= random.random(n) < probability
    edges = np.stack((first, first + size), 1).clip(0, [[[height]], [[width]]])  # [2, 2, n]
    return edges.reshape(4, n).T


def _sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """On the device, which nobody waits for."""
    import torch

    here = torch.from_numpy(np.ascontiguousarray(numbers))
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def _paste(own: Images, other: Images, boxes: Ints) -> Mixed:
    """The images with a box of the other, [B, 4], in each."""
    import torch

    device, (height, width) = own.images.device, own.images.shape[2:]
    top, bottom, left, right = _sent(boxes, device).T[:, :, None]
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    inside = ((top <= y) & (y < bottom))[:, None, :, None] & ((left <= x) & (x < right))[:, None, None]
    share = 1 - (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (height * width)
    images = torch.where(inside, other.images, own.images)
    return Mixed(images, _sent(share, device).float(), other.labels, other.cells)
