"""Which network to train. The networks are in `networks/`, apart, so that settings do not wait for torch."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Fraction, Settings

if TYPE_CHECKING:
    from torch import nn

    from trainer.networks import Classifier
    from trainer.networks.parts import Parts

Initialisation = Literal["xavier_uniform", "xavier_normal", "he_uniform", "he_normal"]


class Linear(Settings):
    """A linear layer."""

    kind: Literal["linear"] = "linear"

    @property
    def scale(self) -> float:
        return 1.0


class Cosine(Settings):
    """The cosine between the features and the weights of each class, so that no class wins by the length of its
    weights; as LDAM (Cao et al. 2019) and BalPoE (Aimar et al. 2023) have it."""

    kind: Literal["cosine"] = "cosine"
    scale: PositiveFloat = 30.0
    """Logits are as many times the cosine."""


AnyHead = Annotated[Linear | Cosine, Field(discriminator="kind")]


class Model(Settings):
    """What all models have."""

    dropout: Fraction = 0.0
    """Probability to zero a feature before the head, in training."""
    stage_dropout: Fraction = 0.0
    """Probability to zero after each stage but the last, in training."""
    stage_dropout_kind: Literal["element", "channel"] = "element"
    """What it zeroes: single numbers, or whole channels (spatial dropout, Tompson et al. 2015)."""
    initialisation: Initialisation = "he_normal"
    """How the weights are drawn: Xavier (Glorot & Bengio 2010) or He (He et al. 2015)."""
    head: AnyHead = Linear()
    """From features to logits."""
    heads: PositiveInt = 1
    """Experts, each with logits of its own in training, whose mean is used. They share the network up to the head, but
    small_cnn's have their own last convolution, and cifar_resnet's their own last two stages."""
    weights: Path | None = None
    """What it starts from instead of drawn weights: runs/NAME/model, or a file (safetensors, or torch's own) with the
    state dict of this model or of torchvision's or timm's."""
    new_head: bool = False
    """Draws the head anew, though the weights have one that fits: the second stage of cRT (Kang et al. 2020)."""
    freeze: Literal["none", "backbone"] = "none"
    """What does not learn: `backbone` is all but the head, whose norms then stay as they are."""

    @model_validator(mode="after")
    def _has_weights_to_keep(self) -> Model:
        if self.weights is None and (self.new_head or self.freeze != "none"):
            raise ValueError("new_head and freeze are for a model that starts from weights, which are not given")
        return self

    def build(self, classes: int, seed: int) -> Classifier:
        """The classifier from uint8 images [B, 3, H, W] to logits [B, K], its weights drawn from the seed.

        It reads no file: `start` does, where a run begins.
        """
        import torch

        from trainer.networks import Classifier
        from trainer.networks.parts import Parts, initialise

        scale = self.scale if isinstance(self.head, Cosine) else None
        channels = self.stage_dropout_kind == "channel"
        torch.manual_seed(seed)
        network = self.network(Parts(classes, self.heads, self.dropout, scale, self.stage_dropout, channels))
        initialise(network, self.initialisation)
        return Classifier(network, self.freeze == "backbone")

    def start(self, model: Classifier) -> list[str]:
        """Gives a model the weights that it starts from, if any; lines that say what was not taken from them.

        Raises Refusal (65) where they cannot be used.
        """
        from trainer.networks.weights import load

        return [] if self.weights is None else load(_file_of(self.weights), model, self.new_head)

    def start_hash(self) -> str:
        """SHA-256 of the file that it starts from; empty where there is none. Raises Refusal (65) as `start` does."""
        return "" if self.weights is None else durable.sha256(_file_of(self.weights))

    @property
    def scale(self) -> float:
        """Of the logits: that of a cosine head, else 1."""
        return self.head.scale

    @property
    def least_size(self) -> int:
        """Smallest height and width that the network can read, in pixels."""
        return 1

    @abstractmethod
    def network(self, parts: Parts) -> nn.Module:
        """The network from normalised images to logits, with these parts."""


class SmallCnn(Model):
    """A plain convolutional network for small images: trains on a CPU in minutes."""

    kind: Literal["small_cnn"] = "small_cnn"
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 64, 128, 128)
    """Channels of each convolution; each halves height and width."""

    @property
    def least_size(self) -> int:
        """Smallest height and width that the network can read, in pixels."""
        return 2 ** len(self.widths)

    def network(self, parts: Parts) -> nn.Module:
        from trainer.networks.small import small_cnn

        return small_cnn(self.widths, parts)


class CifarResNet(Model):
    """The residual network for CIFAR (He et al. 2016), as long-tailed benchmarks have it: 0.464 M weights."""

    kind: Literal["cifar_resnet"] = "cifar_resnet"
    depth: Annotated[int, Field(ge=8)] = 32
    """Layers: 6n + 2, for n blocks in each of three stages."""
    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 32, 64)
    """Channels of each stage, none less than the one before; the second and the third halve height and width."""

    @model_validator(mode="after")
    def _can_be_built(self) -> CifarResNet:
        if self.depth % 6 != 2:
            raise ValueError(f"depth={self.depth} is not 6n + 2, as 8, 20, 32, 44 and 56 are")
        if list(self.widths) != sorted(self.widths):
            raise ValueError("widths fall, which shortcuts without weights cannot do")
        return self

    @property
    def least_size(self) -> int:
        """Smallest height and width that the network can read, in pixels."""
        return 4

    def network(self, parts: Parts) -> nn.Module:
        from trainer.networks.small import cifar_resnet

        return cifar_resnet(self.depth, self.widths, parts)


class ResNet(Model):
    """A residual network (He et al. 2016), as in torchvision."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101, 152] = 18

    def network(self, parts: Parts) -> nn.Module:
        from trainer.networks.families import from_torchvision

        return from_torchvision(f"resnet{self.depth}", parts)


class ResNeXt(Model):
    """A residual network of grouped convolutions (Xie et al. 2017), as in torchvision."""

    kind: Literal["resnext"] = "resnext"
    size: Literal["50_32x4d", "101_32x8d", "101_64x4d"] = "50_32x4d"

    def network(self, parts: Parts) -> nn.Module:
        from trainer.networks.families import from_torchvision

        return from_torchvision(f"resnext{self.size}", parts)


class EfficientNet(Model):
    """EfficientNet (Tan & Le 2019, 2021), as in torchvision."""

    kind: Literal["efficientnet"] = "efficientnet"
    size: Literal["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "v2_s", "v2_m", "v2_l"] = "b0"

    def network(self, parts: Parts) -> nn.Module:
        from trainer.networks.families import from_torchvision

        return from_torchvision(f"efficientnet_{self.size}", parts)


class ConvNeXt(Model):
    """ConvNeXt (Liu et al. 2022), as in torchvision."""

    kind: Literal["convnext"] = "convnext"
    size: Literal["tiny", "small", "base", "large"] = "tiny"

    @property
    def least_size(self) -> int:
        """Smallest height and width that the network can read, in pixels."""
        return 32

    def network(self, parts: Parts) -> nn.Module:
        from trainer.networks.families import from_torchvision

        return from_torchvision(f"convnext_{self.size}", parts)


class RegNet(Model):
    """RegNet (Radosavovic et al. 2020), as in torchvision: x, or y with squeeze and excitation; size in FLOPs."""

    kind: Literal["regnet"] = "regnet"
    # fmt: off
    size: Literal[
        "x_400mf", "x_800mf", "x_1_6gf", "x_3_2gf", "x_8gf", "x_16gf", "x_32gf",
        "y_400mf", "y_800mf", "y_1_6gf", "y_3_2gf", "y_8gf", "y_16gf", "y_32gf", "y_128gf",
    ] = "y_400mf"
    # fmt: on

    def network(self, parts: Parts) -> nn.Module:
        from trainer.networks.families import from_torchvision

        return from_torchvision(f"regnet_{self.size}", parts)


class MobileNet(Model):
    """MobileNet (Sandler et al. 2018; Howard et al. 2019), as in torchvision; a stage has one height and width."""

    kind: Literal["mobilenet"] = "mobilenet"
    size: Literal["v2", "v3_small", "v3_large"] = "v3_large"

    def network(self, parts: Parts) -> nn.Module:
        from trainer.networks.families import from_torchvision

        return from_torchvision(f"mobilenet_{self.size}", parts)


class Timm(Model):
    """A convolutional network of timm (Wightman 2019), which the extra `timm` installs."""

    kind: Literal["timm"] = "timm"
    name: str = "resnet10t"
    """One of timm.list_models()."""

    @model_validator(mode="after")
    def _knows_no_stages(self) -> Timm:
        if self.stage_dropout:
            raise ValueError("stage_dropout cannot be had with timm, whose stages are not known; use dropout")
        return self

    @property
    def least_size(self) -> int:
        """Smallest height and width that the network can read, in pixels."""
        return 32

    def network(self, parts: Parts) -> nn.Module:
        from trainer.networks.families import from_timm

        return from_timm(self.name, parts)


AnyModel = Annotated[
    SmallCnn | CifarResNet | ResNet | ResNeXt | EfficientNet | ConvNeXt | RegNet | MobileNet | Timm,
    Field(discriminator="kind"),
]


def _file_of(weights: Path) -> Path:
    """The file of a path to weights. Raises Refusal (65) where it is missing, or its folder not as it was written."""
    wrong = durable.damage(weights) if weights.is_dir() else None if weights.exists() else "does not exist"
    if wrong:
        fix = "give a file, or the folder runs/NAME/model of a run that has ended"
        raise Refusal("The weights to start from cannot be used:", [Fault(str(weights), wrong, fix)], 65)
    return weights / "model.safetensors" if weights.is_dir() else weights
