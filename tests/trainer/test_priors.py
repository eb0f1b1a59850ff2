import numpy as np
import pytest
from gaussians import Gaussians, long_tail, validation
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders.faults import Refusal
from trainer.decision import label_shift, priors
from trainer.decision.label_shift import Calls, Counts, expectation_maximisation
from trainer.decision.priors import PriorEstimate, estimate_prior

K = 4
NATURAL = long_tail(K, 50)
WORLD = Gaussians(K, 1.6, seed=3)
METHODS: tuple[tuple[label_shift.Method, int], ...] = ("em", 150), ("bbse", 1)
"""And the replicates that are needed of each."""
SHIFTS = {"forward": NATURAL, "uniform": np.full(K, 1 / K), "backward": NATURAL[::-1]}


def estimates(shift: np.ndarray, times: int, method: label_shift.Method = "em") -> list[PriorEstimate]:
    """Of a model with a temperature of 2 and biases that are wrong, which the estimate has to mend."""
    found, biases = [], np.array([0.0, 0.6, -0.5, 0.3])
    for seed in range(times):
        rows, labels = WORLD.draw(1500, NATURAL, 2 * seed)
        images, _ = WORLD.draw(400, shift, 2 * seed + 1)
        held = validation(2 * rows + biases, labels)
        found.append(estimate_prior(WORLD.ledger(NATURAL), 2 * images + biases, held, method))
    return found


def test_the_true_prior_lies_in_its_interval_as_often_as_stated_and_em_errs_less_than_bbse(monkeypatch):
    """Long tails of 50 forward, none, and backward, as in LADE (Hong et al. 2021)."""
    inside, errors = [], {"em": 0.0, "bbse": 0.0}
    for method, replicates in METHODS:
        monkeypatch.setattr(priors, "REPLICATES", replicates)
        for shift in SHIFTS.values():
            found = estimates(shift, 12, method)
            errors[method] += sum(float(np.abs(e.prior - shift).sum()) for e in found)
            inside += [(e.low <= shift) & (shift <= e.high) for e in found if method == "em"]
    assert 0.89 <= np.mean(inside) <= 0.99
    assert errors["em"] < 0.9 * errors["bbse"]


def test_em_without_the_correction_of_biases_is_off():
    """So it is the calibration that brings the estimate home (Alexandari et al. 2020)."""
    shift, ledger = SHIFTS["backward"], WORLD.ledger(NATURAL)
    images = 2 * WORLD.draw(5000, shift, 1)[0]
    bare = expectation_maximisation(ledger.log_probabilities(images, SHIFTS["uniform"]), np.ones(5000), NATURAL)
    rows, labels = WORLD.draw(5000, NATURAL, 2)
    found = estimate_prior(ledger, images, validation(2 * rows, labels))
    assert np.abs(bare - shift).sum() > 3 * np.abs(found.prior - shift).sum()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_em_ends_where_one_more_step_of_em_changes_nothing(seed):
    random = np.random.default_rng(seed)
    log_ratio, counts = random.normal(0, 2, (200, 3)), random.integers(0, 4, 200).astype(float)
    prior = expectation_maximisation(log_ratio, counts, np.full(3, 1 / 3))
    ratio = np.exp(log_ratio)
    step = prior * ((counts / counts.sum() / (ratio @ prior)) @ ratio)
    np.testing.assert_allclose(step, prior, atol=1e-5)
    assert prior.sum() == pytest.approx(1)


def test_bbse_solves_the_confusion_exactly_where_calls_are_as_the_matrix_says():
    labels = np.repeat([0, 1], 100)
    called = np.concatenate([np.repeat([0, 1], [80, 20]), np.repeat([0, 1], [30, 70])])
    images = np.repeat([0, 1], [400, 600])  # 0.8 pi + 0.3 (1 - pi) = 0.4
    calls = Calls(images, called, labels, 2)
    counts = Counts(np.ones(1000), np.ones(200), 0.0)
    np.testing.assert_allclose(label_shift.merged(label_shift.by_class(calls, counts)), [[0.8, 0.3], [0.2, 0.7]])
    sample = label_shift.Sample(np.zeros((1000, 2)), np.zeros((200, 2)), labels, np.full(2, 0.5))
    found = label_shift.fit("bbse", sample, label_shift.calibrated(sample), calls, counts, np.full(2, 0.5))
    np.testing.assert_allclose(found, [0.2, 0.8])
    condition, weakest = label_shift.condition(calls, counts, ("cat", "dog"))
    assert condition == pytest.approx(np.linalg.cond([[0.8, 0.3], [0.2, 0.7]]))
    assert set(weakest) == {"cat", "dog"}


def test_classes_that_look_the_same_are_refused_by_name():
    world = Gaussians(3, 3.0)
    world.means[2] = world.means[1] + 0.02
    rows, labels = world.draw(2000, np.full(3, 1 / 3), 0)
    with pytest.raises(Refusal, match=r"hardly tells class [12] from class [12].*condition number"):
        estimate_prior(world.ledger(np.full(3, 1 / 3)), rows, validation(rows, labels))


def test_too_few_images_and_classes_without_validation_rows_are_refused_in_one_pass():
    rows, labels = WORLD.draw(500, NATURAL, 0)
    with pytest.raises(Refusal) as refused:
        estimate_prior(WORLD.ledger(NATURAL), rows[:7], validation(rows[labels < 2], labels[labels < 2]))
    said = str(refused.value)
    assert "there are 7, and 100 are needed" in said
    assert "none is of 'class 2'" in said
    assert "none is of 'class 3'" in said
    with pytest.raises(Refusal, match="logits that are no numbers"):
        estimate_prior(WORLD.ledger(NATURAL), np.full((200, K), np.nan), validation(rows, labels))


def test_images_that_are_no_mixture_of_the_validation_classes_are_told_and_others_are_not(monkeypatch):
    monkeypatch.setattr(priors, "REPLICATES", 120)
    rows, labels = WORLD.draw(4000, np.full(K, 1 / K), 0)
    held = validation(rows, labels)
    random = np.random.default_rng(5)
    shifted = [estimate_prior(WORLD.ledger(NATURAL), WORLD.draw(1000, NATURAL, s)[0], held) for s in range(8)]
    assert sum(e.p <= 0.05 for e in shifted) <= 2
    x = WORLD.means[random.choice(K, 1000, p=NATURAL)] * 0.6 + random.normal(0, 1, (1000, 4))
    blurred = estimate_prior(WORLD.ledger(NATURAL), WORLD.logits(x), held)
    assert blurred.p <= priors.CHANCE
    assert "more than the prior has changed" in blurred.warnings[0]


def test_an_estimate_is_the_same_every_time_and_follows_the_names_of_the_classes():
    rows, labels = WORLD.draw(1000, NATURAL, 0)
    images = WORLD.draw(300, SHIFTS["uniform"], 1)[0]
    once, again = (estimate_prior(WORLD.ledger(NATURAL), images, validation(rows, labels)) for _ in range(2))
    assert once.to_json() == again.to_json()
    turned = WORLD.ledger(NATURAL[::-1])
    other = estimate_prior(turned, images[:, ::-1], validation(rows[:, ::-1], K - 1 - labels))
    np.testing.assert_allclose(other.prior[::-1], once.prior, atol=1e-5)


def test_a_class_of_few_validation_rows_is_told():
    rows, labels = WORLD.draw(2000, SHIFTS["uniform"], 0)
    kept = np.flatnonzero((labels != 3) | (np.cumsum(labels == 3) <= 4))
    found = estimate_prior(WORLD.ledger(NATURAL), rows, validation(rows[kept], labels[kept]))
    assert "the share of 'class 3' rests on 4 validation rows" in found.warnings
