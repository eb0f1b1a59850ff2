"""Rows of a data set as Arrow tables with the columns of its shards; every image is read with its checksum."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pyarrow as pa

from data_loaders.index import Index, Ints, Reader
from data_loaders.loader import ids_of
from data_loaders.shards import hugging_face, shard_schema

AT_ONCE, BYTES_AT_ONCE = 100, 32 * 10**6
"""Most rows, and most bytes of images, of one table."""


def schema(index: Index) -> pa.Schema:
    """Of the tables, and of the shards themselves."""
    return shard_schema(index.group_values).with_metadata(hugging_face(index.classes, index.group_values))


def tables(index: Index, rows: Ints) -> Iterator[pa.Table]:
    """The rows, in their order, a few at a time. Raises DamagedRow."""
    kind = schema(index)
    with closing(Reader(index)) as reader:
        for start, stop in spans(index.length[rows], BYTES_AT_ONCE, AT_ONCE):
            part = rows[start:stop]
            ids = ids_of(index, part)
            contents = pa.array([reader.read(row) for row in part.tolist()], pa.binary())
            columns: dict[str, Any] = {"id": ids, "label": index.labels[part], "crc32c": index.crc32c[part]}
            columns["image"] = pa.StructArray.from_arrays([contents, ids], names=["bytes", "path"])
            for a, (name, values) in enumerate(index.group_values.items()):
                columns[name] = pa.array(values, pa.string()).take(index.groups[part, a])
            yield pa.table({name: columns[name] for name in kind.names}, schema=kind)


def spans(sizes: Any, most_bytes: int, most_rows: int | None = None) -> Iterator[tuple[int, int]]:
    """Start and stop of parts of at most so many bytes and rows; one row may be larger than that."""
    start, total = 0, 0
    for stop, size in enumerate(sizes.tolist()):
        if stop > start and (total + size > most_bytes or stop - start == most_rows):
            yield start, stop
            start, total = stop, 0
        total += size
    if len(sizes):
        yield start, len(sizes)


def only(index: Index, rows: Ints) -> Index:
    """These rows alone, numbered from 0; what a task elsewhere needs to read them."""
    by_row = ("labels", "groups", "split", "shard", "offset", "length", "crc32c", "image_crc32c")
    by_row += ("width", "height", "quality", "look", "unit")
    return replace(
        index, ids=pa.chunked_array([ids_of(index, rows)]), **{name: getattr(index, name)[rows] for name in by_row}
    )
