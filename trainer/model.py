"""Which network to train. The networks are in `networks.py`, apart, so that settings do not wait for torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from data_loaders.settings import Fraction, Settings

if TYPE_CHECKING:
    from torch import nn

    from trainer.networks import Classifier

Initialisation = Literal["xavier_uniform", "xavier_normal", "he_uniform", "he_normal"]


class Model(Settings):
    """What all models have."""

    dropout: Fraction = 0.0
    """Probability to zero a feature before the head, in training."""
    initialisation: Initialisation = "he_normal"
    """How the weights are drawn: Xavier (Glorot & Bengio 2010) or He (He et al. 2015)."""

    def build(self, classes: int, seed: int) -> Classifier:
        """The classifier from uint8 images [B, 3, H, W] to logits [B, K], its weights drawn from the seed."""
        import torch

        from trainer.networks import Classifier, initialise

        torch.manual_seed(seed)
        network = self.network(classes)
        initialise(network, self.initialisation)
        return Classifier(network)

    @property
    def least_size(self) -> int:
        """Smallest height and width that the network can read, in pixels."""
        return 1

    @abstractmethod
    def network(self, classes: int) -> nn.Module:
        """The network from normalised images to logits."""


class SmallCnn(Model):
    """A plain convolutional network for small images: trains on a CPU in minutes."""

    kind: Literal["small_cnn"] = "small_cnn"
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 64, 128, 128)
    """Channels of each convolution; each halves height and width."""

    @property
    def least_size(self) -> int:
        """Smallest height and width that the network can read, in pixels."""
        return 2 ** len(self.widths)

    def network(self, classes: int) -> nn.Module:
        from trainer.networks import small_cnn

        return small_cnn(classes, self.widths, self.dropout)


class ResNet(Model):
    """A residual network (He et al. 2016), as in torchvision."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101, 152] = 18

    def network(self, classes: int) -> nn.Module:
        from trainer.networks import from_torchvision

        return from_torchvision(f"resnet{self.depth}", classes, self.dropout)


class EfficientNet(Model):
    """EfficientNet (Tan & Le 2019, 2021), as in torchvision."""

    kind: Literal["efficientnet"] = "efficientnet"
    size: Literal["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "v2_s", "v2_m", "v2_l"] = "b0"

    def network(self, classes: int) -> nn.Module:
        from trainer.networks import from_torchvision

        return from_torchvision(f"efficientnet_{self.size}", classes, self.dropout)


AnyModel = Annotated[SmallCnn | ResNet | EfficientNet, Field(discriminator="kind")]
