"""Ensembles: members on other seeds or other undersamples, averaged under one prior."""

import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from small_runs import CPU, config_for

from data_loaders.faults import Refusal
from data_loaders.index import open_index
from trainer import run
from trainer.checkpoint import Trained, load_model
from trainer.context import Local
from trainer.decision.calibrators import Affine, Temperatures
from trainer.ensemble import average
from trainer.evaluate import logits_of

UNDERSAMPLED = {"data.sampler.kind": "undersampled", "train.members": 3, "train.steps": 6}


@pytest.fixture(scope="module")
def ensemble(dataset, tmp_path_factory):
    """An ensemble of three undersampled members, trained in this process."""
    config = config_for(dataset, tmp_path_factory.mktemp("runs"), **UNDERSAMPLED)
    run.train(config)
    return config


def members(config) -> list[Trained]:
    return [load_model(member.run_folder / "model", CPU) for member in config.members()]


def test_an_ensemble_is_the_mean_of_its_members_probabilities_in_use(ensemble, dataset):
    index = open_index(dataset)
    rows = index.rows_of("test")
    parts = members(ensemble)
    whole = load_model(ensemble.run_folder / "model", CPU)
    logits = [logits_of(p.model, index, ensemble.data, rows, Local(dataset, CPU)) for p in (*parts, whole)]
    p = np.mean([np.exp(m.ledger.log_probabilities(z)) for m, z in zip(parts, logits, strict=False)], axis=0)
    np.testing.assert_allclose(np.exp(logits[-1]), p, rtol=1e-4)
    uncalibrated = whole.ledger.with_calibrator(Temperatures(1.0))
    np.testing.assert_allclose(np.exp(uncalibrated.log_probabilities(logits[-1])), p, rtol=1e-4)


def test_members_start_from_other_weights_and_keep_other_rows_of_the_majority(ensemble, dataset):
    index = open_index(dataset)
    configs = ensemble.members()
    assert len({config.seed for config in configs}) == 3
    kept = [set(c.data.sampler.over(index, index.rows_of("train"), c.seed).row_ids.tolist()) for c in configs]
    food = set(np.flatnonzero(index.labels == 2).tolist())
    assert all(len(k) == 18 for k in kept)
    assert set.intersection(*kept) >= food & set(index.rows_of("train").tolist())
    assert len(set.union(*kept)) > 18
    first, second = (next(iter(m.model.parameters())) for m in members(ensemble)[:2])
    assert not torch.equal(first, second)


def test_ensembles_of_other_seeds_share_no_member(dataset, tmp_path):
    seeds = [{m.seed for m in config_for(dataset, tmp_path, **UNDERSAMPLED, seed=s).members()} for s in range(5)]
    assert len(set.union(*seeds)) == 15


def test_an_ensemble_of_one_model_three_times_is_that_model(ensemble, dataset):
    index = open_index(dataset)
    one = members(ensemble)[0]
    prior = np.array([0.2, 0.3, 0.5])
    logits = logits_of(average([one] * 3, prior), index, ensemble.data, index.rows_of("val"), Local(dataset, CPU))
    alone = logits_of(one.model, index, ensemble.data, index.rows_of("val"), Local(dataset, CPU))
    np.testing.assert_allclose(logits, one.ledger.log_probabilities(alone, prior), atol=1e-5)


def test_a_member_that_is_more_than_a_temperature_is_refused(ensemble):
    one = members(ensemble)[0]
    other = replace(one, ledger=one.ledger.with_calibrator(Affine(np.ones(3), np.zeros(3))))
    with pytest.raises(Refusal, match="member 1: has slopes and biases"):
        average([one, other], one.ledger.deployment_prior)


def test_members_that_are_trained_are_not_trained_again(ensemble):
    before = [(m.run_folder / "log.jsonl").stat().st_mtime_ns for m in ensemble.members()]
    whole = (ensemble.run_folder / "model" / "model.safetensors").read_bytes()
    run.train(ensemble)
    assert [(m.run_folder / "log.jsonl").stat().st_mtime_ns for m in ensemble.members()] == before
    assert (ensemble.run_folder / "model" / "model.safetensors").read_bytes() == whole


def test_an_ensemble_is_evaluated_reported_and_predicts_as_a_model_does(ensemble, tmp_path, monkeypatch):
    from jobs import evaluate, predict, report

    def call(job, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["job", *words])
        job.main()

    folder = ensemble.run_folder
    call(evaluate, f"run={folder}", "device=cpu")
    call(report, f"runs=[{folder}]", f"out={tmp_path / 'page.html'}")
    images = ensemble.data.path.parent
    call(predict, f"run={folder}", "source.kind=folder", f"source.path={images}", f"out={tmp_path / 'p.parquet'}")
    found = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pydict()
    own = pyarrow.parquet.read_table(folder / "evaluation" / "test" / "predictions.parquet").to_pydict()
    by_path = dict(zip(found["path"], found["p.food"], strict=True))
    np.testing.assert_allclose([by_path[name] for name in own["id"]], own["p.food"], rtol=1e-4)
