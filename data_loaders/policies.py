"""The published policies that choose what alters the pixels of images: RandAugment and its kin, and colour jitter.

A policy turns uniform random numbers into `Steps`: which operation each image meets in each turn, and how much of it.
That is arithmetic of the host, over all images at once; `pixels.py` carries it out, wherever the images lie.
"""

from enum import IntEnum
from functools import cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from data_loaders.settings import Settings

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MEAN = (124, 116, 104)
"""Mean colour of ImageNet, which networks bring to about 0. It fills what an operation brings in from outside, as the
mean colour does in the policies' own code."""


class Operation(IntEnum):
    """What can be done to an image; the amount that goes with it."""

    IDENTITY = 0
    """None: as it is."""
    SHEAR_X = 1
    """Slope: each row is moved left by so many times its place."""
    SHEAR_Y = 2
    """Slope: each column is moved up by so many times its place."""
    TRANSLATE_X = 3
    """Whole pixels: moved right."""
    TRANSLATE_Y = 4
    """Whole pixels: moved down."""
    ROTATE = 5
    """Degrees: turned counter-clockwise about its centre."""
    BRIGHTNESS = 6
    """Change: 1 + as much times as far from black."""
    SATURATION = 7
    """Change of the distance from grey, pixel by pixel."""
    CONTRAST = 8
    """Change of the distance from the mean of its grey."""
    SHARPNESS = 9
    """Change of the distance from the image that is smoothed within its border."""
    POSTERIZE = 10
    """Bits of each value that are kept, the highest ones, 1 to 8."""
    SOLARIZE = 11
    """Share of all values: those from there on are inverted."""
    AUTOCONTRAST = 12
    """None: each channel is stretched from its least and greatest value to 0 and 255."""
    EQUALIZE = 13
    """None: each channel is mapped such that its values come about equally often."""
    HUE = 14
    """Share of the colour circle by which each hue is moved round it."""


class Steps(NamedTuple):
    """What is done to B images, in T turns."""

    operations: Ints
    """[B, T]"""
    amounts: Floats
    """[B, T]"""


class Range(NamedTuple):
    """An operation, and its amounts at strengths 0 and 1; a signed one goes as often the other way."""

    operation: Operation
    weakest: float = 0.0
    strongest: float = 0.0
    signed: bool = False


INVERT = Range(Operation.SOLARIZE)
"""From the least value on."""


@cache
def ranges(shear: float, move: float, turn: float, change: float, bits: int) -> tuple[Range, ...]:
    """Of the 14 operations that RandAugment and TrivialAugment choose from, up to these amounts: a slope, pixels,
    degrees, a factor less 1, and bits that are kept."""
    return (
        Range(Operation.IDENTITY),
        Range(Operation.SHEAR_X, 0.0, shear, True),
        Range(Operation.SHEAR_Y, 0.0, shear, True),
        Range(Operation.TRANSLATE_X, 0.0, move, True),
        Range(Operation.TRANSLATE_Y, 0.0, move, True),
        Range(Operation.ROTATE, 0.0, turn, True),
        Range(Operation.BRIGHTNESS, 0.0, change, True),
        Range(Operation.SATURATION, 0.0, change, True),
        Range(Operation.CONTRAST, 0.0, change, True),
        Range(Operation.SHARPNESS, 0.0, change, True),
        Range(Operation.POSTERIZE, 8, bits),
        Range(Operation.SOLARIZE, 1.0, 0.0),
        Range(Operation.AUTOCONTRAST),
        Range(Operation.EQUALIZE),
    )


def narrow(size: int) -> tuple[Range, ...]:
    """With the amounts of AutoAugment, which RandAugment took over."""
    return ranges(0.3, 150 / 331 * size, 30.0, 0.9, 4)


def wide() -> tuple[Range, ...]:
    """With those of TrivialAugment Wide."""
    return ranges(0.99, 32.0, 135.0, 0.99, 2)


def steps(among: tuple[Range, ...], choices: Ints, strengths: Floats | float, negative: NDArray[np.bool_]) -> Steps:
    """The ranges chosen, [B, T], at their strengths, to the negative side where they are signed: [B, T] each."""
    operations, weakest, more, sides = _columns(among)
    amounts = weakest[choices] + more[choices] * strengths
    return Steps(operations[choices], np.where(negative, sides[choices] * amounts, amounts))


@cache
def _columns(among: tuple[Range, ...]) -> tuple[Ints, Floats, Floats, Floats]:
    """Operations, their weakest amounts, how much more the strongest are, and the sign of the other side."""
    operation, weakest, strongest, signed = np.array(among, np.float64).T
    return operation.astype(np.int64), weakest, strongest - weakest, 1 - 2 * signed


class NoPolicy(Settings):
    """No operation."""

    kind: Literal["none"] = "none"

    @property
    def count(self) -> int:
        """Random numbers that an image takes."""
        return 0

    def steps(self, numbers: Floats, size: int) -> Steps:
        """Of images of this size from random numbers [B, count] in [0, 1)."""
        return Steps(np.zeros((len(numbers), 0), np.int64), np.zeros((len(numbers), 0)))


class RandAugment(Settings):
    """Some operations of 14, chosen evenly, all of one magnitude (Cubuk et al. 2020).

    Two numbers for each: which, and to which side.
    """

    kind: Literal["rand_augment"] = "rand_augment"
    operations: PositiveInt = 2
    """How many, one after the other."""
    magnitude: Annotated[float, Field(ge=0.0, le=30.0)] = 9.0
    """0 to 30: none to full strength."""

    @property
    def count(self) -> int:
        return 2 * self.operations

    def steps(self, numbers: Floats, size: int) -> Steps:
        among = narrow(size)
        choices = (numbers[:, ::2] * len(among)).astype(np.int64)
        return steps(among, choices, self.magnitude / 30, numbers[:, 1::2] < 0.5)


class TrivialAugment(Settings):
    """One operation of 14, chosen evenly, of a magnitude chosen evenly: TrivialAugment Wide (Müller & Hutter 2021).

    Three numbers: which, how strong, to which side.
    """

    kind: Literal["trivial_augment"] = "trivial_augment"

    @property
    def count(self) -> int:
        return 3

    def steps(self, numbers: Floats, size: int) -> Steps:
        among, (choice, strength, side) = wide(), numbers.T[:, :, None]
        return steps(among, (choice * len(among)).astype(np.int64), np.floor(strength * 31) / 30, side < 0.5)


class AutoAugment(Settings):
    """One of the 25 pairs of operations that were found for CIFAR-10 (Cubuk et al. 2019).

    Five numbers: which pair, and of each operation whether at all, and to which side.
    """

    kind: Literal["auto_augment"] = "auto_augment"

    @property
    def count(self) -> int:
        return 5

    def steps(self, numbers: Floats, size: int) -> Steps:
        known = {each.operation.name.lower(): each for each in narrow(size)} | {"invert": INVERT}
        names, probabilities, levels = zip(*(part for pair in PAIRS for part in pair), strict=True)
        choices = 2 * (numbers[:, :1] * len(PAIRS)).astype(np.int64) + [0, 1]
        strengths = np.array(levels)[choices] / 9
        found = steps(tuple(known[name] for name in names), choices, strengths, numbers[:, 2::2] < 0.5)
        happens = numbers[:, 1::2] < np.array(probabilities)[choices]
        return Steps(np.where(happens, found.operations, Operation.IDENTITY), found.amounts)


PAIRS: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("saturation", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("saturation", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("saturation", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("saturation", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("saturation", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)
"""Operation, its probability and its level, 0 to 9; twice."""

AnyPolicy = Annotated[NoPolicy | RandAugment | TrivialAugment | AutoAugment, Field(discriminator="kind")]


class ColourJitter(Settings):
    """Brightness, contrast, saturation and hue, each changed at random, in random order.

    Eight numbers: the four changes, and what their order is that of.
    """

    brightness: Share = 0.0
    """Greatest change, to either side, of the factor 1: of the distance from black."""
    contrast: Share = 0.0
    """As much of the distance from the mean grey."""
    saturation: Share = 0.0
    """As much of the distance of each pixel from its grey."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Greatest turn to either side, as a share of the colour circle."""

    @property
    def is_on(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    @property
    def count(self) -> int:
        return 8

    def steps(self, numbers: Floats) -> Steps:
        """Of images from random numbers [B, count]; a turn for each change that is on, whose order among one another
        is the same whatever else is on."""
        most = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        known = [Operation.BRIGHTNESS, Operation.CONTRAST, Operation.SATURATION, Operation.HUE]
        on = np.flatnonzero(most)
        order = on[np.argsort(numbers[:, 4 + on], axis=1, kind="stable")]
        changes = (2 * numbers[:, :4] - 1) * most
        return Steps(np.array(known)[order], np.take_along_axis(changes, order, 1))
