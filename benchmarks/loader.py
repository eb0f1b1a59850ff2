"""Our loader beside nine public ones, at the same work: python -m benchmarks.loader peers=… photos=… cifar=…

`peers` is a working copy of the harness: its one.py, its modules, and an environment for each library. Every run is a
new process; the loaders take turns, so that whatever else the machine does meets all alike. Task A is photographs,
cropped at random to 224 x 224; task B CIFAR's, 32 x 32, of which ours come from JPEG files and from stored pixels.
Classes are drawn equally often, from 808 rows of the first to 8 of the last at A, 5,000 to 50 at B.

Ratios are ours / theirs, round by round: the median, the least and the greatest. `first batch` leaves out the time to
import; memory is the greatest sum over all processes in which what they share counts once (PSS); `others` is the share
of the machine that other programs took. `decoder alone` fills batches as the loader would, and does nothing else.
"""

import ctypes
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile
from threading import Event, Thread, Timer
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import BaseModel, NonNegativeFloat, PositiveFloat, PositiveInt

from benchmarks import loader_peer
from benchmarks.loader_peer import FOLDERS, Stored
from data_loaders import durable, native
from data_loaders.faults import Fault, Refusal
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.manifest import NAME
from data_loaders.progress import Progress, say
from data_loaders.settings import Settings
from data_loaders.shards import Shards
from data_loaders.sources.parquet import Parquet
from data_loaders.splits import Splits
from jobs.command import command

PROJECT = Path(__file__).resolve().parents[1]
Task = Literal["A", "B"]
Mode = Literal["uint8n", "uint8", "float32"]
WORK = {
    "A": "photographs, random crops of 8 to 100 % of the area to 224 x 224, flips; batches of 256",
    "B": "CIFAR, 32 x 32, shifted by up to 4 pixels, flips; batches of 512",
}
CHECKED = {"A": 2560, "B": 20480}
"""Images that the harness looks at to see whether a loader does the work."""
CHECK_S, LIMIT_S = 5, 180
"""What a check takes after its start, about; and the most that a run may take."""
SAMPLING, LEAST_PAUSE_S = 0.04, 0.1
"""Share of its time that the thread that samples memory works, and how long it waits at least."""
COST_TURNS, COST_BATCHES = 5, 4
AFTER_IMPORT = "import runpy, sys, {library}; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


class Peer(NamedTuple):
    """A module of the harness."""

    name: str
    environment: str
    library: str
    """What it imports, which is no part of its first batch."""
    stored: str
    """Format of prep.py that it reads."""
    start_s: float = 4.5
    """What it takes to import and to begin, about."""
    rounds: int = 10**9
    """At most: one that begins for a minute, and is far behind, takes one."""


PEERS = {
    "tv_pil": Peer("torchvision ImageFolder, Pillow", "venv", "torchvision.transforms.v2", "imagefolder"),
    "tv_tensor": Peer("torchvision ImageFolder, decode_jpeg", "venv", "torchvision.transforms.v2", "imagefolder"),
    "hf": Peer("Hugging Face datasets", "venv", "datasets", "hf"),
    "litdata_peer": Peer("LitData", "venv", "litdata", "litdata"),
    "mosaic": Peer("MosaicML Streaming", "venv_mosaic", "streaming", "mds"),
    "wds": Peer("WebDataset", "venv", "webdataset", "wds"),
    "dali": Peer("NVIDIA DALI (CPU)", "venv", "nvidia.dali.plugin.pytorch", "imagefolder"),
    "ffcv_peer": Peer("FFCV", "venv_ffcv", "ffcv.loader", "beton", start_s=17),
    "raydata": Peer("Ray Data", "venv", "ray.data", "parquet", start_s=35, rounds=1),
}
FILES = {"beton": "data.beton", "arrow": "rows.arrow"}
"""Formats that are one file; the others are a folder of their name."""
OURS: dict[Stored, str] = {"files": "ours", "pixels": "ours, pixels"}
"""How the images are stored -> key of the side."""


class Loaders(Settings):
    """The benchmark."""

    peers: Path
    """Folder of the harness, with its environments."""
    photos: Path
    """Folder of the photographs of task A."""
    cifar: Path
    """Folder of a folder of images for each class, for task B."""
    data: Path | None = None
    """Folder of the data sets, which are made where there are none; by default `data` in that of the harness."""
    out: Path | None = None
    """File to write the tables to as well."""
    only: tuple[str, ...] = ()
    """Of the public loaders; by default all whose environment is there."""
    tasks: tuple[Task, ...] = get_args(Task)
    workers: tuple[PositiveInt, ...] = (2, 1)
    """Of ours, threads."""
    mode: Mode = "uint8n"
    """What is timed: `uint8n` is uint8 from the loader, that the consumer turns into normalised float32; `uint8` leaves
    that to the device; of `float32` the loader does it."""
    rounds: PositiveInt = 3
    seconds: PositiveFloat = 3.0
    """That a run is timed."""
    warm: NonNegativeFloat = 1.0
    """Seconds before, after the first batch."""
    check: bool = True
    """Whether each loader is checked to do the same work, before."""
    ceiling: bool = True
    """Whether our decoder is timed alone too, against our loader with `mode=uint8`."""

    @property
    def folder(self) -> Path:
        """Of the data sets."""
        return (self.data or self.peers / "data").resolve()


class Side(NamedTuple):
    """A loader at a task."""

    key: str
    name: str
    python: Path
    module: str
    library: str
    options: tuple[str, ...] = ()
    """Of its function `loader`, as key=value."""

    @property
    def start_s(self) -> float:
        return PEERS[self.key].start_s if self.key in PEERS else 4.0

    @property
    def rounds(self) -> int:
        return PEERS[self.key].rounds if self.key in PEERS else 10**9


class Run(BaseModel):
    """What one.py says of a run; memory is ours."""

    rate: float
    """Images a second."""
    per_cpu: float
    """Images a CPU second of all its processes."""
    first: float
    """Seconds to the first batch."""
    foreign: float
    stolen: float
    """Shares of the machine that other programs, and other machines, took."""
    peak: float
    """Bytes."""


Runs = dict[tuple[Task, int, str], list[Run | None]]
"""Task, workers, and the key of a side -> its runs, a round each; None is one that failed."""


def run(settings: Loaders) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sides: dict[Task, list[Side]] = {task: [*ours(settings, task), *theirs(settings)] for task in settings.tasks}
    for task in settings.tasks:
        prepare(settings, task, sides[task])
    costs = cost_of_checks(settings) if settings.ceiling else ""
    checks = checked(settings, sides) if settings.check else {}
    runs = timed(settings, sides, settings.mode)
    parts = [about(settings), *tables(settings, sides, runs, checks)]
    if settings.ceiling:
        parts += [ceilings(settings, timed(settings, lone(settings), "uint8")), costs]
    text = "\n\n".join(parts)
    print(text)
    if settings.out:
        durable.write(settings.out, text + "\n")


# --- what is compared -------------------------------------------------------------------------------------------------


def ours(settings: Loaders, task: Task) -> list[Side]:
    layout = ("layout=nchw",) if settings.mode == "uint8n" else ()
    return [
        _ours(OURS[stored], "ours" + " (pixels)" * (stored == "pixels"), f"stored={stored}", *layout)
        for stored in stored_at(task)
    ]


def lone(settings: Loaders) -> dict[Task, list[Side]]:
    """Our loader, and what it would be if it only decoded."""
    kinds = {"loader": 0, "alone": 1}
    return {
        task: [
            _ours(f"{kind} {one}", f"{kind}, {one}", f"stored={one}", f"alone={alone}")
            for one, (kind, alone) in product(stored_at(task), kinds.items())
        ]
        for task in settings.tasks
    }


def stored_at(task: Task) -> list[Stored]:
    return ["files", "pixels"] if task == "B" else ["files"]


def _ours(key: str, name: str, *options: str) -> Side:
    return Side(key, name, Path(sys.executable), loader_peer.__name__, loader_peer.__name__, options)


def theirs(settings: Loaders) -> list[Side]:
    """Those whose environment is there. Raises Refusal where a name is unknown."""
    if unknown := [name for name in settings.only if name not in PEERS]:
        fix = f"there are: {', '.join(PEERS)}"
        raise Refusal("There is no such loader:", [Fault("only", repr(name), fix) for name in unknown], 2)
    found = []
    for key, peer in PEERS.items():
        python = settings.peers.resolve() / peer.environment / "bin" / "python"
        if settings.only and key not in settings.only:
            continue
        if python.exists():
            found.append(Side(key, peer.name, python, key, peer.library))
        else:
            say(f"{peer.name} is left out: there is no {python}")
    return found


def prepare(settings: Loaders, task: Task, sides: list[Side]) -> None:
    """Writes the data sets that are not there yet: theirs by prep.py, ours of the same bytes."""
    folder = settings.folder / task
    formats = dict.fromkeys(["arrow", *(PEERS[side.key].stored for side in sides if side.key in PEERS)])
    if lacking := [name for name in formats if not (folder / FILES.get(name, name)).exists()]:
        say(f"task {task}: writing {', '.join(lacking)}")
        subprocess.run(
            [sys.executable, "prep.py", task, "--only", ",".join(lacking)],
            cwd=settings.peers, env=environment(settings), stdout=sys.stderr, check=True,
        )  # fmt: skip
    for stored in stored_at(task):
        out = folder / FOLDERS[stored]
        if not (out / NAME).exists():
            shards = Shards(encoding="raw", side=32) if stored == "pixels" else Shards()
            source, splits = Parquet(path=folder / "rows.arrow"), Splits(val=0, test=0)
            ingest(Ingest(source=source, out=out, shards=shards, splits=splits), in_processes(0))


def environment(settings: Loaders) -> dict[str, str]:
    places = {"BENCH_DATA": settings.folder, "BENCH_PHOTOS": settings.photos, "BENCH_CIFAR": settings.cifar}
    paths = {name: str(path.resolve()) for name, path in places.items()}
    return {**os.environ, **paths, "PYTHONPATH": str(PROJECT), "TOKENIZERS_PARALLELISM": "false"}


# --- runs -------------------------------------------------------------------------------------------------------------


def timed(settings: Loaders, sides: dict[Task, list[Side]], mode: Mode) -> Runs:
    """Every side at every task with every number of workers, round by round."""
    turns: list[tuple[Task, int, Side]] = [
        (task, workers, side)
        for turn in range(settings.rounds)
        for task, of_task in sides.items()
        for workers in settings.workers
        for side in of_task
        if turn < side.rounds
    ]
    each = settings.warm + settings.seconds + 0.5
    say(f"{mode}: {len(turns)} runs, some {sum(side.start_s + each for *_, side in turns) / 60:.0f} minutes")
    progress, runs = Progress(mode, len(turns), "runs"), Runs()
    times = ("--seconds", str(settings.seconds), "--warm", str(settings.warm))
    for done, (task, workers, side) in enumerate(turns, 1):
        found = one(settings, side, task, "--workers", str(workers), "--out", mode, *times)
        measured = None if isinstance(found, str) else Run.model_validate(found)
        runs.setdefault((task, workers, side.key), []).append(measured)
        progress.show(done, f"{task} {workers} {side.name}: {measured.rate if measured else math.nan:,.0f} images/s")
    return runs


def checked(settings: Loaders, sides: dict[Task, list[Side]]) -> dict[tuple[Task, str], str]:
    """Task and key of a side -> whether it does the same work, or what is wrong."""
    every: list[tuple[Task, Side]] = [(task, side) for task, of_task in sides.items() for side in of_task]
    say(f"{len(every)} checks, some {sum(side.start_s + CHECK_S for _, side in every) / 60:.0f} minutes")
    progress, said = Progress("checked", len(every), "loaders"), dict[tuple[Task, str], str]()
    for done, (task, side) in enumerate(every, 1):
        found = one(settings, side, task, "--out", settings.mode, "--check", str(CHECKED[task]))
        wrong = found if isinstance(found, str) else "; ".join(found["bad"])
        said[task, side.key] = f"no: {wrong}" if wrong else "yes"
        progress.show(done, f"{task} {side.name}: {said[task, side.key]}")
    return said


def one(settings: Loaders, side: Side, task: Task, *words: str) -> dict[str, Any] | str:
    """What one.py says of a loader in a process of its own, and its peak of memory; or the end of what went wrong."""
    options = [word for option in side.options for word in ("--opt", option)]
    line = [str(side.python), "-c", AFTER_IMPORT.format(library=side.library), "one.py", side.module, task]
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*line, *words, *options],
            stdout=subprocess.PIPE, stderr=errors, text=True,
            cwd=settings.peers, env=environment(settings), start_new_session=True,
        )  # fmt: skip
        end, memory = Timer(LIMIT_S, kill, [process.pid]), Memory(process.pid)
        assert process.stdout
        with process:
            end.start()
            memory.start()
            try:
                answer = next((said for said in process.stdout if said.startswith("RESULT ")), "")
            finally:
                end.cancel()
                memory.ended.set()
                kill(process.pid)
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:] or [f"nothing within {LIMIT_S} s"]
    if not answer:
        say(f"{task} {side.name}: {last[0]}")
    return {**json.loads(answer.removeprefix("RESULT ")), "peak": memory.peak} if answer else last[0]


def kill(session: int) -> None:
    """A process that leads a session, with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


class Memory(Thread):
    """Samples the memory of a process and of all below it, as often as costs little."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.ended, self.peak = process, Event(), 0

    def run(self) -> None:
        pause = LEAST_PAUSE_S
        while not self.ended.wait(pause):
            began = time.thread_time()
            self.peak = max(self.peak, sum(map(own_share, family(self.process))))
            pause = max(LEAST_PAUSE_S, (time.thread_time() - began) / SAMPLING)


def family(process: int) -> Iterator[int]:
    """A process and all below it."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                yield from family(int(child))


def own_share(process: int) -> int:
    """Bytes of memory, of which shared pages count in part (PSS)."""
    with suppress(OSError):
        found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else 0
    return 0


# --- what checks cost -------------------------------------------------------------------------------------------------

CHECKS = """
#include "%s"
EXPORTED void checks(struct row *rows, int64_t number, int64_t *spent)
{
    struct work *work = calloc(1, sizeof *work);
    int orientation;
#if defined(__x86_64__)
    work->fast = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
#endif
    fill_tables(work->tables);
    for (const struct row *row = rows; row < rows + number; row++) {
        make_room(&work->file, (size_t)row->length);
        read_file(row, work->file.bytes);
        int64_t began = now();
        volatile size_t found = checksum(work, work->file.bytes, (size_t)row->length);
        int64_t then = now(), clock = now() - then;
        spent[0] += then - began - clock;
        began = now();
        if (!row->raw)
            found = walk_header(work->file.bytes, (size_t)row->length, &orientation);
        spent[1] += now() - began - clock;
        (void)found;
    }
    free_all(work);
}
"""
"""Calls what the library does for safety, by itself; adds nanoseconds: of the CRC, and of the walk through the header
with its caps and the EXIF orientation."""


Checks = Callable[[int, int, int], None]
"""Of the address of rows, their number, and the address of two int64."""


def cost_of_checks(settings: Loaders) -> str:
    """The share that checks have of what a thread takes to read and decode a row."""
    head, lines = ["task", "us a row", "CRC of all bytes", "caps and EXIF"], []
    with TemporaryDirectory() as folder:
        checks = compiled(Path(folder))
        for task in settings.tasks:
            for stored in stored_at(task):
                each, *shares = spent_on_checks(checks, settings.folder / task, stored)
                lines.append([f"{task}, {stored}", f"{each:,.1f}", *(f"{share:.2%}" for share in shares)])
    return f"**What checks cost**, of a row that a thread reads and decodes\n\n{table(head, lines)}"


def spent_on_checks(checks: Checks, folder: Path, stored: Stored) -> tuple[float, float, float]:
    """Microseconds a row, and the shares of both checks: medians of some turns."""
    data = loader_peer.data_of(folder, stored, threads=1)
    batches = loader_peer.batches_of(data, COST_BATCHES)
    images = np.zeros((data.batch, data.size, data.size, 3), np.uint8)
    spent = np.zeros((COST_TURNS, 4))
    for turn, (rows, _) in product(range(COST_TURNS), batches):
        found = np.zeros(2, np.int64)
        checks(rows.ctypes.data, len(rows), found.ctypes.data)
        spent[turn] += (*native.load(rows, images), *found)
    whole = spent[:, :2].sum(1)
    crc, walk = np.median(spent[:, 2:] / whole[:, None], 0).tolist()
    return float(np.median(whole)) / 1000 / COST_BATCHES / data.batch, crc, walk


def compiled(folder: Path) -> Checks:
    (folder / "checks.c").write_text(CHECKS % (native.HERE / "rows.c"))
    flags = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-DSOURCE=0u"]
    command = ["cc", *flags, str(folder / "checks.c"), "-o", str(folder / "checks.so"), "-ljpeg", "-lm"]
    subprocess.run(command, check=True)
    checks = ctypes.CDLL(str(folder / "checks.so")).checks
    checks.argtypes, checks.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p], None
    return checks


# --- tables -----------------------------------------------------------------------------------------------------------


def about(settings: Loaders) -> str:
    versions = f"Python {platform.python_version()}, torch {version('torch')}, {native.NAME or 'no native decoder'}"
    how = f"{settings.mode}, {settings.rounds} rounds of {settings.seconds:g} s after {settings.warm:g} s"
    return f"{os.cpu_count()} cores, {versions}; {how}; median (least - greatest)."


def tables(
    settings: Loaders, sides: dict[Task, list[Side]], runs: Runs, checks: dict[tuple[Task, str], str]
) -> Iterator[str]:
    """A table for each task and number of workers; a line for each side, the fastest first."""
    for (task, of_task), workers in product(sides.items(), settings.workers):
        mine = [side for side in of_task if side.key in OURS.values()]
        head = ["loader", "images/s", "images/CPU s"]
        head += [f"{side.name} / it{what}" for side in mine for what in ("", ", CPU")]
        head += ["first batch, s", "peak memory, MB", "others", "same work"]
        lines = []
        for side in of_task:
            of_side = runs[task, workers, side.key]
            good = [one for one in of_side if one]
            ratios = [
                spread(quotients(runs[task, workers, our.key], of_side, what), ".2f")
                for our in mine
                for what in ("rate", "per_cpu")
            ]
            cells = [side.name, spread([one.rate for one in good]), spread([one.per_cpu for one in good]), *ratios]
            cells += [spread([one.first for one in good], ".1f"), spread([one.peak / 1e6 for one in good])]
            others = [one.foreign + one.stolen for one in good]
            cells += [f"{max(others):.0%}" if others else "-", checks.get((task, side.key), "")]
            lines.append((median([one.per_cpu for one in good] or [0]), cells))
        lines = [cells for _, cells in sorted(lines, key=lambda line: -line[0])]
        yield f"**Task {task}, {workers} workers**: {WORK[task]}\n\n{table(head, lines)}"


def ceilings(settings: Loaders, runs: Runs) -> str:
    """How near our loader comes to what the decoder alone does."""
    head = ["task", "threads", "decoder alone, images/s", "images/CPU s", "loader, images/s", "images/CPU s"]
    head += ["share of images/s", "share of images/CPU s"]
    lines = []
    for task, workers in product(settings.tasks, settings.workers):
        for stored in stored_at(task):
            loader, alone = (runs[task, workers, f"{kind} {stored}"] for kind in ("loader", "alone"))
            both = product((alone, loader), ("rate", "per_cpu"))
            cells = [spread([getattr(one, what) for one in side if one]) for side, what in both]
            cells += [spread(quotients(loader, alone, what), ".3f") for what in ("rate", "per_cpu")]
            lines.append([f"{task}, {stored}", str(workers), *cells])
    return f"**The decoder alone**, uint8\n\n{table(head, lines)}"


def quotients(ours: list[Run | None], theirs: list[Run | None], what: str) -> list[float]:
    """Of the rounds in which both have run; one may have had fewer."""
    pairs = zip(ours, theirs, strict=False)
    return [getattr(our, what) / getattr(their, what) for our, their in pairs if our and their]


def spread(values: list[float], how: str = ",.0f") -> str:
    if not values:
        return "-"
    return f"{median(values):{how}} ({min(values):{how}} - {max(values):{how}})"


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    command(lambda: Loaders, __doc__, "python -m benchmarks.loader peers=../peers photos=../photos cifar=../cifar", run)
