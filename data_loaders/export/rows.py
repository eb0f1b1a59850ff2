"""Rows of a data set as image files, and as Arrow tables with the columns of shards; each is read with its checksum."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa

from data_loaders.decode import decode
from data_loaders.index import Index, Ints, Reader, checksum, tail, tail_id
from data_loaders.loader import ids_of
from data_loaders.recode import png
from data_loaders.shards import hugging_face, shard_schema

AT_ONCE, BYTES_AT_ONCE = 100, 32 * 10**6
"""Most rows, and most bytes of images, of one table."""


def as_file(index: Index, content: bytes) -> bytes:
    """What is stored of a row, as an image file: pixels become a PNG."""
    return png(decode(content, side=index.side)) if index.side else content


def sizes(index: Index, rows: Ints) -> Ints:
    """Most bytes of the image file of each row, [N]; noise as a PNG takes somewhat more than its pixels."""
    length = index.length[rows].astype(np.int64)
    return length + length // 256 + index.side + 200 if index.side else length


def schema(index: Index, side: int = 0) -> pa.Schema:
    """Of tables of image files, which is that of shards of them, or with a `side` of tensors."""
    names = index.group_values
    kind = shard_schema(names, side).with_metadata(hugging_face(index.classes, names, side))
    tensor = pa.fixed_shape_tensor(pa.uint8(), [side, side, 3])
    return kind.set(kind.get_field_index("image"), pa.field("image", tensor)) if side else kind


def tables(index: Index, rows: Ints, tensors: bool = False) -> Iterator[pa.Table]:
    """The rows, in their order, a few at a time. What is stored as pixels are PNGs, whose checksums are others, or
    `tensors`. Raises DamagedRow."""
    side = index.side if tensors else 0
    kind = schema(index, side)
    with closing(Reader(index)) as reader:
        for start, stop in spans(index.length[rows], BYTES_AT_ONCE, AT_ONCE):
            part = rows[start:stop]
            ids = ids_of(index, part)
            contents = [reader.read(row) for row in part.tolist()]
            columns: dict[str, Any] = {"id": ids, "label": index.labels_of(part), "crc32c": index.crc32c[part]}
            if side:
                pixels = pa.array(np.frombuffer(b"".join(contents), np.uint8))
                columns["image"] = pa.ExtensionArray.from_storage(
                    kind.field("image").type, pa.FixedSizeListArray.from_arrays(pixels, 3 * side**2)
                )
            else:
                files = [as_file(index, content) for content in contents]
                columns["image"] = pa.StructArray.from_arrays([pa.array(files, pa.binary()), ids], ["bytes", "path"])
                if index.side:
                    columns["crc32c"] = [_checksum(index, row, f) for row, f in zip(part.tolist(), files, strict=True)]
            for a, (name, values) in enumerate(index.group_values.items()):
                columns[name] = pa.array(values, pa.string()).take(pa.array(index.group[a][part]))
            yield pa.table({name: columns[name] for name in kind.names}, schema=kind)


def _checksum(index: Index, row: int, content: bytes) -> int:
    """Of a row whose image is this one."""
    values = [names[index.group[a][row]] for a, names in enumerate(index.group_values.values())]
    return checksum(content, tail(int(index.label[row]), *values) + tail_id(index.id_of(row)))


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
