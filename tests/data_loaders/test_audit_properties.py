"""What a property of images alone says of the class: the balanced skill, and what new properties measure."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_loaders.audit import contrasts as of_properties
from data_loaders.audit.contrasts import contrasts
from data_loaders.audit.properties import PROPERTIES, measure


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(of_properties, "REPLICATES", 199)


@pytest.mark.parametrize("majority", [0.5, 0.9, 0.99])
def test_noise_has_no_skill_whatever_the_share_of_the_majority(majority):
    """cleanlab 2.9 scores it .5, .1 and .008 where 1 is none; a skill that is not balanced scores the majority."""
    random = np.random.default_rng(0)
    labels = (np.arange(1200) >= 1200 * majority).astype(np.int64)
    skills = [skill for _, skill in contrasts(random.normal(size=(1200, 150)), labels, np.zeros(1200, np.int64))]
    assert abs(np.mean([s.value for s in skills])) < 0.04
    assert np.mean([s.p <= 0.05 for s in skills]) < 0.12
    assert 0.3 < np.mean([s.p <= 0.5 for s in skills]) < 0.7
    assert min(s.adjusted for s in skills) > 0.05


@pytest.mark.parametrize("majority", [0.5, 0.9, 0.99])
def test_brightness_that_codes_the_class_has_all_the_skill(majority):
    random = np.random.default_rng(1)
    labels = (np.arange(1200) >= 1200 * majority).astype(np.int64)
    values = random.normal(size=(1200, 5))
    values[:, 0] += 10 * labels
    (contrast, skill), *noise = contrasts(values, labels, np.zeros(1200, np.int64))
    assert skill.value > 0.9
    assert skill.by_chance < 0.6
    assert (skill.adjusted, contrast.adjusted) == (1 / 200, 1 / 200)
    assert min(s.adjusted for _, s in noise) > 0.05


def test_what_is_neither_higher_nor_lower_but_always_alike_is_told_by_skill_alone():
    random = np.random.default_rng(2)
    labels = np.repeat([0, 1], [900, 100])
    values = random.normal(size=(1000, 1)) * np.where(labels == 1, 0.1, 1)[:, None]
    ((contrast, skill),) = contrasts(values, labels, np.zeros(1000, np.int64))
    assert contrast.adjusted > 0.05
    assert skill.adjusted == 1 / 200
    assert skill.value > 0.5


def test_skill_that_the_cells_explain_is_none():
    random = np.random.default_rng(3)
    cells = random.integers(0, 3, 1200)
    labels = np.where(random.random(1200) < 0.7, cells, random.integers(0, 3, 1200))
    values = (cells + random.normal(0, 0.3, 1200))[:, None]
    ((_, within),), ((_, without),) = contrasts(values, labels, cells), contrasts(values, labels, cells * 0)
    assert within.p > 0.05
    assert without.p == 1 / 200


def test_one_class_one_row_and_a_thousand_classes_have_numbers_or_none():
    random = np.random.default_rng(4)
    for n, classes in ((1, 1), (50, 1), (2000, 1000)):
        labels = np.arange(n) % classes
        ((contrast, skill),) = contrasts(random.normal(size=(n, 1)), labels, np.zeros(n, np.int64), replicates=9)
        assert np.isnan(skill.value) == np.isnan(contrast.above) == (classes == 1)
        assert skill.n == n


def test_the_adjusted_p_values_of_data_without_bias_are_as_rare_as_they_say():
    random, alarms = np.random.default_rng(5), 0
    for seed in range(60):
        values, labels = random.normal(size=(120, 6)), (np.arange(120) >= 100).astype(np.int64)
        found = contrasts(values, labels, random.integers(0, 2, 120), seed)
        alarms += any(c.adjusted <= 0.1 or s.adjusted <= 0.1 for c, s in found)
    assert 0.02 < alarms / 60 < 0.22


def encoded(image: Image.Image, **how) -> bytes:
    out = BytesIO()
    image.save(out, **how)
    return out.getvalue()


def measured(content: bytes) -> dict[str, float]:
    return dict(zip((p.name for p in PROPERTIES), measure(content).tolist(), strict=True))


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(6).integers(0, 256, (48, 48, 3), np.uint8))


def test_a_blurred_picture_is_less_sharp_and_a_grey_one_less_colourful(picture: Image.Image):
    plain, blurred = (
        measured(encoded(p, format="PNG")) for p in (picture, picture.filter(ImageFilter.GaussianBlur(2)))
    )
    assert blurred["sharpness"] < plain["sharpness"] - 2
    grey = measured(encoded(picture.convert("L").convert("RGB"), format="PNG"))
    assert abs(grey["colourfulness"]) < 1e-6 < plain["colourfulness"]


def test_the_quality_of_a_jpeg_is_that_it_was_written_with(picture: Image.Image):
    for quality in (30, 75, 95):
        assert measured(encoded(picture, format="JPEG", quality=quality))["quality"] == quality
    assert measured(encoded(picture, format="PNG"))["quality"] == 0


def test_an_object_that_reaches_into_the_border_changes_nothing_of_the_surroundings():
    table = np.full((64, 64, 3), (120, 100, 80), np.uint8)
    reaching = table.copy()
    reaching[:30, 20:44] = (250, 20, 20)
    found = [measured(encoded(Image.fromarray(p), format="PNG")) for p in (table, reaching)]
    for name in ("border_brightness", "border_contrast", "border_red_green", "border_blue_green"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-4)
