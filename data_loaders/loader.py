"""From rows to batches: read, check, decode, augment, in threads, a few batches ahead of the model.

A batch is uint8; the device turns it into numbers. What a batch holds is a function of its positions alone, so neither
the number of threads nor of workers changes it. Threads suffice: reading, decoding and resampling release the GIL.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from data_loaders import manifest
from data_loaders.augment import AnyAugmentation, Standard, centred, rng
from data_loaders.decode import Pixels, Undecodable, decode
from data_loaders.index import Index, Ints, Reader, open_index
from data_loaders.sampler import AnySampler, Sampler, Stratified
from data_loaders.settings import Settings
from data_loaders.shards import rejected
from data_loaders.sources.rows import Rejected, Row, Source, Unreadable
from data_loaders.splits import TRAIN


class Data(Settings):
    """Which images a step sees, and how they come to it."""

    path: Path
    """Folder of the data set, made by `python -m jobs.ingest`."""
    generation: PositiveInt | None = None
    """Of the data set; by default the newest when a run begins, which then stays with it."""
    train: str = TRAIN
    """Split to learn from."""
    validation: str = "val"
    """Split to calibrate on."""
    size: PositiveInt = 64
    """Height and width that the model sees, in pixels."""
    batch: PositiveInt = 128
    """Images per step, over all workers."""
    sampler: AnySampler = Stratified()
    """The order and the mix of the training rows."""
    augmentation: AnyAugmentation = Standard()
    """What happens to a training image."""
    threads: PositiveInt = 2
    """Threads that load images, in each worker; changes the speed, never a batch."""
    prefetch: PositiveInt = 4
    """Batches loaded ahead."""

    def index(self) -> Index:
        """Of the data set."""
        return open_index(self.path, self.generation)

    def pinned(self, former: "Data | None" = None) -> "Data":
        """With a whole path and a generation: that of the run before, or the newest."""
        path = self.path.resolve()
        generation = self.generation or (former.generation if former and former.path == path else None)
        return self.model_copy(update={"path": path, "generation": generation or manifest.read(path).generation})


class Batch(NamedTuple):
    """B images of one step on one worker; rows that are not valid only fill the last batch up."""

    images: NDArray[np.uint8]
    """[B, 3, size, size], RGB."""
    labels: Ints
    """[B]"""
    cells: Ints
    """Intersection of the group columns, [B], a position in `Index.cell_names`."""
    rows: Ints
    """Rows of the data set, [B]."""
    valid: NDArray[np.bool_]
    """[B]"""


def share(batch: int, rank: int, workers: int) -> tuple[int, int]:
    """First and past-the-last place of a rank's part of a batch; parts are contiguous and differ by one at most."""
    return batch * rank // workers, batch * (rank + 1) // workers


def training_batches(
    index: Index, data: Data, sampler: Sampler, seed: int, steps: range, rank: int = 0, workers: int = 1
) -> Generator[Batch]:
    """A rank's part of the batch of every step."""
    start, stop = share(data.batch, rank, workers)
    positions = (step * data.batch + np.arange(start, stop) for step in steps)

    def load(read: Callable[[int], bytes], row: int, position: int) -> Pixels:
        return data.augmentation(decode(read(row)), data.size, rng(seed, position))

    return _batches(index, data, ((sampler.rows(p), p, stop - start) for p in positions), load)


def exact_batches(index: Index, data: Data, rows: Ints, rank: int = 0, workers: int = 1) -> Generator[Batch]:
    """A rank's part of one pass over rows, each exactly once over all ranks.

    The cut into batches is the same for any number of workers, and a batch is never divided: so every image meets the
    same neighbours, and its logits the same rounding, on whichever worker it lands.
    """
    starts = range(rank * data.batch, len(rows), workers * data.batch)
    parts = (rows[start : start + data.batch] for start in starts)

    def load(read: Callable[[int], bytes], row: int, _: int) -> Pixels:
        return centred(decode(read(row)), data.size)

    return _batches(index, data, ((part, part, data.batch) for part in parts), load)


def _batches(
    index: Index,
    data: Data,
    plan: Iterator[tuple[Ints, Ints, int]],
    load: Callable[[Callable[[int], bytes], int, int], Pixels],
) -> Generator[Batch]:
    """For each (rows, key of each row, places to fill), the batch; `load` makes an image of a reader, row and key."""
    cells = index.cells
    with closing(Reader(index)) as reader, ThreadPoolExecutor(data.threads, "loader") as pool:

        def fill(images: NDArray[np.uint8], place: int, row: int, key: int) -> None:
            images[place] = load(reader.read, row, key).transpose(2, 0, 1)

        def start(rows: Ints, keys: Ints, places: int) -> tuple[list[Future[None]], Batch]:
            images = np.zeros((places, 3, data.size, data.size), np.uint8)
            n, numbers = len(rows), np.zeros((3, places), np.int64)
            numbers[:, :n] = index.labels[rows], cells[rows], rows
            batch = Batch(images, numbers[0], numbers[1], numbers[2], np.arange(places) < n)
            spans = zip(rows.tolist(), keys.tolist(), strict=True)
            return [pool.submit(fill, images, place, *span) for place, span in enumerate(spans)], batch

        ahead = deque(start(*item) for item in islice(plan, data.prefetch))
        try:
            while ahead:
                futures, batch = ahead.popleft()
                for future in futures:
                    future.result()
                ahead.extend(start(*item) for item in islice(plan, 1))
                yield batch
        finally:
            for future in chain.from_iterable(futures for futures, _ in ahead):
                future.cancel()


def file_batches(
    source: Source, rows: list[Row], data: Data
) -> Iterator[tuple[NDArray[np.uint8], list[Row], list[Rejected]]]:
    """Images of a source, as evaluation sees them: images [B, 3, size, size], their rows, and rows that cannot be read
    or decoded, which have no image."""

    def fetch(row: Row) -> bytes | Rejected:
        try:
            return read(row)
        except (OSError, Unreadable) as wrong:
            return rejected(row, wrong)

    def load(row: Row, content: bytes | Rejected) -> Pixels | Rejected:
        try:
            return content if isinstance(content, Rejected) else centred(decode(content), data.size)
        except Undecodable as wrong:
            return rejected(row, wrong)

    with source.reader() as read, ThreadPoolExecutor(data.threads, "loader") as pool:
        for start in range(0, len(rows), data.batch):
            part = rows[start : start + data.batch]
            loaded = list(zip(part, pool.map(load, part, map(fetch, part)), strict=True))
            images = [image.transpose(2, 0, 1) for _, image in loaded if not isinstance(image, Rejected)]
            empty = np.zeros((0, 3, data.size, data.size), np.uint8)
            yield (
                np.stack(images) if images else empty,
                [row for row, image in loaded if not isinstance(image, Rejected)],
                [image for _, image in loaded if isinstance(image, Rejected)],
            )
