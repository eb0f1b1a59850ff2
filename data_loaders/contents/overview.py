"""What is in a data set: its generations, rows by class and group, images, and rows that were dropped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_loaders import manifest
from data_loaders.audit.summary import aligned, plain
from data_loaders.contents.counts import Counts, counts, tables
from data_loaders.contents.sizes import Sizes, sizes
from data_loaders.contents.text import size_table
from data_loaders.index import Index, index_of
from data_loaders.manifest import Dropped, Generation, Manifest
from data_loaders.splits import TRAIN

SHOWN = 20
"""Lines of a table that are printed."""
LEAST = 30
"""Rows below which a cell is too small to tell much of it."""


class Overview(NamedTuple):
    """Of one generation of a data set."""

    data: str
    """Fingerprint."""
    generation: int
    history: tuple[Generation, ...]
    """Earlier generations, oldest first."""
    groups: tuple[str, ...]
    train: str
    """The split that sizes are of, and that decides which cell is the worst."""
    counts: Counts
    images: dict[str, int]
    """Format, and what was not plain -> images that were ingested."""
    side: int
    """Height and width of images that are stored as pixels; 0 where they are files."""
    sizes: list[Sizes]
    dropped: Dropped
    shards: int
    bytes: int
    """Of the shards."""


def overview(index: Index, made: Manifest, train: str | None = None) -> Overview:
    """Nothing but the index and the manifest is read. `train` is by default that split, or the first there is."""
    first = train or (TRAIN if TRAIN in index.splits else index.splits[0])
    return Overview(
        data=made.fingerprint,
        generation=made.generation,
        history=made.history,
        groups=tuple(made.groups),
        train=first,
        counts=counts(index, first),
        images=made.images,
        side=made.side,
        sizes=sizes(index, index.rows_of(first)),
        dropped=made.rejected,
        shards=len(made.shards),
        bytes=sum(shard.bytes for shard in made.shards),
    )


def read(folder: Path, generation: int | None = None) -> tuple[Manifest, Index]:
    """A generation with its index. Raises Refusal."""
    made = manifest.read(folder, generation)
    return made, index_of(folder, made)


def to_json(o: Overview) -> dict[str, Any]:
    dropped, history = o.dropped.model_dump(mode="json"), [g.model_dump(mode="json") for g in o.history]
    return plain(o._replace(dropped=dropped, history=history))  # pyright: ignore[reportArgumentType]


def summary(o: Overview) -> str:
    """Tables in plain text, the worst line of each first."""
    lines = [
        *(f"generation {g.generation}: {g.rows:,} rows, {g.fingerprint}" for g in o.history),
        f"generation {o.generation}: {sum(o.counts.splits.values()):,} rows, {o.data}, "
        f"in {o.shards:,} shards of {o.bytes / 1e6:,.1f} MB",
        "",
        *count_tables(o),
        "images: " + images_of(o),
        "",
        f"images of {o.train}, least / median / most:",
        size_table(o.sizes[: SHOWN + 1]),
    ]
    return "\n".join([*lines, *_dropped(o)])


def images_of(o: Overview) -> str:
    """What was ingested, and as what it is stored if that is another thing."""
    stored = f"; stored as pixels, {o.side} x {o.side}" if o.side else ""
    return ", ".join(f"{n:,} {what}" for what, n in o.images.items()) + stored


def count_tables(o: Overview) -> Iterator[str]:
    for names, found in tables(o.counts, o.groups):
        shown = [(*line.name, *(f"{n:,}" for n in line.rows.values())) for line in found[:SHOWN]]
        yield aligned((*names, *o.counts.splits), shown)
        if len(found) > SHOWN:
            yield f"… and {len(found) - SHOWN:,} more"
        yield ""
    if o.counts.empty:
        yield f"{o.counts.empty:,} cells of class and groups have no row at all\n"


def _dropped(o: Overview) -> Iterator[str]:
    if not o.dropped.rows:
        yield "\nno row was dropped"
        return
    yield f"\ndropped: {o.dropped.rows:,} rows"
    by = {"class": o.dropped.by_class, **o.dropped.by_group}
    for name, values in by.items():
        yield f"  by {name}: " + ", ".join(f"{n:,} {value}" for value, n in sorted(values.items(), key=lambda i: -i[1]))
