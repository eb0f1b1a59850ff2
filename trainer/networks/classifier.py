"""What is trained and used: a network with its normalisation, and several of them as one."""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from trainer.networks.parts import Head

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """uint8 images [B, 3, H, W] -> logits [B, K] of a network that reads normalised ones. A network of several heads
    gives [B, M, K] in training, and else their mean.

    The mean and deviation (of ImageNet) are buffers, so that they travel with the weights. All is laid out with the
    channels last, which is faster on tensor cores, and for small networks on CPUs (benchmarks/channels_last.py).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, frozen: bool = False) -> None:
        """Of a frozen one only the head learns; all else stays in evaluation mode, so that norms stay as they are."""
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.frozen = frozen
        if frozen:
            self.requires_grad_(False)
            self.head.requires_grad_(True)
            self.train()

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        logits = self.network((images - self.mean) / self.deviation)
        return logits.mean(1) if logits.ndim == 3 and not self.training else logits

    @property
    def head(self) -> Head:
        return next(part for part in self.network.modules() if isinstance(part, Head))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.network.eval()
            self.head.train(mode)
        return self


class Ensemble(nn.Module):
    """Classifiers whose probabilities are averaged, after each is calibrated and brought to one prior: uint8 images
    [B, 3, H, W] -> the log of the mean probability, [B, K], which serves as logits conditioned on that prior.

    Averages of probabilities, not of logits, since each is a proper prediction (Lakshminarayanan et al. 2017).
    """

    temperatures: Tensor
    corrections: Tensor

    def __init__(self, members: Sequence[nn.Module], classes: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("temperatures", torch.ones(len(members)))
        self.register_buffer("corrections", torch.zeros(len(members), classes))

    def forward(self, images: Tensor) -> Tensor:
        parts = zip(self.members, self.temperatures, self.corrections, strict=True)
        log_p = [(member(images).float() / t + c).log_softmax(1) for member, t, c in parts]
        return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))
