"""Ray Train: the same loop on the workers of a cluster, and one collector beside the driver.

What Ray really does, and why each step is so, is told in docs/architecture.md.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.progress import say
from data_loaders.settings import dump, parse_text
from trainer import checkpoint
from trainer.collect import Collector
from trainer.config import Config
from trainer.context import REFUSED, STOP, Cluster, Row, Worker
from trainer.ensemble import combine
from trainer.loop import fit
from trainer.run import Run, claimed, untrained, working
from trainer.watch import WAITING, interrupted, interruptible, is_asked_to_stop

COLLECTOR_TIMEOUT_S = 120
"""Beyond what W&B may take of it."""
FOLLOW_EVERY_S = 0.5
NOTICE_EVERY_S = 5.0
"""Between two looks whether a machine will go: each costs all workers some milliseconds."""
SETTLE_S = 10
SPARE_CPUS = 2
"""For what Ray does beside the workers."""


def train(config: Config, callbacks: Sequence[UserCallback] = ()) -> Run:
    """Trains on the workers of a Ray cluster, and leaves everything in the run's folder; callbacks hear each report.

    SIGTERM and SIGINT end it after a step, with a checkpoint, as a Refusal (75).
    """
    with claimed(config) as ours, cluster(ours.cluster):
        stop = ours.run_folder / "ray" / f"{uuid.uuid4().hex[:8]}-{STOP}"
        durable.make_folder(stop.parent)
        with interruptible(stop.touch):
            if ours.train.members > 1:
                _train_members(ours, stop)
                return Run(ours.run_folder, {})
            return _train(ours, stop, callbacks)


def _train(config: Config, stop: Path, callbacks: Sequence[UserCallback] = ()) -> Run:
    """Trains one model, until a file `stop` is there."""
    text, notes = dump(config), Notes(config.run_folder / "ray" / uuid.uuid4().hex[:8])
    durable.make_folder(notes.folder)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    collector: Any = ray.remote(**options)(Collector).remote(text)
    exit_code = 1
    try:
        with following(collector):
            arguments = {"config": text, "notes": str(notes.folder), "stop": str(stop)}
            _trainer(config, arguments, [ToCollector(collector, notes), *callbacks]).fit()
            _settle(config, collector)
        notes.raise_refusal()
        if is_asked_to_stop() and durable.damage(config.run_folder / "model"):
            raise interrupted(config.run_folder)
        exit_code = 0
    except (ray.train.TrainingFailedError, RayError) as failure:
        notes.raise_refusal(failure)
        faults = [
            *notes.stuck(),
            *(
                Fault(f"worker {rank}", str(wrong).strip().splitlines()[-1])
                for rank, wrong in getattr(failure, "worker_failures", {}).items()
            ),
        ] or [Fault(config.name, str(failure))]
        title = "Training failed. The same command goes on from the newest checkpoint; the first cause was:"
        raise Refusal(title, faults, 75) from failure
    finally:
        timeout = config.tracking.timeout_s + COLLECTOR_TIMEOUT_S
        facts: Any = ray.get(collector.close.remote(exit_code), timeout=timeout)
        ray.kill(collector)
    return Run(config.run_folder, facts)


def _train_members(config: Config, stop: Path) -> None:
    """Trains the members of an ensemble, as many at once as there is room for, and averages them."""

    def train_member(member: Config) -> None:
        with claimed(member) as ours:
            _train(ours, stop)

    pool = ThreadPoolExecutor(room(config.cluster))
    try:
        list(pool.map(train_member, untrained(config.members())))
    finally:
        pool.shutdown(wait=stop.exists(), cancel_futures=True)  # after a failure, the others end with Ray
    combine(config)


@dataclass
class Notes:
    """What workers leave for the driver, in a folder: what they refuse, and which of them were stuck."""

    folder: Path

    @property
    def refused(self) -> Path:
        return self.folder / REFUSED

    def raise_refusal(self, cause: Exception | None = None) -> None:
        if self.refused.exists():
            raise Refusal.load(self.refused) from cause

    def leave(self, refusal: Refusal) -> NoReturn:
        """Ends this worker, from any thread, so that Ray starts it again."""
        refusal.save(self.folder / f"stuck-{uuid.uuid4().hex[:8]}.json")
        os._exit(1)

    def stuck(self) -> list[Fault]:
        return [fault for path in sorted(self.folder.glob("stuck-*.json")) for fault in Refusal.load(path).faults]


def room(settings: Cluster) -> int:
    """How many trainings of this size the cluster has room for at once; at least 1, for which Ray waits."""
    there = ray.cluster_resources()
    rooms = [(there.get("CPU", 0) - SPARE_CPUS) // (settings.most * settings.cpus_per_worker)]
    if _on_gpus(settings):
        rooms.append(there.get("GPU", 0) // settings.most)
    return max(1, int(min(rooms)))


def _settle(config: Config, collector: Any) -> None:
    """Waits until the last report has come to the collector; reports reach it by way of Ray's controller."""
    folder, _ = checkpoint.newest(config.run_folder)
    if folder is None:
        return
    state = checkpoint.state_of(folder)
    if state.report is None:  # a checkpoint between two reports
        return
    until = time.monotonic() + SETTLE_S
    while not ray.get(collector.knows.remote(state.key)):
        if time.monotonic() > until:
            ray.get(collector.put.remote(state.key, state.report))
        time.sleep(0.05)


@dataclass
class RayContext(Worker):
    """A worker of Ray Train."""

    _looked: float = 0.0
    _noticed: object = None

    def report(self, key: str, row: Row, checkpoint: Path | None) -> None:
        """Ray gets the row, and for its tools a pointer to the checkpoint, which is published already."""
        self._does(WAITING)
        metrics = {"key": key, "row": row if self.rank == 0 else {}, "rank": self.rank}
        if checkpoint is None:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as pointer:
            (Path(pointer) / "checkpoint.json").write_text(json.dumps({"path": str(checkpoint)}))
            ray.train.report(metrics, ray.train.Checkpoint.from_directory(pointer), checkpoint_dir_name=key)

    def is_time_to_look(self) -> bool:
        is_time = self.rank == 0 and time.monotonic() >= self._looked + NOTICE_EVERY_S
        if is_time:
            self._looked = time.monotonic()
        return is_time

    def is_noticed(self) -> bool:
        """Once for each notice."""
        former, self._noticed = self._noticed, ray.train.get_preemption_info()
        return self._noticed is not None and self._noticed != former


class ToCollector(UserCallback):
    """Hands the rows to the collector, from Ray's controller. It never raises, which would end the run, nor waits."""

    def __init__(self, collector: Any, notes: Notes) -> None:
        self.collector, self.notes, self.told = collector, notes, 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        try:
            for report in metrics:
                if report["rank"] == 0:
                    self.collector.put.remote(report["key"], report["row"])
        except Exception as wrong:
            say(f"a report was not collected: {wrong!r}")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        try:
            stuck = self.notes.stuck()[self.told :]
            self.told += len(stuck)
            faults = {str(rank): repr(wrong)[:500] for rank, wrong in worker_exceptions.items()}
            faults |= {fault.where.removeprefix("worker "): fault.what for fault in stuck}
            self.collector.put.remote(f"exception-{uuid.uuid4().hex[:8]}", {"exceptions": faults})
        except Exception as wrong:
            say(f"an exception was not collected: {wrong!r}")


@contextmanager
def cluster(settings: Cluster) -> Iterator[None]:
    """A connection to the cluster; one that is open already is used, and left open."""
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(settings.stuck_s))
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(settings.timeout_s))
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")  # of what a dead worker leaves behind
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")  # a training has more processes than CPUs
    address = settings.place
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        # More CPUs than there are only means that processes share them; too few would make Ray wait for ever.
        each = settings.most * settings.cpus_per_worker
        trainings = max(1, (os.cpu_count() or 1) // each)
        options |= {"num_cpus": trainings * each + SPARE_CPUS, "include_dashboard": False}
        options |= {"object_store_memory": 150 * 2**20}
    say("starting Ray" if address == "local" else f"joining the Ray cluster at {address}")
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as wrong:
        fix = "start one (make head), or give another address; `local` starts one for this run"
        fault = Fault("cluster.address", f"{address}: {str(wrong).strip().splitlines()[0]}", fix)
        raise Refusal("The Ray cluster cannot be joined:", [fault], 75) from wrong
    token = Path.home() / ".ray" / "auth_token"
    if token.exists() and token.stat().st_mode & 0o077:
        token.chmod(0o600)  # Ray 2.60 leaves it readable to all
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def following(collector: Any) -> Iterator[None]:
    """While the block runs, what the collector has to say appears on standard error."""
    done = threading.Event()

    def follow() -> None:
        heard = 0
        while True:
            last = done.wait(FOLLOW_EVERY_S)
            try:
                news = ray.get(collector.news.remote(heard), timeout=COLLECTOR_TIMEOUT_S)
            except RayError:
                return  # the collector is gone, which the driver learns elsewhere
            say(*news)
            heard += len(news)
            if last:
                return

    thread = threading.Thread(target=follow, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(COLLECTOR_TIMEOUT_S)


def _on_gpus(settings: Cluster) -> bool:
    enough = ray.cluster_resources().get("GPU", 0) >= settings.least
    return settings.device == "gpu" or (settings.device == "auto" and enough)


def _trainer(config: Config, arguments: dict[str, str], callbacks: list[UserCallback]) -> TorchTrainer:
    settings, use_gpu = config.cluster, _on_gpus(config.cluster)
    many = str(settings.most) if settings.least == settings.most else f"{settings.least} to {settings.most}"
    say(f"starting {many} worker{'s' * (settings.most > 1)} on {'GPUs' if use_gpu else 'CPUs'}")
    return (LocalTrainer if settings.place == "local" else Trainer)(
        _work,
        train_loop_config=arguments,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(settings.timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=settings.resize_s,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=f"launch-{uuid.uuid4().hex[:8]}",  # Ray's own record; what a run goes on from is our checkpoint
            storage_path=str(config.run_folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures, controller_failure_limit=3),
            callbacks=callbacks,
        ),
    )


class Trainer(TorchTrainer):
    """Without a handler of its own for SIGINT, which would end the workers in the midst of a step."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


class LocalTrainer(Trainer):
    """Without the actor that frees what a dead controller held: it needs the dashboard, which a Ray of our own has not,
    and each training would wait 12 s for it."""

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if type(c).__name__ != "PlacementGroupCleanerCallback"]


def _work(arguments: dict[str, str]) -> None:
    """What a worker of Ray Train does."""
    import ray.train.v2._internal.execution.context as reporting

    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)  # else each report is printed, whole, by each rank
    config, notes, stop = parse_text(Config, arguments["config"]), Notes(Path(arguments["notes"])), arguments["stop"]
    if notes.refused.exists() or Path(stop).exists():
        return  # Ray starts the workers again; what was refused once would be refused again
    where = ray.train.get_context()
    context = RayContext(config.run_folder, get_device(), where.get_world_rank(), where.get_world_size())
    try:
        with working(config, context, notes.leave, Path(stop)):
            fit(config, context)
    except Refusal as refusal:
        refusal.save(notes.refused)
        if not context.at.is_stopping or refusal.exit_code != 75:  # when stopping, all workers do; else Ray must hear
            raise
