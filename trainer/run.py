"""A run: its folder, and training in plain processes of this machine. Ray's way is in `launch.py`."""

import json
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
from trainer.context import Local, Row, device_for, spawn
from trainer.ensemble import combine
from trainer.loop import first_ledger, fit, identity_of


class Run(NamedTuple):
    """A training that is done."""

    folder: Path
    facts: dict[str, Any]
    """What the collector knows of it."""


def train(config: Config) -> Run:
    """Trains in processes of this machine, and leaves everything in the run's folder."""
    config = claim(config)
    if config.train.members > 1:
        for member in untrained(config.members()):
            train(member)
        combine(config)
    else:
        spawn(_work, config.cluster, dump(config))
    return Run(config.run_folder, {})


def untrained(configs: list[Config]) -> list[Config]:
    """Those that have not run to their last step, or whose reports were not all collected."""
    return [config for config in configs if not _is_trained(config.run_folder)]


def _is_trained(folder: Path) -> bool:
    if durable.damage(folder / "model") or not (folder / "metrics.parquet").exists():
        return False
    facts = json.loads((folder / "model" / "facts.json").read_bytes())
    return facts["step"] == facts["steps"]


def claim(config: Config) -> Config:
    """The config with whole paths, saved in the run's folder, after it is sure to fit the data.

    Refuses a folder that other settings have filled.
    """
    saved = config.run_folder / "config.yaml"
    former = parse(Config, [str(saved)]) if saved.exists() else None
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
    folder, _ = checkpoint.newest(config.run_folder)
    if folder is not None and checkpoint.state_of(folder).identity != identity_of(config, index):
        fix = "give another name=…, or remove the run"
        fault = Fault(str(config.run_folder), f"was trained on other data than {config.data.path} holds now", fix)
        raise Refusal("The run cannot go on:", [fault], 65)
    durable.write(saved, dump(config))
    introduce(config, index)
    return config


def check(config: Config) -> Index:
    """The data, after the config is sure to fit it."""
    index = config.data.index()
    for setting in ("train", "validation"):
        if (split := getattr(config.data, setting)) not in index.splits:
            fix = f"it has {', '.join(index.splits)}; calibration needs validation rows, as splits.val=0.1 draws"
            raise Refusal("A split is missing:", [Fault(f"data.{setting}", f"no split {split!r} in the data", fix)])
    device_for(config.cluster.device, 0, config.cluster.workers if config.cluster.is_here else 0)
    rows = config.data.training_rows(index)
    drawn = config.train.total(len(rows), config.data.batch) * config.data.batch
    for one in config.members() if config.train.members > 1 else [config]:
        first_ledger(one, index, one.data.sampler.over(index, rows, one.seed).counts(0, drawn))
    return index


def introduce(config: Config, index: Index) -> None:
    """The first lines of a log: what is trained on what, and where it goes."""
    place = f"of Ray at {config.cluster.place}" if config.cluster.on == "ray" else "in processes of this machine"
    rows = len(config.data.training_rows(index))
    say(
        f"run {config.name} in {config.run_folder}",
        f"data {index.fingerprint}, generation {config.data.generation}, {rows:,} training rows, in {config.data.path}",
        f"settings {config.identity}",
        f"workers {config.cluster.workers} {place}, device {config.cluster.device}",
    )


def _work(rank: int, text: str) -> None:
    config = parse_text(Config, text)
    collector = Collector(text) if rank == 0 else None
    device = device_for(config.cluster.device, rank, config.cluster.workers)
    exit_code = 1

    def collect(key: str, row: Row) -> None:
        heard = len(collector.lines) if collector else 0
        if collector:
            collector.put(key, row)
            say(*collector.news(heard))

    try:
        fit(config, Local(config.run_folder, device, rank, config.cluster.workers, collect))
        exit_code = 0
    finally:
        if collector:
            collector.close(exit_code)
