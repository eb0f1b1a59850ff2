"""What laying images and weights out with the channels last is worth on a CPU: python -m benchmarks.channels_last

Both layouts take turns in this process; CPU seconds of one thread, the least of all turns.
"""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from trainer.model import Model, ResNet, SmallCnn

TURNS = 5
CASES: dict[str, tuple[Model, int, int]] = {  # model, images, side in pixels
    "small_cnn of the demo": (SmallCnn(widths=(16, 32, 64, 96)), 64, 64),
    "small_cnn of CIFAR": (SmallCnn(widths=(32, 64, 128)), 128, 32),
    "resnet 18": (ResNet(depth=18), 32, 64),
}
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


def main() -> None:
    torch.set_num_threads(1)
    for name, (model, images, side) in CASES.items():
        pixels = torch.randint(0, 256, (images, 3, side, side)).float()
        networks = {
            layout: model.build(3, 0).network.to(memory_format=form)  # pyright: ignore[reportCallIssue]
            for layout, form in LAYOUTS.items()
        }
        for what, work in {"training step": step, "evaluation": evaluate}.items():
            least = dict.fromkeys(LAYOUTS, float("inf"))
            for _ in range(TURNS):
                for layout, form in LAYOUTS.items():
                    given = pixels.contiguous(memory_format=form)
                    least[layout] = min(least[layout], seconds(work, networks[layout], given))
            print(f"{name}, {what}: channels last takes {least['last'] / least['first']:.2f} of the time")


def step(network: nn.Module, pixels: torch.Tensor) -> None:
    network.train()
    functional.cross_entropy(network(pixels), torch.zeros(len(pixels), dtype=torch.long)).backward()


def evaluate(network: nn.Module, pixels: torch.Tensor) -> None:
    network.eval()
    with torch.inference_mode():
        network(pixels)


def seconds(work: Callable[[nn.Module, torch.Tensor], None], network: nn.Module, pixels: torch.Tensor) -> float:
    began = time.process_time()
    work(network, pixels)
    return time.process_time() - began


if __name__ == "__main__":
    main()
