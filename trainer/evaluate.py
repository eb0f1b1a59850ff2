"""One exact pass over a split: the logits of every row, and what they come to under two views of a decision.

`argmax` is what a bare classifier does: softmax as it stands, the most probable class. `ledger` is ours: calibrated
probabilities under the deployment prior, and the cheapest decision.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors.numpy import save_file
from torch import nn

from data_loaders import durable
from data_loaders.index import Index
from data_loaders.loader import Data, exact_batches, ids_of
from data_loaders.progress import Progress
from trainer.context import Context
from trainer.decision.analysis import Analysis, analyse, to_json
from trainer.decision.costs import ABSTAIN
from trainer.decision.ledger import Ledger, log_softmax
from trainer.decision.validation import Validation
from trainer.metrics.groups import GroupValues, groupings
from trainer.metrics.intervals import Floats
from trainer.metrics.tally import Ints, Shape, Tally, count

VIEWS = ("argmax", "ledger")
AT_ONCE = 2**22
"""Probabilities that are tallied together."""


def logits_of(
    model: nn.Module, index: Index, data: Data, rows: Ints, context: Context, progress: Progress | None = None
) -> Floats:
    """Logits of rows [N], in their order, [N, K] float32, on every worker; each row is computed once."""
    place = {row: i for i, row in enumerate(rows.tolist())}
    out = torch.zeros(len(rows), len(index.classes), device=context.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for number, batch in enumerate(exact_batches(index, data, rows, context.rank, context.workers), 1):
            images = torch.from_numpy(batch.images).to(context.device)
            valid = torch.from_numpy(batch.valid)
            where = torch.tensor([place[row] for row in batch.rows[batch.valid].tolist()])
            out[where.to(context.device)] = model(images).float()[valid.to(context.device)]
            if progress:
                progress.show(min(number * data.batch * context.workers, len(rows)))
    model.train(was_training)
    return context.sum(out).cpu().numpy()  # every other worker holds zeros there, so the sum is exact


class View(NamedTuple):
    """A way to turn logits into probabilities and decisions."""

    log_probabilities: Floats
    """[N, K], nats."""
    decisions: Ints
    """[N]"""


def view(name: str, ledger: Ledger, logits: Floats, cells: Ints | None = None) -> View:
    """What logits [N, K] of rows in cells [N] come to."""
    if name == "argmax":
        log_p = log_softmax(logits)
        return View(log_p, log_p.argmax(1))
    log_p = ledger.log_probabilities(logits, cells=cells)
    return View(log_p, ledger.decide(log_p))


def tally(view: View, labels: Ints, cells: Ints, shape: Shape) -> Tally:
    """The tally of a view of N rows."""
    sums = torch.zeros(shape.size, dtype=torch.int64)
    columns = [torch.from_numpy(column) for column in (*view, labels, cells)]
    for log_p, decisions, true, where in zip(
        *(c.split(max(1, AT_ONCE // shape.classes)) for c in columns), strict=True
    ):
        count(sums, log_p, decisions, true, where, torch.ones(len(true), dtype=torch.bool), shape)
    return Tally.of(sums.numpy(), shape)


class Evaluation(NamedTuple):
    """Of one split."""

    split: str
    tallies: dict[str, Tally]
    """View -> tally."""
    predictions: pa.Table
    decisions: Analysis
    """What decisions cost, and why."""


def evaluate(
    model: nn.Module,
    ledger: Ledger,
    index: Index,
    data: Data,
    split: str,
    context: Context,
    validation: Validation | None = None,
    groups: GroupValues | None = None,
) -> Evaluation:
    """All views of one split; `validation` is what the model said of its validation rows, if these are others.

    `groups` are those of the data that the model learnt from; where these have others, the calibrator and the sets know
    no group.
    """
    if groups is not None and {k: tuple(v) for k, v in groups.items()} != index.group_values:
        ledger, validation = ledger.ungrouped, None
    rows = index.rows_of(split)
    progress = Progress(f"evaluate {split}", len(rows), "rows") if context.rank == 0 else None
    logits = logits_of(model, index, data, rows, context, progress)
    labels, cells = index.labels_of(rows), index.cells_of(rows)
    views = {name: view(name, ledger, logits, cells) for name in VIEWS}
    shape = Shape(len(index.cell_names), len(index.classes), ledger.abstains)
    tallies = {name: tally(v, labels, cells, shape) for name, v in views.items()}
    decisions = analyse(ledger, logits, labels, cells, list(groupings(index.group_values)), validation)
    return Evaluation(split, tallies, _predictions(index, rows, logits, views), decisions)


def _predictions(index: Index, rows: Ints, logits: Floats, views: dict[str, View]) -> pa.Table:
    names = np.array([*index.classes, ABSTAIN])
    columns: dict[str, Any] = {"id": ids_of(index, rows), "row": rows, "label": names[index.label[rows]]}
    for a, (column, values) in enumerate(index.group_values.items()):
        columns[f"group.{column}"] = np.array(values)[index.group[a][rows]]
    columns |= {f"logit.{name}": logits[:, k] for k, name in enumerate(index.classes)}
    columns |= {f"p.{name}": np.exp(views["ledger"].log_probabilities[:, k]) for k, name in enumerate(index.classes)}
    columns |= {f"decision.{name}": names[v.decisions] for name, v in views.items()}
    return pa.table(columns)


def save(folder: Path, evaluation: Evaluation, facts: dict[str, Any]) -> None:
    """Publishes an evaluation: the tally of each view, the predictions, and what they were made with."""
    with durable.publishing(folder / evaluation.split) as aside:
        save_file({name: t.vector() for name, t in evaluation.tallies.items()}, aside / "tallies.safetensors")
        pyarrow.parquet.write_table(evaluation.predictions, aside / "predictions.parquet")
        durable.write_json(aside / "decisions.json", to_json(evaluation.decisions))
        shape = next(iter(evaluation.tallies.values())).shape
        durable.write_json(aside / "facts.json", {"split": evaluation.split, "shape": list(shape), **facts})
