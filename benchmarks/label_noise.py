"""How often wrong labels are told, with wrong labels planted and without: python -m benchmarks.label_noise FOLDER SEEDS

Each seed draws built-in images with all their other planted biases, with SHARE of the training labels wrong and with
none, trains a small network for a short time, and asks its features. What a case showed is kept in the folder.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data_loaders.faults import Refusal
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.settings import override
from data_loaders.sources.demo import Demo
from trainer.checkpoint import load_model
from trainer.config import Config
from trainer.context import Local
from trainer.loop import fit
from trainer.metrics.intervals import wilson
from trainer.probe.label_errors import LabelErrors, findings, of_model

SHARE, IMAGES = 0.1, 3000
CPU = torch.device("cpu")
SETTINGS = {
    "data": {"size": 32, "batch": 64, "sampler": {"temper": 1}, "augmentation": {"kind": "pad_crop", "padding": 3}},
    "model": {"kind": "small_cnn", "widths": [16, 32, 64], "dropout": 0.1},
    "optimizer": {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.02},
    "train": {"epochs": 8, "report_every": 10**6},
    "cluster": {"on": "local", "device": "cpu"},
}
"""Short, so that the network learns what is common before it learns labels by heart (Arpit et al. 2017)."""


def detected(data: Path, seed: int = 0) -> bool:
    """Whether label noise is found in the training split of the data set in a folder; 10 s a core for 1,700 rows."""
    return bool(list(findings(label_errors_of(data, seed), "train")))


def label_errors_of(data: Path, seed: int = 0) -> LabelErrors:
    """What a short training, in a folder of its own, tells of the labels it learnt from."""
    with tempfile.TemporaryDirectory() as folder:
        config = override(Config.model_validate({"data": {"path": str(data)}}), {"seed": seed, "folder": folder})
        config = override(config, SETTINGS)
        config.run_folder.mkdir()
        fit(config, Local(config.run_folder, CPU))
        index = config.data.index()
        return of_model(load_model(config.run_folder / "model", CPU), index, index.rows_of(config.data.train))


def case(folder: Path, seed: int, share: float) -> dict[str, float]:
    """What one data set showed, from the folder if it was asked before."""
    kept = folder / f"{seed}-{share}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as drawn:
            data, began = Path(drawn) / "data", time.monotonic()
            source = Demo(folder=Path(drawn) / "images", images=IMAGES, seed=seed, label_noise=share)
            ingest(Ingest(source=source, out=data), in_processes(1))
            found = label_errors_of(data, seed)
        line = {**found.wrong._asdict(), "by_chance": found.by_chance, "seconds": time.monotonic() - began}
        kept.write_text(json.dumps({**line, "told": len(list(findings(found, "train")))}))
    return json.loads(kept.read_text())


def main(folder: Path, seeds: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    print("| wrong labels | told | estimate: least, median, most | lower end: least, most |\n| --- | --- | --- | --- |")
    for share in (SHARE, 0.0):
        cases = [case(folder, seed, share) for seed in range(seeds)]
        told = sum(c["told"] for c in cases)
        low, high = (float(end) for end in wilson(np.array(told), np.array(seeds)))
        values, lows = ([c[name] for c in cases] for name in ("value", "low"))
        spread = f"{min(values):.1%}, {np.median(values):.1%}, {max(values):.1%}"
        print(
            f"| {share:.0%} | {told} of {seeds} [{low:.0%}, {high:.0%}] | {spread} | {min(lows):.1%}, {max(lows):.1%} |"
        )


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except Refusal as refusal:
        sys.exit(str(refusal))
