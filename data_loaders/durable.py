"""Files that are either whole or absent: written aside, flushed to the disk, then renamed into place."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_loaders.faults import Fault, Refusal

MANIFEST = "MANIFEST.json"
JOB_FOLDER = "working_dir_files"
"""Of Ray, where it unpacks what `ray job submit --working-dir` sends."""
FULL = {errno.ENOSPC, errno.EDQUOT}
"""That a disk, or one's share of it, has no room left."""
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
"""That a file system does not keep locks."""
OWNER = ".owner"
"""In a folder that one process at a time may write to: its lock, and who holds it."""
ASIDE = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<end>tmp|old)")
"""What a file or folder is called before it is published, or while it is replaced; with the process that does it."""
NAMED_WITHIN_S = 1.0
"""An owner writes its name at once when it has the lock; who is refused waits no longer for it."""
_held: set[int] = set()
"""Handles of the locks of this process. A fork closes its copies, or it would hold on to them."""


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
def publishing(folder: Path, needed: int | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes `folder`, with a manifest of its files, when the block ends well.

    A `folder` that exists already, which only a repeated interval can have written, is replaced. Raises Refusal (74)
    where the disk is full, and before anything is written where it has fewer free bytes than are `needed`.
    """
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        make_folder(folder.parent)
        free = free_bytes(folder.parent)
        if needed is not None and free is not None and free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        aside.mkdir()
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
    except Exception as wrong:
        if (number := error_number(wrong)) in FULL:
            raise no_room(folder, number, needed) from wrong
        raise
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def remove(folder: Path) -> None:
    """Removes a folder that `publishing` wrote; nobody sees a part of it."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path, names: str) -> None:
    """Removes what processes that were killed left aside of these names, a pattern, where nobody writes them meanwhile.
    What one of them was about to replace comes back."""
    for left in list(folder.glob(".*")):
        found = ASIDE.fullmatch(left.name)
        if not found or not re.fullmatch(names, found["name"]):
            continue
        if found["end"] == "old" and not left.with_name(found["name"]).exists():
            os.rename(left, left.with_name(found["name"]))
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def error_number(wrong: Exception) -> int | None:
    """The errno of what went wrong, also where a library that is not written in Python only tells it in its text."""
    if isinstance(wrong, OSError):
        return wrong.errno
    told = re.search(r"\(os error (\d+)\)", str(wrong))
    return int(told[1]) if told else None


def no_room(path: Path, number: int, needed: int | None) -> Refusal:
    """Says that a disk, or one's share of it, is full, as `number` tells, and how many bytes it takes."""
    free = free_bytes(path.parent)
    sizes = [] if needed is None else [f"{needed:,} bytes are needed"]
    sizes += [] if free is None else [f"{free:,} bytes are free"]
    what = f"{os.strerror(number).lower()}: {', '.join(sizes)}" if sizes else os.strerror(number).lower()
    return Refusal("It cannot be stored:", [Fault(str(path), what, "make room; the same command goes on")], 74)


def free_bytes(folder: Path) -> int | None:
    """Room for files below a folder, or None where the file system does not tell."""
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None


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


@contextmanager
def owned(folder: Path, name: str = OWNER, wait_s: float = 0.0) -> Iterator[bool]:
    """Only one process at a time, of all machines that see the folder; makes it where it is not there. Yields whether
    that is sure: some file systems keep no locks.

    The system lets go of the lock when the process ends, however it ends, and neither clocks nor what the file says
    decide. Raises Refusal (75), which names the other process, when it has not ended within `wait_s`.
    """
    make_folder(folder)
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # to write, or NFS would not lock it
    _held.add(handle)
    try:
        is_sure = _lock(handle, folder, wait_s)
        _say_who(handle)
        yield is_sure
    finally:
        if handle in _held:  # not in a fork
            _held.remove(handle)
            os.close(handle)


def _lock(handle: int, folder: Path, wait_s: float) -> bool:
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                fault = Fault(str(folder), f"belongs to {_who(handle)}", "wait for it to end, or give another name=…")
                raise Refusal("Another process is at work there:", [fault], 75) from None
            time.sleep(0.05)
        except OSError as wrong:
            if wrong.errno not in NO_LOCKS:
                raise
            return False
        else:
            return True


def _say_who(handle: int) -> None:
    who = {"host": socket.gethostname(), "pid": os.getpid(), "command": Path(sys.argv[0]).stem}
    with suppress(OSError):  # it only helps those who are refused
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(who | {"since": time.strftime("%Y-%m-%d %H:%M:%S %z")}).encode(), 0)


def _who(handle: int) -> str:
    """The owner; not one that was killed before, whose name stands there until the next one has written its own."""
    until = time.monotonic() + NAMED_WITHIN_S
    while time.monotonic() < until:
        time.sleep(0.01)
        with suppress(ValueError, KeyError, TypeError):
            who = json.loads(os.pread(handle, 4096, 0))
            if who["host"] != socket.gethostname() or Path(f"/proc/{who['pid']}").exists():
                return f"process {who['pid']} ({who['command']}) on {who['host']}, since {who['since']}"
    return "another process"


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


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
