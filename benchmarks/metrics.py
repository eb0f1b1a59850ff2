"""What measuring costs: python -m benchmarks.metrics (all|table|tally|bootstrap|fairlearn)

- table: every rate and comparison of 1,000 classes x 50 groups x 10 million rows, with intervals, as a table.
- tally: what counting adds to an evaluation pass (ResNet-18 at 64 x 64; the demonstration's network), interleaved.
- bootstrap: 2,000 replicates of macro F1 on 10 million rows x 8 groups x 10 classes.
- fairlearn: its MetricFrame with 20 bootstrap replicates of rows on 100,000 rows, beside ours with intervals of all.

CPU seconds of one thread; memory is the peak of a process of its own.
"""

import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from trainer.metrics.intervals import REPLICATES, bootstrap
from trainer.metrics.long_table import table_of
from trainer.metrics.tally import BINS, HALVINGS, SCALE, WIDTHS, Shape, Tally, count
from trainer.model import ResNet, SmallCnn

KEY = {"run": "r", "split": "test", "view": "ledger", "step": None}
TURNS = 5
BATCH = 64
PART = 2**20
T = TypeVar("T")


def main(what: str = "all") -> None:
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], None]] = {"table": table, "tally": tally, "bootstrap": of_bootstrap}
    parts["fairlearn"] = fairlearn
    if what == "all":
        for name in parts:
            subprocess.run([sys.executable, "-m", "benchmarks.metrics", name], check=True)
    else:
        parts[what]()


def table() -> None:
    groups, classes, rows = 50, 1000, 10**7
    t = drawn(Shape(groups, classes), rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = tuple(f"class {k}" for k in range(classes)), {"group": tuple(f"{g}" for g in range(groups))}
    spent, found = seconds(lambda: table_of(t, *names, **KEY))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{classes:,} classes x {groups} groups x {rows:,} rows: {len(found):,} lines of the table in {spent:.1f} s; "
        f"memory: the tally {sum(p.nbytes for p in t.parts) / 1e9:.2f} GB, peak {peak * 1024 / 1e9:.2f} GB "
        f"({before * 1024 / 1e9:.2f} GB when the rows had been counted)"
    )


def tally() -> None:
    for name, settings, rows, side, shape in (
        ("ResNet-18 at 64 x 64, 10 classes x 8 groups", ResNet(depth=18), 256, 64, Shape(8, 10)),
        ("ResNet-18 at 224 x 224, 1,000 classes x 50 groups", ResNet(depth=18), 64, 224, Shape(50, 1000)),
        ("the demonstration's network, 3 classes x 6 groups", SmallCnn(widths=(16, 32, 64, 96)), 1024, 64, Shape(6, 3)),
    ):
        model = settings.build(shape.classes, 0).eval()
        images = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8)
        labels, cells = torch.randint(0, shape.classes, (rows,)), torch.randint(0, shape.groups, (rows,))
        sums, valid = torch.zeros(shape.size, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                return torch.cat([model(part).float() for part in images.split(BATCH)])  # noqa: B023

        def counted() -> None:
            for _ in range(2):  # argmax and ledger
                log_p = logits.log_softmax(1)  # noqa: B023
                count(sums, log_p, log_p.argmax(1), labels, cells, valid, shape)  # noqa: B023

        logits = forward()
        times = [(seconds(forward)[0], seconds(counted)[0]) for _ in range(TURNS)]
        share = min(c for _, c in times) / min(f for f, _ in times)
        print(f"{name}: counting both views takes {share:.2%} of the time of the network alone")


def of_bootstrap() -> None:
    t = drawn(Shape(8, 10), 10**7)

    def macro_f1(confusion: np.ndarray) -> np.ndarray:
        c = confusion.reshape(-1, 8, 10, 10)
        return (2 * np.diagonal(c, axis1=2, axis2=3) / (c.sum(2) + c.sum(3))).mean(2)

    spent, (low, high) = seconds(lambda: bootstrap(macro_f1, t.confusion.reshape(8, 100)))
    print(
        f"{REPLICATES:,} replicates of 10,000,000 rows x 8 groups x 10 classes: {spent:.2f} s (macro F1 of group 0: "
        f"{low[0]:.4f} to {high[0]:.4f})"
    )


def fairlearn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fairlearn.metrics as fair
        from sklearn import metrics as sk
    rows, shape = 100_000, Shape(8, 2)
    random = np.random.default_rng(0)
    labels, groups = random.integers(0, 2, rows), random.integers(0, 8, rows)
    p = 1 / (1 + np.exp(-random.normal(1.5 * (2 * labels - 1), 1)))
    decisions = (p > 0.5).astype(int)
    rates = {"accuracy": sk.accuracy_score, "precision": sk.precision_score, "recall": sk.recall_score}
    rates |= {"fpr": fair.false_positive_rate, "fnr": fair.false_negative_rate, "selection": fair.selection_rate}

    def theirs() -> fair.MetricFrame:
        return fair.MetricFrame(
            metrics=rates,
            y_true=labels,
            y_pred=decisions,
            sensitive_features=groups,
            n_boot=20,
            ci_quantiles=[0.025, 0.975],
            random_state=0,
        )

    def ours() -> None:
        log_p = torch.from_numpy(np.log(np.stack([1 - p, p], 1)))
        sums, valid = torch.zeros(shape.size, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
        decided, true, group = map(torch.from_numpy, (decisions, labels, groups))
        count(sums, log_p, decided, true, group, valid, shape)
        table_of(Tally.of(sums.numpy(), shape), ("no", "yes"), {"group": tuple("abcdefgh")}, **KEY)

    ours()
    mine, other = min(seconds(ours)[0] for _ in range(3)), seconds(theirs)[0]
    print(
        f"{rows:,} rows x 8 groups: fairlearn's MetricFrame, {len(rates)} metrics with 20 replicates, {other:.1f} s; "
        f"ours, the whole catalogue with intervals and null bands of 2,000 replicates, from the rows on, {mine:.2f} s: "
        f"{other / mine:.0f} times as fast"
    )


def drawn(shape: Shape, rows: int) -> Tally:
    """Of random rows, counted in parts, of which most belong to the first classes."""
    random, t = np.random.default_rng(0), Tally.of(np.zeros(shape.size, np.int64), shape)
    flat = {"confusion": t.confusion.reshape(-1), "top": t.confidence.reshape(-1, 3)}
    for start in range(0, rows, PART):
        n = min(PART, rows - start)
        labels, groups = (random.pareto(0.7, n) * 3).astype(int) % shape.classes, random.integers(0, shape.groups, n)
        right = random.random(n) < 0.7
        decisions = np.where(right, labels, random.integers(0, shape.classes, n))
        place = groups * shape.classes + labels
        np.add.at(flat["confusion"], place * shape.decisions + decisions, 1)
        p = random.beta(5, 2, n)
        bins = place * BINS + np.minimum((p * WIDTHS).astype(int) + HALVINGS, BINS - 1)
        for part, value in enumerate((1, right, np.rint(p * SCALE).astype(np.int64))):
            np.add.at(flat["top"][:, part], bins, value)
    t.classwise[..., 0] = t.n[:, None, None] // (np.arange(BINS) + 1) ** 2
    t.classwise[..., 1] = t.classwise[..., 0] * np.arange(BINS) // (2 * BINS)
    t.classwise[..., 2] = t.classwise[..., 0] * np.arange(BINS) // (2 * BINS) * int(SCALE)
    t.scores[:, :, :, 0] = (t.actual[:, :, None] * 0.8 * SCALE).astype(np.int64)
    t.scores[:, :, :, 1] = t.actual[:, :, None] * 2**12
    return Tally(*t.parts)


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds, and what came of it."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


if __name__ == "__main__":
    main(*sys.argv[1:])
