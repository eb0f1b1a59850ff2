"""From rows to batches: read, check, decode, augment, in threads, a few batches ahead of the model.

A batch is uint8; the device turns it into numbers. What a batch holds is a function of its positions alone, so neither
the number of threads, processes or workers changes it.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from data_loaders import manifest
from data_loaders.augment import AnyAugmentation, Standard
from data_loaders.crew import Begun, Crew, Loading
from data_loaders.decode import Pixels, Undecodable
from data_loaders.faults import Fault, Refusal
from data_loaders.images import CAUSES, Decoder, Encoded, Filled, Recipe, evaluated
from data_loaders.index import DamagedRow, Index, Ints, Rows, open_index
from data_loaders.progress import say
from data_loaders.sampler import AnySampler, Stratified
from data_loaders.settings import Settings
from data_loaders.shards import rejected
from data_loaders.sources.rows import Rejected, Row, Source, Unreadable
from data_loaders.splits import TRAIN
from data_loaders.stream import Floats, Sampler, drawn, scramble

MOST_AHEAD = 4
"""Batches: more do not help, as long as a batch takes about as long as the one before it."""
LOOKED_AT = 2**16
"""Positions behind that of a damaged row that are searched for another of its class and groups."""


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
    loading: Loading = "threads"
    """Where images are made: in those threads, or in a process for each of them; changes the speed, never a batch."""
    memory: PositiveInt = 512
    """10^6 bytes, in each worker, that hold batches: the one that is learnt from and up to four ahead of it."""
    decoder: Decoder = "auto"
    """Of JPEG: auto is the native library where it was built, else Pillow; gpu is nvJPEG for training images, where
    there is one. Their pixels may differ by some levels, so the one that was used is kept with the run."""
    cache: Path | None = None
    """Folder on a disk of the machine that loads, for copies of shards that lie afar (on NFS, say): they are made in
    the background, checked, shared by all workers there, and kept for the next run."""
    damaged: Literal["stop", "skip"] = "stop"
    """What to do with a training row that is not as it was written, or cannot be decoded: stop and name it, or take the
    next row of the same class and groups, and count it. Evaluation always stops: it is of all rows, or of none."""
    most_damaged: Annotated[float, Field(ge=0.0, le=1.0)] = 0.001
    """Share of the rows of the data set that may be skipped, one row at least; more are a refusal all the same."""

    def index(self) -> Index:
        """Of the data set."""
        return open_index(self.path, self.generation)

    def training_rows(self, index: Index) -> Rows:
        """Rows of the data set that are learnt from, in its order: of each class those of least checksum."""
        if self.fraction == 1:
            return index.whole(self.train)
        rows = index.rows_of(self.train)
        labels = index.labels_of(rows)
        order = np.lexsort((scramble(index.crc32c[rows].astype(np.uint64)), labels))
        sizes = np.bincount(labels)
        place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.sort(rows[order[place < np.repeat(np.ceil(self.fraction * sizes), sizes)]])

    def ahead(self, places: int) -> int:
        """Batches of so many places that are loaded ahead: beside them, the memory holds the one that is learnt from
        and the one that it is changed for. Raises Refusal where it has no room for one."""
        each = places * self.size**2 * 3
        if (room := self.memory * 10**6 // each - 2) < 1:
            fix = f"set data.memory={-(-3 * each // 10**6)} or more, or a smaller data.batch"
            what = f"{self.memory} MB hold less than three batches of {each / 1e6:,.1f} MB"
            raise Refusal("Batches do not fit the memory:", [Fault("data.memory", what, fix)])
        return min(room, MOST_AHEAD)

    def pinned(self, former: "Data | None" = None) -> "Data":
        """With a whole path and a generation: that of the run before, or the newest."""
        path = self.path.resolve()
        generation = self.generation or (former.generation if former and former.path == path else None)
        return self.model_copy(update={"path": path, "generation": generation or manifest.read(path).generation})


class Batch(NamedTuple):
    """B images of one step on one worker; rows that are not valid only fill the last batch up."""

    images: NDArray[np.uint8]
    """[B, 3, size, size], RGB; in memory the channels of a pixel lie side by side (channels last)."""
    labels: Ints
    """[B]"""
    cells: Ints
    """Intersection of the group columns, [B], a position in `Index.cell_names`."""
    rows: Ints
    """Rows of the data set, [B]."""
    valid: NDArray[np.bool_]
    """[B]"""
    positions: Ints
    """Of the stream, [B], in training; of evaluation, the rows."""
    replaced: NDArray[np.bool_]
    """Whether another row took the place of one that is damaged, of the same class and cell, [B]."""
    encoded: Encoded | None = None
    """What a GPU is still to decode into `images`, with `data.decoder=gpu`."""


@dataclass
class Costs:
    """What loading has cost whoever takes the batches."""

    waited: Floats = field(default_factory=lambda: np.zeros(len(CAUSES)))
    """Seconds, [3], shared out by what the threads spent on the batches that were waited for."""
    damaged: set[int] = field(default_factory=set)
    """Rows that were skipped, and those that were tried in their place and are damaged too."""


def ids_of(index: Index, rows: Ints) -> pa.Array:
    """Ids of rows, [N], in their order; `large_string` only where they have more than 2 GiB of text."""
    found = index.ids.chunk(0).take(pa.array(rows))
    return found.cast(pa.string()) if found.nbytes < 2**31 else found


def cuts(batch: int, parts: int) -> list[range]:
    """The places of a batch in so many parts, one after the other, which begin at even places: neighbours are mixed."""
    bounds = [2 * (batch // 2 * part // parts) for part in range(parts)] + [batch]
    return [range(*pair) for pair in pairwise(bounds)]


def training_batches(
    index: Index,
    data: Data,
    sampler: Sampler,
    seed: int,
    steps: range,
    places: range | None = None,
    *,
    costs: Costs | None = None,
    alters: bool = True,
    pinned: bool = False,
) -> Generator[Batch]:
    """The images at these places of the batch of every step; by default at all of them.

    Where it does not `alter` pixels, `data.augmentation.alter` of images and positions is still to be done, on a
    device. `pinned` memory is that from which a GPU copies. Raises DamagedRow, or Refusal where too many rows are.
    """
    at = np.asarray(places if places is not None else range(data.batch))
    alters = alters and data.augmentation.alters
    recipe = Recipe(data.size, data.decoder, data.augmentation, seed, data.cache, alters)
    costs = costs or Costs()
    mend = Mend(index, data, sampler, costs) if data.damaged == "skip" else None
    return _batches(
        index, data, drawn(sampler, (step * data.batch + at for step in steps)), len(at), recipe, costs, mend, pinned
    )


def exact_batches(index: Index, data: Data, rows: Ints, rank: int = 0, workers: int = 1) -> Generator[Batch]:
    """A rank's part of one pass over rows, each exactly once over all ranks.

    The cut into batches is the same for any number of workers, and a batch is never divided: so every image meets the
    same neighbours, and its logits the same rounding, on whichever worker it lands.
    """
    starts = range(rank * data.batch, len(rows), workers * data.batch)
    parts = (rows[start : start + data.batch] for start in starts)
    plan = ((part, part) for part in parts)
    decoder = "auto" if data.decoder == "gpu" else data.decoder
    return _batches(index, data, plan, data.batch, Recipe(data.size, decoder, cache=data.cache), Costs())


def _batches(
    index: Index,
    data: Data,
    plan: Iterator[tuple[Ints, Ints]],
    places: int,
    recipe: Recipe,
    costs: Costs,
    mend: "Mend | None" = None,
    pinned: bool = False,
) -> Generator[Batch]:
    """For each (rows, positions), the batch of so many places."""
    with closing(Crew(index, recipe, places, data.threads, data.loading, pinned)) as crew:
        ahead = deque(crew.start(*item) for item in islice(plan, data.ahead(places)))
        while ahead:
            begun = ahead.popleft()
            began = perf_counter()
            try:
                filled = begun.wait()
            except Exception:
                index.check(wait=True)  # or it is because of a damaged index
                raise
            _share_out(perf_counter() - began, filled.seconds, costs)
            files = [*filled.files]
            index.check(wait=bool(filled.damaged))
            for place, wrong in filled.damaged:
                if mend is None or not wrong.lasts:
                    raise wrong
                files += [(place, file) for _, file in mend(crew, begun, place, wrong).files]
            ahead.extend(crew.start(*item) for item in islice(plan, 1))
            replaced = [place for place, _ in filled.damaged]
            yield _batch(index, begun, replaced, _encoded(index, recipe, begun, files))
            del begun  # so that its memory is free as soon as whoever took the batch is done with it
        index.check(wait=True)


def _encoded(index: Index, recipe: Recipe, begun: Begun, files: list[tuple[int, bytes]]) -> Encoded | None:
    if not files:
        return None
    places = [place for place, _ in files]
    samples = index.samples(begun.rows)
    placing = recipe.placing(samples.width, samples.height, begun.positions)
    return Encoded(begun.rows[places].tolist(), places, [file for _, file in files], placing)


def _batch(index: Index, begun: Begun, replaced: list[int], encoded: Encoded | None) -> Batch:
    n, rows, places = len(begun.rows), begun.rows, len(begun.images)
    numbers, flags = np.zeros((4, places), np.int64), np.zeros((2, places), np.bool_)
    numbers[:, :n] = index.labels_of(rows), index.cells_of(rows), rows, begun.positions
    flags[0, :n], flags[1, replaced] = True, True
    labels, cells, rows, positions = numbers
    return Batch(begun.images.transpose(0, 3, 1, 2), labels, cells, rows, flags[0], positions, flags[1], encoded)


def _share_out(seconds: float, spent: Floats, costs: Costs) -> None:
    costs.waited += seconds * spent / max(spent.sum(), 1e-9)


@dataclass(frozen=True)
class Mend:
    """Puts another row of the same class and groups in the place of a damaged one: a function of the position, so that
    a resume, or other workers, find the same."""

    index: Index
    data: Data
    sampler: Sampler
    costs: Costs

    def __call__(self, crew: Crew, begun: Begun, place: int, wrong: DamagedRow) -> Filled:
        """Puts row and image in the place. Raises what is wrong where no row of the kind is left."""
        row, position = int(begun.rows[place]), int(begun.positions[place])
        self._note(row, wrong)
        for other in self._others(row, position):
            done = crew.fill(other, position, begun.images[place])
            if not done.damaged:
                begun.rows[place] = other
                return done
            if not done.damaged[0][1].lasts:
                raise done.damaged[0][1]
            self._note(other, done.damaged[0][1])
        raise wrong

    def _note(self, row: int, wrong: DamagedRow) -> None:
        if row not in self.costs.damaged:
            self.costs.damaged.add(row)
            say(f"skipping {wrong.faults[0]}")
            refuse_too_many(self.index, self.data, len(self.costs.damaged))

    def _others(self, row: int, position: int) -> Iterator[int]:
        """Rows of the class and cell of a row, each once: in the order in which they stand behind a position and, of
        rare kinds, then as they lie in the data set, from a place that the position says."""
        index, seen, (cell,) = self.index, {row}, self.index.cells_of(np.array([row]))
        for start in range(position + 1, position + 1 + LOOKED_AT, 1024):
            rows = self.sampler.rows(np.arange(start, start + 1024))
            of_kind = (index.labels_of(rows) == index.label[row]) & (index.cells_of(rows) == cell)
            yield from _unseen(rows[of_kind], seen)
        rows = index.kind_of(row)
        yield from _unseen(np.roll(rows, -int(scramble(np.array([position], np.uint64))[0] % len(rows))), seen)


def _unseen(rows: Ints, seen: set[int]) -> Iterator[int]:
    for row in rows.tolist():
        if row not in seen:
            seen.add(row)
            yield row


def refuse_too_many(index: Index, data: Data, damaged: int) -> None:
    """Raises Refusal (65) where so many rows may not be skipped."""
    most = max(1, int(data.most_damaged * len(index)))
    if damaged > most:
        what = f"{damaged} damaged rows were met, and data.most_damaged lets {most} be skipped"
        fix = "run `python -m jobs.verify` and restore the data set, or raise the ceiling"
        raise Refusal("Too many rows are damaged:", [Fault(str(index.folder), what, fix)], 65)


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
            return content if isinstance(content, Rejected) else evaluated(content, data.size, data.decoder)
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
