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


def is_safe(cache: Path) -> bool:
    """Whether nobody else may write to the folder, which is made where it is missing: copies are trusted. Raises
    OSError."""
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = cache.stat()
    return about.st_uid == os.geteuid() and not about.st_mode & 0o022


class StagedReader(Reader):
    """Reads shards from their copies, as far as there are any."""

    def __init__(self, index: Index, cache: Path) -> None:
        super().__init__(index)
        self._cache, self._is_safe = cache, False
        with suppress(OSError):  # the one who copies tells
            self._is_safe = is_safe(cache)
        self._copied: set[int] = set()
        """Shards whose open file is a copy."""
        self._looked: dict[int, float] = {}

    def handle(self, shard: int) -> Handle:
        due = self._looked.get(shard, 0.0) + LOOK_S
        if self._is_safe and shard not in self._copied and monotonic() > due:
            self._looked[shard] = monotonic()
            with suppress(OSError):
                handle = Handle(copy_of(self._cache, self.index.manifest.shards[shard]))
                with self._opening:
                    self._keep(shard, handle)
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
            if not is_safe(self._cache):
                say(f"{self._cache} is not a folder that you alone may write to: shards are read from {self._folder}")
                return
            for shard in self._shards:
                if self._stopped.is_set():
                    return
                disk = shutil.disk_usage(self._cache)
                if disk.free - shard.bytes < ROOM * disk.total:
                    say(f"{self._cache} has no room for more: shards are read from {self._folder}")
                    return
                self._stage(shard)
        except OSError as wrong:
            say(f"{self._cache}: {os.strerror(wrong.errno or 0).lower()}: shards are read from {self._folder}")

    def _stage(self, shard: File) -> None:
        copy = copy_of(self._cache, shard)
        if copy.exists():
            return
        aside = copy.with_name(f".{copy.name}.tmp")  # one name for all processes: who has the lock copies
        with open(os.open(aside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b") as sink:
            try:
                fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if not aside.exists() or aside.stat().st_ino != os.fstat(sink.fileno()).st_ino:
                return  # another process has published it, or given it up, in between
            try:
                sink.truncate(0)  # what a process that was killed has left
                is_whole = not copy.exists() and self._is_copied(shard, sink)
                sink.flush()
                os.fsync(sink.fileno())
            except OSError:
                aside.unlink()
                raise
            if is_whole:
                os.replace(aside, copy)
                durable.flush(self._cache)
            else:
                aside.unlink()

    def _is_copied(self, shard: File, sink: BinaryIO) -> bool:
        """Whether all of it was, as it was written."""
        found = hashlib.sha256()
        with (self._folder / shard.name).open("rb") as source:
            while not self._stopped.is_set() and (piece := source.read(PIECE)):
                found.update(piece)
                sink.write(piece)
        return found.hexdigest() == shard.sha256
