"""Files that are either whole or absent: written aside, flushed to the disk, then renamed into place."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_loaders.faults import Fault, Refusal

MANIFEST = "MANIFEST.json"
JOB_FOLDER = "working_dir_files"
"""Of Ray, where it unpacks what `ray job submit --working-dir` sends."""
FULL = {errno.ENOSPC, errno.EDQUOT}
"""That a disk, or one's share of it, has no room left."""


def lasting(path: Path, setting: str) -> Path:
    """The whole path. Refuses one in the copy of the project that a submitted Ray job runs in, which does not last."""
    whole = path.resolve()
    if JOB_FOLDER in whole.parts:
        fix = "give the whole path of a folder that every node sees"
        raise Refusal("The results would be lost:", [Fault(setting, f"{path} is in the job's temporary copy", fix)])
    return whole


def write(path: Path, content: bytes | str) -> None:
    """Publishes a file; a reader sees the former one or this one, never a part."""
    with writing(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, tree: Any) -> None:
    write(path, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well and vanishes when it does not."""
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    except OSError as wrong:
        raise OSError(wrong.errno, wrong.strerror or str(wrong), wrong.filename or str(path)) from wrong
    finally:
        aside.unlink(missing_ok=True)


class Hashed:
    """A file that is written and hashed at once; it gets its name at the end."""

    closed = False

    def __init__(self, handle: int) -> None:
        self._handle, self._sha256, self.size = handle, hashlib.sha256(), 0
        self.path = Path()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, content: bytes | memoryview) -> int:
        left = memoryview(content).cast("B")
        whole = len(left)
        self._sha256.update(left)
        while left:
            left = left[os.write(self._handle, left) :]
        self.size += whole
        return whole

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """The handle is closed by who opened it."""


@contextmanager
def named_by_hash(folder: Path, stem: str) -> Iterator[Hashed]:
    """A file to write to, which becomes STEM-HASH.arrow when the block ends well, and vanishes when it does not."""
    aside = folder / f".{stem}.{os.getpid()}.tmp"
    try:
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            file = Hashed(handle)
            yield file
            os.fsync(handle)
        finally:
            os.close(handle)
        file.path = folder / f"{stem}-{file.sha256[:8]}.arrow"
        os.replace(aside, file.path)
        flush(folder)
    except OSError as wrong:
        raise OSError(wrong.errno, wrong.strerror or str(wrong), str(aside)) from wrong
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder`, with a manifest of its files, when the block ends well.

    A `folder` that exists already, which only a repeated interval can have written, is replaced.
    """
    make_folder(folder.parent)
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=2))
        for path in (*aside.iterdir(), aside):
            flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(aside, folder)
        flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `publishing` wrote, or None when every file is as it was written."""
    if not (folder / MANIFEST).exists():
        return "does not exist" if not folder.exists() else f"is not whole: it has no {MANIFEST}"
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, written in files.items():
            path = folder / Path(name).name
            if path.stat().st_size != written["bytes"] or sha256(path) != written["sha256"]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        return f"{type(wrong).__name__}: {wrong}"
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process of this machine at a time. Raises Refusal (75) where another one is in there."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fault = Fault(str(folder), "is being written by another process", "wait for it to end")
            raise Refusal("Nothing was written:", [fault], 75) from None
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """With those that it lies in; their names are on the disk when this returns."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        flush(path.parent)


def flush(path: Path) -> None:
    """Hands a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
