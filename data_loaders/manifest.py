"""What a data set is made of: `dataset.json`, replaced last, and a copy of it for each generation (docs/format.md)."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from data_loaders import durable
from data_loaders.faults import Fault, Refusal

FORMAT, VERSION = "evenkeel-dataset", 3
NAME = "dataset.json"
SHARDS, GENERATIONS, WORK = "shards", "generations", ".ingest"
"""Folders in a data set; WORK is that of an ingest under way."""
SIZE_CAP = 2**30
MOST_SIDE = 1024
"""Pixels, of a square that is stored as such."""
OWN = {
    ".": r"(index|order)-g\d+-[0-9a-f]{8}\.arrow|\.((index|order)-g\d+|dataset\.json|rejected\.csv)\.\d+\.tmp",
    SHARDS: r"\.?\w[\w.-]*-g\d+-\d{5,}-\d{2,}(-[0-9a-f]{8}\.arrow|\.\d+\.tmp)",
    GENERATIONS: r"\.?\d{6,}\.json(\.\d+\.tmp)?",
    f"{WORK}/parts": ".*",
    f"{WORK}/plan": ".*",
}
"""Folder -> names of the files that an ingest writes there, finished or not."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ArrowName = Annotated[str, Field(pattern=r"^\w[\w.-]*\.arrow$", max_length=120)]  # leads to no other folder


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class File(Part):
    """An Arrow file that is never rewritten; its name holds the beginning of its hash."""

    name: ArrowName
    rows: Count
    bytes: Count
    sha256: Hash


class Generation(Part):
    """A state of the data set that was published."""

    generation: PositiveInt
    fingerprint: str
    rows: NonNegativeInt


class Dropped(Part):
    """Rows that the ingest of this generation could not use. Where a value was not given it counts as (none)."""

    rows: NonNegativeInt
    by_class: dict[str, NonNegativeInt]
    by_group: dict[str, dict[str, NonNegativeInt]]
    by_cell: tuple[tuple[tuple[str, ...], NonNegativeInt], ...]
    """Class and group values -> rows."""


class Manifest(Part):
    """A generation of a data set."""

    format: Literal["evenkeel-dataset"] = FORMAT
    version: Literal[3] = VERSION
    generation: PositiveInt
    fingerprint: str = ""
    """Hash (16 hex digits) of what the rows are and where they lie."""
    history: tuple[Generation, ...] = ()
    """Earlier generations, oldest first."""
    classes: tuple[str, ...]
    """In the order of their numbers; later generations have the same."""
    groups: dict[str, tuple[str, ...]]
    """Group column -> its values in the order of their numbers; a later generation may add some at the end."""
    splits: tuple[str, ...]
    unit: str = ""
    """What is never divided between splits; empty where each row is alone."""
    side: Annotated[int, Field(ge=0, le=MOST_SIDE)] = 0
    """Height and width, in pixels, of images that are stored as pixels; 0 where they are files."""
    index: File
    order: File
    """Which rows are of which split, class and groups."""
    shards: tuple[File, ...]
    rows: dict[str, dict[str, NonNegativeInt]]
    """Split -> class -> rows."""
    images: dict[str, NonNegativeInt]
    """Format, and what was not plain (CMYK, turned, …) -> images."""
    rejected: Dropped
    settings: dict[str, Any]
    """Of the ingest that made this generation."""


def read(folder: Path, generation: int | None = None) -> Manifest:
    """The newest generation of the data set in `folder`, or an earlier one, after its checksum agrees."""
    newest = read_file(folder / NAME)
    if generation is None or generation == newest.generation:
        return newest
    earlier = {g.generation: g for g in newest.history}
    if generation not in earlier:
        known = ", ".join(map(str, (*earlier, newest.generation)))
        raise Refusal("There is no such generation:", [Fault(str(folder), f"no {generation}", f"it has {known}")], 65)
    return read_copy(folder, earlier[generation])


def read_copy(folder: Path, published: Generation | Manifest) -> Manifest:
    """The copy of a generation. Raises Refusal (65), also where a whole file is in the place of another."""
    path = copy_of(folder, published.generation)
    found = read_file(path)
    if (found.generation, found.fingerprint) != (published.generation, published.fingerprint):
        what = f"is not generation {published.generation} with the fingerprint {published.fingerprint}"
        raise Refusal("The data set cannot be read:", [Fault(str(path), what, "restore it, or ingest again")], 65)
    return found


def read_file(path: Path) -> Manifest:
    """One manifest, after its checksum agrees. Raises Refusal (65)."""
    try:
        tree = json.loads(content_of(path, SIZE_CAP))
        if (tree["format"], tree["version"]) != (FORMAT, VERSION):
            raise ValueError(f"is {tree['format']} {tree['version']}, not {FORMAT} {VERSION}")
        if tree.pop("checksum") != checksum(tree) or tree["fingerprint"] != fingerprint(tree):
            raise ValueError("is not as it was written")
        return Manifest.model_validate_json(json.dumps(tree))
    except FileNotFoundError:
        fault = Fault(str(path), "does not exist", "make a data set with python -m jobs.ingest")
        raise Refusal("There is no data set:", [fault], 65) from None
    except ValidationError as wrong:
        what = f"{'.'.join(map(str, wrong.errors()[0]['loc']))}: {wrong.errors()[0]['msg'].lower()}"
    except (KeyError, TypeError, AttributeError, RecursionError) as wrong:
        what = f"is not a manifest ({type(wrong).__name__})"
    except (OSError, ValueError) as wrong:
        what = str(wrong)
    raise Refusal("The data set cannot be read:", [Fault(str(path), what, "restore it, or ingest again")], 65)


def content_of(path: Path, most: int) -> bytes:
    """A whole file. Raises OSError; ValueError of more bytes than `most`, or of what is no file."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"has {size:,} bytes, more than {most:,}")
        return file.read(size)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, but no pipe, which would never answer, and no device. Raises OSError, ValueError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("is no file, but a pipe or a device")
        yield file


def publish(folder: Path, manifest: Manifest) -> Manifest:
    """Makes a generation the newest: all that it names must be on the disk by now. Returns it with its fingerprint."""
    tree = manifest.model_dump(mode="json")
    tree["fingerprint"] = fingerprint(tree)
    tree["checksum"] = checksum(tree)
    durable.write_json(copy_of(folder, manifest.generation), tree)
    durable.write_json(folder / NAME, tree)
    return manifest.model_copy(update={"fingerprint": tree["fingerprint"]})


def fingerprint(tree: Mapping[str, Any]) -> str:
    rows_are = ("classes", "groups", "splits", "side", "index", "order", "shards")
    return _digest({name: tree[name] for name in rows_are})[:16]


def checksum(tree: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a manifest but the checksum itself."""
    return _digest({name: value for name, value in tree.items() if name != "checksum"})


def collect_garbage(folder: Path, keep: int | None = None) -> dict[Path, int]:
    """Removes what no generation names; with `keep`, all but so many newest generations too. What was removed, and
    its bytes.

    Raises Refusal (75) while an ingest writes there, (65) where there is no such folder.
    """
    if not folder.is_dir():
        fault = Fault(str(folder), "is no folder", "give the folder of a data set")
        raise Refusal("There is no data set:", [fault], 65)
    with durable.locked(folder):
        kept = generations(folder)
        if keep and len(kept) > keep:
            kept = kept[-keep:]
            publish(folder, kept[-1].model_copy(update={"history": kept[-1].history[1 - keep :] if keep > 1 else ()}))
        return sweep(folder, kept)


def generations(folder: Path) -> list[Manifest]:
    """All that the data set has, oldest first; none where there is no data set, or a first ingest was killed.

    Raises Refusal (65) where only the manifest is missing: what it named is no garbage.
    """
    if not (folder / NAME).exists():
        found = (path for path in (folder / GENERATIONS).glob("*.json") if path.stem.isdecimal())
        copies = sorted(found, key=lambda path: int(path.stem))
        if copies and (len(copies) > 1 or not (folder / WORK).exists()):
            what, fix = f"does not exist, but {copies[-1]} does", "copy that one to it, or remove the whole folder"
            raise Refusal("A data set has lost its manifest:", [Fault(str(folder / NAME), what, fix)], 65)
        return []
    newest = read(folder)
    return [*(read_copy(folder, g) for g in newest.history), newest]


def sweep(folder: Path, kept: list[Manifest]) -> dict[Path, int]:
    """Removes every file that an ingest may have written and that these generations do not name; with its bytes."""
    removed = {path: path.lstat().st_size for path in unnamed(folder, kept)}
    for path in removed:
        path.unlink()
    for name in (f"{WORK}/parts", f"{WORK}/plan", WORK, *(() if kept else (SHARDS, GENERATIONS))):
        with suppress(OSError):  # it is not there, or holds what others put there
            (folder / name).rmdir()
    return removed


def unnamed(folder: Path, kept: list[Manifest]) -> Iterator[Path]:
    """Files that an ingest may have written and that these generations do not name."""
    named = {copy_of(folder, m.generation) for m in kept} | {folder / f.name for m in kept for f in (m.index, m.order)}
    named |= {folder / SHARDS / shard.name for m in kept for shard in m.shards}
    for where, names in OWN.items():
        for path in sorted((folder / where).glob("*")):
            if path not in named and re.fullmatch(names, path.name) and not path.is_dir():
                yield path


def copy_of(folder: Path, generation: int) -> Path:
    return folder / GENERATIONS / f"{generation:06d}.json"


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
