"""What each calibrator is worth on a held-out split: python -m benchmarks.calibration RUN [RUN …] [split=test]
[against=plain]

Every calibrator is fitted on the validation rows that a run keeps, and judged on the split, whose rows weigh such that
classes occur as in use: NLL, top-label and class-wise ECE (15 bins of equal width; beside it, what a calibrated model
shows by chance: mean and 95th percentile) and NLL of the worst group, or class where the data has no groups. Below a
figure stands its difference from `against`, with a paired bootstrap interval at 95 %: by default `plain`, temperature
scaling as published (Guo et al. 2017), which fits all validation rows alike and knows no prior; `temperature` is ours.
Of several runs on the same split (seeds), means are told last; their intervals are means of intervals, so too wide
rather than too narrow.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trainer.checkpoint import load_model
from trainer.context import Local
from trainer.decision.calibrate import calibrate
from trainer.decision.fits import (
    AnyCalibrator,
    Best,
    Beta,
    BiasCorrected,
    Dirichlet,
    GroupTemperature,
    Isotonic,
    Nothing,
    Temperature,
    Vector,
)
from trainer.decision.ledger import Ledger
from trainer.evaluate import logits_of
from trainer.metrics.decomposition import labels_of
from trainer.metrics.intervals import Floats
from trainer.metrics.tally import Ints

KINDS: tuple[AnyCalibrator, ...] = (
    Temperature(),
    Nothing(),
    BiasCorrected(),
    Vector(),
    Dirichlet(),
    Beta(),
    Isotonic(),
    GroupTemperature(),
    Best(),
)
BINS = 15
REPLICATES, CHANCES = 1000, 200
AT_ONCE = 100
"""Replicates that are drawn at once."""


class Held(NamedTuple):
    """A run, and the rows of the split, [N]."""

    name: str
    calibrated: dict[str, Ledger]
    chosen: dict[str, str]
    logits: Floats
    labels: Ints
    cells: Ints
    groups: Ints
    """Of the worst-group NLL: cells, or classes where there are no groups."""
    weights: Floats
    """[K], of true classes."""


Metrics = dict[str, Callable[[Floats], Floats]]
"""Name -> (how often each row counts, [R, N], -> [R])."""


def main(folders: list[Path], split: str, against: str) -> None:
    runs = [held(folder, split) for folder in folders]
    found = [table(run, against) for run in runs]
    for run, lines in zip(runs, found, strict=True):
        title = f"{run.name}, {len(run.labels):,} rows of {split}, fitted on its validation rows"
        show(title, lines, run.chosen, against)
    if len({run.labels.tobytes() for run in runs}) == 1 < len(runs):
        means = {k: {m: np.mean([lines[k][m] for lines in found], 0) for m in found[0][k]} for k in found[0]}
        show(f"mean of {len(runs)} runs", means, dict.fromkeys(means, ""), against)


def held(folder: Path, split: str) -> Held:
    cpu = torch.device("cpu")
    trained = load_model(folder / "model", cpu)
    index, said = trained.config.data.index(), trained.validation
    if said is None:
        sys.exit(f"{folder} keeps no validation rows: train it again")
    rows = index.rows_of(split)
    logits = logits_of(trained.model, index, trained.config.data, rows, Local(folder, cpu))
    labels, cells = index.labels[rows].astype(np.int64), index.cells[rows]
    seen = np.bincount(labels, minlength=len(index.classes))
    weights = np.divide(trained.ledger.deployment_prior, seen, out=np.zeros(len(seen)), where=seen > 0)
    groups = cells if index.group_values else labels
    shares = np.bincount(said.labels, minlength=len(index.classes)) / len(said.labels)
    bare = replace(trained.ledger, deployment_prior=shares, logit_prior=shares)
    fitted = {"plain": calibrate(bare, said.logits, said.labels, Temperature())}
    fitted |= {kind.kind: calibrate(trained.ledger, said.logits, said.labels, kind, said.cells) for kind in KINDS}
    chosen = {name: f"{c.kind} {c.spread or ''}".strip() for name, c in fitted.items()}
    ledgers = {name: c.ledger for name, c in fitted.items()}
    if (shares == 0).any():
        del ledgers["plain"]  # of a class without validation rows it has no prior to leave as it is
    return Held(folder.name, ledgers, chosen, logits, labels, cells, groups, weights)


def table(run: Held, against: str) -> dict[str, dict[str, Floats]]:
    """Calibrator -> metric -> value, difference from `against`, its interval, and mean and end of chance, [6]."""
    log_p = {k: ledger.log_probabilities(run.logits, cells=run.cells) for k, ledger in run.calibrated.items()}
    metrics = {k: of(q, run.labels, run.weights, run.groups) for k, q in log_p.items()}
    draws = replicates(metrics, len(run.labels))
    once, lines = np.ones((1, len(run.labels))), {}
    for k, q in log_p.items():
        chance = by_chance(q, run)
        lines[k] = {}
        for m, metric in metrics[k].items():
            value, plain = metric(once)[0], metrics[against][m](once)[0]
            interval = np.percentile(draws[k][m] - draws[against][m], [2.5, 97.5])
            lines[k][m] = np.array([value, value - plain, *interval, *chance.get(m, (np.nan, np.nan))])
    return lines


def of(log_p: Floats, labels: Ints, weights: Floats, groups: Ints) -> Metrics:
    p, w, every = np.exp(log_p), weights[labels], np.arange(len(labels))
    hit = np.eye(p.shape[1])[labels]
    nll = -log_p[every, labels] * w
    top = p.argmax(1)
    one = binned(p[every, top], (top == labels) * 1.0, w)
    each = np.concatenate([binned(p[:, k], hit[:, k], w) for k in range(p.shape[1])], 1)
    inside = np.eye(groups.max() + 1)[groups][:, np.bincount(groups) > 0]
    return {
        "NLL": lambda times: times @ nll / (times @ w),
        "ECE": lambda times: np.abs(times @ one).sum(1) / (times @ w),
        "class-wise ECE": lambda times: np.abs(times @ each).sum(1) / (times @ w) / p.shape[1],
        "worst NLL": lambda times: np.nanmax(worst(times, inside * nll[:, None], inside * w[:, None]), 1),
    }


def worst(times: Floats, nll: Floats, weight: Floats) -> Floats:
    total = times @ weight
    return np.divide(times @ nll, total, out=np.full(total.shape, np.nan), where=total > 0)


def binned(q: Floats, hit: Floats, weight: Floats) -> Floats:
    """[N, BINS] what each row adds to the gap of each bin."""
    at = np.minimum((q * BINS).astype(int), BINS - 1)
    return np.eye(BINS)[at] * (weight * (q - hit))[:, None]


def replicates(metrics: dict[str, Metrics], n: int) -> dict[str, dict[str, Floats]]:
    """Calibrator -> metric -> its values in REPLICATES bootstraps of the n rows, the same for all."""
    random = np.random.Generator(np.random.Philox(key=[0, n]))
    found: dict[str, dict[str, list[Floats]]] = {k: {m: [] for m in of_kind} for k, of_kind in metrics.items()}
    for _ in range(REPLICATES // AT_ONCE):
        times = random.multinomial(n, np.full(n, 1 / n), AT_ONCE).astype(float)
        for k, of_kind in metrics.items():
            for m, metric in of_kind.items():
                found[k][m].append(metric(times))
    return {k: {m: np.concatenate(parts) for m, parts in of_kind.items()} for k, of_kind in found.items()}


def by_chance(log_p: Floats, run: Held) -> dict[str, tuple[float, float]]:
    """Mean and 95th percentile of each ECE if the probabilities were right."""
    p, k = np.exp(log_p), log_p.shape[1]
    top, at = p.argmax(1), np.minimum((p * BINS).astype(int), BINS - 1) + BINS * np.arange(k)
    confidence, errors = p.max(1), []
    for labels in labels_of(p, run.weights, CHANCES, seed=0):
        w = run.weights[labels]
        gaps = np.bincount(at.ravel(), (w[:, None] * p).ravel(), BINS * k)
        gaps -= np.bincount(at[np.arange(len(p)), labels], w, BINS * k)
        one = np.bincount(at[np.arange(len(p)), top] % BINS, w * (confidence - (top == labels)), BINS)
        errors.append(np.array([np.abs(one).sum(), np.abs(gaps).sum() / k]) / w.sum())
    means, ends = np.mean(errors, 0).tolist(), np.percentile(errors, 95, 0).tolist()
    return dict(zip(("ECE", "class-wise ECE"), zip(means, ends, strict=True), strict=True))


def show(title: str, lines: dict[str, dict[str, Floats]], chosen: dict[str, str], against: str) -> None:
    print(f"\n{title}\n{'':19}" + "".join(f"{m:>32}" for m in next(iter(lines.values()))))
    for kind, metrics in lines.items():
        values = (
            f"{v:.4f}" + ("" if np.isnan(c) else f" (chance {c:.4f}, {d:.4f})") for v, *_, c, d in metrics.values()
        )
        print(f"{kind:19}" + "".join(f"{text:>32}" for text in values) + (f"  {chosen[kind]}" if chosen[kind] else ""))
        if kind != against:
            off = (f"{d:+.4f} [{low:+.4f}, {high:+.4f}]" for _, d, low, high, *_ in metrics.values())
            print(f"{'':19}" + "".join(f"{text:>32}" for text in off))


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    words = [word for word in sys.argv[1:] if "=" not in word]
    if not words:
        sys.exit(__doc__)
    main([Path(word) for word in words], given.get("split", "test"), given.get("against", "plain"))
