"""What safety costs a training: python -m benchmarks.engine

Steps of a ResNet-18 on 128 images of 64 x 64 pixels on one thread of a CPU, the sides taking turns in one process:
- a reproducible step (4 micro-batches, added in a tree) against a plain one, with one worker and with two;
- looking whether the gradient is finite, as a share of a step;
- a checkpoint: how long training waits for it (to copy weights and momentum), and how long a thread takes to write it.
The least time of all turns, in CPU seconds of the worker; of checkpoints, wall seconds.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import get_total_norm

from data_loaders.settings import override
from trainer.checkpoint import State, Writer
from trainer.config import Config
from trainer.context import Cluster, Local, spawn
from trainer.learner import Learner
from trainer.losses import Known
from trainer.mixing import Images

TURNS = 5
BATCH, CLASSES, SIDE = 128, 10, 64
CPU = torch.device("cpu")


def learner(workers: int, rank: int, folder: Path, **changes: object) -> Learner:
    tree = {"data": {"path": "unused", "size": SIDE, "batch": BATCH}, "model": {"kind": "resnet", "depth": 18}}
    config = override(Config.model_validate(tree), changes)
    known = Known(np.full((1, CLASSES), 100), np.full(CLASSES, 1 / CLASSES))
    return Learner(config, Local(folder, CPU, rank, workers), CLASSES, [(0, known)], 1000)


def batch(places: range) -> Images:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), generator=random, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=random)
    here = slice(places.start, places.stop)
    return Images(images[here], labels[here], torch.zeros(BATCH, dtype=torch.int64)[here])


def least(
    sides: dict[str, Callable[[int], object]], clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    found = dict.fromkeys(sides, float("inf"))
    for turn in range(TURNS + 1):
        for name, side in sides.items():
            began = time.process_time()
            side(turn)
            if turn:  # the first one warms up
                found[name] = min(found[name], time.process_time() - began)
    return found


def steps(rank: int, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    ways = {"plain": {}, "reproducible": {"train.reproducible": 4}}
    learners = {name: learner(workers, rank, Path(folder), **how) for name, how in ways.items()}

    def stepping(one: Learner) -> Callable[[int], object]:
        given = batch(range(one.places[0].start, one.places[-1].stop))
        return lambda turn: one.step(given, None, turn)

    found = least({name: stepping(one) for name, one in learners.items()})
    if rank == 0:
        ratio = found["reproducible"] / found["plain"]
        print(
            f"{workers} worker{'s' * (workers > 1)}: a reproducible step takes {ratio:.3f} of a plain one", flush=True
        )


def checks(folder: Path) -> None:
    one = learner(1, 0, folder)
    given = batch(range(BATCH))
    one.step(given, None, 0)
    gradients = [p.grad for p in one.model.parameters() if p.grad is not None]
    found = least(
        {"step": lambda turn: one.step(given, None, turn), "norm": lambda turn: get_total_norm(gradients).isfinite()}
    )
    print(f"whether the gradient is finite: {found['norm'] / found['step']:.2%} of a step")


def checkpoints(folder: Path) -> None:
    one, given = learner(1, 0, folder), batch(range(BATCH))
    one.step(given, None, 0)
    learned = one.learned()
    size = sum(t.nbytes for part in learned.tensors.values() for t in part.values()) / 2**20
    writer = Writer(folder, keep=1)

    def write(turn: int) -> None:
        writer.save(State(turn, "x"), one.learned())

    waits, writes = float("inf"), float("inf")
    for turn in range(TURNS):
        began = time.perf_counter()
        write(turn)
        waits = min(waits, time.perf_counter() - began)
        writer.wait()
        writes = min(writes, time.perf_counter() - began)
    writer.close()
    print(
        f"a checkpoint of {size:.0f} MiB: training waits {1000 * waits:.0f} ms, its thread takes {1000 * writes:.0f} ms"
    )
    print(f"so at one a minute training waits {waits / 60:.3%} of the time")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            spawn(steps, Cluster(on="local", workers=workers, device="cpu"), workers, folder)
        checks(Path(folder))
        checkpoints(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
