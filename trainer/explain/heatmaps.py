"""Where in an image the evidence for a class lies, by two independent ways: gradients, and covering parts of it up."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.networks import Classifier

AT_ONCE = 64
"""Images in one pass of an occlusion."""


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) of a class [B] in each of the images uint8 [B, 3, H, W]: float [B, H, W], >= 0,
    in units of the model's output for that class.

    With A the channels [C, h, w] that the last global pooling reads: ReLU(sum over c of A_c times the mean over places
    of d output / d A_c), resampled bilinearly. The maps of an ensemble's members are added, each with the gradient of
    the ensemble's output. ValueError if a Classifier of the model has no `nn.AdaptiveAvgPool2d`.
    """
    pools = [_last_pooling(module) for module in model.modules() if isinstance(module, Classifier)]
    with still(model), _pooled(pools) as features, torch.enable_grad():
        scores = model(images).gather(1, classes[:, None])
        gradients = torch.autograd.grad(scores.sum(), features)
    heat = torch.zeros(len(images), 1, *images.shape[2:], device=images.device)
    for a, gradient in zip(features, gradients, strict=True):
        evidence = (a.detach() * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
        heat += functional.interpolate(evidence, images.shape[2:], mode="bilinear")
    return heat[:, 0]


def occlusion(model: nn.Module, images: Tensor, classes: Tensor, window: int, stride: int) -> Tensor:
    """Occlusion (Zeiler & Fergus 2014) of a class [B] in each of the images uint8 [B, 3, H, W]: float [B, H, W], nats.

    A square of `window` pixels moves by `stride` pixels, the last of a row cut by the edge, and takes the mean colour
    of its image. A pixel's value is how much log softmax(output) of the class falls, averaged over the squares that
    cover it; it is negative where the image speaks against the class. ValueError if squares leave gaps, or are larger
    than the image.
    """
    height, width = images.shape[2:]
    if not 1 <= stride <= window <= min(height, width):
        raise ValueError(f"squares of {window} pixels every {stride} do not cover {height} x {width} pixels")
    squares = _squares(height, width, window, stride).to(images.device)
    covered = squares.sum(0)
    heat = torch.zeros(len(images), height, width, device=images.device)
    for place, image in enumerate(images):
        drops = _drops(model, image, classes[place], squares)
        heat[place] = (drops[:, None, None] * squares).sum(0) / covered
    return heat


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _pooled(pools: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What each of the poolings reads in a pass, [B, C, h, w], as leaves of the graph, where a gradient ends."""
    read: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        read.append(inputs[0].detach().requires_grad_())
        return read[-1]

    hooks = [pool.register_forward_pre_hook(keep) for pool in pools]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def _last_pooling(classifier: nn.Module) -> nn.Module:
    pools = [module for module in classifier.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    if not pools:
        raise ValueError("Grad-CAM needs a network that ends in a global pooling (nn.AdaptiveAvgPool2d) and a head")
    return pools[-1]


def _squares(height: int, width: int, window: int, stride: int) -> Tensor:
    """True inside each square, [N, H, W]."""
    corners = list(product(*(range(0, side - window + stride, stride) for side in (height, width))))
    squares = torch.zeros(len(corners), height, width, dtype=torch.bool)
    for square, (top, left) in zip(squares, corners, strict=True):
        square[top : top + window, left : left + window] = True
    return squares


def _drops(model: nn.Module, image: Tensor, k: Tensor, squares: Tensor) -> Tensor:
    """How much the log-probability of class k of an image [3, H, W] falls under each of the squares [N, H, W]: [N]."""
    pixels = image.float()
    colour = pixels.mean((1, 2), keepdim=True)
    with still(model), torch.inference_mode():
        whole = model(pixels[None]).log_softmax(1)[0, k]
        parts = [torch.where(part[:, None], colour, pixels) for part in squares.split(AT_ONCE)]
        return whole - torch.cat([model(part).log_softmax(1)[:, k] for part in parts])
