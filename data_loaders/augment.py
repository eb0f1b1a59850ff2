"""An image of any size -> one of the size that the model sees; in training random, as a function of (seed, position).

Crops, zoom, shifts and flips say how an image comes into its place, as numbers: whoever decodes it decodes no more than
that needs. Rotation, policy, jitter and cutout then alter a batch at once, on any device. Each draws random numbers of
its own, so that whether one is on changes nothing in the others.
"""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from data_loaders.decode import Pixels
from data_loaders.index import Ints
from data_loaders.policies import MEAN, AnyPolicy, ColourJitter, NoPolicy, Steps
from data_loaders.settings import Settings
from data_loaders.stream import Floats, uniform

if TYPE_CHECKING:  # settings are read where there is no torch, or no time for it
    from torch import Tensor

BOX, SHIFT, FLIPS, ROTATION, POLICY, JITTER, CUTOUT = range(7)
"""What random numbers are for."""
GRID = 256
"""Steps to a pixel in which boxes lie: a root or a power that is rounded differently elsewhere makes the same box."""
MOST_AREA = 4.0
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Angle = Annotated[float, Field(ge=0.0, le=180.0)]


class Placing(NamedTuple):
    """How B images come into their places: boxes of them are resampled to size x size, then shifted, then flipped."""

    boxes: Floats
    """Left, top, width, height in pixels of the upright image, [B, 4]; what lies outside mirrors the image."""
    shifts: Ints
    """Whole pixels down and right, [B, 2]; black comes in."""
    flips: NDArray[np.uint8]
    """[B]; bit 0 is left-right, bit 1 upside-down."""


def rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one position of the training stream; two words of key, so that no two streams meet."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def centre(widths: Ints, heights: Ints) -> Placing:
    """The largest centred squares of images: what evaluation and prediction see."""
    sides = np.minimum(widths, heights)
    boxes = np.stack([(widths - sides) / 2, (heights - sides) / 2, sides, sides], axis=1)
    return Placing(boxes, np.zeros((len(boxes), 2), np.int64), np.zeros(len(boxes), np.uint8))


def centred(image: Pixels, size: int) -> Pixels:
    """The largest centred square, resampled to [size, size, 3]."""
    height, width = np.array(image.shape[:2])[:, None]
    placing = centre(width, height)
    return placed(image, placing.boxes[0], placing.shifts[0], 0, size)


def placed(image: Pixels, box: Floats, shift: Ints, flip: int, size: int) -> Pixels:
    """One image in its place, [size, size, 3], by Pillow; box, shift and flip as in `Placing`, of one image."""
    left, top, width, height = box.tolist()
    if min(left, top) < 0 or left + width > image.shape[1] or top + height > image.shape[0]:
        image, left, top = _mirrored(image, left, top, width, height)
    found = _shifted(_resample(image, left, top, width, height, size), *shift.tolist())
    return found[:: -1 if flip & 2 else 1, :: -1 if flip & 1 else 1]


class Augmentation(Settings):
    """What all have: an image is brought into its place, then rotation, policy, jitter and cutout alter its pixels."""

    policy: AnyPolicy = NoPolicy()
    """Operations on geometry and colours that were found to serve many data sets."""
    jitter: ColourJitter = ColourJitter()
    """Random changes of brightness, contrast, saturation and hue."""
    cutout: NonNegativeInt = 0
    """Side, in pixels, of a square about a random pixel that is blanked, clipped at the border; 0 is none (DeVries &
    Taylor 2017: 16 for CIFAR-10, 8 for CIFAR-100)."""
    cutout_fill: Literal["mean", "black"] = "mean"
    """Of the square: the mean colour, about 0 for the network, as published; or black, as in recipes that cut out
    before they normalise."""

    @abstractmethod
    def place(self, widths: Ints, heights: Ints, size: int, seed: int, positions: Ints) -> Placing:
        """Of upright images, [B] each, at positions of the training stream."""

    @property
    def most_turn(self) -> float:
        """Greatest angle of a rotation to either side, in degrees."""
        return 0.0

    @property
    def alters(self) -> bool:
        """Whether pixels are altered once they are in their places."""
        return bool(self.most_turn or self.cutout or self.jitter.is_on or not isinstance(self.policy, NoPolicy))

    def alter(self, images: "Tensor", seed: int, positions: Ints) -> "Tensor":
        """Images in their places, uint8 [B, 3, size, size] on any device and however they lie in memory -> the same.

        What becomes of an image follows from it and (seed, position) alone: not from the batch, nor from the device.
        """
        if not (self.alters and len(images)):
            return images
        from data_loaders import pixels

        size, found = images.shape[-1], pixels.planar(images)
        if self.most_turn:
            found = pixels.turned(found, self._angles(seed, positions))
        found = pixels.done(found, self._steps(size, seed, positions))
        if self.cutout:
            colour = MEAN if self.cutout_fill == "mean" else (0, 0, 0)
            found = pixels.cut_out(found, self._corners(size, seed, positions), self.cutout, colour)
        return pixels.laid_out(found, images)

    def augmented(self, image: Pixels, size: int, seed: int, position: int) -> Pixels:
        """One image of a training step, [size, size, 3], by Pillow."""
        at = np.array([position])
        height, width = np.array(image.shape[:2])[:, None]
        placing = self.place(width, height, size, seed, at)
        found = placed(image, placing.boxes[0], placing.shifts[0], int(placing.flips[0]), size)
        if not self.alters:
            return found
        import torch

        batch = torch.from_numpy(found.transpose(2, 0, 1)[None].copy())
        return self.alter(batch, seed, at)[0].numpy().transpose(1, 2, 0)

    def _angles(self, seed: int, positions: Ints) -> Floats:
        return (2 * uniform(seed, positions, ROTATION, 1)[:, 0] - 1) * self.most_turn

    def _steps(self, size: int, seed: int, positions: Ints) -> Steps:
        """Of policy and jitter."""
        chosen = self.policy.steps(uniform(seed, positions, POLICY, self.policy.count), size)
        if not self.jitter.is_on:
            return chosen
        changes = self.jitter.steps(uniform(seed, positions, JITTER, self.jitter.count))
        return Steps(np.hstack([chosen.operations, changes.operations]), np.hstack([chosen.amounts, changes.amounts]))

    def _corners(self, size: int, seed: int, positions: Ints) -> Ints:
        """Top and left of the squares that are cut out, [B, 2]."""
        return (uniform(seed, positions, CUTOUT, 2) * size).astype(np.int64) - self.cutout // 2


class Plain(Augmentation):
    """The centred square, as evaluation sees it: nothing is moved."""

    kind: Literal["plain"] = "plain"

    def place(self, widths: Ints, heights: Ints, size: int, seed: int, positions: Ints) -> Placing:
        return centre(widths, heights)


class Standard(Augmentation):
    """A random crop of random area and aspect (zoom), flipped and turned: the recipe for photographs."""

    kind: Literal["standard"] = "standard"
    area: tuple[PositiveFloat, PositiveFloat] = (0.35, 1.0)
    """Least and greatest area of the crop, as a share of the image's: 1 is no zoom, less zooms in, more zooms out."""
    aspect: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Least and greatest width / height of the crop."""
    flip_horizontal: Probability = 0.5
    """Probability of a left-right flip."""
    flip_vertical: Probability = 0.0
    """Probability of an upside-down flip."""
    rotation: Angle = 0.0
    """Greatest angle, in degrees, to either side."""

    @model_validator(mode="after")
    def _ordered(self) -> "Standard":
        if self.area[0] > self.area[1] or self.aspect[0] > self.aspect[1]:
            raise ValueError("the least value stands before the greatest")
        if self.area[1] > MOST_AREA:
            raise ValueError(f"beyond an area of {MOST_AREA:g} a crop would be mirrors only")
        return self

    @property
    def most_turn(self) -> float:
        return self.rotation

    def place(self, widths: Ints, heights: Ints, size: int, seed: int, positions: Ints) -> Placing:
        boxes = self._boxes(widths, heights, uniform(seed, positions, BOX, 4))
        flips = _flips(seed, positions, self.flip_horizontal, self.flip_vertical)
        return Placing(boxes, np.zeros((len(boxes), 2), np.int64), flips)

    def _boxes(self, widths: Ints, heights: Ints, numbers: Floats) -> Floats:
        """[B, 4], inside the image, or around it where their area is larger, from random numbers [B, 4]. An aspect
        that does not fit is narrowed until it does."""
        zoom = self.area[0] + (self.area[1] - self.area[0]) * numbers[:, 0]
        area = zoom * widths * heights
        narrowest, widest = np.log(self.aspect)
        fits = np.sort([area / heights**2, widths**2 / area], axis=0)
        aspect = np.clip(np.exp(narrowest + (widest - narrowest) * numbers[:, 1]), *fits)
        image = np.stack([widths, heights], axis=1)
        box = np.maximum(np.rint(np.sqrt(np.stack([area * aspect, area / aspect], axis=1)) * GRID), 1) / GRID
        box = np.where(zoom[:, None] <= 1, np.minimum(box, image), np.maximum(box, image))
        return np.concatenate([np.floor(numbers[:, 2:] * (image - box) * GRID) / GRID, box], axis=1)


class PadCrop(Augmentation):
    """Resized, padded, cropped back at random, flipped and turned: the recipe for CIFAR and other small images."""

    kind: Literal["pad_crop"] = "pad_crop"
    padding: NonNegativeInt = 4
    """Black pixels added on every side, so also the greatest shift."""
    flip_horizontal: Probability = 0.5
    """Probability of a left-right flip."""
    rotation: Angle = 0.0
    """Greatest angle, in degrees, to either side; 15 in the recipe of BalPoE (Aimar et al. 2023)."""

    @property
    def most_turn(self) -> float:
        return self.rotation

    def place(self, widths: Ints, heights: Ints, size: int, seed: int, positions: Ints) -> Placing:
        places = np.floor(uniform(seed, positions, SHIFT, 2) * (2 * self.padding + 1)).astype(np.int64)
        flips = _flips(seed, positions, self.flip_horizontal, 0.0)
        return Placing(centre(widths, heights).boxes, places - self.padding, flips)


AnyAugmentation = Annotated[Plain | Standard | PadCrop, Field(discriminator="kind")]


def _flips(seed: int, positions: Ints, horizontal: float, vertical: float) -> NDArray[np.uint8]:
    return ((uniform(seed, positions, FLIPS, 2) < (horizontal, vertical)) @ (1, 2)).astype(np.uint8)


def _resample(image: Pixels, left: float, top: float, width: float, height: float, size: int) -> Pixels:
    """Antialiased bilinear resampling of a box, in pixels, to [size, size, 3]."""
    if (left, top) == (0, 0) and image.shape[:2] == (size, size) == (height, width):
        return image
    box = (left, top, left + width, top + height)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box))


def _mirrored(image: Pixels, left: float, top: float, width: float, height: float) -> tuple[Pixels, float, float]:
    """The image with its mirror images around it, as far as the box reaches out of it, and the corner of the box there:
    black bands would be a feature of all that is zoomed out."""
    before = math.ceil(max(0, -top)), math.ceil(max(0, -left))
    after = math.ceil(max(0, top + height - image.shape[0])), math.ceil(max(0, left + width - image.shape[1]))
    wide = np.pad(image, (*zip(before, after, strict=True), (0, 0)), mode="symmetric")
    return wide, left + before[1], top + before[0]


def _shifted(image: Pixels, down: int, right: int) -> Pixels:
    """By whole pixels; black comes in."""
    if not (down or right):
        return image
    found = np.zeros_like(image)
    (to_y, from_y), (to_x, from_x) = overlap(image.shape[0], down), overlap(image.shape[1], right)
    found[to_y, to_x] = image[from_y, from_x]
    return found


def overlap(size: int, by: int) -> tuple[slice, slice]:
    """Of a line of pixels that is moved by so many: where those that stay come to, and where they come from."""
    kept, to, start = max(size - abs(by), 0), max(by, 0), max(-by, 0)
    return slice(to, to + kept), slice(start, start + kept)
