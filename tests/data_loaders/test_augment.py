from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from data_loaders.augment import AnyAugmentation, PadCrop, Plain, Standard, _framed, centred, rng

VARIANTS = [*get_args(get_args(AnyAugmentation)[0])]
SHAPES = [(1, 1), (1, 200), (200, 1), (2, 3), (33, 47), (375, 500), (64, 64)]
EXTREMES = [
    Standard(area=(1.0, 1.0), aspect=(1.0, 1.0)),
    Standard(area=(0.01, 0.01), aspect=(0.01, 100.0), rotation=180.0, flip_horizontal=1.0, flip_vertical=1.0),
    Standard(rotation=30.0, flip_vertical=0.5),
    PadCrop(padding=0),
    PadCrop(padding=100, rotation=180.0),
]
ALL = [*(variant() for variant in VARIANTS), *EXTREMES]
FIXED = Standard(area=(1.0, 1.0), aspect=(1.0, 1.0), flip_horizontal=0.0)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 3, 32, 64])
def test_any_image_becomes_square_uint8_and_stays_as_it_was(augmentation, shape, size):
    image = noise(*shape)
    before = image.copy()
    for position in range(3):
        found = augmentation(image, size, rng(0, position))
        assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
def test_pixels_are_a_function_of_seed_and_position(augmentation):
    image = noise(40, 50)
    for position in range(5):
        found = [augmentation(image, 24, rng(7, position)) for _ in range(2)]
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("augmentation", [v() for v in VARIANTS if v is not Plain] + [Standard(rotation=10)], ids=repr)
def test_positions_and_seeds_differ(augmentation):
    image = noise(40, 50)
    keys = [(seed, position) for seed in range(4) for position in range(8)]
    assert len({augmentation(image, 24, rng(*key)).tobytes() for key in keys}) > 24


def test_streams_of_different_keys_never_meet():
    words = {(seed, position): rng(seed, position).random() for seed in range(20) for position in range(20)}
    assert len(set(words.values())) == 400


def test_plain_is_the_centre_and_draws_no_random_numbers():
    image, random = noise(40, 50), rng(0, 0)
    np.testing.assert_array_equal(Plain()(image, 20, random), centred(image, 20))
    assert random.random() == rng(0, 0).random()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 30))
def test_the_centre_is_the_largest_middle_square(height, width, size):
    image, side = noise(height, width), min(height, width)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    expected = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0)
    np.testing.assert_array_equal(centred(image, size), np.asarray(expected))


def test_the_centre_mirrors_with_the_image():
    image = noise(41, 60)
    for flip in (np.s_[:, ::-1], np.s_[::-1]):
        mirrored, flipped = centred(image[flip], 16), centred(image, 16)[flip]
        assert np.abs(mirrored.astype(int) - flipped).max() <= 2


@pytest.mark.parametrize(("horizontal", "vertical"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_flips_of_probability_one_always_flip_and_of_zero_never(horizontal, vertical):
    image = noise(16, 16)
    standard = FIXED.model_copy(update={"flip_horizontal": horizontal, "flip_vertical": vertical})
    expected = image[:: -1 if vertical else 1, :: -1 if horizontal else 1]
    for position in range(50):
        np.testing.assert_array_equal(standard(image, 16, rng(0, position)), expected)
        pad_crop = PadCrop(padding=0, flip_horizontal=horizontal)
        np.testing.assert_array_equal(pad_crop(image, 16, rng(0, position)), image[:, :: -1 if horizontal else 1])


@pytest.mark.parametrize(
    "augmentation", [FIXED.model_copy(update={"flip_horizontal": 0.25}), PadCrop(padding=0, flip_horizontal=0.25)]
)
def test_a_flip_comes_as_often_as_its_probability(augmentation):
    image = noise(4, 4)
    flipped = sum(np.array_equal(augmentation(image, 4, rng(3, p)), image[:, ::-1]) for p in range(2_000))
    assert abs(flipped - 500) < 100  # 5 standard deviations


def test_a_rotation_of_zero_and_a_whole_crop_are_the_identity():
    image = noise(24, 24)
    for position in range(20):
        np.testing.assert_array_equal(FIXED(image, 24, rng(0, position)), image)


@pytest.mark.parametrize("still", [FIXED, PadCrop(padding=0, flip_horizontal=0.0)], ids=["standard", "pad_crop"])
def test_a_rotation_keeps_the_middle_and_brings_no_black_corners(still):
    image = np.full((32, 32, 3), 200, np.uint8)
    image[16:, 16:] = 120
    turn = still.model_copy(update={"rotation": 180.0})
    for position in range(30):
        found = turn(image, 32, rng(0, position))
        assert found.min() >= 119
        assert found.max() <= 201
        assert abs(found[14:18, 14:18].mean() - 180) < 12


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_frame_holds_the_mirrors_of_the_image(size, margin):
    image, margin = noise(size, size), min(size, margin)
    expected = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
    np.testing.assert_array_equal(_framed(image, margin), expected)


def test_a_turn_is_that_of_pillow_about_the_centre():
    image, inside = noise(32, 32), np.s_[10:22, 10:22]  # which no corner reaches
    turn = FIXED.model_copy(update={"rotation": 180.0})
    for position in range(30):
        random = rng(0, position)
        random.random(6)  # box, its place, flips
        expected = Image.fromarray(image).rotate(random.uniform(-180, 180), Image.Resampling.BILINEAR)
        apart = turn(image, 32, rng(0, position))[inside].astype(int) - np.asarray(expected)[inside]
        assert np.abs(apart).max() <= 1


def test_padding_of_zero_is_the_centre():
    image = noise(40, 30)
    found = PadCrop(padding=0, flip_horizontal=0)(image, 30, rng(0, 0))
    np.testing.assert_array_equal(found, centred(image, 30))


@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 10_000))
def test_a_padded_crop_is_the_image_moved_over_black(size, padding, position):
    image = noise(size, size) // 2 + 1  # no pixel is black
    found = PadCrop(padding=padding, flip_horizontal=0)(image, size, rng(1, position))
    wide = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    places = np.lib.stride_tricks.sliding_window_view(wide, (size, size, 3))[:, :, 0]
    assert (places == found).all((2, 3, 4)).any()


def test_every_shift_of_a_padded_crop_is_drawn():
    image = np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1).repeat(3, 2)
    crop = PadCrop(padding=1, flip_horizontal=0)
    assert len({crop(image, 4, rng(0, position)).tobytes() for position in range(300)}) == 9


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
    st.integers(0, 1000),
)
@hypothesis_settings(max_examples=300)
def test_crop_boxes_lie_inside_the_image_and_have_the_area_asked_for(width, height, area, aspect, position):
    least, greatest = sorted(area)
    standard = Standard(area=(least, greatest), aspect=(min(aspect), max(aspect)))
    left, top, w, h = standard._box(width, height, rng(0, position))
    assert left >= 0
    assert top >= 0
    assert w > 0
    assert h > 0
    assert left + w <= width * (1 + 1e-12)
    assert top + h <= height * (1 + 1e-12)
    assert least * (1 - 1e-9) <= w * h / (width * height) <= greatest * (1 + 1e-9)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(1, 4), st.floats(0.2, 5), st.integers(0, 1000))
def test_zooming_out_keeps_the_whole_image_and_adds_its_mirrors(width, height, area, aspect, position):
    standard = Standard(area=(area, area), aspect=(aspect, aspect), flip_horizontal=0)
    left, top, w, h = standard._box(width, height, rng(0, position))
    assert left <= 1e-9
    assert top <= 1e-9
    assert left + w >= width * (1 - 1e-9)
    assert top + h >= height * (1 - 1e-9)
    assert w * h == pytest.approx(area * width * height)


def test_an_image_zoomed_out_is_smaller_amid_its_mirrors_and_without_black():
    ramp = np.tile(np.arange(20, 220, 2, dtype=np.uint8), (100, 1))
    image = np.stack([ramp, ramp.T, ramp], 2)
    seen = Standard(area=(4, 4), aspect=(1, 1), flip_horizontal=0)(image, 50, rng(0, 1))
    assert seen.min() >= 20
    rises = np.diff(seen[25, :, 0].astype(int))
    assert (rises >= 7).sum() in (23, 24, 25)  # the image, half as wide as the crop
    assert (rises <= -7).sum() in (22, 23, 24)  # and its mirrors, which run the other way


def test_a_square_image_gets_the_aspects_asked_for():
    standard = Standard(area=(0.2, 0.3), aspect=(0.5, 2.0))
    aspects = [w / h for _, _, w, h in (standard._box(100, 100, rng(0, position)) for position in range(500))]
    assert 0.5 <= min(aspects) < 0.55
    assert 1.8 < max(aspects) <= 2.0
    assert 0.4 < np.mean(np.array(aspects) < 1) < 0.6


@pytest.mark.parametrize(
    "wrong",
    [
        {"area": (0.5, 0.4)},
        {"area": (0.5, 4.5)},
        {"area": (0, 1)},
        {"aspect": (2, 1)},
        {"rotation": -1},
        {"rotation": 181},
        {"flip_horizontal": 1.1},
        {"flip_vertical": -0.1},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Standard(**wrong)
