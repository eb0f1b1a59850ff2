"""Intervals, null bands, shrinkage and what is withheld: each says as often what is true as it claims."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control
from test_metrics import tally_of

from trainer.metrics.calibration import Gaps, top_label
from trainer.metrics.catalogue import FAIRNESS, JOINT, RATES, disparity
from trainer.metrics.cells import cells, shrink, withheld
from trainer.metrics.comparisons import DRAWN, comparisons, null_ends
from trainer.metrics.intervals import REPLICATES, benjamini_hochberg, bootstrap
from trainer.metrics.long_table import table_of
from trainer.metrics.statistics import Average, Lowest, Proportion
from trainer.metrics.tally import Shape, Tally


def of_confusion(confusion: np.ndarray) -> Tally:
    """A tally of these counts [G, K, K] alone."""
    g, k, _ = confusion.shape
    empty = Tally.of(np.zeros(Shape(g, k).size, np.int64), Shape(g, k))
    return Tally(confusion.astype(np.int64), *empty.parts[1:])


def drawn(random: np.random.Generator, n: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Confusion [G, K, K] with n [G, K] samples of each class, whose errors go to any other class."""
    g, k = n.shape
    confusion = np.zeros((g, k, k), np.int64)
    for i, j in np.ndindex(g, k):
        p = np.full(k, (1 - recalls[i, j]) / (k - 1))
        p[j] = recalls[i, j]
        confusion[i, j] = random.multinomial(n[i, j], p)
    return confusion


@pytest.mark.parametrize(
    ("name", "truth"),
    [("balanced_accuracy", 0.85), ("worst_recall", 0.7), ("macro_f1", None), ("macro_precision", None)],
)
def test_intervals_of_what_is_made_of_several_classes_cover_as_often_as_they_say(name, truth):
    random = np.random.default_rng(0)
    n, recalls = np.array([[60, 25, 15]]), np.array([[0.95, 0.9, 0.7]])
    if truth is None:
        whole = drawn(np.random.default_rng(1), n * 100_000, recalls)
        truth = RATES[name].value(of_confusion(whole))[0]
    covered = 0
    for _ in range(400):
        low, high = RATES[name].of(of_confusion(drawn(random, n, recalls))).interval()
        covered += low[0] <= truth <= high[0]
    assert covered / 400 >= 0.93
    if name != "worst_recall":  # which holds for all classes at once, and so more often
        assert covered / 400 <= 0.99


def test_the_interval_of_a_mean_of_proportions_has_width_where_all_hits_hit():
    found = Average(Proportion(np.array([[5, 5]]), np.array([[5, 5]])))
    low, high = found.interval()
    assert found.value[0] == high[0] == 1
    assert low[0] < 0.85


def test_the_smallest_of_many_classes_is_surely_smaller_than_its_own_interval_says():
    n = np.full((1, 50), 20)
    hits = np.random.default_rng(0).binomial(n, 0.9)
    found = Lowest(Proportion(hits, n))
    low, high = found.interval()
    assert found.value[0] == hits.min() / 20
    assert low[0] < Proportion(hits, n).interval()[0].min()
    assert low[0] < 0.9 < high[0] + 0.1


def test_the_largest_difference_of_eight_groups_of_fifty_is_within_its_null_band_where_there_is_none():
    """Expected .119 at a recall of .90 where no group differs: max - min as such says that they do."""
    random, inside, covered, seen = np.random.default_rng(0), 0, 0, 0.0
    for _ in range(100):
        found = _recalls(random, np.full(8, 50), np.full(8, 0.9))
        inside += found.value[0] <= found.chance[0]
        covered += found.low[0] == 0
        seen += found.value[0] / 100
    assert seen == pytest.approx(0.119, abs=0.01)
    assert 0.90 <= inside / 100 <= 0.99
    assert covered / 100 >= 0.95


def test_the_interval_of_a_largest_difference_covers_it():
    random, covered = np.random.default_rng(1), 0
    for _ in range(100):
        found = _recalls(random, np.array([400, 80, 30]), np.array([0.9, 0.8, 0.6]))
        covered += found.low[0] <= 0.3 <= found.high[0]
    assert covered / 100 >= 0.95


def _recalls(random: np.random.Generator, n: np.ndarray, recalls: np.ndarray):
    sizes = np.stack([n, n], 1)
    confusion = drawn(random, sizes, np.stack([recalls, recalls], 1))
    return comparisons(of_confusion(confusion))["equal_opportunity_difference"]


@pytest.mark.parametrize("name", [*FAIRNESS, *JOINT])
def test_every_comparison_has_its_value_within_its_interval_and_is_nan_for_groups_that_are_absent(name):
    random = np.random.default_rng(2)
    log_p = np.log(random.dirichlet(np.ones(3), 500))
    labels, groups = random.integers(0, 3, 500), random.choice([0, 2, 3], 500)
    t = tally_of(log_p, log_p.argmax(1), labels, groups, shape=Shape(4, 3))
    found = comparisons(t)[name]
    np.testing.assert_array_equal(found.value, disparity(name, t))
    assert (found.low <= found.value + 1e-12).all()
    assert (found.value <= found.high + 1e-12).all()
    assert (found.n > 0).all()
    alone = comparisons(t.regroup(np.zeros(4, np.int64), 4))[name]
    if FAIRNESS.get(name, ("", ""))[1] != "min":
        assert np.isnan(alone.value).all()
        assert np.isnan(alone.low).all()
        assert np.isnan(alone.chance).all()


def test_comparisons_are_the_same_numbers_every_time():
    """TFMA's bootstrap has a seed for tests only, and twenty replicates."""
    confusion = drawn(np.random.default_rng(3), np.full((5, 3), 40), np.full((5, 3), 0.8))
    one, other = (comparisons(of_confusion(confusion)) for _ in range(2))
    for name in one:
        for a, b in zip(one[name], other[name], strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_null_of_many_cells_is_near_that_which_is_drawn_exactly():
    random = np.random.default_rng(4)
    trials = np.repeat(random.integers(200, 2000, (6, 1)), 3, 1)
    few = Proportion(random.binomial(trials, 0.7), trials)
    many = Proportion(*(np.tile(part, (1, DRAWN // (REPLICATES * trials.size) + 1)) for part in few))
    for exact, normal in zip(null_ends(few), null_ends(many), strict=True):
        for q in (0.05, 0.5, 0.95):
            np.testing.assert_allclose(np.quantile(exact, q, 0), np.quantile(normal, q, 0)[:3], atol=0.004)


@pytest.mark.parametrize("n", [50, 300, 3000])
def test_the_interval_of_a_calibration_error_covers_none_where_there_is_none(n):
    """The plug-in reads 14.5 % at n = 50 for a perfectly calibrated model, whose percentile interval excludes 0."""
    random, covered = np.random.default_rng(n), 0
    for _ in range(200):
        found = top_label(_calibrated(random, n, 1.0))
        covered += found.interval()[0][0] == 0
    assert covered / 200 >= 0.9


def test_the_interval_of_a_calibration_error_covers_one_that_there_is():
    random, covered, low = np.random.default_rng(0), 0, 0.0
    truth = top_label(_calibrated(np.random.default_rng(1), 400_000, 2.5)).value[0]
    for _ in range(120):
        found = top_label(_calibrated(random, 600, 2.5)).interval()
        covered += found[0][0] <= truth <= found[1][0]
        low += found[0][0] / 120
    assert covered / 120 >= 0.9
    assert low > truth / 2


def _calibrated(random: np.random.Generator, n: int, sharpened: float) -> Tally:
    """Labels drawn from probabilities, which are then raised to a power."""
    p = random.dirichlet(np.ones(3), n)
    labels = (p.cumsum(1) > random.random((n, 1))).argmax(1)
    q = p**sharpened / (p**sharpened).sum(1, keepdims=True)
    return tally_of(np.log(np.maximum(q, 1e-30)), q.argmax(1), labels, np.zeros(n, np.int64), shape=Shape(1, 3))


def test_the_null_band_of_many_classes_is_near_that_which_is_drawn():
    bins = np.zeros((1, 1, 15, 3))
    bins[..., 0] = np.linspace(500, 200, 15)
    bins[..., 2] = bins[..., 0] * np.linspace(0.05, 0.95, 15)
    bins[..., 1] = bins[..., 2]
    exact, normal = Gaps(bins).calibrated(), Gaps(np.tile(bins, (1, 1000, 1, 1))).calibrated()
    np.testing.assert_allclose(exact[0][0, 0], normal[0][0, 0], rtol=0.02)
    np.testing.assert_allclose(exact[1][0, 0], normal[1][0, 0], rtol=0.04)


def test_the_bootstrap_knows_samples_across_batches():
    """torchmetrics' BootStrapper resamples within each batch: where a batch is of one kind, it sees no variance."""
    counts = np.array([[500, 500]])  # as if of two batches, one all wrong and one all right
    low, high = bootstrap(lambda c: c[..., 1] / c.sum(-1), counts)
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 1000), rel=0.1)


@given(st.lists(st.one_of(st.floats(0, 1), st.just(np.nan)), min_size=1, max_size=30))
def test_adjusted_p_values_are_those_of_scipy(p):
    p = np.array(p)
    known = ~np.isnan(p)
    found = benjamini_hochberg(p)
    assert np.isnan(found[~known]).all()
    if known.any():
        np.testing.assert_allclose(found[known], false_discovery_control(p[known]), atol=1e-12)


def test_cells_that_do_not_differ_are_rarely_told_and_one_that_does_is():
    random, false, told = np.random.default_rng(0), 0, 0
    for _ in range(100):
        n = random.integers(20, 200, (6, 4))
        same = cells(Proportion(random.binomial(n, 0.8), n))
        false += (same.p <= 0.05).any()
        recalls = np.full((6, 4), 0.8)
        recalls[2, 1], n[2, 1] = 0.5, 150
        other = cells(Proportion(random.binomial(n, recalls), n))
        told += other.p[2, 1] <= 0.05
    assert false <= 12
    assert told >= 95


def test_shrinkage_is_nearer_the_truth_than_the_plain_rates_and_its_intervals_cover():
    random = np.random.default_rng(0)
    plain, shrunk, covered = 0.0, 0.0, 0
    for _ in range(60):
        truth = random.beta(16, 4, (12, 1))
        n = random.integers(5, 60, (12, 1))
        counted = Proportion(random.binomial(n, truth), n)
        value, low, high = shrink(counted)
        plain += ((counted.value - truth) ** 2).sum()
        shrunk += ((value - truth) ** 2).sum()
        covered += ((low <= truth) & (truth <= high)).sum()
    assert shrunk < 0.75 * plain
    assert 0.9 <= covered / (60 * 12) <= 0.985


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31))
def test_shrinkage_leaves_large_cells_and_moves_small_ones_to_the_others(seed):
    random = np.random.default_rng(seed)
    n = np.array([[3], [100_000], [400], [500], [300]])
    hits = random.binomial(n, [[0.2], [0.3], [0.9], [0.5], [0.7]])
    value, low, high = shrink(Proportion(hits, n))
    assert value[1, 0] == pytest.approx(hits[1, 0] / n[1, 0], abs=0.001)
    overall = hits.sum() / n.sum()
    assert abs(value[0, 0] - overall) <= abs(hits[0, 0] / 3 - overall) + 1e-9
    assert (low < value).all()
    assert (value < high).all()


def test_images_that_are_needed_settle_the_difference_in_four_of_five_cases():
    rest = (np.array([9_000]), np.array([10_000]))
    counted = Proportion(np.array([[16], [rest[0][0]]]), np.array([[20], [rest[1][0]]]))
    lacking = int(cells(counted).needed[0, 0])
    assert lacking > 0
    random, told = np.random.default_rng(0), 0
    for _ in range(300):
        hits = random.binomial(20 + lacking, 0.8), random.binomial(10_000, 0.9)
        found = cells(Proportion(np.array(hits)[:, None], np.array([[20 + lacking], [10_000]])))
        told += found.high[0, 0] < 0 or found.low[0, 0] > 0
    assert 0.72 <= told / 300 <= 0.88
    same = cells(Proportion(np.array([[80], [80]]), np.array([[100], [100]])))
    assert (same.needed == -1).all()


@given(st.lists(st.integers(0, 30), min_size=2, max_size=8), st.integers(0, 15))
def test_what_is_withheld_cannot_be_had_by_subtraction(n, least):
    n = np.array(n)
    hidden = withheld(n, least)
    assert hidden[(n > 0) & (n < least)].all()
    if hidden.any():
        everyone = (n > 0).sum() == hidden.sum()
        assert everyone or (hidden.sum() >= 2 and n[hidden].sum() >= least)
    if least == 0:
        assert not hidden.any()


KEY = {"run": "r", "split": "s", "view": "v", "step": 1}


def told(groups: np.ndarray, labels: np.ndarray, columns: dict[str, tuple[str, ...]], least: int):
    """Lines of the table of random probabilities, by grouping, group, class and metric."""
    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(2), len(labels)))
    shape = Shape(int(np.prod([len(v) for v in columns.values()])), 2)
    t = tally_of(log_p, log_p.argmax(1), labels, groups, shape=shape)
    lines = table_of(t, ("a", "b"), columns, least, **KEY).to_pylist()
    return {(x["grouping"], x["group"], x["class"], x["metric"]): x for x in lines}


def test_groups_that_are_too_small_have_neither_numbers_nor_n_in_the_table():
    groups, labels = np.repeat([0, 1, 2], [200, 60, 4]), np.tile([0, 1], 132)
    lines = told(groups, labels, {"venue": ("x", "y", "z")}, 10)
    assert lines["venue", "venue=x", "", "accuracy"]["n"] == 200
    for name in ("venue=y", "venue=z"):  # z is small, and y would give it away
        line = lines["venue", name, "", "accuracy"]
        assert [line[part] for part in ("value", "low", "high", "n")] == [None] * 4
    assert lines["all", "all", "", "accuracy"]["n"] == 264
    assert all(x["n"] is None or x["n"] >= 10 for x in lines.values())
    compared = [x for (*_, metric), x in lines.items() if metric in FAIRNESS]
    assert compared
    assert all(x["value"] is None for x in compared)


def test_an_intersection_with_a_small_cell_is_not_told_since_its_margins_are():
    cells = np.repeat([0, 1, 2, 3], [100, 80, 60, 5])
    lines = told(cells, np.arange(245) % 2, {"venue": ("x", "y"), "camera": ("p", "s")}, 10)
    assert lines["venue", "venue=y", "", "accuracy"]["n"] == 65
    assert all(x["n"] is None for (grouping, *_), x in lines.items() if grouping == "venue x camera")


def test_a_class_that_is_rare_in_one_group_is_told_of_no_group_and_of_all():
    groups, labels = np.repeat([0, 1], [100, 100]), np.r_[np.arange(100) % 2, np.zeros(97, int), np.ones(3, int)]
    lines = told(groups, labels, {"venue": ("x", "y")}, 10)
    assert all(x["n"] is None for (grouping, _, name, _), x in lines.items() if grouping == "venue" and name)
    assert lines["venue", "venue=y", "", "accuracy"]["n"] == 100
    assert lines["all", "all", "b", "recall"]["n"] == 53


def test_small_cells_are_not_told_to_differ_and_one_image_settles_nothing():
    random, false = np.random.default_rng(0), 0
    for _ in range(100):
        n = random.integers(2, 30, (24, 5))
        false += (cells(Proportion(random.binomial(n, 0.95), n)).p <= 0.05).any()
    assert false <= 8
    alone = cells(Proportion(np.array([[0], [95], [95]]), np.array([[1], [100], [100]])))
    assert alone.p[0, 0] > 0.05
    assert alone.needed[0, 0] >= 19


@pytest.mark.parametrize(("n", "confidence", "accuracy"), [(10, 0.6, 0.9), (50, 0.7, 0.98), (200, 0.95, 0.999)])
def test_the_interval_of_a_calibration_error_has_width_where_all_of_a_bin_are_right(n, confidence, accuracy):
    right = np.random.default_rng(n).binomial(n, accuracy, 400)
    bins = np.zeros((400, 15, 3))
    bins[:, 0] = np.stack([np.full(400, n), right, np.full(400, n * confidence)], 1)
    low, high = Gaps(bins).interval()
    truth = accuracy - confidence
    assert (high > low).all()
    assert ((low <= truth) & (truth <= high)).mean() >= 0.92


def test_a_mean_of_scores_too_small_for_their_squares_has_width():
    p = np.random.default_rng(0).uniform(0.9895, 0.999, 400)
    zero = np.zeros(400, np.int64)
    found = RATES["nll"].of(tally_of(np.log(np.stack([p, 1 - p], 1)), zero, zero, zero, shape=Shape(1, 2)))
    low, high = found.interval()
    error = (-np.log(p)).std() / 20
    assert high[0] - low[0] > 2 * 1.96 * error


def test_a_group_of_one_image_is_no_mean_to_compare():
    p = np.r_[np.full(200, 0.9), 0.01]
    zero = np.zeros(201, np.int64)
    groups = np.repeat([0, 1, 2], [100, 100, 1])
    t = tally_of(np.log(np.stack([p, 1 - p], 1)), zero, zero, groups, shape=Shape(3, 2))
    found = comparisons(t)["nll_difference"]
    assert found.value < 1e-9
    assert found.value <= found.high


def test_a_class_that_is_hardly_ever_called_has_a_null_of_its_ratio():
    confusion = np.zeros((2, 2, 2), np.int64)
    confusion[:, 0, 0], confusion[:, 1, 1] = (47, 48), (3, 2)
    assert not np.isnan(comparisons(of_confusion(confusion))["disparate_impact"].chance).any()


def test_the_null_of_equalised_odds_is_of_both_rates():
    random, false = np.random.default_rng(0), 0
    for _ in range(120):
        n = np.full((8, 2), 50)
        found = comparisons(of_confusion(drawn(random, n, np.full((8, 2), 0.8))))["equalised_odds_difference"]
        false += found.value[0] > found.chance[0]
    assert false <= 11


def test_a_bootstrap_of_nothing_is_nothing():
    low, high = bootstrap(lambda c: c.sum(-1) * np.nan, np.zeros((2, 3), np.int64))
    assert np.isnan(low).all()
    assert np.isnan(high).all()
