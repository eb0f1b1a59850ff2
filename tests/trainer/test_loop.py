"""The loop without Ray: order, gradients, resume, and what it leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import CPU, config_for, train

from data_loaders import durable
from data_loaders.faults import Refusal
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.settings import dump, override, parse, parse_text
from data_loaders.sources.csv_file import Csv
from trainer import checkpoint, run
from trainer.config import Config
from trainer.context import Cluster, Local, spawn
from trainer.loop import fit

GOLDEN = Path(__file__).parent.parent / "golden"


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_run_that_was_stopped_goes_on_to_bitwise_the_same_weights_and_reports(dataset, tmp_path):
    whole = config_for(dataset, tmp_path / "whole")
    reports = train(whole)
    for stop in (4, 8):
        parted = config_for(dataset, tmp_path / f"parted{stop}")
        first = train(parted, stop_after=stop)
        assert not (parted.run_folder / "model").exists()
        second = train(parted)
        assert weights(parted.run_folder) == weights(whole.run_folder)
        assert first.rows | second.rows == reports.rows
        assert next(iter(second.rows)) == f"step-{stop:09d}"  # once more, in case the first could not


def test_a_run_that_dies_between_its_checkpoint_and_its_report_reports_when_it_goes_on(dataset, tmp_path):
    whole, parted = (config_for(dataset, tmp_path / name) for name in ("whole", "parted"))
    reports = train(whole)
    parted.run_folder.mkdir(parents=True)

    def die(key: str, row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(parted, Local(parted.run_folder, CPU, collect=die))
    assert train(parted).rows == reports.rows


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(dataset, tmp_path, capsys):
    whole = config_for(dataset, tmp_path / "whole")
    train(whole)
    parted = config_for(dataset, tmp_path / "parted")
    train(parted, stop_after=8)
    damaged = parted.run_folder / "checkpoints" / "step-000000008" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    reports = train(parted)
    assert list(reports.rows) == ["step-000000004", "step-000000008", "step-000000012"]
    assert "skipped" in capsys.readouterr().err
    assert weights(parted.run_folder) == weights(whole.run_folder)


def test_only_the_newest_checkpoints_are_kept_and_all_verify(dataset, tmp_path):
    config = config_for(dataset, tmp_path, **{"train.report_every": 2, "train.keep": 3})
    train(config)
    kept = sorted(p.name for p in (config.run_folder / "checkpoints").iterdir())
    assert kept == ["step-000000008", "step-000000010", "step-000000012"]
    assert all(durable.damage(p) is None for p in (config.run_folder / "checkpoints").iterdir())


def _two_workers(rank: int, text: str, stop_after: int | None) -> None:
    config = parse_text(Config, text)

    def collect(key: str, row: dict[str, Any]) -> None:
        if row["step"] == stop_after:
            os._exit(9)

    try:
        fit(config, Local(config.run_folder, CPU, rank, 2, collect))
    except RuntimeError:
        if stop_after is None:
            raise  # else the other worker is gone, as it should be


def test_two_workers_that_were_killed_go_on_to_bitwise_the_same_weights(dataset, tmp_path):
    cluster = Cluster(on="local", workers=2, device="cpu")
    whole, parted = (config_for(dataset, tmp_path / name) for name in ("whole", "parted"))
    for config in (whole, parted):
        config.run_folder.mkdir(parents=True)
    spawn(_two_workers, cluster, dump(whole), None)
    with pytest.raises(Exception, match="terminated with exit code 9"):
        spawn(_two_workers, cluster, dump(parted), 8)
    assert not (parted.run_folder / "model").exists()
    spawn(_two_workers, cluster, dump(parted), None)
    assert weights(parted.run_folder) == weights(whole.run_folder)


def test_a_process_that_is_killed_at_any_moment_loses_nothing_but_time(dataset, tmp_path):
    whole, killed = (config_for(dataset, tmp_path / n, **{"train.steps": 300}) for n in ("whole", "killed"))
    train(whole)
    words = [sys.executable, "-m", "jobs.train", str(tmp_path / "killed.yaml")]
    (tmp_path / "killed.yaml").write_text(dump(killed))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((killed.run_folder / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed.run_folder / "model").exists()
    subprocess.run(words, check=True, capture_output=True)
    assert weights(killed.run_folder) == weights(whole.run_folder)
    lines = [json.loads(line) for line in (killed.run_folder / "log.jsonl").read_text().splitlines()]
    assert [line["row"]["step"] for line in lines] == list(range(4, 301, 4))


@pytest.mark.parametrize("workers", [2, 3])
def test_gradients_of_several_workers_are_those_of_one_big_batch(dataset, tmp_path, workers):
    # Batch norm sees each worker's share alone, and dropout draws for each: both are left out of this comparison.
    config = config_for(
        dataset,
        tmp_path,
        **{
            "train.steps": 1,
            "model": {"kind": "resnet", "depth": 18, "dropout": 0},
            "optimizer": {"kind": "sgd", "lr": 1.0, "momentum": 0, "warmup": 0},
            "penalties": {"l1": 1e-4, "l2": 1e-3},
            "loss": {"kind": "balanced_softmax"},
        },
    )
    found = []
    for n in (1, workers):
        out = tmp_path / f"w{n}"
        out.mkdir()
        spawn(_frozen_norms, Cluster(on="local", workers=n, device="cpu"), dump(config), str(out), n)
        found.append(load_file(out / "model" / "model.safetensors"))
    one, many = found
    for name, value in one.items():
        if name.endswith(("weight", "bias")):
            torch.testing.assert_close(many[name], value, atol=1e-6, rtol=1e-5)


def _frozen_norms(rank: int, text: str, out: str, workers: int) -> None:
    """One step of plain descent with a learning rate of 1, so that the change of the weights is the gradient."""
    from torch import nn

    def scale_and_shift(self: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]

    with mock.patch.object(nn.BatchNorm2d, "forward", scale_and_shift):
        fit(parse_text(Config, text), Local(Path(out), CPU, rank, workers))


def test_what_a_run_leaves_is_whole_and_says_what_it_was_made_of(dataset, tmp_path):
    config = config_for(dataset, tmp_path)
    reports = train(config)
    folder = config.run_folder / "model"
    assert durable.damage(folder) is None
    trained = checkpoint.load_model(folder, CPU)
    assert trained.config == config
    np.testing.assert_allclose(trained.ledger.natural_prior, np.array([60, 18, 6]) / 84)
    np.testing.assert_allclose(trained.ledger.training_prior, np.full(3, 1 / 3))
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["validation"]["n"] == 33
    assert facts["validation"]["nll_calibrated"] <= facts["validation"]["nll"]
    assert facts["groups"] == {"venue": ["home", "street"], "camera": ["phone", "slr"]}
    assert [row["step"] for row in reports.rows.values()] == [4, 8, 12]


def test_a_run_stays_with_the_generation_that_it_began_with(dataset, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    run.train(config_for(data, tmp_path, name="before"))
    first = parse(Config, [str(tmp_path / "before/config.yaml")])
    assert first.data.generation == 1
    head, *lines = (dataset.parent / "labels.csv").read_text().splitlines()
    for line in lines:
        name = line.partition(",")[0]
        shutil.copyfile(dataset.parent / name, tmp_path / f"new-{name}")
    (tmp_path / "labels.csv").write_text("\n".join([head, *(f"new-{line}" for line in lines)]))
    source = Csv(path=tmp_path / "labels.csv", group_columns=("venue", "camera"), split_column="split")
    ingest(Ingest(source=source, out=data, append=True), in_processes(1))
    assert run.train(config_for(data, tmp_path, name="before")).folder == tmp_path / "before"
    run.train(override(first, {"name": "again"}))
    assert weights(tmp_path / "again") == weights(tmp_path / "before")
    run.train(config_for(data, tmp_path, name="after"))
    assert parse(Config, [str(tmp_path / "after/config.yaml")]).data.generation == 2
    assert weights(tmp_path / "after") != weights(tmp_path / "before")


def test_a_changed_setting_is_refused_by_name_and_a_changed_cluster_is_not(dataset, tmp_path):
    config = config_for(dataset, tmp_path)
    run.train(config)
    with pytest.raises(Refusal, match=r"model\.dropout: was 0\.2, now 0\.3"):
        run.train(override(config, {"model.dropout": 0.3}))
    again = override(config, {"cluster.threads": 2, "tracking.project": "other", "data.threads": 3, "train.keep": 5})
    before, log = weights(config.run_folder), (config.run_folder / "log.jsonl").read_text()
    run.train(again)  # which is done already
    assert weights(config.run_folder) == before
    assert (config.run_folder / "log.jsonl").read_text() == log


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.validation": "vall"}, "no split 'vall'"),
        ({"data.train": "tr"}, "no split 'tr'"),
        ({"data.sampler.by": "group", "data.sampler.columns": ["kitchen"]}, "no group column 'kitchen'"),
        ({"decision.prior": {"food": 1}}, "dessert"),
        ({"train.steps": 1, "data.batch": 2}, "never drawn"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused_before_anything_is_written(dataset, tmp_path, changes, said):
    with pytest.raises(Refusal, match=said):
        run.train(config_for(dataset, tmp_path, **changes))
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_run_that_diverges_is_refused_before_its_weights_are_saved(dataset, tmp_path):
    config = config_for(dataset, tmp_path, optimizer={"kind": "sgd", "lr": 1e30, "warmup": 0})
    with pytest.raises(Refusal, match=r"not a finite number: rows .* — lower it"):
        train(config)
    assert not (config.run_folder / "checkpoints").exists()


def test_golden_reports(dataset, tmp_path):
    """Loss and confusion of a tiny run, to three digits: a refactoring leaves them; a change of numbers says why."""
    from trainer.metrics.catalogue import RATES
    from trainer.metrics.tally import Shape, Tally

    reports = train(config_for(dataset, tmp_path))
    found = []
    for row in reports.rows.values():
        tallies = {part: Tally.unpack(row[part], Shape(4, 3)).overall() for part in ("train", "validation")}
        found.append(
            {"step": row["step"]} | {part: round(float(RATES["nll"].value(t)[0]), 3) for part, t in tallies.items()}
        )
    golden = GOLDEN / "reports.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(golden.read_text())
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=0.02)


def test_a_stop_file_ends_a_run_after_a_report_and_without_it_the_run_goes_on(dataset, tmp_path):
    whole, parted = (config_for(dataset, tmp_path / name) for name in ("whole", "parted"))
    train(whole)
    parted.run_folder.mkdir(parents=True)
    (parted.run_folder / "stop").touch()
    assert list(train(parted).rows) == ["step-000000004"]
    facts = json.loads((parted.run_folder / "model" / "facts.json").read_bytes())
    assert (facts["step"], facts["steps"]) == (4, 12)
    (parted.run_folder / "metrics.parquet").touch()
    assert run.untrained([parted]) == [parted]
    (parted.run_folder / "stop").unlink()
    train(parted)
    assert weights(parted.run_folder) == weights(whole.run_folder)
    assert run.untrained([parted]) == []
