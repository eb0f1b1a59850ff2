"""Small runs that several tests make."""

from pathlib import Path
from typing import Any

import torch

from data_loaders.settings import override
from trainer.config import Config
from trainer.context import Local
from trainer.loop import fit

CPU = torch.device("cpu")


def config_for(dataset: Path, folder: Path, **changes: Any) -> Config:
    """A run of 12 steps that takes two seconds."""
    tree = {
        "name": "r",
        "folder": str(folder),
        "data": {"path": str(dataset), "size": 12, "batch": 16, "augmentation": {"kind": "pad_crop", "padding": 1}},
        "model": {"kind": "small_cnn", "widths": [8, 16], "dropout": 0.2},
        "penalties": {"l1": 1e-5, "l2": 1e-4},
        "train": {"steps": 12, "report_every": 4},
        "cluster": {"on": "local", "device": "cpu"},
    }
    return override(Config.model_validate(tree), changes)


class Reports:
    """What a run reports."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def __call__(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = {name: value for name, value in row.items() if name != "speed"}


def train(config: Config, stop_after: int | None = None) -> Reports:
    """Trains in this process; with stop_after, dies in the report of that step, after its checkpoint."""
    reports = Reports()

    def collect(key: str, row: dict[str, Any]) -> None:
        reports(key, row)
        if row["step"] == stop_after:
            raise KeyboardInterrupt

    config.run_folder.mkdir(parents=True, exist_ok=True)
    try:
        fit(config, Local(config.run_folder, CPU, collect=collect))
    except KeyboardInterrupt:
        assert stop_after
    return reports
