"""Which bias it is: what was found of a run and of its data, gathered, with the remedy that this system has for each.

A bias is found, not found where it was looked for, or was not looked for; then the command that would is named.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_loaders.audit.finding import Bias, Finding
from data_loaders.settings import flat, parse
from trainer.config import Config
from trainer.probe import fitting
from trainer.report.audits import read_audit, read_probes
from trainer.report.page import read_run, weights_of
from trainer.report.tables import Subject


class Advice(NamedTuple):
    """What may be done about a bias."""

    text: str
    settings: tuple[str, ...] = ()
    """Of `python -m jobs.train`, all at once."""


MEANINGS: dict[Bias, str] = {
    "leakage": "images of the training split are in others, so that what is measured there is too good",
    "label noise": "labels are wrong",
    "class imbalance": "some classes have far more images than others",
    "selection": "who or what is in the pictures goes with the class by the way they were collected",
    "feature": "colour, light or the background stand for the class",
    "spatial": "the place in the frame stands for the class",
    "decision": "the scores tell more than the decisions made of them",
    "calibration": "probabilities do not mean what they say",
    "score": "the scores themselves tell some classes or groups worse; no threshold mends that",
    "underfitting": "the model has not learnt what it was shown",
    "overfitting": "the model has learnt its images by heart",
}
"""In the order in which to mend them: first the data, since all else is measured with them."""

ADVICE: dict[Bias, tuple[Advice, ...]] = {
    "leakage": (
        Advice("ingest again with the column that says what belongs together: source.split_by=photographer"),
        Advice("leave out the copies that the audit lists, and ingest again"),
    ),
    "label noise": (Advice("look at the images that the audit lists, correct their labels, and ingest again"),),
    "class imbalance": (
        Advice(
            "draw every class equally often; the ledger keeps the probabilities those of use",
            ("data.sampler.temper=0",),
        ),
        Advice("or take the prior out in the loss", ("loss.kind=balanced_softmax",)),
        Advice("decide by what mistakes cost", ("decision.costs.kind=balanced",)),
    ),
    "selection": (
        Advice(
            "draw every class equally often in every group",
            ("data.sampler.by=label_and_group", "data.sampler.temper=0"),
        ),
        Advice("collect what is lacking: the audit says how many images of each class and group"),
    ),
    "feature": (
        Advice(
            "make a column of it, and draw every class equally often in each of its values",
            ("data.sampler.by=label_and_group",),
        ),
        Advice("collect images of the class without it"),
        Advice("vary what is shown", ("data.augmentation.kind=standard",)),
    ),
    "spatial": (
        Advice("move objects through the frame", ("data.augmentation.kind=pad_crop", "data.augmentation.padding=8")),
        Advice("zoom in and out", ("data.augmentation.kind=standard", "data.augmentation.area=[0.35,1.5]")),
    ),
    "decision": (
        Advice(
            "decide by what mistakes cost, under the prior of use",
            ("decision.costs.kind=balanced", "decision.prior=natural"),
        ),
    ),
    "calibration": (Advice("more validation images, or another prior of use", ("decision.prior=natural",)),),
    "score": (
        Advice("draw the class or group more often", ("data.sampler.temper=0",)),
        Advice("train longer, and several models", ("train.epochs=20", "train.members=5")),
        Advice("collect more images of it: jobs.learning_curve says whether they would help"),
    ),
    "underfitting": (
        Advice("train longer", ("train.epochs=20",)),
        Advice("take a larger model, with weaker penalties", ("model.kind=resnet", "penalties.l2=0")),
    ),
    "overfitting": (
        Advice("show more variety", ("data.augmentation.kind=standard",)),
        Advice("hold the weights back", ("model.dropout=0.2", "penalties.l2=1e-4")),
        Advice("average several models", ("train.members=5",)),
    ),
}


class Verdict(NamedTuple):
    """Of one bias."""

    bias: Bias
    meaning: str
    looked: bool
    """Whether anything that tells it was run."""
    findings: list[Finding]
    """Empty where it was not found."""
    advice: list[Advice]
    command: str
    """What looks for it, where nothing did."""


DIAGNOSIS = "diagnosis.json"
OF_DATA: tuple[Bias, ...] = ("leakage", "class imbalance", "selection", "feature", "spatial")
"""What the audit of a data set looks for."""


class Gathered(NamedTuple):
    """What is known of a run."""

    findings: list[Finding]
    looked: set[Bias]
    """Biases that something was run for."""
    commands: dict[Bias, str]
    """What looks for each."""
    settings: dict[str, Any]
    """Of the run, path -> value."""


def gather(folder: Path) -> Gathered:
    """Everything that was found of a run: by the audit of its data, by probes of its model, and by its evaluations."""
    run = read_run(folder)
    config = parse(Config, [str(folder / "model" / "config.yaml")])
    data = config.data
    others = [s for s in run.subjects if s.view == "ledger" and s.split not in (run.train, data.validation)]
    looked: set[Bias] = set()
    found: list[Finding] = []
    audit, probes = read_audit(folder), read_probes(folder, weights_of(folder))
    if audit:
        looked |= set(OF_DATA)
        found += map(_finding, audit.tree["findings"])
    for probe in probes:
        looked |= {"feature", "spatial", "label noise"}
        found += map(_finding, probe.tree["findings"])
    for subject in others:
        error, chance = subject.ece()
        looked |= set() if math.isnan(error) else {"decision", "score", "calibration"}  # else a class was not seen
        found += [_of_split(f, subject.split) for f in map(_finding, run.decisions[subject.split]["findings"])]
        found += _calibration(subject, error, chance)
    for learnt in (s for s in run.subjects if (s.split, s.view) == (run.train, "ledger")):
        looked |= {"underfitting", "overfitting"}
        for s in (s for s in others if s.group_values == learnt.group_values):  # other data may have other groups
            found += fitting.findings(fitting.fits(learnt.tally, s.tally, s.classes, s.group_values), s.split)
    commands = _commands(folder, data.path, others[0].split if others else "test", run.train)
    return Gathered(found, looked, commands, flat(config.model_dump(mode="json")))


def _calibration(s: Subject, error: float, chance: float) -> Iterator[Finding]:
    n = int(s.tally.n.sum())
    if error > chance:
        text = (
            f"on {s.split}, the calibration error in use is {error:.3f} (if calibrated, below {chance:.3f}), n = {n:,}"
        )
        yield Finding("calibration", s.split, text, error, math.nan, math.nan, chance, n)


def _commands(folder: Path, data: Path, split: str, train: str) -> dict[Bias, str]:
    audit, probe = f"python -m jobs.audit data={data}", f"python -m jobs.audit run={folder} split={split}"
    found: dict[Bias, str] = dict.fromkeys(MEANINGS, f"python -m jobs.evaluate run={folder} splits=[{train},{split}]")
    found.update(dict.fromkeys(OF_DATA, audit))
    found["label noise"] = probe
    return found


def _finding(tree: dict[str, Any]) -> Finding:
    return Finding._make(math.nan if tree[name] is None else tree[name] for name in Finding._fields)


def _of_split(finding: Finding, split: str) -> Finding:
    return finding._replace(text=f"on {split}, {finding.text}")


def diagnose(
    findings: Iterable[Finding], looked: set[Bias], commands: Mapping[Bias, str], settings: Mapping[str, Any]
) -> list[Verdict]:
    """A verdict for each bias, in the order in which to mend them; no advice that the settings follow already."""
    by_bias: dict[Bias, list[Finding]] = {bias: [] for bias in MEANINGS}
    for finding in findings:
        by_bias[finding.bias].append(finding)
    return [
        Verdict(
            bias,
            MEANINGS[bias],
            bias in looked,
            found,
            _advice(bias, settings) if found else [],
            "" if bias in looked else commands[bias],
        )
        for bias, found in by_bias.items()
    ]


def _advice(bias: Bias, settings: Mapping[str, Any]) -> list[Advice]:
    return [a for a in ADVICE[bias] if not (a.settings and all(_is_so(word, settings) for word in a.settings))]


def _is_so(word: str, settings: Mapping[str, Any]) -> bool:
    """Whether the settings have what a word such as `train.epochs=20` asks for; of training, as much at least."""
    path, _, text = word.partition("=")
    wanted, have = yaml.safe_load(text), settings.get(path)
    if path.startswith("train.") and isinstance(have, int | float):
        return have >= wanted
    return have == wanted


def summary(verdicts: list[Verdict], shown: int = 4) -> str:
    """In words, the first finding of each bias and its remedies."""
    lines = []
    for v in verdicts:
        if not v.findings:
            continue
        lines.append(f"{v.bias.upper()}: {v.meaning}")
        lines += [f"  - {finding.text}" for finding in v.findings[:shown]]
        lines += [f"  - and {len(v.findings) - shown} more" for _ in v.findings[shown : shown + 1]]
        lines += [f"  remedy: {a.text}{': ' * bool(a.settings)}{' '.join(a.settings)}" for a in v.advice]
    clear = [v.bias for v in verdicts if v.looked and not v.findings]
    lines += [f"not found: {', '.join(clear)}"] * bool(clear)
    lines += [f"not looked for: {v.bias}; {v.command}" for v in verdicts if not v.looked]
    return "\n".join(lines)
