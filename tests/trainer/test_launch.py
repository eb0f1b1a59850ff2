"""The same loop under Ray Train, with two workers and one collector, on a real local Ray."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb_file
from small_runs import CPU, config_for

from data_loaders.settings import dump, parse_text
from trainer.config import Config
from trainer.context import Cluster, Local, spawn
from trainer.loop import fit

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray's own imports warn
RAY = {"cluster": {"on": "ray", "workers": 2, "device": "cpu"}, "tracking.mode": "offline"}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    from trainer.launch import cluster

    with cluster(Cluster(workers=2, device="cpu")):
        yield


def _worker(rank: int, text: str) -> None:
    config = parse_text(Config, text)
    fit(config, Local(config.run_folder, CPU, rank, 2))


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights of the same run with two processes and without Ray."""
    config = config_for(dataset, tmp_path_factory.mktemp("alone"), **{"train.steps": 200, "train.report_every": 20})
    config.run_folder.mkdir()
    spawn(_worker, Cluster(on="local", workers=2, device="cpu"), dump(config))
    return (config.run_folder / "model" / "model.safetensors").read_bytes()


def test_a_killed_worker_costs_time_and_nothing_else(dataset, tmp_path, ray_cluster, alone):
    """Trains on Ray while a worker is killed: the same weights as without Ray and without the kill, each interval
    collected once, one W&B run closed by the driver, and a table of metrics."""
    import pyarrow.parquet

    from trainer.launch import train

    config = config_for(dataset, tmp_path, **{"train.steps": 200, "train.report_every": 20}, **RAY)
    log = config.run_folder / "log.jsonl"
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.02)
            rows = [json.loads(line)["row"] for line in log.read_text().splitlines()] if log.exists() else []
            if len(rows) >= 2:
                killed.append(rows[0]["speed"]["pid"])
                os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    run = train(config)
    thread.join()

    assert killed
    assert (run.folder / "model" / "model.safetensors").read_bytes() == alone
    assert run.facts["rows"] == 10
    assert run.facts["mismatched"] == 0
    assert run.facts["tracking_problem"] is None
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line["row"]["step"] for line in lines if "step" in line["row"]]
    assert sorted(steps) == list(range(20, 201, 20))
    assert len({line["row"]["speed"]["pid"] for line in lines if "step" in line["row"]}) == 2
    assert [line["key"] for line in lines if line["key"].startswith("exception")]

    (found,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    assert sorted(line["step"] for line in wandb_file.history(found) if "lr" in line) == sorted(steps)
    assert wandb_file.exit_codes(found) == [0]
    table = pyarrow.parquet.read_table(run.folder / "metrics.parquet").to_pylist()
    assert {r["step"] for r in table} == set(steps)
    trained = {
        r["step"]: r["n"] for r in table if (r["split"], r["metric"], r["group"]) == ("train", "accuracy", "all")
    }
    assert trained == dict.fromkeys(steps, 20 * 16)


def test_what_a_worker_refuses_ends_the_run_with_its_cause_and_its_code(dataset, tmp_path, ray_cluster):
    import shutil

    from data_loaders.faults import Refusal
    from data_loaders.index import open_index
    from trainer.launch import train

    copy = shutil.copytree(dataset, tmp_path / "data")
    index = open_index(copy)
    for shard in index.shards:
        path = copy / "shards" / shard
        path.write_bytes(path.read_bytes()[:1000])
    config = config_for(copy, tmp_path, **RAY, **{"cluster.max_failures": 1})
    with pytest.raises(Refusal, match="is not as it was written") as refusal:
        train(config)
    assert refusal.value.exit_code == 65
