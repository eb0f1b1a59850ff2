"""Whether a data set is as it was written: every checksum of every generation. All damage is found in one pass."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_loaders import manifest as manifests
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index, Ints, Order, Reader, index_of, slices
from data_loaders.loader import ids_of
from data_loaders.manifest import GENERATIONS, NAME, SHARDS, File, Manifest
from data_loaders.progress import Progress
from data_loaders.shards import places_in, shard_schema

Unusable = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError, pa.ArrowException)
"""What reading a file that is not what it should be may end in."""


class DamagedShard(NamedTuple):
    """A shard that is not as it was written."""

    file: File
    what: str
    damaged: list[str]
    """Ids of the rows whose checksum does not agree."""
    good: list[str]
    """Ids of the others, which can still be read."""

    def fault(self, folder: Path, shown: int = 5) -> Fault:
        ids = ", ".join(self.damaged[:shown]) + (", …" if len(self.damaged) > shown else "")
        rows = f"{len(self.damaged):,} rows are damaged{ids and f' ({ids})'}, {len(self.good):,} are good"
        fix = f"restore it from a copy, whose SHA-256 is {self.file.sha256}, or ingest again"
        return Fault(str(folder / SHARDS / self.file.name), f"{self.what}; {rows}", fix)


@dataclass
class Verdict:
    """What was looked at, and what is wrong with it."""

    folder: Path
    generations: list[int] = field(default_factory=list)
    rows: int = 0
    """Of the newest generation."""
    shards: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    """Of manifests and indices."""
    damaged: list[DamagedShard] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    """Files that no generation names: what a killed ingest left, or what one under way writes."""

    @property
    def all_faults(self) -> list[Fault]:
        return [*self.faults, *(shard.fault(self.folder) for shard in self.damaged)]

    def to_json(self) -> dict[str, Any]:
        about = {name: getattr(self, name) for name in ("generations", "rows", "shards", "bytes")}
        about["damage"] = [f._asdict() for f in self.faults]
        about["damaged_shards"] = [
            {**shard.file.model_dump(), "what": shard.what, "damaged": shard.damaged, "good": shard.good}
            for shard in self.damaged
        ]
        return about | {"orphans": [str(path.relative_to(self.folder)) for path in self.orphans]}


class _Known(NamedTuple):
    """A shard, and the rows that an index says it has; no index where none is whole."""

    file: File
    reader: Reader | None
    rows: Ints


def verify(folder: Path, generation: int | None = None, threads: int = 0) -> Verdict:
    """Of all generations, or of one. Holds a shard for each thread in memory; 0 is a thread for each core.

    Raises Refusal (65) where there is no manifest to begin with.
    """
    found = Verdict(folder)
    states = list(_states(folder, generation, found))
    found.generations = [state.generation for state in states]
    known = _shards(folder, states, found)
    found.shards, found.bytes = len(known), sum(shard.file.bytes for shard in known)
    progress, done = Progress("verify", found.bytes, "bytes"), 0
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), "verify") as pool:
        for shard, damaged in zip(known, pool.map(lambda shard: _damage(folder, shard), known), strict=True):
            found.damaged += [damaged] if damaged else []
            done += shard.file.bytes
            progress.show(done, f"{len(found.damaged):,} shards damaged" if found.damaged else "")
    if generation is None and not found.faults:  # else a file may seem to belong to none
        found.orphans = list(manifests.unnamed(folder, states))
    return found


def _states(folder: Path, generation: int | None, found: Verdict) -> Iterator[Manifest]:
    """The manifests that are whole, oldest first."""
    try:
        newest = manifests.read(folder, generation)
    except Refusal as wrong:
        copies = [*_copies(folder)]
        if generation is not None or not copies:
            raise
        newest = copies[-1]
        fix = f"{manifests.copy_of(folder, newest.generation)} is whole: put a copy of it there"
        found.faults += [fault._replace(fix=fix) for fault in wrong.faults]
    if generation is None:
        for published in newest.history:
            try:
                yield manifests.read_copy(folder, published)
            except Refusal as wrong:
                found.faults += wrong.faults
    try:
        manifests.read_copy(folder, newest)
    except Refusal as wrong:
        found.faults += [fault._replace(fix=f"put a copy of {folder / NAME} there") for fault in wrong.faults]
    yield newest


def _copies(folder: Path) -> Iterator[Manifest]:
    for path in sorted((folder / GENERATIONS).glob("*.json")):
        with suppress(Refusal):
            yield manifests.read_file(path)


def _shards(folder: Path, states: list[Manifest], found: Verdict) -> list[_Known]:
    """Every shard once, with the rows that the newest whole index says it has."""
    known: dict[str, _Known] = {}
    later: Index | None = None
    for state in reversed(states):
        try:
            index = index_of(folder, state)
            index.check(wait=True)
        except Refusal as wrong:
            found.faults += wrong.faults
            index = None
        if index:
            found.rows = found.rows or len(index)
            wrong = _misfit(state, index) or (_changed(index, later) if later else None)
            if wrong:
                found.faults.append(Fault(str(folder / state.index.name), wrong, "ingest again"))
            elif _is_disordered(index, index.by_class, 0) or _is_disordered(index, index.by_cell, len(index.group)):
                what = "has rows in other places than their split, class and groups"
                found.faults.append(Fault(str(folder / state.order.name), what, "ingest again"))
            later = index
        reader = Reader(index) if index else None
        order = np.argsort(index.shard, kind="stable") if index else np.zeros(0, np.int64)
        ends = np.searchsorted(index.shard[order], np.arange(len(state.shards) + 1)) if index else None
        for number, file in enumerate(state.shards):
            rows = order[ends[number] : ends[number + 1]] if ends is not None else order
            held = known.setdefault(file.name, _Known(file, reader, rows))
            if held.file != file:
                what = f"says of {file.name} what generation {states[-1].generation} does not"
                found.faults.append(Fault(str(manifests.copy_of(folder, state.generation)), what, "ingest again"))
            if held.reader is None:
                known[file.name] = _Known(held.file, reader, rows)
    return [*known.values()]


def _misfit(state: Manifest, index: Index) -> str | None:
    """How the counts of a manifest differ from those of its index."""
    cells = Counter(zip(index.split.tolist(), index.labels.tolist(), strict=True))
    counts = {
        split: {name: cells[s, k] for k, name in enumerate(state.classes)} for s, split in enumerate(state.splits)
    }
    if state.rows != counts:
        return "has other rows of classes and splits than the manifest says"
    if np.bincount(index.shard, minlength=len(state.shards)).tolist() != [shard.rows for shard in state.shards]:
        return "has other rows of shards than the manifest says"
    return None


def _is_disordered(index: Index, order: Order, groups: int) -> bool:
    """Whether a row lies in a stratum that is not its own, or not behind those before it in the data set. The strata
    have as many rows as there are, so that none is missing."""
    columns = [index.in_split, index.label, *index.group[:groups]]
    said = [order.split, order.label, *order.groups.T[:groups]]
    before = (-1, -1)
    for part in slices(len(index)):
        places = order.first[0] + np.arange(len(index))[part] if len(order.first) else np.zeros(0, np.int64)
        stratum, rows = np.searchsorted(order.first, places, side="right") - 1, order.rows[places]
        if any((values[rows] != expected[stratum]).any() for values, expected in zip(columns, said, strict=True)):
            return True
        same = np.diff(stratum, prepend=before[0]) == 0
        if (np.diff(rows, prepend=before[1])[same] <= 0).any():
            return True
        before = (int(stratum[-1]), int(rows[-1]))
    return False


def _changed(index: Index, later: Index) -> str | None:
    """What a later generation changed of the rows of this one; it may only add some behind them."""
    rows = len(index.labels)
    names = ("labels", "groups", "split", "shard", "offset", "length", "crc32c")
    same = all(np.array_equal(getattr(index, name), getattr(later, name)[:rows]) for name in names)
    meanings = [(index.classes, later.classes), (index.splits, later.splits), (index.shards, later.shards)]
    meanings += zip(index.group_values.values(), later.group_values.values(), strict=False)
    same = same and index.ids.equals(later.ids[:rows]) and [*index.group_values] == [*later.group_values]
    same = same and index.side == later.side
    if same and all(former == new[: len(former)] for former, new in meanings):
        return None
    return "has rows that a later generation changed"


def _damage(folder: Path, shard: _Known) -> DamagedShard | None:
    file, content, wrong = shard.file, b"", None
    try:
        with manifests.open_file(folder / SHARDS / file.name) as opened:
            size = os.fstat(opened.fileno()).st_size
            content = opened.read(min(size, file.bytes))
        if size != file.bytes:
            wrong = f"has {size:,} bytes, not {file.bytes:,}"
        elif hashlib.sha256(content).hexdigest() != file.sha256:
            wrong = "is not as it was written"
    except Unusable as unusable:
        reason = os.strerror(unusable.errno or 0) if isinstance(unusable, OSError) else str(unusable)
        wrong = f"cannot be read: {reason.lower()}"
    damaged: list[str] = []
    good: list[str] = []
    if reader := shard.reader:
        index = reader.index
        for row in shard.rows.tolist():
            start, length = int(index.offset[row]), int(index.length[row])
            whole = reader.agrees(row, content[start : start + length])
            (good if whole else damaged).append(index.ids[row].as_py())
    wrong = wrong or ("has rows that are not those of the index" if damaged else None)
    if wrong is None and shard.reader:  # only bytes with the right hash are given to Arrow
        wrong = _differs(content, shard.reader.index, shard.rows)
    return DamagedShard(file, wrong, damaged, good) if wrong else None


def _differs(content: bytes, index: Index, rows: Ints) -> str | None:
    """How what a shard says of its rows, to those who read it without the index, differs from the index."""
    try:
        table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        table.validate(full=True)
        kind = shard_schema(index.group_values, index.side)
        if table.schema != kind or any(column.null_count for column in table.columns):
            return "does not have the columns of a shard"
        said, expected = _said(table, pa.py_buffer(content).address, index.side), _expected(index, rows)
        return next((f"has other {name} than the index" for name in expected if said[name] != expected[name]), None)
    except Unusable as unusable:
        return f"cannot be read by other tools: {unusable}"


def _said(table: pa.Table, start: int, side: int) -> dict[str, list[Any]]:
    """What a shard, which lies in memory from `start` on, says of its rows, by what it is."""
    images = table["image"].chunks
    said = {name: table[name].to_pylist() for name in table.column_names if name != "image"}
    if not side:
        said["image.path"] = [path for image in images for path in image.field("path").to_pylist()]
    places = [zip(*(part.tolist() for part in places_in(image, start, side)), strict=True) for image in images]
    said["places of images"] = [place for part in places for place in part]
    about = json.loads((table.schema.metadata or {})[b"huggingface"])
    said["names of classes"] = about["info"]["features"]["label"]["names"]
    return said


def _expected(index: Index, rows: Ints) -> dict[str, list[Any]]:
    """The same, as the index has it."""
    ids = ids_of(index, rows).to_pylist()
    expected: dict[str, list[Any]] = {"id": ids, "label": index.labels[rows].tolist()}
    expected |= {} if index.side else {"image.path": ids}
    for a, (name, values) in enumerate(index.group_values.items()):
        expected[name] = [values[value] for value in index.groups[rows, a].tolist()]
    expected["crc32c"] = index.crc32c[rows].tolist()
    expected["places of images"] = [*zip(index.offset[rows].tolist(), index.length[rows].tolist(), strict=True)]
    return expected | {"names of classes": [*index.classes]}
