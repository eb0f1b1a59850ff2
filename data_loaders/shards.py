"""Writes rows as a shard: an Arrow IPC file that Hugging Face, polars, pandas and pyarrow read as it is.

Columns: id, image {bytes, path}, label, one string column for each group, crc32c. The name holds the file's hash, so a
shard is never rewritten; where each image lies in the file goes to the index.
"""

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_loaders import durable
from data_loaders.decode import Undecodable, decode
from data_loaders.faults import Fault
from data_loaders.index import Ints, checksum, tail
from data_loaders.sources.rows import Rejected, Row

BATCH_ROWS = 256
FILE_CAP = 256 * 2**20
SHARD_FILE = re.compile(r"\.?\w[\w.-]*-\d{5,}(-[0-9a-f]{8}\.arrow|\.\d+\.tmp)")
"""Names of shards, finished or not."""


@dataclass(frozen=True)
class Task:
    """Rows of one split, to become one shard."""

    folder: Path
    number: int
    rows: list[Row]
    classes: tuple[str, ...]
    group_names: tuple[str, ...]
    pixel_cap: int


@dataclass(frozen=True)
class Shard:
    """A shard that was written (`name` is empty if no row was good), and the rows that were not."""

    name: str
    size: int
    sha256: str
    rows: list[Row]
    offset: Ints
    length: Ints
    crc32c: Ints
    rejected: list[Rejected]


def write_shard(task: Task) -> Shard:
    """Checks every image by decoding it, and writes the good ones."""
    rows: list[Row] = []
    contents: list[bytes] = []
    rejected: list[Rejected] = []
    for row in task.rows:
        try:
            content = read_file(Path(row.file))
            decode(content, task.pixel_cap)
        except (OSError, Undecodable) as wrong:
            reason = os.strerror(wrong.errno).lower() if isinstance(wrong, OSError) and wrong.errno else str(wrong)
            rejected.append(Rejected(row, Fault(row.where, f"{row.path!r}: {reason}", "repair or remove the image")))
        else:
            rows.append(row)
            contents.append(content)
    if not rows:
        none = np.zeros(0, np.int64)
        return Shard("", 0, "", [], none, none, none, rejected)
    sums = [checksum(c, tail(task.classes.index(r.label), *r.groups)) for c, r in zip(contents, rows, strict=True)]
    table = _table(task, rows, contents, sums)
    name, size, sha256, offset, length = _publish(task, table)
    return Shard(name, size, sha256, rows, offset, length, np.array(sums, np.int64), rejected)


def read_file(path: Path) -> bytes:
    """The bytes of an image file, of a regular one of a sane size: a pipe or a device could be read for ever."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise Undecodable("is not a regular file")
    if info.st_size > FILE_CAP:
        raise Undecodable(f"has {info.st_size:,} bytes, more than the cap of {FILE_CAP:,}")
    return path.read_bytes()


def _table(task: Task, rows: list[Row], contents: list[bytes], sums: list[int]) -> pa.Table:
    image = pa.StructArray.from_arrays(
        [pa.array(contents, pa.binary()), pa.array([row.path for row in rows], pa.string())], names=["bytes", "path"]
    )
    columns = {
        "id": pa.array([row.path for row in rows], pa.string()),
        "image": image,
        "label": pa.array([task.classes.index(row.label) for row in rows], pa.int64()),
        **{name: pa.array([row.groups[a] for row in rows], pa.string()) for a, name in enumerate(task.group_names)},
        "crc32c": pa.array(sums, pa.uint32()),
    }
    return pa.table(columns).replace_schema_metadata(_hugging_face(task))


def _hugging_face(task: Task) -> dict[str, str]:
    """Schema metadata by which `datasets` knows the image column and the names of the classes."""
    text = {"dtype": "string", "_type": "Value"}
    features = {"id": text, "image": {"_type": "Image"}, "label": {"names": task.classes, "_type": "ClassLabel"}}
    features |= dict.fromkeys(task.group_names, text) | {"crc32c": {"dtype": "uint32", "_type": "Value"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def _publish(task: Task, table: pa.Table) -> tuple[str, int, str, Ints, Ints]:
    """Name, size, hash, and the offset and length of every image in the file."""
    aside = task.folder / f".{task.rows[0].split}-{task.number:05d}.{os.getpid()}.tmp"
    try:
        with pa.ipc.new_file(aside, table.schema) as writer:
            writer.write_table(table, max_chunksize=BATCH_ROWS)
        durable.flush(aside)
        offset, length = _places(aside)
        sha256, size = durable.sha256(aside), aside.stat().st_size
        name = f"{task.rows[0].split}-{task.number:05d}-{sha256[:8]}.arrow"
        os.replace(aside, task.folder / name)
        durable.flush(task.folder)
    finally:
        aside.unlink(missing_ok=True)
    return name, size, sha256, offset, length


def _places(path: Path) -> tuple[Ints, Ints]:
    """First byte and length of every image: the address of its buffer less that of the mapped file."""
    with pa.memory_map(str(path)) as file:
        start = file.read_buffer().address
        file.seek(0)
        reader = pa.ipc.open_file(file)
        offset: list[Ints] = []
        length: list[Ints] = []
        for number in range(reader.num_record_batches):
            content = reader.get_batch(number).column("image").field("bytes")
            _, ends, values = content.buffers()
            ends = np.frombuffer(ends, np.int32)[content.offset : content.offset + len(content) + 1].astype(np.int64)
            offset.append(values.address - start + ends[:-1])
            length.append(np.diff(ends))
        return np.concatenate(offset), np.concatenate(length)
