import numpy as np
import pytest
from crepes import ConformalClassifier
from gaussians import Gaussians, long_tail, validation
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.decision import conformal
from trainer.decision.calibrate import calibrate
from trainer.decision.conformal import By, Conformal
from trainer.decision.coverage import coverages
from trainer.decision.fits import Temperature
from trainer.decision.ledger import log_softmax
from trainer.metrics.groups import groupings

K = 5
PRIOR = long_tail(K, 20)
WORLD = Gaussians(K, 1.2, seed=1)


def drawn(n: int, seed: int, prior: np.ndarray = PRIOR) -> tuple[np.ndarray, np.ndarray]:
    """log p under the long tail, and labels."""
    logits, labels = WORLD.draw(n, prior, seed)
    return log_softmax(logits + np.log(PRIOR)), labels


def covered(found: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return found[np.arange(len(labels)), labels]


def own_prior(labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, minlength=K) / len(labels)


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_are_those_of_crepes_over_all_rows_by_class_and_by_group(score):
    log_p, labels = drawn(333, 0)
    new, _ = drawn(400, 1)
    groups, of_new = np.arange(333) % 3, np.arange(400) % 3
    rows, prior = validation(log_p, labels, groups), own_prior(labels)
    own = covered(conformal.scores(log_p, score), labels)
    odd = conformal.scores(new, score)

    def ours(by):
        asked = Conformal(alpha=0.1234, by=by, score=score)
        return conformal.sets(new, conformal.fit(log_p, rows, 3, prior, asked), of_new)

    def theirs(scores, tested, bins=None, new=None):
        fitted = ConformalClassifier().fit(scores, bins)
        return np.asarray(fitted.predict_set(tested, new, confidence=1 - 0.1234, smoothing=False))

    np.testing.assert_array_equal(ours("none"), theirs(own, odd))
    np.testing.assert_array_equal(ours("group"), theirs(own, odd, bins=groups, new=of_new))
    for k in range(K):
        np.testing.assert_array_equal(ours("class")[:, k], theirs(own[labels == k], odd[:, [k]])[:, 0])


def test_each_kind_of_sets_covers_what_it_promises_where_the_plain_one_fails_a_class():
    test, true = drawn(20_000, 999)
    hits: dict[By, list] = {"none": [], "class": []}
    for seed in range(30):
        log_p, labels = drawn(1500, seed)
        for by, found in hits.items():
            fitted = conformal.fit(log_p, validation(log_p, labels), 1, own_prior(labels), Conformal(by=by))
            hit = covered(conformal.sets(test, fitted), true)
            found.append([hit.mean(), *(hit[true == k].mean() for k in range(K))])
    plain, by_class = (np.mean(found, 0) for found in hits.values())
    assert 0.89 <= plain[0] <= 0.915
    assert plain[1:].min() < 0.8
    assert (np.abs(by_class[1:] - 0.9) < 0.03).all()


def test_sets_cover_by_group_where_one_group_is_harder():
    found = []
    for seed in range(20):
        (log_p, labels), (new, true) = drawn(2000, seed), drawn(4000, seed + 100)
        parts = []
        for part, n in ((log_p, 2000), (new, 4000)):
            noise = np.random.default_rng([seed, n]).normal(0, 3, part.shape)
            parts.append(log_softmax(part + noise * (np.arange(n) % 2)[:, None]))
        rows = validation(parts[0], labels, np.arange(2000) % 2)
        fitted = conformal.fit(parts[0], rows, 2, own_prior(labels), Conformal(by="group"))
        hit = covered(conformal.sets(parts[1], fitted, np.arange(4000) % 2), true)
        found.append([hit[::2].mean(), hit[1::2].mean()])
    assert (np.abs(np.mean(found, 0) - 0.9) < 0.015).all()


def test_under_another_prior_weighted_quantiles_cover_and_plain_ones_do_not():
    uniform = np.full(K, 1 / K)
    test, true = drawn(20_000, 999, uniform)
    weighted, plain = [], []
    for seed in range(20):
        log_p, labels = drawn(2000, seed)
        for prior, found in ((uniform, weighted), (own_prior(labels), plain)):
            fitted = conformal.fit(log_p, validation(log_p, labels), 1, prior, Conformal(by="none"))
            found.append(covered(conformal.sets(test, fitted), true).mean())
    assert abs(np.mean(weighted) - 0.9) < 0.02
    assert np.mean(plain) < 0.85


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.sampled_from([0.5, 0.2, 0.1, 0.05, 0.03]))
def test_a_class_is_left_out_only_from_as_many_rows_as_the_guard_says(n, alpha):
    log_p = np.log(np.linspace(0.1, 0.9, n))[:, None].repeat(2, 1)
    rows = validation(log_p, np.zeros(n, np.int64))
    fitted = conformal.fit(log_p, rows, 1, np.array([1.0, 0.0]), Conformal(alpha=alpha, by="class"))
    least = int(np.ceil(round(1 / alpha, 9))) - 1
    assert fitted.whole[0].tolist() == [n < least, True]
    told = fitted.warnings(("a", "b"), [])
    assert told[-1] == f"'b' is in every set: that needs {least} of its validation rows"
    assert len(told) == 1 + (n < least)


def test_a_group_without_rows_and_an_unknown_one_get_whole_sets():
    log_p, labels = drawn(200, 0)
    fitted = conformal.fit(log_p, validation(log_p, labels), 2, own_prior(labels), Conformal(by="group"))
    found = conformal.sets(log_p[:3], fitted, np.array([0, 1, -1]))
    assert found[1:].all()
    assert not found[0].all()
    assert fitted.warnings(WORLD.classes, ["here", "there"]) == [
        "'there' gets whole sets: that needs 9 of its validation rows"
    ]


def test_calibration_on_the_same_rows_costs_no_coverage_to_speak_of():
    test, true = WORLD.draw(20_000, PRIOR, 999)
    found = []
    for seed in range(20):
        logits, labels = WORLD.draw(300, PRIOR, seed)
        ledger = calibrate(WORLD.ledger(PRIOR), 3 * logits, labels, Temperature()).ledger
        log_p = ledger.log_probabilities(3 * logits)
        fitted = conformal.fit(log_p, validation(logits, labels), 1, own_prior(labels), Conformal(by="none"))
        found.append(covered(conformal.sets(ledger.log_probabilities(3 * test), fitted), true).mean())
    assert np.mean(found) > 0.885


def test_coverage_is_told_by_class_group_and_cell_with_sizes():
    logits, labels = WORLD.draw(3000, PRIOR, 0)
    new, true = WORLD.draw(5000, PRIOR, 1)
    cells, of_new = np.arange(3000) % 2, np.arange(5000) % 2
    ledger, ways = WORLD.ledger(PRIOR), list(groupings({"venue": ("inside", "street")}))
    told = list(coverages(ledger, ledger.log_probabilities(new), true, of_new, ways, validation(logits, labels, cells)))
    assert [(s.score, s.by) for s in told] == [(s, b) for s in ("lac", "aps") for b in ("none", "class", "group")]
    for s in told:
        assert s.all.coverage.high >= 0.9
        assert [c.name for c in s.groups] == ["venue=inside", "venue=street"]
        assert sum(c.coverage.n for c in s.classes) == sum(c.coverage.n for c in s.cells) == 5000
        assert 0 <= s.all.size.low <= s.all.size.value <= s.all.size.high <= K
    lac = told[0]
    fitted = conformal.fit(
        ledger.log_probabilities(logits), validation(logits, labels, cells), 2, PRIOR, Conformal(by="none")
    )
    hit = covered(conformal.sets(ledger.log_probabilities(new), fitted), true)
    assert lac.classes[2].coverage.value == pytest.approx(hit[true == 2].mean())
    assert lac.all.coverage.value == pytest.approx(sum(PRIOR[k] * hit[true == k].mean() for k in range(K)))
