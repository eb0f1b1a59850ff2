"""From rows to batches: read, check, decode, augment, in threads, a few batches ahead of the model.

A batch is uint8; the device turns it into numbers. What a batch holds is a function of its positions alone, so neither
the number of threads nor of workers changes it. Threads suffice: reading, decoding and resampling release the GIL.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from data_loaders import manifest
from data_loaders.augment import AnyAugmentation, Standard, centred, rng
from data_loaders.decode import Pixels, Undecodable, decode
from data_loaders.faults import Fault
from data_loaders.formats.header import PIXEL_CAP
from data_loaders.index import DamagedRow, Index, Ints, Reader, open_index
from data_loaders.manifest import SHARDS
from data_loaders.sampler import AnySampler, Stratified
from data_loaders.settings import Settings
from data_loaders.shards import rejected
from data_loaders.sources.rows import Rejected, Row, Source, Unreadable
from data_loaders.splits import TRAIN
from data_loaders.stream import Sampler, scramble

T = TypeVar("T")


class Data(Settings):
    """Which images a step sees, and how they come to it."""

    path: Path
    """Folder of the data set, made by `python -m jobs.ingest`."""
    generation: PositiveInt | None = None
    """Of the data set; by default the newest when a run begins, which then stays with it."""
    train: str = TRAIN
    """Split to learn from."""
    fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the rows of each class that is learnt from, one row at least; a smaller share is a part of a larger."""
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

    def training_rows(self, index: Index) -> Ints:
        """Rows of the data set that are learnt from, in its order: of each class those of least checksum."""
        rows = index.rows_of(self.train)
        if self.fraction == 1:
            return rows
        order = np.lexsort((scramble(index.crc32c[rows].astype(np.uint64)), index.labels[rows]))
        sizes = np.bincount(index.labels[rows])
        place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.sort(rows[order[place < np.repeat(np.ceil(self.fraction * sizes), sizes)]])

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


def picture(reader: Reader, row: int) -> Pixels:
    """The upright image of a row. Raises DamagedRow."""
    return made_of(reader, row, decode)


def made_of(reader: Reader, row: int, work: Callable[[bytes, int], T]) -> T:
    """What `work` makes of the image file of a row and of the most pixels that it may have: the ingest may have had a
    higher cap than the usual one. Raises DamagedRow, also where `work` raises Undecodable."""
    content, index = reader.read(row), reader.index
    try:
        return work(content, max(PIXEL_CAP, index.most_pixels))
    except Undecodable as wrong:
        short = isinstance(wrong.__cause__, MemoryError)
        fix = "give it more memory, or fewer threads" if short else "ingest again with shards.check=decode"
        where = index.folder / SHARDS / index.shards[index.shard[row]]
        fault = Fault(str(where), f"row {row} ({index.ids[row]}) {wrong}", fix)
        raise DamagedRow("An image cannot be decoded:", [fault], 65) from wrong


def ids_of(index: Index, rows: Ints) -> pa.Array:
    """Ids of rows, [N], in their order; `large_string` only where they have more than 2 GiB of text.

    Each chunk by itself: Arrow's own `take` joins all of them first, and its string has no room for more than that.
    """
    order = np.argsort(rows, kind="stable")
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    parts, start, done = [pa.array([], pa.large_string())], 0, 0
    for chunk in index.ids.chunks:
        stop = int(np.searchsorted(rows, start + len(chunk), sorter=order))
        if stop > done:
            parts.append(chunk.take(pa.array(rows[order[done:stop]] - start)).cast(pa.large_string()))
        start, done = start + len(chunk), stop
    found = pa.concat_arrays(parts).take(pa.array(back))
    return found.cast(pa.string()) if found.nbytes < 2**31 else found


def cuts(batch: int, parts: int) -> list[range]:
    """The places of a batch in so many parts, one after the other, which begin at even places: neighbours are mixed."""
    bounds = [2 * (batch // 2 * part // parts) for part in range(parts)] + [batch]
    return [range(*pair) for pair in pairwise(bounds)]


def training_batches(
    index: Index, data: Data, sampler: Sampler, seed: int, steps: range, places: range | None = None
) -> Generator[Batch]:
    """The images at these places of the batch of every step; by default at all of them."""
    at = np.asarray(places if places is not None else range(data.batch))
    positions = (step * data.batch + at for step in steps)

    def load(reader: Reader, row: int, position: int) -> Pixels:
        return data.augmentation(picture(reader, row), data.size, rng(seed, position))

    return _batches(index, data, ((sampler.rows(p), p, len(at)) for p in positions), load)


def exact_batches(index: Index, data: Data, rows: Ints, rank: int = 0, workers: int = 1) -> Generator[Batch]:
    """A rank's part of one pass over rows, each exactly once over all ranks.

    The cut into batches is the same for any number of workers, and a batch is never divided: so every image meets the
    same neighbours, and its logits the same rounding, on whichever worker it lands.
    """
    starts = range(rank * data.batch, len(rows), workers * data.batch)
    parts = (rows[start : start + data.batch] for start in starts)

    def load(reader: Reader, row: int, _: int) -> Pixels:
        return centred(picture(reader, row), data.size)

    return _batches(index, data, ((part, part, data.batch) for part in parts), load)


def _batches(
    index: Index,
    data: Data,
    plan: Iterator[tuple[Ints, Ints, int]],
    load: Callable[[Reader, int, int], Pixels],
) -> Generator[Batch]:
    """For each (rows, key of each row, places to fill), the batch; `load` makes an image of a reader, row and key."""
    cells = index.cells
    with closing(Reader(index)) as reader, ThreadPoolExecutor(data.threads, "loader") as pool:

        def fill(images: NDArray[np.uint8], place: int, row: int, key: int) -> None:
            images[place] = load(reader, row, key).transpose(2, 0, 1)

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
