import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from data_loaders.settings import flat
from trainer.mitigation import Effect, Images, Side, effects
from trainer.mitigation import _remedy as remedy  # its reading is tested with the jobs

CLASSES = ("food", "drinks", "desserts")
GROUPS = {"venue": ("home", "street")}


def images(random: np.random.Generator, n: int = 1200) -> Images:
    cells, labels = random.integers(0, 2, n), random.choice(3, n, p=[0.6, 0.3, 0.1])
    return Images([*map(str, range(n))], labels, cells, CLASSES, GROUPS)


def side(right: np.ndarray, nll: np.ndarray) -> Side:
    return Side("run", "argmax", {}, right, nll)


def found(lines: list[Effect], name: str = "", group: str = "all") -> Effect:
    return next(e for e in lines if (e.name, e.group) == (name, group))


def test_a_remedy_that_helps_one_class_and_harms_another_in_one_group_is_told_so():
    random = np.random.default_rng(0)
    seen = images(random, 3000)
    right, nll = random.random(3000) < 0.6, random.exponential(1.0, 3000)
    rare, harmed = seen.labels == 2, (seen.labels == 1) & (seen.cells == 1)
    later = np.where(rare, random.random(3000) < 0.85, np.where(harmed, random.random(3000) < 0.35, right))
    lines = effects(side(right, nll), side(later, nll - 0.3 * rare + 0.2 * harmed), seen)
    assert found(lines, "desserts").verdict == "helps"
    assert found(lines, "desserts").recall.low > 0.1
    assert found(lines, "drinks", "venue=street").verdict == "harms"
    assert found(lines, "drinks", "venue=street").recall.high < -0.1
    assert found(lines, "drinks", "venue=home").verdict == "not settled"
    assert found(lines, "food").recall.value == 0
    assert found(lines).recall.n == 3000


def test_remedies_that_do_nothing_are_rarely_told_to_do_something():
    random, told = np.random.default_rng(1), 0
    for _ in range(100):
        seen = images(random)
        before, after = (side(random.random(1200) < 0.7, random.exponential(1.0, 1200)) for _ in range(2))
        told += any(e.verdict != "not settled" for e in effects(before, after, seen))
    assert told <= 11


def test_p_values_are_those_of_scipy_before_they_are_adjusted_all_together():
    random = np.random.default_rng(2)
    seen = images(random)
    before = side(random.random(1200) < 0.7, random.exponential(1.0, 1200))
    after = side(random.random(1200) < 0.72, before.nll + random.normal(-0.05, 0.5, 1200))
    alone = Images(seen.ids, seen.labels * 0, seen.cells * 0, ("food",), {})
    lines = effects(before, after, alone)
    gained, lost = (after.right & ~before.right).sum(), (before.right & ~after.right).sum()
    p = [binomtest(int(min(gained, lost)), int(gained + lost)).pvalue, ttest_rel(after.nll, before.nll).pvalue]
    assert sorted([lines[0].p_recall, lines[0].p_nll]) == pytest.approx([min(2 * min(p), max(p)), max(p)])
    assert lines[0].nll.value == pytest.approx((after.nll - before.nll).mean())


def test_cells_of_few_images_are_shown_and_not_judged():
    seen = Images([*map(str, range(30))], np.repeat([0, 1], [25, 5]), np.zeros(30, np.int64), CLASSES, {})
    lines = effects(side(np.zeros(30, bool), np.ones(30)), side(np.ones(30, bool), np.zeros(30)), seen)
    assert found(lines, "food").verdict == "helps"
    few = found(lines, "drinks")
    assert few.verdict == "too few"
    assert few.recall.n == 5
    assert few.recall.value == 1
    assert not any(e.name == "desserts" for e in lines)


def test_a_remedy_names_what_was_changed():
    seen = images(np.random.default_rng(0), 60)
    plain = {"data.sampler.temper": 1.0, "seed": 0.0}
    before = Side("run", "argmax", plain, np.ones(60, bool), np.ones(60))
    after = Side("run", "ledger", plain | {"data.sampler.temper": 0.0}, np.ones(60, bool), np.ones(60))
    assert remedy("test", before, after, seen).changed == [
        "data.sampler.temper: 1.0 -> 0.0",
        "decision: argmax -> ledger",
    ]


def test_settings_are_compared_leaf_by_leaf():
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
