"""Where every sample lies and what is known of it, as arrays; the only part of a data set that is held in memory."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from data_loaders.faults import Fault, Refusal

Ints = NDArray[np.int64]
FORMAT, VERSION = "evenkeel-dataset", 1


class DamagedRow(Refusal):
    """The bytes of a row are not those that were written."""


@dataclass(frozen=True)
class Index:
    """N samples of K classes with A group columns."""

    labels: Ints
    """Class of each sample, [N], in 0 … K-1."""
    groups: Ints
    """Value of each group column, [N, A], a position in `group_values`."""
    split: Ints
    """Position in `splits`, [N]."""
    shard: Ints
    """Position in `shards`, [N]."""
    offset: Ints
    """First byte of the image in its shard, [N]."""
    length: Ints
    """Bytes of the image, [N]."""
    crc32c: Ints
    """Checksum of image, label and groups, [N]."""
    ids: pa.Array
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

    @property
    def cells(self) -> Ints:
        """Intersection of all group columns that each sample lies in, [N], a position in `cell_names`."""
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

    def table(self) -> pa.Table:
        """The form that is stored."""
        columns: dict[str, Any] = {"id": self.ids, "label": self.labels}
        columns |= {f"group.{name}": self.groups[:, a] for a, name in enumerate(self.group_values)}
        columns |= {"split": self.split, "shard": self.shard, "offset": self.offset, "length": self.length}
        columns |= {"crc32c": self.crc32c.astype(np.uint32)}
        return pa.table(columns)


def open_index(folder: Path) -> Index:
    """The index of the data set in `folder`, after its checksum agrees with the manifest's."""
    manifest = read_manifest(folder)
    path = folder / manifest["index"]["name"]
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest["index"]["sha256"]:
            raise ValueError("is not as it was written")
    except (OSError, ValueError) as wrong:
        raise Refusal("The data set is damaged:", [Fault(str(path), str(wrong), "ingest again")], 65) from wrong
    table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
    groups = {name: tuple(values) for name, values in manifest["groups"].items()}
    column = {name: table[name].to_numpy().astype(np.int64) for name in table.column_names if name != "id"}
    return Index(
        labels=column["label"],
        groups=np.stack([column[f"group.{name}"] for name in groups], 1) if groups else _no_groups(table),
        split=column["split"],
        shard=column["shard"],
        offset=column["offset"],
        length=column["length"],
        crc32c=column["crc32c"],
        ids=table["id"].combine_chunks(),
        classes=tuple(manifest["classes"]),
        group_values=groups,
        splits=tuple(manifest["splits"]),
        shards=tuple(shard["name"] for shard in manifest["shards"]),
        folder=folder,
        fingerprint=manifest["fingerprint"],
    )


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Hash (16 hex digits) of the parts of a manifest that say what the rows are and where they lie."""
    content = {name: manifest[name] for name in ("classes", "groups", "splits", "index", "shards")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    try:
        manifest = json.loads(path.read_bytes())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise ValueError(f"is {manifest['format']} {manifest['version']}, not {FORMAT} {VERSION}")
        if manifest["fingerprint"] != fingerprint(manifest):
            raise ValueError("is not as it was written")
        for name in (manifest["index"]["name"], *(shard["name"] for shard in manifest["shards"])):
            if name != Path(name).name or not name.endswith(".arrow"):
                raise ValueError(f"{name!r} is not the name of an Arrow file")
    except FileNotFoundError:
        fault = Fault(str(path), "does not exist", "make a data set with python -m jobs.ingest")
        raise Refusal("There is no data set:", [fault], 65) from None
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise Refusal("The data set cannot be read:", [Fault(str(path), str(wrong), "ingest again")], 65) from wrong
    return manifest


class Reader:
    """Image bytes by row. Safe to call from several threads: it reads with pread, never through a memory map, so that a
    shard cut short is an error of that row and not the death of the process."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._handles: dict[int, int] = {}
        cells, self._cell = np.unique(np.column_stack([index.labels, index.groups]), axis=0, return_inverse=True)
        values = list(index.group_values.values())
        self._tails = [tail(label, *(values[a][v] for a, v in enumerate(groups))) for label, *groups in cells.tolist()]

    def read(self, row: int) -> bytes:
        """The image file of a row, after its checksum agrees."""
        i, shard = self.index, int(self.index.shard[row])
        try:
            content = os.pread(self._handle(shard), int(i.length[row]), int(i.offset[row]))
            what = "is not as it was written"
        except OSError as wrong:
            content, what = b"", f"cannot be read: {os.strerror(wrong.errno or 0).lower()}"
        if checksum(content, self._tails[self._cell[row]]) != i.crc32c[row]:
            where = i.folder / "shards" / i.shards[shard]
            fault = Fault(str(where), f"row {row} ({i.ids[row]}) {what}", "ingest again, or restore it")
            raise DamagedRow("The data set is damaged:", [fault], 65)
        return content

    def _handle(self, shard: int) -> int:
        if shard not in self._handles:
            handle = os.open(self.index.folder / "shards" / self.index.shards[shard], os.O_RDONLY)
            if self._handles.setdefault(shard, handle) != handle:
                os.close(handle)  # another thread was faster
        return self._handles[shard]

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])


def tail(label: int, *groups: str) -> bytes:
    """What the checksum of a row covers after the image: the label as little-endian int64, then each group value in
    UTF-8 with a NUL behind it."""
    return label.to_bytes(8, "little", signed=True) + b"".join(value.encode() + b"\0" for value in groups)


def checksum(content: bytes, tail: bytes) -> int:
    return google_crc32c.extend(google_crc32c.value(content), tail)


def _no_groups(table: pa.Table) -> Ints:
    return np.zeros((len(table), 0), np.int64)
