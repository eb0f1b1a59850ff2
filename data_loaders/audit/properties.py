"""Simple properties of an image, and whether they tell its class: a model may learn those in place of the object."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from data_loaders.audit.associations import Floats
from data_loaders.audit.finding import Bias
from data_loaders.decode import Pixels, decode
from data_loaders.formats.header import PIXEL_CAP
from data_loaders.formats.read import read_header

LONGEST = 64
"""Longest side that is measured, in pixels; larger images are averaged down."""
BORDER = 8
"""The border is this part of each side, on every side."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue (ITU-R BT.601)."""
NOISE = 8.0
"""Standard deviation that a border has at least in each channel, of 255: a flat border makes nothing infinitely far."""


class Property(NamedTuple):
    """What is measured of an image."""

    name: str
    meaning: str
    of_object: bool
    """Whether the objects of a class may have it by themselves."""
    bias: Bias = "feature"
    """What it is a sign of: the place of the object is spatial, all else is a feature that a model may learn."""


PROPERTIES = (
    Property("brightness", "mean luma", True),
    Property("contrast", "standard deviation of luma", True),
    Property("red_green", "log of mean red over mean green", True),
    Property("blue_green", "log of mean blue over mean green", True),
    Property("colourfulness", "spread and mean of the opponent colours (Hasler and Süsstrunk 2003)", True),
    Property("sharpness", "log of the variance of the Laplacian of luma", True),
    Property("border_brightness", "median luma of the border", False),
    Property("border_contrast", "median distance of the border's luma from its median", False),
    Property("border_red_green", "log of the border's median red over its median green", False),
    Property("border_blue_green", "log of the border's median blue over its median green", False),
    Property("off_centre", "distance from the centre of what differs from the border", False, "spatial"),
    Property("aspect", "log of width over height", False),
    Property("pixels", "log of width times height", False),
    Property("quality", "quality of a JPEG, 1 to 100; 0 of other files", False),
    Property("bytes_per_pixel", "log of bytes of the file for each pixel", True),
)
"""Those of the border are medians: an object that reaches into it, which those of one class may do more often, is not
to be taken for the surroundings."""


def measure(content: bytes, pixel_cap: int = PIXEL_CAP, side: int = 0) -> Floats:
    """The PROPERTIES of an image file, or of pixels with this `side`, [P]. Raises Undecodable."""
    pixels = decode(content, pixel_cap, side)
    height, width = pixels.shape[:2]
    small = reduced(pixels).astype(np.float32)
    edge = border(*small.shape[:2])
    quality = 0 if side else read_header(content, pixel_cap, whole=False).quality
    size = np.log([width / height, width * height])
    file = [*size, quality, np.log(len(content) / (width * height))]
    whole = [*_light(small.reshape(-1, 3)), _colourfulness(small.reshape(-1, 3)), _sharpness(small @ LUMA)]
    return np.array([*whole, *_surroundings(small[edge]), off_centre(small, edge), *file], np.float64)


def reduced(pixels: Pixels) -> Pixels:
    """The image, averaged down until its longest side is LONGEST."""
    if max(pixels.shape[:2]) <= LONGEST:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX, reducing_gap=None)
    return np.asarray(image)


def border(height: int, width: int) -> np.ndarray:
    """[height, width], whether a pixel belongs to the border: rarely the object, so it should not tell the class."""
    down, across = -(-height // BORDER), -(-width // BORDER)
    edge = np.ones((height, width), bool)
    edge[down : height - down, across : width - across] = False
    return edge


def off_centre(pixels: np.ndarray, edge: np.ndarray) -> float:
    """Distance from the centre, in half sides, of the mean place of what differs from the border; 0 if nothing does.

    A pixel weighs as the squared Mahalanobis distance of its colour from the colours of the border, which take
    it to be background (Zhu et al. 2014). The distance is short of the object's own, since clutter weighs too.
    """
    height, width = edge.shape
    colours = pixels[edge]
    away = (pixels - colours.mean(0)).reshape(-1, 3)
    spread = (colours - colours.mean(0)).T @ (colours - colours.mean(0)) / len(colours) + NOISE**2 * np.eye(3)
    weight = ((away @ np.linalg.inv(spread)) * away).sum(1).reshape(height, width)
    total = weight.sum()
    x = weight.sum(0) @ ((np.arange(width) + 0.5) * 2 / width - 1)
    y = weight.sum(1) @ ((np.arange(height) + 0.5) * 2 / height - 1)
    return float(np.hypot(x, y) / total) if total > 0 else 0.0


def _light(pixels: np.ndarray) -> tuple[float, ...]:
    """Brightness, contrast and both logs of colour of pixels [M, 3]."""
    luma = pixels @ LUMA
    return float(luma.mean()), float(luma.std()), *_colours(pixels.mean(0, dtype=np.float64))


def _surroundings(pixels: np.ndarray) -> tuple[float, ...]:
    """The same of the border, [M, 3], by medians."""
    luma = pixels @ LUMA
    middle = float(np.median(luma))
    return middle, float(np.median(np.abs(luma - middle))), *_colours(np.median(pixels, 0).astype(np.float64))


def _colours(rgb: np.ndarray) -> tuple[float, float]:
    """Logs of red and of blue over green, each raised by 1 so that black has a log."""
    red, green, blue = np.log(rgb + 1)
    return red - green, blue - green


def _colourfulness(pixels: np.ndarray) -> float:
    red, green, blue = pixels.astype(np.float64).T
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    return float(np.hypot(*opponents.std(1)) + 0.3 * np.hypot(*opponents.mean(1)))


def _sharpness(luma: np.ndarray) -> float:
    """Of luma [height, width] (Pech-Pacheco et al. 2000); raised by 1 so that a flat picture has a log."""
    around = np.pad(luma, 1, mode="edge")
    laplacian = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * luma
    return float(np.log(laplacian.var() + 1))
