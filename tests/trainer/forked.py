"""A process that has imported everything, and runs trainings in forks of itself: so that they start at once, and may be
killed at any moment. `Trainings` talks to it in lines of JSON.

A training is what `jobs.train` does, with workers that are forked too.
"""

import ctypes
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).parent.parent.parent
PR_SET_CHILD_SUBREAPER = 36
"""Of prctl(2): orphans become children of this process."""
ORPHANS_S = 10.0
"""What those that a driver leaves behind have to end by themselves."""

FOLDER_AT = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}
"""Python's audit events -> which argument is the open folder that a path is in, -1 for none."""


class Life(NamedTuple):
    """Of a training, until it was done or killed."""

    code: int
    """Of the driver; the number of a signal is negative."""
    seconds: float
    orphans_s: float
    """Until the last process had ended that the driver left behind."""
    said: str
    learnt: dict[int, list[int]]
    """The rows of each step that all workers did, in the order of their places in the batch."""
    doing: list[list[str]]
    """What each worker was doing when it ended, also at the same time; what it began first comes first."""
    changes: int
    """Names that rank 0 made, changed or removed in the run's folder."""


class Trainings:
    """The server's other end."""

    def __enter__(self) -> Self:
        words = [sys.executable, str(Path(__file__))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "trainer")])}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        self.audits = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, kind: type[BaseException] | None, wrong: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.audits.cleanup()

    def __call__(self, config: str, **how: Any) -> Life:
        """Runs a training, until it is done. It may be killed: `after_s`, all of it, or the driver or one worker, as
        `whom` says. Or its last worker sends itself a `signal` in the step `at`; or rank 0, before it changes a name
        in the run's folder for the time `at_change`."""
        assert self.process.stdin
        assert self.process.stdout
        with tempfile.TemporaryDirectory(dir=self.audits.name) as audit:
            (Path(audit) / "said").touch()
            self.process.stdin.write(json.dumps({"config": config, "audit": audit, **how}) + "\n")
            self.process.stdin.flush()
            ended = json.loads(self.process.stdout.readline())
            return _life(Path(audit), **ended)


def _life(audit: Path, **ended: Any) -> Life:
    """What the workers wrote down."""
    written = [list(_lines(path)) for path in sorted(audit.glob("*.jsonl"), key=lambda path: int(path.stem))]
    steps = [{line["step"]: line["rows"] for line in lines if "rows" in line} for lines in written]
    shared = set.intersection(*map(set, steps)) if steps else set()
    learnt = {step: [row for rank in steps for row in rank[step]] for step in sorted(shared)}
    changes = sum("change" in line for lines in written[:1] for line in lines)
    doing = [_open(lines) for lines in written or [[]]]
    return Life(**ended, said=(audit / "said").read_text(), learnt=learnt, doing=doing, changes=changes)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines: a process may be killed while it writes the last one."""
    return (json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))


def _open(lines: list[dict[str, Any]]) -> list[str]:
    """What was begun, and not ended."""
    found: list[str] = [] if any("ends" in line for line in lines) else ["starting"]
    for line in lines:
        if "begins" in line:
            found.append(line["begins"])
        elif "ends" in line:
            found.remove(line["ends"])
    return found or ["something else"]


# ------------------------------------------------------------------ the server


def main() -> None:
    import pandas  # noqa: F401  # by pyarrow, when it first makes an array
    import torch
    import torch._dynamo  # by the first optimiser

    import trainer.context
    import trainer.run  # for the forks to have

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    trainer.context.GRACE_S = 1.0  # workers that wait for a dead one to join wait in vain
    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forked  # pyright: ignore[reportAttributeAccessIssue]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for line in sys.stdin:
        print(json.dumps(_live(json.loads(line))), flush=True)
    os._exit(0)  # torch takes seconds to take itself apart


def _live(request: dict[str, Any]) -> dict[str, Any]:
    """Runs a training, and ends it where that is wanted."""
    began = time.monotonic()
    driver = os.fork()
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(driver, driver or os.getpid())  # both do it, so that it is done for both
    if not driver:
        os._exit(_drive(request))
    status = None
    if "after_s" in request:
        while status is None and time.monotonic() < began + request["after_s"]:
            pid, found = os.waitpid(driver, os.WNOHANG)
            status = found if pid else None
            time.sleep(0.0005)
        if status is None:
            _kill(driver, request.get("whom", "all"))
    status = os.waitpid(driver, 0)[1] if status is None else status
    ended = time.monotonic()
    _reap(driver)
    code, orphans_s = os.waitstatus_to_exitcode(status), time.monotonic() - ended
    return {"code": code, "seconds": ended - began, "orphans_s": orphans_s}


def _kill(driver: int, whom: str) -> None:
    """All processes of a training, its driver, or one of its workers; all, where it has none."""
    workers = [int(pid) for pid in Path(f"/proc/{driver}/task/{driver}/children").read_text().split()]
    with suppress(ProcessLookupError):  # it may just have ended
        if whom == "all" or (whom == "worker" and not workers):
            os.killpg(driver, signal.SIGKILL)
        else:
            os.kill(driver if whom == "driver" else random.choice(workers), signal.SIGKILL)


def _reap(group: int) -> None:
    """Waits for the orphans of a group; ends them when that takes too long."""
    until = time.monotonic() + ORPHANS_S
    while True:
        try:
            pid, _ = os.waitpid(-group, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid and time.monotonic() > until:
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.0005)


# ------------------------------------------------------------------ a training


def _drive(request: dict[str, Any]) -> int:
    """The driver, as `jobs.train` is one."""
    import traceback

    from data_loaders.faults import Refusal
    from data_loaders.settings import parse_text
    from trainer import run
    from trainer.config import Config

    said = os.open(Path(request["audit"]) / "said", os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(said, number)
    config = parse_text(Config, request["config"])
    run._work = _audited(run._work, request)  # pyright: ignore[reportPrivateUsage]
    try:
        run.train(config)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return refusal.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _audited(work: Callable[[int, str], None], request: Mapping[str, Any]) -> Callable[[int, str], None]:
    """A worker that writes down what it does, and may end itself."""

    def audited(rank: int, text: str) -> None:
        from data_loaders.settings import parse_text
        from trainer.config import Config

        config = parse_text(Config, text)
        handle = os.open(Path(request["audit"]) / f"{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note(**what: Any) -> None:
            os.write(handle, (json.dumps(what) + "\n").encode())

        _note_steps(note, request, rank == config.cluster.most - 1)
        _note_phases(note)
        if rank == 0:
            _note_changes(note, config.run_folder, request.get("at_change"))
        work(rank, text)

    return audited


def _note_phases(note: Callable[..., None]) -> None:
    """Lets a worker say when it begins and ends to do something."""
    from trainer import checkpoint, loop
    from trainer.collect import Collector

    for name, place, attribute in (
        ("going on", loop, "_go_on"),
        ("validating", loop, "_validate"),
        ("writing a checkpoint", checkpoint.Writer, "_publish"),
        ("logging", Collector, "put"),
        ("finishing", loop, "finish"),
        ("calibrating", loop, "calibrate"),
        ("writing the model", checkpoint, "save_model"),
        ("tabulating", Collector, "close"),
    ):
        setattr(place, attribute, _noted(name, getattr(place, attribute), note))


def _noted(name: str, function: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    @wraps(function)
    def noted(*arguments: Any, **named: Any) -> Any:
        note(begins=name)
        try:
            return function(*arguments, **named)
        finally:
            note(ends=name)

    return noted


def _note_steps(note: Callable[..., None], request: Mapping[str, Any], is_last: bool) -> None:
    """Writes down the rows of each step when it is done; images are known again by where they lie."""
    from trainer import loop
    from trainer.learner import Learner

    loaded, step, rows = loop.training_batches, Learner.step, {}

    def batches(*arguments: Any, **how: Any) -> Iterator[Any]:
        source = loaded(*arguments, **how)
        try:
            while True:
                note(begins="loading")
                batch = next(source, None)
                note(ends="loading")
                if batch is None:
                    return
                rows[batch.images.ctypes.data] = batch.rows.tolist()
                yield batch
        finally:
            source.close()

    def noted(self: Learner, batch: Any, partners: Any, number: int) -> Any:
        if is_last and request.get("at") == number:
            os.kill(os.getpid(), signal.Signals[request["signal"]])
        note(begins="computing")
        outcome = step(self, batch, partners, number)
        note(ends="computing", step=number, rows=rows.pop(batch.images.data_ptr()))
        return outcome

    loop.training_batches, Learner.step = batches, noted  # pyright: ignore[reportAttributeAccessIssue]


def _note_changes(note: Callable[..., None], run: Path, last: int | None) -> None:
    """Counts what happens to names in a run's folder; before the `last` one, the process ends."""
    from trainer.watch import FOLDER

    done = 0

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event not in FOLDER_AT and not (event == "open" and arguments[2] & os.O_CREAT):
            return
        path, handle = Path(str(arguments[0])), arguments[FOLDER_AT[event]] if event in FOLDER_AT else -1
        if handle >= 0:
            path = Path(os.readlink(f"/proc/self/fd/{handle}")) / path
        if run not in (path, *path.parents) or path.parent.name == FOLDER:
            return
        done += 1
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
        note(change=f"{event} {path}")

    sys.addaudithook(seen)


if __name__ == "__main__":
    main()
