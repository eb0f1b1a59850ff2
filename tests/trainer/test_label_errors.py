"""Wrong labels are told from hard ones, where the truth is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from data_loaders.index import open_index
from data_loaders.loader import Data
from trainer.model import SmallCnn
from trainer.networks import Ensemble
from trainer.probe.label_errors import (
    DROP,
    FOLDS,
    RIDGE,
    _components,
    _head,
    blind,
    confident_joint,
    cross_fitted,
    features_of,
    findings,
    label_errors,
    noise_rates,
    summary,
)

NAMES = ("dessert", "drink", "food")
PRIOR = np.array([0.1, 0.2, 0.7])


def posterior(seed: int, n: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [N, K] of Gaussian classes, and true labels that are drawn from them."""
    random = np.random.default_rng(seed)
    labels = random.choice(3, n, p=PRIOR)
    x = random.normal(0, 1, (n, 3)) + sharpness * np.eye(3)[labels]
    log_p = sharpness * x + np.log(PRIOR)
    return log_p - np.log(np.exp(log_p).sum(1, keepdims=True)), labels


def flipped(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed + 1000)
    return np.where(random.random(len(labels)) < share, (labels + random.integers(1, 3, len(labels))) % 3, labels)


def test_the_confident_joint_is_that_of_its_definition():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7], [0.85, 0.15], [0.4, 0.6]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    # Thresholds are 1.7 / 3 and 1.45 / 3. Confident of 0: rows 0, 1 (labelled 0) and 4; of 1: rows 2, 3 and 5.
    expected = np.array([[2, 1], [1, 2]]) / 6
    assert confident_joint(p, labels) == pytest.approx(expected)
    assert noise_rates(expected) == pytest.approx([1 / 3, 1 / 3])


def test_the_confident_joint_finds_known_noise_where_classes_are_told_apart():
    random = np.random.default_rng(0)
    true = random.choice(3, 6000, p=PRIOR)
    turned = np.where(random.random(6000) < 0.2, (true + 1) % 3, true)
    p = 0.02 + 0.94 * np.eye(3)[true]
    joint = confident_joint(p, turned)
    truth = np.array([[((turned == i) & (true == j)).mean() for j in range(3)] for i in range(3)])
    assert joint == pytest.approx(truth, abs=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_the_confident_joint_has_the_labels_as_its_margin_whatever_the_probabilities(seed, n, k):
    random = np.random.default_rng(seed)
    labels, p = random.integers(0, k, n), random.dirichlet(np.ones(k), n)
    joint = confident_joint(p, labels)
    assert (joint >= 0).all()
    assert joint.sum(1) == pytest.approx(np.bincount(labels, minlength=k) / n)


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_share_of_wrong_labels_is_found_with_its_interval(share):
    inside, values = 0, []
    for seed in range(6):
        log_p, true = posterior(seed, 1500, 2.5)
        labels = flipped(true, share, seed)
        found = label_errors(log_p * 0.6, labels, NAMES).wrong  # any temperature
        values.append(found.value)
        inside += found.low <= (labels != true).mean() <= found.high
    assert np.mean(values) == pytest.approx(share, abs=0.015)
    assert inside >= 5


def test_hard_but_clean_labels_raise_no_alarm_though_confident_learning_counts_them():
    told, counted = 0, []
    for seed in range(12):
        log_p, labels = posterior(seed, 800, 1.2)
        found = label_errors(log_p * 1.7, labels, NAMES)
        told += bool(list(findings(found, "train")))
        counted.append(1 - np.trace(found.joint))
    assert told == 0
    assert min(counted) > 0.1


def test_wrong_labels_raise_the_alarm_and_are_named_first():
    log_p, true = posterior(1, 1500, 2.5)
    labels = flipped(true, 0.1, 1)
    found = label_errors(log_p, labels, NAMES)
    (finding,) = findings(found, "train")
    assert (finding.bias, finding.where, finding.n) == ("label noise", "train", 1500)
    assert finding.low > 0.05 > finding.chance
    assert "of the labels of train are probably wrong" in finding.text
    suspects = [s.row for s in found.suspects]
    assert (labels != true)[suspects].mean() > 0.85
    first = found.suspects[0]
    assert first.label == NAMES[labels[first.row]] != first.likely
    assert first.margin < 0
    assert [s.wrong for s in found.suspects] == sorted((s.wrong for s in found.suspects), reverse=True)
    rates = {c.name: c.wrong for c in found.classes}
    truth = [(true != labels)[labels == k].mean() for k in range(3)]
    assert all(rates[n].low - 0.05 <= t <= rates[n].high + 0.05 for n, t in zip(NAMES, truth, strict=True))
    assert "dessert" in summary(found)


def test_the_fit_is_the_maximum_and_its_calibration_is_found_back():
    log_p, labels = posterior(3, 4000, 2.0)
    fit = blind(2.0 * log_p + np.array([0.5, 0.0, -0.5]), labels)
    assert fit.wrong < 0.01
    assert fit.clean == pytest.approx(np.exp(log_p), abs=0.05)
    exact = blind(log_p, labels, 0.3)
    assert exact.shares.sum() == pytest.approx(0.3)
    assert exact.log_likelihood < fit.log_likelihood - DROP


def test_the_same_labels_give_the_same_numbers_in_any_order():
    log_p, true = posterior(5, 600, 2.0)
    labels = flipped(true, 0.15, 5)
    order = np.random.default_rng(0).permutation(600)
    one, other = label_errors(log_p, labels, NAMES), label_errors(log_p[order], labels[order], NAMES)
    assert one == label_errors(log_p, labels, NAMES)
    assert other.wrong[:3] == pytest.approx(one.wrong[:3], abs=2e-3)
    assert other.suspects[0].wrong == pytest.approx(one.suspects[0].wrong, abs=1e-2)


def test_absent_classes_single_rows_and_no_numbers_break_nothing():
    log_p, labels = posterior(6, 200, 2.0)
    log_p[labels == 1] = np.nan
    found = label_errors(log_p, labels, NAMES)
    assert found.wrong.n == (labels != 1).sum()
    assert found.classes[1].wrong.n == 0
    assert np.isnan(found.classes[1].wrong.value)
    assert np.isnan(found.classes[1].counted)
    alone = label_errors(np.log([[0.2, 0.5, 0.3]]), np.array([2]), NAMES)
    assert alone.wrong.n == 1
    assert list(findings(alone, "val")) == []
    nothing = label_errors(np.full((3, 3), np.nan), np.array([0, 1, 2]), NAMES)
    assert (nothing.wrong.n, list(findings(nothing, "val"))) == (0, [])
    certain = np.where(np.eye(3)[labels] > 0, 0.0, -np.inf)
    assert label_errors(certain, labels, NAMES).wrong.high < 0.05


def test_many_classes_of_few_rows_are_no_noise():
    random = np.random.default_rng(8)
    labels = random.integers(0, 300, 300)
    log_p = np.log(random.dirichlet(np.full(300, 0.01), 300) * 0.1 + 0.9 * np.eye(300)[labels] + 1e-9)
    found = label_errors(log_p, labels, tuple(map(str, range(300))))
    assert len(found.classes) == 300
    assert found.wrong.high < 0.02


def test_a_head_is_the_ridge_regression_of_a_peer():
    random = np.random.default_rng(9)
    labels = random.integers(0, 3, 300)
    x = random.normal(0, 1, (300, 4)) + np.eye(3)[labels] @ random.normal(0, 1, (3, 4))
    inputs = np.concatenate([np.ones((300, 1)), _components(x)], 1)  # the peer leaves its own offset out of the ridge
    peer = LogisticRegression(C=1 / RIDGE, fit_intercept=False, tol=1e-8, max_iter=1000).fit(inputs, labels)
    assert _head(inputs[:, 1:], labels, 3) == pytest.approx(peer.coef_.T, abs=1e-3)


def test_heads_speak_of_rows_that_they_have_not_seen():
    random = np.random.default_rng(10)
    labels = random.integers(0, 2, 150)
    noise = random.normal(0, 1, (150, 140))  # more of them than rows of a fold: a head knows its own rows by heart
    said = cross_fitted(noise, labels, 2)
    assert 0.35 < (said.argmax(1) == labels).mean() < 0.65
    signal = noise[:, :4].copy()
    signal[:, 3] = 3 * labels
    assert (cross_fitted(signal, labels, 2).argmax(1) == labels).mean() > 0.9
    broken = signal.copy()
    broken[7] = np.nan
    assert np.isnan(cross_fitted(broken, labels, 2)).any(1).sum() == 1
    few = cross_fitted(signal[: FOLDS - 2], labels[: FOLDS - 2], 2)
    assert few.shape == (FOLDS - 2, 2)


def test_features_are_what_the_head_of_the_model_sees(dataset):
    index = open_index(dataset)
    rows, data = index.rows_of("val"), Data(path=dataset, size=12, batch=16)
    model = SmallCnn(widths=(4, 6)).build(3, 0).eval()
    features = features_of(model, index, data, rows, torch.device("cpu"))
    assert features.shape == (len(rows), 6)
    again = features_of(model, index, data, rows[::-1].copy(), torch.device("cpu"))
    assert again[::-1] == pytest.approx(features, abs=1e-5)
    other = SmallCnn(widths=(4, 5)).build(3, 1).eval()
    both = features_of(Ensemble([model, other], 3).eval(), index, data, rows, torch.device("cpu"))
    assert both.shape == (len(rows), 11)
    assert both[:, :6] == pytest.approx(features, abs=1e-5)
