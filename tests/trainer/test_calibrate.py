"""Calibrators against peers, against what was put in, and against what must hold of each."""

import json
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression

from data_loaders.faults import Refusal
from trainer.checkpoint import _sampled
from trainer.decision import fits
from trainer.decision.calibrate import Scored, calibrate, surest
from trainer.decision.calibrators import Affine, Temperatures, log_softmax
from trainer.decision.ledger import Decision, Ledger
from trainer.decision.validation import Validation
from trainer.metrics.decomposition import by_cell, corp, murphy, sure

SKEWED = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
UNIFORM = np.full(6, 1 / 6)
BENT = np.diag(np.linspace(0.6, 1.8, 6))
MIXED = np.eye(6) + 0.4 * np.roll(np.eye(6), 1, 1)
KINDS = [
    fits.Nothing(),
    fits.Temperature(),
    fits.BiasCorrected(spreads=(1.0,)),
    fits.Vector(spreads=(1.0,)),
    fits.Dirichlet(spreads=(1.0,)),
    fits.Beta(),
    fits.Isotonic(),
    fits.GroupTemperature(),
]


def kind_name(kind: fits.AnyCalibrator) -> str:
    return kind.kind


def ledger_of(prior: np.ndarray = UNIFORM, logit_prior: np.ndarray = UNIFORM) -> Ledger:
    k = len(prior)
    names = tuple(map(str, range(k)))
    return Decision(prior=dict(zip(names, prior.tolist(), strict=True))).ledger(names, prior, logit_prior, logit_prior)


class World:
    """Labels drawn from true probabilities under a uniform prior: what a model tells, its log-probabilities, put
    through a matrix."""

    def __init__(self, n: int, k: int = 6, seed: int = 0, matrix: np.ndarray | None = None) -> None:
        self.random = np.random.Generator(np.random.Philox(key=[seed, n]))
        self.told = log_softmax(self.random.normal(0, 1.5, (n, k)))
        self.truth = log_softmax(self.told @ (np.eye(k) if matrix is None else matrix).T)
        ends = np.exp(self.truth).cumsum(1)[:, :-1]
        self.labels = (self.random.random(n)[:, None] > ends).sum(1)
        self.cells = self.random.integers(0, 3, n)

    def model(self) -> np.ndarray:
        """Too sure by a factor of two, biased, and noisy."""
        k = self.truth.shape[1]
        return 2 * self.truth + np.linspace(-0.6, 0.6, k) + self.random.normal(0, 0.3, self.truth.shape)


def natural(world: World) -> Ledger:
    """Where classes occur in use as in the rows."""
    share = np.bincount(world.labels) / len(world.labels)
    return ledger_of(share, share)


def proportional(n: int = 400, seed: int = 0) -> tuple[Ledger, np.ndarray, np.ndarray, np.ndarray]:
    """A ledger whose prior in use is that of the rows, logits, labels and cells: all rows weigh the same."""
    world = World(n, seed=seed)
    return natural(world), world.model(), world.labels, world.cells


# What must hold of every calibrator


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_calibrated_probabilities_sum_to_one_none_is_zero_and_another_prior_is_bayes_rule(kind):
    world = World(300)
    found = calibrate(ledger_of(SKEWED), world.model(), world.labels, kind, world.cells).ledger
    far = np.concatenate([world.model(), 200 * np.eye(6), -200 * np.eye(6)])
    cells = np.resize(np.arange(-1, 4), len(far))
    log_p = found.log_probabilities(far, cells=cells)
    assert np.isfinite(log_p).all()
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1)
    expected = log_softmax(log_p + np.log(UNIFORM) - np.log(SKEWED))
    np.testing.assert_allclose(found.log_probabilities(far, UNIFORM, cells), expected, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_a_calibrator_comes_out_of_json_with_the_same_bits(kind):
    world = World(200)
    found = calibrate(ledger_of(SKEWED), world.model(), world.labels, kind, world.cells).ledger
    again = Ledger.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    logits = World(50, seed=1).model()
    cells = np.resize(np.arange(-1, 4), 50)
    np.testing.assert_array_equal(
        again.log_probabilities(logits, cells=cells), found.log_probabilities(logits, cells=cells)
    )
    assert str(again.calibrator) == str(found.calibrator)


@pytest.mark.parametrize("kind", [*KINDS, fits.Best()], ids=kind_name)
def test_the_order_of_the_rows_changes_no_bit(kind):
    world = World(150)
    logits, order = world.model(), np.random.default_rng(0).permutation(150)
    one = calibrate(ledger_of(SKEWED), logits, world.labels, kind, world.cells)
    other = calibrate(ledger_of(SKEWED), logits[order], world.labels[order], kind, world.cells[order])
    assert other.ledger.to_json() == one.ledger.to_json()
    assert other.candidates == one.candidates


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_another_order_of_the_classes_is_the_same_calibrator_in_that_order(kind):
    world = World(300)
    logits, order = world.model(), np.array([3, 0, 5, 1, 4, 2])
    place = np.argsort(order)
    one = calibrate(ledger_of(SKEWED), logits, world.labels, kind, world.cells).ledger
    other = calibrate(ledger_of(SKEWED[order]), logits[:, order], place[world.labels], kind, world.cells).ledger
    np.testing.assert_allclose(
        other.log_probabilities(logits[:, order]), one.log_probabilities(logits)[:, order], atol=2e-4
    )


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_a_constant_added_to_all_logits_of_a_row_changes_nothing(kind):
    world = World(200)
    logits = world.model()
    found = calibrate(ledger_of(SKEWED), logits, world.labels, kind, world.cells).ledger
    shifted = found.log_probabilities(logits + np.linspace(-9, 9, 200)[:, None])
    np.testing.assert_allclose(shifted, found.log_probabilities(logits), atol=1e-9)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.kind != "none"], ids=kind_name)
def test_each_calibrator_makes_new_rows_of_a_miscalibrated_model_likelier(kind):
    fitted, new = World(3000), World(3000, seed=1)
    found = calibrate(ledger_of(), fitted.model(), fitted.labels, kind, fitted.cells)
    assert found.nll_after < found.nll_before
    every, logits = np.arange(3000), new.model()
    before = -ledger_of().log_probabilities(logits)[every, new.labels].mean()
    after = -found.ledger.log_probabilities(logits, cells=new.cells)[every, new.labels].mean()
    assert after < before - 0.1


@pytest.mark.parametrize("kind", [*KINDS, fits.Best()], ids=kind_name)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_few_rows_and_absent_classes_give_numbers_and_a_warning(kind, n):
    world = World(7)
    found = calibrate(ledger_of(SKEWED), world.model()[:n], world.labels[:n], kind, world.cells[:n])
    assert np.isfinite(found.ledger.log_probabilities(World(50, seed=1).model(), cells=np.arange(50) % 5 - 1)).all()
    assert np.isfinite(found.nll_after)
    assert found.warnings[0].startswith("no validation image of")
    json.dumps(found.facts(), allow_nan=False)


@pytest.mark.parametrize("kind", KINDS[2:5], ids=kind_name)
def test_a_class_without_rows_gets_no_bias_and_is_not_taken_for_one_that_never_occurs(kind):
    world = World(4000)
    kept = world.labels != 5
    whole = calibrate(ledger_of(), 2 * world.truth, world.labels, kind).ledger
    without = calibrate(ledger_of(), 2 * world.truth[kept], world.labels[kept], kind).ledger
    assert isinstance(without.calibrator, Affine)
    assert abs(without.calibrator.biases[5]) < 1e-6
    p, expected = (np.exp(x.log_probabilities(2 * world.truth))[:, 5].mean() for x in (without, whole))
    assert p == pytest.approx(expected, rel=0.25)


def test_logits_that_are_no_numbers_are_refused():
    logits = World(20).model()
    logits[3, 2] = np.nan
    with pytest.raises(Refusal, match="of 1 of 20 validation images"):
        calibrate(ledger_of(), logits, np.arange(20) % 6)


def test_without_any_row_nothing_is_calibrated_and_it_says_so():
    found = calibrate(ledger_of(), np.zeros((0, 6)), np.zeros(0, int))
    assert np.isnan(found.nll_after)
    assert found.warnings == ("there is no validation image: nothing is calibrated",)


# What was put in is found


@pytest.mark.parametrize("kind", KINDS[2:5], ids=kind_name)
def test_a_slope_and_biases_that_were_put_in_are_found(kind):
    world = World(20_000)
    biases = np.array([0.8, -0.4, 0.3, -0.7, 0.1, -0.1])
    found = calibrate(ledger_of(), (world.truth - biases) * 2.5, world.labels, kind).ledger
    right = np.abs(np.exp(found.log_probabilities((world.truth - biases) * 2.5)) - np.exp(world.truth))
    assert right.mean() < 0.006
    assert right.max() < 0.1


def test_slopes_by_class_are_found_by_vector_scaling_and_not_by_a_temperature():
    world = World(8000, matrix=BENT)
    ledger = natural(world)
    kinds = (fits.Vector(spreads=(1.0,)), fits.Temperature())
    vector, single = (calibrate(ledger, world.told, world.labels, kind).ledger for kind in kinds)
    off = [np.abs(np.exp(x.log_probabilities(world.told)) - np.exp(world.truth)).mean() for x in (vector, single)]
    assert off[0] < 0.01
    assert off[1] > 0.02
    assert isinstance(vector.calibrator, Affine)
    np.testing.assert_allclose(vector.calibrator.slopes, np.diag(BENT), rtol=0.12)


def test_a_matrix_is_found_by_dirichlet_and_not_by_slopes_by_class():
    world = World(8000, matrix=MIXED)
    ledger = natural(world)
    kinds = (fits.Dirichlet(spreads=(1.0,)), fits.Vector(spreads=(1.0,)))
    dirichlet, vector = (calibrate(ledger, world.told, world.labels, kind).ledger for kind in kinds)
    off = [np.abs(np.exp(x.log_probabilities(world.told)) - np.exp(world.truth)).mean() for x in (dirichlet, vector)]
    assert off[0] < 0.01
    assert off[1] > 0.02


def test_a_narrow_spread_is_plain_temperature_and_a_wide_one_is_least_nll():
    world = World(500)
    logits = world.model()
    plain = calibrate(ledger_of(), logits, world.labels, fits.Temperature()).nll_after
    for kind in (fits.BiasCorrected, fits.Vector, fits.Dirichlet):
        after = [calibrate(ledger_of(), logits, world.labels, kind(spreads=(s,))).nll_after for s in (1e-4, 0.1, 1, 99)]
        assert after[0] == pytest.approx(plain, abs=1e-5)
        assert after == sorted(after, reverse=True)


# The choice


def test_the_default_keeps_a_temperature_where_the_truth_is_one_or_loses_next_to_nothing():
    kinds = []
    for seed in range(4):
        world, new = World(400, seed=seed), World(4000, seed=seed + 100)
        found = calibrate(ledger_of(), 2 * world.truth, world.labels)
        log_p = found.ledger.log_probabilities(2 * new.truth)
        assert (new.truth - log_p)[np.arange(4000), new.labels].mean() < 0.01
        kinds.append(found.kind)
    assert kinds.count("temperature") >= 3


@pytest.mark.parametrize(
    ("matrix", "bias", "expected"),
    [(np.eye(6), 0.5, "bias_corrected"), (BENT, 0.0, "vector"), (MIXED, 0.0, "dirichlet")],
)
def test_the_default_takes_what_the_truth_is_where_rows_are_many(matrix, bias, expected):
    world = World(2500, matrix=matrix)
    told = world.told + np.linspace(-bias, bias, 6)
    assert calibrate(natural(world), told, world.labels).kind == expected


def test_the_default_keeps_a_temperature_below_a_hundred_rows_and_leaves_matrices_out_of_many_classes():
    few = calibrate(ledger_of(), World(99).model(), World(99).labels)
    assert (few.kind, few.candidates) == ("temperature", ())

    def kinds(k: int) -> set[str]:
        rows = fits.Rows(np.zeros((200, k)), np.zeros(200, int), np.zeros(200, int), np.ones(k) / k, np.ones(k) / k)
        return {candidate.kind for candidate in fits.Best().candidates(rows)}

    assert kinds(50) - kinds(51) == {"dirichlet"}
    assert kinds(100) - kinds(101) == {"beta", "isotonic"}


def test_the_surest_gain_wins_and_an_unsure_one_does_not():
    def scored(gain: float, error: float) -> Scored:
        return Scored("vector", None, 1.0, 0.1, gain, error)

    assert surest([scored(0, 0), scored(0.01, 0.02), scored(-1, 0.1)]) == 0
    assert surest([scored(0, 0), scored(0.03, 0.01), scored(0.05, 0.04)]) == 1
    assert surest([scored(0, 0), scored(0.03, 0.01), scored(0.09, 0.04)]) == 2
    assert surest([]) == 0


def test_what_was_chosen_and_why_is_told():
    world = World(600)
    facts = calibrate(ledger_of(), world.model(), world.labels, fits.Vector()).facts()
    assert facts["kind"] == "vector"
    assert facts["n"] == 600
    assert [c["spread"] for c in facts["candidates"]] == list(fits.SPREADS)
    assert facts["candidates"][0]["gain"] == 0
    assert all(c["standard_error"] > 0 for c in facts["candidates"])
    assert "one standard error" in facts["rule"]


def test_cross_validation_tells_the_nll_of_new_rows():
    world, new = World(500), World(10_000, seed=1)
    found = calibrate(ledger_of(), world.model(), world.labels, fits.Isotonic())
    both = calibrate(ledger_of(), world.model(), world.labels, fits.Best())
    told = next(c for c in both.candidates if c.kind == "isotonic")
    real = -found.ledger.log_probabilities(new.model())[np.arange(10_000), new.labels].mean()
    assert found.nll_after < told.nll - 0.02
    assert abs(told.nll - real) < 3 * told.standard_error


# Temperature by group


def test_a_large_group_keeps_its_own_temperature_and_a_small_one_stays_near_that_of_all():
    world = World(6000)
    own = np.array([1.0, 2.0, 4.0, 4.0])
    cells = np.repeat([0, 1, 2, 3], [2000, 2000, 1995, 5])
    found = calibrate(ledger_of(), world.truth * own[cells][:, None], world.labels, fits.GroupTemperature(), cells)
    value = found.ledger.calibrator
    assert isinstance(value, Temperatures)
    np.testing.assert_allclose(value.by_cell[:3], own[:3], rtol=0.12)
    middle = np.log(value.overall)
    assert np.log(value.by_cell[3]) - middle < 0.9 * (np.log(4) - middle)


def test_groups_that_do_not_differ_get_the_temperature_of_all():
    spread = []
    for seed in range(5):
        world = World(1500, seed=seed)
        cells = np.arange(1500) % 30
        value = calibrate(ledger_of(), 2 * world.truth, world.labels, fits.GroupTemperature(), cells).ledger.calibrator
        assert isinstance(value, Temperatures)
        spread.append(np.log(value.by_cell / value.overall).std())
    assert np.median(spread) < 0.05


def test_a_row_of_no_group_or_of_an_unknown_one_meets_the_temperature_of_all():
    value = Temperatures(2.0, np.array([1.0, 4.0]))
    logits = np.full((4, 3), 8.0)
    assert value(logits, np.array([0, 1, -1, 2]))[:, 0].tolist() == [8.0, 2.0, 4.0, 4.0]
    assert value(logits)[:, 0].tolist() == [4.0] * 4
    world = World(200)
    none = calibrate(ledger_of(), world.model(), world.labels, fits.GroupTemperature()).ledger.calibrator
    assert isinstance(none, Temperatures)
    assert len(none.by_cell) == 0


# Peers


def sklearns(method: str, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Logits(ClassifierMixin, BaseEstimator):
        """Knows its logits: the rows are the logits."""

        def fit(self, rows: np.ndarray, labels: np.ndarray) -> "Logits":
            self.classes_ = np.unique(labels)
            return self

        def decision_function(self, rows: np.ndarray) -> np.ndarray:
            return rows

        def predict(self, rows: np.ndarray) -> np.ndarray:
            return rows.argmax(1)

    known = FrozenEstimator(Logits().fit(logits, labels))
    return CalibratedClassifierCV(known, method=method).fit(logits, labels).predict_proba(logits)


def test_the_temperature_is_scikit_learns():
    ledger, logits, labels, _ = proportional()
    ours = np.exp(calibrate(ledger, logits, labels, fits.Temperature()).ledger.log_probabilities(logits))
    np.testing.assert_allclose(ours, sklearns("temperature", logits, labels), atol=1e-4)


def test_isotonic_curves_are_scikit_learns_but_for_the_ends():
    ledger, logits, labels, _ = proportional()
    value = calibrate(ledger, logits, labels, fits.Isotonic()).ledger.calibrator
    q, least = np.exp(log_softmax(logits)), 1 / (len(labels) + 2)
    peers = [IsotonicRegression(out_of_bounds="clip").fit(q[:, k], labels == k) for k in range(6)]
    for rows, off in ((logits, 1e-9), (World(100, seed=1).model(), 0.003)):  # between knots, ours starts at the clipped
        own = np.exp(log_softmax(rows))
        expected = np.stack([peer.predict(own[:, k]) for k, peer in enumerate(peers)], 1).clip(least, 1 - least)
        np.testing.assert_allclose(np.exp(value(rows)), expected, atol=off)


def test_temperature_and_beta_are_netcals():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports, gpytorch's and pyro's, use what Python and torch deprecate
        from netcal.scaling import BetaCalibration, TemperatureScaling

        ledger, logits, labels, _ = proportional(2000)
        q = np.exp(log_softmax(logits))
        scaled = TemperatureScaling().fit_transform(q, labels)
        hit = (labels == 0).astype(int)
        curve = BetaCalibration().fit_transform(q[:, 0], hit)
    ours = calibrate(ledger, logits, labels, fits.Temperature()).ledger.log_probabilities(logits)
    np.testing.assert_allclose(np.exp(ours), scaled, atol=2e-3)
    value = calibrate(ledger, logits, labels, fits.Beta()).ledger.calibrator
    np.testing.assert_allclose(np.exp(value(logits)[:, 0]), curve, atol=0.01)


# Kept validation rows


def test_of_too_many_validation_rows_a_stratified_sample_is_kept():
    labels = np.repeat([0, 1, 2], [900, 99, 1])
    rows = np.arange(1000) * 7
    kept = _sampled(Validation(np.stack([rows] * 3, 1).astype(np.float64), labels, labels, rows), 0, 300)
    assert np.bincount(kept.labels).tolist() == [90, 9, 1]
    np.testing.assert_array_equal(kept.logits[:, 0], kept.rows)
    assert (np.diff(kept.rows) > 0).all()


# What scores are made of


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(2, 4), st.integers(0, 2**20), st.booleans())
def test_decompositions_add_up_to_the_score(n, k, seed, tied):
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(k), n).round(1 if tied else 9)
    labels, weights = random.integers(0, k, n), random.uniform(0.1, 3, k)
    w = weights[labels] / weights[labels].sum()
    score = w @ (p - np.eye(k)[labels]) ** 2
    found = corp(p, labels, weights)
    np.testing.assert_allclose(found.score, [*score, score.sum()], atol=1e-12)
    for rule in ("brier", "log"):
        parts = corp(p, labels, weights, rule)
        np.testing.assert_allclose(parts.score, parts.miscalibration - parts.discrimination + parts.uncertainty)
        assert min(parts.miscalibration.min(), parts.discrimination.min()) > -1e-12
    m = murphy(p, labels, weights)
    np.testing.assert_allclose(m.score, score, atol=1e-12)
    total = m.reliability - m.resolution + m.uncertainty + m.within - m.covariance
    np.testing.assert_allclose(m.score, total, atol=1e-12)


def test_corp_is_that_of_scikit_learns_isotonic_regression():
    world = World(500)
    p, weights = np.exp(log_softmax(world.model())), np.linspace(0.5, 2, 6)
    found, w = corp(p, world.labels, weights), weights[world.labels]
    for k in range(6):
        hit = (world.labels == k).astype(float)
        again = IsotonicRegression().fit_transform(p[:, k], hit, sample_weight=w)
        least, most = (np.average((q - hit) ** 2, weights=w) for q in (again, np.average(hit, weights=w)))
        assert found.miscalibration[k] == pytest.approx(found.score[k] - least)
        assert found.discrimination[k] == pytest.approx(most - least)


def test_a_rising_bend_is_miscalibration_and_leaves_discrimination_alone():
    world = World(2000)
    p = np.exp(world.truth)
    bent = corp(p**2, world.labels)
    straight = corp(p, world.labels)
    np.testing.assert_allclose(bent.discrimination, straight.discrimination)
    assert (bent.miscalibration > straight.miscalibration).all()


def test_a_calibrated_forecast_is_within_chance_and_a_bent_one_is_not():
    inside = []
    for seed in range(8):
        world = World(300, k=3, seed=seed)
        p = np.exp(world.truth)
        inside.append(corp(p, world.labels).miscalibration <= sure(p, world.labels, replicates=100).chance_high)
    assert np.mean(inside) > 0.85
    world = World(600, k=3)
    p = np.exp(log_softmax(3 * world.truth))
    found, bounds = corp(p, world.labels), sure(p, world.labels, replicates=100)
    assert (found.miscalibration > bounds.chance_high).all()
    low, high = bounds.miscalibration
    big = World(50_000, k=3, seed=9)
    real = corp(np.exp(log_softmax(3 * big.truth)), big.labels).miscalibration
    assert ((low < real) & (real < high)).all()
    assert (low > 0).all()


def test_the_chance_band_holds_where_rows_have_another_mix_of_classes_than_use():
    """A calibrated forecast under the prior in use, judged on rows of another one that weigh accordingly."""
    inside = []
    prior, use = np.array([0.6, 0.3, 0.1]), np.full(3, 1 / 3)
    for seed in range(8):
        world = World(400, k=3, seed=seed)
        random = np.random.default_rng(seed)
        kept = random.random(400) < (prior / prior.max())[world.labels]
        truth, labels = world.truth[kept], world.labels[kept]
        inside.append(
            corp(np.exp(truth), labels, use / prior).miscalibration
            <= sure(np.exp(truth), labels, use / prior, replicates=100).chance_high
        )
    assert np.mean(inside) > 0.8


def test_a_decomposition_by_cell_is_that_of_its_rows_and_an_empty_cell_has_none():
    world = World(300)
    p = np.exp(log_softmax(world.model()))
    found = by_cell(partial(corp, rule="log"), p, world.labels, world.cells, 4)
    own = corp(p[world.cells == 1], world.labels[world.cells == 1], rule="log")
    np.testing.assert_array_equal(found[1].score, own.score)
    assert (found[3].n, np.isnan(found[3].score).all()) == (0, True)
    assert np.isnan(murphy(p[:0], world.labels[:0]).score).all()
    assert np.isnan(sure(p[:0], world.labels[:0]).chance).all()
