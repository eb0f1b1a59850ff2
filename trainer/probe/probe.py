"""All probes of a model on a split, in one pass, as they are kept and told."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_loaders import durable
from data_loaders.audit.audit import quota, sample
from data_loaders.audit.finding import Finding
from data_loaders.audit.summary import plain
from data_loaders.augment import rng
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index
from trainer.checkpoint import Trained
from trainer.metrics.tally import Ints
from trainer.probe import attention, background, features, label_errors, slices, spatial
from trainer.probe.attention import Attention
from trainer.probe.cells import groupings
from trainer.probe.features import Features
from trainer.probe.label_errors import LabelErrors
from trainer.probe.passes import decided, run
from trainer.probe.slices import Slice
from trainer.probe.spatial import Spatial


class Probe(NamedTuple):
    """Of a model on rows of a split."""

    classes: tuple[str, ...]
    n: int
    """Rows that were probed."""
    spatial: Spatial
    attention: Attention
    features: Features
    slices: list[Slice]
    """In which decisions are wrong more often."""
    learnt: str
    """The split that the model learnt from."""
    labels: LabelErrors
    """Of rows of that split."""


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


def learnt(trained: Trained, index: Index, cap: int) -> Ints:
    """Rows that the model learnt from: all, or `cap` of them, each class as frequent as it is."""
    rows = index.rows_of(trained.config.data.train)
    return np.sort(rng(trained.config.seed, len(rows)).permutation(rows)[:cap])


def probe(trained: Trained, index: Index, rows: Ints, of_training: Ints) -> Probe:
    """What place, colour, light, detail, order and background are worth to a model, and where it errs, on rows [N]; and
    how many labels of the rows `of_training` are wrong. The same numbers every time."""
    config, model, ledger = trained.config, trained.model, trained.ledger
    torch.set_num_threads(config.cluster.threads * config.cluster.most)
    model.requires_grad_(False)  # heat needs the gradient of the last channels alone, and no more memory than that
    labels, classes = index.labels[rows], index.classes
    partners = background.partners(labels)
    parts = (
        decided(model, ledger, spatial.placed),
        decided(model, ledger, features.perturbed),
        background.swaps(model, ledger),
        attention.drops(model, ledger, labels, attention.to_cover(labels)),
        attention.heat(model, labels),
    )
    beside = [rows[np.where(of < 0, np.arange(len(rows)), of)] for of in partners]
    device = next(model.parameters()).device
    places, perturbed, swaps, fallen, heated = run(index, config.data, rows, device, parts, beside)
    swaps[partners < 0] = -1
    within = groupings(index, rows)
    return Probe(
        classes,
        len(rows),
        spatial.spatial(places, labels, classes, config.data.size),
        attention.attention(fallen, heated, labels, classes, within),
        features.features(perturbed, swaps, labels, classes, within[1:]),
        slices.of_rows(index, rows, perturbed[0]),
        config.data.train,
        label_errors.of_model(trained, index, of_training),
    )


def findings(p: Probe) -> Iterator[Finding]:
    """What stands out."""
    yield from spatial.findings(p.spatial)
    yield from attention.findings(p.attention)
    yield from features.findings(p.features, p.classes)
    yield from slices.findings(p.slices)
    yield from label_errors.findings(p.labels, p.learnt)


def summary(p: Probe) -> str:
    """Short tables for the terminal, and what they say in words."""
    tables = [spatial.summary(p.spatial), attention.summary(p.attention), features.summary(p.features, p.classes)]
    tables += [slices.summary(p.slices)] * bool(p.slices)
    tables += [f"labels of {p.learnt} that are probably wrong:\n{label_errors.summary(p.labels)}"]
    return "\n\n".join([*tables, "\n".join(f"- {finding.text}" for finding in findings(p))])


def save(run: Path, index: Index, split: str, p: Probe) -> Path:
    """Publishes a probe in the run's folder, with what it was made with; where it lies."""
    facts = {"split": split, "data": index.fingerprint, "model": durable.sha256(run / "model" / "model.safetensors")}
    with durable.publishing(run / "probe" / split) as aside:
        durable.write_json(aside / "probe.json", {**facts, **plain(p), "findings": plain(list(findings(p)))})
    return run / "probe" / split
