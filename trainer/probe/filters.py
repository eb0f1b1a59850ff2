"""What the probes make of images, as tensors [B, C, S, S]."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

BORDER = 8
"""The border is this part of each side."""


def pixels(images: Tensor) -> Tensor:
    """uint8, rounded and clipped to 0 … 255."""
    return images.round().clamp(0, 255).to(torch.uint8)


def border(size: int) -> Tensor:
    """[size, size], True in the outer BORDER-th of each side."""
    edge = -(-size // BORDER)
    outer = torch.ones(size, size, dtype=torch.bool)
    outer[edge : size - edge, edge : size - edge] = False
    return outer


def blurred(images: Tensor, share: float) -> Tensor:
    """A Gaussian blur of float [B, C, S, S], mirrored at the edges; its standard deviation is a share of the side."""
    size, channels = images.shape[-1], images.shape[1]
    sigma = share * size
    radius = min(max(round(3 * sigma), 1), size - 1)
    steps = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-(steps**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
    wide = conv2d(pad(images, (radius, radius, 0, 0), "reflect"), kernel, groups=channels)
    return conv2d(pad(wide, (0, 0, radius, radius), "reflect"), kernel.mT, groups=channels)
