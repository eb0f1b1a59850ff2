"""Shards copied to a disk of this machine while they are read from afar, so that each comes over the network once.

A copy is named by the hash of the whole shard, checked when it is made, and shared by all processes of the machine and
all data sets. What is read from it is checked as any row is; a copy that is damaged is removed, and the row read afar.
"""

import fcntl
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import BinaryIO

from data_loaders import durable
from data_loaders.index import DamagedRow, Index, Reader
from data_loaders.manifest import SHARDS, File
from data_loaders.mapped import Handle
from data_loaders.progress import say

PIECE = 2**20
"""Bytes that are copied at once."""
ROOM = 0.05
"""Share of the disk that is left free."""
LOOK_S = 5.0
"""Seconds between two looks for the copy of a shard."""


def copy_of(cache: Path, shard: File) -> Path:
    return cache / f"{shard.sha256}.arrow"


class StagedReader(Reader):
    """Reads shards from their copies, as far as there are any."""

    def __init__(self, index: Index, cache: Path) -> None:
        super().__init__(index)
        self._cache = cache
        self._copied: set[int] = set()
        """Shards whose open file is a copy."""
        self._looked: dict[int, float] = {}

    def handle(self, shard: int) -> Handle:
        if shard not in self._copied and monotonic() > self._looked.get(shard, 0.0) + LOOK_S:
            self._looked[shard] = monotonic()
            with suppress(FileNotFoundError):
                handle = Handle(copy_of(self._cache, self.index.manifest.shards[shard]))
                with self._opening:
                    self._handles[shard] = handle
                    self._copied.add(shard)
        return super().handle(shard)

    def _open(self, shard: int) -> Handle:
        self._copied.discard(shard)  # it was closed for another one, and is opened where it is surely there
        return super()._open(shard)

    def _read(self, row: int) -> bytes:
        try:
            return super()._read(row)
        except DamagedRow:
            self._forget(int(self.index.shard[row]))
            return super()._read(row)

    def _forget(self, shard: int) -> None:
        """A copy that may be damaged. Another thread may have found that too, so the row is read again in any case."""
        self._looked[shard] = monotonic()
        with self._opening:
            if shard in self._copied:
                self._handles.pop(shard, None)
                with suppress(OSError):
                    copy_of(self._cache, self.index.manifest.shards[shard]).unlink()


class Stager:
    """Copies all shards of a data set in the background."""

    def __init__(self, index: Index, cache: Path) -> None:
        self._shards, self._folder, self._cache = index.manifest.shards, index.folder / SHARDS, cache
        self._stopped = Event()
        self._thread = Thread(target=self._work, name="staging", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits for the piece that is being copied; the rest is copied when the data set is opened again."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            self._cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            for shard in self._shards:
                if self._stopped.is_set():
                    return
                disk = shutil.disk_usage(self._cache)
                if disk.free - shard.bytes < ROOM * disk.total:
                    say(f"{self._cache} has no room for more shards: they are read from {self._folder}")
                    return
                self._stage(shard)
        except OSError as wrong:
            say(f"{self._cache}: {os.strerror(wrong.errno or 0).lower()}: shards are read from {self._folder}")

    def _stage(self, shard: File) -> None:
        copy = copy_of(self._cache, shard)
        if copy.exists():
            return
        aside = copy.with_name(f".{copy.name}.tmp")  # one name for all processes: who has the lock copies
        with aside.open("ab") as sink:
            try:
                fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            sink.truncate(0)  # what a process that was killed has left
            if not copy.exists() and self._is_copied(shard, sink):
                sink.flush()
                os.fsync(sink.fileno())
                os.replace(aside, copy)
                durable.flush(self._cache)
            else:
                aside.unlink(missing_ok=True)

    def _is_copied(self, shard: File, sink: BinaryIO) -> bool:
        """Whether all of it was, as it was written."""
        found = hashlib.sha256()
        with (self._folder / shard.name).open("rb") as source:
            while not self._stopped.is_set() and (piece := source.read(PIECE)):
                found.update(piece)
                sink.write(piece)
        return found.hexdigest() == shard.sha256
