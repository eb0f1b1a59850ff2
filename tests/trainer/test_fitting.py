"""Underfitting, overfitting and learning curves, told where they are known to be."""

import importlib
import json
import sys
from itertools import pairwise

import numpy as np
import pytest

from data_loaders.index import open_index
from data_loaders.loader import Data
from trainer.evaluate import View, tally
from trainer.metrics.intervals import wilson
from trainer.metrics.tally import Shape, Tally
from trainer.probe import fitting
from trainer.probe.fitting import LEAST, Fit, fits
from trainer.probe.learning_curve import (
    EXPONENTS,
    GAIN,
    Curve,
    Run,
    fit,
    learning_curves,
    of_several,
)
from trainer.probe.learning_curve import findings as curve_findings
from trainer.probe.learning_curve import summary as curve_summary

CLASSES = ("dessert", "drink", "food")
VALUES = {"venue": ("home", "street")}
SHAPE = Shape(2, 3)


def counted(seed: int, n: np.ndarray, recall: np.ndarray, sure: float = 0.8) -> Tally:
    """Of n rows by group and class, [2, 3], decided right with these probabilities."""
    random = np.random.default_rng(seed)
    cells, labels = (np.repeat(code.ravel(), n.ravel()) for code in np.indices((2, 3)))
    right = random.random(len(labels)) < recall[cells, labels]
    decided = np.where(right, labels, (labels + 1) % 3)
    p = np.full((len(labels), 3), (1 - sure) / 2)
    p[np.arange(len(labels)), decided] = sure
    return tally(View(np.log(p), decided), labels, cells, SHAPE)


def verdicts(found: list[Fit]) -> dict[tuple[str, str], str]:
    return {(f.group, f.name): f.verdict for f in found}


N = np.array([[300, 300, 300], [300, 300, 300]])
GOOD = np.full((2, 3), 0.97)


def test_a_class_that_overfits_in_one_group_is_told_there_and_one_that_underfits_everywhere():
    before, after = GOOD.copy(), GOOD.copy()
    after[1, 0] = 0.6
    before[:, 2] = after[:, 2] = 0.7
    found = fits(counted(0, N, before), counted(1, N, after), CLASSES, VALUES)
    told = verdicts(found)
    assert told["venue=street", "dessert"] == "overfit"
    assert told["all", "dessert"] == "overfit"
    assert told["all", "food"] == told["venue=home", "food"] == "underfit"
    assert told["venue=home", "dessert"] == told["all", "drink"] == told["venue=home", "drink"] == "fine"
    sentences = {(f.bias, f.where): f for f in fitting.findings(found, "test")}
    assert sentences["overfitting", "dessert"].high < 0
    assert ("overfitting", "dessert, venue=street") not in sentences  # it is told of the class
    assert sentences["underfitting", "food"].high < 0.8
    assert "dessert, venue=street" in fitting.summary(found, "test")


def test_what_the_labels_admit_is_no_underfitting():
    before = GOOD.copy()
    before[:, 2] = 0.7
    t = counted(0, N, before)
    admitted = np.array([1.0, 1.0, 0.75])
    found = fits(t, counted(1, N, before), CLASSES, VALUES, admitted)
    assert verdicts(found)["all", "food"] == "fine"
    assert next(f for f in found if f.name == "").admitted == pytest.approx(11 / 12)


def test_a_rise_of_the_nll_alone_is_overfitting():
    often = np.full((2, 3), 0.9)
    found = fits(counted(0, N, often, 0.97), counted(1, N, often, 0.9999), CLASSES, VALUES)
    whole = found[0]
    assert (whole.group, whole.name, whole.verdict) == ("all", "", "overfit")
    assert abs(whole.recall.change.value) < 0.03
    assert whole.nll.change.low > fitting.RISE


def test_classes_weigh_the_same_in_a_whole_group_whatever_their_mix():
    recall = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]])
    many, few = np.array([[40, 200, 3000], [40, 200, 3000]]), np.array([[400, 400, 400], [400, 400, 400]])
    whole = fits(counted(0, many, recall), counted(1, few, recall), CLASSES, VALUES)[0]
    assert whole.recall.before.value == pytest.approx(0.8, abs=0.05)
    assert abs(whole.recall.change.value) < 0.05
    assert whole.recall.before.n == many.sum()


def test_the_numbers_of_a_class_are_newcombes_and_wilsons():
    a, b = counted(0, N, GOOD), counted(1, N, GOOD * 0.9)
    found = next(f for f in fits(a, b, CLASSES, VALUES) if (f.group, f.name) == ("venue=home", "drink"))
    hits = [int(t.confusion[0, 1, 1]) for t in (a, b)]
    (low, low_after), (high, high_after) = (end.tolist() for end in wilson(np.array(hits), np.array([300, 300])))
    assert found.recall.before[:3] == pytest.approx((hits[0] / 300, low, high))
    p, q = hits[0] / 300, hits[1] / 300
    assert found.recall.change.low == pytest.approx(q - p - np.hypot(q - low_after, high - p))
    assert found.recall.change.high == pytest.approx(q - p + np.hypot(high_after - q, p - low))
    assert found.nll.before.value == pytest.approx(a.scores[0, 1, 0, 0] / 2**28 / 300)


def test_alarms_are_rare_where_both_splits_are_alike():
    false = 0
    for seed in range(60):
        n = np.random.default_rng(seed).integers(12, 80, (2, 3))
        found = fits(counted(seed, n * 5, GOOD), counted(seed + 500, n, GOOD), CLASSES, VALUES)
        false += any(f.verdict not in ("fine", "too few") for f in found)
    assert false <= 3


def test_few_rows_and_absent_classes_are_said_to_be_too_few():
    n = np.array([[LEAST - 1, 0, 50], [0, 0, 50]])
    found = fits(counted(0, N, GOOD), counted(1, n, GOOD * 0), CLASSES, VALUES)
    told = verdicts(found)
    assert told["all", "dessert"] == told["venue=home", "drink"] == told["venue=street", "dessert"] == "too few"
    assert told["all", "food"] == "overfit"
    absent = next(f for f in found if (f.group, f.name) == ("all", "drink"))
    assert np.isnan(absent.recall.after.value)
    assert absent.recall.after.n == 0
    empty = counted(0, np.zeros((2, 3), np.int64), GOOD)
    assert {f.verdict for f in fits(empty, empty, CLASSES, VALUES)} == {"too few"}


# Learning curves

SHARES = np.repeat(np.array([0.125, 0.25, 0.5, 1.0]), 3)


def runs(seed: int, error: np.ndarray, n: int = 2400, spread: float = 0.0) -> tuple[list[Run], np.ndarray]:
    """Runs of the SHARES whose error on each class is error(share) [K, M], on the same rows, which differ in ease."""
    random = np.random.default_rng(seed)
    labels, ease = np.arange(n) % 3, random.random(n)
    chance = np.clip(error + random.normal(0, spread, error.shape), 0, 1)
    return [Run(s, ease < chance[labels, m]) for m, s in enumerate(SHARES.tolist())], labels


def curves(seed: int, a: list[float], b: list[float], c: float, learnt: float) -> dict[str, Curve]:
    error = np.array(a)[:, None] + np.array(b)[:, None] * SHARES**-c
    made, labels = runs(seed, error, spread=0.003)
    own = np.random.default_rng(seed + 99).random(3000) < learnt
    found = learning_curves(made, labels, (np.arange(3000) % 3, own), CLASSES)
    return {curve.name: curve for curve in found}


def test_a_law_is_found_back_exactly():
    a, b, c = 0.1, 0.2, float(EXPONENTS[20])
    law = fit(SHARES, np.array([a + b * s**-c for s in SHARES.tolist()])[None], 500)
    assert (law.a[0], law.b[0], law.c[0]) == pytest.approx((a, b, c))
    assert law.gain[0] == pytest.approx(b - b * 2**-c)


def test_laws_never_rise_nor_leave_a_negative_error():
    rising = fit(SHARES, np.array([[0.1 + 0.1 * s, 0.02 * s**-1.9] for s in SHARES.tolist()]).T, 500)
    assert (rising.b >= 0).all()
    assert (rising.a >= 0).all()
    assert rising.gain[0] == 0


def test_a_class_that_lacks_data_one_that_lacks_capacity_and_neither_are_told_apart():
    found = curves(0, [0.0, 0.3, 0.004], [0.15, 0.0, 0.0], 0.5, 0.0)
    assert found["dessert"].verdict == "more data"
    assert found["food"].verdict == found["drink"].verdict == "neither"
    assert found["dessert"].gain.low > GAIN
    assert found["dessert"].rows == [125] * 3 + [250] * 3 + [500] * 3 + [1000] * 3
    high = curves(0, [0.0, 0.3, 0.3], [0.15, 0.0, 0.0], 0.5, 0.3)
    assert high["drink"].verdict == "more capacity"
    told = {f.where: f.bias for f in curve_findings(list(high.values()))}
    assert told["dessert"] == "overfitting"
    assert told["drink"] == "underfitting"
    assert "more capacity" in curve_summary(list(high.values()))


def test_the_gain_of_twice_the_rows_lies_within_its_interval():
    inside = 0
    for seed in range(20):
        found = curves(seed, [0.05, 0.05, 0.05], [0.1, 0.1, 0.1], 0.5, 0.0)
        gain = 0.1 * (1 - 2**-0.5)
        inside += sum(found[name].gain.low <= gain <= found[name].gain.high for name in CLASSES)
    assert inside >= 52  # of 60 at 95 %


def test_curves_of_few_rows_say_so_and_the_same_runs_draw_the_same_curves():
    made, labels = runs(1, np.full((3, len(SHARES)), 0.2), 24)
    learnt = np.arange(30) % 2, np.zeros(30, bool)
    found = learning_curves(made, labels, learnt, CLASSES)
    assert [c.verdict for c in found] == ["not settled", "too few", "too few", "too few"]
    assert found[3].learnt.n == 0
    assert json.dumps(found) == json.dumps(learning_curves(made, labels, learnt, CLASSES))
    assert of_several(made)
    assert not of_several(made[::3])


def test_a_share_of_the_training_rows_has_every_class_and_is_part_of_a_larger_one(dataset):
    index = open_index(dataset)
    parts = [np.asarray(Data(path=dataset, fraction=f).training_rows(index)) for f in (0.01, 0.1, 0.25, 0.5, 1.0)]
    counts = [np.bincount(index.labels[rows], minlength=3).tolist() for rows in parts]
    assert counts == [[1, 1, 1], [6, 2, 1], [15, 5, 2], [30, 9, 3], [60, 18, 6]]
    assert all(set(small) < set(large) for small, large in pairwise(parts))
    assert all((np.diff(rows) > 0).all() for rows in parts)


def test_the_job_trains_on_shares_and_goes_on(dataset, tmp_path, monkeypatch, capsys):
    words = [f"data.path={dataset}", f"folder={tmp_path}", "name=curve", "points=3", "data.size=12", "data.batch=16"]
    words += ["model.widths=[4]", "train.steps=4", "cluster.on=local", "cluster.device=cpu"]
    written = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["learning_curve", *words])
        importlib.import_module("jobs.learning_curve").main()
        written.append((tmp_path / "curve" / "learning_curve.json").read_bytes())
    assert written[0] == written[1]
    tree = json.loads(written[0])
    assert [c["name"] for c in tree["curves"]] == ["all", *CLASSES]
    assert tree["curves"][1]["rows"] == [15, 30, 60]
    assert sorted(p.name for p in (tmp_path / "curve").iterdir() if p.is_dir()) == ["1-of-1-0", "1-of-2-0", "1-of-4-0"]
    out = capsys.readouterr()
    assert "with one run for each share" in out.out
    assert out.err.count("going on from") == 0
