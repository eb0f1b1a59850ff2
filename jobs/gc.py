"""Removes from a data set what no generation of it names, such as what killed ingests left; and old generations."""

from itertools import islice
from pathlib import Path

from pydantic import PositiveInt

from data_loaders.faults import SHOWN
from data_loaders.manifest import collect_garbage
from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.gc data=datasets/food keep=1"


class Gc(Settings):
    """Which data set, and how much of it stays."""

    data: Path
    """Folder of the data set."""
    keep: PositiveInt | None = None
    """How many of the newest generations stay; by default all. The newest one has the rows of all the others."""


def run(settings: Gc) -> None:
    removed = collect_garbage(settings.data, settings.keep)
    for path, size in islice(removed.items(), SHOWN):
        print(f"removed {path}, {size:,} bytes")
    if len(removed) > SHOWN:
        print(f"… and {len(removed) - SHOWN:,} more")
    print(f"removed {len(removed):,} files, {sum(removed.values()):,} bytes, from {settings.data}")


def main() -> None:
    command(lambda: Gc, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
