"""Reproducible runs: the same bits for any number of workers, through any change of it, kill and resume."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Trainings
from small_runs import config_for

from data_loaders.settings import dump

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


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_the_same_bits_for_any_number_of_workers(dataset, tmp_path, trainings, name):
    found = {}
    for workers in (1, 2, 3, 4):
        changes = {"name": f"w{workers}", "train.reproducible": 4, "train.steps": 8, **NETWORKS[name]}
        config = config_for(dataset, tmp_path, **changes)
        config.run_folder.mkdir()
        assert trainings(dump(config), workers)["code"] == 0
        found[workers] = digest(config.run_folder)
    assert len(set(found.values())) == 1, found
