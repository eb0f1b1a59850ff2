"""Networks of torchvision and timm, with our head. Their weights keep their names, so that files of theirs fit."""

from collections.abc import Iterator

from torch import nn

from data_loaders.faults import Fault, Refusal
from trainer.networks.parts import Parts


def from_torchvision(name: str, parts: Parts) -> nn.Module:
    """A network of torchvision whose last layer is a head."""
    import torchvision  # two seconds, which a process that only passes models on need not wait

    network = torchvision.models.get_model(name, weights=None, num_classes=parts.classes)
    _replace_head(network, parts)
    for layers, end in list(_ends_of_stages(network)):
        parts.separate(layers, [end])
    if isinstance(network, torchvision.models.MobileNetV2):
        network.features.add_module("pool", nn.AdaptiveAvgPool2d(1))  # for Grad-CAM; its own is no module
    return network


def from_timm(name: str, parts: Parts) -> nn.Module:
    """A network of timm whose last layer is a head. Nothing is fetched."""
    try:
        import timm
    except ImportError:
        fault = Fault("model.kind", "timm needs packages that are not installed", "pip install 'evenkeel[timm]'")
        raise Refusal("The model cannot be built:", [fault]) from None
    if not timm.is_model(name):
        fault = Fault("model.name", f"timm has no model {name!r}", "see timm.list_models()")
        raise Refusal("The model cannot be built:", [fault])
    network = timm.create_model(name, pretrained=False, num_classes=parts.classes)
    pools, layers = ([m for m in network.modules() if isinstance(m, k)] for k in (nn.AdaptiveAvgPool2d, nn.Linear))
    if not pools or [layer.out_features for layer in layers][-1:] != [parts.classes]:
        fix = "choose a convolutional one"
        fault = Fault("model.name", f"{name} does not end in a global average pooling and a linear layer", fix)
        raise Refusal("The model cannot be built:", [fault])
    _replace_head(network, parts)
    return network


def _replace_head(network: nn.Module, parts: Parts) -> None:
    """Puts a head in the place of the last linear layer, and takes all other dropout out."""
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Dropout):
            network.set_submodule(path, nn.Identity())
    path, last = _last_linear(network)
    network.set_submodule(path, parts.head(last.in_features))


def _last_linear(network: nn.Module) -> tuple[str, nn.Linear]:
    return [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


def _ends_of_stages(network: nn.Module) -> Iterator[tuple[nn.Sequential, str]]:
    """The last layer of each stage but the last: what it lies in, and its name there."""
    from torchvision import models

    match network:
        case models.ResNet():
            yield from ((stage, str(len(stage) - 1)) for stage in (network.layer1, network.layer2, network.layer3))
        case models.RegNet():
            yield from ((network.trunk_output, f"block{n}") for n in range(1, len(network.trunk_output)))
        case models.EfficientNet():
            yield from ((network.features, str(n)) for n in range(1, len(network.features) - 2))
        case models.ConvNeXt():
            yield from ((network.features, str(n)) for n in range(1, len(network.features) - 1, 2))
        case models.MobileNetV2() | models.MobileNetV3():
            halving = (n for n, block in enumerate(network.features) if _has_stride(block))
            yield from ((network.features, str(n - 1)) for n in halving if n > 1)


def _has_stride(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) and module.stride[0] > 1 for module in block.modules())
