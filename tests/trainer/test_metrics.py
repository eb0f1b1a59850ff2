"""Tally, catalogue and intervals against scikit-learn, fairlearn, scipy and plain arithmetic."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as oracle

from trainer.decision.ledger import log_softmax
from trainer.metrics import calibration, catalogue
from trainer.metrics.catalogue import DISPARITIES, FAIRNESS, JOINT, RATES, disparity
from trainer.metrics.groups import groupings
from trainer.metrics.intervals import REPLICATES, bootstrap, difference, resampled, wilson
from trainer.metrics.long_table import SCHEMA, table_of
from trainer.metrics.statistics import Mean, Proportion
from trainer.metrics.tally import SCORE_CAP, Shape, Tally, count

G, K = 4, 3
GROUPS = {"venue": ("home", "street"), "camera": ("phone", "slr")}


class Samples:
    """Random samples and their tally."""

    def __init__(self, n: int = 400, seed: int = 0, absent: int | None = None) -> None:
        random = np.random.default_rng(seed)
        self.labels = random.choice(K, n, p=[0.6, 0.3, 0.1])
        self.cells = random.choice([g for g in range(G) if g != absent], n)
        self.log_p = log_softmax(random.normal(0, 1.5, (n, K)) + 1.5 * np.eye(K)[self.labels])
        self.decisions = self.log_p.argmax(1)

    def tally(self, chosen: slice | np.ndarray = slice(None)) -> Tally:
        parts = (self.log_p, self.decisions, self.labels, self.cells)
        return tally_of(*(part[chosen] for part in parts), shape=Shape(G, K))

    def groups(self) -> Iterator[tuple[int, np.ndarray]]:
        for g in range(G):
            yield g, np.flatnonzero(self.cells == g)


def tally_of(*parts: np.ndarray, shape: Shape, valid: np.ndarray | None = None) -> Tally:
    """Of log probabilities, decisions, labels and cells."""
    valid = np.ones(len(parts[1]), bool) if valid is None else valid
    log_p, decisions, labels, cells, kept = (torch.from_numpy(np.ascontiguousarray(p)) for p in (*parts, valid))
    sums = torch.zeros(shape.size, dtype=torch.int64)
    count(sums, log_p, decisions, labels, cells, kept, shape)
    return Tally.of(sums.numpy(), shape)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return Samples()


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 400])
def test_a_tally_has_the_same_bits_however_the_samples_are_cut_and_ordered(samples, parts):
    order = np.random.default_rng(parts).permutation(400)
    whole = samples.tally().vector()
    total = sum(samples.tally(part).vector() for part in np.array_split(order, parts))
    np.testing.assert_array_equal(total, whole)


def test_rows_that_are_not_valid_count_nowhere(samples):
    parts = (samples.log_p, samples.decisions, samples.labels, samples.cells)
    seen = tally_of(*parts, shape=Shape(G, K), valid=np.arange(400) < 250)
    np.testing.assert_array_equal(seen.vector(), samples.tally(slice(250)).vector())


@pytest.mark.parametrize("absent", range(G))
def test_a_group_that_is_absent_shifts_no_other(absent):
    """torchmetrics 1.9.0 gives an absent group the counts of the next (its issue 3489)."""
    samples = Samples(absent=absent)
    t = samples.tally()
    for g, rows_of_group in samples.groups():
        assert t.n[g] == len(rows_of_group)
        expected = (
            oracle.confusion_matrix(samples.labels[rows_of_group], samples.decisions[rows_of_group], labels=range(K))
            if len(rows_of_group)
            else np.zeros((K, K))
        )
        np.testing.assert_array_equal(t.confusion[g], expected)
    for rate in RATES.values():
        assert np.isnan(rate.value(t)[absent]).all()
    later = Samples(seed=1).tally()
    np.testing.assert_array_equal((t + later).n, t.n + later.n)


def test_a_tally_survives_packing_and_arithmetic(samples):
    t = samples.tally()
    np.testing.assert_array_equal(Tally.unpack(t.pack(), t.shape).vector(), t.vector())
    np.testing.assert_array_equal((t + t - t).vector(), t.vector())
    assert len(t.pack()) < t.vector().nbytes


def test_probabilities_that_are_no_numbers_count_as_the_worst_score():
    nan = np.full((2, 2), np.nan)
    zero = np.zeros(2, np.int64)
    t = tally_of(nan, zero, np.array([0, 1]), zero, shape=Shape(1, 2))
    assert t.n[0] == 2
    assert RATES["nll"].value(t)[0] == SCORE_CAP


def test_a_probability_that_underflows_is_capped_and_not_lost():
    zero = np.zeros(1, np.int64)
    t = tally_of(np.array([[0.0, -1e9]]), zero, zero + 1, zero, shape=Shape(1, 2))
    assert RATES["nll"].value(t)[0] == SCORE_CAP
    assert RATES["brier"].value(t)[0] == 2.0


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_rates_by_class_are_those_of_scikit_learn(samples, name):
    found = RATES[name].value(samples.tally())
    for g, i in samples.groups():
        score = getattr(oracle, f"{name}_score")
        np.testing.assert_allclose(
            found[g], score(samples.labels[i], samples.decisions[i], labels=range(K), average=None), atol=1e-12
        )


def test_rates_by_group_are_those_of_scikit_learn(samples):
    t, p = samples.tally(), np.exp(samples.log_p)
    for g, i in samples.groups():
        y, d = samples.labels[i], samples.decisions[i]
        expected = {
            "accuracy": oracle.accuracy_score(y, d),
            "balanced_accuracy": oracle.balanced_accuracy_score(y, d),
            "macro_f1": oracle.f1_score(y, d, average="macro"),
            "worst_recall": np.diagonal(oracle.confusion_matrix(y, d, normalize="true")).min(),
            "nll": oracle.log_loss(y, p[i], labels=range(K)),
            "brier": np.mean(np.sum((p[i] - np.eye(K)[y]) ** 2, 1)),
        }
        for name, value in expected.items():
            assert RATES[name].value(t)[g] == pytest.approx(value, abs=1e-8), name
        np.testing.assert_allclose(RATES["selection_rate"].value(t)[g], np.bincount(d, minlength=K) / len(d))


def test_the_calibration_error_is_that_of_its_definition(samples):
    confidence, right = np.exp(samples.log_p).max(1), samples.decisions == samples.labels
    found = RATES["ece"].value(samples.tally())
    for g, i in samples.groups():
        bins = np.minimum((confidence[i] * 15).astype(int), 14)
        gaps = [abs((confidence[i] - right[i])[bins == b].sum()) for b in range(15)]
        assert found[g] == pytest.approx(sum(gaps) / len(i), abs=1e-8)


def test_fairness_metrics_are_those_of_fairlearn_for_every_class_against_the_rest(samples):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fairlearn's import warns of its own dependencies
        import fairlearn.metrics as fair

    t = samples.tally()
    for k in range(K):
        y, d, g = samples.labels == k, samples.decisions == k, samples.cells
        assert disparity("disparate_impact", t)[k] == pytest.approx(
            fair.demographic_parity_ratio(y, d, sensitive_features=g)
        )
        assert disparity("demographic_parity_difference", t)[k] == pytest.approx(
            fair.demographic_parity_difference(y, d, sensitive_features=g)
        )
        assert disparity("equal_opportunity_difference", t)[k] == pytest.approx(
            fair.equal_opportunity_difference(y, d, sensitive_features=g)
        )
        precision = fair.MetricFrame(
            metrics=oracle.precision_score, y_true=y, y_pred=d, sensitive_features=g
        ).difference()
        assert disparity("predictive_parity_difference", t)[k] == pytest.approx(precision)


@pytest.mark.parametrize("name", RATES)
def test_every_rate_has_its_shape_and_its_place_in_the_interval(samples, name):
    found = RATES[name].of(samples.tally())
    low, high = found.interval()
    assert found.value.shape in {(G,), (G, K)}
    assert low.shape == high.shape == found.value.shape == found.n.shape
    assert (low <= found.value).all()
    assert (high >= found.value - 1e-12).all()
    assert (low < high).all()
    wider = found.interval(0.99)
    assert (wider[0] <= low + 1e-12).all()
    assert (wider[1] >= high - 1e-12).all()


@pytest.mark.parametrize("name", RATES)
def test_every_rate_is_nan_and_not_zero_where_nothing_was_counted(name):
    empty = Tally.of(np.zeros(Shape(G, K).size, np.int64), Shape(G, K))
    found = RATES[name].of(empty)
    assert np.isnan(found.value).all()
    assert np.isnan(found.interval()).all()
    assert not found.n.any()


@pytest.mark.parametrize("name", RATES)
def test_every_rate_follows_its_groups_when_they_are_reordered(samples, name):
    t, order = samples.tally(), np.array([2, 0, 3, 1])
    np.testing.assert_allclose(RATES[name].value(t.regroup(order, G))[order], RATES[name].value(t))


@pytest.mark.parametrize("name", [*FAIRNESS, *JOINT])
def test_every_fairness_metric_leaves_out_groups_without_a_value(name):
    t = Samples(absent=1).tally()
    kept = t.regroup(np.array([0, 0, 1, 2]), 3)
    np.testing.assert_allclose(disparity(name, t), disparity(name, kept))
    assert not np.isnan(disparity(name, t)).any()


def test_a_single_group_with_a_value_is_no_parity():
    recalls = np.array([[0.5, 0.9], [0.8, np.nan]])
    np.testing.assert_allclose(DISPARITIES["difference"](recalls), [0.3, np.nan])
    np.testing.assert_allclose(DISPARITIES["ratio"](recalls), [0.625, np.nan])
    np.testing.assert_allclose(DISPARITIES["min"](recalls), [0.5, 0.9])


def test_sums_of_the_worst_scores_do_not_overflow():
    n = 100_000
    log_p = np.tile([0.0, -1e9], (n, 1))
    labels = np.arange(n) % 2
    t = tally_of(log_p, labels * 0, labels, labels * 0, shape=Shape(1, 2)).overall()
    found = RATES["nll"].of(t)
    assert found.value[0] == SCORE_CAP / 2
    assert found.interval()[0][0] == pytest.approx(SCORE_CAP / 2 - 1.96 * SCORE_CAP / 2 / np.sqrt(n), rel=1e-4)


def test_disparities_of_nothing_are_nan():
    for compare in DISPARITIES.values():
        assert np.isnan(compare(np.full((3, 2), np.nan))).all()


@given(st.integers(1, 300), st.floats(0, 1))
def test_wilson_is_that_of_scipy(trials, share):
    hits = round(share * trials)
    low, high = wilson(np.array(hits), np.array(trials))
    expected = binomtest(hits, trials).proportion_ci(method="wilson")
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)


def test_wilson_covers_where_the_percentile_bootstrap_does_not():
    """At n = 20, p = .95 the percentile bootstrap covers some 65 %."""
    random = np.random.default_rng(0)
    hits = random.binomial(20, 0.95, 20_000)
    low, high = wilson(hits, np.full(20_000, 20))
    assert np.mean((low <= 0.95) & (high >= 0.95)) > 0.91
    resampled = np.percentile(random.binomial(20, hits[:2000, None] / 20, (2000, 500)), [2.5, 97.5], axis=1) / 20
    assert np.mean((resampled[0] <= 0.95) & (resampled[1] >= 0.95)) < 0.75


def test_newcombe_is_the_published_example():
    """Newcombe 1998, table II: 56/70 against 48/80, method 10."""
    low, high = difference(Proportion(np.array(56), np.array(70)), Proportion(np.array(48), np.array(80)))
    assert (round(float(low), 4), round(float(high), 4)) == (0.0524, 0.3339)


def test_the_interval_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).exponential(1.0, 200)
    low, high = Mean(np.array(x.sum()), np.array((x**2).sum()), np.array(200)).interval()
    half = 1.959964 * x.std(ddof=1) / np.sqrt(200)
    assert (float(low), float(high)) == pytest.approx(
        (x.mean() - half, x.mean() + half), abs=2e-5
    )  # squares are rounded


def test_the_bootstrap_of_counts_is_that_of_rows(samples):
    t = samples.tally().overall()

    def macro_f1(confusion: np.ndarray) -> np.ndarray:
        c = confusion.reshape(-1, 1, K, K)
        return (2 * np.diagonal(c, axis1=2, axis2=3) / (c.sum(2) + c.sum(3))).mean(2)

    counts = t.confusion.reshape(1, K * K)
    values = np.concatenate([macro_f1(drawn) for drawn in resampled(counts)])
    random, by_rows = np.random.default_rng(1), []
    for _ in range(400):
        i = random.integers(0, 400, 400)
        by_rows.append(oracle.f1_score(samples.labels[i], samples.decisions[i], average="macro"))
    assert values.std() == pytest.approx(np.std(by_rows), rel=0.12)
    assert len(values) == REPLICATES
    low, high = bootstrap(macro_f1, counts)
    own = RATES["macro_f1"].of(t)
    assert low[0] < own.value[0] < high[0]
    np.testing.assert_allclose(own.interval(), [low, high], atol=0.012)  # the jackknife's is that of the bootstrap


@pytest.mark.parametrize("n", [50, 1000])
def test_a_calibrated_model_stays_below_its_band_as_often_as_is_said(n):
    random = np.random.default_rng(n)
    below, ece, mean = 0, 0.0, 0.0
    for _ in range(200):
        p = random.dirichlet(np.ones(K), n)
        labels = (p.cumsum(1) > random.random((n, 1))).argmax(1)
        t = tally_of(np.log(p), p.argmax(1), labels, np.zeros(n, np.int64), shape=Shape(1, K))
        error = calibration.top_label(t)
        null_mean, null_high = error.calibrated()
        found = error.value[0]
        below += found <= null_high[0]
        ece, mean = ece + found / 200, mean + null_mean[0] / 200
    assert 0.90 <= below / 200 <= 0.99
    assert ece == pytest.approx(mean, rel=0.08)
    assert ece > (0.05 if n == 50 else 0.01)  # what an uncorrected reading would call miscalibration


def test_weights_bring_every_class_to_its_prior(samples):
    t = samples.tally().overall()
    prior = np.array([0.2, 0.3, 0.5])
    weights = calibration.weights_to(prior, t)
    share = t.confusion[0].sum(1) * weights
    np.testing.assert_allclose(share / share.sum(), prior)
    same = calibration.weights_to(t.confusion[0].sum(1) / 400, t)
    np.testing.assert_allclose(calibration.top_label(t, same).value, RATES["ece"].value(t))
    by_class = catalogue.score_by_class(t, 0)
    nll = -samples.log_p[np.arange(400), samples.labels]
    expected = np.average(nll, weights=weights[samples.labels])
    assert catalogue.under_prior(by_class, prior)[0] == pytest.approx(expected, abs=1e-8)


def test_groupings_gather_cells_as_the_columns_say(samples):
    found = {grouping.name: grouping for grouping in groupings(GROUPS)}
    assert list(found) == ["all", "venue", "camera", "venue x camera"]
    t = samples.tally()
    venue = found["venue"].of(t)
    np.testing.assert_array_equal(venue.n, [(samples.cells < 2).sum(), (samples.cells >= 2).sum()])
    camera = found["camera"].of(t)
    np.testing.assert_array_equal(camera.n, [(samples.cells % 2 == 0).sum(), (samples.cells % 2 == 1).sum()])
    assert found["venue x camera"].groups[1] == "venue=home, camera=slr"
    np.testing.assert_array_equal(found["venue x camera"].of(t).vector(), t.vector())
    assert [grouping.name for grouping in groupings({})] == ["all"]


def test_the_long_table_holds_every_rate_of_every_group_with_its_n(samples):
    key = {"run": "r", "split": "test", "view": "argmax", "step": None}
    long = table_of(samples.tally(), ("a", "b", "c"), GROUPS, **key)
    assert long.schema.equals(SCHEMA)
    lines = long.to_pylist()
    recalls = [r for r in lines if r["metric"] == "recall" and r["group"] == "venue=street"]
    assert [r["class"] for r in recalls] == ["a", "b", "c"]
    i = samples.cells >= 2
    assert [r["n"] for r in recalls] == [int((samples.labels[i] == k).sum()) for k in range(K)]
    assert {r["metric"] for r in lines} == {*RATES, *FAIRNESS, *JOINT}
    assert all(r["low"] <= r["value"] <= r["high"] for r in lines)
    assert all(r["run"] == "r" and r["step"] is None for r in lines)
    compared = [r for r in lines if r["metric"] == "equal_opportunity_difference" and r["grouping"] == "camera"]
    assert [r["class"] for r in compared] == ["a", "b", "c"]
    assert all(r["group"] == "" and 0 < r["chance"] < 1 for r in compared)
    fast = table_of(samples.tally(), ("a", "b", "c"), GROUPS, bands=False, **key).to_pylist()
    names = [[(r["metric"], r["group"], r["class"]) for r in part] for part in (fast, lines)]
    assert names[0] == names[1]
    np.testing.assert_array_equal([r["value"] for r in fast], [r["value"] for r in lines])
    plain = [r for r in lines if r["metric"] == "recall"]
    assert all(np.isnan(r["chance"]) for r in plain)
