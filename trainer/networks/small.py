"""Networks for small images, written here."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from trainer.networks.parts import Branches, Parts


def small_cnn(widths: tuple[int, ...], parts: Parts) -> nn.Module:
    """Convolution, batch norm, ReLU and pooling for each width; then the mean over places, dropout, a head.

    Each of several heads has its own last convolution.
    """
    *first, last = zip((3, *widths), widths, strict=False)
    blocks = [_pooled(before, width) for before, width in first]
    branches = Branches([_pooled(*last) for _ in range(parts.heads)])
    pool = nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(*blocks, branches, pool, nn.Flatten(), parts.head(widths[-1]))
    parts.separate(network, [str(n) for n in range(len(blocks))])
    return network


def cifar_resnet(depth: int, widths: tuple[int, int, int], parts: Parts) -> nn.Module:
    """The residual network for CIFAR of 6n + 2 layers (He et al. 2016, section 4.2): three stages of n blocks.

    Each of several heads has its own last two stages.
    """
    narrow, middle, wide = widths
    n = (depth - 2) // 6
    branches = []
    for _ in range(parts.heads):
        stages: OrderedDict[str, nn.Module] = OrderedDict(
            stage2=_stage(n, narrow, middle, 2), stage3=_stage(n, middle, wide, 2)
        )
        branches.append(nn.Sequential(stages))
        parts.separate(branches[-1], ["stage2"])
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(_convolution(3, narrow), nn.BatchNorm2d(narrow), nn.ReLU(True)),
        stage1=_stage(n, narrow, narrow, 1),
        branches=Branches(branches),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=parts.head(wide),
    )
    network = nn.Sequential(layers)
    parts.separate(network, ["stage1"])
    return network


class Block(nn.Module):
    """Two convolutions, and what they are added to: the input itself, of which a stride takes every other place, and
    which zeros fill up to the new number of channels (option A of He et al. 2016: no weights)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new = stride, width - before
        self.layers = nn.Sequential(
            _convolution(before, width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            _convolution(width, width),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) + self.shortcut(x)).relu_()

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and not self.new:
            return x
        ahead = self.new // 2
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, ahead, self.new - ahead))


def _pooled(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(_convolution(before, width), nn.BatchNorm2d(width), nn.ReLU(True), nn.MaxPool2d(2))


def _stage(blocks: int, before: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(before, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))


def _convolution(before: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
