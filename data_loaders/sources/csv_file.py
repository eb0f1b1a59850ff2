"""CSV files that list images, with a label and any number of group columns."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.lines import records
from data_loaders.sources.places import (
    Place,
    Places,
    Root,
    common_folder,
    folder_of,
    is_http,
    is_url,
    plain,
    shown,
    texts,
    wrong_with,
)
from data_loaders.sources.rows import SPLIT_NAME, GroupColumns, Read, Rejected, Row, Source, SplitName
from data_loaders.sources.storage import expand, image_reader

NO_QUERY = "list plain paths; leave signatures to the server's settings"


class Csv(Source):
    """Images listed in CSV files (UTF-8, with a header line). Columns that are not named here are ignored."""

    kind: Literal["csv"] = "csv"
    path: Places
    """The CSV file, or several; each a path, a pattern (lists/*.csv) or an URL (s3, gs, http). Those that end in .gz,
    .bz2, .xz or .zst are unpacked."""
    held_out: dict[SplitName, Places] = Field(default_factory=dict)
    """Further CSV files, each a split of its own: `source.held_out.test=test.csv`."""
    root: Place | None = None
    """Folder, or URL, that the paths in the CSV are relative to and may not leave; by default the CSV's own."""
    path_column: str = "path"
    label_column: str = "label"
    group_columns: GroupColumns = ()
    """Columns that say which group (venue, camera, …) an image belongs to."""
    split_column: str | None = None
    """Column that names the split of each row; without it, splits are drawn."""
    split_by: str | None = None
    """Column (patient, session) whose rows are never divided between splits."""

    @model_validator(mode="after")
    def _one_way_to_split(self) -> "Csv":
        if self.split_column and self.split_by:
            raise ValueError("split_column gives the splits, so split_by has nothing to draw: name one of them")
        return self

    @property
    def group_names(self) -> tuple[str, ...]:
        return self.group_columns

    def rows(self, labelled: bool = True) -> Iterator[Row | Rejected]:
        """Every row of the CSV files; without labels when they are only to be predicted."""
        lists = self._lists()
        vars(self)["_roots"] = [root for _, _, root in lists]
        faults: list[Fault] = []
        tables: list[_Table] = []
        for number, (split, place, root) in enumerate(lists):
            try:
                tables.append(self._table(place, split, root, number, labelled))
            except Refusal as refusal:
                faults += refusal.faults
        if faults:
            raise Refusal("The CSV cannot be used:", faults, 65)
        for table in tables:
            try:
                yield from self._rows(table)
            except Refusal as refusal:
                faults += refusal.faults
        if faults:
            raise Refusal("The CSV cannot be used:", faults, 65)

    @contextmanager
    def reader(self) -> Iterator[Read]:
        """Reads the images by their paths."""
        readers = [image_reader(root) for _, _, root in self._lists()]
        yield lambda row: readers[row.place[0]](row.id)

    def file_of(self, row: Row) -> str | None:
        """The image itself."""
        root = self._roots[row.place[0]] if row.place[0] < len(self._roots) else None
        return None if root is None or is_url(root.place) else root.file_of(row.id)

    @cached_property
    def _roots(self) -> list[Root]:
        """As they were when the rows were listed last, since the ids of the rows depend on all of them."""
        return [root for _, _, root in self._lists()]

    def _lists(self) -> list[tuple[str, str, Root]]:
        """Split, place and root of every CSV."""
        given = {"": self.path, **self.held_out}
        found = [(split, place) for split, places in given.items() for place in expand(texts(places))]
        faults = [place for _, place in found if isinstance(place, Fault)]
        if self.root is not None and (wrong := wrong_with(str(self.root))):
            faults.append(Fault("source.root", wrong, "give a path, or an URL without credentials"))
        lists = [(split, place) for split, place in found if isinstance(place, str)]
        roots = [folder_of(place) if self.root is None else str(self.root) for _, place in lists]
        base = common_folder(roots) if lists else None
        if lists and base is None:
            what = f"the CSV files lie apart, in {' and '.join(map(shown, dict.fromkeys(roots)))}"
            faults.append(Fault("source.path", what, "set source.root to the folder that holds all images"))
        if faults:
            raise Refusal("The CSV cannot be used:", faults, 65)
        return [(split, place, Root(root, base)) for (split, place), root in zip(lists, roots, strict=True)]

    def _table(self, place: str, split: str, root: Root, number: int, labelled: bool) -> "_Table":
        """Where the columns that are used stand, by the header line of a CSV."""
        _, header = next(records(place), (1, []))
        header = [name.strip() for name in header]
        optional = [self.split_by, None if split else self.split_column]
        groups = self.group_columns if labelled or set(self.group_columns) <= set(header) else ()
        wanted = [self.path_column, *([self.label_column] * labelled), *groups]
        wanted += filter(None, optional) if labelled else []
        seen = ", ".join(_told(name, root) if name.isprintable() else repr(_told(name, root)) for name in header)
        fix = f"there are: {seen}" if any(header) else "begin the file with the names of its columns"
        if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), "")):
            fix = f"separate the cells with commas, not with {mark!r}"
        where = f"{plain(shown(place))}:1"
        faults = [
            Fault(where, f"column {name!r} stands {header.count(name)} times", fix[:500])
            for name in dict.fromkeys(wanted)
            if header.count(name) != 1
        ]
        if faults:
            raise Refusal("The CSV does not have the columns that were asked for:", faults, 65)
        columns = {name: header.index(name) for name in wanted}
        return _Table(place, split, root, (number, 0, 0), len(header), columns)

    def _rows(self, table: "_Table") -> Iterator[Row | Rejected]:
        name, id_of, columns = plain(shown(table.place)), table.root.id_of, table.columns
        labelled = self.label_column in columns
        roles = [self.path_column, *([self.label_column] * labelled), *(c for c in self.group_columns if c in columns)]
        split_at = len(roles) if self.split_column in columns and not table.split else 0
        roles += [self.split_column] if self.split_column and split_at else []
        unit_at = len(roles) if self.split_by in columns else 0
        roles += [self.split_by] if self.split_by and unit_at else []
        used, first = [columns[role] for role in roles], 1 + labelled
        last = len(roles) - bool(split_at) - bool(unit_at)
        splits, query = {table.split}, "?" if is_http(table.root.place) else "\0"
        found = records(table.place)
        next(found, None)
        for line, cells in found:
            if len(cells) == table.width:
                values = [cells[at].strip() for at in used]
                given = values[split_at] if split_at else table.split
                if given not in splits and re.fullmatch(SPLIT_NAME, given):
                    splits.add(given)
                image = id_of(values[0]) if all(values) and given in splits and query not in values[0] else None
                if image is not None:
                    label, groups = values[1] if labelled else "", tuple(values[first:last])
                    unit = values[unit_at] if unit_at else ""
                    yield Row(f"{name}:{line}", image, label, groups, given, unit, table.place_of_images)
                    continue
            if cells:
                yield self._rejected(table, f"{name}:{line}", cells)

    def _rejected(self, table: "_Table", where: str, cells: list[str]) -> Rejected:
        columns = table.columns

        def cell(name: str | None) -> str:
            return cells[columns[name]].strip() if name in columns and columns[name] < len(cells) else ""

        path, given = cell(self.path_column), table.split or cell(self.split_column)
        told = _told(path, table.root)
        if told != path and len(cells) != table.width:
            cells = [""] * len(cells)  # a query may go on in them
        groups = tuple(cell(name) for name in self.group_columns if name in columns)
        row = Row(where, told, cell(self.label_column), groups, given, cell(self.split_by), table.place_of_images)
        empty = [name for name in columns if not cell(name)]
        if len(cells) != table.width:
            what = f"{len(cells)} cells under {table.width} columns"
            fix = "quote cells that hold a comma" if len(cells) > table.width else "add the cells that are missing"
            return Rejected(row, Fault(where, what, fix))
        if empty:
            at = f"{where}:{columns[empty[0]] + 1}"
            return Rejected(row, Fault(at, f"no {' and no '.join(empty)}", "fill the cell"))
        if is_http(table.root.place) and "?" in path:
            at = f"{where}:{columns[self.path_column] + 1}"
            return Rejected(row, Fault(at, f"{told!r} comes with a query", NO_QUERY))
        if table.root.id_of(path) is None:
            what = f"{told!r} is outside of {shown(table.root.place)}"
            fix = "move the file there, or set source.root to a folder above all, and write paths relative to it"
            return Rejected(row, Fault(f"{where}:{columns[self.path_column] + 1}", what, fix))
        at = f"{where}:{columns[self.split_column or ''] + 1}"
        return Rejected(row, Fault(at, f"{given!r} cannot name a split", "use at most 40 letters, digits, . _ and -"))


def _told(cell: str, root: Root) -> str:
    """A cell without what could be a signature of an URL."""
    return shown(cell).partition("?")[0] if is_http(root.place) else shown(cell)


class _Table(NamedTuple):
    """A CSV whose header has been read."""

    place: str
    split: str
    """Of all its rows; empty if each has its own, or none."""
    root: Root
    place_of_images: tuple[int, int, int]
    """The number of the root among all of them, which tells the reader where a path is from."""
    width: int
    columns: dict[str, int]
    """Name -> position of the columns that are used."""
