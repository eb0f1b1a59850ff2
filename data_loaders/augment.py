"""An image of any size -> one of the size that the model sees; in training random, as a function of (seed, position).

Flips, crops, zoom and rotation are one geometry: a box of the image, turned and mirrored, resampled to size x size.
What then happens to the pixels is in `policies.py`. Random numbers are drawn in the order of what they are for: box,
flips, rotation, policy, jitter, cutout. The last four draw none where they are off.
"""

import math
from abc import abstractmethod
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from data_loaders.decode import Pixels
from data_loaders.policies import MEAN, AnyPolicy, ColourJitter, NoPolicy, cut_out
from data_loaders.settings import Settings

MOST_AREA = 4.0
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Angle = Annotated[float, Field(ge=0.0, le=180.0)]


def rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one position of the training stream; two words of key, so that no two streams meet."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def centred(image: Pixels, size: int) -> Pixels:
    """The largest centred square, resampled to [size, size, 3]: what evaluation and prediction see."""
    height, width = image.shape[:2]
    side = min(height, width)
    return _resample(image, (width - side) / 2, (height - side) / 2, side, side, size)


class Augmentation(Settings):
    """What all have: an image is brought into its place, then policy, jitter and cutout alter its pixels."""

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

    def __call__(self, image: Pixels, size: int, random: np.random.Generator) -> Pixels:
        """The image of a training step, [size, size, 3]."""
        found = self.jitter(self.policy(self.place(image, size, random), random), random)
        colour = MEAN if self.cutout_fill == "mean" else (0, 0, 0)
        return cut_out(found, self.cutout, colour, random) if self.cutout else found

    @abstractmethod
    def place(self, image: Pixels, size: int, random: np.random.Generator) -> Pixels:
        """Cropped, resampled to [size, size, 3], flipped and turned."""


class Plain(Augmentation):
    """The centred square, as evaluation sees it: nothing is moved."""

    kind: Literal["plain"] = "plain"

    def place(self, image: Pixels, size: int, random: np.random.Generator) -> Pixels:
        return centred(image, size)


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

    def place(self, image: Pixels, size: int, random: np.random.Generator) -> Pixels:
        left, top, width, height = self._box(image.shape[1], image.shape[0], random)
        if self.area[1] > 1:
            image, left, top = _mirrored(image, left, top, width, height)
        crop = _resample(image, left, top, width, height, size)
        crop = _flipped(crop, random, self.flip_horizontal, self.flip_vertical)
        return _turned(crop, random, self.rotation)

    def _box(self, width: int, height: int, random: np.random.Generator) -> tuple[float, float, float, float]:
        """Left, top, width, height of the crop, in pixels: inside the image, or around it if its area is larger. An
        aspect that does not fit is narrowed until it does."""
        zoom = random.uniform(*self.area)
        area = zoom * width * height
        aspect = math.exp(random.uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
        least, most = sorted((area / height**2, width**2 / area))
        aspect = min(max(aspect, least), most)
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        w, h = (min(w, width), min(h, height)) if zoom <= 1 else (max(w, width), max(h, height))
        return random.random() * (width - w), random.random() * (height - h), w, h


class PadCrop(Augmentation):
    """Resized, padded, cropped back at random, flipped and turned: the recipe for CIFAR and other small images."""

    kind: Literal["pad_crop"] = "pad_crop"
    padding: NonNegativeInt = 4
    """Black pixels added on every side, so also the greatest shift."""
    flip_horizontal: Probability = 0.5
    """Probability of a left-right flip."""
    rotation: Angle = 0.0
    """Greatest angle, in degrees, to either side; 15 in the recipe of BalPoE (Aimar et al. 2023)."""

    def place(self, image: Pixels, size: int, random: np.random.Generator) -> Pixels:
        whole, p = centred(image, size), self.padding
        down, right = random.integers(-p, p, size=2, endpoint=True)
        wide = np.zeros((size + 2 * p, size + 2 * p, 3), np.uint8)
        wide[p : p + size, p : p + size] = whole
        shifted = wide[p - down : p - down + size, p - right : p - right + size]
        return _turned(_flipped(shifted, random, self.flip_horizontal, 0.0), random, self.rotation)


AnyAugmentation = Annotated[Plain | Standard | PadCrop, Field(discriminator="kind")]


def _resample(image: Pixels, left: float, top: float, width: float, height: float, size: int) -> Pixels:
    """Antialiased bilinear resampling of a box, in pixels, to [size, size, 3]."""
    if (left, top) == (0, 0) and image.shape[:2] == (size, size) == (height, width):
        return image
    box = (left, top, left + width, top + height)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0))


def _mirrored(image: Pixels, left: float, top: float, width: float, height: float) -> tuple[Pixels, float, float]:
    """The image with its mirror images around it, as far as the box reaches out of it, and the corner of the box there:
    black bands would be a feature of all that is zoomed out."""
    before = math.ceil(max(0, -top)), math.ceil(max(0, -left))
    after = math.ceil(max(0, top + height - image.shape[0])), math.ceil(max(0, left + width - image.shape[1]))
    wide = np.pad(image, (*zip(before, after, strict=True), (0, 0)), mode="symmetric")
    return wide, left + before[1], top + before[0]


def _flipped(image: Pixels, random: np.random.Generator, horizontal: float, vertical: float) -> Pixels:
    across, down = random.random(2) < (horizontal, vertical)
    return image[:: -1 if down else 1, :: -1 if across else 1]


def _turned(image: Pixels, random: np.random.Generator, greatest: float) -> Pixels:
    """Turned about its centre, by `greatest` degrees at most; the corners that appear mirror the picture, so that black
    corners do not become a feature."""
    if not greatest:
        return image
    angle, size = math.radians(random.uniform(-greatest, greatest)), image.shape[0]
    cos, sin = math.cos(angle), math.sin(angle)
    pad = min(size, math.ceil(size * (abs(cos) + abs(sin) - 1) / 2) + 1)
    wide = Image.fromarray(_framed(image, pad))
    left, top = pad + size / 2 * (1 - cos + sin), pad + size / 2 * (1 - cos - sin)
    back = (cos, -sin, left, sin, cos, top)
    return np.asarray(wide.transform((size, size), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR))


def _framed(image: Pixels, p: int) -> Pixels:
    """With `p` rows and columns of its mirror images on every side, at most its own: `np.pad` takes longer to begin
    than a small image takes to turn."""
    height, width = image.shape[:2]
    wide = np.empty((height + 2 * p, width + 2 * p, 3), np.uint8)
    wide[p:-p, p:-p] = image
    wide[:p], wide[-p:] = wide[p : 2 * p][::-1], wide[-2 * p : -p][::-1]
    wide[:, :p], wide[:, -p:] = wide[:, p : 2 * p][:, ::-1], wide[:, -2 * p : -p][:, ::-1]
    return wide
