"""What networks of all kinds have: a head, dropout between their stages, and weights that are drawn."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional


class Cosine(nn.Linear):
    """Features [B, F] -> the cosine of each with the weights of each class, times a scale: [B, K].

    The logits of features that are all zero are zero.
    """

    def __init__(self, features: int, classes: int, scale: float) -> None:
        super().__init__(features, classes, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.scale * functional.linear(_of_length_one(input), _of_length_one(self.weight))


class Head(nn.Module):
    """Dropout, then a layer from features [B, F] to logits [B, K]; of M layers, [B, M, K].

    Several layers read all the same features, or of [B, M * F] each its own.
    """

    def __init__(self, layers: list[nn.Linear], dropout: float) -> None:
        super().__init__()
        self.features = layers[0].in_features
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)

    def forward(self, features: Tensor) -> Tensor:
        parts = self.dropout(features).split(self.features, 1)
        logits = [layer(part) for layer, part in zip(self.layers, cycle(parts), strict=False)]
        return logits[0] if len(logits) == 1 else torch.stack(logits, 1)


class Branches(nn.ModuleList):
    """Networks side by side that read the same; their channels are put one after another."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


@dataclass(frozen=True)
class Parts:
    """What is asked of a network of any kind."""

    classes: int
    heads: int = 1
    dropout: float = 0.0
    """Before the head."""
    scale: float | None = None
    """Of a cosine head; None asks for a linear one."""
    stage_dropout: float = 0.0
    channels: bool = False
    """Whether dropout between stages zeroes whole channels."""

    def head(self, features: int) -> Head:
        layers = [self._layer(features) for _ in range(self.heads)]
        return Head(layers, self.dropout)

    def separate(self, layers: nn.Sequential, ends: Iterable[str]) -> None:
        """Puts dropout after the layers of these names; the names of all others stay, as do those of their weights."""
        if not self.stage_dropout:
            return
        ends = set(ends)
        for name, layer in list(layers.named_children()):
            delattr(layers, name)
            layers.add_module(name, layer)
            if name in ends:
                dropout = nn.Dropout2d if self.channels else nn.Dropout
                layers.add_module(f"{name}_dropout", dropout(self.stage_dropout))

    def _layer(self, features: int) -> nn.Linear:
        if self.scale is None:
            return nn.Linear(features, self.classes)
        return Cosine(features, self.classes, self.scale)


def initialise(network: nn.Module, scheme: str) -> None:
    """Draws the weights of convolutions and linear layers: Glorot & Bengio 2010 (xavier) or He et al. 2015 (he).

    Biases become 0; norms and scales of layers keep what they have. He's fan is that of the input, so a head of few
    classes starts small.
    """
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        match scheme:
            case "xavier_uniform":
                nn.init.xavier_uniform_(module.weight)
            case "xavier_normal":
                nn.init.xavier_normal_(module.weight)
            case "he_uniform":
                nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
            case "he_normal":
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            case _:
                raise ValueError(f"no initialisation {scheme!r}")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _of_length_one(vectors: Tensor) -> Tensor:
    """Each of the rows of [N, F] over its length; rows of zeros stay, and so do their gradients."""
    length = vectors.norm(dim=1, keepdim=True)
    return vectors / length.where(length > 0, 1.0)
