"""The catalogue against scikit-learn, fairlearn and netcal on random samples, and where those are known to be wrong."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle
from test_metrics import tally_of

from trainer.decision.ledger import log_softmax
from trainer.metrics.calibration import adaptive
from trainer.metrics.catalogue import RATES, auroc, disparity, single
from trainer.metrics.tally import Shape, Tally

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their imports warn of their own dependencies
    import fairlearn.metrics as fair
    import netcal.metrics as netcal


class Drawn:
    """N random samples of K classes in G groups, some of which may be absent."""

    def __init__(self, seed: int, n: int, classes: int, groups: int, abstaining: float = 0.0) -> None:
        random = np.random.default_rng(seed)
        self.shape = Shape(groups, classes, abstaining > 0)
        self.labels = random.choice(classes, n, p=random.dirichlet(np.ones(classes)))
        self.cells = random.integers(0, groups, n)
        self.log_p = log_softmax(random.normal(0, 1.5, (n, classes)) + 1.5 * np.eye(classes)[self.labels])
        self.decisions = np.where(random.random(n) < abstaining, classes, self.log_p.argmax(1))

    @property
    def tally(self) -> Tally:
        return tally_of(self.log_p, self.decisions, self.labels, self.cells, shape=self.shape)


drawn = st.builds(Drawn, st.integers(0, 2**31), st.integers(2, 300), st.integers(2, 6), st.integers(1, 5))
abstaining = st.builds(
    Drawn, st.integers(0, 2**31), st.integers(1, 300), st.integers(2, 6), st.integers(1, 5), st.just(0.3)
)


@settings(max_examples=40, deadline=None)
@given(st.one_of(drawn, abstaining))
def test_rates_are_those_of_scikit_learn_on_random_samples(s):
    t, k = s.tally, s.shape.classes
    for g in range(s.shape.groups):
        y, d = s.labels[s.cells == g], s.decisions[s.cells == g]
        if not len(y):
            assert all(np.isnan(rate.value(t)[g]).all() for rate in RATES.values())
            continue
        options = {"labels": np.arange(k), "zero_division": np.nan}
        scores = oracle.precision_recall_fscore_support(y, d, **options)[:3]
        for name, expected in zip(("precision", "recall", "f1"), scores, strict=True):
            np.testing.assert_allclose(RATES[name].value(t)[g], expected)
        for name, score in {"micro_precision": oracle.precision_score, "micro_f1": oracle.f1_score}.items():
            if (d < k).any():
                assert RATES[name].value(t)[g] == pytest.approx(score(y, d, average="micro", **options))
        confusion = oracle.multilabel_confusion_matrix(y, d, labels=np.arange(k))
        tn, fp, fn, tp = confusion.reshape(k, 4).T
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(RATES["false_positive_rate"].value(t)[g], fp / (fp + tn))
            np.testing.assert_allclose(RATES["false_negative_rate"].value(t)[g], fn / (fn + tp))
            np.testing.assert_allclose(RATES["macro_precision"].value(t)[g], np.nanmean(_or_nan(tp / (tp + fp))))
        np.testing.assert_allclose(RATES["coverage"].value(t)[g], np.mean(d < k))
        np.testing.assert_allclose(RATES["prevalence"].value(t)[g], np.bincount(y, minlength=k) / len(y))


def _or_nan(values: np.ndarray) -> np.ndarray:
    """Without the warning that all of them are NaN."""
    return values if (~np.isnan(values)).any() else np.array([-np.inf, np.inf])


@settings(max_examples=40, deadline=None)
@given(drawn)
def test_the_area_under_the_roc_curve_is_that_of_scikit_learn_up_to_the_ties_that_its_interval_knows(s):
    t, p = s.tally.overall(), np.exp(s.log_p)
    found = auroc(t)
    low, high = found.interval(0.5)
    for k in range(s.shape.classes):
        positive = s.labels == k
        if 0 < positive.sum() < len(positive):
            value = oracle.roc_auc_score(positive, p[:, k])
            hidden = (found.positives[0, k] * found.negatives[0, k]).sum() / positive.sum() / (~positive).sum() / 2
            assert abs(found.value[0, k] - value) <= hidden + 1e-12
            assert low[0, k] <= value <= high[0, k]
        else:
            assert np.isnan(found.value[0, k])


def test_the_interval_of_an_area_covers_as_often_as_it_says():
    from scipy.stats import norm

    random, truth, covered = np.random.default_rng(0), norm.cdf(1.5 / np.sqrt(2)), 0
    for _ in range(300):
        labels = np.repeat([0, 1], [120, 30])
        score = random.normal(0, 1, 150) + 1.5 * labels
        log_p = log_softmax(np.stack([np.zeros(150), 1.5 * score - 3], 1))
        zero = np.zeros(150, np.int64)
        low, high = RATES["auroc"].of(tally_of(log_p, zero, labels, zero, shape=Shape(1, 2))).interval()
        covered += low[0, 1] <= truth <= high[0, 1]
    assert 0.91 <= covered / 300 <= 0.99


@settings(max_examples=30, deadline=None)
@given(drawn)
def test_calibration_errors_are_those_of_netcal(s):
    t, p = s.tally.overall(), np.exp(s.log_p)
    top, right = p.max(1), (p.argmax(1) == s.labels).astype(int)
    assert RATES["ece"].value(t)[0] == pytest.approx(netcal.ECE(15).measure(top, right), abs=1e-7)
    for k in range(s.shape.classes):
        expected = netcal.ECE(15).measure(p[:, k], (s.labels == k).astype(int))
        assert RATES["class_ece"].value(t)[0, k] == pytest.approx(expected, abs=1e-7)
    assert RATES["classwise_ece"].value(t)[0] == pytest.approx(RATES["class_ece"].value(t)[0].mean())


def test_the_adaptive_error_is_that_of_bins_of_equal_mass():
    s = Drawn(1, 6000, 4, 1)
    top, right = np.exp(s.log_p).max(1), s.log_p.argmax(1) == s.labels
    order = np.argsort(top)
    bins = np.array_split(order, 15)
    expected = sum(abs(top[b].sum() - right[b].sum()) for b in bins) / len(top)
    assert RATES["adaptive_ece"].value(s.tally)[0] == pytest.approx(expected, abs=0.004)
    np.testing.assert_allclose(adaptive(s.tally).bins[0, :, 0], 400)


@settings(max_examples=15, deadline=None)
@given(drawn)
def test_comparisons_of_groups_are_those_of_fairlearn_for_every_class_against_the_rest(s):
    t = s.tally
    seen = np.unique(s.cells)
    for k in range(s.shape.classes):
        y, d, g = s.labels == k, s.decisions == k, s.cells
        both = {"selection_rate": d.mean, "prevalence": y.mean}
        frame = fair.MetricFrame(
            metrics={"selection_rate": fair.selection_rate, "prevalence": lambda y, d: y.mean()},
            y_true=y, y_pred=d, sensitive_features=g,
        )  # fmt: skip
        for name, overall in both.items():
            np.testing.assert_allclose(RATES[name].value(t)[seen, k], frame.by_group[name].to_numpy(float))
            assert RATES[name].value(t.overall())[0, k] == pytest.approx(overall())
        if len(seen) > 1:
            assert disparity("demographic_parity_difference", t)[k] == pytest.approx(
                frame.difference()["selection_rate"]
            )
            ratio = frame.ratio()["selection_rate"]
            np.testing.assert_allclose(disparity("disparate_impact", t)[k], ratio)
            known = [(g == i) & y for i in seen], [(g == i) & ~y for i in seen]
            if all(rows.any() for side in known for rows in side):
                odds = fair.equalized_odds_difference(y, d, sensitive_features=g)
                assert disparity("equalised_odds_difference", t)[k] == pytest.approx(odds)
        else:
            assert np.isnan(disparity("disparate_impact", t)[k])


def test_the_epsilon_of_differential_fairness_is_the_largest_log_ratio_of_two_groups():
    s = Drawn(3, 4000, 3, 4)
    t = s.tally
    rates = RATES["selection_rate"].value(t)
    pairs = np.log(rates[:, None] / rates[None])
    np.testing.assert_allclose(disparity("differential_fairness", t), pairs.max((0, 1)))
    assert single("differential_fairness", t) == pytest.approx(pairs.max())


def test_bias_is_amplified_where_decisions_go_further_than_labels_and_not_where_they_are_right():
    labels = np.repeat([0, 1, 0, 1], [60, 40, 40, 60])
    cells = np.repeat([0, 1], 100)
    log_p = np.log(np.full((200, 2), 0.5))
    right = tally_of(log_p, labels, labels, cells, shape=Shape(2, 2))
    np.testing.assert_array_equal(disparity("bias_amplification", right), [0, 0])
    stereotyped = tally_of(log_p, cells, labels, cells, shape=Shape(2, 2))  # says 0 in group 0, 1 in group 1
    np.testing.assert_allclose(disparity("bias_amplification", stereotyped), [0.4, 0.4])
    turned = tally_of(log_p, 1 - cells, labels, cells, shape=Shape(2, 2))
    np.testing.assert_allclose(disparity("bias_amplification", turned), [-0.6, -0.6])


def test_a_group_that_torchmetrics_would_give_the_counts_of_another_keeps_its_own():
    """torchmetrics 1.9.0 compresses the groups of a batch: the middle one, absent, has the counts of the last."""
    labels, decisions, cells = np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]), np.array([0, 0, 2, 2])
    log_p = np.log(np.full((4, 2), 0.5))
    t = sum(
        (tally_of(log_p[i], decisions[i], labels[i], cells[i], shape=Shape(3, 2)) for i in ([0], [1], [2, 3])),
        start=Tally.of(np.zeros(Shape(3, 2).size, np.int64), Shape(3, 2)),
    )
    np.testing.assert_array_equal(RATES["accuracy"].value(t), [1.0, np.nan, 0.5])
    np.testing.assert_array_equal(t.n, [2, 0, 2])


def test_a_metric_that_is_invented_later_is_had_of_a_stored_tally():
    """Cohen's kappa, which the catalogue lacks."""
    s = Drawn(5, 500, 3, 2)
    stored = Tally.unpack(s.tally.pack(), s.shape).overall()
    n, agreed = stored.n[0], stored.hits.sum()
    by_chance = (stored.actual[0] * stored.called[0]).sum() / n**2
    kappa = (agreed / n - by_chance) / (1 - by_chance)
    assert kappa == pytest.approx(oracle.cohen_kappa_score(s.labels, s.decisions))
