"""One pass over rows in which the model sees every image in several variants."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index
from data_loaders.loader import Data, exact_batches
from data_loaders.progress import Progress
from trainer.decision.ledger import Ledger
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

ON_CPU, ON_GPU = 16, 256
"""Images at once: what a CPU's cache holds takes two thirds of the time of 64 (the demonstration's network)."""


class Shown(NamedTuple):
    """B images of a pass."""

    images: Tensor
    """uint8 [B, 3, S, S]"""
    rows: Ints
    """Rows of the data set, [B]."""
    cells: Ints
    """Intersection of the group columns, [B], as in `Index.cells`."""
    places: Ints
    """Of each row in the pass, [B]."""
    beside: list[Tensor]
    """Images of other rows that were asked for with these, each uint8 [B, 3, S, S]."""


Variants = Callable[[Shown], Iterator[Tensor]]
"""The images in each variant, uint8 [B, 3, S, S]."""
Part = Callable[[Shown], np.ndarray]
"""What a probe keeps of the images, [..., B]."""


def run(
    index: Index, data: Data, rows: Ints, device: torch.device, parts: Sequence[Part], beside: Sequence[Ints] = ()
) -> list[np.ndarray]:
    """What each part keeps of rows [N] in their order, [..., N]; each of `beside`, [N], are rows shown with them."""
    data = data.model_copy(update={"batch": ON_CPU if device.type == "cpu" else ON_GPU})
    found: list[list[np.ndarray]] = [[] for _ in parts]
    progress, done = Progress("probe", len(rows), "rows"), 0
    for batch, *others in zip(*(exact_batches(index, data, of) for of in (rows, *beside)), strict=True):
        n = int(batch.valid.sum())
        images, *more = (torch.from_numpy(of.images[:n]).to(device) for of in (batch, *others))
        shown = Shown(images, batch.rows[:n], batch.cells[:n], np.arange(done, done + n), more)
        for kept, part in zip(found, parts, strict=True):
            kept.append(part(shown))
        progress.show(done := done + n)
    return [np.concatenate(kept, -1) for kept in found]


def decided(model: Callable[[Tensor], Tensor], ledger: Ledger, variants: Variants) -> Part:
    """Keeps the decision about each variant, [V, B].

    A decision is the ledger's: the cheapest one, with calibrated probabilities, where classes occur as in use.
    """
    return lambda shown: np.stack(
        [ledger.decide(log_probabilities(model, ledger, variant, shown.cells)) for variant in variants(shown)]
    )


@torch.inference_mode()
def log_probabilities(model: Callable[[Tensor], Tensor], ledger: Ledger, images: Tensor, cells: Ints) -> Floats:
    """log p(y | x) in nats as in use, [B, K], of images in these cells [B].

    Raises Refusal (65) where the model's output is not finite.
    """
    logits = model(images).float().cpu().numpy()
    if not np.isfinite(logits).all():
        fix = "train it again, with a smaller learning rate"
        raise Refusal("The model cannot be probed:", [Fault("model", "its logits are not finite", fix)], 65)
    return ledger.log_probabilities(logits, cells=cells)
