import json
import os
import socket
from pathlib import Path

import pytest
import wandb
import wandb_file
from small_runs import config_for

from data_loaders.settings import dump
from trainer.collect import Collector
from trainer.metrics.tally import Shape, Tally
from trainer.tracking import Tracker, Tracking, _mode

SECRET = "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")


def row(step: int, n: int = 10) -> dict:
    import numpy as np

    shape = Shape(4, 3)
    vector = np.zeros(shape.size, np.int64)
    vector[: 4 * 9] = n * step
    tally = Tally.of(vector, shape).pack()
    speed = {"seconds_per_step": 0.1, "waiting_for_data": 0.2, "pid": step}
    return {"step": step, "steps": 12, "lr": 0.1, "train": tally, "validation": tally, "speed": speed}


def run_file(folder: Path) -> Path:
    (found,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent/netrc")
    wandb.teardown()  # which has read the environment already


def test_without_a_key_a_run_is_offline_whole_and_never_touches_the_network(offline, dataset, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = config_for(dataset, tmp_path, **{"tracking.project": "kitchen", "tracking.group": "g"})
    collector = Collector(dump(config))
    for step in (4, 8, 12):
        collector.put(f"step-{step:09d}", row(step))
    facts = collector.close()
    assert facts["tracking_problem"] is None
    assert Path(facts["tracked"]).is_dir()
    found = run_file(config.run_folder)
    assert [line["step"] for line in wandb_file.history(found) if "lr" in line] == [4, 8, 12]
    assert all("validation/recall/food" in line for line in wandb_file.history(found) if "lr" in line)
    assert wandb_file.exit_codes(found) == [0]
    assert wandb_file.config(found)["model"]["kind"] == "small_cnn"
    assert wandb_file.summary(found)["rows"] == 3
    (run,) = [r.run for r in wandb_file.records(found) if r.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, run.display_name) == ("kitchen", "g", "r")


def test_a_key_is_in_no_file(offline, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_for(dataset, tmp_path)
    collector = Collector(dump(config))
    collector.put("step-000000004", row(4))
    collector.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_the_mode_follows_the_setting_then_the_environment_then_the_key(offline, monkeypatch, tmp_path):
    assert _mode(Tracking()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert _mode(Tracking()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert _mode(Tracking()) == "disabled"
    assert _mode(Tracking(mode="offline")) == "offline"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    os.chmod(tmp_path / "netrc", 0o600)
    assert _mode(Tracking()) == "online"


def test_a_backend_that_is_down_makes_the_run_an_offline_one(offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    tracker = Tracker(Tracking(timeout_s=5), tmp_path, "r", "r-1", {})
    tracker.log({"step": 1, "lr": 0.5})
    tracker.close({"done": True})
    assert tracker.problem
    assert "offline" in tracker.problem
    (found,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [line["lr"] for line in wandb_file.history(found)] == [0.5]
    said = capsys.readouterr()
    assert "W&B cannot be reached" in said.err
    assert SECRET not in said.err + said.out


def test_tracking_that_breaks_in_mid_run_says_so_once_and_raises_nothing(offline, tmp_path, capsys):
    tracker = Tracker(Tracking(mode="offline"), tmp_path, "r", "r-1", {})
    tracker.close({})
    for step in range(3):
        tracker.log({"step": step, "image": object()})
    tracker.close({})
    assert tracker.problem
    assert capsys.readouterr().err.count("W&B:") == 1


def test_a_repeated_interval_is_dropped_and_a_different_one_counted(dataset, tmp_path):
    config = config_for(dataset, tmp_path)
    collector = Collector(dump(config))
    collector.put("step-000000004", row(4))
    again = row(4) | {"speed": {"seconds_per_step": 9.0, "waiting_for_data": 0.0, "pid": 1}}
    collector.put("step-000000004", again)
    assert (collector.repeated, collector.mismatched) == (1, 0)
    collector.put("step-000000004", row(4, n=11))
    assert (collector.repeated, collector.mismatched) == (2, 1)
    assert len((config.run_folder / "log.jsonl").read_text().splitlines()) == 1


def test_a_collector_that_was_killed_goes_on_from_its_log_without_a_torn_line(dataset, tmp_path):
    import pyarrow.parquet

    config = config_for(dataset, tmp_path)
    first = Collector(dump(config))
    first.put("step-000000004", row(4))
    log = config.run_folder / "log.jsonl"
    with log.open("a") as file:
        file.write('{"key": "step-000000008", "row": {"st')
    second = Collector(dump(config))
    second.put("step-000000004", row(4))
    second.put("step-000000008", row(8))
    assert second.close()["rows"] == 2
    assert [json.loads(line)["key"] for line in log.read_text().splitlines()] == ["step-000000004", "step-000000008"]
    table = pyarrow.parquet.read_table(config.run_folder / "metrics.parquet").to_pylist()
    samples = {(r["split"], r["step"]): r["n"] for r in table if r["metric"] == "accuracy" and r["grouping"] == "all"}
    assert samples["train", 4] == 36 * 40
    assert samples["train", 8] == 36 * 40  # since the report before
    assert samples["val", 8] == 36 * 80
