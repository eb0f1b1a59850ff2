"""Where every sample lies and what is known of it, as arrays; the only part of a data set that is held in memory."""

import errno
import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from data_loaders import manifest as manifests
from data_loaders.faults import Fault, Refusal
from data_loaders.manifest import SHARDS, Manifest

Ints = NDArray[np.int64]
MOST_CELLS = 2**24
HANDLES = 128
"""Open shards of a reader; a data set may have more than a process may open."""
NOT_OF_THE_DATA = {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM}


class DamagedRow(Refusal):
    """The bytes of a row are not those that were written."""


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


@dataclass(frozen=True)
class Index:
    """N samples of K classes with A group columns."""

    labels: Ints
    """Class of each sample, [N], in 0 … K-1."""
    groups: Ints
    """Value of each group column, [N, A], a position in `group_values`."""
    split: Ints
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
    ids: pa.ChunkedArray
    """Path of each sample as its source wrote it, [N]."""
    classes: tuple[str, ...]
    group_values: dict[str, tuple[str, ...]]
    """Group column -> its values."""
    splits: tuple[str, ...]
    shards: tuple[str, ...]
    folder: Path
    fingerprint: str
    """Hash of everything above: two data sets with the same fingerprint hold the same rows."""

    def rows_of(self, split: str) -> Ints:
        """The rows of a split, in the order of the data set."""
        if split not in self.splits:
            fix = f"it has {', '.join(self.splits)}"
            raise Refusal("A split is missing:", [Fault(str(self.folder), f"no split {split!r}", fix)], 65)
        return np.flatnonzero(self.split == self.splits.index(split))

    @cached_property
    def most_pixels(self) -> int:
        """Of the largest image."""
        return int((self.width.astype(np.int64) * self.height).max(initial=0))

    def occurring_cells(self) -> tuple[list[tuple[str, ...]], Ints]:
        """Values of the group columns in each intersection that has a sample, in order, and each sample's place among
        them, [N]. Of any number of columns, unlike `cells`."""
        number, most = np.zeros(len(self.labels), np.int64), 1
        for column, values in enumerate(self.group_values.values()):
            number = number * len(values) + self.groups[:, column]
            most *= len(values)
            if most > MOST_CELLS:
                present, number = np.unique(number, return_inverse=True)
                most = len(present)
        _, first, place = np.unique(number, return_index=True, return_inverse=True)
        names = list(self.group_values.values())
        return [tuple(names[a][v] for a, v in enumerate(row)) for row in self.groups[first].tolist()], place

    @property
    def cells(self) -> Ints:
        """Intersection of all group columns that each sample lies in, [N], a position in `cell_names`.

        Raises Refusal where there are too many to count each of them.
        """
        if (count := math.prod(map(len, self.group_values.values()))) > MOST_CELLS:
            what = f"{len(self.group_values)} group columns have {count:,} intersections"
            raise Refusal("The groups are too many:", [Fault(str(self.folder), what, "ingest fewer group columns")], 65)
        cell = np.zeros(len(self.labels), np.int64)
        for column, values in enumerate(self.group_values.values()):
            cell = cell * len(values) + self.groups[:, column]
        return cell

    @property
    def cell_names(self) -> list[tuple[str, ...]]:
        """Values of the group columns in each cell, in the order of `cells`; one empty tuple without group columns."""
        names: list[tuple[str, ...]] = [()]
        for values in self.group_values.values():
            names = [(*name, value) for name in names for value in values]
        return names


def open_index(folder: Path, generation: int | None = None) -> Index:
    """The index of the newest generation of the data set in `folder`, or of an earlier one.

    Raises Refusal (65) where a checksum does not agree, or index and manifest do not fit each other.
    """
    return index_of(folder, manifests.read(folder, generation))


def index_of(folder: Path, manifest: Manifest) -> Index:
    path = folder / manifest.index.name
    try:
        content = manifests.content_of(path, manifest.index.bytes)
        if hashlib.sha256(content).hexdigest() != manifest.index.sha256:
            raise ValueError("is not as it was written")
        table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        table.validate(full=True)
        return _checked(folder, manifest, table)
    except (OSError, ValueError, pa.ArrowException) as wrong:
        fault = Fault(str(path), str(wrong), "restore it, or ingest again")
        raise Refusal("The data set is damaged:", [fault], 65) from wrong


def schema(group_names: tuple[str, ...]) -> pa.Schema:
    """Of the index file."""
    groups = [(f"group.{name}", pa.int32()) for name in group_names]
    return pa.schema([("id", pa.string()), *groups, *FIELDS.items()])


def _checked(folder: Path, manifest: Manifest, table: pa.Table) -> Index:
    """The table as arrays, when each number in it leads to something; so a forged index is no crash later."""
    if table.schema != schema(tuple(manifest.groups)):
        raise ValueError("does not have the columns of an index")
    if any(column.null_count for column in table.columns):
        raise ValueError("has nulls")
    column: dict[str, Any] = {name: table[name].to_numpy() for name in table.column_names if name != "id"}
    groups = [column.pop(f"group.{name}") for name in manifest.groups]
    sizes = np.array([shard.bytes for shard in manifest.shards], np.int64)
    ranges = [
        (column["label"], len(manifest.classes)),
        (column["split"], len(manifest.splits)),
        (column["shard"], len(manifest.shards)),
        *((values, len(names)) for values, names in zip(groups, manifest.groups.values(), strict=True)),
    ]
    if len(table) != manifest.index.rows or any(len(v) and (v.min() < 0 or v.max() >= n) for v, n in ranges):
        raise ValueError("does not fit the manifest")
    start, length = column["offset"], column["length"].astype(np.int64)
    if len(table) and not ((start >= 0) & (length >= 0) & (start <= sizes[column["shard"]] - length)).all():
        raise ValueError("leads behind the end of a shard")
    return Index(
        labels=column.pop("label").astype(np.int64),
        groups=np.stack(groups, 1).astype(np.int64) if groups else np.zeros((len(table), 0), np.int64),
        split=column.pop("split").astype(np.int64),
        **column,
        ids=table["id"],
        classes=manifest.classes,
        group_values=manifest.groups,
        splits=manifest.splits,
        shards=tuple(shard.name for shard in manifest.shards),
        folder=folder,
        fingerprint=manifest.fingerprint,
    )


class Reader:
    """Image bytes by row. Safe to call from several threads: it reads with pread, never through a memory map, so that a
    shard cut short is an error of that row and not the death of the process."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._handles: dict[int, _Handle] = {}
        self._opening = Lock()
        names, cell = index.occurring_cells()
        keys, self._tail = np.unique(cell * len(index.classes) + index.labels, return_inverse=True)
        cells, labels = np.divmod(keys, len(index.classes))
        self._tails = [tail(k, *names[c]) for k, c in zip(labels.tolist(), cells.tolist(), strict=True)]
        ids = pa.concat_arrays([pa.array([], pa.large_string()), *index.ids.cast(pa.large_string()).chunks])
        _, ends, text = ids.buffers()
        self._id_ends, self._ids = memoryview(ends).cast("q"), text.to_pybytes() if text else b""

    def read(self, row: int) -> bytes:
        """The image file of a row, after its checksum agrees."""
        i, shard = self.index, int(self.index.shard[row])
        try:
            handle = self._handles.get(shard) or self._open(shard)
            content = os.pread(handle.number, int(i.length[row]), int(i.offset[row]))
            what = "is not as it was written"
        except OSError as wrong:
            if wrong.errno in NOT_OF_THE_DATA:
                raise
            content, what = b"", f"cannot be read: {os.strerror(wrong.errno or 0).lower()}"
        if not self.agrees(row, content):
            where = i.folder / SHARDS / i.shards[shard]
            fault = Fault(str(where), f"row {row} ({i.ids[row]}) {what}", "ingest again, or restore it")
            raise DamagedRow("The data set is damaged:", [fault], 65)
        return content

    def agrees(self, row: int, content: bytes) -> bool:
        """Whether these bytes are the image of a row, by its checksum."""
        # Not as an Arrow scalar: while images are decoded, its code is in no cache, and takes longer than the checksum.
        id_ = self._ids[self._id_ends[row] : self._id_ends[row + 1]]
        return checksum(content, self._tails[self._tail[row]] + id_ + b"\0") == self.index.crc32c[row]

    def _open(self, shard: int) -> "_Handle":
        with self._opening:
            if shard not in self._handles:
                if len(self._handles) >= HANDLES:
                    del self._handles[next(iter(self._handles))]  # a thread that reads from it holds it still
                self._handles[shard] = _Handle(self.index.folder / SHARDS / self.index.shards[shard])
            return self._handles[shard]

    def close(self) -> None:
        with self._opening:
            self._handles.clear()


class _Handle:
    """An open file, which is closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # nobody waits for a pipe

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def tail(label: int, *groups: str) -> bytes:
    """What the checksum of a row covers after the image: the label as little-endian int64, then each group value, and
    at last the id (`tail_id`), in UTF-8 with a NUL behind it."""
    return label.to_bytes(8, "little", signed=True) + b"".join(map(tail_id, groups))


def tail_id(text: str) -> bytes:
    return text.encode() + b"\0"


def checksum(content: bytes, tail: bytes) -> int:
    return google_crc32c.extend(google_crc32c.value(content), tail)
