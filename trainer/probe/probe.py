"""Both probes of a model on a split, in one pass, as they are kept and told."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from data_loaders import durable
from data_loaders.audit.audit import quota, sample
from data_loaders.audit.summary import plain
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index
from trainer.checkpoint import Trained
from trainer.metrics.tally import Ints
from trainer.probe import features, spatial
from trainer.probe.features import Features, perturbed
from trainer.probe.passes import decisions
from trainer.probe.spatial import Spatial, placed


class Probe(NamedTuple):
    """Of a model on rows of a split."""

    classes: tuple[str, ...]
    n: int
    """Rows that were probed."""
    spatial: Spatial
    features: Features


def chosen(trained: Trained, index: Index, split: str, cap: int) -> Ints:
    """Rows of the split to probe: all, or at most `cap`, of each class the same number if it has it.

    Refuses a split that is missing, and data of other classes than the model's.
    """
    rows = index.rows_of(split)
    if index.classes != trained.ledger.classes:
        fix = f"the model knows {', '.join(trained.ledger.classes)}, in this order"
        fault = Fault(str(index.folder), f"has the classes {', '.join(index.classes)}", fix)
        raise Refusal("The data set does not fit the model:", [fault], 65)
    labels = index.labels[rows]
    return rows[sample(labels, quota(labels, cap), trained.config.seed)]


def probe(trained: Trained, index: Index, rows: Ints) -> Probe:
    """What place, colour, light and order are worth to a model, on rows [N]; the same numbers every time."""
    config = trained.config
    torch.set_num_threads(config.cluster.threads * config.cluster.workers)
    device = next(trained.model.parameters()).device
    families = (placed, perturbed)
    places, perturbations = decisions(trained.model, trained.ledger, index, config.data, rows, device, families)
    labels = index.labels[rows]
    by_place = spatial.spatial(places, labels, index.classes, config.data.size)
    return Probe(index.classes, len(rows), by_place, features.features(perturbations, labels, index.classes))


def findings(p: Probe) -> Iterator[str]:
    """What stands out, in words."""
    yield from spatial.findings(p.spatial)
    yield from features.findings(p.features)


def summary(p: Probe) -> str:
    """Short tables for the terminal, and what they say in words."""
    tables = spatial.summary(p.spatial), "", features.summary(p.features, p.classes), ""
    return "\n".join([*tables, *(f"- {finding}" for finding in findings(p))])


def save(run: Path, index: Index, split: str, p: Probe) -> Path:
    """Publishes a probe in the run's folder, with what it was made with; where it lies."""
    facts = {"split": split, "data": index.fingerprint, "model": durable.sha256(run / "model" / "model.safetensors")}
    with durable.publishing(run / "probe" / split) as aside:
        durable.write_json(aside / "probe.json", {**facts, **plain(p), "findings": list(findings(p))})
    return run / "probe" / split
