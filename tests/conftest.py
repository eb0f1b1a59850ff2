"""A small real data set that most tests share, made once by the real ingest."""

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from xdist.scheduler.loadscope import LoadScopeScheduling

from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.shards import Shards
from data_loaders.sources.csv_file import Csv

os.environ.setdefault("WANDB_MODE", "disabled")  # a test that tracks says so itself
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

ROWS = {"train": (60, 18, 6), "val": (18, 9, 6), "test": (20, 11, 6)}
"""Split -> rows of the classes dessert, drink and food."""


class ByFile(LoadScopeScheduling):
    """Side by side, the tests of one file stay together, since they share fixtures, and so do those of all files that
    start Ray, since two at once would be too much for a small machine."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if "mark.ray" in (self.config.rootpath / file).read_text() else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Groups of xdist itself (loadgroup) are ignored where pytest is 9.2 (pytest-xdist#1386)."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first: together they take longest."""
    first = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """154 noisy 12 x 12 images whose colour says the class, most of the time; group columns venue and camera."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    with (folder / "labels.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["path", "label", "venue", "camera", "split", "notes"])
        for split, counts in ROWS.items():
            for k, (label, count) in enumerate(zip(("dessert", "drink", "food"), counts, strict=True)):
                for i in range(count):
                    colour = np.full(3, 90) + 90 * np.eye(3)[k] + random.normal(0, 40, 3)
                    pixels = (colour + random.normal(0, 30, (12, 12, 3))).clip(0, 255).astype(np.uint8)
                    name = f"{split}-{label}-{i}.png"
                    Image.fromarray(pixels).save(folder / name)
                    venue = ("home", "street")[random.random() < 0.3 + 0.4 * (k == 0)]
                    out.writerow([name, label, venue, ("phone", "slr")[i % 2], split, "nobody needs this"])
    source = Csv(path=folder / "labels.csv", group_columns=("venue", "camera"), split_column="split")
    settings = Ingest(source=source, out=folder / "data", shards=Shards(rows=32))
    ingest(settings, in_processes(1))
    return settings.out
