import time
import warnings

import numpy as np
import pytest
from gaussians import Gaussians, long_tail, validation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from data_loaders.faults import Refusal
from trainer.decision import regret, strata
from trainer.decision.analysis import analyse, findings, to_json
from trainer.decision.costs import Balanced, Equal, Matrix
from trainer.decision.curves import THRESHOLDS, cost_curve, family, net_benefit
from trainer.decision.discrimination import auroc
from trainer.decision.ledger import Decision, log_softmax
from trainer.decision.thresholds import equalise
from trainer.metrics.groups import groupings
from trainer.metrics.intervals import wilson

PRIOR = np.array([0.90, 0.08, 0.02])
UNIFORM = np.full(3, 1 / 3)
CLASSES = ("food", "drink", "dessert")
MEANS = np.array([[0.0, 0.0], [1.5, 0.5], [0.5, 1.6]])


def plane(n: int, prior: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three Gaussian classes, with a constant as a third feature."""
    random = np.random.default_rng(seed)
    labels = random.choice(3, n, p=prior)
    return np.column_stack([MEANS[labels] + random.normal(0, 1, (n, 2)), np.ones(n)]), labels


def trained(x: np.ndarray, labels: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Weights [3, 3] of the softmax of x @ weights + shift of least NLL, to convergence."""

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = log_softmax(x @ flat.reshape(3, 3) + shift)
        gradient = np.exp(log_p)
        gradient[np.arange(len(x)), labels] -= 1
        return -float(log_p[np.arange(len(x)), labels].mean()), (x.T @ gradient).ravel() / len(x)

    found = minimize(loss, np.zeros(9), jac=True, method="L-BFGS-B", options={"gtol": 1e-7, "ftol": 1e-14})
    return found.x.reshape(3, 3)


def test_the_central_table():
    """Sampling is undone by the prior, and costs do what sampling seemed to do: natural training with costs decides as
    balanced training does, and balanced training with the prior of use is as likely as natural training."""
    x, labels = plane(40_000, PRIOR, 0)
    test, true = plane(150_000, PRIOR, 1)
    random = np.random.default_rng(2)
    drawn = np.concatenate([random.choice(np.flatnonzero(labels == k), 20_000) for k in range(3)])
    weights = {
        "natural": trained(x, labels, np.zeros(3)),
        "balanced": trained(x[drawn], labels[drawn], np.zeros(3)),
        "balanced softmax": trained(x, labels, np.log(PRIOR)),
    }
    conditioned = {"natural": PRIOR, "balanced": UNIFORM, "balanced softmax": UNIFORM}
    nll, raw, recall, bare = {}, {}, {}, {}
    for name, w in weights.items():
        ledger = Decision(costs=Balanced()).ledger(CLASSES, PRIOR, UNIFORM, conditioned[name])
        z = test @ w
        log_p = ledger.log_probabilities(z)
        nll[name], raw[name] = (-float(p[np.arange(len(true)), true].mean()) for p in (log_p, log_softmax(z)))
        n = np.bincount(true)
        for found, decisions in ((recall, ledger.decide(log_p)), (bare, z.argmax(1))):
            found[name] = wilson(np.bincount(true[decisions == true], minlength=3), n)
    assert nll["balanced"] == pytest.approx(nll["natural"], abs=1e-3)
    assert nll["balanced softmax"] == pytest.approx(nll["natural"], abs=1e-3)
    assert min(raw["balanced"], raw["balanced softmax"]) > 2 * nll["natural"]
    (low, high), (other_low, other_high) = recall["natural"], bare["balanced"]
    assert ((low < other_high) & (other_low < high)).all()
    assert low.min() > 0.5
    assert bare["natural"][1].min() < 0.1


def test_an_image_is_left_undecided_where_every_decision_is_expected_to_cost_more():
    """Chow 1970: under equal costs, where no class has a probability of 1 - r."""
    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(3), 500))
    for costs in (Equal(abstain=0.3), Matrix(rows={}, abstain=0.3)):
        ledger = Decision(costs=costs).ledger(CLASSES, PRIOR, PRIOR, PRIOR)
        assert ledger.costs.shape == (3, 4)
        np.testing.assert_array_equal(ledger.decide(log_p) == 3, np.exp(log_p).max(1) < 0.7)
    assert Balanced(abstain=0.5).matrix(CLASSES, PRIOR)[:, 3].tolist() == [0.5] * 3
    with pytest.raises(Refusal, match="a class is called 'abstain'"):
        Equal(abstain=0.1).matrix(("abstain", "food"), PRIOR[:2])


# Intervals


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30))
def test_the_interval_of_a_mean_of_zeros_and_ones_is_wilsons(hits, misses):
    values, n = np.repeat([1.0, 0.0], [hits, misses]), hits + misses
    zeros = np.zeros(n, np.int64)
    found = strata.means(strata.moments(values, zeros, zeros, (1, 1)), np.zeros(1), np.ones(1)).at(0, 0)
    low, high = wilson(np.array(hits), np.array(n))
    np.testing.assert_allclose([found.low, found.high], [low, high], atol=1e-12)
    assert found.n == n


def test_the_interval_of_an_expected_cost_covers_even_where_costs_are_rare_and_rows_few():
    costs, prior = Matrix(rows={"dessert": {"food": 20.0, "drink": 3.0}}).matrix(CLASSES, PRIOR), PRIOR
    chances = np.array([[0.97, 0.02, 0.01], [0.3, 0.6, 0.1], [0.1, 0.2, 0.7]])
    truth = float(prior @ (chances * costs).sum(1))
    random, inside = np.random.default_rng(0), []
    labels = np.repeat(np.arange(3), [200, 40, 15])
    for _ in range(600):
        values = costs[labels, (random.random((len(labels), 1)) > chances[labels].cumsum(1)).sum(1).clip(max=2)]
        m = strata.moments(values, labels, np.zeros_like(labels), (1, 3))
        found = strata.combined(strata.means(m, costs.min(1), costs.max(1)), prior).at(0)
        inside.append(found.low <= truth <= found.high)
    assert 0.92 <= np.mean(inside) <= 0.99


def test_group_costs_add_up_and_their_gaps_do_not_count_the_mix_of_classes():
    random = np.random.default_rng(0)
    groups = random.integers(0, 2, 60_000)
    labels = (random.random(60_000) < np.where(groups == 1, 0.6, 0.1)).astype(np.int64)
    values = (random.random(60_000) < np.where(labels == 1, 0.5, 0.1)).astype(float)  # by class, not by group
    m = strata.moments(values, labels, groups, (3, 2))
    prior = np.array([0.9, 0.1])
    found = strata.by_group(m, np.zeros(1), np.ones(1), prior)
    gaps = strata.group_gaps(m, np.zeros(1), np.ones(1), prior)
    weights = regret.row_weights(labels, prior)
    shares = np.bincount(groups, weights, 3)
    assert found.value[1] > found.value[0] + 0.05
    assert np.nansum(shares * found.value) == pytest.approx(weights @ values)
    assert ((gaps.low < 0) & (gaps.high > 0))[:2].all()
    assert np.isnan([found.value[2], found.low[2], gaps.value[2]]).all()
    assert found.n[2] == gaps.n[2] == 0


# The oracle


def exact_threshold(log_p, labels, costs, prior) -> float:
    """Least cost of any threshold, by trying all."""
    margin, weights = log_p[:, 1] - log_p[:, 0], regret.row_weights(labels, prior)
    order = np.argsort(margin)
    as_one, as_zero = (weights * costs[labels, d] for d in (1, 0))
    sums = as_one.sum() + np.concatenate([[0.0], (as_zero - as_one)[order].cumsum()])
    return float(sums.min())


@pytest.mark.parametrize("seed", range(4))
def test_the_oracle_of_two_classes_is_the_best_threshold_whatever_the_scores_are_off_by(seed):
    prior, costs = np.array([0.9, 0.1]), np.array([[0.0, 1.0], [5.0, 0.0]])
    random = np.random.default_rng(seed)
    labels = random.choice(2, 20_000, p=prior)
    margin = 2.0 * labels + random.normal(0, 1, 20_000)
    log_p = log_softmax(np.column_stack([np.zeros(20_000), (0.5, 1, 2, 4)[seed] * margin + random.normal(0, 2)]))
    best = regret.best_shift(log_p, labels, costs, prior)
    weights, exact = regret.row_weights(labels, prior), exact_threshold(log_p, labels, costs, prior)
    found, crossed = (
        float(weights @ costs[labels, d])
        for d in (regret.shifted(log_p, best, costs), regret.oracle(log_p, labels, costs, prior))
    )
    assert exact <= found <= 1.02 * exact
    assert exact <= crossed <= 1.05 * exact


def test_the_oracle_is_not_flattered_by_scores_that_know_nothing():
    """In-sample, some threshold always seems to help."""
    random, prior, costs = np.random.default_rng(0), np.array([0.5, 0.5]), 1 - np.eye(2)
    saved = []
    for _ in range(60):
        labels = np.repeat([0, 1], 20)
        log_p = log_softmax(random.normal(0, 1, (40, 2)))
        actual, crossed = log_p.argmax(1), regret.oracle(log_p, labels, costs, prior)
        saved.append(np.mean(costs[labels, actual]) - np.mean(costs[labels, crossed]))
    assert abs(np.mean(saved)) < 0.03


def test_the_regret_of_decisions_for_the_wrong_prior_is_found_and_of_right_ones_is_none():
    world, prior = Gaussians(4, 1.2), long_tail(4, 30)
    logits, labels = world.draw(20_000, prior, 0)
    ledger = world.ledger(prior, Decision(costs=Balanced()))
    found = analyse(ledger, logits + np.log(prior), labels, np.zeros_like(labels), list(groupings({})))
    argmax, _ = found.views
    right = analyse(ledger, logits, labels, np.zeros_like(labels), list(groupings({}))).views[1]
    assert argmax.decision_bias.low > 0.03
    assert abs(right.decision_bias.value) < 0.01
    for view in (argmax, right):
        assert view.cost.value == pytest.approx(view.decision_bias.value + view.score_bias.value)
        for k, line in enumerate(view.classes):
            assert line.cost.n == (labels == k).sum()
        assert view.cost.value == pytest.approx(sum(p * c.cost.value for p, c in zip(prior, view.classes, strict=True)))


# What scores alone can do


def test_auroc_is_that_of_scikit_learn_under_the_prior_of_use():
    world, prior = Gaussians(3, 1.0), np.array([0.2, 0.5, 0.3])
    logits, labels = world.draw(3000, np.full(3, 1 / 3), 0)
    log_p = log_softmax(np.rint(10 * logits) / 10)  # with ties
    found = auroc(log_p, labels, prior)
    for k in range(3):
        weights = (prior / np.bincount(labels))[labels]
        assert found.value[k] == pytest.approx(roc_auc_score(labels == k, log_p[:, k], sample_weight=weights))
    assert np.isnan(auroc(log_p, np.where(labels == 2, 1, labels), prior).value).all()


def test_the_interval_of_auroc_covers_the_truth_with_few_rows():
    from statistics import NormalDist

    truth, random, inside = NormalDist().cdf(1.5 / np.sqrt(2)), np.random.default_rng(0), []
    labels = np.repeat([0, 1], [200, 20])
    for _ in range(300):
        score = 1.5 * labels + random.normal(0, 1, 220)
        found = auroc(np.column_stack([-score, score]), labels, np.array([0.5, 0.5]))
        inside.append(found.low[1] <= truth <= found.high[1])
    assert 0.92 <= np.mean(inside) <= 0.995


# Curves


def test_net_benefit_is_vickers_formula_at_the_prior_of_the_rows():
    logits, labels = Gaussians(3, 1.0).draw(4000, PRIOR, 0)
    log_p = log_softmax(logits + np.log(PRIOR))
    share = np.bincount(labels) / len(labels)
    for k, points in enumerate(net_benefit(log_p, labels, share)):
        assert [p.threshold for p in points] == list(THRESHOLDS)
        for p in points:
            called, odds = np.exp(log_p[:, k]) >= p.threshold, p.threshold / (1 - p.threshold)
            true, false = (called & (labels == k)).mean(), (called & (labels != k)).mean()
            assert p.net.value == pytest.approx(true - false * odds, abs=1e-9)
            assert p.net.low <= p.net.value <= p.net.high
            assert p.treat_all == pytest.approx(share[k] - (1 - share[k]) * odds)


def test_the_cost_curve_goes_from_equal_to_balanced_costs_and_adapted_decisions_are_no_dearer():
    np.testing.assert_allclose(family(PRIOR, 0.0, None), Equal().matrix(CLASSES, PRIOR))
    np.testing.assert_allclose(family(PRIOR, 1.0, None), Balanced().matrix(CLASSES, PRIOR))
    logits, labels = Gaussians(3, 1.0).draw(20_000, PRIOR, 0)
    log_p = log_softmax(logits + np.log(PRIOR))
    curve = cost_curve(log_p, log_p.argmax(1), labels, PRIOR, None)
    assert curve[0].decided == curve[0].adapted
    assert curve[-1].decided.low > curve[-1].adapted.high
    for p in curve:
        assert p.adapted.value <= p.decided.value + 0.01
        assert p.adapted.value <= p.constant + 0.01


# Thresholds by group


def two_groups(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of group 1 are lower, whatever the class."""
    random = np.random.default_rng(seed)
    groups, labels = random.integers(0, 2, n), random.choice(2, n, p=[0.7, 0.3])
    score = 2 * (2 * labels - 1 + random.normal(0, 1, n) - groups)
    return log_softmax(np.column_stack([np.zeros(n), score])), labels, groups


@pytest.mark.parametrize(
    ("aim", "constraint"), [("recall", "true_positive_rate_parity"), ("selection_rate", "demographic_parity")]
)
def test_thresholds_by_group_are_as_even_on_new_rows_as_those_of_fairlearn(aim, constraint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it and its pandas warn of each other
        from fairlearn.postprocessing import ThresholdOptimizer
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        fitted_ = True

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return np.column_stack([1 - x[:, 0], x[:, 0]])

    (log_p, labels, groups), (new, true, of_new) = two_groups(6000, 0), two_groups(40_000, 1)
    costs, prior = 1 - np.eye(2), np.array([0.7, 0.3])
    mine = equalise(log_p, labels, groups, (2, 2), costs, prior, aim).decide(new, costs, of_new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ThresholdOptimizer(
            estimator=Given(), constraints=constraint, prefit=True, predict_method="predict_proba"
        )
        theirs.fit(np.exp(log_p[:, 1:]), labels, sensitive_features=groups)
        others = theirs.predict(np.exp(new[:, 1:]), sensitive_features=of_new, random_state=0)

    def gap(decisions):
        counted = true == 1 if aim == "recall" else true >= 0
        return abs(np.diff([decisions[counted & (of_new == g)].mean() for g in range(2)])[0])

    assert gap(new.argmax(1)) > 0.15
    assert gap(mine) < 0.05
    assert gap(others) < 0.05
    assert (mine == true).mean() > (others == true).mean() - 0.01


def test_thresholds_of_a_small_group_hardly_move_and_those_of_an_empty_or_unknown_one_not_at_all():
    log_p, labels, groups = two_groups(4000, 0)
    few = np.flatnonzero((groups == 0) | (np.cumsum(groups == 1) <= 6))
    costs, prior = 1 - np.eye(2), np.array([0.7, 0.3])
    whole, small = (
        equalise(log_p[rows], labels[rows], groups[rows], (3, 2), costs, prior, "cost")
        for rows in (np.arange(4000), few)
    )
    assert np.abs(whole.shift[1]).max() > 0.3
    assert np.abs(small.shift[1]).max() < 0.4 * np.abs(whole.shift[1]).max()
    assert not whole.shift[2:].any()
    unknown = whole.decide(log_p, costs, np.full(4000, -1))
    np.testing.assert_array_equal(unknown, log_p.argmax(1))


# The analysis


def analysed(worse: bool, seed: int = 0):
    """Of a street where the scores are noisier, or not."""
    world, prior = Gaussians(4, 1.8), np.full(4, 0.25)
    logits, labels = world.draw(4000, prior, seed)
    cells = np.random.default_rng(seed).integers(0, 4, 4000)
    noise = np.random.default_rng(seed + 1).normal(0, 3, logits.shape) * (cells >= 2)[:, None] * worse
    ways = list(groupings({"venue": ("inside", "street"), "camera": ("a", "b")}))
    return analyse(world.ledger(prior), logits + noise, labels, cells, ways)


def test_a_group_whose_scores_are_worse_is_told_and_no_group_where_none_is():
    told = [f for f in findings(analysed(worse=True)) if f.bias == "score"]
    assert "venue=street" in {f.where for f in told}
    assert not {"venue=inside", "camera=a", "camera=b"} & {f.where for f in told}
    (street,) = (f for f in told if f.where == "venue=street")
    assert street.low > 0
    assert street.n == 4000
    alarms = [f for seed in range(3) for f in findings(analysed(False, seed)) if "=" in f.where or f.bias == "decision"]
    assert not alarms


def test_decisions_that_a_threshold_would_mend_are_told_of_those_decisions_only():
    world, prior = Gaussians(4, 1.2), long_tail(4, 30)
    logits, labels = world.draw(10_000, prior, 0)
    ledger = Decision(costs=Balanced()).ledger(world.classes, prior, prior, prior)
    found = analyse(ledger, logits + np.log(prior), labels, np.zeros_like(labels), list(groupings({})))
    told = [f for f in findings(found) if f.bias == "decision"]
    assert told[0].where == "argmax"
    assert "class 3" in {f.where for f in told}
    assert "ledger" not in {f.where for f in told}


@pytest.mark.parametrize("case", ["one row", "a class absent", "abstaining", "many classes", "a group absent"])
def test_an_analysis_bears_hard_splits_and_is_json(case):
    import json

    k = 60 if case == "many classes" else 4
    world, prior = Gaussians(k, 2.0), long_tail(k, 5)
    logits, labels = world.draw(1 if case == "one row" else 300, prior, 0)
    if case == "a class absent":
        logits, labels = logits[labels != 3], labels[labels != 3]
    costs = Equal(abstain=0.2) if case == "abstaining" else Balanced()
    cells = np.zeros_like(labels)
    ways = list(groupings({"venue": ("inside", "street")} if case == "a group absent" else {}))
    held = validation(*world.draw(300, prior, 1))
    found = analyse(world.ledger(prior, Decision(costs=costs)), logits, labels, cells, ways, held)
    tree = json.loads(json.dumps(to_json(found), allow_nan=False))
    absent = set(range(k)) - set(labels.tolist())
    assert np.isnan(found.views[1].cost.value) == bool(absent)
    assert {c["cost"]["value"] is None for i, c in enumerate(tree["views"][1]["classes"]) if i in absent} <= {True}
    assert (found.views[1].abstained.value > 0) == (case == "abstaining")
    if case == "a group absent":
        street = found.views[1].groups[-1]
        assert street.name == "venue=street"
        assert street.cost.n == 0
        assert np.isnan(street.cost.value)


def test_logits_that_are_no_numbers_are_refused():
    logits = np.zeros((5, 3))
    logits[2, 1] = np.nan
    ledger = Decision().ledger(CLASSES, PRIOR, PRIOR, PRIOR)
    with pytest.raises(Refusal, match="1 of 5 rows have logits that are no numbers"):
        analyse(ledger, logits, np.zeros(5, np.int64), np.zeros(5, np.int64), list(groupings({})))


def test_ten_thousand_rows_of_ten_classes_are_analysed_in_seconds_and_more_are_sampled(monkeypatch):
    world, prior = Gaussians(10, 2.0), long_tail(10, 50)
    logits, labels = world.draw(10_000, prior, 0)
    ways = list(groupings({"venue": ("inside", "street")}))
    cells = np.arange(10_000) % 2
    began = time.process_time()
    whole = analyse(world.ledger(prior), logits, labels, cells, ways, validation(logits, labels, cells))
    assert time.process_time() - began < 15  # 2 s where nothing else runs
    monkeypatch.setattr("trainer.decision.analysis.MOST_ENTRIES", 20_000)
    part = analyse(world.ledger(prior), logits, labels, cells, ways)
    assert (whole.n, part.n, part.rows) == (10_000, 2000, 10_000)
    assert part.views[1].cost.low <= whole.views[1].cost.value <= part.views[1].cost.high
