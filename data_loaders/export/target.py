"""What a data set can be converted to, and how it is written: whole or not at all."""

import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index, Ints
from data_loaders.settings import Settings

SUFFIXES = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",)}
Files = dict[str, list[Path]]
"""Split -> its files, relative to the folder that was written."""
Done = Callable[[int], None]
"""Told how many more rows are written."""


class Target(Settings):
    """Another layout of the same rows."""

    @abstractmethod
    def write(self, index: Index, splits: dict[str, Ints], out: Path, done: Done) -> Files:
        """Writes the rows of each split into an empty folder; each image is checked before. Raises DamagedRow."""

    @abstractmethod
    def source(self, out: Path) -> str:
        """The words by which `jobs.ingest` reads the folder, beside its group columns."""


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well, and vanishes when it does not.

    Raises Refusal (73) where there is an `out` already.
    """
    if out.exists() or out.is_symlink():
        raise Refusal(
            "Nothing was written:", [Fault(str(out), "exists already", "remove it, or give another out=…")], 73
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        os.sync()  # one call, for any number of files
        os.rename(aside, out)
        durable.flush(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def suffixes_of(content: bytes) -> tuple[str, ...]:
    """Those that fit the format of an image that was ingested, the usual one first."""
    return SUFFIXES["JPEG" if content.startswith(b"\xff\xd8") else "PNG" if content.startswith(b"\x89") else "WEBP"]
