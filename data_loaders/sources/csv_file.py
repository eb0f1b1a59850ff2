"""A CSV that lists image files, with a label and any number of group columns."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from data_loaders.sources.rows import SPLIT_NAME, Listing, Rejected, Row, SplitName, inside

TAKEN = {"", "id", "image", "label", "crc32c"}
"""What no group column can be called: the shards have these columns already."""


class Csv(Settings):
    """Images listed in a CSV file (UTF-8, with a header line). Columns that are not named here are ignored."""

    kind: Literal["csv"] = "csv"
    path: Path
    """The CSV file."""
    held_out: dict[SplitName, Path] = Field(default_factory=dict)
    """Further CSV files, each a split of its own: `source.held_out.test=test.csv`."""
    root: Path | None = None
    """Folder that the paths in the CSV are relative to and may not leave; by default the CSV's own."""
    path_column: str = "path"
    label_column: str = "label"
    group_columns: tuple[str, ...] = ()
    """Columns that say which group (venue, camera, …) an image belongs to."""
    split_column: str | None = None
    """Column that names the split of each row; without it, splits are drawn."""
    split_by: str | None = None
    """Column (patient, session) whose rows are never divided between splits."""

    @field_validator("group_columns")
    @classmethod
    def _can_be_columns_of_a_shard(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := sorted({name for name in names if name in TAKEN or names.count(name) > 1}):
            raise ValueError(f"a group column stands once, and is not called {' or '.join(map(repr, wrong))}")
        return names

    @model_validator(mode="after")
    def _one_way_to_split(self) -> "Csv":
        if self.split_column and self.split_by:
            raise ValueError("split_column gives the splits, so split_by has nothing to draw: name one of them")
        return self

    def listing(self, labelled: bool = True) -> Listing:
        """Every row of the CSV files; without labels when they are only to be predicted."""
        listing = Listing(self.group_columns if labelled else ())
        faults: list[Fault] = []
        for split, path in {"": self.path, **self.held_out}.items():
            try:
                for row, problem in self._rows(path, split, labelled):
                    if problem is None:
                        listing.rows.append(row)
                    else:
                        listing.rejected.append(Rejected(row, problem))
            except Refusal as refusal:
                faults += refusal.faults
        if faults:
            raise Refusal("The CSV cannot be used:", faults, 65)
        return listing

    def _rows(self, path: Path, split: str, labelled: bool) -> Iterator[tuple[Row, Fault | None]]:
        records = _records(path)
        _, header = next(records, ("", []))
        columns = self._columns(path, [name.strip() for name in header], split, labelled)
        for where, cells in records:
            if cells:
                yield self._row(where, self.root or path.parent, cells, columns, split)

    def _columns(self, path: Path, header: list[str], split: str, labelled: bool) -> dict[str, int]:
        """Name -> position of the columns that are used."""
        wanted = [self.path_column]
        if labelled:
            wanted += [self.label_column, *self.group_columns, *filter(None, [self.split_by])]
            wanted += [self.split_column] if self.split_column and not split else []
        fix = f"there are: {', '.join(header)}" if header else "begin the file with the names of its columns"
        faults = [
            Fault(f"{path}:1", f"column {name!r} stands {header.count(name)} times", fix)
            for name in dict.fromkeys(wanted)
            if header.count(name) != 1
        ]
        if faults:
            raise Refusal("The CSV does not have the columns that were asked for:", faults, 65)
        return {"": len(header)} | {name: header.index(name) for name in wanted}

    def _row(
        self, where: str, root: Path, cells: list[str], columns: dict[str, int], split: str
    ) -> tuple[Row, Fault | None]:
        def cell(name: str | None) -> str:
            return cells[columns[name]].strip() if name in columns and columns[name] < len(cells) else ""

        path, label = cell(self.path_column), cell(self.label_column)
        groups = tuple(cell(name) for name in self.group_columns if name in columns)
        file = inside(root, path) if path else None
        given = split or cell(self.split_column)
        row = Row(where, str(file or ""), path, label, groups, given, cell(self.split_by))
        if len(cells) != columns[""]:
            what = f"{len(cells)} cells under {columns['']} columns"
            return row, Fault(where, what, "quote cells that hold a comma")
        empty = [name for name in columns if name and not cell(name)]
        if empty:
            return row, Fault(f"{where}:{columns[empty[0]] + 1}", f"no {' and no '.join(empty)}", "fill the cell")
        if file is None:
            what = f"{path!r} is outside of {root}"
            return row, Fault(
                f"{where}:{columns[self.path_column] + 1}", what, "set source.root to a folder above both"
            )
        if given and not re.fullmatch(SPLIT_NAME, given):
            at = f"{where}:{columns[self.split_column or ''] + 1}"
            return row, Fault(at, f"{given!r} cannot name a split", "use at most 40 letters, digits, . _ and -")
        return row, None


def _records(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every record of a CSV, with file:line of its first line: a quoted cell may hold several."""
    line = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                yield f"{path}:{line}", cells
                line = reader.line_num + 1
    except OSError as wrong:
        fault = Fault(str(path), f"cannot be read: {(wrong.strerror or str(wrong)).lower()}")
    except UnicodeDecodeError:
        fault = Fault(f"{path}:{_first_not_utf8(path)}", "is not UTF-8", "save the file as UTF-8 CSV")
    except csv.Error as wrong:
        fault = Fault(f"{path}:{line}", f"is not CSV: {wrong}", 'close every quote; a quote inside of quotes is ""')
    else:
        return
    raise Refusal("The CSV cannot be read:", [fault], 65)


def _first_not_utf8(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError:
                return number
    return 1
