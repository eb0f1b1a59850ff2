"""What a data set of very many rows costs before and beside its images: python -m benchmarks.large_index
[rows=100000000] [classes=1000] [cells=100] [folder=FOLDER]

Writes the index of such a data set as an ingest would, of rows whose images are nowhere, and removes it at the end. It
takes some 100 bytes of disk a row, and twice as much before. A process of its own then opens it, makes samplers, and
draws the rows of batches: with no page of the files in memory, while they are verified, and then.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_loaders import indexing, manifest
from data_loaders.index import Index, Rows, Whole, open_index, schema
from data_loaders.manifest import Dropped, File, Manifest
from data_loaders.sampler import Stratified
from data_loaders.stream import TicketSampler, drawn

AT_ONCE = 2**20
SHARD, IMAGE = 2**13, 10_000
"""Rows of a shard, and bytes of an image."""
BATCH, BATCHES = 256, 200
SPLITS = ("train", "val", "test")
HELD_OUT = 50
"""One row of so many is of `val`, and one of `test`."""
MIXES = {"label": Stratified(), "label_and_group": Stratified(by="label_and_group", temper=0.5)}


def write(folder: Path, rows: int, classes: int, cells: int) -> Manifest:
    """A data set whose shards are only named. Classes have a long tail."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tables = _tables(rows, classes, cells)
        index, order = indexing.write(folder, 1, ("site",), tables, rows, Path(scratch))
    shards = tuple(
        File(name=f"all-g1-00000-{n:02d}-{n:08x}.arrow", rows=SHARD, bytes=SHARD * IMAGE, sha256=f"{n:064x}")
        for n in range(-(-rows // SHARD))
    )
    return manifest.publish(
        folder,
        Manifest(
            generation=1,
            classes=tuple(f"class {k:05d}" for k in range(classes)),
            groups={"site": tuple(f"site {c:03d}" for c in range(cells))},
            splits=SPLITS,
            index=index,
            order=order,
            shards=shards,
            rows={},
            images={},
            rejected=Dropped(rows=0, by_class={}, by_group={}, by_cell=()),
            settings={},
        ),
    )


def _tables(rows: int, classes: int, cells: int) -> Iterator[pa.Table]:
    random = np.random.default_rng(0)
    for start in range(0, rows, AT_ONCE):
        row = np.arange(start, min(start + AT_ONCE, rows))
        n = len(row)
        label = (classes * random.random(n) ** 2).astype(np.int32)
        label[row < 2 * HELD_OUT * classes] = row[row < 2 * HELD_OUT * classes] // (2 * HELD_OUT)
        split = np.zeros(n, np.int16)
        split[row % HELD_OUT == 1], split[row % HELD_OUT == 2] = 1, 2
        zeros = {name: np.zeros(n, np.uint32) for name in ("crc32c", "image_crc32c")}
        zeros |= {"quality": np.zeros(n, np.uint8), "look": np.zeros(n, np.uint64), "unit": np.zeros(n, np.uint64)}
        columns: dict[str, Any] = {
            "id": _ids(row),
            "group.site": random.integers(0, cells, n, np.int32),
            "label": label,
            "split": split,
            "shard": (row // SHARD).astype(np.int32),
            "offset": row % SHARD * IMAGE,
            "length": np.full(n, IMAGE, np.int32),
            "width": np.full(n, 224, np.int32),
            "height": np.full(n, 224, np.int32),
            **zeros,
        }
        yield pa.table(columns, schema=schema(("site",)))


def _ids(row: np.ndarray) -> pa.Array:
    """Eight hexadecimal digits."""
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[row[:, None] >> np.arange(28, -1, -4) & 15]
    ends = np.arange(0, digits.size + 1, 8)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(digits))]
    return pa.Array.from_buffers(pa.large_string(), len(row), buffers)


def measure(folder: Path) -> None:
    """Prints what each thing takes, in a process that has done nothing before."""
    _forget(folder)
    grown, heap = _anonymous(), _traced(folder)
    print(f"opened, both samplers made, {BATCHES} batches drawn with each: {heap / 1e6:.1f} MB of heap (tracemalloc)")
    print(f"  {(_anonymous() - grown) / 1e6:.1f} MB of anonymous memory of the process")
    _cold(folder)
    _verified(folder)


def _cold(folder: Path) -> None:
    _forget(folder)
    index, took = _timed(lambda: open_index(folder, verifies=False))
    print(f"open: {took * 1e3:.1f} ms, of {len(index):,} rows, with no page of the files in memory")
    rows = index.whole("train")
    for name, mix in MIXES.items():
        stream, took = _timed(lambda mix=mix: mix.over(index, rows, 0))
        print(f"sampler by {name}: {took * 1e3:.1f} ms, {len(stream.strata.sizes):,} strata, {len(rows):,} rows")
        print(f"  rows of a batch of {BATCH}, cold: {_drawn(stream)}")
    _, took = _timed(lambda: (index.class_sizes(rows), index.cell_sizes(rows)))
    print(f"counts of classes and cells: {took * 1e3:.1f} ms")


def _verified(folder: Path) -> None:
    _forget(folder)
    began = time.monotonic()
    index, took = _timed(lambda: open_index(folder))
    print(f"open, with the verification begun: {took * 1e3:.1f} ms")
    rows = index.whole("train")
    stream = MIXES["label"].over(index, rows, 0)
    index.check()
    print(f"  rows of a batch of {BATCH} meanwhile: {_drawn(stream)}")
    index.check(wait=True)
    print(f"verified: {time.monotonic() - began:.1f} s after the opening began")
    for name, mix in MIXES.items():
        stream = mix.over(index, rows, 0)
        print(f"  rows of a batch of {BATCH}, by {name}: {_drawn(stream)}")
        positions = [np.arange(BATCH) + step * BATCH for step in range(BATCHES)]
        _, took = _timed(lambda stream=stream, positions=positions: list(drawn(stream, positions)))
        print(f"  drawn as a loader does, some batches at a time: {took / BATCHES * 1e3:.2f} ms each")
        print(f"  rows, and what a loader needs to know of them: {_drawn(stream, index)}")
    print(f"the list of all training rows, for comparison: {_timed(lambda: np.asarray(rows))[1]:.2f} s")


def _drawn(stream: TicketSampler, index: Index | None = None) -> str:
    seconds = []
    for step in range(BATCHES):
        positions = np.arange(BATCH) + step * 7919 * BATCH
        seconds.append(_timed(lambda p=positions: index.samples(stream.rows(p)) if index else stream.rows(p))[1])
    return f"median {np.median(seconds) * 1e3:.2f} ms, longest {max(seconds) * 1e3:.2f} ms"


def _traced(folder: Path) -> int:
    """Bytes that Python and numpy hold at most, with an open index and its samplers."""
    tracemalloc.start()
    index = open_index(folder, verifies=False)
    rows: Rows = Whole(index, 0)
    streams = [mix.over(index, rows, 0) for mix in MIXES.values()]
    for stream in streams:
        _drawn(stream)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _anonymous() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def _forget(folder: Path) -> None:
    """Lets the system drop the pages of the files, which are on the disk."""
    for path in folder.glob("*.arrow"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    if "measure" in words:
        measure(Path(words["measure"]))
        return
    size = {name: int(words.get(name, most)) for name, most in (("rows", 10**8), ("classes", 1000), ("cells", 100))}
    with tempfile.TemporaryDirectory(dir=words.get("folder")) as temporary:
        made, took = _timed(lambda: write(Path(temporary), **size))
        print(f"written in {took:.0f} s: index {made.index.bytes / 1e9:.2f} GB, order {made.order.bytes / 1e9:.2f} GB")
        sys.stdout.flush()
        subprocess.run([sys.executable, "-m", "benchmarks.large_index", f"measure={temporary}"], check=True)


if __name__ == "__main__":
    main()
