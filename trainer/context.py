"""Where a training loop runs: its rank among the workers, its device, and what it needs of the others.

`Local` is one process, or one of several on this machine that talk through gloo (NCCL on GPUs); Ray's context is
in `launch.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REFUSED = "refused.json"
STOP = "stop"
"""A file of this name in a run's folder ends the training after the next report."""

Row = dict[str, Any]
"""What a worker reports of a step: plain numbers and texts."""


class Cluster(Settings):
    """Where training runs, and on how many workers."""

    on: Literal["ray", "local"] = "ray"
    """Ray Train, or plain processes of this machine."""
    address: str | None = None
    """Ray cluster: `local` starts one for this run, `auto` joins the one this machine belongs to, or ray://host:port.
    By default the cluster of RAY_ADDRESS, which a submitted job has, else `local`."""
    workers: PositiveInt = 1
    """Data-parallel workers; each has one GPU, or a share of the CPU."""
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


@dataclass
class Local:
    """This process, alone or as one of several that `spawn` started."""

    folder: Path
    device: torch.device
    rank: int = 0
    workers: int = 1
    collect: Callable[[str, Row], None] | None = None
    """Takes the rows of rank 0."""

    def sum(self, tensor: Tensor) -> Tensor:
        return all_reduce(tensor) if self.workers > 1 else tensor

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
    """Runs work(rank, *arguments) in `cluster.workers` processes that share a process group; in this one if it is 1."""
    if cluster.workers == 1:
        work(0, *arguments)
        return
    from torch.multiprocessing.spawn import spawn as start

    with tempfile.TemporaryDirectory() as folder:
        try:
            start(_join, (work, cluster, Path(folder), arguments), nprocs=cluster.workers)
        except Exception as failure:
            if (refused := Path(folder) / REFUSED).exists():
                raise Refusal.load(refused) from failure
            raise


def _join(rank: int, work: Callable[..., None], cluster: Cluster, shared: Path, arguments: tuple[Any, ...]) -> None:
    from datetime import timedelta

    import torch
    from torch import distributed

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    on_gpu = device_for(cluster.device, rank, cluster.workers).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{shared / 'store'}",
        rank=rank,
        world_size=cluster.workers,
        timeout=timedelta(seconds=cluster.timeout_s),
    )
    try:
        work(rank, *arguments)
    except Refusal as refusal:
        refusal.save(shared / REFUSED)
        raise
    finally:
        distributed.destroy_process_group()
