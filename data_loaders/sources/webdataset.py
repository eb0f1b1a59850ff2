"""WebDataset: tars in which the members with one name, up to its first dot, are an image and what is known of it."""

import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.archives import Archive, find
from data_loaders.sources.places import Places, Root, is_http, is_url, plain, texts
from data_loaders.sources.remote import fetch_span
from data_loaders.sources.rows import (
    IMAGE_SUFFIXES,
    SPLIT_NAME,
    GroupColumns,
    Read,
    Rejected,
    Row,
    Source,
    Unreadable,
)
from data_loaders.sources.storage import FILE_CAP, open_place, open_regular, read_span, reason
from data_loaders.sources.tar import Member, members

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
NOTE_CAP = 2**20
"""Most bytes of all that is read to know what an image is: its label, and its .json member."""
NAMES = Root("/images")
"""A root of no disk: names of members are to be like paths below one."""


class WebDataset(Source):
    """Images in tar files, as webdataset writes them."""

    kind: Literal["webdataset"] = "webdataset"
    path: Places
    """The folder of the tars, or tars: paths, patterns or URLs (s3, gs, http)."""
    label: Annotated[str, Field(pattern=r"^(json:.+|[^.:/]+)$")] = "cls"
    """Member that holds the label (cls: a number or a name), or a field of the .json member (json:label)."""
    group_columns: GroupColumns = ()
    """Fields of the .json member that say which group (venue, camera, …) an image belongs to."""
    split_column: str | None = None
    """Field of the .json member that names the split of each row."""
    split_by: str | None = None
    """Field of the .json member (patient, session) whose rows are never divided between splits."""
    file_splits: bool = True
    """Whether tars and folders called train, val, validation, dev or test are splits, unless split_column is given."""

    @model_validator(mode="after")
    def _one_way_to_split(self) -> "WebDataset":
        if self.split_column and self.split_by:
            raise ValueError("split_column gives the splits, so split_by has nothing to draw: name one of them")
        return self

    @property
    def group_names(self) -> tuple[str, ...]:
        return self.group_columns

    def rows(self, labelled: bool = True) -> Iterator[Row | Rejected]:
        """Every image; only headers, labels and .json members are read."""
        archives = vars(self)["_found"] = self._archives()
        faults: list[Fault] = []
        for archive in archives:
            try:
                with _open(archive) as file:
                    next(members(file), None)
            except (OSError, Unreadable) as wrong:
                faults.append(Fault(archive.shown, reason(wrong), "give whole tars that are not packed"))
        if faults:
            raise Refusal("The tars cannot be used:", faults, 65)
        for number, archive in enumerate(archives):
            try:
                yield from self._rows(number, archive, labelled)
            except (OSError, Unreadable) as wrong:
                faults.append(Fault(archive.shown, reason(wrong), "make the tar anew"))
        if faults:
            raise Refusal("The tars cannot be read:", faults, 65)

    @contextmanager
    def reader(self) -> Iterator[Read]:
        """Reads the bytes of a member where its header said they are."""
        archives = self._archives()
        opened, at = -1, -1

        def read(row: Row) -> bytes:
            nonlocal opened, at
            archive = Archive.of(row, archives)
            number, start, size = row.place
            if is_url(archive.place):
                return fetch_span(archive.place, start, size)
            if number != at:
                if opened >= 0:
                    os.close(opened)
                opened, at = -1, -1
                opened, at = open_regular(archive.place), number
            return read_span(opened, start, size)

        try:
            yield read
        finally:
            if opened >= 0:
                os.close(opened)

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

    def _rows(self, number: int, archive: Archive, labelled: bool) -> Iterator[Row | Rejected]:
        with _open(archive) as file:
            for sample in _samples(file, self._wanted() if labelled else set()):
                yield self._row(number, archive, sample, labelled)

    def _row(self, number: int, archive: Archive, sample: "_Sample", labelled: bool) -> Row | Rejected:
        member = (sample.images or sample.odd or [sample.first])[0]
        where, name = f"{archive.shown}:{plain(member.name)}", NAMES.id_of(member.name) or ""
        values, wrong = self._values(sample) if labelled else ({}, "")
        split = (values.get("split", "") if self.split_column else archive.split * self.file_splits) if labelled else ""
        groups = tuple(values.get(f"group {column}", "") for column in self.group_columns) if labelled else ()
        image = f"{archive.name}/{plain(name or member.name)}"
        place = (number, member.offset, member.size)
        row = Row(where, image, values.get("label", ""), groups, split, values.get("unit", ""), place)
        empty = [role.removeprefix("group ") for role, value in values.items() if not value]
        if not sample.images and not sample.odd:
            what, fix = "has no .jpg, .png or .webp", "convert it, or remove the sample"
        elif not sample.images:
            what, fix = "is a link or a device, no file", "put the file itself into the tar"
        elif not name or ".." in member.name.split("/"):
            what, fix = f"{plain(member.name)!r} leads out of the tar", "use names without .. and a leading /"
        elif plain(name) != name:
            what, fix = "its name is not UTF-8", "rename it"
        elif len(sample.images) > 1:
            what, fix = (
                f"has {len(sample.images)} images: {', '.join(plain(m.name) for m in sample.images)}"[:300],
                "keep one",
            )
        elif member.size > FILE_CAP:
            what, fix = f"has {member.size:,} bytes, more than the cap of {FILE_CAP:,}", "use a smaller image"
        elif sample.note_bytes > NOTE_CAP:
            what, fix = f"its label and .json member have more than {NOTE_CAP:,} bytes", "keep there what is asked for"
        elif wrong or empty:
            what, fix = wrong or f"no {' and no '.join(empty)}", "add a member, or a field, that says it"
        elif split and not re.fullmatch(SPLIT_NAME, split):
            what, fix = f"{split!r} cannot name a split", "use at most 40 letters, digits, . _ and -"
        else:
            return row
        return Rejected(row, Fault(where, what, fix))

    def _fields(self) -> dict[str, str]:
        """Role -> field of the .json member."""
        fields = {f"group {column}": column for column in self.group_columns}
        fields |= {"label": self.label.removeprefix("json:")} if ":" in self.label else {}
        fields |= {"split": self.split_column} if self.split_column else {}
        return fields | ({"unit": self.split_by} if self.split_by else {})

    def _wanted(self) -> set[str]:
        """Suffixes of the members that hold what was asked for."""
        fields = self._fields()
        return ({"json"} if fields else set()) | (set() if "label" in fields else {self.label.lower()})

    def _values(self, sample: "_Sample") -> tuple[dict[str, str], str]:
        """Role -> text of everything that was asked for, and what is wrong with the members that hold it."""
        fields = self._fields()
        values = dict.fromkeys(["label", *fields], "")
        try:
            if "label" not in fields:
                values["label"] = sample.notes.get(self.label.lower(), b"").decode().strip()
            known = json.loads(sample.notes.get("json", b"{}")) if fields else {}
        except (ValueError, RecursionError):
            return values, "its label or .json member is not UTF-8, or not JSON"
        if not isinstance(known, dict):
            return values, "its .json member is no object"
        return values | {role: _text(known.get(name)) for role, name in fields.items()}, ""


@dataclass(slots=True)
class _Sample:
    """Members with one name, up to its first dot."""

    first: Member
    images: list[Member] = field(default_factory=list)
    odd: list[Member] = field(default_factory=list)
    """Links and devices that are called like an image."""
    notes: dict[str, bytes] = field(default_factory=dict)
    """Suffix -> content of the members that are wanted, unless they are too large together."""
    note_bytes: int = 0
    """Of all that are wanted."""


def _samples(file: io.BufferedIOBase, wanted: set[str]) -> Iterator[_Sample]:
    """Members that follow each other and have one key; a suffix that comes again begins another sample.

    As in webdataset, hidden files and those without a suffix are of no sample.
    """
    key, seen = "", set[str]()
    sample: _Sample | None = None
    for member in members(file):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        suffix = suffix.lower()
        if member.is_folder or not dot or (not stem and f".{suffix}" not in IMAGE_SUFFIXES):
            continue
        if sample is None or folder + slash + stem != key or suffix in seen:
            if sample is not None:
                yield sample
            key, seen, sample = folder + slash + stem, set(), _Sample(member)
        seen.add(suffix)
        if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            (sample.images if member.is_file else sample.odd).append(member)
        elif member.is_file and suffix in wanted:
            sample.note_bytes += member.size
            if sample.note_bytes <= NOTE_CAP:
                file.seek(member.offset)
                sample.notes[suffix] = file.read(member.size)
    if sample is not None:
        yield sample


def _text(value: Any) -> str:
    """A field of JSON as text; empty where it is neither text nor a whole number nor true or false."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip() if isinstance(value, str | int) else ""


@contextmanager
def _open(archive: Archive) -> Iterator[io.BufferedIOBase]:
    with open_place(archive.place) as file:
        if is_http(archive.place) and not file.seekable():
            raise Unreadable("its server sends no parts of files: download it")
        yield file
