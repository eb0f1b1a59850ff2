"""Writes rows as shards: Arrow IPC files that Hugging Face, polars, pandas and pyarrow read as they are.

Columns: id, image {bytes, path} or image [side * side * 3] of pixels, label, one string column for each group, crc32c.
The name holds the file's hash, so a shard is never rewritten; where each image lies in the file goes to the index.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.ipc
from pydantic import Field, PositiveInt, model_validator

from data_loaders import durable
from data_loaders.augment import centred
from data_loaders.decode import PIXEL_CAP, Pixels, Undecodable, decode
from data_loaders.examine import Check, Seen, examine
from data_loaders.faults import Fault, Refusal
from data_loaders.index import FIELDS, Ints, tail, tail_id
from data_loaders.manifest import MOST_SIDE, SHARDS, WORK, File
from data_loaders.recode import Resize
from data_loaders.settings import Settings, digest
from data_loaders.sources.rows import Rejected, Row, Source, Unreachable, Unreadable

BATCH_ROWS = 256


class Shards(Settings):
    """How images are checked and stored."""

    check: Check = "decode"
    """decode finds every broken image, and takes its perceptual hash; header trusts all but its size and its end. An
    image that is stored as pixels is decoded in any case."""
    pixel_cap: PositiveInt = PIXEL_CAP
    """Images that claim more pixels are rejected before they are decoded."""
    resize: Resize | None = None
    """Makes images smaller, and of one format; without it, they are stored byte for byte."""
    encoding: Literal["file", "raw"] | None = None
    """file stores JPEG, PNG and WebP as they are; raw stores pixels, which need no decoding and, of small images,
    little more room: the largest centred square in RGB, as evaluation sees it. By default that of the data set that
    rows are added to, or file."""
    side: Annotated[int, Field(gt=0, le=MOST_SIDE)] | None = None
    """Height and width, in pixels, of what raw stores, 1,024 at most; an image of that shape is kept exactly."""
    rows: PositiveInt = 4096
    """Most rows that one worker takes at a time, and most in a shard."""
    megabytes: Annotated[int, Field(gt=0, le=1024)] = 64
    """Image bytes in a shard, in 10^6; the last image may exceed them."""

    @model_validator(mode="after")
    def _one_encoding(self) -> "Shards":
        if (self.encoding == "raw") != (self.side is not None):
            raise ValueError("encoding=raw needs a side (side=32, say), and only raw has one")
        if self.side and self.resize:
            raise ValueError("encoding=raw resamples every image to its side, so resize has nothing to do: name one")
        return self


@dataclass(frozen=True)
class Task:
    """Rows of one split, to become one shard or more."""

    folder: Path
    """Of the data set."""
    split: str
    number: int
    generation: int
    rows: list[Row]
    source: Source
    classes: tuple[str, ...]
    group_names: tuple[str, ...]
    shards: Shards

    @property
    def part(self) -> Path:
        """Where its part of the index goes; named by what the task is, so that a second run knows it."""
        about = (self.split, self.number, self.generation, self.rows, digest(self.source), digest(self.shards))
        key = hashlib.sha256(json.dumps((*about, self.classes, self.group_names)).encode()).hexdigest()
        return self.folder / WORK / "parts" / f"{key[:32]}.arrow"


@dataclass(frozen=True)
class Done:
    """What became of a task: shards, a part of the index, and the rows that could not be used."""

    part: Path
    split: str
    shards: list[File]
    rejected: list[Rejected] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)
    """Format, and what was not plain -> images."""

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


def write_shards(task: Task) -> Done:
    """Reads, checks and stores the images of a task, unless a run before this one did so."""
    return _finished(task) or _write(task)


def rejected(row: Row, wrong: Exception) -> Rejected:
    """A row whose image cannot be used, and why. Raises Refusal (75) for one that only cannot be had now, so that an
    outage drops no image."""
    if isinstance(wrong, Unreachable):
        fault = Fault(row.where, f"{row.id!r}: {wrong}", "the same command goes on when it can be had again")
        raise Refusal("The images cannot be read now:", [fault], 75) from wrong
    reason = os.strerror(wrong.errno).lower() if isinstance(wrong, OSError) and wrong.errno else str(wrong)
    fix = "correct the path" if isinstance(wrong, FileNotFoundError) else "repair, convert or shrink the image"
    return Rejected(row, Fault(row.where, f"{row.id!r}: {reason}", f"{fix}, or remove the row"))


def index_schema(group_names: tuple[str, ...]) -> pa.Schema:
    """Of a part of the index: groups by name, and shards counted from 0."""
    return pa.schema([("id", pa.string()), *((f"group.{name}", pa.string()) for name in group_names), *FIELDS.items()])


class _Open:
    """The rows of a shard that is being filled. Their images lie in one piece of memory, which serves all shards of a
    task: to get memory anew for each costs more than to copy an image."""

    def __init__(self, capacity: int) -> None:
        self._images = np.empty(capacity, np.uint8)
        self.clear()

    def clear(self) -> None:
        self.rows: list[Row] = []
        self.seen: list[Seen] = []
        self.plain: list[int] = []
        """CRC-32C of each image."""
        self._ends = [0]

    def add(self, row: Row, content: bytes, seen: Seen) -> None:
        start, end = self.bytes, self.bytes + len(content)
        if end > len(self._images):
            self._images = np.append(self._images, np.empty(end - len(self._images), np.uint8))
        self._images[start:end] = np.frombuffer(content, np.uint8)
        self.rows.append(row)
        self.seen.append(seen)
        self.plain.append(google_crc32c.value(content))
        self._ends.append(end)

    @property
    def bytes(self) -> int:
        return self._ends[-1]

    def images(self, ids: pa.Array, side: int) -> pa.Array:
        """The column. Valid until the next row is added. Ends with the last one: what lies behind would be stored as
        padding."""
        content = pa.py_buffer(self._images[: self.bytes])
        if side:
            return pa.FixedSizeListArray.from_arrays(
                pa.Array.from_buffers(pa.uint8(), self.bytes, [None, content]), type=image_type(side)
            )
        buffers = [None, pa.py_buffer(np.array(self._ends, np.int32)), content]
        files = pa.Array.from_buffers(pa.binary(), len(self.rows), buffers)
        return pa.StructArray.from_arrays([files, ids], names=["bytes", "path"])


def _write(task: Task) -> Done:
    files = _files(task)
    done, tables = Done(task.part, task.split, []), list[pa.Table]()
    capacity = task.shards.megabytes * 10**6
    current = _Open(min(capacity * 5 // 4, len(task.rows) * 2**17))

    def close() -> None:
        if current.rows:
            file, table = _write_shard(task, len(done.shards), current)
            done.shards.append(file)
            tables.append(table)
            current.clear()

    with task.source.reader() as read:
        for row in task.rows:
            try:
                content, seen = _image(task.shards, read, row)
            except (OSError, Undecodable, Unreadable) as wrong:
                done.rejected.append(rejected(row, wrong))
                continue
            current.add(row, content, seen)
            done.images.update((seen.format, *seen.notes))
            if current.bytes >= capacity:
                close()
    close()
    about = {"shards": [shard.model_dump() for shard in done.shards], "images": done.images, "files": files}
    part = pa.concat_tables(tables) if tables else index_schema(task.group_names).empty_table()
    with durable.writing(task.part) as aside:
        part = part.replace_schema_metadata({"done": json.dumps(about)})
        with aside.open("wb") as sink, pa.ipc.new_file(sink, part.schema) as writer:
            writer.write_table(part)
    return done


def _finished(task: Task) -> Done | None:
    """What a killed run made of the same task, if no file of this machine that it read has changed since. One that
    dropped rows is done again: the images may be repaired."""
    with suppress(OSError, ValueError, KeyError, pa.ArrowException):
        with pa.ipc.open_file(task.part) as reader:
            about = json.loads(reader.schema.metadata[b"done"])
            rows = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
        shards = [File.model_validate(shard) for shard in about["shards"]]
        sizes = [(task.folder / SHARDS / shard.name).stat().st_size for shard in shards]
        is_whole = rows == len(task.rows) and sizes == [shard.bytes for shard in shards]
        if is_whole and about["files"] == _files(task):
            return Done(task.part, task.split, shards, images=Counter(about["images"]))
    return None


def _files(task: Task) -> str:
    """Hash of the sizes and times of the files that hold the images, as far as they lie on this machine."""
    stamps, known = hashlib.sha256(), dict[str | None, bytes]()
    for row in task.rows:
        path = task.source.file_of(row)
        if path not in known:
            info = os.stat(path) if path is not None and os.path.exists(path) else None
            known = {path: f"{info.st_size} {info.st_mtime_ns} {info.st_ino}\0".encode() if info else b"\0"}
        stamps.update(known[path])
    return stamps.hexdigest()


def _image(shards: Shards, read: Callable[[Row], bytes], row: Row) -> tuple[bytes, Seen]:
    content = read(row)
    if shards.side:
        pixels, seen = squared(content, shards.side, shards.pixel_cap)
        return pixels.tobytes(), seen
    if shards.resize:
        content = shards.resize(content, shards.pixel_cap)
    return content, examine(content, shards.pixel_cap, shards.check)


def squared(content: bytes, side: int, pixel_cap: int = PIXEL_CAP) -> tuple[Pixels, Seen]:
    """Pixels [side, side, 3] of an image file, and what is learnt of it. Raises Undecodable."""
    seen = examine(content, pixel_cap)
    return centred(decode(content, pixel_cap), side), seen._replace(width=side, height=side)


def _write_shard(task: Task, number: int, filled: _Open) -> tuple[File, pa.Table]:
    """The file, and its part of the index."""
    rows, seen, plain = filled.rows, filled.seen, filled.plain
    code = {name: k for k, name in enumerate(task.classes)}
    labels = [code[row.label] for row in rows]
    sums = [
        google_crc32c.extend(crc, tail(label, *row.groups) + tail_id(row.id))
        for crc, label, row in zip(plain, labels, rows, strict=True)
    ]
    ids = pa.array([row.id for row in rows], pa.string())
    groups = {name: pa.array([row.groups[a] for row in rows], pa.string()) for a, name in enumerate(task.group_names)}
    side = task.shards.side or 0
    columns = {"id": ids, "image": filled.images(ids, side), "label": pa.array(labels, pa.int64()), **groups}
    table = pa.table({**columns, "crc32c": pa.array(sums, pa.uint32())}).replace_schema_metadata(
        hugging_face(task.classes, task.group_names, side)
    )
    stem = f"{task.split}-g{task.generation}-{task.number:05d}-{number:02d}"
    with (
        durable.named_by_hash(task.folder / SHARDS, stem) as sink,
        pa.ipc.new_file(pa.PythonFile(sink, "w"), table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=BATCH_ROWS)
    offset, length = _places(sink.path, side)
    index: dict[str, Any] = {"id": ids, **{f"group.{name}": values for name, values in groups.items()}}
    index |= {"label": labels, "split": [0] * len(rows), "shard": [number] * len(rows)}
    index |= {"offset": offset, "length": length, "crc32c": sums, "image_crc32c": plain}
    index |= {name: [getattr(s, name) for s in seen] for name in ("width", "height", "quality", "look")}
    index |= {"unit": [unit_hash(row.unit) for row in rows]}
    file = File(name=sink.path.name, rows=len(rows), bytes=sink.size, sha256=sink.sha256)
    return file, pa.table(index, schema=index_schema(task.group_names))


def unit_hash(unit: str) -> int:
    """64 bits that stand for a unit in the index; 0 for none."""
    return int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "little") if unit else 0


def image_type(side: int) -> pa.DataType:
    """Of the column `image`: a file with its id, or with a `side` pixels, row by row from the top. Not Arrow's own type
    of tensors: `datasets` refuses files that have one."""
    return pa.list_(pa.uint8(), 3 * side**2) if side else pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def shard_schema(group_names: Iterable[str], side: int) -> pa.Schema:
    """Of a shard, without metadata."""
    image = image_type(side)
    groups = [(name, pa.string()) for name in group_names]
    return pa.schema([("id", pa.string()), ("image", image), ("label", pa.int64()), *groups, ("crc32c", pa.uint32())])


def hugging_face(classes: tuple[str, ...], group_names: Iterable[str], side: int) -> dict[str, str]:
    """Schema metadata by which `datasets` knows the image column and the names of the classes."""
    return {"huggingface": json.dumps({"info": {"features": features(classes, group_names, side)}})}


def features(classes: tuple[str, ...], group_names: Iterable[str], side: int) -> dict[str, Any]:
    """The columns as `datasets` describes them."""
    text = {"dtype": "string", "_type": "Value"}
    label = {"names": list(classes), "_type": "ClassLabel"}
    groups = dict.fromkeys(group_names, text)
    pixels = {"feature": {**text, "dtype": "uint8"}, "length": 3 * side**2, "_type": "Sequence"}
    image = pixels if side else {"_type": "Image"}
    return {"id": text, "image": image, "label": label, **groups, "crc32c": {**text, "dtype": "uint32"}}


def places_in(images: pa.Array, start: int, side: int) -> tuple[Ints, Ints]:
    """First byte and length of every image of a column, of a file that lies in memory from `start` on."""
    if side:
        first = images.buffers()[-1].address - start
        return first + 3 * side**2 * (images.offset + np.arange(len(images))), np.full(len(images), 3 * side**2)
    _, ends, values = images.field("bytes").buffers()
    ends = np.frombuffer(ends, np.int32)[images.offset : images.offset + len(images) + 1].astype(np.int64)
    return values.address - start + ends[:-1], np.diff(ends)


def _places(path: Path, side: int) -> tuple[Ints, Ints]:
    """Of every image of a shard, without reading it."""
    with pa.memory_map(str(path)) as file:
        start = file.read_buffer().address
        file.seek(0)
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        offset, length = zip(*(places_in(batch.column("image"), start, side) for batch in batches), strict=True)
        return np.concatenate(offset), np.concatenate(length)
