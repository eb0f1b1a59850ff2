"""Where a training loop runs: its rank among the workers, its device, and what it needs of the others.

`Local` is one process, or one of several on this machine that talk through gloo (NCCL on GPUs); Ray's context is
in `launch.py`.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from trainer.watch import ANSWERS, WAITING, Answer, At, Vote, interrupted, interruptible, is_asked_to_stop

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    import torch
    from torch import Tensor

REFUSED = "refused.json"
STOP = "stop"
"""A file of this name in a run's folder ends the training after the next report."""

POLL_S = 0.1
GRACE_S = 5.0
"""What the others have to close their files when one worker has failed."""
HASTE_S = 1.0
"""What they have when one fails that was asked to stop, since it had not yet begun."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
_started_by: Path | None = None
"""Of a worker that `spawn` started: where it leaves what it refuses."""

Row = dict[str, Any]
"""What a worker reports of a step: plain numbers and texts."""


class Cluster(Settings):
    """Where training runs, and on how many workers."""

    on: Literal["ray", "local"] = "ray"
    """Ray Train, or plain processes of this machine."""
    address: str | None = None
    """Ray cluster: `local` starts one for this run, `auto` joins the one this machine belongs to, or ray://host:port.
    By default the cluster of RAY_ADDRESS, which a submitted job has, else `local`."""
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Data-parallel workers; each has one GPU, or a share of the CPU. Of `[1, 4]`, Ray starts as many as there is room
    for, and goes on with fewer or more of them when nodes go or come; plain processes are always the greater number."""
    resize_s: PositiveFloat = 60.0
    """Seconds between two looks of Ray whether there is room for more workers."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto` takes GPUs when there are enough for all workers."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that Ray sets aside for each worker."""
    threads: PositiveInt = 1
    """Threads of torch in each worker on a CPU."""
    max_failures: NonNegativeInt = 3
    """Times that Ray starts the workers again after a failure; each goes on from the newest checkpoint."""
    timeout_s: PositiveFloat = 300.0
    """Seconds that a worker waits for the others before the run fails."""
    stuck_s: PositiveFloat = 180.0
    """Seconds that nothing moves before the worker that keeps the others waiting is named and ended; of use where it is
    less than timeout_s."""

    @field_validator("workers", mode="before")
    @classmethod
    def _one_number_or_two(cls, value: Any) -> Any:
        with suppress(ValueError):
            least, *rest = numbers = [int(str(n)) for n in (value if isinstance(value, list | tuple) else [value])]
            if 0 < least <= numbers[-1] and len(rest) < 2:
                return tuple(numbers) if rest else least
        raise ValueError("it is a number of workers, or the least and the greatest, as in [1, 4]")

    @property
    def least(self) -> int:
        """Workers that a run cannot do without."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Workers that a run has when there is room for them."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def place(self) -> str:
        """The address of the Ray cluster."""
        return self.address or os.environ.get("RAY_ADDRESS") or "local"

    @property
    def is_here(self) -> bool:
        """Whether all workers run on this machine."""
        return self.on == "local" or self.place == "local"


class Context(Protocol):
    """What the loop knows of the world."""

    @property
    def rank(self) -> int: ...
    @property
    def workers(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def folder(self) -> Path:
        """The run's folder, the same for all workers."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, on each of them; every worker must call it."""
        ...

    def report(self, key: str, row: Row, checkpoint: Path | None) -> None:
        """Hands a row to the collector, once for each key. Every worker calls it; rank 0's row counts."""
        ...

    def progress(self, step: int, doing: str, long: bool = False) -> None:
        """Says what this worker does from now on, which costs nothing. Without a word for `cluster.stuck_s`, it is held
        for stuck; not in the first step, nor between two steps, nor where nobody can tell how `long` it takes."""
        ...

    def ask_to_stop(self) -> Answer:
        """What to do after this step, the same for all workers; every worker calls it once a step."""
        ...


@dataclass
class Worker:
    """What every kind of worker knows and can do."""

    folder: Path
    device: torch.device
    rank: int = 0
    workers: int = 1
    at: At = field(default_factory=At, kw_only=True)
    """How far it has come, for a `Watch` to see."""
    _vote: Vote | None = field(default=None, kw_only=True)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.workers == 1:
            return tensor
        doing = self.at.doing
        self._does(WAITING)
        total = all_reduce(tensor)
        self._does(doing)
        return total

    def progress(self, step: int, doing: str, long: bool = False) -> None:
        at = self.at
        if step != at.step:
            at.step, at.moves = step, 0
        at.doing, at.long = doing, long or not at.is_warm
        at.moves += 1

    def ask_to_stop(self) -> Answer:
        wanted = ANSWERS.index("stop") if self.at.is_asked or is_asked_to_stop() else 0
        wanted, is_time = self._agreed((wanted, self.is_time_to_look()))
        if is_time and self.is_noticed():
            wanted = max(wanted, ANSWERS.index("checkpoint"))
        self.at.is_stopping, self.at.is_warm = ANSWERS[wanted] == "stop", True
        self.progress(self.at.step, "between two steps", long=True)  # validating, calibrating, publishing
        return ANSWERS[wanted]

    def is_time_to_look(self) -> bool:
        """Whether this worker wants all of them to look for a notice."""
        return False

    def is_noticed(self) -> bool:
        """Whether there is notice that a machine will go; all workers look at once."""
        return False

    def _agreed(self, mine: Sequence[int]) -> Sequence[int]:
        if self.workers == 1:
            return mine
        self._vote = self._vote or Vote()
        doing = self.at.doing
        self._does(WAITING)
        agreed = self._vote(mine)
        self._does(doing)
        return agreed

    def _does(self, doing: str) -> None:
        self.at.doing = doing
        self.at.moves += 1


@dataclass
class Local(Worker):
    """This process, alone or as one of several that `spawn` started."""

    collect: Callable[[str, Row], None] | None = None
    """Takes the rows of rank 0."""

    def report(self, key: str, row: Row, checkpoint: Path | None) -> None:
        if self.collect is not None and self.rank == 0:
            self.collect(key, row)


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over the process group, as a new tensor."""
    from torch import distributed

    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def device_for(choice: Literal["auto", "cpu", "gpu"], number: int = 0, workers: int = 1) -> torch.device:
    """The device of the worker with this number, of so many on this machine."""
    import torch

    gpus = torch.cuda.device_count()
    if choice == "gpu" and gpus < workers:
        fault = Fault("device", f"{workers} GPUs are asked for, and this machine has {gpus}", "set it to cpu or auto")
        raise Refusal("There are too few GPUs:", [fault])
    return torch.device("cuda", number) if choice != "cpu" and gpus >= max(workers, 1) else torch.device("cpu")


def spawn(work: Callable[..., None], cluster: Cluster, *arguments: Any) -> None:
    """Runs work(rank, *arguments) in `cluster.most` processes that share a process group; in this one if it is 1.

    When one fails, the others have some seconds to end. A process that is asked to stop, as `interruptible` tells, asks
    all workers. Raises the Refusal that a worker raised, or one (75) that says how a worker was ended.
    """
    if cluster.most == 1:
        work(0, *arguments)
        return
    from multiprocessing import get_context

    start = get_context("spawn").Process
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        processes = [
            start(target=_join, args=(rank, work, cluster, shared, os.getpid(), arguments))
            for rank in range(cluster.most)
        ]
        try:
            for process in processes:
                process.start()
            failed = _first_that_fails(processes)
        finally:
            _end(processes)
        if failed is not None:
            raise _failure(failed, processes[failed], shared)


def leave(refusal: Refusal) -> NoReturn:
    """Ends this process at once, from any thread, with something to say."""
    if _started_by:
        refusal.save(_started_by / REFUSED)
    else:
        print(refusal, file=sys.stderr, flush=True)
    os._exit(1 if _started_by else refusal.exit_code)


def _first_that_fails(processes: Sequence[BaseProcess]) -> int | None:
    """Waits until one fails, or all have ended; the rank of the one that ended first otherwise than well. Those that
    stop because all agreed on it need no haste."""
    from multiprocessing.connection import wait

    failed, was_told = None, False
    while living := [process for process in processes if process.is_alive()]:
        if is_asked_to_stop() and not was_told:
            was_told = True
            for process in living:
                process.terminate()
        wait([process.sentinel for process in living], POLL_S)
        codes = [process.exitcode for process in processes]
        failed = _first_bad(codes) if failed is None else failed
        if any(code not in {None, 0, 75} for code in codes):
            break
    return _first_bad([process.exitcode for process in processes]) if failed is None else failed


def _first_bad(codes: Sequence[int | None]) -> int | None:
    return next((rank for rank, code in enumerate(codes) if code), None)


def _end(processes: Sequence[BaseProcess]) -> None:
    """Waits for those that still run, and kills the rest, which may be frozen."""
    until = time.monotonic() + (HASTE_S if is_asked_to_stop() else GRACE_S)
    for process in processes:
        if process.pid:
            process.join(max(0, until - time.monotonic()))
            process.kill()
            process.join()


def _failure(rank: int, process: BaseProcess, shared: Path) -> Exception:
    """Why this worker failed."""
    if (refused := shared / REFUSED).exists():
        return Refusal.load(refused)
    if is_asked_to_stop():
        return interrupted()
    if (traceback := _traceback(shared, rank)).exists():
        return RuntimeError(f"worker {rank} failed:\n{traceback.read_text()}")
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"terminated with exit code {code}"
    fix = "often the memory was full; the same command goes on from the newest checkpoint"
    return Refusal("Training failed:", [Fault(f"worker {rank}", how, fix)], 75)


def _traceback(shared: Path, rank: int) -> Path:
    return shared / f"traceback-{rank}.txt"


def _join(
    rank: int, work: Callable[..., None], cluster: Cluster, shared: Path, parent: int, arguments: tuple[Any, ...]
) -> None:
    """What a process does that `spawn` started."""
    import traceback

    from torch import distributed

    global _started_by
    _started_by, code = shared, 0
    _end_with(parent)
    with interruptible(again_ends=False):
        try:
            _enter_group(rank, cluster, shared)
            work(rank, *arguments)
        except Refusal as refusal:
            refusal.save(shared / REFUSED)
            code = refusal.exit_code
        except Exception:
            _traceback(shared, rank).write_text(traceback.format_exc())
            code = 1
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take an interpreter with torch apart needs longer than to write a checkpoint


def _end_with(parent: int) -> None:
    """Lets the system end this process with the one that started it, however that ends."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _enter_group(rank: int, cluster: Cluster, shared: Path) -> None:
    from datetime import timedelta

    import torch
    from torch import distributed

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    on_gpu = device_for(cluster.device, rank, cluster.most).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{shared / 'store'}",
        rank=rank,
        world_size=cluster.most,
        timeout=timedelta(seconds=cluster.timeout_s),
    )
