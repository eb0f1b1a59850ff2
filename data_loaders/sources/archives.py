"""Files that hold many images each: which they are, which split each is of, and which rows lie in which."""

import os
import re
from typing import NamedTuple

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.places import common_folder, folder_of, is_url, plain, shown
from data_loaders.sources.rows import Row, Unreadable
from data_loaders.sources.storage import expand

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")

BESIDE = re.compile(r"/(index-g\d+-[0-9a-f]{8}|cache-[^/]*)\.arrow$")
"""Files without images that lie in a folder beside them: our index, what `datasets` keeps of its maps."""


class Archive(NamedTuple):
    """A file that holds many images."""

    place: str
    name: str
    """Path below the folder that holds all of them, without the suffix: the first part of its rows' ids."""
    split: str
    """What its name says; empty if it says nothing."""

    @property
    def shown(self) -> str:
        return plain(shown(self.place))

    @staticmethod
    def of(row: Row, archives: "list[Archive]") -> "Archive":
        """The file that a row was listed in, which its place gives the number of.

        Raises Unreadable where it was another file: then some were added or removed since.
        """
        number = row.place[0]
        if number >= len(archives) or not row.where.startswith(f"{archives[number].shown}:"):
            raise Unreadable("is not where it was listed: files were added or removed since")
        return archives[number]


def find(places: tuple[str, ...], suffixes: tuple[str, ...]) -> list[Archive]:
    """Every file that the places stand for, in the same order each time. Raises Refusal where one stands for none."""
    found = list(expand(places, suffixes))
    faults = [place for place in found if isinstance(place, Fault)]
    given = [str(place) for place in found if place in places or not BESIDE.search(str(place))]
    whole = [place if is_url(place) else os.path.abspath(place) for place in given]
    base = common_folder([folder_of(place) for place in whole]) if whole and not faults else ""
    if base is None:
        what = f"the files lie apart: {' and '.join(map(shown, whole[:2]))}, …"
        faults.append(Fault("source.path", what, "give files of one folder or bucket"))
    if base is None or faults:
        raise Refusal("There are no files of images:", faults, 65)
    names = [plain(shown(path))[len(shown(base).rstrip("/")) + 1 :] for path in whole]
    stems = [os.path.splitext(name)[0] for name in names]
    return [Archive(place, stem, _split(stem)) for place, stem in zip(given, stems, strict=True)]


def _split(name: str) -> str:
    """train-00000-of-00003 and train/0001 are of train, test_balanced-00000-1f of test_balanced, data-00000 of none."""
    for part in reversed(name.split("/")):
        word = "".join(re.findall(r"^[A-Za-z_]+", part)).strip("_")[:40]
        first = word.partition("_")[0].lower()
        if first in SPLITS:
            return word if "_" in word else SPLITS[first]
    return ""
