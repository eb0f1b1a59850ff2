"""Which planted biases an audit tells, and which without cause: python -m benchmarks.planted out=build/planted

For each seed the built-in images are drawn with every plant, and once more for each plant with that one alone turned
off, which is harder than data without any bias: the other plants must not be taken for it. A bias is detected where
`detected` names it. What is done lies in the folder as JSON and is not done again.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import Field, PositiveInt

from data_loaders import durable
from data_loaders.audit.audit import audit
from data_loaders.audit.coverage import wilson
from data_loaders.audit.finding import Bias, Finding
from data_loaders.audit.findings import findings
from data_loaders.audit.properties import PROPERTIES
from data_loaders.index import open_index
from data_loaders.ingest import Ingest, _end_with_parent, in_processes, ingest
from data_loaders.settings import Settings
from data_loaders.sources.demo import Demo
from data_loaders.splits import TRAIN
from jobs.command import command

ON: dict[str, Any] = {"leakage": 0.1, "label_noise": 0.1}
"""Strength of the plants that are off by default; the others have the default of the built-in images."""
OFF: dict[Bias, dict[str, Any]] = {
    "class imbalance": {"imbalance": (1, 1, 1)},
    "selection": {"selection_bias": 0.0},
    "feature": {"feature_bias": 0.0},
    "spatial": {"spatial_bias": 0.0},
    "leakage": {"leakage": 0.0},
    "label noise": {"label_noise": 0.0},
}
"""Bias -> settings that turn its plant off."""
OF_OBJECT = {p.name for p in PROPERTIES if p.of_object}


class Planted(Settings):
    """The benchmark."""

    out: Path = Path("build/planted")
    """Folder of the results; what is done already stays."""
    seeds: PositiveInt = 20
    images: int = Field(default=3000, ge=100)
    size: int = Field(default=64, ge=16)
    """Height and width of an image, in pixels."""
    processes: PositiveInt = 1
    models: bool = True
    """Whether a short model is trained where label noise is asked for, which the audit of data alone cannot tell."""


def detected(folder: Path) -> set[Bias]:
    """The biases that the audit finds in a data set: those of its findings. A property that the objects of a class may
    have by themselves (brightness, sharpness, …) counts as no finding of a feature: the audit says of it that it may be
    the objects, as in these images it is."""
    found = findings(audit(open_index(folder), TRAIN, cap=10**5))
    return {finding.bias for finding in found if _counts(finding)}


def _counts(finding: Finding) -> bool:
    return not (finding.bias == "feature" and finding.where in OF_OBJECT)


def case(settings: Planted, seed: int, off: Bias | None) -> None:
    """Draws, ingests and audits one data set, and leaves what was found as JSON."""
    began, folder = time.monotonic(), settings.out / "data" / _name(seed, off)
    shutil.rmtree(folder, ignore_errors=True)
    plants = ON | (OFF[off] if off else {})
    source = Demo(folder=folder / "images", images=settings.images, size=settings.size, seed=seed, **plants)
    ingest(Ingest(source=source, out=folder / "data"), in_processes(1))
    told = detected(folder / "data") | (_of_a_model(folder / "data", seed) if _with_model(settings, off) else set())
    shutil.rmtree(folder)
    tree = {"seed": seed, "off": off, "detected": sorted(told), "seconds": round(time.monotonic() - began, 1)}
    durable.write_json(settings.out / f"{_name(seed, off)}.json", tree | {"settings": _told(settings, off)})


def _of_a_model(folder: Path, seed: int) -> set[Bias]:
    """What only a model tells of a data set."""
    from benchmarks.label_noise import detected as label_noise  # torch, which an audit of data does not need

    return {"label noise"} if label_noise(folder, seed) else set()


def _name(seed: int, off: Bias | None) -> str:
    return f"{seed:03d}-{(off or 'all on').replace(' ', '-')}"


def _with_model(settings: Planted, off: Bias | None) -> bool:
    return settings.models and off in (None, "label noise")


def _told(settings: Planted, off: Bias | None) -> dict[str, Any]:
    return {"images": settings.images, "size": settings.size, "models": _with_model(settings, off)}


def cases(settings: Planted) -> Iterator[tuple[int, Bias | None]]:
    """Those that are not done yet, or were done with other settings."""
    for seed in range(settings.seeds):
        for off in (None, *OFF):
            path = settings.out / f"{_name(seed, off)}.json"
            if not path.exists() or json.loads(path.read_bytes())["settings"] != _told(settings, off):
                yield seed, off


def table(settings: Planted) -> str:
    """How often each plant was told, on and off, with Wilson's interval; in Markdown."""
    trees = [json.loads(path.read_bytes()) for path in sorted(settings.out.glob("*.json"))]
    trees = [t for t in trees if t["settings"] == _told(settings, t["off"]) and t["seed"] < settings.seeds]
    lines = ["| plant | detected when on | false alarms when off, all others on |", "|---|---|---|"]
    for bias in OFF:
        cells = [_rate([bias in t["detected"] for t in trees if t["off"] == off]) for off in (None, bias)]
        lines.append(f"| {bias} | {cells[0]} | {cells[1]} |")
    seconds = np.median([tree["seconds"] for tree in trees])
    foot = f"{len(trees)} data sets of {settings.images:,} images of {settings.size} px; one takes {seconds:.0f} s."
    return "\n".join([*lines, "", foot])


def _rate(told: list[bool]) -> str:
    low, high = wilson(sum(told), len(told))
    return f"{sum(told)} of {len(told)} [{low:.0%}, {high:.0%}]" if told else "–"


def run(settings: Planted) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    durable.make_folder(settings.out)
    with ProcessPoolExecutor(settings.processes, get_context("spawn"), initializer=_end_with_parent) as pool:
        for future in [pool.submit(case, settings, seed, off) for seed, off in cases(settings)]:
            future.result()
    print(table(settings))


assert set(OFF) <= set(get_args(Bias))

if __name__ == "__main__":
    command(lambda: Planted, __doc__, "python -m benchmarks.planted out=build/planted", run)
