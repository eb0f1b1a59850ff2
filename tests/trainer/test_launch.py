"""The same loop under Ray Train, with two workers and one collector, on a real local Ray."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb_file
from small_runs import CPU, config_for
from small_runs import train as train_here

from data_loaders import durable
from data_loaders.settings import dump, parse_text
from trainer.config import Config
from trainer.context import Cluster, Local, spawn
from trainer.loop import fit
from trainer.watch import FOLDER

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray's own imports warn
ROOT = Path(__file__).parents[2]
SAME = {"train.steps": 200, "train.report_every": 20, "train.reproducible": 2}
"""A run whose weights are the same bits with one worker or two."""
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


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights of the same run in this process alone."""
    config = config_for(dataset, tmp_path_factory.mktemp("undisturbed"), **SAME)
    train_here(config)
    return (config.run_folder / "model" / "model.safetensors").read_bytes()


def wait_for_rows(config: Config, count: int, is_running: Callable[[], bool]) -> None:
    """Until the collector has so many reports."""
    log = config.run_folder / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert is_running()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_driver_that_is_interrupted_and_then_killed_goes_on_to_the_same_weights(dataset, tmp_path, undisturbed):
    config = config_for(dataset, tmp_path, **SAME, **RAY)
    (tmp_path / "c.yaml").write_text(dump(config))
    words = [sys.executable, "-m", "jobs.train", str(tmp_path / "c.yaml")]
    for rows, sent, code in ((2, signal.SIGTERM, 75), (5, signal.SIGKILL, -9)):
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_for_rows(config, rows, lambda process=process: process.poll() is None)
        process.send_signal(sent)
        _, said = process.communicate()
        assert process.returncode == code, said
        assert code < 0 or "the same command goes on" in said
        newest = sorted((config.run_folder / "checkpoints").iterdir())[-1]
        assert code < 0 or durable.damage(newest) is None
        assert not (config.run_folder / "model").exists()
    done = subprocess.run([*words, "--resume"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert (config.run_folder / "model" / "model.safetensors").read_bytes() == undisturbed


@pytest.mark.slow
def test_a_run_that_loses_a_node_goes_on_with_the_workers_that_are_left_to_the_same_weights(
    dataset, tmp_path, undisturbed, monkeypatch
):
    import ray
    from ray.cluster_utils import Cluster as Nodes

    from trainer.launch import train

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    checks = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    nodes = Nodes(True, head_node_args={"num_cpus": 1, "include_dashboard": True, "_system_config": checks})
    try:
        lost = nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False)
        config = config_for(dataset, tmp_path, **SAME, **{**RAY, "cluster.workers": (1, 2)})
        log = config.run_folder / "log.jsonl"
        thread = threading.Thread(target=train, args=(config,), daemon=True)
        thread.start()
        wait_for_rows(config, 2, thread.is_alive)
        nodes.remove_node(lost, allow_graceful=False)
        thread.join()
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert (config.run_folder / "model" / "model.safetensors").read_bytes() == undisturbed
    assert [line for line in log.read_text().splitlines() if json.loads(line)["key"].startswith("exception")]


@pytest.mark.slow
def test_a_worker_that_freezes_is_named_and_the_run_goes_on_without_it(dataset, tmp_path, ray_cluster, undisturbed):
    from trainer.launch import train

    config = config_for(dataset, tmp_path, **SAME, **RAY, **{"cluster.stuck_s": 5})

    def freeze() -> None:
        wait_for_rows(config, 2, lambda: True)
        os.kill(json.loads((config.run_folder / FOLDER / "1.json").read_text())[1], signal.SIGSTOP)

    thread = threading.Thread(target=freeze, daemon=True)
    thread.start()
    train(config)
    thread.join()
    assert (config.run_folder / "model" / "model.safetensors").read_bytes() == undisturbed
    told = [line for line in (config.run_folder / "log.jsonl").read_text().splitlines() if "exceptions" in line]
    assert any("shows no sign of life" in json.loads(line)["row"]["exceptions"]["1"] for line in told)
