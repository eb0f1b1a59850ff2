"""What a model takes for the purest example of a class: an image that is itself optimised."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_loaders.decode import Pixels
from trainer.explain.heatmaps import still

LEARNING_RATE = 0.1
BLUR = 1.5
"""Standard deviation of the blur that every image is under, in pixels: finer than that, a network answers to noise."""
COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.0, -0.05), (0.27, -0.09, 0.03))
"""[RGB, 3]: root of the covariance of colours in ImageNet (of Lucid, Olah et al. 2017): light and dark vary the most,
then blue against red, then green against purple."""


class Maximized(NamedTuple):
    """An image that was optimised for a class."""

    image: Pixels
    """[size, size, 3]"""
    log_odds: float
    """Of the class, log p - log(1 - p) by softmax of the model's output for this image, in nats."""


def maximize(model: nn.Module, k: int, size: int, steps: int, seed: int) -> Maximized:
    """Activation maximization (Erhan et al. 2009) of class k, as Olah et al. 2017 do it: Adam climbs the log-odds in
    the Fourier coefficients of an image, scaled by 1 / frequency as in natural images; each step rolls the image anew.

    Log-odds, since an ensemble has no other logits, and since a probability stops to grow. On a CPU the same seed gives
    the same image, whatever torch's own generator has drawn.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    scale = _scale(size).to(device)
    spectrum = (0.01 * torch.randn(3, *scale.shape, 2, generator=generator)).to(device).requires_grad_()
    rolls = torch.randint(-(size // 8), size // 8 + 1, (steps, 2), generator=generator)
    adam = torch.optim.Adam([spectrum], LEARNING_RATE)
    with still(model), torch.enable_grad():
        for down, right in rolls.tolist():
            odds = _log_odds(model, _paint(spectrum, scale, size).roll((down, right), (1, 2)), k)
            spectrum.grad = torch.autograd.grad(-odds, spectrum)[0]
            adam.step()
    with still(model), torch.no_grad():
        image = _paint(spectrum, scale, size).round().to(torch.uint8)
        return Maximized(image.permute(1, 2, 0).cpu().numpy(), float(_log_odds(model, image, k)))


def _scale(size: int) -> Tensor:
    """Weight of each Fourier coefficient, [size, size // 2 + 1]: 1 / frequency, at most that of one wave across the
    image, times the transfer function of the blur."""
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])  # waves per pixel
    return torch.exp(-2 * (math.pi * BLUR * frequency) ** 2) / frequency.clamp(min=1 / size)


def _paint(spectrum: Tensor, scale: Tensor, size: int) -> Tensor:
    """The image [3, size, size], in 0 … 255, of coefficients [3, size, size // 2 + 1, 2], real and imaginary."""
    waves = torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=(size, size), norm="ortho")
    colours = torch.tensor(COLOURS, device=waves.device)
    colours = colours / colours.norm(dim=0).max()
    return 255 * torch.sigmoid(torch.einsum("rc,chw->rhw", colours, waves) / 4)


def _log_odds(model: nn.Module, image: Tensor, k: int) -> Tensor:
    output = model(image[None])[0]
    others = torch.arange(len(output), device=output.device) != k
    return output[k] - output[others].logsumexp(0)
