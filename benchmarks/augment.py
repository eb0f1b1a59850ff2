"""What training images cost next to torchvision's on Pillow images: python -m benchmarks.augment

Both begin and end with an array, [size, size, 3], and pad, crop and flip it; ours also makes the random numbers of the
position, theirs has torch's. Both take turns in this process; CPU time of one thread, the least of all turns.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from data_loaders.augment import PadCrop, rng
from data_loaders.decode import Pixels
from data_loaders.policies import MEAN, AutoAugment, ColourJitter, RandAugment, TrivialAugment

TURNS = 9
FILL = list(MEAN)
CASES: dict[str, tuple[PadCrop, list[nn.Module]]] = {
    "crop and flip": (PadCrop(), []),
    "and rotation by 15": (PadCrop(rotation=15), [v2.RandomRotation([-15, 15], v2.InterpolationMode.BILINEAR)]),
    "and RandAugment": (PadCrop(policy=RandAugment()), [v2.RandAugment(fill=FILL)]),
    "and TrivialAugment": (PadCrop(policy=TrivialAugment()), [v2.TrivialAugmentWide(fill=FILL)]),
    "and AutoAugment": (PadCrop(policy=AutoAugment()), [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=FILL)]),
    "and colour jitter": (
        PadCrop(jitter=ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)),
        [v2.ColorJitter(0.4, 0.4, 0.4, 0.1)],
    ),
}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for size, number in ((32, 400), (224, 40)):
        images = np.random.default_rng(0).integers(0, 256, (number, size, size, 3), np.uint8)
        for name, (augmentation, operations) in CASES.items():
            theirs = v2.Compose([v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), *operations])
            least = [float("inf")] * 2
            for _ in range(TURNS):
                spent = seconds(partial(ours, augmentation), images), seconds(partial(peers, theirs), images)
                least = [min(pair) for pair in zip(least, spent, strict=True)]
            mine, other = (best / number * 1e6 for best in least)
            print(f"{size} x {size}, {name}: {mine:,.0f} us, {mine / other:.2f} of torchvision's {other:,.0f} us")


def ours(augmentation: PadCrop, image: Pixels, position: int) -> Pixels:
    return augmentation(image, image.shape[0], rng(0, position))


def peers(transform: nn.Module, image: Pixels, _: int) -> Pixels:
    return np.asarray(transform(Image.fromarray(image)))


def seconds(work: Callable[[Pixels, int], Pixels], images: Pixels) -> float:
    began = time.process_time()
    for position, image in enumerate(images):
        work(image, position)
    return time.process_time() - began


if __name__ == "__main__":
    main()
