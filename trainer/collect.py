"""The one place where a run's numbers come together: an append-only log, the truth; from it the long table of metrics,
and the one W&B run. Under Ray it is an actor beside the driver; without, an object in the process of rank 0.

Rows have keys. A repeated interval, after a restart, brings its row again: it is compared and dropped.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.index import open_index
from data_loaders.settings import parse_text
from trainer.config import Config
from trainer.context import Row
from trainer.metrics.catalogue import RATES
from trainer.metrics.groups import groupings
from trainer.metrics.long_table import rows, table
from trainer.metrics.tally import Shape, Tally
from trainer.tracking import Tracker

VARYING = ("speed",)
"""What a repeated interval need not repeat."""


class Collector:
    """Of one run."""

    def __init__(self, config_text: str) -> None:
        self.config = parse_text(Config, config_text)
        index = open_index(self.config.data.path)
        self.classes, self.group_values = index.classes, index.group_values
        self.shape = Shape(len(index.cell_names), len(index.classes))
        self.folder = self.config.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path = self.folder / "log.jsonl"
        self.known = _read(self.log_path)
        self.repeated = self.mismatched = 0
        self.lines: list[str] = []
        tree = self.config.model_dump(mode="json")
        facts = {"data_fingerprint": index.fingerprint, "identity": self.config.identity}
        run_id = f"{self.config.name}-{self.config.identity}"
        self.tracker = Tracker(self.config.tracking, self.folder, self.config.name, run_id, tree | facts)

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
        long = [
            line for before, row in zip([None, *reports], reports, strict=False) for line in self._rows(row, before)
        ]
        with durable.writing(self.folder / "metrics.parquet") as aside:
            pyarrow.parquet.write_table(table(long), aside)
        summary = {"rows": len(reports), "repeated": self.repeated, "mismatched": self.mismatched}
        if reports:
            self._table(self._tally(reports[-1], "validation"))
            summary |= self._scalars("validation", self._tally(reports[-1], "validation"))
        self.tracker.close(summary, exit_code)
        return summary | {"tracked": self.tracker.place, "tracking_problem": self.tracker.problem}

    def _show(self, row: Row, before: Row | None) -> None:
        """One line to say, and one step in W&B."""
        numbers = self._scalars("train", self._interval(row, before))
        numbers |= self._scalars("validation", self._tally(row, "validation"))
        speed = {name: row["speed"][name] for name in ("seconds_per_step", "waiting_for_data")}
        self.tracker.log({"step": row["step"], "lr": row["lr"], **speed, **numbers})
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

    def _table(self, tally: Tally) -> None:
        lines = [
            (grouping.name, group, int(grouped.n[g]), *(float(RATES[name].value(grouped)[g]) for name in chosen))
            for chosen in [("accuracy", "balanced_accuracy", "worst_recall", "nll", "brier", "ece")]
            for grouping in groupings(self.group_values)
            for grouped in [grouping.of(tally)]
            for g, group in enumerate(grouping.groups)
        ]
        columns = ["grouping", "group", "n", "accuracy", "balanced_accuracy", "worst_recall", "nll", "brier", "ece"]
        self.tracker.table("validation/groups", columns, lines)

    def _rows(self, row: Row, before: Row | None) -> list[dict[str, Any]]:
        key = {"run": self.config.name, "step": row["step"]}
        tallies = {
            "train": ("argmax", self._interval(row, before)),
            "validation": ("ledger", self._tally(row, "validation")),
        }
        names = {"train": self.config.data.train, "validation": self.config.data.validation}
        return [
            line
            for part, (view, tally) in tallies.items()
            for line in rows(
                tally, self.classes, self.group_values, bootstrap=False, split=names[part], view=view, **key
            )
        ]

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


def _lasting(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in VARYING}


def _read(path: Path) -> dict[str, Row]:
    """Rows of a log; a last line that a crash cut short is taken off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
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
