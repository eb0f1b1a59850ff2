"""Our loader as one more module of the harness of public loaders, beside theirs; `benchmarks.loader` runs it.

With `PYTHONPATH` the project, `python run.py --task A --peers dali,benchmarks.loader_peer` of the harness runs it too.
"""

import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_loaders import native
from data_loaders.augment import PadCrop, Standard
from data_loaders.crew import Blocks, Own
from data_loaders.index import Ints
from data_loaders.loader import Data, training_batches
from data_loaders.manifest import SHARDS

VENV = sys.prefix
NAME = "Evenkeel"
SEED, STEPS = 0, 10**9
ALONE = 16
"""Batches that the decoder alone makes again and again."""
Stored = Literal["files", "pixels"]
FOLDERS: dict[Stored, str] = {"files": "evenkeel", "pixels": "evenkeel_pixels"}
"""Of our data sets, in the folder of a task."""
MEAN_AND_STD = {
    "A": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "B": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


def loader(
    data_dir: str,
    workers: int,
    out: str = "float32",
    stored: Stored = "files",
    layout: Literal["nhwc", "nchw"] = "nhwc",
    alone: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, of images and labels of a folder A or B; class-balanced.

    `layout` is that of the memory: nhwc is how they come, and costs nothing; the harness's own normalisation takes
    twice as long on it as on nchw, which takes a copy. Where it is `alone` there is only the decoder, no loader.
    """
    folder = Path(data_dir)
    data = data_of(folder, stored, workers)
    if alone:
        yield from decoded(data)
    index = data.index()
    sampler = data.sampler.over(index, data.training_rows(index), SEED)
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in MEAN_AND_STD[folder.name])
    planar = Blocks((data.batch, 3, data.size, data.size), Own)
    for batch in training_batches(index, data, sampler, SEED, range(STEPS)):
        images = batch.images
        if layout == "nchw":
            images = planar.take()[1]
            np.copyto(images, batch.images)
        given = torch.from_numpy(images)
        yield (given.float().sub_(mean).div_(std) if out == "float32" else given), torch.from_numpy(batch.labels)


def data_of(folder: Path, stored: Stored, threads: int) -> Data:
    """What the harness asks of a task, as our settings."""
    path = folder / FOLDERS[stored]
    if folder.name == "A":
        augmentation = Standard(area=(0.08, 1.0), aspect=(3 / 4, 4 / 3))
        return Data(path=path, size=224, batch=256, threads=threads, augmentation=augmentation)
    return Data(path=path, size=32, batch=512, threads=threads, augmentation=PadCrop(padding=4))


def decoded(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, of which all is known before but the pixels: what threads that read and decode could deliver
    at most."""
    batches, ready = batches_of(data, ALONE), Queue[tuple[Tensor, Tensor]](data.threads)

    def work(first: int) -> None:
        memory = [np.zeros((data.batch, data.size, data.size, 3), np.uint8) for _ in range(2 + data.threads)]
        for turn in count():
            (todo, labels), images = batches[(first + turn) % ALONE], memory[turn % len(memory)]
            native.load(todo, images)
            assert not todo["status"].any(), "the decoder left a row"
            ready.put((torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)))

    for thread in range(data.threads):
        Thread(target=work, args=[thread * ALONE // data.threads], daemon=True).start()
    while True:
        yield ready.get()


def batches_of(data: Data, number: int) -> list[tuple[NDArray[Any], Ints]]:
    """What the native library is told of the first batches of the stream, [B] of native.ROW, and their labels [B]. The
    files stay open."""
    index = data.index()
    sampler = data.sampler.over(index, data.training_rows(index), SEED)
    handles = np.array([os.open(index.folder / SHARDS / name, os.O_RDONLY) for name in index.shards])
    batches = []
    for positions in np.arange(number * data.batch).reshape(number, data.batch):
        rows = sampler.rows(positions)
        todo = np.zeros(len(rows), native.ROW)
        todo["fd"], todo["place"] = handles[index.shard[rows]], np.arange(len(rows))
        todo["offset"], todo["length"], todo["crc32c"] = (
            index.offset[rows],
            index.length[rows],
            index.image_crc32c[rows],
        )
        todo["width"], todo["height"], todo["raw"] = index.width[rows], index.height[rows], index.side
        widths, heights = todo["width"].astype(np.int64), todo["height"].astype(np.int64)
        placing = data.augmentation.place(widths, heights, data.size, SEED, positions)
        todo["box"], todo["shift"], todo["flip"] = placing.boxes, placing.shifts, placing.flips
        batches.append((todo, index.labels[rows]))
    return batches
