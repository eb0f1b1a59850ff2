"""Mixing: the same images for any number of workers, and shares that are what the pixels say."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor
from torchvision.transforms import v2

from data_loaders.augment import rng
from data_loaders.sampler import Stratified, Undersampled
from data_loaders.settings import variants
from trainer.mixing import AnyMixing, Cmo, CutMix, Images, Mixed, Mixing, Mixup, Unmixed

KINDS: list[Any] = [*variants(AnyMixing)]
MIXINGS = [kind(probability=0.7) if "probability" in kind.model_fields else kind() for kind in KINDS]


def some(n: int, first: int = 0, height: int = 7, width: int = 5) -> Images:
    """Images of one value each, first … first + n - 1, which is also their label."""
    values = torch.arange(first, first + n)
    return Images(values.to(torch.uint8)[:, None, None, None].expand(n, 3, height, width), values, values % 3)


def mixed(mixing: Mixing, own: Images, step: int = 5, seed: int = 0) -> Mixed:
    partners = some(len(own.labels), 100, *own.images.shape[2:]) if mixing.partners else None
    return mixing(*own, partners, seed, step, 0, len(own.labels))


@pytest.mark.parametrize("mixing", MIXINGS, ids=lambda mixing: mixing.kind)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 33), st.lists(st.integers(0, 16), max_size=4), st.integers(0, 2**40))
def test_images_are_the_same_for_any_number_of_workers(mixing, batch, cuts, step):
    own, partners = some(batch), some(batch, 100) if mixing.partners else None
    whole = mixing(*own, partners, 1, step, 0, batch)
    edges = [0, *sorted(min(2 * cut, batch) for cut in cuts), batch]
    parts = []
    for start, stop in pairwise(edges):
        here = None if partners is None else Images(*(part[start:stop] for part in partners))
        parts.append(mixing(*(part[start:stop] for part in own), here, 1, step, start, batch))
    for expected, found in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("mixing", MIXINGS, ids=lambda mixing: mixing.kind)
def test_every_image_is_its_share_of_two_labels(mixing):
    """Images have their label as their value, so that the mean of a mixed one is the mean of its labels."""
    own = some(41)
    found = mixed(mixing, own)
    assert found.share.dtype == torch.float32
    assert ((found.share >= 0) & (found.share <= 1)).all()
    assert torch.equal(found.cells, found.labels % 3)
    expected = found.share * own.labels + (1 - found.share) * found.labels
    torch.testing.assert_close(found.images.float().mean((1, 2, 3)), expected, rtol=1e-5, atol=1e-4)
    assert ((found.share > 0) & (found.share < 1)).any() == (not isinstance(mixing, Unmixed))


@pytest.mark.parametrize("mixing", MIXINGS[1:], ids=lambda mixing: mixing.kind)
def test_every_step_and_seed_mixes_anew(mixing):
    own = some(64)
    shares = [mixed(mixing, own, step, seed).share for step, seed in ((1, 2), (2, 1), (1, 1), (1, 2))]
    assert torch.equal(shares[0], shares[3])
    assert not any(torch.equal(a, b) for a, b in ((shares[0], shares[1]), (shares[0], shares[2])))


@pytest.mark.parametrize("mixing", [Mixup(), CutMix(probability=1)])
@pytest.mark.parametrize("batch", [1, 2, 9, 10])
def test_pairs_are_neighbours_that_mirror_one_another_and_an_odd_last_image_stays_alone(mixing, batch):
    own = some(batch)
    found = mixed(mixing, own)
    pairs = batch - batch % 2
    assert found.labels[:pairs].tolist() == [i ^ 1 for i in range(pairs)]
    assert torch.equal(found.share[0:pairs:2], found.share[1:pairs:2])
    both = own.images[0:pairs:2].float() + own.images[1:pairs:2]
    torch.testing.assert_close(found.images[0:pairs:2].float() + found.images[1:pairs:2], both)
    assert torch.equal(found.images[pairs:].float(), own.images[pairs:].float())
    assert (found.share[pairs:] == 1).all()
    assert torch.equal(found.labels[pairs:], own.labels[pairs:])


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_shares_of_mixup_are_beta_and_not_the_random_numbers_of_the_augmentation(alpha):
    share = mixed(Mixup(alpha=alpha), some(4000, height=1, width=1)).share[::2].numpy()
    assert kstest(share, "beta", args=(alpha, alpha)).pvalue > 0.01
    assert not np.isclose(rng(0, 5).beta(alpha, alpha, 2000), share).any()


def test_mixup_of_an_image_with_itself_is_itself():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8), np.uint8)).expand(20, 3, 8, 8)
    found = mixed(Mixup(), Images(image, torch.zeros(20).long(), torch.zeros(20).long()))
    torch.testing.assert_close(found.images, image.float())


def boxes(found: Mixed, own: Images) -> Tensor:
    """Where pixels are not an image's own, [B, h, w]."""
    return (found.images != own.images).any(1)


@pytest.mark.parametrize("mixing", [CutMix(probability=1), Cmo(probability=1)])
def test_what_is_pasted_is_one_box_whose_area_the_share_tells(mixing):
    own = some(400, height=16, width=24)
    own = Images(own.images % 2 + 1, *own[1:]) if isinstance(mixing, CutMix) else own
    found = mixed(mixing, own)
    inside = boxes(found, own)
    torch.testing.assert_close(1 - inside.float().mean((1, 2)), found.share)
    rows, columns = inside.any(2), inside.any(1)
    assert torch.equal(inside, rows[:, :, None] & columns[:, None])  # a box: all places of its rows and columns
    for edge in (rows, columns):
        assert ((edge[:, 1:] & ~edge[:, :-1]).sum(1) + edge[:, 0] <= 1).all()  # it begins but once
    hit = inside.float().mean(0)
    assert hit.min() > 0.05  # the border, too, is sometimes in a box
    assert (found.images.dtype, found.images.shape) == (torch.uint8, own.images.shape)


def test_shares_of_cutmix_are_those_of_torchvision():
    pair = torch.stack((torch.zeros(1, 64, 64), torch.ones(1, 64, 64)))
    torch.manual_seed(0)
    peer = v2.CutMix(alpha=1.0, num_classes=2)
    theirs = [peer(pair, torch.tensor([0, 1]))[1][0, 0].item() for _ in range(600)]
    ours = mixed(CutMix(probability=1), some(8000, height=64, width=64)).share[::2].numpy()
    assert kstest(theirs, ours).pvalue > 0.01
    assert abs(np.mean(theirs) - ours.mean()) < 0.03


@pytest.mark.parametrize(("mixing", "step"), [(CutMix(probability=0.3), 2), (Cmo(probability=0.3), 1)])
def test_an_image_or_pair_is_mixed_with_its_probability(mixing, step):
    share = mixed(mixing, some(8000, height=64, width=64)).share[::step]
    assert (share < 1).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_cmo_pastes_images_of_its_own_stream_and_alone_has_one():
    own = some(50, height=8, width=8)
    found = mixed(Cmo(probability=1), own)
    assert torch.equal(found.labels, torch.arange(100, 150))
    inside = boxes(found, own)
    assert torch.equal(found.images[:, 0][inside], (inside * torch.arange(100, 150)[:, None, None])[inside])
    assert [mixing.partners is None for mixing in MIXINGS] == [True, True, True, False]
    assert Cmo().partners == Stratified()
    assert Cmo(sampler=Undersampled()).partners == Undersampled()


def test_unmixed_images_are_not_touched():
    own = some(6)
    assert Unmixed()(*own, None, 0, 0, 0, 6).images is own.images
