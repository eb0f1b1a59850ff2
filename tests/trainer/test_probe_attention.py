"""Where evidence lies, of models that look at a place that is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp
from small_probes import ledger, shown
from torch import Tensor, nn

from data_loaders.faults import Refusal
from trainer.networks import Classifier
from trainer.probe import attention
from trainer.probe.attention import CENTRAL, MIDDLES, PLACES, covered, drops, heat, shares, to_cover
from trainer.probe.cells import Cell, Grouping
from trainer.probe.paired import mean, standing
from trainer.probe.passes import log_probabilities

NAMES = ("none", "patch")
SIZE = 32


class Evidence(nn.Module):
    """Brightness everywhere, and brightness of the upper right corner alone, [B, 2, S, S]."""

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True).relu()
        corner = torch.zeros_like(grey)
        corner[:, :, : SIZE // 8, -SIZE // 8 :] = grey[:, :, : SIZE // 8, -SIZE // 8 :]
        return torch.cat([grey, corner], 1)


def corner_model() -> Classifier:
    """Calls `patch` what is bright in the corner, whatever else there is."""
    head = nn.Linear(2, 2)
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 300.0]])
    head.bias.data = torch.tensor([0.0, -3.0])
    model = Classifier(nn.Sequential(Evidence(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)).eval()
    return model.requires_grad_(False)


def with_patches(n: int = 60) -> tuple[Tensor, np.ndarray]:
    """Noise; every second image has a bright patch in its upper right corner."""
    pixels = np.random.default_rng(5).integers(110, 150, (n, 3, SIZE, SIZE)).astype(np.uint8)
    pixels[1::2, :, : SIZE // 8, -SIZE // 8 :] = 250
    return torch.from_numpy(pixels), np.arange(n) % 2


def by_class(labels: np.ndarray, names: tuple[str, ...] = NAMES) -> Grouping:
    """All rows in one group."""
    present, cell = np.unique(labels, return_inverse=True)
    return Grouping([Cell(int(k), names[k], "") for k in present], cell, np.zeros(len(labels), np.int64))


def test_a_model_that_looks_at_a_corner_is_told_by_covering_it_up_and_by_its_heat():
    images, labels = with_patches()
    model, batch = corner_model(), shown(images)
    assert (model(images).argmax(1).numpy() == labels).all()
    fallen = drops(model, ledger(2), labels, np.ones(len(labels), bool))(batch)
    found = attention.attention(fallen, heat(model, labels)(batch), labels, NAMES, [by_class(labels)])
    patch = found.covered[1]
    assert MIDDLES[patch.place] == (0.875, 0.125)
    assert patch.drops[patch.place].low > 1
    assert patch.centre.high < 0.1 < patch.low
    assert patch.excess.n == 30
    of_patch = found.heat[1]
    assert of_patch.centre.share.value < 0.01
    assert of_patch.border.share.value > 0.99
    assert of_patch.centre.others > 0.2
    told = list(attention.findings(found))
    assert [(finding.bias, finding.where) for finding in told] == [("spatial", "patch")] * 2
    assert "88% from the left and 12% from the top" in told[0].text
    assert "is not in the centre" in told[1].text
    assert "patch" in attention.summary(found)


def test_a_model_of_the_whole_frame_has_no_place():
    images, labels = with_patches()
    images[:, :, : SIZE // 8, -SIZE // 8 :] = 130

    def brightness(images: Tensor) -> Tensor:
        grey = images.float().mean((1, 2, 3)) - 130
        return torch.stack([-grey, grey], 1)

    fallen = drops(brightness, ledger(2), labels, np.ones(len(labels), bool))(shown(images))
    uniform = shares(torch.ones(len(labels), SIZE, SIZE))
    found = attention.attention(fallen, uniform, labels, NAMES, [by_class(labels)])
    assert list(attention.findings(found)) == []
    assert np.isnan(found.heat[0].centre.p)  # all shares are the same


def test_even_heat_lies_by_area_and_no_heat_nowhere():
    found = shares(torch.stack([torch.ones(32, 32), torch.zeros(32, 32)]))
    np.testing.assert_allclose(found[:, 0], [1 / 4, 7 / 16])
    assert np.isnan(found[:, 1]).all()
    assert CENTRAL.sum() == 9


@given(st.integers(4, 33))
def test_a_covered_place_has_the_mean_colour_and_the_rest_is_as_it_was(size):
    images = torch.from_numpy(np.random.default_rng(size).integers(0, 256, (2, 3, size, size)).astype(np.uint8))
    colour = images.float().mean((2, 3), keepdim=True)
    seen = torch.zeros(size, size, dtype=torch.bool)
    frames = list(covered(images))
    assert len(frames) == len(PLACES)
    for frame in frames:
        changed = (frame != images).any(0).any(0)
        assert changed.sum() <= max(round(size / 4), 1) ** 2
        hidden = (frame.float() - colour).abs() <= 0.5
        assert ((frame == images) | hidden).all()
        seen |= changed
    assert seen.float().mean() > 0.9 or size < 16


def test_where_no_place_matters_none_is_told():
    sure = told = 0
    labels = np.repeat([0, 1, 2], [30, 25, 22])
    for seed in range(20):
        random = np.random.default_rng(seed)
        fallen = random.exponential(1, (len(PLACES), 77)) - 0.7
        found = attention.attention(
            fallen, random.beta(2, 6, (2, 77)), labels, ("a", "b", "c"), [by_class(labels, ("a", "b", "c"))]
        )
        sure += min(c.p for c in found.covered) <= 0.05
        told += any(attention.findings(found))
    assert sure <= 4
    assert told <= 1


def test_an_absent_class_one_row_and_rows_that_were_not_covered_break_nothing():
    labels = np.array([0, 0, 2, 2, 2])
    fallen = np.random.default_rng(0).normal(size=(len(PLACES), 5))
    fallen[:, 1] = np.nan
    heated = np.full((2, 5), np.nan)
    names = ("a", "b", "c")
    found = attention.attention(fallen, heated, labels, names, [by_class(labels, names)])
    assert [(c.name, c.excess.n) for c in found.covered] == [("a", 1), ("c", 3)]
    assert np.isnan(found.covered[0].drops[0].low)
    assert np.isnan(found.covered[0].centre.low)
    assert [h.centre.share.n for h in found.heat] == [0, 0]
    assert list(attention.findings(found)) == []
    nothing = attention.attention(np.zeros((len(PLACES), 5)), heated, labels, names, [by_class(labels, names)])
    assert np.isnan(nothing.covered[0].p)
    assert np.isnan(nothing.covered[0].centre.value)


def test_rows_to_cover_are_bounded_and_even():
    labels = np.repeat([0, 1], [3000, 100])
    assert np.bincount(labels[to_cover(labels)]).tolist() == [675, 100]  # a quarter of the rows
    assert to_cover(np.repeat([0, 1], 150)).all()
    assert (to_cover(np.arange(1000)).sum()) == 1000  # one of each class at least


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(Refusal, match="cannot be probed"):
        log_probabilities(lambda x: torch.full((2, 2), np.nan), ledger(2), torch.zeros(2, 3, 4, 4), np.zeros(2, int))


@given(st.integers(0, 2**31))
def test_moments_of_shuffled_cells_are_those_of_all_shuffles(seed):
    random = np.random.default_rng(seed)
    values, stratum, cell = random.random(60), np.repeat([0, 1], [40, 20]), np.zeros(60, int)
    cell[:40], cell[40:] = random.integers(-1, 2, 40), 2
    found = standing(values, cell, 3, stratum)
    order = np.argsort(random.random((2000, 40)), axis=1)
    for k in (0, 1):
        if (n := (cell == k).sum()) > 1:
            means = values[order[:, :n]].mean(1)
            assert found.expected[k] == pytest.approx(means.mean(), abs=5 * means.std() / 2000**0.5)
            assert found.deviation[k] == pytest.approx(means.std(), rel=0.12)
            assert found.others[k] == pytest.approx(values[:40][cell[:40] != k].mean())
    assert found.expected[2] == pytest.approx(values[40:].mean())
    assert np.isnan(found.others[2])
    assert np.isnan(found.p[2])


def test_shuffled_cells_are_told_as_often_as_the_level_says():
    random, below = np.random.default_rng(8), 0
    for _ in range(1000):
        values = random.choice([-1, 0, 1], 120, p=[0.1, 0.8, 0.1]).astype(float)
        cell = (random.random(120) < 0.3).astype(int)
        below += standing(values, cell, 2, np.zeros(120, int), step=1).p[0] <= 0.05
    assert 10 <= below <= 60


@given(st.integers(0, 2**31), st.integers(2, 30))
def test_a_mean_has_students_interval(seed, n):
    values = np.random.default_rng(seed).normal(size=n)
    found = mean(values, np.full(n, 1), 2)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert found[1][:3] == pytest.approx((values.mean(), expected.low, expected.high))
    assert found[0].n == 0
    assert np.isnan(found[0].value)
