"""New images -> probabilities in use, the cheapest decision and what it is expected to cost."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data_loaders.loader import file_batches
from data_loaders.sources.rows import Rejected, Row, Source
from trainer.checkpoint import Trained
from trainer.decision.ledger import Ledger


def predict(
    trained: Trained, ledger: Ledger, source: Source, rows: list[Row]
) -> Iterator[tuple[pa.Table, list[Rejected]]]:
    """A table for each batch, and the rows of it that cannot be decoded; preprocessing is the model's own."""
    device = next(trained.model.parameters()).device
    for images, good, bad in file_batches(source, rows, trained.config.data):
        with torch.inference_mode():
            logits = trained.model(torch.from_numpy(images).to(device)).float().cpu().numpy()
        log_p = ledger.log_probabilities(logits)
        costs, decisions = ledger.expected_costs(log_p), ledger.decide(log_p)
        columns: dict[str, Any] = {"path": [row.id for row in good]}
        columns |= {f"p.{name}": np.exp(log_p[:, k]) for k, name in enumerate(ledger.classes)}
        columns |= {"decision": [ledger.classes[d] for d in decisions]}
        columns |= {"expected_cost": costs[np.arange(len(good)), decisions]}
        yield pa.table(columns, _schema(ledger)), bad


def _schema(ledger: Ledger) -> pa.Schema:
    numbers = [(f"p.{name}", pa.float64()) for name in ledger.classes]
    return pa.schema([("path", pa.string()), *numbers, ("decision", pa.string()), ("expected_cost", pa.float64())])
