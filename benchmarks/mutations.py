"""How a file of a data set can be damaged; the n-th mutation is a function of the seed and of n."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAGE = 512
"""Bytes; the files of the trial have a few pages of 4096 only."""
SPLICE = 64
REGIONS = {"shard": 0.65, "index": 0.1, "order": 0.1, "manifest": 0.15}
WHOLE_FILE = 0.1
"""Share of the mutations that put another thing in the place of a file."""

Edit = Callable[[bytearray, bytes, np.random.Generator], object]
"""Changes a content; the bytes are those of another file of the data set."""


class Target(NamedTuple):
    """A file of a data set."""

    region: str
    path: str
    """In the folder of the data set."""
    generation: int | None
    """To open, so that the file is read; None is the newest."""
    older: str | None
    """The file that stood for it in the generation before."""


class Mutation(NamedTuple):
    target: Target
    kind: str
    partner: Target
    """Another file of the region, or the same one if there is no other."""
    number: int


def _flip(content: bytearray, _: bytes, random: np.random.Generator) -> None:
    content[random.integers(len(content))] ^= 1 << int(random.integers(8))


def _change(content: bytearray, _: bytes, random: np.random.Generator) -> None:
    for place in random.integers(len(content), size=random.integers(1, 5)):
        content[place] = random.integers(256)


def _truncate(content: bytearray, _: bytes, random: np.random.Generator) -> None:
    del content[random.integers(len(content)) :]


def _splice(content: bytearray, elsewhere: bytes, random: np.random.Generator) -> None:
    place, source = random.integers(len(content) - SPLICE), random.integers(len(elsewhere) - SPLICE)
    content[place : place + SPLICE] = elsewhere[source : source + SPLICE]


def _delete(content: bytearray, _: bytes, random: np.random.Generator) -> None:
    place = random.integers(len(content))
    del content[place : place + random.integers(1, PAGE)]


def _insert(content: bytearray, _: bytes, random: np.random.Generator) -> None:
    place = random.integers(len(content))
    content[place:place] = random.bytes(int(random.integers(1, SPLICE)))


def _zero(content: bytearray, _: bytes, random: np.random.Generator) -> None:
    place = random.integers(len(content)) // PAGE * PAGE
    content[place : place + PAGE] = bytes(len(content[place : place + PAGE]))


def _append(content: bytearray, _: bytes, random: np.random.Generator) -> None:
    content += random.bytes(int(random.integers(1, PAGE)))


EDITS: dict[str, Edit] = {
    "bit flipped": _flip,
    "bytes changed": _change,
    "cut short": _truncate,
    "64 bytes from elsewhere": _splice,
    "range deleted": _delete,
    "range inserted": _insert,
    "page zeroed": _zero,
    "bytes appended": _append,
}
REPLACED = ("swapped", "of another data set", "deleted", "pipe", "folder", "link to /dev/zero", "link to itself")
OLDER = "older one put back"
"""An older manifest is a whole state of the data set, as it was published."""


def choose(seed: int, number: int, targets: list[Target]) -> Mutation:
    random = np.random.default_rng([seed, number, 0])
    region = random.choice([*REGIONS], p=[*REGIONS.values()])
    files = [target for target in targets if target.region == region]
    target, partner = (files[i] for i in random.permutation(len(files))[[0, -1]])
    kinds = [*EDITS]
    if random.random() < WHOLE_FILE:
        kinds = [*REPLACED, *([OLDER] if target.older else [])]
    return Mutation(target, str(random.choice(kinds)), partner, number)


def apply(mutation: Mutation, folder: Path, other: Path, seed: int) -> None:
    """Damages the data set in `folder`; `other` is another one."""
    target, partner, kind = mutation.target, mutation.partner, mutation.kind
    path, content = folder / target.path, (folder / target.path).read_bytes()
    if kind in EDITS:
        edited = bytearray(content)
        EDITS[kind](edited, (folder / partner.path).read_bytes(), np.random.default_rng([seed, mutation.number, 1]))
        path.write_bytes(edited)
    elif kind == "swapped":
        path.write_bytes((folder / partner.path).read_bytes())
        (folder / partner.path).write_bytes(content)
    elif kind == "of another data set":
        path.write_bytes(other_file(other, target).read_bytes())
    elif kind == OLDER:
        path.write_bytes((folder / (target.older or target.path)).read_bytes())
    else:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind.startswith("link"):
            path.symlink_to("/dev/zero" if kind == "link to /dev/zero" else path.name)


def restore(mutation: Mutation, folder: Path, clean: Path) -> None:
    for target in {mutation.target, mutation.partner}:
        path = folder / target.path
        if path.is_dir():
            path.rmdir()
        elif path.is_symlink() or not path.is_file():
            path.unlink(missing_ok=True)
        shutil.copyfile(clean / target.path, path)


def other_file(other: Path, target: Target) -> Path:
    """The file of the same part in another data set; but for the hash in its name, it is called the same."""
    stem = target.path.rpartition("-")[0]
    return next(other.glob(f"{stem}-*")) if stem else other / target.path
