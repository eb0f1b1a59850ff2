"""A process that runs jobs in forks of itself, and lets each of them end, or its disk fail, at any thing it does to it.

It reads requests and writes answers as lines of JSON. `test_crash_consistency.py` starts it, also where it may mount a
disk of its own.
"""

import builtins
import errno
import gc
import hashlib
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from data_loaders.faults import Refusal
from data_loaders.index import Reader, open_index

PLAIN = {name: getattr(os, name) for name in ("write", "fsync", "open", "mkdir", "rmdir", "unlink", "replace")}
"""Of `os`: what a job does to the disk. `rename` and `remove` are counted as `replace` and `unlink`."""
FILLS = {"write", "open", "mkdir"}
"""What a full disk does not let one do."""
HALVED = 64
"""Bytes from which on a write is killed half way, too."""


class Disk:
    """Counts what this process does to the disk; a larger write twice: before it, and when half of it is done."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.point: int = request.get("point", 0)
        """Where to end, or to fail; the first one is 1."""
        self.signal: int = request.get("signal", signal.SIGKILL)
        self.error: int = request.get("error", 0)
        """An errno: instead of ending, the call fails; where the disk is full, all later ones that fill it, too."""
        self.trace: list[list[Any]] = []
        self.passed = self.written = 0

    def watch(self) -> None:
        """From now on all that Python does to the disk passes here."""
        for name in ("mkdir", "rmdir", "unlink"):
            self._hook(name, lambda do, name: lambda path, *a, **k: self._does(name, path, do, path, *a, **k))
        self._hook("replace", lambda do, _: lambda a, b: self._does("replace", f"{a}\0{b}", do, a, b))
        os.remove, os.rename = os.unlink, os.replace
        self._hook("fsync", lambda do, _: lambda handle: self._does("fsync", _path(handle), do, handle))
        self._hook("write", lambda do, _: lambda handle, data: self.write(_path(handle), data, lambda d: do(handle, d)))

        def open_handle(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return self._does("open", path, PLAIN["open"], path, flags, *rest, **named)
            return PLAIN["open"](path, flags, *rest, **named)

        os.open = open_handle
        builtins.open = io.open = self._open

    def write(self, path: str, data: Any, do: Callable[[Any], int]) -> int:
        whole = memoryview(data).cast("B")
        self._pass("write", path)
        if len(whole) >= HALVED:
            if self._kills and self.passed + 1 == self.point:
                do(whole[: len(whole) // 2])
            self._pass("half", path)
        done = do(whole)
        self.written += done
        return done

    @property
    def _kills(self) -> bool:
        return self.signal == signal.SIGKILL and not self.error

    def _hook(self, name: str, hooked: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> None:
        setattr(os, name, hooked(PLAIN[name], name))

    def _does(self, what: str, path: Any, do: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self._pass(what, os.fsdecode(path))
        event = self.trace[-1]
        try:
            return do(*args, **named)
        except OSError:
            event[0] = "failed"  # such as to remove what is not there
            raise

    def _pass(self, what: str, path: str) -> None:
        self.passed += 1
        content = None
        if what == "fsync" and os.path.isfile(path):
            with _OPEN(path, "rb") as file:
                content = file.read().decode("latin-1")
        self.trace.append([what, path, content])
        full = self.error in {errno.ENOSPC, errno.EDQUOT} and self.passed > self.point > 0 and what in FILLS
        if (self.passed != self.point and not full) or (what == "half" and not self._kills):
            return
        if self.error:
            named = () if what in {"write", "fsync"} else (path,)  # as the system does
            raise OSError(self.error, os.strerror(self.error), *named)
        os.kill(os.getpid(), self.signal)

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **named: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return _OPEN(file, mode, buffering, *text, **named)
        self._pass("open", os.fsdecode(file))
        buffer = io.BufferedWriter(_File(self, os.fsdecode(file), mode.replace("b", "").replace("t", "")))
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *text, **named)


_OPEN = io.open


class _File(io.FileIO):
    """A file of a job, whose writes are counted."""

    def __init__(self, disk: Disk, path: str, mode: str) -> None:
        self._disk, self._path = disk, path
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        return self._disk.write(self._path, data, super().write)


def _path(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


def run(request: dict[str, Any]) -> None:
    """Runs a job as its command does; never returns. Its words are on standard output and error, in `said`."""
    code, disk = 0, Disk(request)
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    if limit := request.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    written = _written()
    if user := request.get("user"):
        os.setgroups([])
        os.setuid(user)
    disk.watch()
    sys.argv = [request["job"], *request["words"]]
    try:
        importlib.import_module(f"jobs.{request['job']}").main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    gc.collect()  # what was not closed complains now
    sys.stdout.flush()
    if "trace" in request:
        unseen = _written() - written - disk.written - os.fstat(1).st_size
        with _OPEN(request["trace"], "w") as file:
            json.dump({"trace": disk.trace, "unseen": unseen}, file)
    os._exit(code)


def _written() -> int:
    """Bytes that this process wrote so far, as the system counts them."""
    with _OPEN("/proc/self/io") as file:
        return int(file.read().split("wchar:")[1].split()[0])


def rows(out: str) -> dict[str, Any]:
    """All that a reader finds in a data set; nothing where there is none."""
    try:
        index = open_index(Path(out))
    except Refusal as refusal:
        if refusal.title != "There is no data set:":
            raise
        return {}
    reader, names = Reader(index), list(index.group_values.values())
    try:
        found = {
            index.ids[row].as_py(): [
                index.splits[index.split[row]],
                index.classes[index.labels[row]],
                *(names[a][value] for a, value in enumerate(index.groups[row])),
                hashlib.sha256(reader.read(row)).hexdigest(),
            ]
            for row in range(len(index.labels))
        }
    finally:
        reader.close()
    return {"fingerprint": index.fingerprint, "rows": found}


def warm(request: dict[str, Any]) -> None:
    """Runs a job here, so that its forks find everything imported."""
    sys.argv = [request["warm"], *request["words"]]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        importlib.import_module(f"jobs.{request['warm']}").main()
    gc.freeze()  # so that forks share more of it


def answer(request: dict[str, Any]) -> Any:
    """Does what is asked: a job, which ends with an exit code, or less than 0 by a signal; a `call` of a program, which
    gives what it says if it goes well; or the `rows` of a data set."""
    if "call" in request:
        done = subprocess.run(request["call"], check=False, capture_output=True, text=True)
        return None if done.returncode else done.stdout
    if "warm" in request:
        return warm(request)
    if "rows" in request:
        return rows(request["rows"])
    if "resume" in request:
        child = request["resume"]
        os.kill(child, signal.SIGCONT)
    else:
        child = os.fork()
        if not child:
            run(request)
    _, status = os.waitpid(child, os.WUNTRACED)
    return {"stopped": child} if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
