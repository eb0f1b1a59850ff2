"""A run: its folder, and training in plain processes of this machine. Ray's way is in `launch.py`."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index
from data_loaders.progress import say
from data_loaders.settings import differences, dump, parse, parse_text
from trainer import checkpoint
from trainer.collect import Collector
from trainer.config import Config
from trainer.context import Local, Row, Worker, device_for, leave, spawn
from trainer.ensemble import combine
from trainer.learner import check_workers
from trainer.loop import fit, identity_of, knowledge, ledger_after
from trainer.watch import Watch, interruptible, watching

WRITER = ".writer"
"""In a run's folder, the lock of its rank 0: the workers of a driver that was killed may live a little longer."""
SWEPT = r"config\.yaml|log\.jsonl|metrics\.parquet|model|step-\d+"
"""What a training publishes in a run's folder, and below checkpoints/."""


class Run(NamedTuple):
    """A training that is done."""

    folder: Path
    facts: dict[str, Any]
    """What the collector knows of it."""


def train(config: Config) -> Run:
    """Trains in processes of this machine, and leaves everything in the run's folder.

    SIGTERM and SIGINT end it after a step, with a checkpoint, as a Refusal (75).
    """
    with interruptible():
        return _train(config)


def _train(config: Config) -> Run:
    with claimed(config) as ours:
        if ours.train.members > 1:
            for member in untrained(ours.members()):
                _train(member)
            combine(ours)
        else:
            spawn(_work, ours.cluster, dump(ours))
    return Run(ours.run_folder, {})


def untrained(configs: list[Config]) -> list[Config]:
    """Those that have not run to their last step, or whose reports were not all collected."""
    return [config for config in configs if not _is_trained(config.run_folder)]


def _is_trained(folder: Path) -> bool:
    if durable.damage(folder / "model") or not (folder / "metrics.parquet").exists():
        return False
    facts = json.loads((folder / "model" / "facts.json").read_bytes())
    return facts["step"] == facts["steps"] or facts.get("stopped_early", False)


@contextmanager
def claimed(config: Config) -> Iterator[Config]:
    """The config with whole paths, saved in the run's folder, which is this process's alone while the block runs.

    Nothing is written before the config is sure to fit the data, nor where another process is at work. Refuses a folder
    that other settings have filled.
    """
    former = _former(config)
    checked, index = _checked(config, former)
    with durable.owned(checked.run_folder) as is_sure:
        if not is_sure:
            say(f"take care: files cannot be locked in {checked.run_folder}; see that no other job writes there")
        if _former(config) != former:  # somebody was at work there in between
            checked, index = _checked(config, _former(config))
        durable.write(_saved(checked), dump(checked))
        introduce(checked, index)
        yield checked


def _saved(config: Config) -> Path:
    return config.run_folder / "config.yaml"


def _former(config: Config) -> Config | None:
    return parse(Config, [str(_saved(config))]) if _saved(config).exists() else None


def _checked(config: Config, former: Config | None) -> tuple[Config, Index]:
    """The config with whole paths, and the data, after they are sure to fit one another and what the folder holds."""
    resume, config = config.resume, config.model_copy(update={"resume": False})
    config = config.model_copy(update={"data": config.data.pinned(former.data if former else None)})
    index = check(config)
    config = config.model_copy(update={"folder": durable.lasting(config.folder, "folder")})
    if former and former.identity != config.identity:
        faults = [
            Fault(path, f"was {before}, now {after}")
            for path, before, after in differences(former, config)
            if not path.startswith(("cluster.", "tracking."))
        ]
        title = f"{config.run_folder} holds a run with other settings; give another name=…, or remove it:"
        raise Refusal(title, faults)
    if resume:
        _refuse_if_new(config)
    folder, _ = checkpoint.newest(config.run_folder)
    if folder is not None and checkpoint.state_of(folder).identity != identity_of(config, index):
        fix = "give another name=…, or remove the run"
        fault = Fault(str(config.run_folder), f"was trained on other data than {config.data.path} holds now", fix)
        raise Refusal("The run cannot go on:", [fault], 65)
    return config, index


def _refuse_if_new(config: Config) -> None:
    """Says what is gone on with, of a run or of the members of an ensemble."""
    found = []
    for one in config.members() if config.train.members > 1 else [config]:
        folder, skipped = checkpoint.newest(one.run_folder)
        found += [(folder, skipped)] if folder or skipped else []
    if not any(folder for folder, _ in found):
        fix = "leave out --resume, or give its folder=… and name=…"
        faults = [Fault(line, "cannot be used") for _, skipped in found for line in skipped]
        faults += [Fault(str(config.run_folder), "holds no checkpoint that can be used", fix)]
        raise Refusal("There is nothing to resume:", faults)
    for folder, skipped in found:
        say(*(f"skipping {line}" for line in skipped), f"resuming from {folder}")


def check(config: Config) -> Index:
    """The data, after the config is sure to fit it."""
    index = config.data.index()
    for setting in ("train", "validation"):
        if (split := getattr(config.data, setting)) not in index.splits:
            fix = f"it has {', '.join(index.splits)}; calibration needs validation rows, as splits.val=0.1 draws"
            raise Refusal("A split is missing:", [Fault(f"data.{setting}", f"no split {split!r} in the data", fix)])
    device_for(config.cluster.device, 0, config.cluster.most if config.cluster.is_here else 0)
    rows = config.data.training_rows(index)
    steps = config.train.total(len(rows), config.data.batch)
    config.data.ahead(config.data.batch)  # of evaluation, whose batches are whole on every worker
    config.model.start_hash()
    for workers in {config.cluster.least, config.cluster.most}:
        check_workers(config, workers)
    for one in config.members() if config.train.members > 1 else [config]:
        stream = one.data.sampler.over(index, rows, one.seed, steps * one.data.batch)
        ledger_after(steps, steps, one, index, knowledge(one, index, rows, stream, steps))
    return index


def introduce(config: Config, index: Index) -> None:
    """The first lines of a log: what is trained on what, and where it goes."""
    place = f"of Ray at {config.cluster.place}" if config.cluster.on == "ray" else "in processes of this machine"
    rows = len(config.data.training_rows(index))
    least, most = config.cluster.least, config.cluster.most
    workers = f"{least} to {most}" if config.cluster.on == "ray" and least < most else str(most)
    say(
        f"run {config.name} in {config.run_folder}",
        f"data {index.fingerprint}, generation {config.data.generation}, {rows:,} training rows, in {config.data.path}",
        f"settings {config.identity}",
        f"workers {workers} {place}, device {config.cluster.device}",
    )


def _work(rank: int, text: str) -> None:
    config = parse_text(Config, text)
    collector = Collector(text) if rank == 0 else None
    device = device_for(config.cluster.device, rank, config.cluster.most)

    def collect(key: str, row: Row) -> None:
        heard = len(collector.lines) if collector else 0
        if collector:
            collector.put(key, row)
            say(*collector.news(heard))

    context = Local(config.run_folder, device, rank, config.cluster.most, collect)
    try:
        with working(config, context, leave):
            fit(config, context)
            if collector:
                collector.close()
    except BaseException:
        if collector:
            with suppress(OSError, Refusal):  # what came first is what is told
                collector.close(1)
        raise


@contextmanager
def working(
    config: Config, context: Worker, end: Callable[[Refusal], None], stop: Path | None = None
) -> Iterator[None]:
    """While the block runs, this worker is watched; rank 0 waits until no other rank 0 writes there any more.

    A full disk becomes a Refusal (74).
    """
    watch = Watch(context.folder, context.rank, context.workers, context.at, config.cluster.stuck_s, end)
    with watching(watch, stop), ExitStack() as stack:
        if context.rank == 0:
            stack.enter_context(durable.owned(context.folder, WRITER, config.cluster.stuck_s))
            for folder in (context.folder, context.folder / "checkpoints"):
                durable.sweep(folder, SWEPT)
        try:
            yield
        except OSError as wrong:
            number = durable.error_number(wrong)
            if number not in durable.FULL:
                raise
            raise durable.no_room(Path(wrong.filename or context.folder), number, None) from wrong
