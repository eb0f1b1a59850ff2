from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from scipy.stats import chisquare, kstest

from data_loaders.augment import AnyAugmentation, PadCrop, Placing, Plain, Standard, centre, centred, placed, rng
from data_loaders.index import Ints

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
SIDES = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20)


def boxes_of(standard: Standard, sides: list[tuple[int, int]], seed: int = 0) -> np.ndarray:
    """Left, top, width, height of crops of images of so many pixels (width, height), at positions 0 …."""
    widths, heights = np.array(sides).T
    return standard.place(widths, heights, 32, seed, np.arange(len(sides))).boxes


def alone(placing: Placing, place: int) -> tuple[np.ndarray, Ints, int]:
    return placing.boxes[place], placing.shifts[place], int(placing.flips[place])


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 3, 32, 64])
def test_any_image_becomes_square_uint8_and_stays_as_it_was(augmentation, shape, size):
    image = noise(*shape)
    before = image.copy()
    for position in range(3):
        found = augmentation.augmented(image, size, 0, position)
        assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
def test_pixels_are_a_function_of_seed_and_position(augmentation):
    image = noise(40, 50)
    for position in range(5):
        found = [augmentation.augmented(image, 24, 7, position) for _ in range(2)]
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("augmentation", [v() for v in VARIANTS if v is not Plain] + [Standard(rotation=10)], ids=repr)
def test_positions_and_seeds_differ(augmentation):
    image = noise(40, 50)
    keys = [(seed, position) for seed in range(4) for position in range(8)]
    assert len({augmentation.augmented(image, 24, *key).tobytes() for key in keys}) > 24


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
def test_what_is_placed_is_altered_and_nothing_else_happens(augmentation):
    image, positions = noise(40, 50), np.arange(6)
    placing = augmentation.place(np.full(6, 50), np.full(6, 40), 24, 9, positions)
    batch = np.stack([placed(image, *alone(placing, place), 24) for place in range(6)])
    altered = augmentation.alter(torch.from_numpy(batch).permute(0, 3, 1, 2), 9, positions)
    expected = np.stack([augmentation.augmented(image, 24, 9, position) for position in range(6)])
    np.testing.assert_array_equal(altered.permute(0, 2, 3, 1).numpy(), expected)
    assert augmentation.alters or np.array_equal(batch, expected)


def test_streams_of_different_keys_never_meet():
    words = {(seed, position): rng(seed, position).random() for seed in range(20) for position in range(20)}
    assert len(set(words.values())) == 400


def test_plain_is_the_centre():
    image = noise(40, 50)
    np.testing.assert_array_equal(Plain().augmented(image, 20, 0, 0), centred(image, 20))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 30))
def test_the_centre_is_the_largest_middle_square(height, width, size):
    image, side = noise(height, width), min(height, width)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    expected = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box)
    np.testing.assert_array_equal(centred(image, size), np.asarray(expected))


def test_centres_of_many_are_those_of_each():
    widths, heights = np.array([40, 31, 7]), np.array([30, 64, 7])
    placing = centre(widths, heights)
    for place, (width, height) in enumerate(zip(widths.tolist(), heights.tolist(), strict=True)):
        image = noise(height, width)
        np.testing.assert_array_equal(placed(image, *alone(placing, place), 16), centred(image, 16))


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
        np.testing.assert_array_equal(standard.augmented(image, 16, 0, position), expected)
        pad_crop = PadCrop(padding=0, flip_horizontal=horizontal)
        np.testing.assert_array_equal(pad_crop.augmented(image, 16, 0, position), image[:, :: -1 if horizontal else 1])


@pytest.mark.parametrize(
    "augmentation", [FIXED.model_copy(update={"flip_horizontal": 0.25}), PadCrop(padding=0, flip_horizontal=0.25)]
)
def test_a_flip_comes_as_often_as_its_probability(augmentation):
    sides = np.full(2_000, 4)
    flips = augmentation.place(sides, sides, 4, 3, np.arange(2_000)).flips
    assert abs((flips == 1).sum() - 500) < 100  # 5 standard deviations


def test_a_rotation_of_zero_and_a_whole_crop_are_the_identity():
    image = noise(24, 24)
    for position in range(20):
        np.testing.assert_array_equal(FIXED.augmented(image, 24, 0, position), image)


@pytest.mark.parametrize("still", [FIXED, PadCrop(padding=0, flip_horizontal=0.0)], ids=["standard", "pad_crop"])
def test_a_rotation_keeps_the_middle_and_brings_no_black_corners(still):
    image = np.full((32, 32, 3), 200, np.uint8)
    image[16:, 16:] = 120
    turn = still.model_copy(update={"rotation": 180.0})
    for position in range(30):
        found = turn.augmented(image, 32, 0, position)
        assert found.min() >= 119
        assert found.max() <= 201
        assert abs(found[14:18, 14:18].mean() - 180) < 12


@pytest.mark.parametrize("size", [8, 31, 32])
def test_a_turn_is_that_of_pillow_about_the_centre_over_mirrors(size):
    image, seed = noise(size, size), 5
    wide = Image.fromarray(np.pad(image, ((size, size), (size, size), (0, 0)), mode="symmetric"))
    turn = FIXED.model_copy(update={"rotation": 180.0})
    for position, angle in enumerate(turn._angles(seed, np.arange(30)).tolist()):
        expected = np.asarray(wide.rotate(angle, Image.Resampling.BILINEAR))[size:-size, size:-size]
        apart = turn.augmented(image, size, seed, position).astype(int) - expected
        assert np.abs(apart).max() <= 1


def test_angles_are_even_between_the_greatest_to_either_side():
    angles = PadCrop(rotation=15)._angles(3, np.arange(2_000))
    assert kstest(angles, "uniform", (-15, 30)).pvalue > 1e-3


def test_padding_of_zero_is_the_centre():
    image = noise(40, 30)
    found = PadCrop(padding=0, flip_horizontal=0).augmented(image, 30, 0, 0)
    np.testing.assert_array_equal(found, centred(image, 30))


@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 10_000))
def test_a_padded_crop_is_the_image_moved_over_black(size, padding, position):
    image = noise(size, size) // 2 + 1  # no pixel is black
    found = PadCrop(padding=padding, flip_horizontal=0).augmented(image, size, 1, position)
    wide = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    places = np.lib.stride_tricks.sliding_window_view(wide, (size, size, 3))[:, :, 0]
    assert (places == found).all((2, 3, 4)).any()


def test_shifts_of_a_padded_crop_are_drawn_equally_often():
    sides = np.full(1_800, 4)
    shifts = PadCrop(padding=1).place(sides, sides, 4, 0, np.arange(1_800)).shifts
    assert chisquare(np.unique(shifts, axis=0, return_counts=True)[1]).pvalue > 1e-3
    assert np.abs(shifts).max() == 1


@given(SIDES, st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)))
@hypothesis_settings(max_examples=300)
def test_crop_boxes_lie_inside_the_image_and_have_the_area_asked_for(sides, area, aspect):
    least, greatest = sorted(area)
    standard = Standard(area=(least, greatest), aspect=(min(aspect), max(aspect)))
    boxes, image = boxes_of(standard, sides), np.array(sides)
    corner, box = boxes[:, :2], boxes[:, 2:]
    assert (boxes >= 0).all()
    assert (box > 0).all()
    assert (corner + box <= image).all()
    slack = (box.sum(1) + 1) / 256  # of sides that are rounded to 1/256 pixel
    assert (box.prod(1) >= least * image.prod(1) * (1 - 1e-9) - slack).all()
    assert (box.prod(1) <= greatest * image.prod(1) * (1 + 1e-9) + slack).all()


@given(SIDES, st.floats(1, 4), st.floats(0.2, 5))
def test_zooming_out_keeps_the_whole_image_and_adds_its_mirrors(sides, area, aspect):
    standard = Standard(area=(area, area), aspect=(aspect, aspect), flip_horizontal=0)
    boxes, image = boxes_of(standard, sides), np.array(sides)
    corner, box = boxes[:, :2], boxes[:, 2:]
    assert (corner <= 0).all()
    assert (corner + box >= image).all()
    np.testing.assert_allclose(box.prod(1), area * image.prod(1), rtol=0, atol=(box.sum(1).max() + 1) / 256)


@given(SIDES, st.sampled_from(ALL), st.integers(0, 2**63), st.integers(0, 2**40))
def test_images_are_placed_as_each_alone_and_on_a_grid_that_no_rounding_moves(sides, augmentation, seed, first):
    positions, (widths, heights) = first + np.arange(len(sides)), np.array(sides).T
    together = augmentation.place(widths, heights, 32, seed, positions)
    for place in range(len(sides)):
        here = np.s_[place : place + 1]
        found = augmentation.place(widths[here], heights[here], 32, seed, positions[here])
        for one, all_of_them in zip(found, together, strict=True):
            np.testing.assert_array_equal(one, all_of_them[here])
    np.testing.assert_array_equal(together.boxes * 256, np.rint(together.boxes * 256))


def test_areas_and_corners_of_crops_are_even_and_aspects_are_so_by_their_logarithm():
    standard = Standard(area=(0.2, 0.5), aspect=(0.8, 1.25))
    left, top, width, height = boxes_of(standard, [(1000, 1000)] * 2_000).T
    assert kstest(width * height / 1e6, "uniform", (0.2, 0.3)).pvalue > 1e-3
    assert kstest(np.log(width / height), "uniform", (np.log(0.8), 2 * np.log(1.25))).pvalue > 1e-3
    for corner, side in ((left, width), (top, height)):
        assert kstest(corner / (1000 - side), "uniform").pvalue > 1e-3


def test_a_box_that_is_narrowed_is_the_whole_image_at_an_area_of_one():
    wide = Standard(area=(1, 1), aspect=(0.01, 0.02))
    np.testing.assert_array_equal(boxes_of(wide, [(640, 480), (3, 7)]), [[0, 0, 640, 480], [0, 0, 3, 7]])


def test_a_placed_image_is_resampled_then_shifted_then_flipped():
    image, box, size = noise(30, 40), np.array([3.5, 2.25, 20.0, 25.5]), 16
    crop = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, (3.5, 2.25, 23.5, 27.75))
    moved = np.zeros((size, size, 3), np.uint8)
    moved[2:, :-3] = np.asarray(crop)[:-2, 3:]
    for flip, side in enumerate([np.s_[:], np.s_[:, ::-1], np.s_[::-1], np.s_[::-1, ::-1]]):
        np.testing.assert_array_equal(placed(image, box, np.array([2, -3]), flip, size), moved[side])


@given(st.integers(1, 9), st.integers(-12, 12), st.integers(-12, 12))
def test_what_is_shifted_in_is_black_and_the_rest_stays(size, down, right):
    image = noise(size, size) // 2 + 1
    found = placed(image, np.array([0.0, 0.0, size, size]), np.array([down, right]), 0, size)
    for row in range(size):
        for column in range(size):
            source = row - down, column - right
            is_inside = min(source) >= 0 and max(source) < size
            np.testing.assert_array_equal(found[row, column], image[source] if is_inside else 0)


def test_an_image_zoomed_out_is_smaller_amid_its_mirrors_and_without_black():
    ramp = np.tile(np.arange(20, 220, 2, dtype=np.uint8), (100, 1))
    image = np.stack([ramp, ramp.T, ramp], 2)
    seen = Standard(area=(4, 4), aspect=(1, 1), flip_horizontal=0).augmented(image, 50, 0, 1)
    assert seen.min() >= 20
    rises = np.diff(seen[25, :, 0].astype(int))
    assert (rises >= 7).sum() in (23, 24, 25)  # the image, half as wide as the crop
    assert (rises <= -7).sum() in (22, 23, 24)  # and its mirrors, which run the other way


def test_a_square_image_gets_the_aspects_asked_for():
    standard = Standard(area=(0.2, 0.3), aspect=(0.5, 2.0))
    _, _, widths, heights = boxes_of(standard, [(100, 100)] * 500).T
    aspects = widths / heights
    assert 0.5 <= min(aspects) < 0.55
    assert 1.8 < max(aspects) <= 2.0
    assert 0.4 < np.mean(aspects < 1) < 0.6


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
