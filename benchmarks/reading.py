"""What reading ahead saves: python -m benchmarks.reading data=FOLDER [size=224] [batch=128] [batches=16] [rounds=5]

Training batches of a data set with two threads, with rows read ahead and without, in turns in one process; first with
the shards out of the system's memory (they are evicted before each turn), then with them in it. Seconds, their ratio,
and the seconds of these that waited for reading.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

from data_loaders.augment import PadCrop, Standard
from data_loaders.images import CAUSES, Filler
from data_loaders.index import Index, open_index
from data_loaders.loader import Costs, Data, training_batches
from data_loaders.sampler import Stratified

READ = CAUSES.index("read")


def evict(index: Index) -> None:
    for shard in index.shards:
        handle = os.open(index.folder / "shards" / shard, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(index: Index, data: Data, batches: int, turn: int) -> tuple[float, float]:
    """Seconds in all, and of these waited for reading; every turn has other rows."""
    stream, costs = Stratified(temper=1).over(index, data.training_rows(index), turn), Costs()
    began = time.perf_counter()
    for batch in training_batches(index, data, stream, 0, range(batches), costs=costs):
        del batch
    return time.perf_counter() - began, float(costs.waited[READ])


def main(arguments: list[str]) -> None:
    given = {"size": "224", "batch": "128", "batches": "16", "rounds": "5"}
    given |= dict(argument.split("=", 1) for argument in arguments)
    index, size = open_index(Path(given["data"])), int(given["size"])
    augmentation = Standard(area=(0.08, 1.0)) if size > 64 else PadCrop()
    data = Data(path=index.folder, size=size, batch=int(given["batch"]), augmentation=augmentation)
    print(
        "| shards | ahead, s | not ahead, s | ratio (least – greatest) | waited for reading, s |\n|---|---|---|---|---|"
    )
    for place in ("on the disk", "in memory"):
        found = list[tuple[tuple[float, float], ...]]()
        for turn in range(int(given["rounds"]) + 1):
            pair = []
            for how in (Filler.expect, lambda *_: None):
                if place == "on the disk":
                    evict(index)
                with mock.patch.object(Filler, "expect", how):
                    pair.append(timed(index, data, int(given["batches"]), turn))
            found += [tuple(pair)] if turn else []  # the first one warms up
        ratios = [plain[0] / ahead[0] for ahead, plain in found]
        ahead, plain = (
            [statistics.median(side[k] for side in sides) for k in (0, 1)] for sides in zip(*found, strict=True)
        )
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"
        print(
            f"| {place} | {ahead[0]:.2f} | {plain[0]:.2f} | {spread} | {ahead[1]:.2f}, not {plain[1]:.2f} |", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
