"""The table of methods for long tails: python -m benchmarks.long_tail data=datasets/cifar10_lt out=build/long_tail

A method is a file of `configs`, trained with each seed to its last step and evaluated on the test split; no epoch is
chosen by what it does there. `argmax` is the most probable class of the raw softmax, as papers report; `ledger` is the
decision from calibrated probabilities where all classes are equally frequent. Seeds begin at 0 and are the same for all
methods, so that differences are taken seed by seed. What is done stays in `out` and is not done again.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pyarrow.parquet
from pydantic import PositiveInt

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.progress import say
from data_loaders.settings import Settings, parse
from jobs.command import command
from trainer.config import Config
from trainer.metrics.calibration import top_label
from trainer.metrics.catalogue import accuracy, recall
from trainer.metrics.intervals import Floats
from trainer.report.page import EvaluatedRun, read_run

Method = Literal[
    "ce", "balanced_softmax", "drs", "ldam_drw", "mixup_drw", "balanced_softmax_autoaugment", "balpoe", "crt"
]
AFTER: dict[Method, Method] = {"crt": "ce"}
"""Method -> the one whose network it starts from."""
SHORT = (
    *("model.depth=8", "data.batch=128", "train.epochs=10", "train.report_every=1000000", "data.threads=1"),
    *("optimizer.schedule.kind=steps", "optimizer.schedule.at=[0.8,0.9]", "optimizer.schedule.factor=0.1"),
)
"""A ResNet-8 for ten epochs, in which the rate falls to a tenth twice: with a hundredth, as published, what is deferred
to the last two epochs would change nothing any more."""
SHORT_SECOND = "train.epochs=2"
"""What a second stage has of the short schedule."""
FEW_CLASSES = 20
"""Up to which the recall of each is shown."""
PARTS = ("many", "medium", "few")
"""Thirds of the classes by their training rows, of which the middle one has what is left over."""
VIEWS = {"argmax": "Argmax of the raw softmax", "ledger": "Decisions of the ledger"}


class Case(NamedTuple):
    """One run."""

    method: Method
    seed: int


class LongTail(Settings):
    """The benchmark."""

    data: Path
    """Folder of the data set, as `jobs.ingest` makes it of cifar10_lt_data.yaml."""
    out: Path = Path("build/long_tail")
    """Folder of the runs, in a folder for each schedule."""
    configs: Path = Path("jobs/configs/cifar10_lt")
    """Folder of the methods."""
    schedule: Literal["short", "full"] = "short"
    """`full` is what the files say, for a GPU; `short` a ResNet-8 for ten epochs, for two cores."""
    methods: tuple[Method, ...] = get_args(Method)
    seeds: PositiveInt = 3
    at_once: PositiveInt = 2
    """Runs side by side, each with one thread for its network."""

    def folder(self, case: Case) -> Path:
        """Of the run."""
        return self.out / self.schedule / f"{case.method}-{case.seed}"

    def words(self, case: Case) -> list[str]:
        """What `jobs.train` is told."""
        folder, first = self.folder(case), AFTER.get(case.method)
        words = [str(self.configs / f"{case.method}.yaml"), f"data.path={self.data}", f"seed={case.seed}"]
        words += [f"folder={folder.parent}", f"name={folder.name}", "cluster.on=local", "tracking.mode=disabled"]
        words += [f"model.weights={self.folder(case._replace(method=first)).resolve() / 'model'}"] if first else []
        return words + [*SHORT, *([SHORT_SECOND] if first else [])] * (self.schedule == "short")


class Measured(NamedTuple):
    """Of a run on the test split."""

    parameters: int
    classes: tuple[str, ...]
    """From the most frequent in training to the rarest."""
    values: dict[str, float]
    """Shares in percent, NLL in nats."""


def is_done(settings: LongTail, case: Case) -> bool:
    """Whether the run of these words has been evaluated."""
    folder = settings.folder(case)
    if durable.damage(folder / "evaluation" / "test"):
        return False
    former = parse(Config, [str(folder / "config.yaml")])
    asked = parse(Config, settings.words(case))
    return asked.model_copy(update={"data": asked.data.pinned(former.data)}).identity == former.identity


def work(settings: LongTail, case: Case) -> Fault | None:
    """Trains and evaluates; what went wrong."""
    folder = settings.folder(case)
    log = folder.with_suffix(".log")
    evaluate = [f"run={folder}", "splits=[test]"]
    seconds = 0.0
    with log.open("a") as said:
        for job, words in (("train", settings.words(case)), ("evaluate", evaluate)):
            process = subprocess.Popen([sys.executable, "-m", f"jobs.{job}", *words], stdout=said, stderr=said)
            _, status, used = os.wait4(process.pid, 0)
            seconds += used.ru_utime + used.ru_stime
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                return Fault(str(log), f"jobs.{job} ended with {process.returncode}", "see its last lines")
    say(f"{folder.name}: trained and evaluated in {seconds:.0f} CPU s")
    return None


def measure(folder: Path) -> Measured:
    """What an evaluated run is worth."""
    run = read_run(folder)
    order = np.argsort(-run.ledger.natural_prior, kind="stable")
    values: dict[str, float] = {}
    for subject in run.subjects:
        if subject.split == "test":
            overall = subject.tally.overall()
            recalls = 100 * recall(overall).value[0, order]
            values |= {f"{subject.view} {name}": value for name, value in _of_recalls(recalls).items()}
            classes = zip(np.array(subject.classes)[order].tolist(), recalls.tolist(), strict=True)
            values |= {f"{subject.view} recall of {name}": value for name, value in classes}
            values[f"{subject.view} top-1"] = 100 * float(accuracy(overall).value[0])
            values[f"{subject.view} ECE"] = 100 * float(top_label(overall).value[0])
            values[f"{subject.view} NLL"] = subject.nll()
    values["ledger NLL, natural"] = _natural_nll(run, folder)
    return Measured(run.facts["parameters"], tuple(run.ledger.classes[k] for k in order), values)


def _of_recalls(recalls: Floats) -> dict[str, float]:
    """Means over thirds, and the least, of recalls in the order of how frequent classes are."""
    third = len(recalls) // 3
    parts = recalls[:third], recalls[third : len(recalls) - third], recalls[len(recalls) - third :]
    return {**{name: float(part.mean()) for name, part in zip(PARTS, parts, strict=True)}, "worst": float(min(recalls))}


def _natural_nll(run: EvaluatedRun, folder: Path) -> float:
    """Of probabilities for classes as frequent as in training, on test rows that weigh as if they were."""
    table = pyarrow.parquet.read_table(folder / "evaluation" / "test" / "predictions.parquet")
    names, natural = run.ledger.classes, run.ledger.natural_prior
    labels = np.array([names.index(name) for name in table["label"].to_pylist()])
    logits = np.stack([table[f"logit.{name}"].to_numpy() for name in names], 1)
    log_p = run.ledger.log_probabilities(logits, natural)[np.arange(len(labels)), labels]
    return -float(sum(share * log_p[labels == k].mean() for k, share in enumerate(natural)))


def tables(found: dict[Case, Measured]) -> str:
    """Markdown: both views, what differs from cross-entropy, and the recall of each class."""
    columns: dict[str, tuple[str, ...]] = {
        "argmax": ("top-1", *PARTS, "worst", "ECE", "NLL"),
        "ledger": ("top-1", *PARTS, "worst", "ECE", "NLL", "NLL, natural"),
    }
    shown = [_table(title, found, {name: f"{view} {name}" for name in columns[view]}) for view, title in VIEWS.items()]
    if differences := _from_ce(found):
        both = [f"{view} {name}" for view in VIEWS for name in ("top-1", "few", "worst", "ECE", "NLL")]
        shown.append(
            _table("Less cross-entropy of the same seed", differences, dict(zip(both, both, strict=True)), "+")
        )
    classes = next(iter(found.values())).classes
    for view in VIEWS if len(classes) <= FEW_CLASSES else ():
        recalls = {name: f"{view} recall of {name}" for name in classes}
        shown.append(_table(f"Recall of each class, {view}", found, recalls))
    return "\n\n".join(shown)


def _from_ce(found: dict[Case, Measured]) -> dict[Case, Measured]:
    pairs = [(case, one, found.get(Case("ce", case.seed))) for case, one in found.items() if case.method != "ce"]
    return {
        case: one._replace(values={name: value - ce.values[name] for name, value in one.values.items()})
        for case, one, ce in pairs
        if ce
    }


def _table(title: str, found: dict[Case, Measured], columns: dict[str, str], sign: str = "") -> str:
    """A line for each method, and for each heading of a column the mean and standard deviation of a value."""
    head = ["method", "weights", "seeds", *columns]
    lines = [f"**{title}**", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for method in dict.fromkeys(case.method for case in found):
        runs = [one for case, one in found.items() if case.method == method]
        values = {key: np.array([run.values[key] for run in runs]) for key in columns.values()}
        cells = [_text(each, sign, digits=3 if "NLL" in key else 1) for key, each in values.items()]
        lines.append(f"| {method} | {runs[0].parameters:,} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(values: Floats, sign: str, digits: int) -> str:
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.{digits}f}{spread}"


def run(settings: LongTail) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    durable.make_folder(settings.out / settings.schedule)
    cases = [Case(method, seed) for seed in range(settings.seeds) for method in settings.methods]
    faults: list[Fault | None] = []
    for second in (False, True):
        lacking = [case for case in cases if (case.method in AFTER) == second and not is_done(settings, case)]
        with ThreadPoolExecutor(settings.at_once) as pool:
            faults += pool.map(partial(work, settings), lacking)
    done = sorted(filter(partial(is_done, settings), cases), key=lambda case: settings.methods.index(case.method))
    if done:
        print(tables({case: measure(settings.folder(case)) for case in done}))
    if wrong := [fault for fault in faults if fault]:
        raise Refusal("Runs failed:", wrong, 75)


if __name__ == "__main__":
    command(lambda: LongTail, __doc__, "python -m benchmarks.long_tail data=datasets/cifar10_lt seeds=3", run)
