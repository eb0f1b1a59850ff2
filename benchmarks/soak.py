"""Whether loading leaks: python -m benchmarks.soak data=FOLDER [batches=10000] [batch=512] [size=32] [processes=0]

Takes so many training batches of a data set with two threads (or processes), and prints after each tenth of them the
memory of this process and of those that help it, without files, which other programs share, and its open files. Fails
where the last is more than 2 % above that of the second, which has everything warm.
"""

import os
import re
import sys
from itertools import chain
from pathlib import Path

from data_loaders.augment import PadCrop
from data_loaders.index import open_index
from data_loaders.loader import Data, training_batches
from data_loaders.progress import Progress
from data_loaders.sampler import Stratified

TENTHS = 10
MOST_GROWTH = 1.02


def memory() -> float:
    """10^6 bytes."""
    children = [task.read_text().split() for task in Path("/proc/self/task").glob("*/children")]
    pids = [os.getpid(), *chain.from_iterable(children)]
    files = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    found = (re.search(rf"^Pss_{part}: +(\d+) kB", file, re.MULTILINE) for file in files for part in ("Anon", "Shmem"))
    return sum(int(size[1]) for size in found if size) * 1024 / 1e6


def main(arguments: list[str]) -> None:
    given = {"batches": "10000", "batch": "512", "size": "32", "processes": "0"}
    given |= dict(argument.split("=", 1) for argument in arguments)
    index = open_index(Path(given["data"]))
    data = Data(
        path=index.folder,
        size=int(given["size"]),
        batch=int(given["batch"]),
        augmentation=PadCrop(),
        loading="processes" if int(given["processes"]) else "threads",
    )
    count, seen = int(given["batches"]), list[float]()
    progress = Progress("loading", count, "batches")
    sampler = Stratified().over(index, data.training_rows(index), 0)
    print("| batches | MB | open files |\n|---|---|---|")
    for number, batch in enumerate(training_batches(index, data, sampler, 0, range(count)), 1):
        progress.show(number)
        if number % (count // TENTHS) == 0:
            seen.append(memory())
            print(f"| {number:,} | {seen[-1]:.1f} | {len(os.listdir('/proc/self/fd'))} |", flush=True)
        del batch
    if seen[-1] > MOST_GROWTH * seen[1]:
        sys.exit(f"memory grew from {seen[1]:.1f} to {seen[-1]:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
