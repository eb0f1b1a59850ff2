"""What keeps the weights small: penalties on the weights of convolutions and linear layers, not on biases or norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat

from data_loaders.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn


class Penalties(Settings):
    """Added to the loss of every step (coupled: the optimiser sees their gradient)."""

    l1: NonNegativeFloat = 0.0
    """Weight of sum |w|: favours sparse weights."""
    l2: NonNegativeFloat = 0.0
    """Weight of sum w**2 / 2: favours small weights."""

    def __call__(self, model: nn.Module) -> Tensor | float:
        """The sum of both penalties over the model's weights."""
        if not self.l1 and not self.l2:
            return 0.0
        return sum(self.l1 * w.abs().sum() + self.l2 / 2 * w.square().sum() for w in weights(model))


def weights(model: nn.Module) -> list[Tensor]:
    """The parameters that are penalised: those with more than one dimension."""
    return [w for w in model.parameters() if w.ndim > 1]
