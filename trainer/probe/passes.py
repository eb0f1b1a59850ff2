"""One pass over rows in which the model sees every image in several variants, and decides each."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from data_loaders.index import Index
from data_loaders.loader import Data, exact_batches
from data_loaders.progress import Progress
from trainer.decision.ledger import Ledger
from trainer.metrics.tally import Ints

Variants = Callable[[Tensor, Ints], Iterator[Tensor]]
"""Images uint8 [B, 3, S, S] and their rows [B] -> the same images in each variant."""
ON_CPU, ON_GPU = 16, 256
"""Images at once: what a CPU's cache holds takes two thirds of the time of 64 (the demonstration's network)."""


def decisions(
    model: Callable[[Tensor], Tensor],
    ledger: Ledger,
    index: Index,
    data: Data,
    rows: Ints,
    device: torch.device,
    families: Sequence[Variants],
) -> list[Ints]:
    """For each family of variants, the decisions [V, N] about rows [N] in their order.

    A decision is the ledger's: the cheapest one, with calibrated probabilities, where classes occur as in use.
    """
    found: list[list[Ints]] = [[] for _ in families]
    data = data.model_copy(update={"batch": ON_CPU if device.type == "cpu" else ON_GPU})
    progress = Progress("probe", len(rows), "rows")
    for number, batch in enumerate(exact_batches(index, data, rows), 1):
        images = torch.from_numpy(batch.images[batch.valid]).to(device)
        for family, variants in zip(found, families, strict=True):
            logits = np.stack([_logits(model, variant) for variant in variants(images, batch.rows[batch.valid])])
            decided = ledger.decide(ledger.log_probabilities(logits).reshape(-1, len(ledger.classes)))
            family.append(decided.reshape(logits.shape[:2]))
        progress.show(min(number * data.batch, len(rows)))
    return [np.concatenate(family, 1) for family in found]


@torch.inference_mode()
def _logits(model: Callable[[Tensor], Tensor], images: Tensor) -> np.ndarray:
    """[B, K]; channels last, which halves the time of a convolution on a CPU."""
    return model(images.contiguous(memory_format=torch.channels_last)).float().cpu().numpy()
