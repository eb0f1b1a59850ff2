"""Ray Tune over Ray Train: every trial is a training run of its own, in trials/ of the search's folder.

What a search knows lies in the folders of its trials, and nowhere else: a search that goes on reads them, runs again
what is unfinished, and proposes the rest. Ray Tune's own state is never read back, so nothing is unpickled.
"""

import contextlib
import json
import logging
import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index
from data_loaders.progress import say
from data_loaders.settings import differences, dump, parse_text
from data_loaders.stream import scramble
from trainer.collect import read_log
from trainer.config import Config
from trainer.context import REFUSED, STOP, Cluster, Row
from trainer.launch import cluster, room, train
from trainer.metrics.catalogue import RATES
from trainer.metrics.tally import Shape, Tally
from trainer.run import check, introduce, untrained
from trainer.space import Choice, Integer, LogUniform, Range, Search, Tuning, Uniform, Value, applied
from trainer.tracking import Tracking

TRIAL = "trial.json"
HEAD = {"node:__internal_head__": 0.001}
"""What a trial's driver takes. With a CPU for each, drivers could take all of them, and none be left for workers."""


TRY_AGAIN = 75
"""Exit code of a failure that may pass, so that the trial is run again when the search goes on."""
ATTEMPTS = "failed-*.json"
MOST_ATTEMPTS = 3


def _name(number: int) -> str:
    return f"trial-{number:03d}"


class Trial(NamedTuple):
    """A training that was tried."""

    number: int
    changes: dict[str, Value]
    """Dotted path -> value."""
    state: Literal["finished", "stopped", "failed", "unfinished"]
    reports: list[Row]
    failure: str

    @property
    def name(self) -> str:
        return _name(self.number)


class Winner(NamedTuple):
    """What a search found."""

    trial: Trial
    config: Config
    """Of the winner, trained anew with a seed of its own."""
    table: Path
    """Parquet, a row for each trial."""


@dataclass(frozen=True)
class Judge:
    """How good a report is."""

    search: Search
    classes: tuple[str, ...]
    shape: Shape

    def percent(self, report: Row) -> float:
        """How far the trial has come."""
        return 100 * report["step"] / report["steps"]

    def score(self, report: Row) -> float:
        """The objective; NaN where it has no value."""
        return self.search.score(report["calibrated_nll"], Tally.unpack(report["validation"], self.shape))

    def result(self, report: Row) -> dict[str, float]:
        """What Ray Tune hears of it; a missing value is the worst there is."""
        score = self.score(report)
        worst = math.inf if self.search.mode == "min" else -math.inf
        return {"percent": self.percent(report), "objective": worst if math.isnan(score) else score}


def search(tuning: Tuning) -> Winner:
    """Tries, judges on the validation split, and trains the winner anew. The same search goes on where it stopped.

    Raises Refusal (75) where another process is at work on it.
    """
    saved = tuning.run_folder / "search.yaml"
    former = parse_text(Tuning, saved.read_text(), str(saved)) if saved.exists() else None
    tuning = tuning.model_copy(update={"data": tuning.data.pinned(former.data if former else None)})
    index = check(tuning.training())
    check(tuning.training().model_copy(update={"seed": tuning.seed + 1}))  # the winner's
    tuning = _claim(tuning, former, index)
    with durable.owned(tuning.run_folder):
        return _searched(tuning, index)


def _searched(tuning: Tuning, index: Index) -> Winner:
    base, folder = tuning.training(), tuning.run_folder
    judge = Judge(tuning.search, index.classes, Shape(len(index.cell_names), len(index.classes)))
    introduce(tuning, index)
    with cluster(base.cluster):
        tried = read_trials(folder)
        done = sum(trial.state != "unfinished" for trial in tried)
        if done < tuning.search.trials:
            _try(tuning, judge, tried, tuning.search.trials - done)
            tried = read_trials(folder)
        write_table(folder, tried, judge)
        left = tuning.search.trials - sum(trial.state != "unfinished" for trial in tried)
        if left > 0:
            fault = Fault(str(folder), f"{left} trials are unfinished", "the same command goes on")
            raise Refusal("The search is not done:", [fault], TRY_AGAIN)
        trial = best(tried, judge)
        write_table(folder, tried, judge, trial.name)
        config = _winner(base, trial)
        say(f"{trial.name} wins; it is trained anew, with another seed, in {config.run_folder}")
        if untrained([config]):
            train(config)
    return Winner(trial, config, folder / "trials.parquet")


def read_trials(folder: Path) -> list[Trial]:
    """The trials of a search, by number."""
    return [_read_trial(path.parent) for path in sorted((folder / "trials").glob(f"*/{TRIAL}"))]


def best(tried: list[Trial], judge: Judge) -> Trial:
    """The trial with the best last report, among those that ran to the end if there are any."""
    scored = [(t, judge.score(t.reports[-1])) for t in tried if t.reports and t.state in ("finished", "stopped")]
    scored = [(trial, score) for trial, score in scored if not math.isnan(score)]
    scored = [item for item in scored if item[0].state == "finished"] or scored
    if not scored:
        faults = [Fault(trial.name, trial.failure or f"has no {judge.search.objective}") for trial in tried]
        raise Refusal("No trial can be judged:", faults, 65)
    return (min if judge.search.mode == "min" else max)(scored, key=lambda item: item[1])[0]


def write_table(folder: Path, tried: list[Trial], judge: Judge, winner: str = "") -> None:
    """trials.parquet: what was tried, how far it came, and what the validation split said at the end."""
    lines = []
    for trial in tried:
        line: dict[str, Any] = {"trial": trial.name, "state": trial.state, "failure": trial.failure}
        line |= {path: trial.changes[path] for path in judge.search.ranges}
        if trial.reports:
            last = trial.reports[-1]
            tally = Tally.unpack(last["validation"], judge.shape).overall()
            score = judge.score(last)
            line |= {"step": last["step"], "steps": last["steps"], "objective": None if math.isnan(score) else score}
            line |= {"calibrated_nll": last["calibrated_nll"]}
            line |= {name: float(RATES[name].value(tally)[0]) for name in ("balanced_accuracy", "worst_recall", "nll")}
            recalls = RATES["recall"].value(tally)[0]
            line |= {f"recall.{name}": float(value) for name, value in zip(judge.classes, recalls, strict=True)}
        lines.append(line)
    names = dict.fromkeys(name for line in lines for name in line)
    table = pa.table({name: pa.array([line.get(name) for line in lines]) for name in names})
    table = table.replace_schema_metadata(
        {"objective": judge.search.objective, "mode": judge.search.mode, "winner": winner}
    )
    with durable.writing(folder / "trials.parquet") as aside:
        pyarrow.parquet.write_table(table, aside)


class Proposals(Searcher):
    """Asks Optuna for values. The proposal number n depends on n, on the seed and on what is known by then."""

    def __init__(self, judge: Judge, tried: list[Trial]) -> None:
        self.search = search = judge.search
        super().__init__("objective", search.mode)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.ranges = {path: _distribution(values) for path, values in search.ranges.items()}
        self.study = optuna.create_study(direction="minimize" if search.mode == "min" else "maximize")
        for trial in tried:
            if trial.state != "unfinished":
                self.study.add_trial(self._known(trial, judge))
        self.unfinished = [trial for trial in tried if trial.state == "unfinished"]
        self.next = 1 + max((trial.number for trial in tried), default=-1)
        self.asked: dict[str, optuna.Trial] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        if self.unfinished:
            number, changes = self.unfinished.pop(0)[:2]
            self.study.enqueue_trial(changes)
        else:
            number, self.next = self.next, self.next + 1
        kind = optuna.samplers.TPESampler if self.search.searcher == "tpe" else optuna.samplers.RandomSampler
        word = scramble(np.array([self.search.seed], np.uint64)) + np.uint64(number)
        self.study.sampler = kind(seed=int(scramble(word)[0] % 2**32))
        self.asked[trial_id] = self.study.ask(self.ranges)
        return {"number": number, "changes": self.asked[trial_id].params}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        value = (result or {}).get("objective")
        known = not error and value is not None and math.isfinite(value)
        state = TrialState.COMPLETE if known else TrialState.FAIL
        self.study.tell(self.asked.pop(trial_id), value if known else None, state)

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        return True  # all is known already

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' folders hold all there is to know."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from the folders of its trials")

    def _known(self, trial: Trial, judge: Judge) -> optuna.trial.FrozenTrial:
        score = judge.score(trial.reports[-1]) if trial.reports and trial.state != "failed" else math.nan
        value, state = (score, TrialState.COMPLETE) if math.isfinite(score) else (None, TrialState.FAIL)
        return create_trial(params=trial.changes, distributions=self.ranges, value=value, state=state)


class Halving(ASHAScheduler):
    """ASHA that asks a trial to stop, by a file in its folder, where Ray would kill it: so the trial's workers leave no
    resources behind, its model is published, and its W&B run is closed."""

    def __init__(self, judge: Judge, folder: Path, tried: list[Trial]) -> None:
        search = judge.search
        super().__init__("percent", "objective", search.mode, 100, 100 * search.grace, search.reduction)  # pyright: ignore[reportArgumentType]
        self.folder = folder
        for trial in tried:  # what was learned before the search was interrupted
            if trial.state != "unfinished":
                past: Any = PastTrial(trial.name)
                self.on_trial_add(None, past)  # pyright: ignore[reportArgumentType]
                for report in trial.reports:
                    super().on_trial_result(None, past, judge.result(report))  # pyright: ignore[reportArgumentType]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = self.folder / "trials" / _name(trial.config["number"]) / STOP
        behind = not stop.exists() and super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP
        if behind and result["percent"] < 100:
            stop.touch()
        return TrialScheduler.CONTINUE


class PastTrial(NamedTuple):
    """What ASHA needs to know of a trial that is over."""

    trial_id: str


class ToTune(TuneReportCallback):
    """Hands each report to Ray Tune, in Ray Train's controller, where an exception would end the run for good."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        try:
            (row,) = [m["row"] for m in metrics if m["rank"] == 0]
            super().after_report(run_context, [self.judge.result(row)], None)
        except Exception as wrong:
            say(f"a report did not reach Ray Tune: {wrong!r}")


class Told(tune.Callback):
    """Says how the search goes, and keeps its table up to date."""

    def __init__(self, folder: Path, judge: Judge) -> None:
        self.folder, self.judge = folder, judge

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        name, objective = _name(trial.config["number"]), self.judge.search.objective
        say(f"{name}: {result['percent']:.0f} %, {objective} {result['objective']:.4f}")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._tell(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._tell(trial.config["number"])
        say(f"what became of it is told in {trial.error_file}")

    def _tell(self, number: int) -> None:
        tried = read_trials(self.folder)
        write_table(self.folder, tried, self.judge)
        done = sum(trial.state != "unfinished" for trial in tried)
        for this in (trial for trial in tried if trial.number == number):
            why = this.failure and f": {this.failure}"
            say(f"{this.name} {this.state}{why}, {done} of {self.judge.search.trials} done")
        with contextlib.suppress(Refusal):
            leader = best(tried, self.judge)
            say(f"the best so far is {leader.name} with {self.judge.score(leader.reports[-1]):.4f}")


def _claim(tuning: Tuning, former: Tuning | None, index: Index) -> Tuning:
    """The search with whole paths, saved in its folder; refuses a folder of another search, or other data."""
    cluster = tuning.cluster.model_copy(update={"address": tuning.cluster.place})  # which a trial's process is not told
    whole = {"folder": durable.lasting(tuning.folder, "folder"), "cluster": cluster, "resume": False}
    resume, tuning = tuning.resume, tuning.model_copy(update=whole)
    folder = tuning.run_folder
    if former:
        changed = differences(_fixed(former), _fixed(tuning))
        faults = [Fault(path, f"was {before}, now {after}") for path, before, after in changed]
        if json.loads((folder / "search.json").read_bytes())["data"] != index.fingerprint:
            faults.append(Fault("data.path", f"{tuning.data.path} holds other data than it did"))
        if faults:
            raise Refusal(f"{folder} holds another search; give another name=…, or remove it:", faults)
    elif resume:
        fix = "leave out --resume, or give its folder=… and name=…"
        raise Refusal("There is nothing to resume:", [Fault(str(folder), "holds no search", fix)])
    durable.write_json(folder / "search.json", {"data": index.fingerprint})
    durable.write(folder / "search.yaml", dump(tuning))
    return tuning


def _fixed(tuning: Tuning) -> Tuning:
    """What must stay the same while a search goes on."""
    search = tuning.search.model_copy(update={"trials": 1, "concurrent": None})
    free = {"cluster": Cluster(), "tracking": Tracking(), "folder": Path("runs"), "search": search}
    return tuning.model_copy(update=free)


def _try(tuning: Tuning, judge: Judge, tried: list[Trial], trials: int) -> None:
    """Runs so many trials, the unfinished ones first."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    folder, together = tuning.run_folder, tuning.search.concurrent or room(tuning.cluster)
    say(f"{trials} trials, {together} at once")
    halving = tuning.search.early_stopping == "asha"
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_run, text=dump(tuning), judge=judge), HEAD),
        tune_config=tune.TuneConfig(
            num_samples=trials,
            max_concurrent_trials=together,
            search_alg=Proposals(judge, tried),
            scheduler=Halving(judge, folder, tried) if halving else FIFOScheduler(),
            trial_dirname_creator=lambda trial: trial.trial_id,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"launch-{uuid.uuid4().hex[:8]}",
            storage_path=str(folder / "tune"),
            verbose=0,
            callbacks=[Told(folder, judge)],
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints the traceback of each trial that is refused
    with contextlib.redirect_stdout(None):  # where Tune prints tables of its own, even when it is asked to be silent
        tuner.fit()


def _run(proposal: dict[str, Any], text: str, judge: Judge) -> None:
    """One trial: a Ray Train run whose reports go to Ray Tune as well."""
    tuning = parse_text(Tuning, text)
    folder = tuning.run_folder / "trials" / _name(proposal["number"])
    durable.write_json(folder / TRIAL, proposal)
    try:
        config = applied(tuning.training(), proposal["changes"])
        tracking = config.tracking.model_copy(update={"artifacts": False})
        place = {"folder": folder.parent, "name": folder.name, "tracking": tracking}
        train(config.model_copy(update=place), [ToTune(judge)])
    except Exception as failure:
        refusal = failure if isinstance(failure, Refusal) else Refusal(repr(failure), [], TRY_AGAIN)
        attempt = len(list(folder.glob(ATTEMPTS))) + 1
        refusal.save(folder / ATTEMPTS.replace("*", str(attempt)))
        if refusal.exit_code != TRY_AGAIN or attempt == MOST_ATTEMPTS:
            refusal.save(folder / REFUSED)
        raise


def _winner(base: Config, trial: Trial) -> Config:
    config = applied(base, trial.changes)
    return config.model_copy(update={"name": f"winner-{trial.number:03d}", "seed": config.seed + 1})


def _read_trial(folder: Path) -> Trial:
    proposal = json.loads((folder / TRIAL).read_bytes())
    reports = [row for row in read_log(folder / "log.jsonl").values() if "train" in row]
    reports.sort(key=lambda row: row["step"])
    refused, failure, state = folder / REFUSED, "", "unfinished"
    if durable.damage(folder / "model") is None and (folder / "metrics.parquet").exists():  # written last of all
        facts = json.loads((folder / "model" / "facts.json").read_bytes())
        state = "finished" if facts["step"] == facts["steps"] or facts["stopped_early"] else "stopped"
        reports = [row for row in reports if row["step"] <= facts["kept_step"]]  # of which the last is the model's own
    elif refused.exists():
        refusal = Refusal.load(refused)
        state, failure = "failed", "; ".join(map(str, refusal.faults)) or refusal.title
    return Trial(proposal["number"], proposal["changes"], state, reports, failure)


def _distribution(values: Range) -> BaseDistribution:
    match values:
        case Uniform(low, high):
            return FloatDistribution(low, high)
        case LogUniform(low, high):
            return FloatDistribution(low, high, log=True)
        case Integer(low, high):
            return IntDistribution(low, high)
        case Choice(texts):
            return CategoricalDistribution(texts)
        case _:
            raise TypeError(type(values))
