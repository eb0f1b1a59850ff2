from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loaders.faults import Refusal
from trainer.decision.calibrate import calibrate
from trainer.decision.calibrators import Temperatures
from trainer.decision.costs import Balanced, Equal, Matrix
from trainer.decision.fits import Temperature
from trainer.decision.ledger import Decision, Ledger, log_softmax
from trainer.losses import BalancedSoftmax, CrossEntropy, Known

PRIOR = np.array([0.90, 0.08, 0.02])
CLASSES = ("food", "drink", "dessert")
UNIFORM = np.full(3, 1 / 3)


def ledger(training: np.ndarray = PRIOR, decision: Decision | None = None) -> Ledger:
    return (decision or Decision()).ledger(CLASSES, PRIOR, training, training)


class World:
    """Three Gaussian classes in the plane, of which the true posterior is known under any prior."""

    MEANS = np.array([[0.0, 0.0], [1.5, 0.5], [0.5, 1.6]])

    def __init__(self, n: int = 100_000, prior: np.ndarray = PRIOR) -> None:
        random = np.random.default_rng(0)
        self.labels = random.choice(3, n, p=prior)
        self.x = self.MEANS[self.labels] + random.normal(0, 1, (n, 2))

    def logits(self, prior: np.ndarray) -> np.ndarray:
        """Of a model that is perfect where classes occur as in `prior`."""
        return -0.5 * ((self.x[:, None] - self.MEANS) ** 2).sum(2) + np.log(prior)

    def nll(self, log_p: np.ndarray) -> float:
        return float(-log_p[np.arange(len(self.labels)), self.labels].mean())

    def recall(self, decisions: np.ndarray) -> np.ndarray:
        return np.array([(decisions[self.labels == k] == k).mean() for k in range(3)])


def test_balanced_training_with_the_ledger_is_natural_training():
    """The table of the source question's answer: sampling is undone by the prior, and cost does what sampling seemed
    to do. A bare argmax, and nothing else, favours the majority."""
    world = World()
    natural = ledger(PRIOR)
    balanced = ledger(UNIFORM)
    p_natural = natural.log_probabilities(world.logits(PRIOR))
    p_balanced = balanced.log_probabilities(world.logits(UNIFORM))
    np.testing.assert_allclose(p_natural, p_balanced, atol=1e-12)
    assert world.nll(log_softmax(world.logits(UNIFORM))) > 1.5 * world.nll(p_balanced)

    bare = world.recall(log_softmax(world.logits(PRIOR)).argmax(1))
    by_cost = world.recall(natural.decide(p_natural))
    uniform = world.recall(world.logits(UNIFORM).argmax(1))
    np.testing.assert_array_equal(by_cost, uniform)
    assert bare.min() < 0.1
    assert by_cost.min() > 0.5


@pytest.mark.parametrize("loss", [CrossEntropy(), BalancedSoftmax(), BalancedSoftmax(tau=0.5)])
def test_the_prior_of_the_logits_is_the_one_the_loss_leaves(loss):
    """A network that fits p(y | x) = softmax(z + tau log prior) has logits conditioned on prior ** (1 - tau)."""
    world = World(1000)
    tau = getattr(loss, "tau", 0.0)
    logits = world.logits(PRIOR) - tau * np.log(PRIOR)
    known = Known(np.array([[90, 8, 2]]), PRIOR)
    with_loss = Decision().ledger(CLASSES, PRIOR, PRIOR, loss.logit_prior(PRIOR, known))
    np.testing.assert_allclose(with_loss.log_probabilities(logits), log_softmax(world.logits(PRIOR)), atol=1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.floats(0.3, 3))
def test_probabilities_sum_to_one_under_any_prior_and_a_prior_of_its_own_changes_nothing(shares, temperature):
    prior = np.array(shares) / sum(shares)
    logits = np.random.default_rng(1).normal(0, 3, (20, 3))
    found = ledger(prior).with_calibrator(Temperatures(temperature))
    np.testing.assert_allclose(np.exp(found.log_probabilities(logits)).sum(1), 1)
    np.testing.assert_allclose(found.log_probabilities(logits, prior), log_softmax(logits / temperature), atol=1e-9)


def test_calibration_finds_the_temperature_that_was_put_in():
    world = World()
    for training in (PRIOR, UNIFORM):
        found = calibrate(ledger(training), world.logits(training) * 2.5, world.labels, Temperature())
        assert isinstance(found.ledger.calibrator, Temperatures)
        assert found.ledger.calibrator.overall == pytest.approx(2.5, rel=0.02)
        assert found.nll_after < found.nll_before
        assert found.n == 100_000


def test_calibration_is_weighted_to_the_prior_of_use():
    rows = World(20_000, prior=UNIFORM)  # validation rows of another mix than in use
    natural = World(200_000)
    found = calibrate(ledger(UNIFORM), rows.logits(UNIFORM), rows.labels, Temperature())
    assert found.nll_after == pytest.approx(natural.nll(log_softmax(natural.logits(PRIOR))), rel=0.03)


def test_calibration_bears_a_class_that_has_no_validation_row():
    world = World(500)
    kept = world.labels != 2
    found = calibrate(ledger(PRIOR), world.logits(PRIOR)[kept], world.labels[kept])
    assert np.isfinite(found.nll_after)
    assert found.warnings == ("no validation image of 'dessert'",)


def test_a_calibration_that_rests_on_nothing_says_so():
    for logits in (0.1 * np.eye(3), 5 * np.eye(3), -5 * np.eye(3)):
        found = calibrate(ledger(PRIOR), logits, np.arange(3))
        assert found.warnings[0] == "the calibration rests on 3 validation images"
        assert found.warnings[1].startswith("the validation images do not settle the calibration")
    world = World(10_000)
    assert calibrate(ledger(PRIOR), world.logits(PRIOR), world.labels).warnings == ()


def test_the_cheapest_decision_of_two_classes_is_a_threshold_of_costs():
    """Elkan 2001: call it positive from p = C_FP / (C_FP + C_FN)."""
    costs = Matrix(rows={"no": {"yes": 1.0}, "yes": {"no": 4.0}})
    prior = np.array([0.5, 0.5])
    found = Decision(costs=costs).ledger(("no", "yes"), prior, prior, prior)
    p = np.array([0.19, 0.21])
    assert found.decide(np.log(np.stack([1 - p, p], 1))).tolist() == [0, 1]
    np.testing.assert_allclose(found.expected_costs(np.log(np.stack([1 - p, p], 1)))[0], [4 * 0.19, 0.81])


def test_equal_costs_take_the_most_probable_class_and_balanced_ones_weigh_by_rarity():
    log_p = np.log([[0.5, 0.3, 0.2], [0.94, 0.05, 0.01]])
    assert ledger(decision=Decision(costs=Equal())).decide(log_p).tolist() == [0, 0]
    assert ledger(decision=Decision(costs=Balanced())).decide(log_p).tolist() == [2, 0]
    for costs in (Equal(), Balanced()):
        matrix = costs.matrix(CLASSES, PRIOR)
        assert PRIOR @ matrix.mean(1) == pytest.approx(2 / 3)


def test_another_use_takes_another_prior_and_other_costs_without_training():
    world = World(2000)
    found = ledger(UNIFORM).with_calibrator(Temperatures(1.3))
    other = found.under(Decision(prior={"food": 1, "drink": 1, "dessert": 2}, costs=Equal()))
    np.testing.assert_allclose(other.deployment_prior, [0.25, 0.25, 0.5])
    assert other.calibrator == found.calibrator
    shift = other.log_probabilities(world.logits(UNIFORM)) - found.log_probabilities(world.logits(UNIFORM))
    np.testing.assert_allclose(np.diff(shift, axis=1)[:, 0], np.log(0.25 / 0.08) - np.log(0.25 / 0.90), atol=1e-9)


def test_a_ledger_survives_json():
    import json

    found = ledger(UNIFORM).with_calibrator(Temperatures(1.25))
    again = Ledger.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    np.testing.assert_array_equal(again.costs, found.costs)


@pytest.mark.parametrize(
    ("decision", "said"),
    [
        (Decision(prior={"food": 1, "drink": 1}), "dessert"),
        (Decision(prior={"food": 1, "drink": 1, "dessert": 1, "soup": 1}), "soup"),
        (Decision(costs=Matrix(rows={"food": {"soup": 1}})), "no class 'soup'"),
    ],
)
def test_a_prior_or_cost_that_does_not_fit_the_classes_is_refused(decision, said):
    with pytest.raises(Refusal, match=said):
        ledger(decision=decision)


def test_the_golden_ledger_reads_as_it_was_written():
    import json

    tree = json.loads((Path(__file__).parent.parent / "golden" / "ledger.json").read_text())
    assert Ledger.from_json(tree).to_json() == tree
    assert Ledger.from_json(tree).decide(np.log([[0.6, 0.3, 0.1]])).tolist() == [2]
