import math
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pydantic import ValidationError
from scipy.stats import chisquare
from torchvision.transforms import v2

from data_loaders.augment import AnyAugmentation, PadCrop, Plain, Standard, rng
from data_loaders.policies import (
    MEAN,
    PAIRS,
    AnyPolicy,
    AutoAugment,
    ColourJitter,
    NoPolicy,
    Operation,
    RandAugment,
    TrivialAugment,
    cut_out,
    hue,
    invert,
    narrow,
    wide,
)
from data_loaders.settings import parse, variants

POLICIES = variants(AnyPolicy)
AUGMENTATIONS = variants(AnyAugmentation)
PEERS = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "saturation": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
}
"""Ours -> torchvision's name of the operation."""
PEER = v2.RandAugment(fill=list(MEAN))
ALL_ON = ColourJitter(brightness=0.4, contrast=0.3, saturation=0.9, hue=0.5)
images = st.integers(1, 12).flatmap(lambda size: arrays(np.uint8, (size, size, 3)))


def noise(size: int, seed: int = 0) -> np.ndarray:
    """Without the ends of the range, so that stretching the contrast shows."""
    return np.random.default_rng(seed).integers(30, 220, (size, size, 3), np.uint8)


def known(image: np.ndarray) -> list[dict[str, Operation]]:
    return [narrow(image.shape[0]) | {"invert": Operation(invert)}, wide()]


def peers(name: str, image: np.ndarray, amount: float) -> np.ndarray:
    """What torchvision makes of the image, with Pillow."""
    # of 256 values ours inverts a share, from none at 1 as published; theirs inverts 255 there
    given = {"posterize": round(amount), "solarize": amount * 256 / 255}.get(name, amount)
    asked = (Image.fromarray(image), PEERS[name], given, "nearest", PEER._fill)
    return np.asarray(PEER._apply_image_or_video_transform(*asked))  # pyright: ignore[reportArgumentType]


def check_against_peer(image: np.ndarray, strength: float) -> None:
    for table, negative in product(known(image), (False, True)):
        for name, operation in table.items():
            amount = operation.weakest + (operation.strongest - operation.weakest) * strength
            signed = -amount if operation.signed and negative else amount
            found = operation(image, strength, negative)
            np.testing.assert_array_equal(found, peers(name, image, signed), err_msg=f"{name} {signed}")


@pytest.mark.parametrize("strength", [0, 1 / 30, 0.3, 0.5, 19 / 30, 1])
def test_every_operation_agrees_with_torchvision_to_the_bit(strength):
    check_against_peer(noise(32), strength)


@given(images, st.integers(0, 30))
@hypothesis_settings(max_examples=60)
def test_small_and_odd_images_agree_with_torchvision_too(image, level):
    check_against_peer(image, level / 30)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(("ours", "theirs"), [(narrow, v2.RandAugment), (lambda size: wide(), v2.TrivialAugmentWide)])
def test_operations_and_their_amounts_are_those_of_torchvision(ours, theirs, size):
    table, space = ours(size), theirs._AUGMENTATION_SPACE
    assert [PEERS[name] for name in table] == list(space)
    for operation, (amounts, signed) in zip(table.values(), space.values(), strict=True):
        expected = amounts(31, size, size)
        assert operation.signed == signed
        found = operation.weakest + (operation.strongest - operation.weakest) * np.arange(31) / 30
        if operation.apply.__name__ == "posterize":
            found = found.round()
        np.testing.assert_allclose(found, np.zeros(31) if expected is None else expected, rtol=1e-6, atol=1e-6)


def test_the_pairs_of_auto_augment_are_those_found_for_cifar_10():
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies
    for pair, expected in zip(PAIRS, theirs, strict=True):
        for (name, probability, level), (peer, their_probability, their_level) in zip(pair, expected, strict=True):
            assert (PEERS[name], probability) == (peer, their_probability)
            assert their_level in (None, level)


@given(images)
def test_an_operation_without_strength_leaves_the_image_as_it_is(image):
    for table in known(image):
        for name in table.keys() - {"autocontrast", "equalize", "invert"}:
            np.testing.assert_array_equal(table[name](image, 0, True), image, err_msg=name)


Step = tuple[Operation, float, bool]
"""An operation, its strength and its side."""


def programs(policy: Any, size: int) -> Iterator[tuple[float, list[Step]]]:
    """Probability of each sequence of operations, as published."""
    sides = (False, True)
    if isinstance(policy, AutoAugment):
        table = narrow(size) | {"invert": Operation(invert)}
        for pair, turns in product(PAIRS, product(sides, repeat=4)):
            parts = list(zip(pair, turns[:2], turns[2:], strict=True))
            chance = math.prod(probability if on else 1 - probability for (_, probability, _), on, _ in parts)
            yield chance / 4 / 25, [(table[name], level / 9, side) for (name, _, level), on, side in parts if on]
        return
    table, levels = (narrow(size), [policy.magnitude]) if isinstance(policy, RandAugment) else (wide(), range(31))
    for operation, level, side in product(table.values(), levels, sides):
        yield 1 / 14 / len(levels) / 2, [(operation, level / 30, side)]


@pytest.mark.parametrize("policy", [RandAugment(operations=1), TrivialAugment(), AutoAugment()], ids=repr)
def test_a_policy_makes_each_image_as_often_as_published(policy):
    image, draws = noise(8), 6_000
    expected: Counter[bytes] = Counter()
    for chance, steps in programs(policy, 8):
        made = image
        for operation, strength, negative in steps:
            made = operation(made, strength, negative)
        expected[made.tobytes()] += chance * draws  # pyright: ignore[reportArgumentType]
    seen = Counter(policy(image, rng(11, position)).tobytes() for position in range(draws))
    assert seen.keys() <= expected.keys()
    often = [key for key, times in expected.items() if times >= 5]
    rare = expected.keys() - set(often)
    found = [*(seen[key] for key in often), *([sum(seen[key] for key in rare)] if rare else [])]
    wanted = [*(expected[key] for key in often), *([sum(expected[key] for key in rare)] if rare else [])]
    assert chisquare(found, wanted).pvalue > 1e-3


def test_rand_augment_makes_the_images_of_torchvision_and_no_others():
    image = noise(8) // 2 * 2  # between 255 and 256 thresholds of solarize lies 179
    theirs = v2.RandAugment(num_ops=1, magnitude=9, fill=list(MEAN))
    torch.manual_seed(0)
    seen = {np.asarray(theirs(Image.fromarray(image))).tobytes() for _ in range(600)}
    assert seen == {RandAugment(operations=1)(image, rng(0, position)).tobytes() for position in range(600)}


def test_rand_augment_does_one_operation_after_the_other():
    image, random = noise(16), rng(3, 4)
    found = RandAugment(operations=5, magnitude=20)(image, rng(3, 4))
    for _ in range(5):
        image = RandAugment(operations=1, magnitude=20)(image, random)
    np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("on", [*({name: 0.5} for name in ColourJitter.model_fields), ALL_ON.model_dump()], ids=str)
def test_jitter_is_that_of_torchvision_with_the_changes_and_the_order_that_were_drawn(on):
    jitter, image = ColourJitter(**on), noise(32)
    for position in range(20):
        random = rng(5, position)
        changes = random.uniform(-1, 1, 4) * list(jitter.model_dump().values())
        factors = dict(zip(["brightness", "contrast", "saturation"], (1 + changes[:3]).tolist(), strict=True))
        factors |= {"hue": changes[3].item()}
        asked = {f"{name}_factor": factors[name] if getattr(jitter, name) else None for name in factors}
        asked |= {"fn_idx": random.permutation(4).tolist()}
        expected = v2.ColorJitter().transform(Image.fromarray(image), asked)
        np.testing.assert_array_equal(jitter(image, rng(5, position)), np.asarray(expected))


def test_hues_go_round_the_circle():
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    for turn, places in [(1 / 3, 1), (2 / 3, 2), (-1 / 3, -1), (-2 / 3, -2), (1, 0)]:
        apart = np.abs(hue(primaries, turn).astype(int) - np.roll(primaries, -places, 1))
        assert apart.max() <= 12  # two of 256 steps round the circle


@given(st.integers(1, 20), st.integers(1, 45), st.integers(0, 1000))
def test_cutout_blanks_a_square_about_a_pixel_clipped_at_the_border(size, side, position):
    white = np.full((size, size, 3), 255, np.uint8)
    gone = (cut_out(white, side, (1, 2, 3), rng(0, position)) == (1, 2, 3)).all(2)
    down, across = gone.any(1), gone.any(0)
    np.testing.assert_array_equal(gone, np.outer(down, across))
    squares = [np.isin(np.arange(size), np.arange(side) + centre - side // 2).tolist() for centre in range(size)]
    assert down.tolist() in squares
    assert across.tolist() in squares


def test_cutout_is_centred_on_each_pixel_equally_often():
    white = np.full((4, 4, 3), 255, np.uint8)
    times = sum((cut_out(white, 1, (0, 0, 0), rng(2, position))[:, :, 0] == 0).astype(int) for position in range(1600))
    assert chisquare(np.ravel(times)).pvalue > 1e-3


@pytest.mark.parametrize(("fill", "colour"), [("mean", MEAN), ("black", (0, 0, 0))])
def test_what_is_cut_out_has_the_colour_asked_for(fill, colour):
    found = Plain(cutout=64, cutout_fill=fill)(noise(16), 16, rng(0, 0))
    np.testing.assert_array_equal(found, np.broadcast_to(np.array(colour, np.uint8), found.shape))


@pytest.mark.parametrize("policy", [kind() for kind in POLICIES], ids=repr)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_every_policy_serves_every_augmentation(augmentation, policy):
    on = augmentation(policy=policy, jitter=ALL_ON, cutout=3)
    for height, width, size in [(1, 1, 1), (2, 9, 3), (33, 47, 32), (8, 8, 8)]:
        image = noise(50)[:height, :width]
        before = image.copy()
        for position in range(6):
            found, again = (on(image, size, rng(1, position)) for _ in range(2))
            assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
            np.testing.assert_array_equal(found, again)
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("policy", [kind() for kind in POLICIES if kind is not NoPolicy], ids=repr)
def test_a_policy_differs_between_positions_and_seeds(policy):
    image = noise(24)
    keys = [(seed, position) for seed in range(4) for position in range(8)]
    assert len({policy(image, rng(*key)).tobytes() for key in keys}) > 8


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_pixels_are_altered_in_place_by_policy_then_jitter_then_cutout(augmentation):
    policy, image, random = RandAugment(), noise(40), rng(6, 7)
    on = augmentation(policy=policy, jitter=ALL_ON, cutout=5)
    altered = ALL_ON(policy(on.place(image, 24, random), random), random)
    np.testing.assert_array_equal(on(image, 24, rng(6, 7)), cut_out(altered, 5, MEAN, random))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_what_is_off_draws_no_random_numbers(augmentation):
    draws = {
        Plain: lambda random: None,
        Standard: lambda random: random.random(2 + 2 + 2),  # box, its place, flips
        PadCrop: lambda random: (random.integers(-4, 4, size=2, endpoint=True), random.random(2)),
    }
    random, expected = rng(8, 9), rng(8, 9)
    augmentation()(noise(40), 24, random)
    draws[augmentation](expected)
    assert random.random() == expected.random()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (RandAugment, {"operations": 0}),
        (RandAugment, {"magnitude": 31}),
        (RandAugment, {"magnitude": -1}),
        (ColourJitter, {"brightness": 1.1}),
        (ColourJitter, {"contrast": -0.1}),
        (ColourJitter, {"hue": 0.6}),
        (PadCrop, {"cutout": -1}),
        (PadCrop, {"cutout_fill": "white"}),
        (PadCrop, {"rotation": 181}),
        (Plain, {"policy": {"kind": "rand"}}),
    ],
)
def test_settings_that_mean_nothing_are_refused(kind, wrong):
    with pytest.raises(ValidationError):
        kind(**wrong)


def test_policies_are_asked_for_by_dotted_paths():
    asked = ["policy.kind=rand_augment", "policy.magnitude=5", "jitter.hue=0.1", "cutout=16", "rotation=15"]
    assert parse(PadCrop, asked) == PadCrop(
        policy=RandAugment(magnitude=5), jitter=ColourJitter(hue=0.1), cutout=16, rotation=15
    )
