"""What alters the pixels of an image in its place: operations, the published policies that choose them, colour jitter
and cutout.

Images are uint8, [size, size, 3], in and out, and are never changed themselves. Operations on 32 x 32 pixels take
microseconds, so most are arrays and tables: to Pillow and back costs more than the work. They agree with it to the bit.
"""

from collections.abc import Callable
from functools import cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, PositiveInt

from data_loaders.decode import Pixels
from data_loaders.settings import Settings

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Floats = NDArray[np.float32]

MEAN = (124, 116, 104)
"""Mean colour of ImageNet, which networks bring to about 0. It fills what an operation brings in from outside, as the
mean colour does in the policies' own code."""
LEVELS = np.arange(256, dtype=np.float32)
LUMA = np.array([19595, 38470, 7471], np.float32) / 65536
"""Of red, green and blue in grey (ITU-R 601-2), as Pillow rounds them: all sums with them are exact."""


class Operation(NamedTuple):
    """An operation, and its amounts at strengths 0 and 1; a signed one goes as often the other way."""

    apply: Callable[[Pixels, float], Pixels]
    weakest: float = 0.0
    strongest: float = 0.0
    signed: bool = False

    def __call__(self, image: Pixels, strength: float, negative: bool) -> Pixels:
        amount = self.weakest + (self.strongest - self.weakest) * strength
        return self.apply(image, -amount if self.signed and negative else amount)


def identity(image: Pixels, _: float) -> Pixels:
    """As it is."""
    return image


def shear_x(image: Pixels, slope: float) -> Pixels:
    """Each row moved left by `slope` times its place."""
    return _affine(image, (1.0, slope, 0.0, 0.0, 1.0, 0.0))


def shear_y(image: Pixels, slope: float) -> Pixels:
    """Each column moved up by `slope` times its place."""
    return _affine(image, (1.0, 0.0, 0.0, slope, 1.0, 0.0))


def translate_x(image: Pixels, pixels: float) -> Pixels:
    """Moved right, by whole pixels."""
    return translate_y(image.transpose(1, 0, 2), pixels).transpose(1, 0, 2)


def translate_y(image: Pixels, pixels: float) -> Pixels:
    """Moved down, by whole pixels."""
    by, size = int(pixels), image.shape[0]
    blank = np.full((min(abs(by), size), *image.shape[1:]), MEAN, np.uint8)
    return np.concatenate((blank, image[: max(size - by, 0)]) if by > 0 else (image[-by:], blank))


def rotate(image: Pixels, degrees: float) -> Pixels:
    """Turned counter-clockwise about its centre."""
    return np.asarray(Image.fromarray(image).rotate(degrees, fillcolor=MEAN))


def brightness(image: Pixels, change: float) -> Pixels:
    """1 + `change` times as far from black."""
    return _away(LEVELS, np.float32(0), change).take(image)


def contrast(image: Pixels, change: float) -> Pixels:
    """1 + `change` times as far from the mean of its grey."""
    return _away(LEVELS, np.floor(_grey(image).mean(dtype=np.float64) + 0.5).astype(np.float32), change).take(image)


def saturation(image: Pixels, change: float) -> Pixels:
    """1 + `change` times as far from grey, pixel by pixel."""
    return _away(image.astype(np.float32), _grey(image)[:, :, None], change)


def sharpness(image: Pixels, change: float) -> Pixels:
    """1 + `change` times as far from the image that is smoothed within its border."""
    wide = image.astype(np.uint16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]  # weights 1, and 5 in the middle
    smooth = image.astype(np.float32)
    smooth[1:-1, 1:-1] = (sums + 6) // 13
    return _away(image.astype(np.float32), smooth, change)


def posterize(image: Pixels, bits: float) -> Pixels:
    """Only the highest bits of each value, 1 to 8."""
    return image & np.uint8(256 - 2 ** (8 - round(bits)))


def solarize(image: Pixels, threshold: float) -> Pixels:
    """Values from `threshold` on, a share of all values, are inverted."""
    return np.where(256 * threshold > LEVELS, LEVELS, 255 - LEVELS).astype(np.uint8).take(image)


def autocontrast(image: Pixels, _: float = 0.0) -> Pixels:
    """Each channel stretched from its least and greatest value to 0 and 255."""

    def table(channel: Pixels) -> Pixels:
        least, most = int(channel.min()), int(channel.max())
        scale = 255.0 / (most - least) if most > least else 1.0
        offset = -least * scale if most > least else 0.0
        return np.clip(LEVELS.astype(np.float64) * scale + offset, 0, 255).astype(np.uint8)

    return _by_channel(image, table)


def equalize(image: Pixels, _: float = 0.0) -> Pixels:
    """Each channel mapped such that its values come about equally often."""

    def table(channel: Pixels) -> Pixels:
        counts = np.bincount(channel.ravel(), minlength=256)
        step = (channel.size - counts[channel.max()]) // 255
        below = np.cumsum(counts) - counts
        return (np.minimum((step // 2 + below) // step, 255) if step else LEVELS).astype(np.uint8)

    return _by_channel(image, table)


def invert(image: Pixels, _: float = 0.0) -> Pixels:
    """255 less each value."""
    return 255 - image


def hue(image: Pixels, turn: float) -> Pixels:
    """Each hue moved round the circle by this share of it."""
    parts = np.array(Image.fromarray(image).convert("HSV"))
    parts[:, :, 0] += np.uint8(int(turn * 255) % 256)
    return np.asarray(Image.fromarray(parts, "HSV").convert("RGB"))


@cache
def operations(shear: float, move: float, turn: float, change: float, bits: int) -> dict[str, Operation]:
    """The 14 operations that RandAugment and TrivialAugment choose from, up to these amounts: a slope, pixels, degrees,
    a factor less 1, and bits that are kept."""
    return {
        "identity": Operation(identity),
        "shear_x": Operation(shear_x, 0.0, shear, True),
        "shear_y": Operation(shear_y, 0.0, shear, True),
        "translate_x": Operation(translate_x, 0.0, move, True),
        "translate_y": Operation(translate_y, 0.0, move, True),
        "rotate": Operation(rotate, 0.0, turn, True),
        "brightness": Operation(brightness, 0.0, change, True),
        "saturation": Operation(saturation, 0.0, change, True),
        "contrast": Operation(contrast, 0.0, change, True),
        "sharpness": Operation(sharpness, 0.0, change, True),
        "posterize": Operation(posterize, 8, bits),
        "solarize": Operation(solarize, 1.0, 0.0),
        "autocontrast": Operation(autocontrast),
        "equalize": Operation(equalize),
    }


def narrow(size: int) -> dict[str, Operation]:
    """With the amounts of AutoAugment, which RandAugment took over."""
    return operations(0.3, 150 / 331 * size, 30.0, 0.9, 4)


def wide() -> dict[str, Operation]:
    """With those of TrivialAugment Wide."""
    return operations(0.99, 32.0, 135.0, 0.99, 2)


class NoPolicy(Settings):
    """No operation."""

    kind: Literal["none"] = "none"

    def __call__(self, image: Pixels, random: np.random.Generator) -> Pixels:
        return image


class RandAugment(Settings):
    """Some operations of 14, chosen evenly, all of one magnitude (Cubuk et al. 2020).

    Draws two numbers for each: which, and to which side.
    """

    kind: Literal["rand_augment"] = "rand_augment"
    operations: PositiveInt = 2
    """How many, one after the other."""
    magnitude: Annotated[float, Field(ge=0.0, le=30.0)] = 9.0
    """0 to 30: none to full strength."""

    def __call__(self, image: Pixels, random: np.random.Generator) -> Pixels:
        choices = list(narrow(image.shape[0]).values())
        for choice, side in random.random((self.operations, 2)).tolist():
            image = choices[int(choice * len(choices))](image, self.magnitude / 30, side < 0.5)
        return image


class TrivialAugment(Settings):
    """One operation of 14, chosen evenly, of a magnitude chosen evenly: TrivialAugment Wide (Müller & Hutter 2021).

    Draws three numbers: which, how strong, to which side.
    """

    kind: Literal["trivial_augment"] = "trivial_augment"

    def __call__(self, image: Pixels, random: np.random.Generator) -> Pixels:
        choices = list(wide().values())
        choice, strength, side = random.random(3).tolist()
        return choices[int(choice * len(choices))](image, int(strength * 31) / 30, side < 0.5)


class AutoAugment(Settings):
    """One of the 25 pairs of operations that were found for CIFAR-10 (Cubuk et al. 2019).

    Draws five numbers: which pair, and of each operation whether at all, and to which side.
    """

    kind: Literal["auto_augment"] = "auto_augment"

    def __call__(self, image: Pixels, random: np.random.Generator) -> Pixels:
        known = narrow(image.shape[0]) | {"invert": Operation(invert)}
        pair, *rest = random.random(5).tolist()
        chances = zip(PAIRS[int(pair * len(PAIRS))], rest[::2], rest[1::2], strict=True)
        for (name, probability, level), whether, side in chances:
            image = known[name](image, level / 9, side < 0.5) if whether < probability else image
        return image


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

    If any is on, draws the four changes, then the order.
    """

    brightness: Share = 0.0
    """Greatest change, to either side, of the factor 1: of the distance from black."""
    contrast: Share = 0.0
    """As much of the distance from the mean grey."""
    saturation: Share = 0.0
    """As much of the distance of each pixel from its grey."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Greatest turn to either side, as a share of the colour circle."""

    def __call__(self, image: Pixels, random: np.random.Generator) -> Pixels:
        most = (self.brightness, self.contrast, self.saturation, self.hue)
        if not any(most):
            return image
        changes = (random.uniform(-1, 1, 4) * most).tolist()
        for place in random.permutation(4).tolist():
            image = (brightness, contrast, saturation, hue)[place](image, changes[place]) if most[place] else image
        return image


def cut_out(image: Pixels, side: int, colour: tuple[int, int, int], random: np.random.Generator) -> Pixels:
    """With a square of one colour about a random pixel, clipped at the border. Draws that pixel: row, then column."""
    top, left = (random.integers(0, image.shape[:2]) - side // 2).tolist()
    found = image.copy()
    found[max(top, 0) : top + side, max(left, 0) : left + side] = colour
    return found


def _affine(image: Pixels, back: tuple[float, ...]) -> Pixels:
    """The nearest pixel, at the place where `back` says that each came from."""
    whole = Image.fromarray(image)
    return np.asarray(whole.transform(whole.size, Image.Transform.AFFINE, back, fillcolor=MEAN))


def _grey(image: Pixels) -> Floats:
    """[size, size], whole numbers."""
    return np.floor(image.astype(np.float32) @ LUMA + np.float32(0.5))


def _away(values: Floats, base: Floats | np.float32, change: float) -> Pixels:
    """1 + `change` times as far from `base`, in the single precision of Pillow, so that bits agree."""
    found = values - base  # from here on in place: large arrays cost more to allocate than to fill
    found *= np.float32(1 + change)
    found += base
    return np.clip(found, 0, 255, out=found).astype(np.uint8)


def _by_channel(image: Pixels, table: Callable[[Pixels], Pixels]) -> Pixels:
    """Each channel mapped by the table, [256], that is made of it."""
    found = np.empty(image.shape, np.uint8)
    for place in range(3):
        channel = np.ascontiguousarray(image[:, :, place])
        found[:, :, place] = table(channel).take(channel)
    return found
