"""The one place where a run's numbers come together: an append-only log, the truth; from it the long table of metrics,
and the one W&B run. Under Ray it is an actor beside the driver; without, an object in the process of rank 0.

Rows have keys. A repeated interval, after a restart, brings its row again: it is compared and dropped.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index
from data_loaders.settings import parse_text
from trainer.checkpoint import VALIDATION
from trainer.config import Config
from trainer.context import Row
from trainer.metrics.calibration import coarse_bins
from trainer.metrics.catalogue import RATES
from trainer.metrics.intervals import divide, wilson
from trainer.metrics.long_table import SCHEMA, counts_of, table_of
from trainer.metrics.tally import Ints, Shape, Tally
from trainer.tracking import CONFUSION, RELIABILITY, Artifact, Tracker

VARYING = ("speed",)
"""What a repeated interval need not repeat."""
GROUP_COLUMNS = {
    f"{rate}_{part}".removesuffix("_value"): (rate, part)
    for rate in ("accuracy", "balanced_accuracy", "worst_recall", "nll", "brier", "ece")
    for part in ("value", "low", "high")
}
"""What W&B's table by group tells, and of which rate: its value, and its interval."""
MOST_CLASSES = 100
"""Whose whole confusion matrix W&B takes: it cuts a table off after 10,000 rows."""


class Collector:
    """Of one run."""

    def __init__(self, config_text: str) -> None:
        self.config = parse_text(Config, config_text)
        index = self.config.data.index()
        self.classes, self.group_values = index.classes, index.group_values
        self.shape = Shape(len(index.cell_names), len(index.classes))
        self.folder = self.config.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path = self.folder / "log.jsonl"
        self.known = read_log(self.log_path, mend=True)
        self.repeated = self.mismatched = 0
        self.lines: list[str] = []
        tree = self.config.model_dump(mode="json")
        facts = {"data_fingerprint": index.fingerprint, "identity": self.config.identity}
        self.tracker = _tracker(self.config, tree | facts)
        self.tracker.uses(_data_artifact(index))

    def put(self, key: str, row: Row) -> None:
        """Takes a row, once for each key."""
        if key in self.known:
            self.repeated += 1
            self.mismatched += _lasting(self.known[key]) != _lasting(row)
            return
        before = self._latest()
        self.known[key] = row
        with self.log_path.open("a") as log:
            log.write(json.dumps({"key": key, "time": time.time(), "row": row}) + "\n")
        if "train" in row:
            self._show(row, before)
        else:
            failed = "; ".join(f"worker {rank}: {wrong}" for rank, wrong in row["exceptions"].items())
            self.lines.append(f"{self.config.name}: the workers start again after a failure: {failed}")

    def knows(self, key: str) -> bool:
        """Whether the row with this key has come."""
        return key in self.known

    def close(self, exit_code: int = 0) -> dict[str, Any]:
        """Writes metrics.parquet and ends the W&B run; what there is to know of the collection."""
        reports = self._reports()
        tables = [t for before, row in zip([None, *reports], reports, strict=False) for t in self._tables(row, before)]
        with durable.writing(self.folder / "metrics.parquet") as aside:
            pyarrow.parquet.write_table(pa.concat_tables(tables) if tables else SCHEMA.empty_table(), aside)
        summary = {"rows": len(reports), "repeated": self.repeated, "mismatched": self.mismatched}
        if reports:
            tally = self._tally(reports[-1], "validation")
            scores = self._scalars("validation", tally)
            summary |= scores
            self._draw(tally)
            if exit_code == 0 and durable.damage(self.folder / "model") is None:
                self.tracker.makes(self._model_artifact(scores), ["latest", f"step-{reports[-1]['step']}"])
        self.tracker.close(summary, exit_code)
        return summary | {"tracked": self.tracker.place, "tracking_problem": self.tracker.problem}

    def _show(self, row: Row, before: Row | None) -> None:
        """One line to say, and one step in W&B."""
        numbers = self._scalars("train", self._interval(row, before))
        numbers |= self._scalars("validation", self._tally(row, "validation"))
        speed = {name: value for name, value in row["speed"].items() if isinstance(value, int | float)}
        system = {f"system/{name}": value for name, value in speed.items() if name != "pid"}
        numbers["validation/calibrated_nll"] = row["calibrated_nll"]
        numbers["train/skipped_rows"] = int(self._skipped(row).sum())
        self.tracker.log({"step": row["step"], "lr": row["lr"], **system, **numbers})
        left = (row["steps"] - row["step"]) * speed["seconds_per_step"]
        self.lines.append(
            f"{self.config.name}: step {row['step']:,} of {row['steps']:,}, train NLL {numbers['train/nll']:.3f}, "
            f"validation NLL {numbers['validation/nll']:.3f}, worst recall {numbers['validation/worst_recall']:.2f}, "
            f"{speed['seconds_per_step'] * 1000:.0f} ms a step, {left:,.0f} s left"
        )

    def news(self, heard: int) -> list[str]:
        """Lines for the terminal, after those that were heard already."""
        return self.lines[heard:]

    def _scalars(self, split: str, tally: Tally) -> dict[str, float]:
        overall = tally.overall()
        numbers = {
            f"{split}/{n}": float(RATES[n].value(overall)[0]) for n in RATES if RATES[n].value(overall).ndim == 1
        }
        recalls = zip(self.classes, RATES["recall"].value(overall)[0], strict=True)
        numbers |= {f"{split}/recall/{name}": float(value) for name, value in recalls}
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def _draw(self, tally: Tally) -> None:
        """What W&B shows of a tally: tables by group, the confusion matrix and the reliability diagram."""
        key = dict.fromkeys(("run", "split", "view", "step"))
        lines = table_of(tally, self.classes, self.group_values, self.config.tracking.smallest_cell, **key).to_pylist()
        columns = ["grouping", "group", "n", *GROUP_COLUMNS]
        self.tracker.table("validation/groups", columns, _by_group(lines))
        columns = ["grouping", "group", "class", "n", "value", "low", "high"]
        recalls = [[line[name] for name in columns] for line in lines if line["metric"] == "recall"]
        self.tracker.table("validation/recalls", columns, recalls)
        columns = ["Actual", "Predicted", "nPredictions"]
        self.tracker.table("validation/confusion", columns, _confusion(tally, self.classes), CONFUSION)
        columns = ["confidence", "line", "accuracy", "low", "high", "n"]
        self.tracker.table("validation/reliability", columns, _reliability(tally), RELIABILITY)

    def _model_artifact(self, scores: Mapping[str, float]) -> Artifact:
        folder = self.folder / "model"
        facts = json.loads((folder / "facts.json").read_bytes())
        facts |= {"identity": self.config.identity, "scores": dict(scores)}
        unsaid = {VALIDATION} if self.config.tracking.smallest_cell else set()  # it has the cell of each image
        files = sorted(path for path in folder.iterdir() if path.name not in unsaid)
        return Artifact(f"model-{self.config.name}", "model", files, facts)

    def _tables(self, row: Row, before: Row | None) -> list[pa.Table]:
        key = {"run": self.config.name, "step": row["step"]}
        tallies = {
            "train": ("argmax", self._interval(row, before)),
            "validation": ("ledger", self._tally(row, "validation")),
        }
        names = {"train": self.config.data.train, "validation": self.config.data.validation}
        skipped = counts_of(
            "skipped_rows", self._skipped(row), self.classes, self.group_values, split=names["train"], view="", **key
        )
        return [skipped] + [
            table_of(tally, self.classes, self.group_values, bands=False, split=names[part], view=view, **key)
            for part, (view, tally) in tallies.items()
        ]

    def _skipped(self, row: Row) -> Ints:
        """Draws of damaged rows since the start, [cells, classes]."""
        counts = np.zeros((self.shape.groups, self.shape.classes), np.int64)
        for cell, k, n in row.get("skipped", ()):
            counts[cell, k] = n
        return counts

    def _interval(self, row: Row, before: Row | None) -> Tally:
        """Training samples since the report before; reports carry all samples since the start."""
        tally = self._tally(row, "train")
        return tally - self._tally(before, "train") if before else tally

    def _tally(self, row: Row, part: str) -> Tally:
        return Tally.unpack(row[part], self.shape)

    def _reports(self) -> list[Row]:
        return sorted((row for row in self.known.values() if "train" in row), key=lambda row: row["step"])

    def _latest(self) -> Row | None:
        reports = self._reports()
        return reports[-1] if reports else None


def add_images(config: Config, name: str, pictures: Sequence[tuple[str, Path]]) -> tuple[str, str | None]:
    """Adds pictures, each a caption and a file, to the W&B run of a training that is over; where the run is to be seen,
    and what went wrong.

    Online the run is resumed. Offline this makes a second file of the same run, and `wandb sync` uploads the files of
    one run in the order of their start, the second as going on from the first.
    """
    tracker = _tracker(config, config.model_dump(mode="json"))
    tracker.images(name, pictures)
    tracker.close({})
    return tracker.place, tracker.problem


def _tracker(config: Config, facts: Mapping[str, Any]) -> Tracker:
    """The W&B run of a training; its id is the same whoever opens it. W&B makes names of at most 128 signs from it."""
    group = f"{config.tracking.group[:32]}-" if config.tracking.group else ""  # trials are called alike in all searches
    run_id = f"{group}{config.name[:64]}-{config.identity}"
    return Tracker(config.tracking, config.run_folder, config.name, run_id, facts)


def _data_artifact(index: Index) -> Artifact:
    """The data set as its manifest, which holds the hash of every file, without the images."""
    counts = {name: index.class_sizes(index.whole(name)).tolist() for name in index.splits}
    facts = {
        "fingerprint": index.fingerprint,
        "rows": {split: dict(zip(index.classes, count, strict=True)) for split, count in counts.items()},
        "classes": list(index.classes),
        "groups": {name: list(values) for name, values in index.group_values.items()},
    }
    return Artifact(f"data-{index.folder.resolve().name}", "dataset", [index.folder / "dataset.json"], facts)


def _by_group(lines: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Grouping, group, n and GROUP_COLUMNS of each group."""
    known = {(line["grouping"], line["group"], line["metric"]): line for line in lines if not line["class"]}
    return [
        [grouping, group, line["n"], *(known[grouping, group, rate][part] for rate, part in GROUP_COLUMNS.values())]
        for (grouping, group, metric), line in known.items()
        if metric == "accuracy"
    ]


def _confusion(tally: Tally, classes: tuple[str, ...]) -> list[list[Any]]:
    """True class, decision, samples; of very many classes only the cells that are not empty."""
    counts = tally.overall().confusion[0].tolist()
    return [
        [classes[i], classes[j], n]
        for i, row in enumerate(counts)
        for j, n in enumerate(row)
        if n or len(classes) <= MOST_CLASSES
    ]


def _reliability(tally: Tally) -> list[list[Any]]:
    """Mean confidence, line, accuracy with its interval and n of each bin that is not empty; and the diagonal, on which
    a calibrated model lies."""
    n, right, confidence = np.moveaxis(coarse_bins(tally.overall())[0], 1, 0)
    points = np.stack([divide(confidence, n), divide(right, n), *wilson(right, n), n], 1)[n > 0].tolist()
    ideal = [[at, "ideal", at, None, None, None] for at in (0.0, 1.0)]
    return [[x, "model", *rest] for x, *rest in points] + ideal


def _lasting(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in VARYING}


def read_log(path: Path, mend: bool = False) -> dict[str, Row]:
    """Rows of a log, without a last line that is not whole: one that a crash cut short, which the writer mends, or one
    that is being written."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if mend and whole != content:
        durable.write(path, whole)
    rows: dict[str, Row] = {}
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            rows[line["key"]] = line["row"]
        except (ValueError, KeyError, TypeError) as wrong:
            fault = Fault(f"{path}:{number}", f"is no report: {wrong}", "remove the line; its step is reported again")
            raise Refusal("The log of the run is damaged:", [fault], 65) from wrong
    return rows
