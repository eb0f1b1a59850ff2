"""How weights follow gradients: the optimiser, and a learning rate that warms up and then falls."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from data_loaders.settings import Fraction, Settings
from trainer.penalties import weights

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Schedule(Settings):
    """What becomes of the learning rate after its warm-up."""

    @abstractmethod
    def height(self, step: int, rise: int, steps: int) -> float:
        """Share of the peak at a step in rise … steps-1, where the warm-up took `rise` steps."""


class Cosine(Schedule):
    """Half a cosine from the peak to zero (Loshchilov & Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"

    def height(self, step: int, rise: int, steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


class Steps(Schedule):
    """The peak, made smaller again and again at fixed points."""

    kind: Literal["steps"] = "steps"
    at: tuple[Fraction, ...] = (0.8, 0.9)
    """Shares of all steps, the warm-up among them."""
    factor: Fraction = 0.01
    """The rate is multiplied by it at each point (0.01 in Cao et al. 2019, 0.1 in most other papers)."""

    def height(self, step: int, rise: int, steps: int) -> float:
        return self.factor ** sum(step >= round(share * steps) for share in self.at)


class Constant(Schedule):
    """The peak to the end."""

    kind: Literal["constant"] = "constant"

    def height(self, step: int, rise: int, steps: int) -> float:
        return 1.0


AnySchedule = Annotated[Cosine | Steps | Constant, Field(discriminator="kind")]


class Optimizing(Settings):
    """What all optimisers have. They do their work in one fused pass over the weights."""

    warmup: Fraction = 0.05
    """Share of the steps in which the learning rate rises linearly to its peak."""
    schedule: AnySchedule = Cosine()
    """The learning rate after the warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Shrinks weights, not biases or norms; see the optimiser for how."""
    lr: PositiveFloat = 0.1
    """Peak learning rate, for the whole batch over all workers."""
    clip: PositiveFloat | None = None
    """Greatest norm of the whole gradient; a longer one is shortened to it."""

    @abstractmethod
    def build(self, model: nn.Module) -> Optimizer:
        """The optimiser of those of the model's parameters that learn."""

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step in 0 … steps-1."""
        rise = round(self.warmup * steps)
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * self.schedule.height(step, rise, steps)


class Sgd(Optimizing):
    """Stochastic gradient descent with momentum; weight_decay is coupled, that is L2: it joins the gradient."""

    kind: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.9
    nesterov: bool = True
    """Whether momentum looks ahead (Nesterov 1983; Sutskever et al. 2013)."""

    def build(self, model: nn.Module) -> Optimizer:
        from torch.optim import SGD

        nesterov = self.nesterov and self.momentum > 0
        parts = _parts(model, self.weight_decay)
        return SGD(parts, lr=self.lr, momentum=self.momentum, nesterov=nesterov, fused=True)


class AdamW(Optimizing):
    """Adam with decoupled weight_decay (Loshchilov & Hutter 2019), which shrinks weights by lr * weight_decay a step
    and is not L2: use penalties.l2 for that."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    """Peak learning rate, for the whole batch over all workers."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)

    def build(self, model: nn.Module) -> Optimizer:
        from torch.optim import AdamW as TorchAdamW

        return TorchAdamW(_parts(model, self.weight_decay), lr=self.lr, betas=self.betas, fused=True)


AnyOptimizer = Annotated[Sgd | AdamW, Field(discriminator="kind")]


def _parts(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights, which decay, and biases and norms, which do not."""
    decayed = {id(w) for w in weights(model)}
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in learning if id(p) not in decayed], "weight_decay": 0.0},
    ]
