"""Where every sample lies and what is known of it, as arrays: the only part of a data set that is held in memory, or is
mapped into it where there is much of it."""

import errno
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_loaders import manifest as manifests
from data_loaders.faults import Fault, Refusal
from data_loaders.manifest import SHARDS, Manifest
from data_loaders.mapped import SLICE, ArrowFile, Handle, Verification

Ints = NDArray[np.int64]
MOST_CELLS = 2**24
HANDLES = 128
"""Open shards of a reader; a data set may have more than a process may open."""
TAILS = 2**16
"""Ends of what checksums cover that a reader remembers: one for each class in each intersection of groups, mostly."""
NOT_OF_THE_DATA = {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM}


class DamagedRow(Refusal):
    """The bytes of a row are not those that were written."""

    lasts = True
    """Whether it is the data that is damaged, and not the way to it, or the memory to decode it, that fails for now."""


FIELDS = {
    "label": pa.int32(),
    "split": pa.int16(),
    "shard": pa.int32(),
    "offset": pa.int64(),
    "length": pa.int32(),
    "crc32c": pa.uint32(),
    "image_crc32c": pa.uint32(),
    "width": pa.int32(),
    "height": pa.int32(),
    "quality": pa.uint8(),
    "look": pa.uint64(),
    "unit": pa.uint64(),
}
"""Columns of the index file, beside `id` and one of int32 for each group column."""


class Order(NamedTuple):
    """Which rows are of which of S strata; these are in the order of their split, class and groups."""

    split: Ints
    """Of each stratum, [S], a position in `splits`."""
    label: Ints
    """[S]"""
    groups: Ints
    """[S, A]; -1 where groups do not count."""
    first: Ints
    """Where in `rows` the rows of each stratum begin, [S]; they lie side by side, in their order."""
    sizes: Ints
    """Rows of each stratum, [S]."""
    rows: Ints
    """Rows of the data set; it holds more than those of one order."""

    def of(self, split: int) -> slice:
        """The strata of a split."""
        return slice(*np.searchsorted(self.split, [split, split + 1]).tolist())


class Samples(NamedTuple):
    """What a loader needs to know of B rows."""

    shard: Ints
    """[B]"""
    offset: Ints
    """[B]"""
    length: Ints
    """[B]"""
    image_crc32c: Ints
    """[B]"""
    width: Ints
    """[B]"""
    height: Ints
    """[B]"""


@dataclass(frozen=True)
class Index:
    """N samples of K classes with A group columns.

    Fields are the columns of the file as they lie there, and cost nothing. A large file is verified while it is used:
    what costs as much, such as `labels`, `cells`, `ids` or `rows_of`, waits for the verdict; whoever needs some rows at
    a time asks for it with `check`.
    """

    label: NDArray[np.int32]
    """Class of each sample, [N], in 0 … K-1."""
    group: tuple[NDArray[np.int32], ...]
    """Of each group column the value of each sample, A of [N], a position in `group_values`."""
    in_split: NDArray[np.int16]
    """Position in `splits`, [N]."""
    shard: NDArray[np.int32]
    """Position in `shards`, [N]."""
    offset: Ints
    """First byte of the image in its shard, [N]."""
    length: NDArray[np.int32]
    """Bytes of the image, [N]."""
    crc32c: NDArray[np.uint32]
    """Checksum of image, label, groups and id, [N]."""
    image_crc32c: NDArray[np.uint32]
    """Checksum of the image alone, [N]."""
    width: NDArray[np.int32]
    """Pixels, of the upright image, [N]."""
    height: NDArray[np.int32]
    quality: NDArray[np.uint8]
    """Of a JPEG, 1 … 100, [N]; 0 of others."""
    look: NDArray[np.uint64]
    """Perceptual hash, [N]; 0 where it was not taken."""
    unit: NDArray[np.uint64]
    """Hash of what is never divided between splits (a patient), [N]; 0 of a row alone."""
    id_ends: Ints
    """Where the path of each sample, as its source wrote it, ends in `id_text`, [N + 1]; the first one begins there."""
    id_text: NDArray[np.uint8]
    """UTF-8"""
    by_class: Order
    """Rows by split and class."""
    by_cell: Order
    """Rows by split, class and groups."""
    classes: tuple[str, ...]
    group_values: dict[str, tuple[str, ...]]
    """Group column -> its values."""
    splits: tuple[str, ...]
    shards: tuple[str, ...]
    folder: Path
    fingerprint: str
    """Hash of everything above: two data sets with the same fingerprint hold the same rows."""
    side: int
    """Height and width of images that are stored as pixels [side, side, 3]; 0 where they are files."""
    manifest: Manifest
    verification: Verification

    def __len__(self) -> int:
        return len(self.label)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return index_of, (self.folder, self.manifest)

    def check(self, wait: bool = False) -> None:
        """Raises Refusal (65) where the files are damaged, as far as that is known by now or, if it waits, at all."""
        self.verification.check(wait)

    @cached_property
    def labels(self) -> Ints:
        """Class of each sample, [N]."""
        self.check(wait=True)
        return self.label.astype(np.int64)

    @cached_property
    def groups(self) -> Ints:
        """Value of each group column, [N, A], a position in `group_values`."""
        self.check(wait=True)
        return np.stack(self.group, 1).astype(np.int64) if self.group else np.zeros((len(self), 0), np.int64)

    @cached_property
    def split(self) -> Ints:
        """Position in `splits`, [N]."""
        self.check(wait=True)
        return self.in_split.astype(np.int64)

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        """Path of each sample as its source wrote it, [N]."""
        self.check(wait=True)
        buffers = [None, pa.py_buffer(self.id_ends), pa.py_buffer(self.id_text)]
        return pa.chunked_array([pa.Array.from_buffers(pa.large_string(), len(self), buffers)])

    def id_of(self, row: int) -> str:
        return bytes(self.id_text[self.id_ends[row] : self.id_ends[row + 1]]).decode(errors="replace")

    def rows_of(self, split: str) -> Ints:
        """The rows of a split, in the order of the data set."""
        number = self._number(split)
        self.check(wait=True)
        return np.flatnonzero(self.in_split == number)

    def whole(self, split: str) -> "Whole":
        """The same rows, without a list of them."""
        return Whole(self, self._number(split))

    def _number(self, split: str) -> int:
        if split not in self.splits:
            fix = f"it has {', '.join(self.splits)}"
            raise Refusal("A split is missing:", [Fault(str(self.folder), f"no split {split!r}", fix)], 65)
        return self.splits.index(split)

    def kind_of(self, row: int) -> Ints:
        """All rows of the split, class and groups of a row, in their order."""
        of = self.by_cell
        is_same = (of.split == self.in_split[row]) & (of.label == self.label[row])
        for column, values in enumerate(self.group):
            is_same &= of.groups[:, column] == values[row]
        (stratum,) = np.flatnonzero(is_same).tolist()
        return of.rows[of.first[stratum] : of.first[stratum] + of.sizes[stratum]]

    def class_sizes(self, rows: "Rows") -> Ints:
        """How many of these rows are of each class, [K]; of a whole split at no cost."""
        if not isinstance(rows, Whole):
            return np.bincount(self.labels_of(rows), minlength=len(self.classes))
        sizes, of = np.zeros(len(self.classes), np.int64), self.by_class.of(rows.split)
        sizes[self.by_class.label[of]] = self.by_class.sizes[of]
        return sizes

    def cell_sizes(self, rows: "Rows") -> Ints:
        """The same by cell, [cells, K]. Raises Refusal where there are too many cells."""
        shape = (self._count_cells(), len(self.classes))
        if not isinstance(rows, Whole):
            place = self.cells_of(rows) * len(self.classes) + self.labels_of(rows)
            return np.bincount(place, minlength=math.prod(shape)).reshape(shape)
        sizes, of = np.zeros(shape, np.int64), self.by_cell.of(rows.split)
        cells = self._cells(self.by_cell.groups[of].T, of.stop - of.start)
        sizes[cells, self.by_cell.label[of]] = self.by_cell.sizes[of]
        return sizes

    def occurring_cells(self) -> tuple[list[tuple[str, ...]], Ints]:
        """Values of the group columns in each intersection that has a sample, in order, and each sample's place among
        them, [N]. Of any number of columns, unlike `cells`."""
        number = numbered(zip(self.groups.T, map(len, self.group_values.values()), strict=True), len(self))
        _, first, place = np.unique(number, return_index=True, return_inverse=True)
        names = list(self.group_values.values())
        return [tuple(names[a][v] for a, v in enumerate(row)) for row in self.groups[first].tolist()], place

    @property
    def cells(self) -> Ints:
        """Intersection of all group columns that each sample lies in, [N], a position in `cell_names`.

        Raises Refusal where there are too many to count each of them.
        """
        self._count_cells()
        self.check(wait=True)
        return self._cells(self.group, len(self))

    @property
    def cell_names(self) -> list[tuple[str, ...]]:
        """Values of the group columns in each cell, in the order of `cells`; one empty tuple without group columns."""
        names: list[tuple[str, ...]] = [()]
        for values in self.group_values.values():
            names = [(*name, value) for name in names for value in values]
        return names

    def labels_of(self, rows: "Rows") -> Ints:
        """Class of each of these rows, [B]."""
        return self._at(self.label, rows)

    def cells_of(self, rows: "Rows") -> Ints:
        """Cell of each of these rows, [B], as `cells` has it, and as costly as they are many."""
        self._count_cells()
        return self._cells([self._at(values, rows) for values in self.group], len(rows))

    def samples(self, rows: Ints) -> Samples:
        """What a loader needs to know of these rows, [B], and all of it leads to a place in a shard."""
        names = ("shard", "offset", "length", "image_crc32c", "width", "height")
        shard, start, length, *rest = (self._at(getattr(self, name), rows) for name in names)
        if _outside(shard, len(self.shards)) or _leads_out(start, length, self._shard_sizes[shard]):
            self.check(wait=True)
        return Samples(shard, start, length, *rest)

    def _at(self, values: NDArray[Any], rows: "Rows") -> Ints:
        try:
            return values[rows].astype(np.int64)
        except IndexError:
            self.check(wait=True)  # the row may come of an order that is damaged
            raise

    @cached_property
    def _shard_sizes(self) -> Ints:
        return np.array([shard.bytes for shard in self.manifest.shards], np.int64)

    def _count_cells(self) -> int:
        if (count := math.prod(map(len, self.group_values.values()))) > MOST_CELLS:
            what = f"{len(self.group_values)} group columns have {count:,} intersections"
            raise Refusal("The groups are too many:", [Fault(str(self.folder), what, "ingest fewer group columns")], 65)
        return count

    def _cells(self, groups: Iterable[NDArray[Any]], length: int) -> Ints:
        cell = np.zeros(length, np.int64)
        for values, names in zip(groups, self.group_values.values(), strict=True):
            cell = cell * len(names) + values
        return cell


@dataclass(frozen=True)
class Whole:
    """All rows of a split, in the order of the data set: a value that takes no memory, of which numpy makes the list
    where one is needed."""

    index: Index
    split: int

    def __len__(self) -> int:
        return int(self.index.by_class.sizes[self.index.by_class.of(self.split)].sum())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Ints:
        return self.index.rows_of(self.index.splits[self.split])


Rows = Ints | Whole


def open_index(folder: Path, generation: int | None = None, *, verifies: bool = True) -> Index:
    """The index of the newest generation of the data set in `folder`, or of an earlier one.

    Raises Refusal (65) where a checksum does not agree, or index and manifest do not fit each other; of files above
    `mapped.LARGE` bytes, `Index.check` does. Nothing is said of those where it does not verify, since another does.
    """
    return index_of(folder, manifests.read(folder, generation), verifies)


def index_of(folder: Path, manifest: Manifest, verifies: bool = True) -> Index:
    names = tuple(manifest.groups)
    index = ArrowFile(folder / manifest.index.name, manifest.index, schema(names), "an index")
    order = ArrowFile(folder / manifest.order.name, manifest.order, order_schema(names), "an order")
    rows = manifest.index.rows
    with order.blamed():
        by_class, by_cell = _orders(order.batch, manifest)

    def verify() -> None:
        for file in (order, index):
            file.verify()
        with order.blamed():
            if any(_outside(by_class.rows[part], rows) for part in slices(len(by_class.rows))):
                raise ValueError("does not fit the manifest")
        with index.blamed():
            for part in slices(rows):
                _check(column, part, manifest)

    column: dict[str, Any] = {name: index.batch[name].to_numpy() for name in index.batch.schema.names if name != "id"}
    aside = index.is_large or order.is_large
    verification = Verification(verify if verifies or not aside else lambda: None, aside)
    _, ends, text = index.batch["id"].buffers()
    return Index(
        label=column["label"],
        group=tuple(column[f"group.{name}"] for name in names),
        in_split=column["split"],
        **{name: column[name] for name in FIELDS if name not in {"label", "split"}},
        id_ends=np.frombuffer(ends, np.int64, rows + 1) if rows else np.zeros(1, np.int64),
        id_text=np.frombuffer(text or b"", np.uint8),
        by_class=by_class,
        by_cell=by_cell,
        classes=manifest.classes,
        group_values=manifest.groups,
        splits=manifest.splits,
        shards=tuple(shard.name for shard in manifest.shards),
        folder=folder,
        fingerprint=manifest.fingerprint,
        side=manifest.side,
        manifest=manifest,
        verification=verification,
    )


def schema(group_names: tuple[str, ...]) -> pa.Schema:
    """Of the index file."""
    groups = [(f"group.{name}", pa.int32()) for name in group_names]
    return pa.schema([("id", pa.large_string()), *groups, *FIELDS.items()])


def order_schema(group_names: tuple[str, ...]) -> pa.Schema:
    """Of the order file."""
    groups = [(f"group.{name}", pa.int32()) for name in group_names]
    return pa.schema([("split", pa.int16()), ("label", pa.int32()), *groups, ("rows", pa.large_list(pa.int64()))])


def slices(length: int) -> Iterator[slice]:
    """Of so many things, some at a time."""
    return (slice(start, start + SLICE) for start in range(0, length, SLICE))


def numbered(columns: Iterable[tuple[NDArray[Any], int]], length: int) -> Ints:
    """A number for each of so many rows, in the order of their values in the columns; each of these is given with how
    many values it may have."""
    number, most = np.zeros(length, np.int64), 1
    for values, count in columns:
        number, most = number * count + values, most * count
        if most > MOST_CELLS:
            present, number = np.unique(number, return_inverse=True)
            most = len(present)
    return number


def _orders(batch: pa.RecordBatch, manifest: Manifest) -> tuple[Order, Order]:
    """By class and by cell, when each stratum in them is one, and all together have so many rows as there are."""
    lists = batch["rows"]
    names = [name for name in batch.schema.names if name != "rows"]
    keys = np.stack([batch[name].to_numpy() for name in names], 1).astype(np.int64)
    rows, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
    most = [len(manifest.splits), len(manifest.classes), *map(len, manifest.groups.values())]
    cut = int(np.searchsorted(keys[:, -1] >= 0, True)) if manifest.groups else 0
    parts = [(keys[:cut], ends[: cut + 1], most[:2]), (keys[cut:], ends[cut:], most)]
    orders = [_order(*part, rows, manifest) for part in (parts if manifest.groups else parts[1:])]
    if lists.values.null_count or ends[0] != 0 or ends[-1] != len(rows):
        raise ValueError("does not fit the manifest")
    return orders[0], orders[-1]


def _order(keys: Ints, ends: Ints, most: list[int], rows: Ints, manifest: Manifest) -> Order:
    counted, sizes = keys[:, : len(most)], np.diff(ends)
    step = np.diff(keys, axis=0)
    rises = step[np.arange(len(step)), (step != 0).argmax(1)] > 0
    fits = ((counted >= 0) & (counted < most)).all() and (keys[:, len(most) :] == -1).all()
    if not (fits and rises.all() and (sizes > 0).all() and sizes.sum() == manifest.index.rows):
        raise ValueError("does not fit the manifest")
    return Order(keys[:, 0], keys[:, 1], keys[:, 2:], ends[:-1], sizes, rows)


def _outside(values: NDArray[Any], end: int) -> bool:
    return bool(len(values) and (values.min() < 0 or values.max() >= end))


def _leads_out(start: Ints, length: Ints, sizes: Ints) -> bool:
    """Whether there is a range of bytes that is none of the shard of this size."""
    return not ((start >= 0) & (length >= 0) & (start <= sizes - length)).all()


def _check(column: dict[str, Any], part: slice, manifest: Manifest) -> None:
    """Whether each number of these rows leads to something; so a forged index is no crash later."""
    ends = {"label": len(manifest.classes), "split": len(manifest.splits), "shard": len(manifest.shards)}
    ends |= {f"group.{name}": len(values) for name, values in manifest.groups.items()}
    if any(_outside(column[name][part], end) for name, end in ends.items()):
        raise ValueError("does not fit the manifest")
    sizes = np.array([shard.bytes for shard in manifest.shards], np.int64)
    start, length = column["offset"][part], column["length"][part].astype(np.int64)
    if _leads_out(start, length, sizes[column["shard"][part]]):
        raise ValueError("leads behind the end of a shard")
    if side := manifest.side:
        squares = (length == 3 * side**2) & (column["width"][part] == side) & (column["height"][part] == side)
        if not squares.all():
            raise ValueError(f"has rows that are not pixels of {side} x {side}")


class Reader:
    """Image bytes by row. Safe to call from several threads: it reads with pread, never through a memory map, so that a
    shard cut short is an error of that row and not the death of the process."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._handles: dict[int, Handle] = {}
        self._opening = Lock()
        self._tail = lru_cache(TAILS)(partial(_tail_of, index))
        # Not as Arrow scalars: while images are decoded, their code is in no cache, and takes longer than the checksum.
        self._id_ends, self._ids = index.id_ends.data, index.id_text.data

    def read(self, row: int) -> bytes:
        """The image file of a row, after its checksum agrees."""
        try:
            return self._read(row)
        except IndexError:
            self.index.check(wait=True)  # its numbers may lead nowhere where it is damaged
            raise

    def _read(self, row: int) -> bytes:
        i, shard = self.index, int(self.index.shard[row])
        what, lasts = "is not as it was written", True
        try:
            handle = self.handle(shard)
            content = os.pread(handle.number, int(i.length[row]), int(i.offset[row]))
        except OSError as wrong:
            if wrong.errno in NOT_OF_THE_DATA:
                raise
            content, what, lasts = b"", f"cannot be read: {os.strerror(wrong.errno or 0).lower()}", False
        if not self.agrees(row, content):
            i.check(wait=True)  # or the damage is that of the index
            where = i.folder / SHARDS / i.shards[shard]
            fault = Fault(str(where), f"row {row} ({i.id_of(row)}) {what}", "ingest again, or restore it")
            damaged = DamagedRow("The data set is damaged:", [fault], 65)
            damaged.lasts = lasts
            raise damaged
        return content

    def agrees(self, row: int, content: bytes) -> bool:
        """Whether these bytes are the image of a row, by its checksum."""
        i = self.index
        id_ = self._ids[self._id_ends[row] : self._id_ends[row + 1]]
        covered = self._tail(int(i.label[row]), *[int(values[row]) for values in i.group])
        return checksum(content, b"".join((covered, id_, b"\0"))) == i.crc32c[row]

    def handle(self, shard: int) -> Handle:
        """The open file of a shard. Raises OSError."""
        return self._handles.get(shard) or self._open(shard)

    def _open(self, shard: int) -> Handle:
        with self._opening:
            if shard not in self._handles:
                self._keep(shard, Handle(self.index.folder / SHARDS / self.index.shards[shard]))
            return self._handles[shard]

    def _keep(self, shard: int, handle: Handle) -> None:
        """In place of another one, if there are too many; a thread that reads from that holds it still."""
        if shard not in self._handles and len(self._handles) >= HANDLES:
            del self._handles[next(iter(self._handles))]
        self._handles[shard] = handle

    def close(self) -> None:
        with self._opening:
            self._handles.clear()


def _tail_of(index: Index, label: int, *values: int) -> bytes:
    return tail(label, *(names[v] for names, v in zip(index.group_values.values(), values, strict=True)))


def tail(label: int, *groups: str) -> bytes:
    """What the checksum of a row covers after the image: the label as little-endian int64, then each group value, and
    at last the id (`tail_id`), in UTF-8 with a NUL behind it."""
    return label.to_bytes(8, "little", signed=True) + b"".join(map(tail_id, groups))


def tail_id(text: str) -> bytes:
    return text.encode() + b"\0"


def checksum(content: bytes, tail: bytes) -> int:
    return google_crc32c.extend(google_crc32c.value(content), tail)
