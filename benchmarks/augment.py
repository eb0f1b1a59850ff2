"""What training images cost next to torchvision's on Pillow images: python -m benchmarks.augment

Theirs pads, crops and flips each image, then alters it; ours places each image likewise, by Pillow, and then alters the
batch, in chunks of as many as a loader gives it at a time. Both begin and end with arrays; ours also makes the random
numbers of the positions, theirs has torch's. They take turns in this process; CPU time of one thread, the least of all
turns.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from data_loaders.augment import PadCrop, placed
from data_loaders.policies import MEAN, AutoAugment, ColourJitter, RandAugment, TrivialAugment

TURNS = 7
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
Images = NDArray[np.uint8]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for size, number, chunks in ((32, 512, (64, 128, 512)), (224, 64, (16, 64))):
        images = np.random.default_rng(0).integers(0, 256, (number, size, size, 3), np.uint8)
        for name, (augmentation, operations) in CASES.items():
            theirs = v2.Compose([v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), *operations])
            ways = [partial(peers, theirs), *(partial(ours, augmentation, chunk) for chunk in chunks)]
            spent = [[seconds(way, images) for way in ways] for _ in range(TURNS)]
            other, *mine = (np.min(spent, axis=0) / number * 1e6).tolist()
            told = (
                f"{one:,.0f} us in chunks of {chunk} ({other / one:.1f} x)"
                for chunk, one in zip(chunks, mine, strict=True)
            )
            print(f"{size} x {size}, {name}: torchvision {other:,.0f} us an image; ours {', '.join(told)}")


def ours(augmentation: PadCrop, chunk: int, images: Images) -> Images:
    """Images [B, size, size, 3] -> the same."""
    size, sides = images.shape[1], np.full(chunk, images.shape[1])
    found = np.empty_like(images)
    for start in range(0, len(images), chunk):
        positions, here = np.arange(start, start + chunk), found[start : start + chunk]
        placing = augmentation.place(sides, sides, size, 0, positions)
        for at in range(chunk):
            box, shift, flip = placing.boxes[at], placing.shifts[at], int(placing.flips[at])
            here[at] = placed(images[start + at], box, shift, flip, size)
        altered = augmentation.alter(torch.from_numpy(here).permute(0, 3, 1, 2), 0, positions)
        here[:] = altered.permute(0, 2, 3, 1).numpy()
    return found


def peers(transform: nn.Module, images: Images) -> Images:
    return np.stack([np.asarray(transform(Image.fromarray(image))) for image in images])


def seconds(work: Callable[[Images], Images], images: Images) -> float:
    began = time.process_time()
    work(images)
    return time.process_time() - began


if __name__ == "__main__":
    main()
