"""Reproducible runs: the same bits for any number of workers, and through any change of it."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Trainings
from small_runs import config_for

from data_loaders.settings import dump
from trainer import checkpoint
from trainer.config import Config

STEPS = 12
NETWORKS: dict[str, dict[str, Any]] = {
    "norms, dropout, L1 and L2": {},
    "residuals, mixed images and a running mean": {
        "model": {"kind": "cifar_resnet", "depth": 8, "dropout": 0.1},
        "mixing": {"kind": "mixup"},
        "train.average": 0.99,
        "loss": {"kind": "cross_entropy", "weights": {"kind": "effective_number"}, "deferred": 0.5},
    },
    "worst groups and foregrounds": {"loss": {"kind": "group_dro"}, "mixing": {"kind": "cmo"}},
}


@pytest.fixture(scope="module")
def trainings() -> Iterator[Trainings]:
    with Trainings() as started:
        yield started


def run_of(dataset: Path, folder: Path, network: str, workers: int, name: str) -> Config:
    changes = {"train.reproducible": 4, "train.steps": STEPS, "train.report_every": STEPS, **NETWORKS[network]}
    changes |= {"calibration": {"kind": "temperature"}, "cluster.workers": workers}
    return config_for(dataset, folder, name=name, **changes)


def digest(config: Config) -> str:
    return hashlib.sha256((config.run_folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_the_same_bits_for_any_number_of_workers_and_through_changes_of_it(
    dataset: Path, tmp_path: Path, trainings: Trainings, network: str
):
    found: dict[str, str] = {}
    for workers in (1, 2, 3, 4):
        config = run_of(dataset, tmp_path, network, workers, f"of-{workers}")
        life = trainings(dump(config))
        assert life.code == 0, life.said
        found[config.name] = digest(config)

    stops = sorted(random.Random(network).sample(range(STEPS - 2), 3))
    for workers, stop in zip((1, 2, 4), stops, strict=True):
        config = run_of(dataset, tmp_path, network, workers, "resized")
        life = trainings(dump(config), at=stop, signal="SIGTERM")
        assert life.code == 75, life.said
        newest, _ = checkpoint.newest(config.run_folder)
        assert newest
        assert stop < checkpoint.state_of(newest).step < STEPS
    life = trainings(dump(run_of(dataset, tmp_path, network, 1, "resized")))
    assert life.code == 0, life.said
    found["resized"] = digest(config)
    assert len(set(found.values())) == 1, found
