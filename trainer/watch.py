"""What keeps a run from being lost from outside: signals that ask it to stop, what all workers agree on between two
steps, and signs of life, by which a worker that is stuck is found and named."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from data_loaders.faults import Fault, Refusal

Answer = Literal["go_on", "checkpoint", "stop"]
"""What to do between two steps; `checkpoint`: make one now, and go on."""
ANSWERS: tuple[Answer, ...] = ("go_on", "checkpoint", "stop")
"""Where workers want different things, the later one counts."""
WAITING = "waiting for the others"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
FOLDER = ".alive"
"""In a run's folder, the workers' signs of life."""
OURS = ("trainer.", "data_loaders.")
BEAT_S = 1.0
LEAST_BEATS = 10
"""Within the time after which a worker is stuck."""
_asked: set[str] = set()
"""The signals that ask this process to stop."""


def is_asked_to_stop() -> bool:
    """Whether a signal asked this process to stop, while it is interruptible."""
    return bool(_asked)


@contextmanager
def interruptible(then: Callable[[], None] | None = None, again_ends: bool = True) -> Iterator[None]:
    """SIGTERM and SIGINT ask this process to stop when it next can, and call `then`; a second one ends it at once.

    Only a main thread hears signals: in another one, this does nothing. A signal that is ignored stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        _asked.add(signal.Signals(number).name)
        if again_ends:
            for each in former:
                signal.signal(each, signal.SIG_DFL)
            os.write(2, b"stopping after this step; once more, and it ends at once\n")
        if then:
            then()

    former = {each: signal.getsignal(each) for each in SIGNALS}
    former = {each: handler for each, handler in former.items() if handler != signal.SIG_IGN}
    for each in former:
        signal.signal(each, ask)
    try:
        yield
    finally:
        for each, handler in former.items():
            signal.signal(each, handler or signal.SIG_DFL)
        _asked.clear()


def interrupted(where: object = "training") -> Refusal:
    """What a run ends with that was asked to stop before it was done."""
    return Refusal("The run was interrupted:", [Fault(str(where), "is not done", "the same command goes on")], 75)


class Vote:
    """What all workers agree on: the greatest of each number that they gave at the call before. So a call waits for
    nobody, unless another worker is a whole step behind; and a device is not waited for at all."""

    def __init__(self) -> None:
        from torch import distributed

        self._group: Any = distributed.new_group(backend="gloo")  # of its own: gradients may be under way in another
        self._last: tuple | None = None

    def __call__(self, mine: Sequence[int]) -> list[int]:
        """Every worker calls it, as often as the others. The first answer is zeros."""
        import torch
        from torch import distributed

        agreed = [0] * len(mine)
        if self._last:
            numbers, work = self._last
            work.wait()
            agreed = numbers.tolist()
        numbers = torch.tensor(mine, dtype=torch.int64)
        work: Any = distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._last = numbers, work
        return agreed


@dataclass(slots=True)
class At:
    """How far a worker has come."""

    step: int = 0
    doing: str = "starting"
    moves: int = 0
    """How often it said so."""
    long: bool = True
    """Whether nobody can tell how long this takes."""
    is_warm: bool = False
    """Whether a step is done: the first one may compile."""
    is_asked: bool = False
    """Whether it was asked to stop, by a file."""
    is_stopping: bool = False
    """Whether all workers agreed to stop."""


class Sign(NamedTuple):
    """Of life, of a worker."""

    host: str
    pid: int
    beat: int
    """Grows as long as the process lives and is not frozen."""
    step: int
    moves: int
    doing: str
    long: bool
    where: str
    """The line of code, when it has not moved for a while."""

    def has_moved(self, before: Sign) -> bool:
        return (self.pid, self.step, self.moves) != (before.pid, before.step, before.moves)


def stuck(before: Sequence[Sign | None], now: Sequence[Sign | None]) -> dict[int, str]:
    """Rank -> what is wrong, of those that keep all others waiting, between two looks at all workers. Empty when there
    is nobody to blame: somebody still moves, or does what may take long.

    Whose beat stands still is frozen or gone. If all beats go on, it is who is behind, among those that do not wait.
    """
    pairs = dict(enumerate(zip(before, now, strict=True)))
    frozen = {rank: b or a for rank, (b, a) in pairs.items() if a is None or (b and (a.pid, a.beat) == (b.pid, b.beat))}
    if frozen:
        return {rank: f"shows no sign of life{_last_seen(sign)}" for rank, sign in frozen.items()}
    alive = {rank: (b, a) for rank, (b, a) in pairs.items() if a is not None}
    if any(b is None or a.has_moved(b) or (a.long and a.doing != WAITING) for b, a in alive.values()):
        return {}
    busy = {rank: a for rank, (_, a) in alive.items() if a.doing != WAITING} or {r: a for r, (_, a) in alive.items()}
    least = min((sign.step, sign.moves) for sign in busy.values())
    return {r: f"is stuck{_last_seen(sign)}" for r, sign in busy.items() if (sign.step, sign.moves) == least}


def _last_seen(sign: Sign | None) -> str:
    if sign is None:
        return ""
    where = f", in {sign.where}" if sign.where else ""
    return f", {sign.doing} at step {sign.step:,}{where}, as process {sign.pid} on {sign.host}"


class Watch:
    """A thread that shows that this worker lives; when this one has not moved for `stuck_s`, it looks who is to blame,
    and calls `end`, which is to end the process.

    Time is counted in beats of its own: it stands still for a process that is stopped, so that nobody is blamed when
    all of them go on.
    """

    def __init__(
        self, run: Path, rank: int, workers: int, at: At, stuck_s: float, end: Callable[[Refusal], None]
    ) -> None:
        self._folder, self._rank, self._workers, self._at, self._end = run / FOLDER, rank, workers, at, end
        self._stuck_s, self._beat_s = stuck_s, min(BEAT_S, stuck_s / LEAST_BEATS)
        self._most = math.ceil(stuck_s / self._beat_s)
        self._watched = threading.get_ident()
        self._beat = self._still = 0
        self._moved = (-1, -1)
        self._before: list[Sign | None] = []

    def beat(self) -> None:
        """Shows a sign of life, and looks at the others where there is cause."""
        moved = (self._at.step, self._at.moves)
        self._still = self._still + 1 if moved == self._moved else 0
        self._moved, self._beat = moved, self._beat + 1
        self._show()
        if self._still == self._most // 2:
            self._before = self._signs()
        elif self._still >= self._most:
            now = self._signs()
            if blamed := stuck(self._before, now):
                self._end(self._refusal(blamed))
            self._before, self._still = now, self._most // 2

    def run(self, done: threading.Event, stop: Path | None) -> None:
        self.beat()
        while not done.wait(self._beat_s):
            self._at.is_asked = self._at.is_asked or (stop is not None and stop.exists())
            self.beat()

    def _show(self) -> None:
        at, where = self._at, self._where() if self._still >= self._most // 2 else ""
        sign = Sign(socket.gethostname(), os.getpid(), self._beat, at.step, at.moves, at.doing, at.long, where)
        path = self._path(self._rank)
        aside = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            aside.write_text(json.dumps(sign))
            os.replace(aside, path)
        except OSError:
            pass  # the disk may be full; that alone must not end a run

    def _signs(self) -> list[Sign | None]:
        return [self._sign(rank) for rank in range(self._workers)]

    def _sign(self, rank: int) -> Sign | None:
        try:
            return Sign(*json.loads(self._path(rank).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def _path(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"

    def _where(self) -> str:
        """The innermost line of ours that the watched thread is in."""
        frame = sys._current_frames().get(self._watched)
        while frame and not frame.f_globals.get("__name__", "").startswith(OURS):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""

    def _refusal(self, blamed: dict[int, str]) -> Refusal:
        title = f"For {self._stuck_s:g} s the run did not move:"
        fix = "the same command goes on from the newest checkpoint"
        return Refusal(title, [Fault(f"worker {rank}", what, fix) for rank, what in blamed.items()], 75)


@contextmanager
def watching(watch: Watch, stop: Path | None = None) -> Iterator[None]:
    """While the block runs, the worker shows signs of life; it is asked to stop when the file `stop` appears."""
    done = threading.Event()
    thread = threading.Thread(target=watch.run, args=(done, stop), name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
