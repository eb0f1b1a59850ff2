"""Checks a data set against every checksum it has, and tells which rows are damaged and which are still good."""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.verify data=datasets/food"


class Verify(Settings):
    """Which data set to check."""

    data: Path
    """Folder of the data set."""
    generation: PositiveInt | None = None
    """To check alone; by default, all of them are."""
    threads: NonNegativeInt = 0
    """Shards that are read at once, each of them into memory; 0 is one for each core."""
    out: Path | None = None
    """A JSON file for the verdict, with the ids of all rows of damaged shards."""


def run(settings: Verify) -> None:
    from data_loaders import durable
    from data_loaders.faults import Refusal
    from data_loaders.verify import verify

    out = settings.out and durable.lasting(settings.out, "out")
    found = verify(settings.data, settings.generation, settings.threads)
    if out:
        durable.write_json(out, found.to_json())
    if found.orphans:
        shown = ", ".join(str(path.relative_to(settings.data)) for path in found.orphans[:5])
        more = ", …" if len(found.orphans) > 5 else ""
        print(f"no generation names {len(found.orphans):,} files: {shown}{more}")
        print("the ingest that left them goes on from them; or python -m jobs.gc removes them")
    if faults := found.all_faults:
        beside = f"; the verdict is in {out}" if out else "; out=verdict.json lists all rows of damaged shards"
        raise Refusal(f"The data set is damaged{beside if found.damaged else ''}:", faults, 65)
    numbers = ", ".join(map(str, found.generations))
    print(f"generations {numbers}: {found.rows:,} rows in {found.shards:,} shards, {found.bytes:,} bytes, as written")


def main() -> None:
    command(lambda: Verify, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
