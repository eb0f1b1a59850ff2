"""Arrow files of what is known of all rows: a small one is read into memory and verified before a byte of it is parsed,
a large one is mapped into memory and verified meanwhile, by a thread that reads all of it."""

import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.ipc

from data_loaders.faults import Fault, Refusal
from data_loaders.manifest import File

LARGE = 2**28
"""Bytes; a file of more is mapped."""
SLICE = 2**20
"""Bytes, or rows, that are looked at together."""
POPULATE_READ = 22
"""Advice of Linux 5.14 on: enter these pages into the tables of the process. A batch meets thousands of them."""


class Handle:
    """An open file, which is closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # nobody waits for a pipe

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class ArrowFile:
    """A file of one record batch, without nulls. Raises Refusal (65) where it is not as its manifest says; of a large
    file, only `verify` finds out whether each byte of it is."""

    def __init__(self, path: Path, about: File, schema: pa.Schema, kind: str) -> None:
        self.path, self._sha256 = path, about.sha256
        self._mapped: tuple[Handle, mmap.mmap] | None = None
        with self.blamed():
            handle = Handle(path)
            found = os.fstat(handle.number)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("is no file, but a pipe or a device")
            if found.st_size > about.bytes:
                raise ValueError(f"has {found.st_size:,} bytes, more than {about.bytes:,}")
            if found.st_size < about.bytes:
                raise ValueError("is not as it was written")
            self._size = found.st_size
            self.is_large = self._size > LARGE
            if self.is_large:
                content = mmap.mmap(handle.number, self._size, access=mmap.ACCESS_READ)
                self._mapped = handle, content
            else:
                content = _read(handle.number, self._size)
                self._agrees(hashlib.sha256(content))
            self.batch = _batch(content, schema, kind)
            if self.batch.num_rows != about.rows:
                raise ValueError("does not fit the manifest")
            self.batch.validate(full=not self.is_large)

    def verify(self) -> None:
        """Whether every byte of a large file is as it was written, and what Arrow says of it."""
        if self._mapped:
            handle, content = self._mapped
            with self.blamed():
                digest = hashlib.sha256()
                for start in range(0, self._size, SLICE):
                    digest.update(os.pread(handle.number, SLICE, start))  # which says what is wrong, where a map kills
                    with suppress(OSError):
                        content.madvise(POPULATE_READ, start, min(SLICE, self._size - start))
                self._agrees(digest)
                self.batch.validate(full=True)
            self._mapped = None

    def _agrees(self, digest: "hashlib._Hash") -> None:
        if digest.hexdigest() != self._sha256:
            raise ValueError("is not as it was written")

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Names this file where its content turns out to be wrong."""
        try:
            yield
        except (OSError, ValueError, pa.ArrowException) as wrong:
            fault = Fault(str(self.path), str(wrong), "restore it, or ingest again")
            raise Refusal("The data set is damaged:", [fault], 65) from wrong


def _read(handle: int, size: int) -> bytes:
    with os.fdopen(os.dup(handle), "rb") as file:
        return file.read(size)


def _batch(content: bytes | mmap.mmap, schema: pa.Schema, kind: str) -> pa.RecordBatch:
    reader = pa.ipc.open_file(pa.py_buffer(content))
    if reader.schema != schema:
        raise ValueError(f"does not have the columns of {kind}")
    if reader.num_record_batches != 1:
        raise ValueError(f"has {reader.num_record_batches} record batches, not one")
    batch = reader.get_batch(0)
    if any(column.null_count for column in batch.columns):
        raise ValueError("has nulls")
    return batch


class Verification:
    """What a piece of work says of files: found out once, at once or by a thread."""

    def __init__(self, work: Callable[[], None], aside: bool) -> None:
        self._work, self._wrong, self._is_done = work, None, False
        self._thread = Thread(target=self._run, name="verify", daemon=True)
        if aside:
            self._thread.start()
        else:
            work()
            self._is_done = True

    def check(self, wait: bool) -> None:
        """Raises what was found to be wrong by now or, if it waits, at all."""
        if not self._is_done:
            if wait and self._thread.is_alive():
                self._thread.join()
            if not self._is_done and not self._thread.is_alive():
                self._run()  # this process is a fork, which has no threads but one
        if self._wrong:
            raise self._wrong

    def _run(self) -> None:
        try:
            self._work()
        except Exception as wrong:
            self._wrong: Exception | None = wrong
        self._is_done = True
