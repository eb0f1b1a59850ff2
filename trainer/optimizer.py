"""How weights follow gradients: the optimiser, with a learning rate that warms up and then falls as a cosine."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from data_loaders.settings import Fraction, Settings
from trainer.penalties import weights

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Optimizing(Settings):
    """What all optimisers have."""

    warmup: Fraction = 0.05
    """Share of the steps in which the learning rate rises linearly to its peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Shrinks weights, not biases or norms; see the optimiser for how."""
    lr: PositiveFloat = 0.1
    """Peak learning rate, for the whole batch over all workers."""

    @abstractmethod
    def build(self, model: nn.Module) -> Optimizer:
        """The optimiser of the model's parameters."""

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step in 0 … steps-1: linear warm-up, then half a cosine (Loshchilov & Hutter 2017)."""
        rise = round(self.warmup * steps)
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


class Sgd(Optimizing):
    """Stochastic gradient descent with Nesterov momentum; weight_decay is coupled, that is L2."""

    kind: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.9

    def build(self, model: nn.Module) -> Optimizer:
        from torch.optim import SGD

        return SGD(_parts(model, self.weight_decay), lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)


class AdamW(Optimizing):
    """Adam with decoupled weight_decay (Loshchilov & Hutter 2019), which is not L2: use penalties.l2 for that."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    """Peak learning rate, for the whole batch over all workers."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)

    def build(self, model: nn.Module) -> Optimizer:
        from torch.optim import AdamW as TorchAdamW

        return TorchAdamW(_parts(model, self.weight_decay), lr=self.lr, betas=self.betas)


AnyOptimizer = Annotated[Sgd | AdamW, Field(discriminator="kind")]


def _parts(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights, which decay, and biases and norms, which do not."""
    decayed = {id(w) for w in weights(model)}
    return [
        {"params": [p for p in model.parameters() if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
