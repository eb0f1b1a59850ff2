"""What every source of images becomes: rows to ingest, and rows that cannot be, each with its reason."""

import csv
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from data_loaders import durable
from data_loaders.faults import Fault

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SPLIT_NAME = r"^\w[\w.-]{0,39}$"  # it names the shards, so it must not lead to another folder

SplitName = Annotated[str, Field(pattern=SPLIT_NAME)]


class Row(NamedTuple):
    """One image with what is known of it."""

    where: str
    """file:line, or the file itself."""
    file: str
    """The image file, inside the root of its source."""
    path: str
    """The path as the user wrote it: how the row is named in messages and predictions."""
    label: str = ""
    groups: tuple[str, ...] = ()
    """A value for each group column."""
    split: str = ""
    """The split it was given, or empty if one is to be drawn."""
    unit: str = ""
    """Rows with the same unit (a patient, a session) are never divided between splits; empty for a row alone."""


class Rejected(NamedTuple):
    row: Row
    fault: Fault


@dataclass(frozen=True)
class Listing:
    """All rows of a source."""

    group_names: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def reject(self, row: Row, where: str, what: str, fix: str) -> None:
        self.rejected.append(Rejected(row, Fault(where, what, fix)))


def inside(root: Path, path: str) -> Path | None:
    """The file at `path` under `root`, or None if it lies, or links, outside."""
    if "\0" in path:
        return None
    file = Path(os.path.realpath(root / path))  # resolve() raises where links go in a circle
    return file if file.is_relative_to(os.path.realpath(root)) else None


def without_twins(listing: Listing) -> Listing:
    """Rejects rows listed twice, and those whose label differs from a more frequent one only in case or spaces."""
    kept = Listing(listing.group_names, [], list(listing.rejected))
    first: dict[str, Row] = {}
    spelling = _spellings(listing.rows)
    for row in listing.rows:
        earlier = first.setdefault(row.file, row)
        usual = spelling.get(_folded(row.label), row.label)
        if earlier is not row and earlier.label != row.label:
            what = f"{row.path!r} is labelled {row.label!r} here and {earlier.label!r} at {earlier.where}"
            kept.reject(row, row.where, what, "keep one of the two rows")
        elif earlier is not row:
            kept.reject(row, row.where, f"{row.path!r} is listed already at {earlier.where}", "remove one of the rows")
        elif usual != row.label:
            what = f"label {row.label!r} differs from {usual!r} only in case or spaces"
            kept.reject(row, row.where, what, "write both alike")
        else:
            kept.rows.append(row)
    return kept


def without_divided_units(listing: Listing) -> Listing:
    """Rejects rows whose unit has rows in a given split already: those would be on both sides of it."""
    kept = Listing(listing.group_names, [], list(listing.rejected))
    first: dict[str, Row] = {}
    for row in listing.rows:
        if row.unit and row.split:
            first.setdefault(row.unit, row)
    for row in listing.rows:
        given = first.get(row.unit, row)
        if given.split == row.split:
            kept.rows.append(row)
        else:
            what = f"{row.unit!r} has rows in the split {given.split!r} too, at {given.where}"
            kept.reject(row, row.where, what, f"move all rows of {row.unit!r} to one side, or remove these")
    return kept


def write_rejected(path: Path, rejected: list[Rejected], group_names: tuple[str, ...] = ()) -> None:
    """All rejected rows as CSV, each with its reason and repair."""
    with durable.writing(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["where", "reason", "fix", "path", "label", *group_names])
        for row, fault in rejected:
            out.writerow([fault.where, fault.what, fault.fix, row.path, row.label, *row.groups])


def _spellings(rows: list[Row]) -> dict[str, str]:
    """Folded label -> its most frequent spelling."""
    counts = Counter(row.label for row in rows)
    usual: dict[str, str] = {}
    for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        usual.setdefault(_folded(label), label)
    return usual


def _folded(label: str) -> str:
    return " ".join(label.split()).casefold()
