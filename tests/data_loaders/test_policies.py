import math
import subprocess
import sys
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

from data_loaders.augment import JITTER, POLICY, AnyAugmentation, PadCrop, Plain, Standard
from data_loaders.pixels import done, turned
from data_loaders.policies import (
    INVERT,
    MEAN,
    PAIRS,
    AnyPolicy,
    AutoAugment,
    ColourJitter,
    NoPolicy,
    Operation,
    RandAugment,
    Range,
    Steps,
    TrivialAugment,
    narrow,
    wide,
)
from data_loaders.settings import parse, variants
from data_loaders.stream import uniform

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
LIVELY = [
    Plain(policy=AutoAugment(), cutout=5),
    Standard(rotation=30, policy=RandAugment(operations=3, magnitude=20), cutout=4, cutout_fill="black"),
    PadCrop(rotation=180, policy=TrivialAugment(), jitter=ALL_ON, cutout=9),
    PadCrop(jitter=ColourJitter(hue=0.5, contrast=1.0)),
]
sets = st.integers(1, 12).flatmap(lambda size: arrays(np.uint8, (4, size, size, 3)))
WITHOUT_TORCH = """
import sys
from data_loaders.augment import PadCrop
from data_loaders.policies import AutoAugment
PadCrop(policy=AutoAugment(), rotation=3)
assert "torch" not in sys.modules
"""


def noise(size: int, seed: int = 0, count: int = 1) -> np.ndarray:
    """Without the ends of the range, so that stretching the contrast shows."""
    return np.random.default_rng(seed).integers(30, 220, (count, size, size, 3), np.uint8)


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def array(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def made(images: np.ndarray, operations: list[Operation], amounts: list[float]) -> np.ndarray:
    """Each image after its operation."""
    return array(done(tensor(images), Steps(np.array(operations)[:, None], np.array(amounts, float)[:, None])))


def chosen(policy: Any, size: int, seed: int, positions: np.ndarray) -> Steps:
    return policy.steps(uniform(seed, positions, POLICY, policy.count), size)


def amount(each: Range, strength: float, negative: bool) -> float:
    found = each.weakest + (each.strongest - each.weakest) * strength
    return -found if each.signed and negative else found


def known(size: int) -> list[Range]:
    return [*narrow(size), INVERT, *wide()]


def peers(each: Range, image: np.ndarray, by: float) -> np.ndarray:
    """What torchvision makes of the image, with Pillow."""
    name = "invert" if each is INVERT else each.operation.name.lower()
    # of 256 values ours inverts a share, from none at 1 as published; theirs inverts 255 there
    given = {"posterize": round(by), "solarize": by * 256 / 255}.get(name, by)
    asked = (Image.fromarray(image), PEERS[name], given, "nearest", PEER._fill)
    return np.asarray(PEER._apply_image_or_video_transform(*asked))  # pyright: ignore[reportArgumentType]


def check_against_peer(images: np.ndarray, strength: float) -> None:
    """All operations and sides at once, in one batch."""
    cases = [
        (each, amount(each, strength, negative), image)
        for image, each, negative in product(images, known(images.shape[1]), (False, True))
    ]
    found = made(
        np.stack([image for _, _, image in cases]), [each.operation for each, _, _ in cases], [by for _, by, _ in cases]
    )
    for (each, by, image), ours in zip(cases, found, strict=True):
        np.testing.assert_array_equal(ours, peers(each, image, by), err_msg=f"{each} {by}")


@pytest.mark.parametrize("strength", [0, 1 / 30, 0.3, 0.5, 19 / 30, 20 / 30, 1])
def test_every_operation_agrees_with_torchvision_to_the_bit(strength):
    check_against_peer(noise(32), strength)


@given(sets, st.integers(0, 30))
@hypothesis_settings(max_examples=40)
def test_small_and_odd_images_agree_with_torchvision_too(images, level):
    check_against_peer(images, level / 30)


@pytest.mark.parametrize("least", [0, 254])
def test_images_of_few_values_agree_with_torchvision_too(least):
    check_against_peer(np.random.default_rng(0).integers(least, least + 2, (3, 33, 33, 3), np.uint8), 0.5)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0, 0.02, 0.37])
def test_hues_of_all_colours_are_those_of_pillow(turn):
    levels = np.arange(0, 256, 3 if turn else 17)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).astype(np.uint8).reshape(1, len(levels), -1, 3)
    square = np.resize(colours, (1, math.isqrt(colours.size // 3) + 1, math.isqrt(colours.size // 3) + 1, 3))
    asked: dict[str, Any] = dict.fromkeys(["brightness_factor", "contrast_factor", "saturation_factor"])
    picture = v2.ColorJitter().transform(Image.fromarray(square[0]), asked | {"hue_factor": turn, "fn_idx": [3]})
    expected = np.asarray(picture)
    np.testing.assert_array_equal(made(square, [Operation.HUE], [turn])[0], expected)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(("ours", "theirs"), [(narrow, v2.RandAugment), (lambda size: wide(), v2.TrivialAugmentWide)])
def test_operations_and_their_amounts_are_those_of_torchvision(ours, theirs, size):
    table, space = ours(size), theirs._AUGMENTATION_SPACE
    assert [PEERS[each.operation.name.lower()] for each in table] == list(space)
    for each, (amounts, signed) in zip(table, space.values(), strict=True):
        expected = amounts(31, size, size)
        assert each.signed == signed
        found = each.weakest + (each.strongest - each.weakest) * np.arange(31) / 30
        if each.operation == Operation.POSTERIZE:
            found = found.round()
        np.testing.assert_allclose(found, np.zeros(31) if expected is None else expected, rtol=1e-6, atol=1e-6)


def test_the_pairs_of_auto_augment_are_those_found_for_cifar_10():
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies
    for pair, expected in zip(PAIRS, theirs, strict=True):
        for (name, probability, level), (peer, their_probability, their_level) in zip(pair, expected, strict=True):
            assert (PEERS[name], probability) == (peer, their_probability)
            assert their_level in (None, level)


@given(sets)
def test_an_operation_without_strength_leaves_the_image_as_it_is(images):
    for each in known(images.shape[1]):
        if each is not INVERT and each.operation not in {Operation.AUTOCONTRAST, Operation.EQUALIZE}:
            found = made(images, [each.operation] * len(images), [amount(each, 0, True)] * len(images))
            np.testing.assert_array_equal(found, images, err_msg=each.operation.name)


Done = tuple[tuple[Operation, float], ...]
"""Operations and their amounts, one after the other, without those that do nothing."""


def programs(policy: Any, size: int) -> Iterator[tuple[float, Done]]:
    """Probability of each, as published."""
    sides = (False, True)
    if isinstance(policy, AutoAugment):
        table = {each.operation.name.lower(): each for each in narrow(size)} | {"invert": INVERT}
        for pair, turns in product(PAIRS, product(sides, repeat=4)):
            parts = list(zip(pair, turns[:2], turns[2:], strict=True))
            chance = math.prod(probability if on else 1 - probability for (_, probability, _), on, _ in parts)
            taken = [(table[name], level / 9, side) for (name, _, level), on, side in parts if on]
            yield chance / 4 / 25, told((each.operation, amount(each, by, side)) for each, by, side in taken)
        return
    table, levels = (narrow(size), [policy.magnitude]) if isinstance(policy, RandAugment) else (wide(), range(31))
    for each, level, side in product(table, levels, sides):
        yield 1 / 14 / len(levels) / 2, told([(each.operation, amount(each, level / 30, side))])


def told(steps: Any) -> Done:
    return tuple((kind, round(by, 9) + 0.0) for kind, by in steps if kind != Operation.IDENTITY)


@pytest.mark.parametrize("policy", [RandAugment(operations=1), TrivialAugment(), AutoAugment()], ids=repr)
def test_a_policy_does_what_was_published_as_often_as_published(policy):
    draws = 20_000
    expected: Counter[Done] = Counter()
    for chance, program in programs(policy, 8):
        if chance:
            expected[program] += chance * draws  # pyright: ignore[reportArgumentType]
    operations, amounts = chosen(policy, 8, 11, np.arange(draws))
    steps = zip(operations.tolist(), amounts.tolist(), strict=True)
    seen = Counter(told((Operation(kind), by) for kind, by in zip(*each, strict=True)) for each in steps)
    assert seen.keys() <= expected.keys()
    often = [key for key, times in expected.items() if times >= 5]
    rare = expected.keys() - set(often)
    found = [*(seen[key] for key in often), *([sum(seen[key] for key in rare)] if rare else [])]
    wanted = [*(expected[key] for key in often), *([sum(expected[key] for key in rare)] if rare else [])]
    assert chisquare(found, wanted).pvalue > 1e-3


def test_rand_augment_makes_the_images_of_torchvision_and_no_others():
    image = noise(8)[0] // 2 * 2  # between 255 and 256 thresholds of solarize lies 179
    theirs = v2.RandAugment(num_ops=1, magnitude=9, fill=list(MEAN))
    torch.manual_seed(0)
    seen = {np.asarray(theirs(Image.fromarray(image))).tobytes() for _ in range(600)}
    ours = Plain(policy=RandAugment(operations=1)).alter(tensor(np.stack([image] * 600)), 0, np.arange(600))
    assert seen == {found.tobytes() for found in array(ours)}


def test_rand_augment_does_one_operation_after_the_other():
    images, positions = noise(16, count=20), np.arange(20)
    program = chosen(RandAugment(operations=5, magnitude=20), 16, 3, positions)
    found = array(done(tensor(images), program))
    for turn in range(5):
        images = made(images, program.operations[:, turn].tolist(), program.amounts[:, turn].tolist())
    np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("on", [*({name: 0.5} for name in ColourJitter.model_fields), ALL_ON.model_dump()], ids=str)
def test_jitter_is_that_of_torchvision_with_the_changes_and_the_order_that_were_drawn(on):
    jitter, images, positions = ColourJitter(**on), noise(32, count=20), np.arange(20)
    names = list(jitter.model_dump())
    numbers = uniform(5, positions, JITTER, jitter.count)
    changes = (2 * numbers[:, :4] - 1) * list(jitter.model_dump().values())
    found = array(Plain(jitter=jitter).alter(tensor(images), 5, positions))
    for position in positions:
        factors = dict(zip(names[:3], (1 + changes[position, :3]).tolist(), strict=True))
        factors |= {"hue": changes[position, 3].item()}
        asked = {f"{name}_factor": factors[name] if getattr(jitter, name) else None for name in factors}
        asked |= {"fn_idx": np.argsort(numbers[position, 4:]).tolist()}
        expected = v2.ColorJitter().transform(Image.fromarray(images[position]), asked)
        np.testing.assert_array_equal(found[position], np.asarray(expected))


def test_all_orders_of_the_changes_of_jitter_come_equally_often():
    orders = ALL_ON.steps(uniform(7, np.arange(4_800), JITTER, ALL_ON.count)).operations
    times = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(times) == 24
    assert chisquare(times).pvalue > 1e-3


def test_hues_go_round_the_circle():
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]] * 3, np.uint8)
    for turn, places in [(1 / 3, 1), (2 / 3, 2), (-1 / 3, -1), (-2 / 3, -2), (1, 0)]:
        turned_by = made(primaries[None], [Operation.HUE], [turn])[0].astype(int)
        apart = np.abs(turned_by - np.roll(primaries, -places, 1))
        assert apart.max() <= 12  # two of 256 steps round the circle


@given(st.integers(1, 20), st.integers(1, 45), st.integers(0, 1000))
def test_cutout_blanks_a_square_about_a_pixel_clipped_at_the_border(size, side, position):
    white = torch.full((1, 3, size, size), 255, dtype=torch.uint8)
    found = array(Plain(cutout=side, cutout_fill="black").alter(white, 0, np.array([position])))[0]
    assert set(np.unique(found)) <= {0, 255}
    gone = (found == 0).all(2)
    np.testing.assert_array_equal((found == 0).any(2), gone)
    down, across = gone.any(1), gone.any(0)
    np.testing.assert_array_equal(gone, np.outer(down, across))
    squares = [np.isin(np.arange(size), np.arange(side) + centre - side // 2).tolist() for centre in range(size)]
    assert down.tolist() in squares
    assert across.tolist() in squares


def test_cutout_is_centred_on_each_pixel_equally_often():
    white = torch.full((1600, 3, 4, 4), 255, dtype=torch.uint8)
    found = Plain(cutout=1, cutout_fill="black").alter(white, 2, np.arange(1600))
    assert chisquare((found[:, 0] == 0).sum(0).ravel()).pvalue > 1e-3


@pytest.mark.parametrize(("fill", "colour"), [("mean", MEAN), ("black", (0, 0, 0))])
def test_what_is_cut_out_has_the_colour_asked_for(fill, colour):
    found = Plain(cutout=64, cutout_fill=fill).augmented(noise(16)[0], 16, 0, 0)
    np.testing.assert_array_equal(found, np.broadcast_to(np.array(colour, np.uint8), found.shape))


@pytest.mark.parametrize("policy", [kind() for kind in POLICIES], ids=repr)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_every_policy_serves_every_augmentation(augmentation, policy):
    on = augmentation(policy=policy, jitter=ALL_ON, cutout=3)
    for height, width, size in [(1, 1, 1), (2, 9, 3), (33, 47, 32), (8, 8, 8)]:
        image = noise(50)[0, :height, :width]
        before = image.copy()
        for position in range(6):
            found, again = (on.augmented(image, size, 1, position) for _ in range(2))
            assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
            np.testing.assert_array_equal(found, again)
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("policy", [kind() for kind in POLICIES if kind is not NoPolicy], ids=repr)
def test_a_policy_differs_between_positions_and_seeds(policy):
    images = tensor(np.concatenate([noise(24)] * 32))
    found = [array(Plain(policy=policy).alter(images, seed, np.arange(32))) for seed in range(4)]
    assert len({image.tobytes() for batch in found for image in batch}) > 24


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_pixels_are_altered_by_rotation_then_policy_then_jitter_then_cutout(augmentation):
    parts: list[dict[str, Any]] = [{"policy": RandAugment()}, {"jitter": ALL_ON}, {"cutout": 5}]
    if augmentation is not Plain:
        parts.insert(0, {"rotation": 20.0})
    images, positions = tensor(noise(24, count=9)), np.arange(9)
    whole = augmentation(**{name: value for part in parts for name, value in part.items()})
    found = whole.alter(images, 6, positions)
    for part in parts:
        images = augmentation(**part).alter(images, 6, positions)
    assert found.equal(images)


@pytest.mark.parametrize(
    "on", [{"cutout": 3}, {"policy": AutoAugment()}, {"jitter": ALL_ON}, {"rotation": 9.0}], ids=str
)
def test_what_is_switched_on_moves_nothing_else(on):
    positions, sides = np.arange(50), np.full(50, 40)
    without, with_it = (PadCrop(**settings).place(sides, sides, 16, 4, positions) for settings in ({}, on))
    for one, other in zip(without, with_it, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_change_of_jitter_and_its_place_among_the_others_are_the_same_whatever_else_is_on():
    numbers = uniform(1, np.arange(200), JITTER, 8)
    whole, part = ALL_ON.steps(numbers), ALL_ON.model_copy(update={"saturation": 0.0}).steps(numbers)
    kept = whole.operations != Operation.SATURATION
    for all_of_them, without in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_of_them[kept].reshape(200, 3), without)


@given(st.sampled_from(LIVELY), st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 13), st.randoms())
@hypothesis_settings(max_examples=60, deadline=None)
def test_an_image_becomes_the_same_alone_in_any_batch_and_memory_format(augmentation, seed, first, size, random):
    count = 24
    images, positions = tensor(noise(size, seed % 7, count)), first + np.arange(count)
    expected = augmentation.alter(images, seed, positions)
    order = random.sample(range(count), count)
    cut = random.randrange(1, count)
    for part in (order[:cut], order[cut:], order[:1]):
        found = augmentation.alter(images[part], seed, positions[part])
        assert found.equal(expected[part])
    pixels_last = images.contiguous(memory_format=torch.channels_last)
    assert augmentation.alter(pixels_last, seed, positions).equal(expected)
    every_other = torch.zeros((count, 3, size, 2 * size), dtype=torch.uint8)[:, :, :, ::2].copy_(images)
    assert augmentation.alter(every_other, seed, positions).equal(expected)


@pytest.mark.parametrize("augmentation", LIVELY, ids=repr)
def test_large_images_and_batches_are_altered_as_small_ones(augmentation):
    for size, count in ((230, 4), (32, 300)):
        images, positions = tensor(noise(size, count=count)), np.arange(count)
        expected = augmentation.alter(images, 1, positions)
        for at in range(0, count, 75):
            assert augmentation.alter(images[at : at + 1], 1, positions[at : at + 1]).equal(expected[at : at + 1])


@pytest.mark.parametrize("augmentation", [Plain(), *LIVELY], ids=repr)
def test_images_keep_their_memory_format_and_what_was_given_stays_as_it_was(augmentation):
    for layout in (torch.contiguous_format, torch.channels_last):
        images = tensor(noise(12, count=7)).contiguous(memory_format=layout)
        before = images.clone()
        found = augmentation.alter(images, 2, np.arange(7))
        assert found.is_contiguous(memory_format=layout)
        assert (found.dtype, found.shape) == (images.dtype, images.shape)
        assert images.equal(before)


def test_a_batch_of_no_images_stays_one():
    for augmentation in LIVELY:
        found = augmentation.alter(torch.zeros((0, 3, 8, 8), dtype=torch.uint8), 0, np.zeros(0, np.int64))
        assert found.shape == (0, 3, 8, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("augmentation", LIVELY, ids=repr)
def test_a_gpu_makes_the_bits_of_a_cpu(augmentation):
    for size, count in ((33, 400), (224, 20)):
        images, positions = tensor(noise(size, count=count)), np.arange(count)
        found = augmentation.alter(images.cuda(), 3, positions)
        assert found.cpu().equal(augmentation.alter(images, 3, positions))


def test_a_turn_by_quarters_moves_pixels_and_makes_none():
    images = tensor(noise(9, count=4))
    found = turned(images, np.array([0.0, 90.0, 180.0, -90.0]))
    for image, quarters, expected in zip(images, (0, 1, 2, 3), found, strict=True):
        assert torch.rot90(image, quarters, (1, 2)).equal(expected)


def test_settings_are_read_without_torch():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True)


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
