"""Does the model read the background? Decisions about objects before the background of another image.

Xiao et al. 2021 cut objects out by hand-checked masks. A data set has none in general, so the foreground is estimated
from each image alone, and what is wrong in the estimate weakens what is found: it serves to compare classes and models.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trainer.decision.ledger import Ledger
from trainer.metrics.tally import Ints
from trainer.probe.filters import blurred, border, pixels
from trainer.probe.passes import Part, Shown, log_probabilities

NOISE = 8.0
"""Standard deviation that a border has at least in each channel, of 255, as in the audit's `off_centre`."""
CENTRED = 0.3
"""Standard deviation of the distance of an object's pixels from the centre, of the frame's side."""
FEATHER = 1 / 32
"""Standard deviation of the blur that closes holes, of the frame's side; half of it softens the seam."""
SHARES = (0.05, 0.8)
"""Share of the frame that a foreground has; others are no object before a background, and are left out."""
SEED = 2


def partners(labels: Ints) -> Ints:
    """[2, N], the place of another row of each row's class and of a row of another class, drawn at random (each class
    as often as another); -1 where there is none."""
    random = np.random.Generator(np.random.Philox(key=[SEED, len(labels)]))
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, code, n = np.unique(labels, return_inverse=True, return_counts=True)
    start, place = np.cumsum(n) - n, np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels))
    same = order[start[code] + (place - start[code] + 1) % n[code]]
    if len(n) == 1:
        return np.stack([np.where(n[code] > 1, same, -1), np.full(len(labels), -1)])
    another = (code + random.integers(1, len(n), len(labels))) % len(n)
    other = order[start[another] + (random.random(len(labels)) * n[another]).astype(np.int64)]
    return np.stack([np.where(n[code] > 1, same, -1), other])


def swaps(model: Callable[[Tensor], Tensor], ledger: Ledger) -> Part:
    """Keeps the decision about the object of each image before the background of each image beside it, [beside, B]; -1
    where either has no object or no background."""

    def part(shown: Shown) -> Ints:
        objects, *behind = (foreground(images) for images in (shown.images, *shown.beside))
        found = [
            ledger.decide(log_probabilities(model, ledger, swapped(shown.images, objects, *donors), shown.cells))
            for donors in zip(shown.beside, behind, strict=True)
        ]
        shares = torch.stack([of.mean((1, 2, 3)) for of in (objects, *behind)])
        whole = ((shares >= SHARES[0]) & (shares <= SHARES[1])).all(0).cpu().numpy()
        return np.where(whole, np.stack(found), -1)

    return part


def swapped(images: Tensor, objects: Tensor, donors: Tensor, covered: Tensor) -> Tensor:
    """Images uint8 [B, 3, S, S] where they are objects, and else the donors, likewise, whose own objects are covered by
    the mean colour of their background; both foregrounds are [B, 1, S, S] in 0 … 1."""
    bare = 1 - covered
    plain = (donors * bare).sum((2, 3), keepdim=True) / bare.sum((2, 3), keepdim=True).clamp(min=1)
    return pixels(objects * images + (1 - objects) * (covered * plain + bare * donors))


def foreground(images: Tensor) -> Tensor:
    """How far each pixel of uint8 [B, 3, S, S] belongs to the object, [B, 1, S, S] in 0 … 1; 0 where nothing is.

    The border is taken to be background (Zhu et al. 2014). What lies farther than the mean from its colours
    (Mahalanobis), counted the less the farther it is from the centre, is foreground. On the built-in images, the median
    intersection over union with the object is 0.72, and 85 % of the object is kept.
    """
    values, size = images.float(), images.shape[-1]
    colours = values[:, :, border(size).to(images.device)]
    middle = colours.mean(2, keepdim=True)
    spread = (colours - middle) @ (colours - middle).mT / colours.shape[2]
    spread += NOISE**2 * torch.eye(3, device=images.device)
    away = values.flatten(2) - middle
    distance = (away * torch.linalg.solve(spread, away)).sum(1).clamp(min=0).sqrt().view(len(images), 1, size, size)
    axis = (torch.arange(size, device=images.device) + 0.5) / size - 0.5
    near = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * CENTRED**2))
    standing_out = blurred(distance, FEATHER) * near
    return blurred((standing_out > standing_out.mean((2, 3), keepdim=True)).float(), FEATHER / 2)
