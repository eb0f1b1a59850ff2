"""Ray Tune over Ray Train: what is proposed, what is stopped, what is kept; and searches on a real local Ray."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import wandb_file
from small_runs import config_for

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.index import open_index
from data_loaders.settings import dump, override, parse_text
from trainer.metrics.tally import Shape, Tally
from trainer.space import LogUniform, Search, Tuning, Uniform

pytestmark = [pytest.mark.filterwarnings("ignore")]  # Ray's and Optuna's own imports warn
SPACE = {"penalties.l1": LogUniform(1e-7, 1e-3), "model.dropout": Uniform(0, 0.5)}
SHAPE = Shape(1, 2)


def report(step: int, nll: float, steps: int = 10) -> dict[str, Any]:
    vector = np.ones(SHAPE.size, np.int64)
    return {
        "step": step,
        "steps": steps,
        "calibrated_nll": nll,
        "train": "",
        "validation": Tally.of(vector, SHAPE).pack(),
    }


def judge(**settings: Any):
    from trainer.search import Judge

    return Judge(Search(space=SPACE, **settings), ("a", "b"), SHAPE)


def trial(number: int, state: Any, *reports: dict[str, Any], **changes: Any):
    from trainer.search import Trial

    return Trial(number, {"penalties.l1": 1e-5, "model.dropout": 0.1} | changes, state, list(reports), "")


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_proposals_depend_on_the_seed_the_number_and_what_is_known_and_not_on_an_interruption(searcher):
    from trainer.search import Proposals

    def proposed(n: int, tried=()) -> list[dict[str, Any]]:
        found = Proposals(judge(searcher=searcher, seed=3), list(tried))
        made = []
        for i in range(n):
            made.append(found.suggest(str(i)))
            found.on_trial_complete(str(i), {"objective": made[-1]["changes"]["model.dropout"]})
        return made

    whole = proposed(14)
    assert [p["number"] for p in whole] == list(range(14))
    assert len({str(p["changes"]) for p in whole}) == 14
    known = [
        trial(p["number"], "finished", report(10, p["changes"]["model.dropout"]), **p["changes"]) for p in whole[:12]
    ]
    assert proposed(2, known) == whole[12:]
    assert whole != [*Proposals(judge(searcher=searcher, seed=4), []).suggest("0")]


def test_unfinished_trials_are_run_again_first_under_their_own_numbers():
    from trainer.search import Proposals

    tried = [
        trial(0, "finished", report(10, 0.5)),
        trial(1, "unfinished", **{"model.dropout": 0.3}),
        trial(4, "failed"),
    ]
    found = Proposals(judge(), tried)
    first, second = found.suggest("a"), found.suggest("b")
    assert first == {"number": 1, "changes": {"penalties.l1": 1e-5, "model.dropout": 0.3}}
    assert second["number"] == 5


def test_a_trial_that_falls_behind_is_asked_to_stop_and_never_killed(tmp_path):
    from trainer.search import Halving

    halving: Any = Halving(judge(), tmp_path, [])
    trials = [SimpleNamespace(trial_id=str(n), config={"number": n}) for n in range(4)]
    for t, value in zip(trials, (0.1, 0.2, 0.3, 0.4), strict=True):
        (tmp_path / "trials" / f"trial-{t.config['number']:03d}").mkdir(parents=True)
        halving.on_trial_add(None, t)
        assert halving.on_trial_result(None, t, {"percent": 20.0, "objective": value}) == "CONTINUE"
        assert halving.on_trial_result(None, t, {"percent": 100.0, "objective": value}) == "CONTINUE"
    stopped = sorted(path.parent.name for path in tmp_path.glob("trials/*/stop"))
    assert stopped == ["trial-001", "trial-002", "trial-003"]


def test_what_halving_learned_before_an_interruption_counts_after_it(tmp_path):
    from trainer.search import Halving

    past = [trial(n, "finished", report(2, 0.1), report(10, 0.1)) for n in range(3)]
    halving: Any = Halving(judge(), tmp_path, past)
    late = SimpleNamespace(trial_id="late", config={"number": 3})
    (tmp_path / "trials" / "trial-003").mkdir(parents=True)
    halving.on_trial_add(None, late)
    halving.on_trial_result(None, late, {"percent": 20.0, "objective": 0.2})
    assert (tmp_path / "trials" / "trial-003" / "stop").exists()


def test_the_winner_ran_to_the_end_if_any_trial_did_and_has_a_number():
    from trainer.search import best

    stopped, worse = trial(0, "stopped", report(4, 0.1)), trial(1, "finished", report(10, 0.3))
    assert best([stopped, worse, trial(2, "finished", report(10, 0.2)), trial(3, "failed")], judge()).number == 2
    assert (
        best([stopped, trial(3, "failed", report(8, 0.01)), trial(4, "unfinished", report(8, 0.0))], judge()).number
        == 0
    )
    assert best([worse, trial(2, "finished", report(10, 0.2))], judge(objective="accuracy")).number == 1
    with pytest.raises(Refusal, match="No trial can be judged"):
        best([trial(3, "failed"), trial(4, "finished", report(10, float("nan")))], judge())


def test_the_state_of_a_trial_is_read_from_its_folder(tmp_path):
    from trainer.search import read_trials, write_table

    def folder(number: int, *reports: dict[str, Any]) -> Path:
        path = tmp_path / "trials" / f"trial-{number:03d}"
        durable.write_json(
            path / "trial.json", {"number": number, "changes": {"penalties.l1": 1e-5, "model.dropout": 0.1}}
        )
        lines = [{"key": f"step-{r['step']}", "row": r} for r in reports]
        (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    for number, last, early in ((0, 10, False), (1, 6, False), (5, 8, True)):
        reports = [report(2, 0.9), report(6, 0.4), report(8, 0.6)] if early else [report(2, 0.9), report(last, 0.5)]
        facts = {"step": last, "steps": 10, "kept_step": 6 if early else last, "stopped_early": early}
        with durable.publishing(folder(number, *reports) / "model") as aside:
            durable.write_json(aside / "facts.json", facts)
        (tmp_path / "trials" / f"trial-{number:03d}" / "metrics.parquet").write_text("")
    Refusal("Training diverged:", [Fault("optimizer.lr", "is too high")], 65).save(folder(2) / "refused.json")
    folder(3, report(2, 0.9))
    with durable.publishing(folder(4, report(2, 0.9)) / "model") as aside:  # killed before all was collected
        (aside / "weights").write_text("")
    tried = read_trials(tmp_path)
    assert [t.state for t in tried] == ["finished", "stopped", "failed", "unfinished", "unfinished", "finished"]
    write_table(tmp_path, tried, judge())
    table = pyarrow.parquet.read_table(tmp_path / "trials.parquet").to_pydict()
    assert table["objective"] == [0.5, 0.5, None, 0.9, 0.9, 0.4]  # of the last, that of the weights that it keeps
    assert table["penalties.l1"] == [1e-5] * 6
    assert table["step"] == [10, 6, None, 2, 2, 6]
    assert "is too high" in table["failure"][2]


def tuning_for(dataset: Path, folder: Path, **changes: Any) -> Tuning:
    base = config_for(dataset, folder).model_dump()
    base |= {"name": "s", "cluster": {"on": "ray", "workers": 1, "device": "cpu"}, "tracking": {"mode": "offline"}}
    base["search"] = {"space": SPACE, "trials": 2, "concurrent": 2, "searcher": "random"}
    return override(Tuning.model_validate(base), changes)


def test_a_trial_whose_values_do_not_go_together_fails_and_one_that_breaks_off_is_tried_three_times(
    dataset, tmp_path, monkeypatch
):
    from trainer import search
    from trainer.search import read_trials

    tuning = override(tuning_for(dataset, tmp_path), {"data.size": 12})
    wrong = {"number": 0, "changes": {"model.widths": "[8, 8, 8, 8, 8]"}}
    with pytest.raises(Refusal, match="too small for the model"):
        search._run(wrong, dump(tuning), judge())

    def break_off(*_: Any) -> None:
        raise OSError("the machine is gone")

    monkeypatch.setattr(search, "train", break_off)
    monkeypatch.setattr(search, "ToTune", lambda _: None)
    for state in ("unfinished", "unfinished", "failed"):
        with pytest.raises(OSError, match="gone"):
            search._run({"number": 1, "changes": {}}, dump(tuning), judge())
        assert read_trials(tmp_path / "s")[1].state == state
    first, second = read_trials(tmp_path / "s")
    assert first.state == "failed"
    assert "too small" in first.failure
    assert "the machine is gone" in second.failure


@pytest.mark.ray
def test_a_search_tries_judges_and_trains_the_winner_anew(dataset, tmp_path):
    from trainer.search import read_trials, search

    tuning = tuning_for(dataset, tmp_path, **{"search.space": SPACE | {"optimizer.lr": read("choice(0.01, 1e30)")}})
    tuning = override(tuning, {"search.trials": 2, "search.seed": 3, "search.early_stopping": "none"})
    found = search(tuning)
    tried = read_trials(tmp_path / "s")
    assert [t.state for t in tried] == ["finished", "failed"]
    table = pyarrow.parquet.read_table(found.table).to_pydict()
    assert table["optimizer.lr"] == [t.changes["optimizer.lr"] for t in tried]
    assert found.trial.number == 0
    assert found.config.seed == 1
    assert found.config.penalties.l1 == found.trial.changes["penalties.l1"]
    assert durable.damage(found.config.run_folder / "model") is None
    files = [
        file for t in tried for file in (tmp_path / "s" / "trials" / t.name).glob("wandb/offline-run-*/run-*.wandb")
    ]
    assert len(files) == 2
    runs = [r.run for file in files for r in wandb_file.records(file) if r.WhichOneof("record_type") == "run"]
    assert {run.run_group for run in runs} == {"s"}
    again = search(override(tuning, {"resume": True}))  # all is there: nothing runs
    assert again.trial == found.trial
    with pytest.raises(Refusal, match="holds another search"):
        search(override(tuning, {"search.seed": 4}))


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_loses_and_repeats_no_finished_trial(dataset, tmp_path):
    from trainer.search import read_trials

    steps = {"train.steps": 400, "train.report_every": 50, "search.trials": 5, "search.early_stopping": "none"}
    tuning = tuning_for(dataset, tmp_path, **steps)
    (tmp_path / "search.yaml").write_text(dump(tuning))
    words = [sys.executable, "-m", "jobs.tune", str(tmp_path / "search.yaml")]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    models = tmp_path / "s" / "trials"
    while not models.exists() or sum(t.state == "finished" for t in read_trials(tmp_path / "s")) < 2:
        assert first.poll() is None
        time.sleep(0.1)
    while len(list(models.glob("*/trial.json"))) < 3:  # a third is under way
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {t.name: t for t in read_trials(tmp_path / "s") if t.state == "finished"}
    stamps = {name: (models / name / "log.jsonl").stat().st_mtime_ns for name in before}
    assert len(before) >= 2
    time.sleep(10)  # until Ray's own processes have noticed
    assert subprocess.run([*words, "--resume"], check=False).returncode == 0
    after = {t.name: t for t in read_trials(tmp_path / "s")}
    assert sorted(after) == [f"trial-{n:03d}" for n in range(5)]
    assert {t.state for t in after.values()} == {"finished"}
    for name, stamp in stamps.items():
        assert after[name] == before[name]
        assert (models / name / "log.jsonl").stat().st_mtime_ns == stamp
    whole = tuning_for(dataset, tmp_path / "whole", **steps)
    from trainer.search import Judge, Proposals

    index = open_index(dataset)
    proposals = Proposals(Judge(whole.search, index.classes, SHAPE), [])
    assert [proposals.suggest(str(n))["changes"] for n in range(5)] == [t.changes for t in after.values()]


def test_nothing_to_resume_other_data_and_too_many_members_are_refused_before_ray_starts(dataset, tmp_path):
    from trainer.search import search

    with pytest.raises(Refusal, match="nothing to resume"):
        search(tuning_for(dataset, tmp_path, resume=True))
    assert not (tmp_path / "s").exists()
    with pytest.raises(Refusal, match="single models"):
        tuning_for(dataset, tmp_path, **{"train.members": 2})
    assert parse_text(Tuning, dump(tuning_for(dataset, tmp_path))) == tuning_for(dataset, tmp_path)


def read(text: str) -> Any:
    from trainer.space import read_range

    return read_range(text)
