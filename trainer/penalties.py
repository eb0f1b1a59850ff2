"""What keeps the weights small: penalties on the weights of convolutions and linear layers, not on biases or norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat

from data_loaders.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn


class Penalties(Settings):
    """Part of what every step minimises (coupled: the optimiser sees their gradient)."""

    l1: NonNegativeFloat = 0.0
    """Weight of sum |w|: favours sparse weights."""
    l2: NonNegativeFloat = 0.0
    """Weight of sum w**2 / 2: favours small weights."""

    def add_gradient(self, model: nn.Module) -> None:
        """Adds l1 sign(w) + l2 w to the gradients that there are: once a step, whatever the batch was cut into."""
        import torch

        pairs = [(w, w.grad) for w in weights(model) if w.grad is not None]
        moving, gradients = [w for w, _ in pairs], [gradient for _, gradient in pairs]
        with torch.no_grad():
            if self.l1 and pairs:
                signs = torch._foreach_sign(moving)  # pyright: ignore[reportPrivateImportUsage]
                torch._foreach_add_(gradients, signs, alpha=self.l1)  # pyright: ignore[reportPrivateImportUsage]
            if self.l2 and pairs:
                torch._foreach_add_(gradients, moving, alpha=self.l2)  # pyright: ignore[reportPrivateImportUsage]


def weights(model: nn.Module) -> list[Tensor]:
    """The parameters that are penalised: those with more than one dimension."""
    return [w for w in model.parameters() if w.ndim > 1]
