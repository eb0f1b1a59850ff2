"""Images with labels and groups -> a data set of checked, content-addressed Arrow shards, published at the end."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate, groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from pydantic import Field, NonNegativeInt, PositiveInt

from data_loaders import durable
from data_loaders.decode import PIXEL_CAP
from data_loaders.faults import Fault, Refusal
from data_loaders.index import FORMAT, VERSION, Index, fingerprint
from data_loaders.progress import Progress
from data_loaders.settings import Fraction, Settings, digest
from data_loaders.shards import SHARD_FILE, Shard, Task, write_shard
from data_loaders.sources import AnySource
from data_loaders.sources.rows import Listing, Rejected, Row, without_divided_units, without_twins, write_rejected
from data_loaders.splits import TRAIN, Splits

Run = Callable[[Callable[[Task], Shard], list[Task]], Iterable[Shard]]
"""Applies a function to every task, somewhere, and yields the results in order."""


class Rejects(Settings):
    """What happens when rows are bad."""

    allow: Fraction = 0.0
    """Largest share of the rows that may be dropped; above it, nothing is written but the list of them."""


class Ingest(Settings):
    """Images with labels and groups, and the data set to make of them."""

    source: AnySource
    """Where the images come from."""
    out: Path
    """Folder of the data set; must not hold one yet."""
    classes: tuple[str, ...] = ()
    """Classes in the order of their numbers; by default all labels, sorted."""
    splits: Splits = Splits()
    rejects: Rejects = Rejects()
    pixel_cap: PositiveInt = PIXEL_CAP
    """Images that claim more pixels are rejected before they are decoded."""
    shard_rows: PositiveInt = 4096
    """Most rows in a shard."""
    shard_megabytes: Annotated[int, Field(gt=0, le=1024)] = 64
    """Image bytes in a shard, in 10^6; the last image may exceed them."""
    workers: NonNegativeInt = 0
    """Processes; 0 is one for each core."""
    address: str | None = None
    """Ray cluster to run on ("auto" or ray://…); by default, processes of this machine."""


def ingest(settings: Ingest, run: Run) -> Path:
    """Writes the data set; the path of its dataset.json. Everything that is wrong is found in one pass."""
    out = settings.out
    durable.lasting(out, "out")
    if (out / "dataset.json").exists():
        fault = Fault(str(out), "holds a data set already", "give another out=…, or remove it")
        raise Refusal("Nothing was written:", [fault], 73)
    listing = without_divided_units(without_twins(settings.source.listing()))
    listing = _with_known_labels(listing, settings.classes)
    classes = settings.classes or tuple(sorted({row.label for row in listing.rows}))
    rows = settings.splits.draw(listing.rows)
    with _all_or_nothing(out):
        shards: list[Shard] = []
        progress = Progress("ingest", len(rows), "rows")
        for shard in run(write_shard, _tasks(settings, rows, classes, listing.group_names)):
            shards.append(shard)
            progress.show(sum(len(s.rows) + len(s.rejected) for s in shards))
        rejected = listing.rejected + [r for shard in shards for r in shard.rejected]
        write_rejected(out / "rejected.csv", rejected, listing.group_names)
        _refuse_if(settings, classes, [row for shard in shards for row in shard.rows], rejected)
        shards = [shard for shard in shards if shard.name]
        index = _index(out, shards, classes, listing.group_names)
        return _publish(settings, index, shards, rejected)


def in_processes(workers: int) -> Run:
    """Runs tasks in processes of this machine."""

    def run(work: Callable[[Task], Shard], tasks: list[Task]) -> Iterator[Shard]:
        count = min(workers or len(os.sched_getaffinity(0)), len(tasks))
        if count <= 1:
            yield from map(work, tasks)
            return
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            yield from pool.map(work, tasks)

    return run


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[None]:
    """A folder for shards, which keeps none when the block fails, nor any that a killed run left there."""
    try:
        _sweep(out)
        (out / "shards").mkdir(parents=True, exist_ok=True)
        yield
    except OSError as wrong:
        _sweep(out)
        fault = Fault(str(wrong.filename or out), (wrong.strerror or str(wrong)).lower(), "give another out=…")
        raise Refusal("The data set cannot be written:", [fault], 73) from wrong
    except BaseException:
        _sweep(out)
        raise


def _sweep(out: Path) -> None:
    left = [path for path in out.glob("shards/*") if SHARD_FILE.fullmatch(path.name)]
    for path in (*left, *out.glob("index.arrow")):
        path.unlink()
    with suppress(OSError):
        (out / "shards").rmdir()


def _with_known_labels(listing: Listing, classes: tuple[str, ...]) -> Listing:
    if not classes:
        return listing
    known = Listing(listing.group_names, [], listing.rejected)
    for row in listing.rows:
        if row.label in classes:
            known.rows.append(row)
        else:
            known.reject(row, row.where, f"label {row.label!r} is not in `classes`", "add it, or remove the row")
    return known


def _tasks(settings: Ingest, rows: list[Row], classes: tuple[str, ...], groups: tuple[str, ...]) -> list[Task]:
    """Shards of similar size, so that no worker waits for one large shard."""
    cap = settings.shard_rows * settings.shard_megabytes * 10**6
    by_split: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_split[row.split].append(row)
    tasks: list[Task] = []
    for split in sorted(by_split, key=lambda name: (name != TRAIN, name)):
        fill = [max(cap // settings.shard_rows, _size(row.file) * settings.shard_rows) for row in by_split[split]]
        total, begins = sum(fill), accumulate(fill, initial=0)
        count = -(-total // cap)
        numbered = groupby(zip(begins, by_split[split], strict=False), key=lambda item: item[0] * count // total)
        for number, (_, members) in enumerate(numbered):
            part = [row for _, row in members]
            tasks.append(Task(settings.out / "shards", number, part, classes, groups, settings.pixel_cap))
    return tasks


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return 0  # the shard's writer says what is wrong with it


def _refuse_if(settings: Ingest, classes: tuple[str, ...], good: list[Row], rejected: list[Rejected]) -> None:
    total = len(good) + len(rejected)
    if rejected and len(rejected) / total > settings.rejects.allow:
        enough = math.ceil(len(rejected) / total * 1000) / 1000
        title = f"{len(rejected):,} of {total:,} rows cannot be used, all listed in {settings.out / 'rejected.csv'}"
        title += f"; rejects.allow={enough:g} would drop them:" if enough < 1 else ":"
        raise Refusal(title, [r.fault for r in rejected], 65)
    trained = Counter(row.label for row in good if row.split == TRAIN)
    faults = [Fault(c, "has no training row", "add images of it, or give classes=…") for c in classes if not trained[c]]
    if len(classes) < 2:
        faults.append(Fault("source", f"has {len(classes)} classes", "a classifier needs two"))
    if faults:
        raise Refusal("There is not enough to train on:", faults, 65)


def _index(out: Path, shards: list[Shard], classes: tuple[str, ...], group_names: tuple[str, ...]) -> Index:
    rows = [row for shard in shards for row in shard.rows]
    values = {name: tuple(sorted({row.groups[a] for row in rows})) for a, name in enumerate(group_names)}
    code = [{value: i for i, value in enumerate(names)} for names in values.values()]
    splits = tuple(dict.fromkeys(row.split for row in rows))
    return Index(
        labels=np.array([classes.index(row.label) for row in rows]),
        groups=np.array([[code[a][v] for a, v in enumerate(row.groups)] for row in rows]).reshape(len(rows), -1),
        split=np.array([splits.index(row.split) for row in rows]),
        shard=np.repeat(np.arange(len(shards)), [len(shard.rows) for shard in shards]),
        offset=np.concatenate([shard.offset for shard in shards]),
        length=np.concatenate([shard.length for shard in shards]),
        crc32c=np.concatenate([shard.crc32c for shard in shards]),
        ids=pa.array([row.path for row in rows], pa.string()),
        classes=classes,
        group_values=values,
        splits=splits,
        shards=tuple(shard.name for shard in shards),
        folder=out,
        fingerprint="",
    )


def _publish(settings: Ingest, index: Index, shards: list[Shard], rejected: list[Rejected]) -> Path:
    with durable.writing(settings.out / "index.arrow") as aside:
        table = index.table()
        with pa.ipc.new_file(aside, table.schema) as writer:
            writer.write_table(table)
        index_sha = durable.sha256(aside)
    content: dict[str, Any] = {
        "classes": index.classes,
        "groups": index.group_values,
        "splits": index.splits,
        "index": {"name": "index.arrow", "sha256": index_sha},
        "shards": [{"name": s.name, "rows": len(s.rows), "bytes": s.size, "sha256": s.sha256} for s in shards],
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(content),
        **content,
        "rows": {split: _by_class(index, split) for split in index.splits},
        "rejected": _counted(rejected, tuple(index.group_values)),
        "settings": {"digest": digest(settings), **settings.model_dump(mode="json")},
    }
    path = settings.out / "dataset.json"
    durable.write_json(path, manifest)
    return path


def _by_class(index: Index, split: str) -> dict[str, int]:
    count = np.bincount(index.labels[index.rows_of(split)], minlength=len(index.classes))
    return dict(zip(index.classes, count.tolist(), strict=True))


def _counted(rejected: list[Rejected], group_names: tuple[str, ...]) -> dict[str, Any]:
    """Dropped rows by class, and by the value of each group column; an empty cell counts as (none)."""
    by_group = {
        name: dict(Counter((r.row.groups[a] if a < len(r.row.groups) else "") or "(none)" for r in rejected))
        for a, name in enumerate(group_names)
    }
    by_class = dict(Counter(r.row.label or "(none)" for r in rejected))
    return {"rows": len(rejected), "by_class": by_class, "by_group": by_group}
