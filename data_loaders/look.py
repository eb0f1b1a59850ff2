"""What a picture looks like, in 64 bits: those of near copies differ in few (LOOKS_ALIKE), those of others in half.

As pHash (Zauner 2010), the signs of low frequencies of the grey picture, but for three things, each of which finds more
copies: a window, since captions and crops happen at the borders; the 64 lowest
frequencies of a quarter disc, not of a square; and signs about 0, not about the median, which move two bits at a time.
All is computed in whole numbers, so that a picture has the same bits on every machine.
"""

import numpy as np
from PIL import Image

SIDE = 32
"""Pixels in height and width that a picture is brought to, whatever its own are."""
FLAT = 2
"""Standard deviation of grey, of 255, below which there is nothing to be seen."""
LOOKS_ALIKE = 11
"""Bits in which near copies may differ."""


def _waves(count: int) -> np.ndarray:
    """[count, SIDE], cosines under a sine window, brought to whole numbers that add up to 0 but for the first."""
    place = np.pi * (np.arange(SIDE) + 0.5) / SIDE
    window = np.sin(place)
    waves = np.cos(np.arange(count)[:, None] * place) * window
    waves[1:] -= waves[1:].sum(1, keepdims=True) / window.sum() * window
    waves = np.rint(1024 * waves)
    waves[1:, [SIDE // 2 - 1, SIDE // 2]] -= waves[1:].sum(1, keepdims=True) / 2
    return waves


WAVES = _waves(9)
DOWN, ACROSS = np.array(sorted(np.ndindex(len(WAVES), len(WAVES)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))[1:65]).T
"""The 64 lowest frequencies but for the mean."""


def small(image: Image.Image, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    """Of SIDE pixels in height and width, from a picture of any size or a box of it: left, top, right, bottom.

    Not averaged over boxes: their ends fall on whole pixels, which moves up to 11 bits where pixels are few.
    """
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)


def look_of(grey: np.ndarray) -> int:
    """Of a small grey picture, [SIDE, SIDE], 0 … 255; 0 if it is flat."""
    pixels = grey.astype(np.float64)
    if pixels.std() < FLAT:
        return 0
    found = (WAVES @ pixels @ WAVES.T)[DOWN, ACROSS] > 0
    return int.from_bytes(np.packbits(found).tobytes(), "big")
