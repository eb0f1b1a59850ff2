"""The networks themselves: torch modules from uint8 images to logits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """uint8 images [B, 3, H, W] -> logits [B, K] of a network that reads normalised ones.

    The mean and deviation (of ImageNet) are buffers, so that they travel with the weights. All is laid out with the
    channels last, which is faster on tensor cores, and for small networks on CPUs (benchmarks/channels_last.py).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        return self.network((images - self.mean) / self.deviation)


class Ensemble(nn.Module):
    """Classifiers whose probabilities are averaged, after each is calibrated and brought to one prior: uint8 images
    [B, 3, H, W] -> the log of the mean probability, [B, K], which serves as logits conditioned on that prior.

    Averages of probabilities, not of logits, since each is a proper prediction (Lakshminarayanan et al. 2017).
    """

    temperatures: Tensor
    corrections: Tensor

    def __init__(self, members: Sequence[nn.Module], classes: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("temperatures", torch.ones(len(members)))
        self.register_buffer("corrections", torch.zeros(len(members), classes))

    def forward(self, images: Tensor) -> Tensor:
        parts = zip(self.members, self.temperatures, self.corrections, strict=True)
        log_p = [(member(images).float() / t + c).log_softmax(1) for member, t, c in parts]
        return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))


def small_cnn(classes: int, widths: tuple[int, ...], dropout: float) -> nn.Module:
    """Convolution, batch norm, ReLU and pooling for each width; then the mean over places, dropout, a linear head."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        layers += [
            nn.Conv2d(before, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.MaxPool2d(2),
        ]
    head = nn.Linear(widths[-1], classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), head)


def from_torchvision(name: str, classes: int, dropout: float) -> nn.Module:
    """A torchvision model whose head is dropout and a new linear layer."""
    import torchvision  # two seconds, which a process that only passes models on need not wait

    network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    if isinstance(network, torchvision.models.EfficientNet):
        network.classifier[0] = nn.Dropout(dropout)
    else:
        head = nn.Linear(network.fc.in_features, classes)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        network.fc = nn.Sequential(nn.Dropout(dropout), head)
    return network


def initialise(network: nn.Module, scheme: str) -> None:
    """Draws the weights of convolutions and linear layers: Glorot & Bengio 2010 (xavier) or He et al. 2015 (he).

    Biases become 0; norms keep their 1 and 0. He's fan is that of the input, so a head of few classes starts small.
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
