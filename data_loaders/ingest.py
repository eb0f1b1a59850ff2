"""Images with labels and groups -> a generation of a data set: checked, content-addressed Arrow shards, published last.

The rows are listed to the disk, then read, checked and stored by tasks, in any number of processes. What a task has
done stays when an ingest is killed, and is taken up by the same command.
"""

import os
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from pydantic import NonNegativeInt

from data_loaders import durable, manifest
from data_loaders.faults import Fault, Refusal
from data_loaders.index import FIELDS, Index, index_of, schema
from data_loaders.indexing import write
from data_loaders.manifest import SHARDS, WORK, Generation, Manifest
from data_loaders.plan import BATCH, Plan
from data_loaders.progress import Progress, say
from data_loaders.rejects import Cell, Rejects, uneven
from data_loaders.settings import Settings, digest
from data_loaders.shards import Done, Shards, Task, write_shards
from data_loaders.sources import AnySource
from data_loaders.sources.rows import Row, Unreadable
from data_loaders.splits import TRAIN, Splits

Run = Callable[[Callable[[Task], Done], Iterable[Task]], Iterable[Done]]
"""Applies a function to every task, somewhere, and yields the results in order; takes few tasks ahead."""
AHEAD = 2
"""Tasks for each process that wait or are done out of order."""
INDEXED = 300
"""Bytes that a row takes while the index is written, about."""
SAMPLED = 64
"""Images whose sizes say how large the others are, where the disk is full before one is stored."""


class Ingest(Settings):
    """Images with labels and groups, and the data set to make of them."""

    source: AnySource
    """Where the images come from."""
    out: Path
    """Folder of the data set; must not hold one yet, but to append."""
    append: bool = False
    """Adds the rows that the data set does not hold as a new generation; the others stay as they are."""
    classes: tuple[str, ...] = ()
    """Classes in the order of their numbers; by default all labels, sorted."""
    splits: Splits = Splits()
    rejects: Rejects = Rejects()
    shards: Shards = Shards()
    workers: NonNegativeInt = 0
    """Processes; 0 is one for each core."""
    address: str | None = None
    """Ray cluster to run on ("auto" or ray://…); by default, processes of this machine."""


def ingest(settings: Ingest, run: Run) -> Manifest:
    """Writes a generation of the data set, and returns what it is. Everything that is wrong is found in one pass."""
    out = durable.lasting(settings.out, "out")
    with _writing(out) as former:
        held = _held(settings, former)
        settings = settings.model_copy(update={"shards": _as_before(settings.shards, former)})
        classes = held.classes if held else settings.classes
        plan = Plan(out / WORK / "plan", settings.source, settings.splits, classes, held)
        with closing(plan.rejections):
            return _store(settings, run, plan, former, held)


def in_processes(workers: int) -> Run:
    """Runs tasks in processes of this machine."""

    def run(work: Callable[[Task], Done], tasks: Iterable[Task]) -> Iterator[Done]:
        count = workers or len(os.sched_getaffinity(0))
        if count == 1:
            yield from map(work, tasks)
            return
        with ProcessPoolExecutor(count, get_context("spawn"), initializer=_end_with_parent) as pool:
            ahead: deque[Future[Done]] = deque()
            try:
                for task in tasks:
                    ahead.append(pool.submit(work, task))
                    if len(ahead) > AHEAD * count:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            except BrokenProcessPool as wrong:
                fault = Fault("workers", "a process was killed", "give fewer workers=… if memory is short")
                raise Refusal("The ingest was cut short; the same command goes on:", [fault], 75) from wrong
            finally:
                for future in ahead:
                    future.cancel()

    return run


def _end_with_parent() -> None:
    """Lets this process neither write on nor wait for ever for tasks when the one that started it was killed."""

    def wait() -> None:
        parent = parent_process()
        assert parent
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


@contextmanager
def _writing(out: Path) -> Iterator[Manifest | None]:
    """A folder to add a generation to; yields the newest one. At the end nothing is left that no generation names; what
    a run that was killed, failed or refused has stored stays for the next one."""
    try:
        durable.make_folder(out)
        with durable.locked(out):
            former = manifest.generations(out)
            for name in (SHARDS, f"{WORK}/parts", f"{WORK}/plan"):
                durable.make_folder(out / name)
            try:
                yield former[-1] if former else None
            except Refusal:
                _keep_stored(out, former)
                raise
            manifest.sweep(out, manifest.generations(out))
    except OSError as wrong:
        what = (wrong.strerror or str(wrong)).lower()
        fix = "make room" if wrong.errno in durable.FULL else "make it a folder that can be written"
        kept = any(out.glob(f"{WORK}/parts/[!.]*"))
        fix += ", or give another out=…" + ("; what is stored is kept, and the same command goes on" if kept else "")
        fault = Fault(str(wrong.filename or out), what, fix)
        raise Refusal("The data set cannot be written:", [fault], 73) from wrong


def _keep_stored(out: Path, former: list[Manifest]) -> None:
    """Hours of work may be in it: only some images, or a setting, must be mended. Without it, nothing is left."""
    if any(path.parent.name == SHARDS for path in manifest.unnamed(out, former)):
        shutil.rmtree(out / WORK / "plan")
        say(f"good images are kept: the mended command goes on from them, or python -m jobs.gc data={out} removes them")
    else:
        manifest.sweep(out, former)


def _held(settings: Ingest, former: Manifest | None) -> Index | None:
    """What the data set holds, if rows may be added to it."""
    if former is None:
        return None
    out, source = settings.out, settings.source
    index, faults = index_of(out, former), list[Fault]()
    if not settings.append:
        faults += [Fault(str(out), "holds a data set already", "append=true adds rows to it, or give another out=…")]
    elif tuple(former.groups) != source.group_names:
        what, fix = f"has the group columns {', '.join(former.groups) or 'none'}", "append rows with the same ones"
        faults += [Fault(str(out), what, fix)]
    elif settings.classes not in {(), former.classes}:
        what, fix = f"has the classes {', '.join(former.classes)}", "leave `classes` out, or ingest all anew"
        faults += [Fault(str(out), what, fix)]
    elif _unit(source) != former.unit:
        what = f"was divided by {former.unit!r}" if former.unit else "was not divided by units"
        fix = f"set source.split_by={former.unit}" if former.unit else "leave source.split_by out"
        faults += [Fault(str(out), what, f"{fix}, or ingest all anew")]
    elif _is_other(settings.shards, former.side):
        what = f"stores pixels of {former.side} x {former.side}" if former.side else "stores image files"
        fix = "leave shards.encoding, shards.side and shards.resize out, or ingest all anew"
        faults += [Fault(str(out), what, fix)]
    if faults:
        raise Refusal("Nothing was written:", faults, 73)
    return index


def _is_other(shards: Shards, side: int) -> bool:
    """Whether another encoding is asked for than that of a data set with this side."""
    asks = shards.encoding is not None or shards.resize is not None
    return asks and (shards.side or 0) != side


def _as_before(shards: Shards, former: Manifest | None) -> Shards:
    """With the encoding of the data set that rows are added to."""
    return shards.model_copy(update={"encoding": "raw", "side": former.side}) if former and former.side else shards


def _unit(source: AnySource) -> str:
    return getattr(source, "split_by", None) or ""


def _tasks(settings: Ingest, plan: Plan, generation: int) -> Iterator[Task]:
    """The good rows, divided."""
    waiting: dict[str, list[Row]] = defaultdict(list)
    numbers = Counter[str]()

    def task(split: str) -> Task:
        number, rows, source = numbers[split], waiting.pop(split), settings.source
        numbers[split] += 1
        where = settings.out, split, number, generation
        return Task(*where, rows, source, plan.classes, source.group_names, settings.shards)

    for row in plan.rows():
        waiting[row.split].append(row)
        if len(waiting[row.split]) == settings.shards.rows:
            yield task(row.split)
    for split in sorted(waiting, key=_in_order):
        yield task(split)


def _in_order(split: str) -> tuple[bool, str]:
    return split != TRAIN, split


def _store(settings: Ingest, run: Run, plan: Plan, former: Manifest | None, held: Index | None) -> Manifest:
    out, rejections = settings.out, plan.rejections
    generation = former.generation + 1 if former else 1
    progress, dones, stored, done = Progress("ingest", plan.new, "rows"), list[Done](), 0, 0
    try:
        for finished in run(write_shards, _tasks(settings, plan, generation)):
            for rejected in finished.rejected:
                rejections.add(rejected, image=True)
            done += finished.rows + len(finished.rejected)
            stored += sum(shard.bytes for shard in finished.shards)
            finished.rejected.clear()
            dones.append(finished)
            progress.show(done)
        rejections.write(out / "rejected.csv")
        kept = _cells(dones, plan.classes, settings.source.group_names)
        _refuse_if(settings, plan, kept, former)
        if former and not kept:
            say(f"nothing is new: the data set has the {plan.known:,} rows that are listed")
            return former
        return _publish(settings, plan, dones, kept, former, held)
    except OSError as wrong:
        what = wrong.strerror or str(wrong)
        if wrong.errno in durable.FULL:
            each = stored / done if done else _bytes_of_an_image(settings, plan)
            rows = plan.new + (former.index.rows if former else 0)
            what += f", some {each * (plan.new - done) + INDEXED * rows:,.0f} bytes more are needed"
        raise OSError(wrong.errno, what, wrong.filename) from wrong


def _bytes_of_an_image(settings: Ingest, plan: Plan) -> float:
    if settings.shards.side:
        return 3 * settings.shards.side**2
    sizes = [0]
    with settings.source.reader() as read:
        for row in plan.first(SAMPLED):
            with suppress(OSError, Unreadable):
                sizes.append(len(read(row)))
    return sum(sizes) / max(1, len(sizes) - 1)


def _cells(dones: list[Done], classes: tuple[str, ...], group_names: tuple[str, ...]) -> Counter[Cell]:
    """Split, class and groups -> rows that were stored."""
    cells = Counter[Cell]()
    keys = ["label", *(f"group.{name}" for name in group_names)]
    for done in dones:
        counts = _part(done).group_by(keys).aggregate([([], "count_all")])
        for label, *groups, rows in zip(*(counts[key].to_pylist() for key in (*keys, "count_all")), strict=True):
            cells[done.split, classes[label], *groups] += rows
    return cells


def _refuse_if(settings: Ingest, plan: Plan, kept: Counter[Cell], former: Manifest | None) -> None:
    rejections, listed = plan.rejections, settings.out / "rejected.csv"
    stored = Counter(plan.known_cells)
    for (_, *cell), rows in kept.items():
        stored[tuple(cell)] += rows
    found = uneven(rejections.cells, stored, rejections.group_names) if settings.rejects.uneven == "refuse" else []
    if refusal := rejections.refusal(settings.rejects.allow, stored.total(), listed, found):
        raise refusal
    if found:
        fix = f"repair them, they are listed in {listed}; or set rejects.uneven=allow"
        faults = [
            Fault(u.attribute, f"{u.dropped:,} of {u.rows:,} rows of {u.value!r} are dropped, p = {u.p:.4f}", fix)
            for u in found
        ]
        raise Refusal("The rows that cannot be used are not spread as chance would:", faults, 65)
    trained = Counter(former.rows.get(TRAIN)) if former else Counter[str]()
    for (split, label, *_), rows in kept.items():
        trained[label] += rows * (split == TRAIN)
    fix = "add images of it, or give classes=…"
    faults = [Fault(label, "has no training row", fix) for label in plan.classes if not trained[label]]
    if len(plan.classes) < 2:
        faults.append(Fault("source", f"has {len(plan.classes)} classes", "a classifier needs two"))
    if faults:
        raise Refusal("There is not enough to train on:", faults, 65)


def _publish(
    settings: Ingest, plan: Plan, dones: list[Done], kept: Counter[Cell], former: Manifest | None, held: Index | None
) -> Manifest:
    names = settings.source.group_names
    before = former.groups if former else dict.fromkeys(names, ())
    groups = {
        name: (*before[name], *sorted({cell[2 + a] for cell in kept} - {*before[name]})) for a, name in enumerate(names)
    }
    splits = former.splits if former else ()
    splits = (*splits, *sorted({split for split, *_ in kept} - {*splits}, key=_in_order))
    rows = {split: dict.fromkeys(plan.classes, 0) | (former.rows.get(split, {}) if former else {}) for split in splits}
    images = Counter(former.images) if former else Counter[str]()
    for (split, label, *_), count in kept.items():
        rows[split][label] += count
    for done in dones:
        images.update(done.images)
    generation = former.generation + 1 if former else 1
    shards = (*(former.shards if former else ()), *(shard for done in dones for shard in done.shards))
    tables = _index_tables(dones, groups, splits, held)
    total, scratch = kept.total() + (len(held) if held else 0), settings.out / WORK / "plan"
    index, order = write(settings.out, generation, names, tables, total, scratch)
    made = Manifest(
        side=settings.shards.side or 0,
        generation=generation,
        history=(*former.history, _of(former)) if former else (),
        classes=plan.classes,
        groups=groups,
        splits=splits,
        unit=_unit(settings.source),
        index=index,
        order=order,
        shards=shards,
        rows=rows,
        images=dict(sorted(images.items())),
        rejected=plan.rejections.dropped(),
        settings={"digest": digest(settings), **settings.model_dump(mode="json")},
    )
    return manifest.publish(settings.out, made)


def _of(former: Manifest) -> Generation:
    return Generation(generation=former.generation, fingerprint=former.fingerprint, rows=former.index.rows)


def _index_tables(
    dones: list[Done], groups: dict[str, tuple[str, ...]], splits: tuple[str, ...], held: Index | None
) -> Iterator[pa.Table]:
    """All rows: those that the data set held, and then those of the tasks."""
    codes = {name: {value: code for code, value in enumerate(values)} for name, values in groups.items()}
    stored, shards = schema(tuple(groups)), len(held.shards) if held else 0
    if held:
        yield from _held_tables(held, stored)
    for done in dones:
        part = _part(done)
        columns = {name: part[name].combine_chunks() for name in part.column_names}
        columns["id"] = columns["id"].cast(pa.large_string())
        columns["split"] = pa.array(np.full(len(part), splits.index(done.split), np.int16))
        columns["shard"] = pa.array(part["shard"].to_numpy() + np.int32(shards))
        for name, values in codes.items():
            column = f"group.{name}"
            columns[column] = pa.array([values[value] for value in part[column].to_pylist()], pa.int32())
        yield pa.table(columns, schema=stored)
        shards += len(done.shards)


def _held_tables(held: Index, stored: pa.Schema) -> Iterator[pa.Table]:
    """The index of the generation before, as it is stored."""
    ids = held.ids
    for start in range(0, len(held), BATCH):
        part = slice(start, start + BATCH)
        columns: dict[str, Any] = {"id": ids[part], "label": held.label[part], "split": held.in_split[part]}
        columns |= {f"group.{name}": held.group[a][part] for a, name in enumerate(held.group_values)}
        columns |= {name: getattr(held, name)[part] for name in FIELDS if name not in columns}
        yield pa.table(columns, schema=stored)


def _part(done: Done) -> pa.Table:
    with pa.OSFile(str(done.part)) as file:
        return pa.ipc.open_file(file).read_all().replace_schema_metadata(None)
