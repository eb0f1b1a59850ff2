"""What alters the pixels of images in their places: operations of torch on batches, on any device.

Images are uint8, [B, 3, size, size], and here lie one channel after the other, as operations are fastest. An image
becomes the same alone, in any batch and on any device: arithmetic is that of whole numbers, or one IEEE operation in a
kernel, since a device may round two at once. But for the interpolation of `turned` it is that of Pillow, to the bit.
The host decides what each image meets, so it never waits for a device. To call torch costs as much as to alter one
small image: hence few calls, each for many images.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.policies import MEAN, Floats, Ints, Operation, Steps

MANY, SOME = 2**20, 2**17
"""Values that a CPU takes at a time, so that what lies between two operations stays in its caches and in memory that it
has: some, where there is much between. New memory costs more than most operations."""
POINT = 16
"""Bits behind the point of a coordinate, as in Pillow; so sizes are below 2**14."""
FRACTION = 11
"""Bits of a weight of the interpolation: two of them and the 8 of a value fit 31."""


class Family(NamedTuple):
    """Operations that are done as one, from the first up to that of the next family."""

    first: Operation
    numbers: Callable[[Ints, Floats, int], NDArray[np.generic]]
    """What the device is told, [B, …], from operations [B], amounts [B] and the size of the images."""
    work: Callable[[Tensor, Ints, Tensor], Tensor]
    """What becomes of images [B, 3, size, size] by operations [B], which ascend, and those numbers."""
    values: int = MANY
    """That a CPU takes at a time."""


def planar(images: Tensor) -> Tensor:
    """With one channel after the other in memory."""
    return images.contiguous()


def laid_out(images: Tensor, like: Tensor) -> Tensor:
    """In memory as those are. Channel by channel: the interleaving of torch takes twice as long on a CPU."""
    if like.is_contiguous():
        return images
    found = torch.empty_like(like)
    for place, channel in zip(found.unbind(1), images.unbind(1), strict=True):
        place.copy_(channel)
    return found


def turned(images: Tensor, degrees: Floats) -> Tensor:
    """Turned counter-clockwise about the centre, bilinear; the corners that appear mirror the picture, so that black
    corners do not become a feature. `degrees` is [B]."""
    radians = np.radians(degrees)
    turns = _to(images, np.rint(np.stack([np.cos(radians), np.sin(radians)], 1) * 2**POINT).astype(np.int32))
    return torch.cat([_turned(images[here], turns[here]) for here in _pieces(images, 0, len(images), SOME)])


def done(images: Tensor, steps: Steps) -> Tensor:
    """After all steps. In each turn images lie in the order of their operations, so that each has a slice of them."""
    if not steps.operations.size:
        return images
    at = np.arange(len(images))
    for operations, amounts in zip(steps.operations.T, steps.amounts.T, strict=True):
        order = np.argsort(operations[at], kind="stable")
        at = at[order]
        images = _after_turn(images.index_select(0, _to(images, order)), operations[at], amounts[at])
    return images.index_select(0, _to(images, np.argsort(at)))


def cut_out(images: Tensor, corners: Ints, side: int, colour: tuple[int, int, int]) -> Tensor:
    """With a square of one colour, clipped at the border; `corners` are its top and left, [B, 2]."""
    at = np.arange(images.shape[-1])
    inside = (at >= corners[:, :, None]) & (at < corners[:, :, None] + side)
    down, across = _to(images, inside.astype(np.uint8)).unbind(1)
    hole = (down.unsqueeze(2) * across.unsqueeze(1)).unsqueeze(1)
    return (images * (1 - hole)).add_(hole * _colour(images, colour))


def _after_turn(images: Tensor, operations: Ints, amounts: Floats) -> Tensor:
    """With one operation for each; `operations` ascend."""
    starts = [*operations.searchsorted([family.first for family in FAMILIES]).tolist(), len(images)]
    found = [images[: starts[0]]]
    for family, (start, end) in zip(FAMILIES, pairwise(starts), strict=True):
        if start < end:
            told = _to(images, family.numbers(operations[start:end], amounts[start:end], images.shape[-1]))
            for here in _pieces(images, start, end, family.values):
                numbers = told[here.start - start : here.stop - start]
                found.append(family.work(images[here], operations[here], numbers))
    return torch.cat(found)


def _pieces(images: Tensor, start: int, end: int, values: int) -> list[slice]:
    """Of images start … end-1; a CPU takes so many values at a time, or one image if that has more."""
    many = end - start if images.device.type != "cpu" else max(1, values // images[0].numel())
    return [slice(at, min(at + many, end)) for at in range(start, end, many)]


def _back(operations: Ints, amounts: Floats, size: int) -> NDArray[np.int32]:
    """How the places that pixels came from, of x and of y, follow from those they go to: factors of x and y, and what
    is added, [B, 2, 3], in fixed point; the image begins at place 1, 1."""
    kinds = np.arange(Operation.SHEAR_X, Operation.ROTATE + 1)[:, None]
    shear_x, shear_y, right, down, degrees = np.where(operations == kinds, amounts, 0.0)
    turn, middle = np.radians(degrees % 360), size / 2
    cos, sin = np.cos(turn).round(15), np.sin(turn).round(15)
    back = np.empty((len(amounts), 2, 3))
    back[:, 0, 0], back[:, 0, 1], back[:, 0, 2] = cos, shear_x - sin, middle - middle * (cos - sin) - np.trunc(right)
    back[:, 1, 0], back[:, 1, 1], back[:, 1, 2] = shear_y + sin, cos, middle - middle * (cos + sin) - np.trunc(down)
    back[:, :, 2] += 1 + back[:, :, 0] * 0.5 + back[:, :, 1] * 0.5
    return np.floor(back * 2**POINT + 0.5).astype(np.int32)


def _moved(images: Tensor, _: Ints, back: Tensor) -> Tensor:
    """The nearest pixel at the place where each came from; the mean colour where that lies outside."""
    count, size = len(images), images.shape[-1]
    wide = _colour(images, MEAN).expand(count, 3, size + 2, size + 2).contiguous()
    wide[:, :, 1:-1, 1:-1] = images
    at = torch.arange(size, dtype=torch.int32, device=images.device)
    along, across, first = back.unsqueeze(3).unbind(2)
    places = (along * at).unsqueeze(2) + (across * at).add_(first).unsqueeze(3)
    places >>= POINT
    x, y = places.clamp_(0, size + 1).unbind(1)
    return _at(wide, x.add_(y, alpha=size + 2)).view_as(images)


def _factors(_: Ints, amounts: Floats, size: int) -> NDArray[np.float32]:
    return (1 + amounts).astype(np.float32)[:, None, None, None]


def _away(images: Tensor, operations: Ints, factors: Tensor) -> Tensor:
    """So many times as far from black, from grey, from the mean grey or from the smoothed image."""
    base = torch.zeros(images.shape, device=images.device)
    starts = np.searchsorted(operations, [Operation.SATURATION, Operation.CONTRAST, Operation.SHARPNESS]).tolist()
    saturation, contrast, sharpness = starts
    if saturation < sharpness:
        grey = _grey(images[saturation:sharpness])
        base[saturation:contrast] = grey[: contrast - saturation]
        base[contrast:sharpness] = _mean(grey[contrast - saturation :])
    if sharpness < len(images):
        _smooth(images[sharpness:], base[sharpness:])
    return _bytes(images.float().sub_(base).mul_(factors).add_(base).clamp_(0, 255))


def _grey(images: Tensor) -> Tensor:
    """Whole numbers (ITU-R 601-2), [B, 1, size, size]."""
    red, green, blue = images.int().split(1, 1)
    grey = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(2**15)
    grey >>= 16
    return grey


def _mean(grey: Tensor) -> Tensor:
    """A whole number for each, [B, 1, 1, 1]."""
    return _over(grey.sum((1, 2, 3), keepdim=True).double(), grey.shape[-1] ** 2).add_(0.5).floor_()


def _smooth(images: Tensor, found: Tensor) -> None:
    """The mean of the 3 x 3 pixels about each, the middle 5 times; at the border as it is.

    All values are one long row here, whose neighbours above and below are as far away everywhere: wrong at the border
    only.
    """
    size = images.shape[-1]
    if size < 3:
        found.copy_(images)
        return
    row, inside = images.flatten().short(), slice(size + 1, -size - 1)
    across = row[:-2] + row[1:-1] + row[2:]
    sums = (across[: -2 * size] + across[size:-size]).add_(across[2 * size :]).add_(row[inside], alpha=4)
    found.view(-1)[inside] = sums.float().mul_(1 / 13).add_(0.5).floor_()
    found[:, :, :: size - 1] = images[:, :, :: size - 1]
    found[:, :, :, :: size - 1] = images[:, :, :, :: size - 1]


def _kept(_: Ints, bits: Floats, size: int) -> NDArray[np.uint8]:
    return (256 - 2 ** (8 - np.rint(bits))).astype(np.uint8)[:, None, None, None]


def _posterized(images: Tensor, _: Ints, kept: Tensor) -> Tensor:
    return images & kept


def _bounds(_: Ints, shares: Floats, size: int) -> NDArray[np.uint8]:
    """The least value that is inverted, and 255 if there is any, [B, 2, 1, 1, 1]."""
    least = np.ceil(256 * shares)
    return np.stack([np.minimum(least, 255), 255 * (least < 256)], 1).astype(np.uint8)[:, :, None, None, None]


def _solarized(images: Tensor, _: Ints, bounds: Tensor) -> Tensor:
    least, flip = bounds.unbind(1)
    return torch.ge(images, least, out=torch.empty_like(images)).mul_(flip).bitwise_xor_(images)


def _nothing(_: Ints, amounts: Floats, size: int) -> Floats:
    return amounts


def _mapped(images: Tensor, operations: Ints, _: Tensor) -> Tensor:
    """Each channel by a table that is made of it: stretched, or made even."""
    count, stretches = len(images), int(np.searchsorted(operations, Operation.EQUALIZE))
    values = images.flatten(2)
    most = values.amax(2, keepdim=True)
    first = torch.arange(0, 768 * count, 256, dtype=torch.int32, device=images.device)
    places = values.int().add_(first.view(count, 3, 1))
    even = places[stretches:].flatten()
    counts = torch.zeros((count, 3, 256), dtype=torch.int32, device=images.device)
    counts.view(-1).index_add_(0, even, torch.ones_like(first[:1]).expand(len(even)))
    tables = (
        _stretch(values[:stretches], most[:stretches]),
        _even(counts[stretches:], most[stretches:], values.shape[2]),
    )
    return torch.cat(tables).flatten().index_select(0, places.flatten()).view_as(images)


def _stretch(values: Tensor, most: Tensor) -> Tensor:
    """Tables [B, 3, 256] that bring the least and the greatest of the values [B, 3, P] to 0 and 255."""
    least = values.amin(2, keepdim=True).double()
    span = most.double().sub_(least)
    is_wide = span.sign()  # one value only stays as it is: as if there were all
    scale = torch.full_like(span, 255).div_(span.add_(1 - is_wide, alpha=255))
    levels = torch.arange(256, dtype=torch.float64, device=values.device)
    return _bytes((levels * scale).sub_(least.mul_(scale).mul_(is_wide)).clamp_(0, 255))


def _even(counts: Tensor, most: Tensor, total: int) -> Tensor:
    """Tables [B, 3, 256] after which values come about equally often; `counts` are those of each value, alike, and
    `most` is the greatest value there is."""
    step = (total - counts.gather(2, most.long())).div_(255, rounding_mode="floor")
    below = counts.cumsum(2).sub_(counts).add_(step // 2)
    found = below.double().div_(step.clamp(min=1)).floor_().clamp_(max=255)
    levels = torch.arange(256, dtype=torch.float64, device=counts.device)
    return _bytes(torch.where(step > 0, found, levels))


def _shifts(_: Ints, turns: Floats, size: int) -> NDArray[np.uint8]:
    return (np.trunc(turns * 255) % 256).astype(np.uint8)[:, None, None]


def _hued(images: Tensor, _: Ints, shifts: Tensor) -> Tensor:
    """By way of hue, saturation and value in 8 bits each, in the precisions of Pillow."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    span = value - torch.minimum(torch.minimum(red, green), blue)
    hue = _hue(red, green, blue, value, span).add_(shifts)
    saturation = _over(_bytes((span.float() / value.clamp(min=1)).double().mul_(255)).float(), 255)
    place = _over(hue.double().mul_(6), 255)
    sector = place.floor()
    part, is_odd = place.sub_(sector).float(), sector % 2
    odd, even = (saturation * part).double(), part.double().neg_().add_(1).mul_(saturation)
    between = _share(value, odd.mul_(is_odd).add_(even.mul_(is_odd.neg_().add_(1))))
    low, sector = _share(value, saturation.double()), _bytes(sector)
    return torch.stack([_mixed(sector + turn, value, between, low) for turn in (0, 4, 2)], 1)


def _hue(red: Tensor, green: Tensor, blue: Tensor, value: Tensor, span: Tensor) -> Tensor:
    """255ths of the circle, uint8."""
    is_red = _same(red, value)
    is_green = _same(green, value).mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    red, green, blue = value - red, value - green, value - blue
    plus = (is_red * blue).add_(is_green * red).add_(is_blue * green)
    minus = (is_red * green).add_(is_green * blue).add_(is_blue * red)
    span = span.clamp(min=1).float()
    third = (2 * is_green + 4 * is_blue).double().add_(plus / span).sub_(minus / span).float()
    return _bytes(_over(third.double(), 6).add_(1).frac_().float().double().mul_(255))


def _share(value: Tensor, gone: Tensor) -> Tensor:
    """What is left of a value, uint8, once a share of it has gone; uses the share up."""
    return _bytes(gone.neg_().add_(1).mul_(value).add_(0.5))


def _mixed(sector: Tensor, high: Tensor, between: Tensor, low: Tensor) -> Tensor:
    """A colour that is high in the first and the last of six sectors, and low in the two in the middle."""
    sector = sector.sub_(torch.ge(sector, 6, out=torch.empty_like(sector)), alpha=6)
    apart = torch.minimum(sector, 5 - sector)
    return (high * _same(apart, 0)).add_(between * _same(apart, 1)).add_(low * _same(apart, 2))


def _same(one: Tensor, other: Tensor | int) -> Tensor:
    """1 or 0, uint8: to make truth values takes a CPU 16 times as long."""
    return torch.eq(one, other, out=torch.empty_like(one))


def _over(values: Tensor, divisor: float) -> Tensor:
    """Divided, in place. By a plain number a device would multiply with the reciprocal, which is rounded."""
    return values.div_(torch.full((), divisor, dtype=values.dtype, device=values.device))


def _bytes(values: Tensor) -> Tensor:
    """Values in 0 … 255, cut to whole numbers. By way of 16 bits: straight to 8 takes a CPU four times as long."""
    return values.short().to(torch.uint8)


def _turned(images: Tensor, turns: Tensor) -> Tensor:
    """By whole numbers; `turns` are cosines and sines, [B, 2]. Places are doubled, since a pixel lies half a one in."""
    size, top = images.shape[-1], images.shape[-1] - 1
    cos, sin = turns.unsqueeze(2).unbind(1)
    at = 2 * torch.arange(size, dtype=torch.int32, device=images.device) - top
    x = (cos * at).unsqueeze(1) - (sin * at).sub_(top << POINT).unsqueeze(2)
    y = (sin * at).unsqueeze(1) + (cos * at).add_(top << POINT).unsqueeze(2)
    (left, right, to_right), (above, below, down) = _between(x, size), _between(y, size)
    upper, lower = (
        _mix(_at(images, left + row), _at(images, row.add_(right)), to_right) for row in (above * size, below * size)
    )
    return (_mix(upper, lower, down).add_(2 ** (2 * FRACTION - 1)) >> 2 * FRACTION).to(torch.uint8).view_as(images)


def _between(places: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels before and after each place, and how far it lies between, [B, 1, size**2]. Beyond the border are the
    pixels that mirror those within."""
    before = places >> POINT + 1
    weight = ((places >> POINT + 1 - FRACTION) & (2**FRACTION - 1)).flatten(1).unsqueeze(1)
    return _inside(before, size), _inside(before + 1, size), weight


def _inside(at: Tensor, size: int) -> Tensor:
    at = at ^ (at >> 31)  # -1 - at, where that is less than 0
    return torch.minimum(at, 2 * size - 1 - at)


def _mix(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Of whole numbers, times 2**FRACTION."""
    first = first.int()
    return (second.int() - first).mul_(weight).add_(first, alpha=2**FRACTION)


def _at(images: Tensor, places: Tensor) -> Tensor:
    """Values at places [B, size, size] of each channel, [B, 3, size**2]."""
    return images.flatten(2).gather(2, places.flatten(1).long().unsqueeze(1).expand(-1, 3, -1))


def _to(images: Tensor, numbers: NDArray[np.generic]) -> Tensor:
    """To the device of the images, without waiting for it."""
    return torch.from_numpy(numbers).to(images.device, non_blocking=True)


def _colour(images: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """[1, 3, 1, 1], uint8."""
    return _to(images, np.array(colour, np.uint8)[None, :, None, None])


FAMILIES = (
    Family(Operation.SHEAR_X, _back, _moved),
    Family(Operation.BRIGHTNESS, _factors, _away),
    Family(Operation.POSTERIZE, _kept, _posterized),
    Family(Operation.SOLARIZE, _bounds, _solarized),
    Family(Operation.AUTOCONTRAST, _nothing, _mapped),
    Family(Operation.HUE, _shifts, _hued, SOME),
)
