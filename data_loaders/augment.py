"""An image of any size -> one of the size that the model sees; in training random, as a function of (seed, position).

Flips, crops, zoom and rotation are one geometry: a box of the image, turned and mirrored, resampled to size x size.
"""

import math
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from data_loaders.decode import Pixels
from data_loaders.settings import Settings

MOST_AREA = 4.0
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one position of the training stream; two words of key, so that no two streams meet."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def centred(image: Pixels, size: int) -> Pixels:
    """The largest centred square, resampled to [size, size, 3]: what evaluation and prediction see."""
    height, width = image.shape[:2]
    side = min(height, width)
    return _resample(image, (width - side) / 2, (height - side) / 2, side, side, size)


class Plain(Settings):
    """The centred square, as evaluation sees it: no augmentation."""

    kind: Literal["plain"] = "plain"

    def __call__(self, image: Pixels, size: int, random: np.random.Generator) -> Pixels:
        return centred(image, size)


class Standard(Settings):
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
    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """Greatest angle, in degrees, to either side."""

    @model_validator(mode="after")
    def _ordered(self) -> "Standard":
        if self.area[0] > self.area[1] or self.aspect[0] > self.aspect[1]:
            raise ValueError("the least value stands before the greatest")
        if self.area[1] > MOST_AREA:
            raise ValueError(f"beyond an area of {MOST_AREA:g} a crop would be mirrors only")
        return self

    def __call__(self, image: Pixels, size: int, random: np.random.Generator) -> Pixels:
        left, top, width, height = self._box(image.shape[1], image.shape[0], random)
        if self.area[1] > 1:
            image, left, top = _mirrored(image, left, top, width, height)
        crop = _resample(image, left, top, width, height, size)
        crop = _flipped(crop, random, self.flip_horizontal, self.flip_vertical)
        angle = random.uniform(-self.rotation, self.rotation)
        return _turned(crop, angle) if angle else crop

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


class PadCrop(Settings):
    """Resized, padded, cropped back at random and flipped: the recipe for CIFAR and other small images."""

    kind: Literal["pad_crop"] = "pad_crop"
    padding: NonNegativeInt = 4
    """Black pixels added on every side, so also the greatest shift."""
    flip_horizontal: Probability = 0.5

    def __call__(self, image: Pixels, size: int, random: np.random.Generator) -> Pixels:
        whole, p = centred(image, size), self.padding
        down, right = random.integers(-p, p, size=2, endpoint=True)
        wide = np.pad(whole, ((p, p), (p, p), (0, 0)))
        shifted = wide[p - down : p - down + size, p - right : p - right + size]
        return _flipped(shifted, random, self.flip_horizontal, 0.0)


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


def _turned(image: Pixels, angle: float) -> Pixels:
    """Turned about its centre by `angle` degrees; the corners that appear mirror the picture, so that black corners do
    not become a feature."""
    size = image.shape[0]
    pad = math.ceil(size * (math.sqrt(2) - 1) / 2) + 1
    wide = Image.fromarray(np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric"))
    turned = wide.rotate(angle, Image.Resampling.BILINEAR)
    return np.asarray(turned)[pad : pad + size, pad : pad + size]
