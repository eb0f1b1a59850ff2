"""What a training leaves in W&B: read back from its offline file, and sent to a stand-in of its server."""

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import wandb
import wandb_file
from PIL import Image
from small_runs import CPU, config_for

from data_loaders import durable, manifest
from data_loaders.index import open_index
from data_loaders.settings import dump
from trainer import tracking
from trainer.checkpoint import load_model
from trainer.collect import Collector, add_images, read_log
from trainer.config import Config
from trainer.metrics.calibration import coarse_bins
from trainer.metrics.catalogue import RATES
from trainer.metrics.tally import Shape, Tally
from trainer.run import train
from trainer.tracking import Tracker, Tracking, _mode, safe_name

SECRET = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {"WANDB_API_KEY": SECRET, "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENG", "HF_TOKEN": "hf_qLGbkRvTzNw"}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")


class Tracked(NamedTuple):
    """A training that was tracked offline, with secrets in its environment."""

    config: Config
    tally: Tally
    """Of the last validation."""
    home: Path

    @property
    def file(self) -> Path:
        return run_files(self.config.run_folder)[0]


@pytest.fixture(scope="module")
def tracked(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    folder, home = tmp_path_factory.mktemp("tracked"), tmp_path_factory.mktemp("home")
    config = config_for(dataset, folder, **{"tracking.group": "g", "data.generation": 1})
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, home)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("WANDB_MODE", "offline")
        train(config)
    last = max(read_log(config.run_folder / "log.jsonl").values(), key=lambda row: row["step"])
    index = open_index(dataset)
    return Tracked(config, Tally.unpack(last["validation"], Shape(len(index.cell_names), len(index.classes))), home)


class Backend:
    """As much of W&B's server as a run needs that has one user; it keeps what it is sent."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.rows: dict[int, dict[str, Any]] = {}
        self.authorization: set[str | None] = set()
        self.status = 200
        self.answering = threading.Event()
        self.answering.set()
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, which the base class calls so
                pass

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    content = gzip.decompress(content)
                backend.answering.wait()
                answer = json.dumps(backend.answer(self.path, self.headers.get("Authorization"), content)).encode()
                self.send_response(backend.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_PUT(self) -> None:
                self.do_POST()

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hangs up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, authorization: str | None, content: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            self.authorization.add(authorization)
            sent = json.loads(content).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            self.rows |= {sent["offset"] + n: json.loads(line) for n, line in enumerate(sent["content"])}
        if path != "/graphql":
            return {}
        self.authorization.add(authorization)
        request = json.loads(content)
        (name,) = re.findall(r"(?:query|mutation)\s+(\w+)", request["query"])[:1]
        given = request.get("variables") or {}
        self.asked.append((name, given))
        return {"data": self.data(name, given.get("input", given))}

    def data(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
        seen = {"id": "r", "name": given.get("name"), "displayName": "", "historyLineCount": len(self.rows)}
        seen |= {"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        seen |= {"historyTail": json.dumps([json.dumps(row) for row in list(self.rows.values())[-1:]])}
        seen |= {"wandbConfig": json.dumps({"t": 1}), "project": project}
        uploads = [{"name": file, "uploadUrl": f"{self.url}/file"} for file in given.get("files", [])]
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        made = {"id": given.get("artifactCollectionName"), "state": "COMMITTED"}
        return {
            "Viewer": {"viewer": viewer},
            "UpsertBucket": {"upsertBucket": {"bucket": seen, "inserted": True}},
            "RunResumeStatus": {"model": project | {"bucket": seen if self.rows else None}},
            "CreateRunFiles": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": uploads}},
            "CreateArtifact": {"createArtifact": {"artifact": made | {"artifactSequence": {"id": "s"}}}},
            "ArtifactType": {"project": None},
        }.get(name, {})

    def all_asked(self, name: str) -> list[dict[str, Any]]:
        return [given.get("input", given) for asked, given in self.asked if asked == name]


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.answering.set()
    backend.server.shutdown()
    backend.server.server_close()


@pytest.fixture
def online(backend: Backend, offline: None, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", backend.url)
    return backend


def row(step: int, n: int = 10) -> dict:
    shape = Shape(4, 3)
    vector = np.zeros(shape.size, np.int64)
    vector[: 4 * 9] = n * step
    tally = Tally.of(vector, shape).pack()
    speed = {"seconds_per_step": 0.1, "data_wait": 0.2, "images_per_second": 320, "pid": step}
    scores = {"validation": tally, "calibrated_nll": 0.5}
    return {"step": step, "steps": 12, "lr": 0.1, "train": tally, **scores, "speed": speed}


def run_files(folder: Path) -> list[Path]:
    """Offline files of a run, in the order of their start."""
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def alone(patch: pytest.MonkeyPatch, home: Path) -> None:
    """No key, no mode, and a home folder of its own."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        patch.delenv(name, raising=False)
    patch.setenv("HOME", str(home))
    patch.setenv("NETRC", "/nonexistent/netrc")
    wandb.teardown()  # which has read the environment already


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone(monkeypatch, tmp_path)


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
    (found,) = run_files(config.run_folder)
    assert [line["step"] for line in wandb_file.history(found) if "lr" in line] == [4, 8, 12]
    assert all("validation/recall/food" in line for line in wandb_file.history(found) if "lr" in line)
    assert wandb_file.exit_codes(found) == [0]
    assert wandb_file.config(found)["model"]["kind"] == "small_cnn"
    assert wandb_file.summary(found)["rows"] == 3
    assert [line["system/images_per_second"] for line in wandb_file.history(found) if "lr" in line] == [320] * 3
    assert not any("system/pid" in line for line in wandb_file.history(found))
    run = wandb_file.run(found)
    assert (run.project, run.run_group, run.display_name) == ("kitchen", "g", "r")


def test_the_confusion_matrix_is_that_of_the_last_validation_without_a_row_for_each_image(tracked, dataset):
    classes = open_index(dataset).classes
    found = wandb_file.table(tracked.file, "validation/confusion_table")
    counts = {(row["Actual"], row["Predicted"]): row["nPredictions"] for row in found}
    expected = tracked.tally.overall().confusion[0]
    assert counts == {(a, b): expected[i, j] for i, a in enumerate(classes) for j, b in enumerate(classes)}
    chart = wandb_file.charts(tracked.file)["validation/confusion"]
    own = wandb.plot.confusion_matrix(y_true=[0], preds=[0], class_names=["a"], title=chart["stringSettings"]["title"])
    own.set_key("validation/confusion")
    assert chart == own.spec.config_value["panel_config"]


def test_the_reliability_diagram_has_the_accuracy_and_n_of_each_bin_and_the_diagonal(tracked):
    lines = wandb_file.table(tracked.file, "validation/reliability_table")
    n, right, confidence = np.moveaxis(coarse_bins(tracked.tally.overall())[0], 1, 0)
    bins = [line for line in lines if line["line"] == "model"]
    assert [line["n"] for line in bins] == n[n > 0].tolist()
    assert [line["accuracy"] for line in bins] == pytest.approx((right / n.clip(1))[n > 0])
    assert [line["confidence"] for line in bins] == pytest.approx((confidence / n.clip(1))[n > 0])
    assert all(0 <= line["low"] <= line["accuracy"] <= line["high"] <= 1 for line in bins)
    assert [(line["confidence"], line["accuracy"]) for line in lines if line["line"] == "ideal"] == [(0, 0), (1, 1)]
    chart = wandb_file.charts(tracked.file)["validation/reliability"]
    assert set(chart["fieldSettings"].values()) <= lines[0].keys()


def test_the_table_by_group_has_every_group_with_its_n_and_its_rates(tracked, dataset):
    found = {(row["grouping"], row["group"]): row for row in wandb_file.table(tracked.file, "validation/groups")}
    assert len(found) == 1 + 2 + 2 + 4
    overall, everyone = found["all", "all"], tracked.tally.overall()
    for name in ("accuracy", "balanced_accuracy", "worst_recall", "nll", "brier", "ece"):
        assert overall[name] == pytest.approx(RATES[name].value(everyone)[0])
    assert overall["accuracy_low"] < overall["accuracy"] < overall["accuracy_high"]
    for grouping in {grouping for grouping, _ in found}:
        assert sum(row["n"] for (of, _), row in found.items() if of == grouping) == everyone.n[0] == 33
    recalls = wandb_file.table(tracked.file, "validation/recalls")
    assert len(recalls) == len(found) * len(open_index(dataset).classes)
    assert all((row["value"] is None) == (row["n"] == 0) for row in recalls)


def test_the_numbers_of_the_machine_are_there_even_of_a_run_of_seconds(tracked):
    assert wandb_file.stats(tracked.file)
    rows = [row for row in wandb_file.history(tracked.file) if "lr" in row]
    assert all(row["system/seconds_per_step"] > 0 for row in rows)


def test_the_data_set_is_an_input_of_the_run_and_the_model_its_output(tracked, dataset):
    (data,) = wandb_file.artifacts(tracked.file, "dataset")
    assert data.use_after_commit
    assert data.name == f"data-{dataset.name}"
    assert [entry.path for entry in data.manifest.contents] == ["dataset.json"]
    known = json.loads(data.metadata)
    assert known["fingerprint"] == manifest.read(dataset).fingerprint
    assert known["rows"]["train"] == {"dessert": 60, "drink": 18, "food": 6}
    assert known["groups"]["venue"] == ["home", "street"]

    (model,) = wandb_file.artifacts(tracked.file, "model")
    assert not model.use_after_commit
    assert sorted(model.aliases) == ["latest", "step-12"]
    folder = tracked.config.run_folder / "model"
    assert {entry.path: Path(entry.local_path) for entry in model.manifest.contents} == {
        path.name: path for path in folder.iterdir()
    }
    known = json.loads(model.metadata)
    assert known["identity"] == tracked.config.identity
    assert known["parameters"] == sum(p.numel() for p in load_model(folder, CPU).model.parameters())
    assert known["scores"]["validation/accuracy"] == RATES["accuracy"].value(tracked.tally.overall())[0]


def test_no_secret_is_in_any_file_and_nothing_is_left_in_the_home_folder(tracked):
    files = [path for path in tracked.config.run_folder.rglob("*") if path.is_file()]
    assert any("staging" in path.parts for path in files)
    assert not [path for path in files for secret in SECRETS.values() if secret.encode() in path.read_bytes()]
    assert not list(tracked.home.rglob("*"))


def test_pictures_are_added_later_in_a_second_file_that_a_sync_makes_one_run_of(tracked, backend, offline, tmp_path):
    for k in range(2):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
    pictures = [(f"picture {k}", tmp_path / f"{k}.png") for k in range(2)]
    place, problem = add_images(tracked.config, "explain/heatmaps", pictures)
    assert problem is None
    first, second = run_files(tracked.config.run_folder)
    assert place == str(second.parent)
    (line,) = wandb_file.history(second)
    assert line["explain/heatmaps/captions"] == ["picture 0", "picture 1"]
    shown = [second.parent / "files" / name for name in line["explain/heatmaps/filenames"]]
    assert [path.read_bytes() for path in shown] == [path.read_bytes() for _, path in pictures]
    assert wandb_file.run(first).run_id == wandb_file.run(second).run_id

    environment = os.environ | {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": backend.url, "WANDB_MODE": "online"}
    command = [Path(sys.executable).parent / "wandb", "sync", "--yes", first.parent, second.parent]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert [row["_step"] for row in backend.rows.values()] == list(range(len(backend.rows)))
    assert backend.rows[len(backend.rows) - 1]["explain/heatmaps"]["count"] == 2
    assert [given["artifactID"] for given in backend.all_asked("UseArtifact")] == ["data-data"]
    assert "model-r" in [given["artifactCollectionName"] for given in backend.all_asked("CreateArtifact")]


def test_with_a_key_a_run_is_sent_to_the_server_and_the_key_is_in_no_file(online, dataset, tmp_path, capsys):
    config = config_for(dataset, tmp_path, **{"tracking.project": "kitchen", "tracking.group": "g"})
    collector = Collector(dump(config))
    for step in (4, 8):
        collector.put(f"step-{step:09d}", row(step))
    facts = collector.close()
    assert facts["tracking_problem"] is None
    assert facts["tracked"].startswith(f"{online.url}/me/kitchen/runs/g-r-")
    (header,) = online.authorization
    assert header.startswith("Basic ")
    created = online.all_asked("UpsertBucket")[0]
    assert (created["project"], created["groupName"], created["displayName"]) == ("kitchen", "g", "r")
    assert [line["step"] for line in online.rows.values() if "lr" in line] == [4, 8]
    assert [given["artifactID"] for given in online.all_asked("UseArtifact")] == [f"data-{dataset.name}"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    said = capsys.readouterr()
    assert SECRET not in said.err + said.out

    Image.new("RGB", (8, 8)).save(tmp_path / "heatmap.png")
    before = len(online.rows)
    add_images(config, "explain", [("a heatmap", tmp_path / "heatmap.png")])
    assert online.rows[before]["explain"]["captions"] == ["a heatmap"]
    assert len({given["name"] for given in online.all_asked("UpsertBucket") if given["name"]}) == 1


def test_a_key_that_the_server_does_not_know_makes_the_run_an_offline_one(online, tmp_path):
    online.status = 401
    tracker = Tracker(Tracking(), tmp_path, "r", "r-1", {})
    tracker.log({"step": 1, "lr": 0.5})
    tracker.close({})
    assert tracker.problem
    assert "offline" in tracker.problem
    (found,) = run_files(tmp_path)
    assert [line["lr"] for line in wandb_file.history(found)] == [0.5]


def test_a_server_that_falls_silent_delays_nothing_but_the_end_and_that_not_for_ever(
    online, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tracking, "GRACE_S", 1)
    tracker = Tracker(Tracking(timeout_s=2), tmp_path, "r", "r-1", {})
    online.answering.clear()
    began = time.monotonic()
    tracker.table("t", ["a"], [[1.0]])
    tracker.log({"step": 1})
    assert time.monotonic() - began < 0.5
    tracker.close({})
    assert time.monotonic() - began < 4
    assert tracker.problem
    assert "gave no answer within 3 s" in tracker.problem
    assert capsys.readouterr().err.count(tracker.problem) == 1
    online.answering.set()
    while any(thread.name == "wandb" for thread in threading.enumerate()):
        time.sleep(0.05)


def test_a_run_that_failed_has_its_exit_code_and_no_model(offline, dataset, tmp_path):
    config = config_for(dataset, tmp_path)
    collector = Collector(dump(config))
    collector.put("step-000000004", row(4))
    with durable.publishing(config.run_folder / "model") as aside:
        (aside / "facts.json").write_text("{}")
    collector.close(1)
    (found,) = run_files(config.run_folder)
    assert wandb_file.exit_codes(found) == [1]
    assert not wandb_file.artifacts(found, "model")
    assert wandb_file.artifacts(found, "dataset")


def test_artifacts_can_be_switched_off(offline, dataset, tmp_path):
    config = config_for(dataset, tmp_path, **{"tracking.artifacts": False})
    collector = Collector(dump(config))
    collector.put("step-000000004", row(4))
    with durable.publishing(config.run_folder / "model") as aside:
        (aside / "facts.json").write_text("{}")
    collector.close()
    (found,) = run_files(config.run_folder)
    assert not wandb_file.artifacts(found, "model") + wandb_file.artifacts(found, "dataset")


@pytest.mark.parametrize("name", ["data-my pets/2024: köln", "x" * 200, "plain_1.0"])
def test_the_name_of_an_artifact_is_one_that_wandb_takes(name):
    assert wandb.Artifact(safe_name(name), "dataset").name == safe_name(name)


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
    wandb.finish()
    for step in range(3):
        tracker.log({"step": step})
    tracker.close({})
    tracker.close({})
    tracker.log({"step": 4})
    assert tracker.problem
    assert capsys.readouterr().err.count("W&B:") == 1


def test_a_repeated_interval_is_dropped_and_a_different_one_counted(dataset, tmp_path):
    config = config_for(dataset, tmp_path)
    collector = Collector(dump(config))
    collector.put("step-000000004", row(4))
    again = row(4) | {"speed": {"seconds_per_step": 9.0, "data_wait": 0.0, "pid": 1}}
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
