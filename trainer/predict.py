"""New images -> probabilities in use, the cheapest decision, what it is expected to cost, and a set of classes."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.loader import file_batches
from data_loaders.progress import Progress
from data_loaders.sources.rows import Rejected, Row, Source
from trainer.checkpoint import Trained
from trainer.decision import conformal
from trainer.decision.conformal import Conformal, Thresholds
from trainer.decision.costs import ABSTAIN
from trainer.decision.label_shift import Method
from trainer.decision.ledger import Decision, Ledger
from trainer.decision.priors import PriorEstimate, estimate_prior
from trainer.decision.strata import refuse_no_numbers
from trainer.decision.thresholds import Aim, GroupThresholds, equalise
from trainer.decision.validation import Validation
from trainer.metrics.catalogue import Floats
from trainer.metrics.groups import GroupValues, groupings
from trainer.metrics.tally import Ints

MOST_LOGITS = 2**28
"""Logits that are held in memory, 1 GiB, while the prior of the images is estimated."""
LEAST_SHARE = 1e-6
"""Of a class in an estimated prior: none is impossible."""


class Answers(NamedTuple):
    """What a model says of a batch of images."""

    logits: Floats
    """[B, K] float32"""
    rows: list[Row]
    """[B]"""
    cells: Ints
    """[B] cell of the run's group columns, -1 where it is not known."""
    rejected: list[Rejected]
    """Those that cannot be decoded, beside the B."""


def answers(
    trained: Trained, groups: GroupValues, source: Source, rows: list[Row], progress: Progress
) -> Iterator[Answers]:
    """Of each batch; preprocessing is the model's own, and `groups` are the run's."""
    device, done = next(trained.model.parameters()).device, 0
    for images, good, bad in file_batches(source, rows, trained.config.data):
        with torch.inference_mode():
            logits = trained.model(torch.from_numpy(images).to(device)).float().cpu().numpy()
        refuse_no_numbers(logits, "the images")
        yield Answers(logits, good, cells_of(good, source.group_names, groups), bad)
        done += len(good) + len(bad)
        progress.show(done)


def cells_of(rows: list[Row], names: tuple[str, ...], groups: GroupValues) -> Ints:
    """[N] cell of the group columns `groups`, as `Index.cells` numbers them, of rows with values of columns `names`; -1
    where one is missing or has a value that is new."""
    places = [{value: v for v, value in enumerate(values)} for values in groups.values()]
    if not groups or not set(groups) <= set(names):
        return np.full(len(rows), -1)
    where = [names.index(name) for name in groups]

    cells = np.zeros(len(rows), np.int64)
    for a, place in zip(where, places, strict=True):
        value = np.array([place.get(row.groups[a], -1) if a < len(row.groups) else -1 for row in rows], np.int64)
        cells = np.where((cells < 0) | (value < 0), -1, cells * len(place) + value)
    return cells


class Prediction(NamedTuple):
    """Of all images, made batch by batch."""

    tables: Iterator[tuple[pa.Table, list[Rejected]]]
    """A table for each batch, and the rows of it that cannot be decoded."""
    estimate: PriorEstimate | None
    """Of the prior of use, where that was asked for: then all images have been seen by now."""
    lines: list[str]
    """What is to be told of the prior and of the sets."""


def predict(
    trained: Trained,
    groups: GroupValues,
    decision: Decision,
    source: Source,
    rows: list[Row],
    method: Method | None = None,
    sets: Conformal | None = None,
    aim: Aim | None = None,
) -> Prediction:
    """With a prior that `method` estimates from the images, where it is given, with conformal `sets`, and with
    decisions that are even between groups in `aim`."""
    _refuse_what_cannot_be(trained, groups, source, rows, method, sets, aim)
    progress = Progress("predict", len(rows), "images")
    batches = answers(trained, groups, source, rows, progress)
    ledger, estimate, lines = trained.ledger.under(decision), None, []
    if method:
        held = list(batches)
        estimate = _estimate(trained, held, method)
        ledger, batches = _under_estimate(trained, decision, estimate), iter(held)
        lines.append(told(ledger, estimate))
    thresholds = _thresholds(trained, ledger, groups, sets) if sets else None
    if thresholds:
        lines += [f"- {warning}" for warning in thresholds.warnings(ledger.classes, list(groupings(groups))[-1].groups)]
    even = _even(trained, ledger, groups, aim) if aim else None
    return Prediction(tables(ledger, batches, thresholds, even), estimate, lines)


def tables(
    ledger: Ledger,
    batches: Iterable[Answers],
    thresholds: Thresholds | None = None,
    even: GroupThresholds | None = None,
) -> Iterator[tuple[pa.Table, list[Rejected]]]:
    """A table for each batch, and the rows of it that cannot be decoded."""
    names = np.array([*ledger.classes, ABSTAIN])
    for logits, rows, cells, rejected in batches:
        log_p = ledger.log_probabilities(logits, cells=cells)
        costs = ledger.expected_costs(log_p)
        decisions = even.decide(log_p, ledger.costs, cells) if even else ledger.decide(log_p)
        columns: dict[str, Any] = {"path": [row.id for row in rows]}
        columns |= {f"p.{name}": np.exp(log_p[:, k]) for k, name in enumerate(ledger.classes)}
        columns |= {"decision": names[decisions], "expected_cost": costs[np.arange(len(rows)), decisions]}
        if thresholds is not None:
            columns["set"] = [names[:-1][held].tolist() for held in conformal.sets(log_p, thresholds, cells)]
        yield pa.table(columns, _schema(ledger, thresholds is not None)), rejected


def told(ledger: Ledger, found: PriorEstimate) -> str:
    """An estimated prior for the terminal, the most frequent class first, with its warnings."""
    head = f"prior of use, by {found.method} from {found.n:,} images and {found.n_validation:,} validation rows"
    lines = [f"  {ledger.classes[k]} {found.share(k)}" for k in np.argsort(-found.prior, kind="stable").tolist()]
    warnings = [f"- {warning}" for warning in found.warnings]
    return "\n".join([f"{head} (condition number {found.condition:.3g}):", *lines, *warnings])


def save(table: pa.Table, path: Path) -> None:
    """As .csv, with the set of classes as JSON, since it has no lists, or as .parquet."""
    with durable.writing(path) as aside:
        if path.suffix != ".csv":
            pyarrow.parquet.write_table(table, aside)
            return
        if "set" in table.column_names:
            sets = pa.array([json.dumps(held, ensure_ascii=False) for held in table["set"].to_pylist()], pa.string())
            table = table.set_column(table.num_columns - 1, "set", sets)
        pyarrow.csv.write_csv(table, aside)


def _estimate(trained: Trained, held: list[Answers], method: Method) -> PriorEstimate:
    k = len(trained.ledger.classes)
    logits = np.concatenate([np.zeros((0, k)), *(batch.logits for batch in held)])
    cells = np.concatenate([np.zeros(0, np.int64), *(batch.cells for batch in held)])
    known = cells if (cells >= 0).any() else None
    return estimate_prior(trained.ledger, logits, _validation(trained), method, known, trained.config.seed)


def _under_estimate(trained: Trained, decision: Decision, found: PriorEstimate) -> Ledger:
    """The ledger where classes are as frequent as was found."""
    shares = {name: max(float(p), LEAST_SHARE) for name, p in zip(trained.ledger.classes, found.prior, strict=True)}
    return trained.ledger.under(decision.model_copy(update={"prior": shares}))


def _thresholds(trained: Trained, ledger: Ledger, groups: GroupValues, sets: Conformal) -> Thresholds:
    validation = _validation(trained)
    log_p = ledger.log_probabilities(validation.logits, cells=validation.cells)
    return conformal.fit(log_p, validation, math.prod(map(len, groups.values())), ledger.deployment_prior, sets)


def _even(trained: Trained, ledger: Ledger, groups: GroupValues, aim: Aim) -> GroupThresholds:
    said = _validation(trained)
    log_p = ledger.log_probabilities(said.logits, cells=said.cells)
    shape = math.prod(map(len, groups.values())), len(ledger.classes)
    return equalise(log_p, said.labels, said.cells, shape, ledger.costs, ledger.deployment_prior, aim)


def _validation(trained: Trained) -> Validation:
    if trained.validation is None:
        fault = Fault("the model", "was published without what it says of its validation rows", "train it again")
        raise Refusal("There is nothing to fit to:", [fault], 65)
    return trained.validation


def _refuse_what_cannot_be(
    trained: Trained,
    groups: GroupValues,
    source: Source,
    rows: list[Row],
    method: Method | None,
    sets: Conformal | None,
    aim: Aim | None,
) -> None:
    faults, k = [], len(trained.ledger.classes)
    if method and len(rows) * k > MOST_LOGITS:
        what = f"{len(rows):,} images of {k} classes are more than the {MOST_LOGITS:,} logits that are held for it"
        faults.append(Fault("estimate_prior", what, "estimate it from fewer, then give decision.prior"))
    by_group = {"conformal.by": "conformal.by=class"} if sets and sets.by == "group" else {}
    by_group |= {"equalise": "leave it out"} if aim else {}
    if by_group and rows and (cells_of(rows, source.group_names, groups) < 0).all():
        fix = f"give source.group_columns=[{','.join(groups)}]" if groups else "the run has no groups"
        faults += [Fault(s, "no image is of a known group", f"{fix}, or {other}") for s, other in by_group.items()]
    if faults:
        raise Refusal("The images cannot be predicted so:", faults)


def _schema(ledger: Ledger, with_sets: bool) -> pa.Schema:
    columns = [("path", pa.string()), *((f"p.{name}", pa.float64()) for name in ledger.classes)]
    columns += [("decision", pa.string()), ("expected_cost", pa.float64())]
    return pa.schema(columns + [("set", pa.list_(pa.string()))] * with_sets)
