"""Writes what is known of all rows: the index, and which rows are of which split, class and groups. Each file is one
record batch, so that a reader may map it; columns are spooled, so that only some rows are in memory at a time."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from io import BytesIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from data_loaders import durable
from data_loaders.index import Ints, numbered, order_schema, schema
from data_loaders.manifest import File

IN_MEMORY = 2**17
"""Rows of which all columns are held in memory."""
SORTED = 2**23
"""Rows that are sorted at a time."""
Key = tuple[int, ...]
"""Split, class and groups, as numbers."""


class Spool:
    """Numbers that are written one after the other, and then read as an array: in memory, or in a file without a name,
    which is gone when the process is."""

    def __init__(self, folder: Path | None) -> None:
        self._file: Any = TemporaryFile(dir=folder) if folder else BytesIO()  # noqa: SIM115

    def add(self, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values).data)

    def array(self, kind: type[np.generic]) -> NDArray[Any]:
        if isinstance(self._file, BytesIO):
            return np.frombuffer(self._file.getvalue(), kind)
        self._file.flush()
        return np.frombuffer(mmap(self._file.fileno(), 0, access=ACCESS_READ), kind)

    def close(self) -> None:
        self._file.close()


def write(
    folder: Path, generation: int, groups: tuple[str, ...], tables: Iterable[pa.Table], rows: int, scratch: Path
) -> tuple[File, File]:
    """The index of the rows in these tables, which have its columns, and its order. There are so many `rows`; what is
    spooled lies in the folder `scratch`."""
    with ExitStack() as spools:

        def spool() -> Spool:
            made = Spool(scratch if rows > IN_MEMORY else None)
            spools.callback(made.close)
            return made

        columns = {field.name: spool() for field in schema(groups) if field.name != "id"}
        id_ends, id_text, strata, found, end = spool(), spool(), spool(), dict[Key, int](), 0
        id_ends.add(np.zeros(1, np.int64))
        for table in tables:
            for name, column in columns.items():
                column.add(table[name].to_numpy())
            ends, text = _ids(table)
            id_ends.add(ends + end)
            id_text.add(text)
            end += len(text)
            strata.add(_strata(table, groups, found))
        batch = _index(columns, id_ends, id_text, groups)
        index = _written(folder, f"index-g{generation}", batch)
        batch = _order(strata.array(np.int32), found, groups, spool())
        return index, _written(folder, f"order-g{generation}", batch)


def _written(folder: Path, stem: str, batch: pa.RecordBatch) -> File:
    with (
        durable.named_by_hash(folder, stem) as sink,
        pa.ipc.new_file(pa.PythonFile(sink, "w"), batch.schema) as writer,
    ):
        writer.write_batch(batch)
    return File(name=sink.path.name, rows=batch.num_rows, bytes=sink.size, sha256=sink.sha256)


def _index(columns: dict[str, Spool], id_ends: Spool, id_text: Spool, groups: tuple[str, ...]) -> pa.RecordBatch:
    ends = id_ends.array(np.int64)
    text = id_text.array(np.uint8) if ends[-1] else np.zeros(0, np.uint8)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(text)]
    arrays = [pa.Array.from_buffers(pa.large_string(), len(ends) - 1, buffers)]
    arrays += [pa.array(columns[f.name].array(f.type.to_pandas_dtype())) for f in schema(groups) if f.name in columns]
    return pa.record_batch(arrays, schema=schema(groups))


def _ids(table: pa.Table) -> tuple[Ints, NDArray[np.uint8]]:
    """Where each id ends in the text, [N], and the text."""
    ids = pa.concat_arrays([pa.array([], pa.large_string()), *table["id"].cast(pa.large_string()).chunks])
    _, ends, text = ids.buffers()
    bounds = np.frombuffer(ends, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    return bounds[1:] - bounds[0], np.frombuffer(text or b"", np.uint8)[bounds[0] : bounds[-1]]


def _strata(table: pa.Table, groups: tuple[str, ...], found: dict[Key, int]) -> NDArray[np.int32]:
    """Number of the stratum of each row, as `found` has it, which gets those that are new."""
    columns = [table[name].to_numpy() for name in ("split", "label", *(f"group.{name}" for name in groups))]
    number = numbered([(values, int(values.max(initial=0)) + 1) for values in columns], len(table))
    _, first, place = np.unique(number, return_index=True, return_inverse=True)
    keys = zip(*(values[first].tolist() for values in columns), strict=True)
    return np.array([found.setdefault(key, len(found)) for key in keys], np.int32)[place]


def _order(strata: NDArray[np.int32], found: dict[Key, int], groups: tuple[str, ...], spool: Spool) -> pa.RecordBatch:
    """The strata of each split and class, and after them, where there are groups, those of each with groups."""
    ends, keys = [np.zeros(1, np.int64)], list[Key]()
    for width in (2, 2 + len(groups)) if groups else (2,):
        lines = sorted({key[:width] for key in found})
        place = {key: number for number, key in enumerate(lines)}
        of = np.array([place[key[:width]] for key in found], np.int64)
        sizes = np.zeros(len(lines), np.int64)
        for part in _parts(strata):
            sizes += np.bincount(of[part], minlength=len(lines))
        for rows in _sorted(strata, of, sizes):
            spool.add(rows)
        ends.append(ends[-1][-1] + np.cumsum(sizes))
        keys += [(*key, *(-1 for _ in range(2 + len(groups) - width))) for key in lines]
    rows = pa.LargeListArray.from_arrays(pa.array(np.concatenate(ends)), pa.array(spool.array(np.int64)))
    stored = order_schema(groups)
    columns = [pa.array(values, kind) for values, kind in zip(zip(*keys, strict=True), stored.types[:-1], strict=True)]
    return pa.record_batch([*columns, rows], schema=stored)


def _sorted(strata: NDArray[np.int32], of: Ints, sizes: Ints) -> Iterator[Ints]:
    """All rows by their line, and by their number within; `of` is the line of each stratum."""
    ends, first, done = np.cumsum(sizes), 0, 0
    while first < len(sizes):
        last = max(int(np.searchsorted(ends, done + SORTED, side="right")), first + 1)
        start, rows, lines = 0, list[Ints](), list[Ints]()
        for part in _parts(strata):
            line = of[part]
            found = np.flatnonzero((line >= first) & (line < last))
            if last == first + 1:  # it may have many rows
                yield found + start
            else:
                rows.append(found + start)
                lines.append(line[found])
            start += len(part)
        if rows:
            yield np.concatenate(rows)[np.argsort(np.concatenate(lines), kind="stable")]
        first, done = last, int(ends[last - 1])


def _parts(strata: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    return (strata[start : start + SORTED] for start in range(0, len(strata), SORTED))
