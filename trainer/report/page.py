"""Evaluated runs as one self-contained page, with the JSON behind it: no script runs, and nothing is fetched."""

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.settings import parse
from trainer.config import Config
from trainer.decision.ledger import Ledger
from trainer.metrics.groups import GroupValues
from trainer.metrics.tally import Shape, Tally
from trainer.report import figures
from trainer.report.audits import ShownAudit, ShownProbe, read_audit, read_probes
from trainer.report.explanations import Explanation, read_explanations
from trainer.report.tables import LEAST_N, Beside, Cell, Compared, Subject, fits
from trainer.report.trials import Trials, read_trials

HERE = Path(__file__).parent


class EvaluatedRun(NamedTuple):
    """A run with all of its evaluations."""

    name: str
    train: str
    """The split it learnt from."""
    facts: dict[str, Any]
    ledger: Ledger
    subjects: list[Subject]
    decisions: dict[str, Any]
    """Split -> what decisions cost, and why."""
    audit: ShownAudit | None = None
    """Of the data it was trained on."""
    probes: tuple[ShownProbe, ...] = ()
    explanations: tuple[Explanation, ...] = ()
    trials: Trials | None = None
    """Of the search that it won."""
    diagnosis: list[dict[str, Any]] | None = None
    """Verdicts, as `jobs.diagnose` writes them."""


def read_whole(folder: Path) -> EvaluatedRun:
    """A run with all that was made of it: evaluations, audit, probes, explanations, and the search that it won."""
    weights = weights_of(folder)
    return read_run(folder)._replace(
        audit=read_audit(folder),
        probes=read_probes(folder, weights),
        explanations=read_explanations(folder, weights),
        trials=read_trials(folder),
    )


def read_run(folder: Path) -> EvaluatedRun:
    """The evaluations that `jobs.evaluate` left in a run's folder, after their checksums agree."""
    model = folder / "model"
    evaluations = sorted(p for p in (folder / "evaluation").glob("[!.]*") if p.is_dir())
    wrong = [(path, durable.damage(path)) for path in (model, *evaluations)]
    faults = [Fault(str(path), damage, "train or evaluate again") for path, damage in wrong if damage]
    if not faults:
        weights = durable.sha256(weights_of(folder))
        others = [path for path in evaluations if _json(path / "facts.json")["model"] != weights]
        faults += [Fault(str(path), "is of other weights than the model's", "evaluate again") for path in others]
    if not evaluations:
        faults.append(Fault(str(folder / "evaluation"), "holds nothing", f"python -m jobs.evaluate run={folder}"))
    if faults:
        raise Refusal("The run cannot be reported:", faults, 65)
    ledger = Ledger.from_json(_json(model / "ledger.json"))
    facts = _json(model / "facts.json")
    subjects = [
        Subject(folder.name, path.name, view, tally, ledger, _groups(path))
        for path in evaluations
        for view, tally in read_tallies(path).items()
    ]
    train = parse(Config, [str(model / "config.yaml")]).data.train
    decisions = {path.name: _json(path / "decisions.json") for path in evaluations}
    return EvaluatedRun(folder.name, train, facts, ledger, subjects, decisions)


def weights_of(folder: Path) -> Path:
    """The weights of a run."""
    return folder / "model" / "model.safetensors"


def _groups(evaluation: Path) -> GroupValues:
    return {name: tuple(values) for name, values in _json(evaluation / "facts.json")["groups"].items()}


def read_tallies(folder: Path) -> dict[str, Tally]:
    """View -> tally of one evaluation."""
    from safetensors.numpy import load_file

    shape = Shape(*_json(folder / "facts.json")["shape"])
    return {name: Tally.of(vector, shape) for name, vector in load_file(folder / "tallies.safetensors").items()}


def write(runs: list[EvaluatedRun], out: Path, remedies: list[Any] | None = None) -> None:
    """Writes the page, and its JSON beside it under the same name; `remedies` as `jobs.compare` writes them."""
    tree = {"runs": [_tree(run) for run in runs], "remedies": remedies or []}
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = (HERE / "page.css").read_text()
    page = environment.get_template("page.html").render(
        runs=runs,
        remedies=remedies,
        figures=figures,
        fits=fits,
        least_n=LEAST_N,
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        json=_harmless(json.dumps(tree, allow_nan=False)),
        number=lambda value: "–" if math.isnan(value) else f"{value:.3f}",
        percent=lambda value: "–" if math.isnan(value) else f"{value:.1%}",
    )
    durable.write(out, page)
    durable.write_json(out.with_suffix(".json"), tree)


def _tree(run: EvaluatedRun) -> dict[str, Any]:
    return {
        "run": run.name,
        "facts": run.facts,
        "ledger": run.ledger.to_json(),
        "evaluations": [
            {
                "split": s.split,
                "view": s.view,
                "confusion": s.tally.confusion.tolist(),
                "by_class": _rows(s.class_table()),
                "by_group": {table.title: _rows(table) for table in s.group_tables()},
                "cells": [_beside(line, beside) for beside in [s.beside()] for line in s.cells()],
                "fairness": [_compared(line) for line in s.fairness()],
                "nll": _number(s.nll()),
                "expected_cost": _number(s.cost()),
                "ece": list(map(_number, s.ece())),
            }
            for s in run.subjects
        ],
        "fit": [
            {
                "split": fit.split,
                "nll": list(map(_number, fit.nll)),
                "recall": {name: list(map(_values, cells)) for name, *cells in fit.lines},
            }
            for fit in fits(run.subjects, run.train)
        ],
        "audit": run.audit and run.audit.tree,
        "decisions": run.decisions,
        "probes": [probe.tree for probe in run.probes],
        "diagnosis": run.diagnosis,
    }


def _rows(table: Any) -> list[dict[str, Any]]:
    return [
        {"name": line.name} | {c: _values(value) for c, value in zip(table.columns[1:], line.cells, strict=True)}
        for line in table.lines
    ]


def _beside(line: tuple[str, str, Cell], beside: dict[tuple[str, str], Beside]) -> dict[str, Any]:
    (name, group, value), b = line, beside[line[:2]]
    numbers = {"recall": _values(value), "shrunk": _values(b.shrunk), "gap": _values(b.gap), "p": _number(b.p)}
    return {"class": name, "group": group, **numbers, "needed": b.needed if b.needed >= 0 else None}


def _compared(line: Compared) -> dict[str, Any]:
    return {
        "grouping": line.grouping,
        "metric": line.metric,
        "class": line.name,
        "value": _values(line.cell),
        "chance": _number(line.chance),
    }


def _values(cell: Cell) -> list[float | int | None]:
    return [*map(_number, cell[:3]), cell.n]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _harmless(text: str) -> str:
    """JSON that cannot end the element it stands in."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())
