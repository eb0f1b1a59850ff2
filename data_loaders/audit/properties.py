"""Simple properties of an image, and whether they tell its class: a model may learn those in place of the object."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from data_loaders.audit.associations import Floats
from data_loaders.decode import Pixels, decode
from data_loaders.formats.header import PIXEL_CAP

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


PROPERTIES = (
    Property("brightness", "mean luma", True),
    Property("contrast", "standard deviation of luma", True),
    Property("red_green", "log of mean red over mean green", True),
    Property("blue_green", "log of mean blue over mean green", True),
    Property("border_brightness", "mean luma of the border", False),
    Property("border_contrast", "standard deviation of the border's luma", False),
    Property("border_red_green", "log of the border's red over its green", False),
    Property("border_blue_green", "log of the border's blue over its green", False),
    Property("off_centre", "distance from the centre of what differs from the border", False),
    Property("aspect", "log of width over height", False),
    Property("pixels", "log of width times height", False),
    Property("bytes_per_pixel", "log of bytes of the file for each pixel", True),
)


def measure(content: bytes, pixel_cap: int = PIXEL_CAP) -> Floats:
    """The PROPERTIES of an image file, [P]. Raises Undecodable."""
    pixels = decode(content, pixel_cap)
    height, width = pixels.shape[:2]
    small = reduced(pixels).astype(np.float32)
    edge = border(*small.shape[:2])
    file = np.log([width / height, width * height, len(content) / (width * height)])
    return np.concatenate([_light(small.reshape(-1, 3)), _light(small[edge]), [off_centre(small, edge)], file])


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


def _light(pixels: np.ndarray) -> Floats:
    """Brightness, contrast and both logs of colour of pixels [M, 3], each one raised by 1 so that black has a log."""
    luma, (red, green, blue) = pixels @ LUMA, np.log(pixels.mean(0, dtype=np.float64) + 1)
    return np.array([luma.mean(), luma.std(), red - green, blue - green])
