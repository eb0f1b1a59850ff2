"""Whether damaged data is ever read as if it were sound: python -m benchmarks.corruption [N=10000] [photos=FOLDER]

A small data set of two generations is damaged in N ways, one after the other; after each, the project's reader and the
independent one of the tests open it and read every row of the files concerned: of a damaged shard its rows, otherwise
all. They do so in a child that is watched, so that a crash is counted too. Exit code 1 if any row is silently wrong, or
at a crash or hang. At last: what the checksum of a row costs the loader (benchmarks/checksum_cost.py).
"""

import csv
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks import checksum_cost
from benchmarks.mutations import EDITS, OLDER, REGIONS, REPLACED, Mutation, Target, apply, choose, restore
from data_loaders import manifest
from data_loaders.faults import Refusal
from data_loaders.index import DamagedRow, Reader, open_index
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.shards import Shards
from data_loaders.sources.csv_file import Csv
from tests import independent_reader
from tests.independent_reader import Row

ROWS = (240, 360)
"""Rows of the two generations."""
OUTCOMES = ("harmless", "older", "detected", "silent", "crash", "hang")
"""All rows equal; all equal to those of the earlier generation; refused, and rows before equal; a wrong row; an error
that no reader promises, or the death of the process; no answer."""
DEAD = {"crash", "hang"}
SPLITS = ("train", "train", "val", "test")
LIMIT_S, START_S = 10.0, 120.0
MEMORY = Path("/dev/shm")
"""Where there is one, a file is rewritten a thousand times as fast as on a disk."""

Read = Callable[[Path, int | None, set[str] | None], Iterator[Row | None]]
"""Rows of a generation, of these shards or of all; None for a row that is refused by itself."""
Clean = dict[int | None, dict[str, list[Row]]]
"""Generation -> shard -> rows; None is the newest."""


class Subject(NamedTuple):
    """A reader on trial."""

    name: str
    read: Read
    promised: tuple[type[Exception], ...]
    """What it raises at damage."""


class Found(NamedTuple):
    mutation: Mutation
    subject: str
    outcome: str


def ours(folder: Path, generation: int | None, shards: set[str] | None) -> Iterator[Row | None]:
    index = open_index(folder, generation)
    wanted = np.array([shards is None or name in shards for name in index.shards])
    with closing(Reader(index)) as reader:
        for row in np.flatnonzero(wanted[index.shard]).tolist():
            try:
                image = reader.read(row)
            except DamagedRow:
                yield None
                continue
            values = zip(index.group_values.items(), index.groups[row].tolist(), strict=True)
            groups = {name: names[value] for (name, names), value in values}
            name, label = index.ids[row].as_py(), index.classes[index.labels[row]]
            yield Row(name, label, groups, index.splits[index.split[row]], image)


SUBJECTS = (
    Subject("the project's reader", ours, (Refusal,)),
    Subject("the independent reader", independent_reader.rows, (ValueError, OSError)),
)


def corrupt(numbers: range, seed: int = 0, subjects: tuple[Subject, ...] = SUBJECTS) -> list[Found]:
    """What became of each of these mutations with each reader. One that dies or hangs takes those behind it along."""
    found: list[Found] = []
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as temporary:
        base = Path(temporary)
        make(base / "other", "b")
        clean = clean_rows(base / "clean", make(base / "clean", "a"))
        targets, position = targets_of(base / "clean"), 0
        while position < len(numbers):
            with watched(_work, base, clean, numbers[position:], seed, subjects) as heard:
                for number in numbers[position:]:
                    position += 1
                    outcome = ""
                    for subject in subjects:
                        outcome = heard()
                        found.append(Found(choose(seed, number, targets), subject.name, outcome))
                        if outcome in DEAD:
                            break
                    if outcome in DEAD:
                        break
    return found


@contextmanager
def watched(work: Callable[..., None], *given: Any) -> Iterator[Callable[[], str]]:
    """A child that runs work(sender, *given), and a function that waits for the next outcome that it sends."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(sender, *given), daemon=True)
    child.start()
    sender.close()

    def heard(limit_s: float | None = None) -> str:
        try:
            return receiver.recv() if receiver.poll(limit_s or LIMIT_S) else "hang"
        except EOFError:
            return "crash"

    try:
        started = heard(START_S)
        if started != "ready":
            raise ChildProcessError(f"the child did not start: {started}")
        yield heard
    finally:
        child.kill()
        child.join()
        receiver.close()


def _work(
    sender: Connection, base: Path, clean: Clean, numbers: range, seed: int, subjects: tuple[Subject, ...]
) -> None:
    folder = base / f"copy-{os.getpid()}"
    shutil.copytree(base / "clean", folder)
    targets = targets_of(folder)
    sender.send("ready")
    for number in numbers:
        mutation = choose(seed, number, targets)
        apply(mutation, folder, base / "other", seed)
        shards = None
        if mutation.target.region == "shard":
            shards = {Path(target.path).name for target in (mutation.target, mutation.partner)}
        for subject in subjects:
            sender.send(judge(subject, folder, mutation.target.generation, shards, clean))
        restore(mutation, folder, base / "clean")


def judge(subject: Subject, folder: Path, generation: int | None, shards: set[str] | None, clean: Clean) -> str:
    """One of OUTCOMES."""
    seen, whole = list[Row | None](), True
    try:
        for row in subject.read(folder, generation, shards):
            seen.append(row)
    except subject.promised:
        whole = False
    except Exception:
        return "crash"
    for outcome, state in (("harmless", generation), ("older", 1)):
        parts = (rows for shard, rows in clean[state].items() if shards is None or shard in shards)
        expected = [row for rows in parts for row in rows]
        equal = all(row is None or row == truth for row, truth in zip(seen, expected, strict=False))
        if equal and (len(seen) == len(expected) if whole else len(seen) <= len(expected)):
            return outcome if whole and None not in seen else "detected"
    return "silent"


def make(folder: Path, key: str) -> dict[str, Row]:
    """A data set of two generations, made by the real ingest of small images; its rows by id. Another key makes other
    images under the same names."""
    random, rows = np.random.default_rng(list(key.encode())), dict[str, Row]()
    images = folder.with_name(f"{folder.name}-images")
    images.mkdir()
    for number in range(ROWS[-1]):
        name, content = f"{number:03d}.{('png', 'jpg')[number % 2]}", BytesIO()
        pixels = random.integers(0, 256, (random.integers(8, 20), 12, 3), np.uint8)
        Image.fromarray(pixels).save(content, ("PNG", "JPEG")[number % 2])
        (images / name).write_bytes(content.getvalue())
        groups = {"venue": ("home", "street", "café")[number % 3], "camera": ("phone", "slr")[number // 3 % 2]}
        rows[name] = Row(name, ("cat", "dog")[number // 6 % 2], groups, SPLITS[number // 12 % 4], content.getvalue())
    for generation, count in enumerate(ROWS):
        with (images / "list.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["path", "label", "venue", "camera", "split"])
            out.writerows([row.id, row.label, *row.groups.values(), row.split] for row in [*rows.values()][:count])
        source = Csv(path=images / "list.csv", group_columns=("venue", "camera"), split_column="split")
        settings = Ingest(source=source, out=folder, append=generation > 0, shards=Shards(rows=32))
        ingest(settings, in_processes(1))
    return rows


def clean_rows(folder: Path, truth: dict[str, Row]) -> Clean:
    """The rows of a sound data set, in their order; each of them as it was given to the ingest."""
    clean: Clean = {}
    for generation, count in (*enumerate(ROWS, 1), (None, ROWS[-1])):
        names = [shard.name for shard in manifest.read(folder, generation).shards]
        clean[generation] = {name: list(independent_reader.rows(folder, generation, {name})) for name in names}
        rows = [row for part in clean[generation].values() for row in part]
        assert {row.id: row for row in rows} == dict([*truth.items()][:count])
        assert len(rows) == count
    return clean


def targets_of(folder: Path) -> list[Target]:
    """The files of a data set of two generations that a reader opens."""
    newest, first = manifest.read(folder), manifest.read(folder, 1)
    older = manifest.copy_of(Path(), 1).as_posix()
    return [
        *(Target("shard", f"{manifest.SHARDS}/{shard.name}", None, None) for shard in newest.shards),
        Target("index", newest.index.name, None, first.index.name),
        Target("index", first.index.name, 1, None),
        Target("order", newest.order.name, None, first.order.name),
        Target("order", first.order.name, 1, None),
        Target("manifest", manifest.NAME, None, older),
        Target("manifest", older, 1, None),
    ]


def table(found: list[Found]) -> str:
    """How often each outcome came, by region and kind; "a/b" where the readers differ."""
    subjects = [*dict.fromkeys(f.subject for f in found)]
    counts = Counter((f.mutation.target.region, f.mutation.kind, f.subject, f.outcome) for f in found)
    for (_, _, subject, outcome), n in [*counts.items()]:
        counts["all", "", subject, outcome] += n
    cases = [(region, kind) for region in REGIONS for kind in (*EDITS, *REPLACED, OLDER)]
    lines = [f"{'region':10}{'kind':26}{'n':>7}" + "".join(f"{outcome:>14}" for outcome in OUTCOMES)]
    for region, kind in (*cases, ("all", "")):
        by_subject = [[counts[region, kind, subject, outcome] for outcome in OUTCOMES] for subject in subjects]
        if n := max(map(sum, by_subject)):
            cells = ["/".join(map(str, dict.fromkeys(column))) for column in zip(*by_subject, strict=True)]
            lines.append(f"{region:10}{kind:26}{n:7}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join([*lines, "a/b: " + " / ".join(subjects)])


def main() -> None:
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    began = time.monotonic()
    found = corrupt(range(int(words.get("N", 10_000))))
    print(f"{table(found)}\n{time.monotonic() - began:.0f} s")
    print(checksum_cost.measure(Path(words["photos"]) if "photos" in words else None))
    sys.exit(any(f.outcome in {*DEAD, "silent"} for f in found))


if __name__ == "__main__":
    main()
