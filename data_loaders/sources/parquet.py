"""Parquet and Arrow files with a column of images, as Hugging Face `datasets`, and our own ingest, write them."""

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
from pydantic import model_validator

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.archives import Archive, find
from data_loaders.sources.places import Places, Root, folder_of, is_url, shown, texts
from data_loaders.sources.rows import SPLIT_NAME, GroupColumns, Read, Rejected, Row, Source, Unreadable
from data_loaders.sources.storage import FILE_CAP, image_reader, open_place, reason

SUFFIXES = (".parquet", ".arrow")
LIST_ROWS, IMAGE_ROWS = 2048, 16
"""Rows that are held at once: of small columns, and of images, since a few bytes of Parquet can stand for many."""
LONGEST_TEXT = 4096
"""Characters of a cell that names something."""
REPAIR = "write the file anew"
WRONG = (OSError, ValueError, OverflowError, MemoryError, pa.ArrowException)
"""What Arrow raises at files that are damaged, or were made to do harm."""
NAMES = Root("/images")
"""A root of no disk: ids are to be names like paths."""


class Parquet(Source):
    """Images in Parquet or Arrow files, such as a data set of the Hugging Face hub, `save_to_disk`, or our shards."""

    kind: Literal["parquet"] = "parquet"
    path: Places
    """The folder of the files, or files: paths, patterns or URLs (s3, gs, http); they end in .parquet or .arrow."""
    image_column: str = "image"
    """Column of encoded images: binary, or {bytes, path}; a path alone is a file below the folder of its list."""
    label_column: str = "label"
    """Column of labels: text, or numbers, which are named where the file names its classes."""
    id_column: str = "id"
    """Column of texts that name the rows; where there is none they are called FILE/ROW."""
    group_columns: GroupColumns = ()
    """Columns that say which group (venue, camera, …) an image belongs to."""
    split_column: str | None = None
    """Column that names the split of each row."""
    split_by: str | None = None
    """Column (patient, session) whose rows are never divided between splits."""
    file_splits: bool = True
    """Whether files and folders called train, val, validation, dev or test are splits, unless split_column is given."""

    @model_validator(mode="after")
    def _one_way_to_split(self) -> "Parquet":
        if self.split_column and self.split_by:
            raise ValueError("split_column gives the splits, so split_by has nothing to draw: name one of them")
        return self

    @property
    def group_names(self) -> tuple[str, ...]:
        return self.group_columns

    def rows(self, labelled: bool = True) -> Iterator[Row | Rejected]:
        """Every row; only the small columns are read, and of Parquet only they leave the disk."""
        archives = vars(self)["_found"] = self._archives()
        faults = [fault for archive in archives for fault in self._faults(archive, labelled)]
        if faults:
            raise Refusal("The files of images cannot be used:", faults, 65)
        for number, archive in enumerate(archives):
            try:
                yield from self._rows(number, archive, labelled)
            except WRONG as wrong:
                faults.append(Fault(archive.shown, f"cannot be read: {_said(wrong)}", REPAIR))
        if faults:
            raise Refusal("The files of images cannot be read:", faults, 65)

    @contextmanager
    def reader(self) -> Iterator[Read]:
        """Reads a few images at once, on from the last; so rows are best asked for in their order."""
        images = _Images(self._archives(), self.image_column)
        try:
            yield images.read
        finally:
            images.close()

    def file_of(self, row: Row) -> str | None:
        """The file that holds it; None too where others were added or removed since."""
        try:
            place = Archive.of(row, self._found).place
        except Unreadable:
            return None
        return None if is_url(place) else place

    @cached_property
    def _found(self) -> list[Archive]:
        """As they were when the rows were listed last."""
        return self._archives()

    def _archives(self) -> list[Archive]:
        return find(texts(self.path), SUFFIXES)

    def _columns(self, schema: pa.Schema, labelled: bool) -> dict[str, str]:
        """Role -> name of the small columns that are used."""
        columns = {"id": self.id_column} if _is_text(schema, self.id_column) else {}
        if labelled:
            columns |= {"label": self.label_column} | {f"group {name}": name for name in self.group_columns}
            columns |= {"split": self.split_column} if self.split_column else {}
            columns |= {"unit": self.split_by} if self.split_by else {}
        return columns

    def _faults(self, archive: Archive, labelled: bool) -> Iterator[Fault]:
        try:
            with _open(archive) as table:
                schema = table.schema
        except WRONG as wrong:
            yield Fault(archive.shown, f"cannot be read: {_said(wrong)}", REPAIR)
            return
        fix = f"there are: {', '.join(schema.names)}"[:500]
        wanted = dict.fromkeys((self.image_column, *self._columns(schema, labelled).values()))
        for name in wanted:
            if schema.names.count(name) != 1:
                yield Fault(archive.shown, f"column {name!r} stands {schema.names.count(name)} times", fix)
            elif name == self.image_column and not _holds_images(schema.field(name).type):
                what = f"column {name!r} holds {schema.field(name).type}"[:200]
                yield Fault(archive.shown, what, "set source.image_column to one of binary, or of {bytes, path}")
            elif name != self.image_column and not _is_plain(schema.field(name).type):
                what = f"column {name!r} holds {schema.field(name).type}"[:200]
                yield Fault(archive.shown, what, "use a column of texts, whole numbers or true and false")

    def _rows(self, number: int, archive: Archive, labelled: bool) -> Iterator[Row | Rejected]:
        given = archive.split if self.file_splits and not self.split_column else ""
        with _open(archive) as table:
            columns = self._columns(table.schema, labelled)
            names = {name: _class_names(table.schema, name) for name in columns.values()}
            wanted = list(dict.fromkeys(columns.values()))
            seen, group, first = 0, -1, 0
            for at, batch in _sliced(table.small(wanted)):
                first = first if at == group else seen
                group = at
                cells = {name: _texts(batch.column(name), names[name]) for name in wanted}
                for index in range(batch.num_rows):
                    values = {role: cells[name][index] for role, name in columns.items()}
                    place = (number, group, seen - first)
                    yield self._row(archive, seen, values, given if labelled else "", place)
                    seen += 1

    def _row(
        self, archive: Archive, number: int, cells: dict[str, str | None], given: str, place: tuple[int, int, int]
    ) -> Row | Rejected:
        where = f"{archive.shown}:{number}"
        long = [role.removeprefix("group ") for role, value in cells.items() if value is None]
        values = {role: value or "" for role, value in cells.items() if value is not None or role != "id"}
        name = values.get("id", f"{archive.name}/{number}")
        image = NAMES.id_of(name) if name else None
        groups = tuple(value for role, value in values.items() if role.startswith("group "))
        split, unit = values.get("split", given), values.get("unit", "")
        row = Row(where, image or name, values.get("label", ""), groups, split, unit, place)
        empty = [role.removeprefix("group ") for role, value in values.items() if not value]
        if long:
            what = f"{' and '.join(long)} of more than {LONGEST_TEXT:,} characters"
            return Rejected(row, Fault(where, what, "shorten the cell"))
        if empty:
            return Rejected(row, Fault(where, f"no {' and no '.join(empty)}", "fill the cell"))
        if image is None:
            return Rejected(row, Fault(where, f"{name!r} is no path of an image", "use texts like a/b.jpg"))
        if split and not re.fullmatch(SPLIT_NAME, split):
            fix = "use at most 40 letters, digits, . _ and -"
            return Rejected(row, Fault(where, f"{split!r} cannot name a split", fix))
        return row


class _Table(ABC):
    """An open file of record batches, or of row groups of them."""

    schema: pa.Schema

    @abstractmethod
    def small(self, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Number of the group, and a part of it in order, of some columns."""

    @abstractmethod
    def batches(self, name: str, group: int) -> Iterator[pa.Array]:
        """A group of one column, in parts."""


class _ParquetTable(_Table):
    def __init__(self, file: io.BufferedIOBase) -> None:
        from pyarrow.parquet import ParquetFile

        self._open = lambda **settings: ParquetFile(file, **settings)
        self._file = self._open()
        self.schema = self._file.schema_arrow

    def small(self, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        # Texts stay in their dictionary, since a few bytes can stand for one that comes again and again.
        texts = [name for name in names if _is_text(self.schema, name)]
        file = self._open(metadata=self._file.metadata, read_dictionary=texts)
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(LIST_ROWS, row_groups=[group], columns=names):
                yield group, batch

    def batches(self, name: str, group: int) -> Iterator[pa.Array]:
        for batch in self._file.iter_batches(IMAGE_ROWS, row_groups=[group], columns=[name]):
            yield batch.column(0)


class _ArrowFile(_Table):
    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.schema = pa.ipc.open_file(file).schema

    def small(self, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        reader = self._reader(names)
        for group in range(reader.num_record_batches):
            yield group, reader.get_batch(group)

    def batches(self, name: str, group: int) -> Iterator[pa.Array]:
        yield self._reader([name]).get_batch(group).column(0)

    def _reader(self, names: list[str]) -> Any:
        """Reads some columns, at least one: of none it would not know the number of rows."""
        fields = [self.schema.names.index(name) for name in names] or [0]
        self._file.seek(0)
        return pa.ipc.open_file(self._file, options=pa.ipc.IpcReadOptions(included_fields=fields))


class _ArrowStream(_Table):
    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file, self._reader, self._next = file, pa.ipc.open_stream(file), 0
        self.schema = self._reader.schema

    def small(self, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        for group, batch in enumerate(self._reader):
            yield group, batch.select(names) if names else batch

    def batches(self, name: str, group: int) -> Iterator[pa.Array]:
        if group < self._next:
            self._file.seek(0)
            self._reader, self._next = pa.ipc.open_stream(self._file), 0
        while self._next < group:
            self._reader.read_next_batch()
            self._next += 1
        self._next += 1
        yield self._reader.read_next_batch().column(name)


@contextmanager
def _open(archive: Archive) -> Iterator[_Table]:
    """A file, by its first bytes."""
    with open_place(archive.place) as file:
        if not file.seekable():
            raise Unreadable("its server sends no parts of files: download it")
        magic = file.read(6)
        file.seek(0)
        if magic.startswith(b"PAR1"):
            yield _ParquetTable(file)
        elif magic == b"ARROW1":
            yield _ArrowFile(file)
        elif magic.startswith(b"\xff\xff\xff\xff"):
            yield _ArrowStream(file)
        else:
            raise Unreadable("is neither Parquet nor Arrow")


class _Images:
    """Reads images, and keeps the file and the part of a group that it read last."""

    def __init__(self, archives: list[Archive], column: str) -> None:
        self._archives, self._column = archives, column
        self._opened = ExitStack()
        self._table: _Table | None = None
        self._number = self._group = -1
        self._parts: Iterator[pa.Array] = iter(())
        self._part = pa.array([])
        self._first = 0

    def close(self) -> None:
        self._opened.close()

    def read(self, row: Row) -> bytes:
        number, group, position = row.place
        archive = Archive.of(row, self._archives)
        try:
            return _content(archive, self._image(number, group, position))
        except OSError:
            raise
        except WRONG as wrong:
            raise Unreadable(_said(wrong)) from wrong

    def _image(self, number: int, group: int, position: int) -> Any:
        if self._table is None or number != self._number:
            self._opened.close()
            self._table = None
            self._table = self._opened.enter_context(_open(self._archives[number]))
            self._number, self._group = number, -1
        if group != self._group or position < self._first:
            self._parts, self._part = self._table.batches(self._column, group), pa.array([])
            self._group, self._first = group, 0
        while position >= self._first + len(self._part):
            self._first += len(self._part)
            part = next(self._parts, None)
            if part is None:
                self._group = -1
                raise Unreadable("is no longer in its file")
            part.validate(full=True)
            self._part = part
        return self._part[position - self._first].as_py()


def _content(archive: Archive, image: Any) -> bytes:
    """The bytes of an image cell, or of the file that it names."""
    cell = image if isinstance(image, dict) else {"path": image} if isinstance(image, str) else {"bytes": image}
    content, path = cell.get("bytes"), cell.get("path")
    if isinstance(content, bytes):
        if len(content) > FILE_CAP:
            raise Unreadable(f"has {len(content):,} bytes, more than the cap of {FILE_CAP:,}")
        return content
    if not isinstance(path, str) or not path:
        raise Unreadable("holds no image")
    root = Root(folder_of(archive.place))
    name = root.id_of(path)
    if name is None:
        raise Unreadable(f"{path!r} is outside of {shown(root.place)}")
    return image_reader(root)(name)


def _sliced(batches: Iterator[tuple[int, pa.RecordBatch]]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The same rows, checked, and few at once."""
    for group, batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, LIST_ROWS):
            yield group, batch.slice(start, LIST_ROWS)


def _texts(column: pa.Array, names: tuple[str, ...]) -> list[str | None]:
    """Cells as text, without spaces around them; empty where there is none, None where it is too long to be had."""
    if pa.types.is_dictionary(column.type):
        used = column.indices.unique()
        known = dict(zip(used.to_pylist(), _texts(column.dictionary.take(used), ()), strict=True))
        return [known[index] for index in column.indices.to_pylist()]
    if pa.types.is_boolean(column.type):
        return ["" if value is None else str(value).lower() for value in column.to_pylist()]
    if pa.types.is_integer(column.type):
        known = dict(enumerate(names))
        return ["" if value is None else known.get(value, "") if names else str(value) for value in column.to_pylist()]
    if pa.types.is_string_view(column.type):
        return [_text(cell) for cell in column]
    longest = pyarrow.compute.call_function("max", [pyarrow.compute.call_function("binary_length", [column])])
    if (longest.as_py() or 0) > LONGEST_TEXT:
        return [_text(cell) for cell in column]
    return [(value or "").strip() for value in column.to_pylist()]


def _text(cell: pa.Scalar) -> str | None:
    """It is measured before it becomes text: 4 bytes are one character at most."""
    if cell.is_valid and cell.as_buffer().size > 4 * LONGEST_TEXT:
        return None
    text = cell.as_py() or ""
    return text.strip() if len(text) <= LONGEST_TEXT else None


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names of classes that Hugging Face keeps in the metadata of a file; none if there are none."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _is_text(schema: pa.Schema, name: str) -> bool:
    return schema.names.count(name) == 1 and _is_string(schema.field(name).type)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_string(kind.value_type)
    return _is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _holds_images(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return _is_binary(kind) or _is_string(kind)
    fields = {field.name: field.type for field in kind}
    content, path = fields.get("bytes", pa.null()), fields.get("path", pa.null())
    return _is_binary(content) or (pa.types.is_null(content) and _is_string(path))


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _said(wrong: BaseException) -> str:
    said = reason(wrong) if isinstance(wrong, Exception) else str(wrong)
    return (said.splitlines() or [type(wrong).__name__])[0][:200]
