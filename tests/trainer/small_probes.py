"""What tests of probes share: a ledger that decides as a bare argmax, and images in one batch of a pass."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from trainer.decision.calibrators import Temperatures
from trainer.decision.ledger import Ledger
from trainer.probe.passes import Shown, Variants

CLASSES = ("dessert", "drink", "food")


def ledger(classes: int = 3) -> Ledger:
    """One that decides as a bare argmax does."""
    prior = np.full(classes, 1 / classes)
    return Ledger(CLASSES[:classes], prior, prior, prior, Temperatures(1.0), prior, 1 - np.eye(classes))


def shown(images: Tensor, beside: Sequence[Tensor] = ()) -> Shown:
    places = np.arange(len(images))
    return Shown(images, places, np.zeros(len(images), np.int64), places, list(beside))


def told_by(model: Callable[[Tensor], Tensor], variants: Variants, images: Tensor) -> np.ndarray:
    return np.stack([model(variant).argmax(1).numpy() for variant in variants(shown(images))])


def no_swaps(labels: np.ndarray) -> np.ndarray:
    return np.full((2, len(labels)), -1)
