"""Detail, background and groups: what is said of models that go by them alone."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_probes import ledger, no_swaps, shown, told_by
from torch import Tensor

from data_loaders.index import open_index
from trainer.probe import background, features
from trainer.probe.background import foreground, partners
from trainer.probe.cells import Cell, Grouping, groupings
from trainer.probe.features import NAMES, high_pass, low_pass, perturbed
from trainer.probe.filters import blurred

TWO = ("flat", "rough")
N = 80


def halves(n: int = N) -> np.ndarray:
    return np.arange(n) % 2


def noise(low: int, high: int, size: int = 64, n: int = N) -> np.ndarray:
    return np.random.default_rng(9).integers(low, high, (n, 3, size, size)).astype(np.uint8)


@given(st.integers(1, 40), st.floats(0.005, 0.3))
@settings(deadline=None)  # the first blur of a process is slow
def test_a_blur_keeps_what_is_even_and_low_and_high_make_up_the_image(size, share):
    images = torch.from_numpy(np.random.default_rng(size).integers(60, 190, (2, 3, size, size)).astype(np.uint8))
    even = torch.full((1, 3, size, size), 7.0)
    assert torch.allclose(blurred(even, share), even, atol=1e-4)
    low, high = (of(share)(images, np.arange(2)).float() for of in (low_pass, high_pass))
    middle = images.float().mean((2, 3), keepdim=True)
    assert (low + high - middle - images.float()).abs().max() <= 1.01


def roughness(images: Tensor) -> Tensor:
    """Calls `rough` what differs from pixel to pixel, whatever it shows."""
    grey = images.float().mean(1)
    rough = (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2))
    return torch.stack([torch.full_like(rough, 12.0), rough], 1)


def test_a_model_of_fine_detail_is_told_by_a_blur():
    pixels = noise(100, 110)
    pixels[1::2] = (np.indices((64, 64)).sum(0) % 2 * 50 + 100).astype(np.uint8)
    labels, images = halves(), torch.from_numpy(pixels)
    found = features.features(told_by(roughness, perturbed, images), no_swaps(labels), labels, TWO, [])
    changes = {c.name: c for c in found.changes}
    assert found.recalls[1].value == 1
    for blur in ("low-pass 1/64", "low-pass 1/32"):
        assert changes[blur].recalls[1].high < -0.8
    assert changes["high-pass 1/32"].recalls[1].value == 0
    (told,) = features.findings(found, TWO)
    assert (told.bias, told.where) == ("feature", "rough")
    assert "blurred by 1/64" in told.text


def objects_before() -> tuple[Tensor, np.ndarray]:
    """Discs of any colour, before a dark background (class 0) or a bright one (class 1)."""
    random = np.random.default_rng(11)
    pixels = noise(20, 60, 32)
    pixels[1::2] += 140
    axis = np.arange(32) - 15.5
    disc = axis[:, None] ** 2 + axis**2 < 8**2
    colours = random.choice([0, 90, 110, 255], (N, 3))
    pixels[:, :, disc] = colours[:, :, None]
    return torch.from_numpy(pixels), halves()


def by_background(images: Tensor) -> Tensor:
    edge = images.float()[:, :, :3].mean((1, 2, 3)) - 110
    return torch.stack([-edge, edge], 1)


def by_object(images: Tensor) -> Tensor:
    middle = images.float()[:, :, 12:20, 12:20].mean((1, 2, 3)) - 110
    return torch.stack([-middle, middle], 1)


def test_a_model_of_the_background_alone_is_told_by_another_background():
    images, labels = objects_before()
    pairs = partners(labels)
    beside = [images[pair] for pair in pairs]
    for model, gap in ((by_background, 1.0), (by_object, 0.0)):
        swaps = background.swaps(model, ledger(2))(shown(images, beside))
        assert (swaps >= 0).all()
        plain = model(images).argmax(1).numpy()
        decided = np.tile(plain, (1 + len(NAMES), 1))
        found = features.features(decided, swaps, labels, TWO, [])
        assert [g.gap.value for g in found.gaps] == [gap, gap]
        told = list(features.findings(found, TWO))
        assert [finding.where for finding in told] == ["flat", "rough"] * (model is by_background)
        assert all("told by its background" in finding.text for finding in told)
        assert [c.name for c in found.changes[-2:]] == ["background same", "background other"]


def test_a_foreground_is_what_differs_from_the_border_and_a_flat_image_has_none():
    images, _ = objects_before()
    images = images[(images[:, :, 16, 16].float() - images[:, :, 0, 0].float()).norm(dim=1) > 100]
    axis = torch.arange(32) - 15.5
    disc = axis[:, None] ** 2 + axis**2 < 8**2
    found = foreground(images)[:, 0] > 0.5
    both, either = (found & disc).sum((1, 2)), (found | disc).sum((1, 2))
    assert (both / either).median() > 0.8
    flat = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    assert foreground(flat).max() == 0
    swaps = background.swaps(by_object, ledger(2))(shown(flat, [images[:1], images[:1]]))
    assert (swaps == -1).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_partners_are_others_of_the_class_and_of_another_class(labels):
    labels = np.array(labels)
    same, other = partners(labels)
    counts = np.bincount(labels)
    for i, k in enumerate(labels):
        assert (same[i] == -1) == (counts[k] == 1)
        assert (other[i] == -1) == (counts[k] == len(labels))
        assert same[i] == -1 or (labels[same[i]] == k and same[i] != i)
        assert other[i] == -1 or labels[other[i]] != k
    assert (partners(labels) == [same, other]).all()


def in_groups(labels: np.ndarray, group: np.ndarray) -> Grouping:
    names = [Cell(k, TWO[k], f"venue={g}") for k in (0, 1) for g in ("home", "street")]
    return Grouping(names, labels * 2 + group, group)


def test_a_shortcut_in_one_group_is_told_in_that_class_and_group_alone():
    """The model goes by red in images with a bright corner, and by brightness in the others."""
    labels, group = halves(160), np.arange(160) // 80
    pixels = noise(90, 110, 24, 160).astype(int)
    pixels[labels == 1, :] += 40
    pixels[labels == 1, 0] += 40
    pixels[group == 1, :, :6, :6] = 255
    images = torch.from_numpy(pixels.astype(np.uint8))

    def model(images: Tensor) -> Tensor:
        values = images.float()
        body = values[:, :, 8:]
        red = body[:, 0].mean((1, 2)) - body[:, 1:].mean((1, 2, 3)) - 15
        bright = body.mean((1, 2, 3)) - 125
        score = torch.where(values[:, :, :4, :4].mean((1, 2, 3)) > 180, red, bright)
        return torch.stack([-score, score], 1)

    decided = told_by(model, perturbed, images)
    assert (decided[0] == labels).all()
    found = features.features(decided, no_swaps(labels), labels, TWO, [in_groups(labels, group)])
    told = [finding for finding in features.findings(found, TWO) if "otherwise than elsewhere" in finding.text]
    assert {finding.where for finding in told} == {"rough, venue=street"}
    assert {finding.n for finding in told} == {40}
    grey = next(c for c in found.changes if c.name == "grey")
    cells = {(cell.label, cell.group): cell for cell in grey.cells}
    assert cells["rough", "venue=street"].recall.value == -1
    assert cells["rough", "venue=home"].recall.value == 0
    assert cells["rough", "venue=street"].others == 0


def test_groups_and_backgrounds_that_make_no_difference_are_not_told():
    labels, group = halves(240), np.random.default_rng(1).integers(0, 2, 240)
    least, told = [], 0
    for seed in range(30):
        random = np.random.default_rng(seed)
        right = random.random((1 + len(NAMES) + 2, 240)) < random.beta(4, 2, 240)
        decided = np.where(right, labels, 1 - labels)
        found = features.features(decided[:-2], decided[-2:], labels, TWO, [in_groups(labels, group)])
        told += any(features.findings(found, TWO))
        least.append(min(cell.p for change in found.changes for cell in change.cells))
    assert told <= 1
    assert np.mean(np.array(least) <= 0.1) <= 0.25


def test_cells_of_few_rows_have_their_number_and_no_test():
    labels, group = np.zeros(30, int), np.repeat([0, 1], [25, 5])
    decided = np.tile(np.where(np.arange(30) < 25, 0, 1), (1 + len(NAMES), 1))
    decided[0] = 0
    found = features.features(decided, no_swaps(labels), labels, TWO, [in_groups(labels, group)])
    few = found.changes[0].cells[1]
    assert (few.recall.value, few.recall.n) == (-1, 5)
    assert np.isnan(few.p)
    absent = found.changes[0].cells[3]
    assert absent.recall.n == 0
    assert np.isnan(absent.recall.value)
    assert list(features.findings(found, TWO)) == []


def test_groupings_are_of_all_rows_of_each_column_and_of_all_columns(dataset: Path):
    index = open_index(dataset)
    rows = index.rows_of("test")
    found = groupings(index, rows)
    assert len(found) == 4
    assert [str(cell) for cell in found[0].cells] == ["dessert", "drink", "food"]
    assert str(found[1].cells[0]) == "dessert, venue=home"
    assert "venue=home, camera=phone" in {cell.group for cell in found[3].cells}
    for grouping in found:
        for cell, number in zip(grouping.cell, range(len(rows)), strict=True):
            assert grouping.cells[cell].label == index.labels[rows[number]]
        assert np.bincount(grouping.cell).sum() == len(rows)
