"""Evaluates a trained run on splits of its data set: every image once, per class and per group, with intervals."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.evaluate run=runs/balanced splits=[test]"


class Evaluate(Settings):
    """Which run, and on what."""

    run: Path
    """Folder of the run."""
    splits: tuple[str, ...] = ()
    """Splits to evaluate; by default all but the training split."""
    data: Path | None = None
    """Folder of the data set; by default the one the run was trained on. Splits of another are kept as SPLIT@DATA."""
    smallest_cell: NonNegativeInt = 0
    """Groups and cells of fewer images are left out of metrics.parquet, for the sake of those on them."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the model runs."""


def run(settings: Evaluate) -> None:
    from trainer.report.page import read_run
    from trainer.report.tables import summary

    splits = evaluate_run(settings)
    print(summary([s for s in read_run(settings.run).subjects if s.split in splits]))
    print(f"metrics, predictions and tallies in {settings.run / 'evaluation'}")


def evaluate_run(settings: Evaluate) -> tuple[str, ...]:
    """Evaluates, and leaves the results in the run's folder; the splits that it did."""
    import json

    import pyarrow as pa
    import pyarrow.parquet
    import torch

    from data_loaders import durable
    from data_loaders.index import open_index
    from trainer import evaluate
    from trainer.checkpoint import load_model
    from trainer.context import Local, device_for
    from trainer.metrics.long_table import table_of
    from trainer.report.page import read_run, weights_of

    device = device_for(settings.device)
    trained = load_model(settings.run / "model", device)
    data = trained.config.data
    index = open_index(settings.data) if settings.data else data.index()
    torch.set_num_threads(trained.config.cluster.threads * trained.config.cluster.most)
    if index.classes != trained.ledger.classes:
        fix = f"the model knows {', '.join(trained.ledger.classes)}, in this order"
        fault = Fault(str(index.folder), f"has the classes {', '.join(index.classes)}", fix)
        raise Refusal("The data set does not fit the model:", [fault], 65)
    out = settings.run / "evaluation"
    splits = tuple(dict.fromkeys(settings.splits)) or tuple(name for name in index.splits if name != data.train)
    for split in splits:
        index.whole(split)  # refuses an unknown one before any is evaluated
    learnt = json.loads((settings.run / "model" / "facts.json").read_bytes())
    own = index.fingerprint == learnt["data"]
    facts = {"data": index.fingerprint, "groups": index.group_values, "model": durable.sha256(weights_of(settings.run))}
    for split in splits:
        met = own and split in (data.train, data.validation)
        context, said = Local(settings.run, device), None if met else trained.validation
        found = evaluate.evaluate(trained.model, trained.ledger, index, data, split, context, said, learnt["groups"])
        evaluate.save(out, found._replace(split=split if own else f"{split}@{index.fingerprint}"), facts)
    tables = [
        table_of(
            s.tally, s.classes, s.group_values, settings.smallest_cell, run=s.run, split=s.split, view=s.view, step=None
        )
        for s in read_run(settings.run).subjects
    ]
    with durable.writing(out / "metrics.parquet") as aside:
        pyarrow.parquet.write_table(pa.concat_tables(tables), aside)
    return splits if own else tuple(f"{split}@{index.fingerprint}" for split in splits)


def main() -> None:
    command(lambda: Evaluate, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
