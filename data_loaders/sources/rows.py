"""What every source of images becomes: a stream of rows to ingest, and of rows that cannot be, each with its reason."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from data_loaders.faults import Fault
from data_loaders.settings import Settings

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SPLIT_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}$"  # it names the shards, so it must not lead to another folder
TAKEN = {"", "id", "image", "label", "crc32c"}
"""What no group column can be called: the shards have these columns already."""


def _can_be_columns_of_a_shard(names: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := sorted({name for name in names if name in TAKEN or names.count(name) > 1}):
        raise ValueError(f"a group column stands once, and is not called {' or '.join(map(repr, wrong))}")
    return names


SplitName = Annotated[str, Field(pattern=SPLIT_NAME)]
GroupColumns = Annotated[tuple[str, ...], AfterValidator(_can_be_columns_of_a_shard)]


class Row(NamedTuple):
    """One image with what is known of it."""

    where: str
    """file:line, tar:member, or the file itself."""
    id: str
    """Path of the image relative to the root of its source, with / and without . and ..: names it everywhere."""
    label: str = ""
    groups: tuple[str, ...] = ()
    """A value for each group column."""
    split: str = ""
    """The split it was given, or empty if one is to be drawn."""
    unit: str = ""
    """Rows with the same unit (a patient, a session) are never divided between splits; empty for a row alone."""
    place: tuple[int, int, int] = (0, 0, 0)
    """Tells the source where the bytes lie; each kind of source has its own meaning for it."""


class Rejected(NamedTuple):
    row: Row
    """What is known of it: dropped rows are counted by class and group."""
    fault: Fault


class Unreadable(ValueError):
    """An image whose bytes cannot be had; its text is the reason, free of credentials."""


class Unreachable(Unreadable):
    """It may be had another time: nothing is said of the image."""


Read = Callable[[Row], bytes]
"""The bytes of a row's image. Raises Unreadable or OSError."""


class Source(Settings):
    """Where images come from. It is sent to worker processes, so it holds settings only."""

    @property
    @abstractmethod
    def group_names(self) -> tuple[str, ...]:
        """The group columns of its rows."""

    @abstractmethod
    def rows(self, labelled: bool = True) -> Iterator[Row | Rejected]:
        """Every row, as a stream in the same order each time; without labels when they are only to be predicted.

        No image is touched. Raises Refusal with every fault of whole files, before the first row where it can.
        """

    @abstractmethod
    def reader(self) -> AbstractContextManager[Read]:
        """What reads the images of rows, for one thread; fastest in the order of the rows."""

    def file_of(self, row: Row) -> str | None:
        """The file of this machine whose change would change the image; None where there is none."""
        return None

    def __getstate__(self) -> dict[Any, Any]:
        """The settings alone, without what was learned of the disk."""
        state = super().__getstate__()
        fields = type(self).model_fields
        return state | {"__dict__": {name: value for name, value in state["__dict__"].items() if name in fields}}
