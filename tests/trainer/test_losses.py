"""Losses: contracts over every member of the unions, the formulas of their papers, and the same gradient for any number
of workers."""

import multiprocessing
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor, distributed
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional

from data_loaders.settings import variants
from trainer.losses import (
    AnyLoss,
    AnyWeights,
    BalancedSoftmax,
    BalPoe,
    Criterion,
    CrossEntropy,
    EffectiveNumber,
    Equal,
    Focal,
    GroupDro,
    Known,
    Ldam,
    Loss,
    Power,
    VectorScaling,
    Weighted,
)

CPU = torch.device("cpu")
KNOWN = Known(np.array([[60, 10, 1], [20, 8, 0]]), np.array([0.7, 0.2, 0.1]), scale=4.0)
ROWS = np.array([80, 18, 1])
LABELS = torch.tensor([0, 1, 2, 1, 0])
CELLS = torch.tensor([0, 1, 0, 0, 1])
Made = tuple[np.ndarray, np.ndarray, np.ndarray]


def bound(loss: Loss, known: Known = KNOWN) -> Criterion:
    return loss.bind(known, CPU)


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def heads_of(loss: Loss) -> int:
    return loss.heads or 2


# Contracts


@pytest.mark.parametrize("loss", [*(kind() for kind in variants(AnyLoss)), Focal(gamma=0.5)])
def test_every_loss_has_one_finite_float32_value_a_sample_and_a_gradient_however_sure_the_model_is(loss):
    z = logits(5, heads_of(loss), 3) * torch.tensor([1e-3, 1.0, 10.0, 300.0, 1e4])[:, None, None]
    right = 200.0 * functional.one_hot(LABELS, 3)[:, None].expand(z.shape)
    for said in (z, z.bfloat16(), right, -right):
        leaf = said.detach().requires_grad_()
        found = bound(loss).losses(leaf, LABELS, CELLS)
        assert (found.shape, found.dtype) == ((5,), torch.float32)
        found.sum().backward()
        assert found.isfinite().all()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("kind", variants(AnyLoss))
def test_every_gradient_is_that_of_finite_differences(kind):
    criterion, z = bound(kind()), logits(5, heads_of(kind()), 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: criterion.losses(z, LABELS, CELLS), z)


@pytest.mark.parametrize("kind", [kind for kind in variants(AnyLoss) if kind is not BalPoe])
def test_the_loss_of_several_heads_is_the_mean_of_theirs(kind):
    criterion, z = bound(kind()), logits(5, 4, 3)
    alone = torch.stack([criterion.losses(z[:, m], LABELS, CELLS) for m in range(4)], 1)
    torch.testing.assert_close(criterion.losses(z, LABELS, CELLS), alone.mean(1))


@pytest.mark.parametrize("kind", variants(AnyLoss))
def test_every_loss_tells_a_prior_that_sums_to_one(kind):
    prior = kind().logit_prior(KNOWN.prior, KNOWN)
    assert prior.sum() == pytest.approx(1)
    assert (prior > 0).all()


@pytest.mark.parametrize("kind", variants(AnyLoss))
def test_autocast_changes_no_loss(kind):
    criterion, z = bound(kind()), logits(5, heads_of(kind()), 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion.losses(z, LABELS, CELLS)
    assert torch.equal(found, criterion.losses(z, LABELS, CELLS))


@pytest.mark.parametrize("kind", variants(AnyLoss))
def test_a_worker_without_a_sample_has_no_loss(kind):
    none = torch.zeros(0, dtype=torch.int64)
    assert bound(kind()).losses(logits(0, heads_of(kind()), 3), none, none).shape == (0,)


# Formulas


def _shifted(z: np.ndarray, y: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return -log_softmax(z + shift, axis=1)[np.arange(len(y)), y]


FORMULAS: dict[str, tuple[Loss, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]]] = {
    "cross-entropy": (CrossEntropy(), lambda z, y, g: _shifted(z, y, np.zeros(3))),
    "balanced softmax": (BalancedSoftmax(), lambda z, y, g: _shifted(z, y, np.log(KNOWN.prior))),
    "logit adjustment": (BalancedSoftmax(tau=1.5), lambda z, y, g: _shifted(z, y, 1.5 * np.log(KNOWN.prior))),
    "focal": (
        Focal(gamma=1.5),
        lambda z, y, g: (1 - np.exp(-_shifted(z, y, np.zeros(3)))) ** 1.5 * _shifted(z, y, np.zeros(3)),
    ),
    "ldam": (  # 4 is the scale of the head
        Ldam(margin=0.3),
        lambda z, y, g: _shifted(z, y, -4 * 0.3 * (1 / ROWS[y] ** 0.25)[:, None] * np.eye(3)[y]),
    ),
    "vs": (
        VectorScaling(gamma=0.3, tau=1.2),
        lambda z, y, g: _shifted(z * (ROWS / 80) ** 0.3, y, 1.2 * np.log(KNOWN.prior)),
    ),
    "group-vs": (
        VectorScaling(gamma=0.3, tau=1.2, by_group=True),
        lambda z, y, g: _shifted(
            z * (np.array([[60, 10, 1], [20, 8, 1]]) / 60)[g] ** 0.3,
            y,
            1.2 * np.log(KNOWN.prior * np.array([[60, 10, 1], [20, 8, 1]]) / ROWS)[g],
        ),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_every_loss_is_the_formula_of_its_paper(name, seed, n):
    random = np.random.default_rng(seed)
    z, y, g = random.normal(0, 4, (n, 3)), random.integers(0, 3, n), random.integers(0, 2, n)
    loss, formula = FORMULAS[name]
    found = bound(loss).losses(*map(torch.from_numpy, (z, y, g)))
    np.testing.assert_allclose(found.numpy(), formula(z, y, g), rtol=1e-5, atol=1e-6)


def test_balanced_softmax_is_cross_entropy_of_shifted_logits_and_none_at_tau_0():
    z, prior = logits(5, 3), torch.from_numpy(KNOWN.prior).float()
    plain = bound(CrossEntropy()).losses(z, LABELS, CELLS)
    assert torch.equal(bound(BalancedSoftmax(tau=0)).losses(z, LABELS, CELLS), plain)
    weights = prior * z.exp()  # Ren et al. 2020, equation 4: n_y e^z_y / sum_k n_k e^z_k
    expected = -(weights / weights.sum(1, keepdim=True)).gather(1, LABELS[:, None])[:, 0].log()
    torch.testing.assert_close(bound(BalancedSoftmax()).losses(z, LABELS, CELLS), expected)


@pytest.mark.parametrize(
    ("loss", "same"),
    [
        (Focal(gamma=0), CrossEntropy()),
        (Ldam(margin=0), CrossEntropy()),
        (VectorScaling(gamma=0), BalancedSoftmax()),
        (VectorScaling(gamma=0, tau=0.5), BalancedSoftmax(tau=0.5)),
        (BalPoe(taus=(0.0,)), CrossEntropy()),
        (BalPoe(taus=(1.0,)), BalancedSoftmax()),
        (CrossEntropy(smoothing=0.2, tail_smoothing=0.2), CrossEntropy(smoothing=0.2)),
        (BalPoe(taus=(1.0,), smoothing=0.3), BalancedSoftmax(smoothing=0.3)),
        (GroupDro(), CrossEntropy()),
    ],
)
def test_losses_meet_where_their_settings_make_them_the_same(loss, same):
    z = logits(5, 3)
    torch.testing.assert_close(bound(loss).losses(z, LABELS, CELLS), bound(same).losses(z, LABELS, CELLS))


def test_group_vs_of_one_group_is_vs():
    known = Known(KNOWN.sizes.sum(0, keepdims=True), KNOWN.prior)
    z, cells = logits(5, 3), torch.zeros(5, dtype=torch.int64)
    one, all_ = (bound(VectorScaling(by_group=by), known).losses(z, LABELS, cells) for by in (True, False))
    torch.testing.assert_close(one, all_)


def test_each_expert_of_balpoe_has_a_tau_of_its_own():
    z = logits(5, 3, 3)
    alone = [bound(BalancedSoftmax(tau=tau)).losses(z[:, m], LABELS, CELLS) for m, tau in enumerate((0, 1, 2))]
    torch.testing.assert_close(bound(BalPoe()).losses(z, LABELS, CELLS), torch.stack(alone).mean(0))
    with pytest.raises(RuntimeError, match="expand"):
        bound(BalPoe()).losses(z[:, 0], LABELS, CELLS)  # one head would have all three taus


@pytest.mark.parametrize("loss", [CrossEntropy, BalancedSoftmax])
def test_smoothing_is_that_of_torch(loss):
    z = logits(5, 3)
    shifted = z + torch.from_numpy(np.log(KNOWN.prior)) * (loss is BalancedSoftmax)
    expected = functional.cross_entropy(shifted.float(), LABELS, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(bound(loss(smoothing=0.2)).losses(z, LABELS, CELLS), expected)


def test_label_aware_smoothing_smooths_the_head_the_most():
    rows = np.array([5000, 1000, 500, 50])
    share = 0.05 + 0.25 * np.sin(np.pi * (rows - 50) / (2 * 4950))  # Zhong et al. 2021, equation 5
    z, y = logits(4, 4), torch.arange(4)
    known = Known(rows[None], rows / rows.sum())
    found = bound(CrossEntropy(smoothing=0.3, tail_smoothing=0.05), known).losses(z, y, y * 0)
    expected = [functional.cross_entropy(z[[k]], y[[k]], label_smoothing=share[k]) for k in range(4)]
    torch.testing.assert_close(found, torch.stack(expected))
    assert share.tolist() == sorted(share, reverse=True)


def test_of_classes_of_one_size_all_are_the_head():
    known = Known(np.array([[7, 7, 7]]), np.full(3, 1 / 3))
    z = logits(5, 3)
    found = bound(CrossEntropy(smoothing=0.3, tail_smoothing=0.0), known).losses(z, LABELS, CELLS * 0)
    torch.testing.assert_close(found, functional.cross_entropy(z, LABELS, reduction="none", label_smoothing=0.3))


# Weights


@pytest.mark.parametrize("kind", variants(AnyWeights))
@given(st.lists(st.integers(1, 10**7), min_size=2, max_size=20).map(np.array))
def test_weights_of_classes_have_mean_one_and_fall_with_their_size(kind, rows):
    by_class = bound(CrossEntropy(weights=kind()), Known(rows[None], rows / rows.sum())).by_class
    assert (by_class > 0).all()
    assert (by_class[np.argsort(rows)].diff() <= 1e-6).all()
    assert by_class.double().mean().item() == pytest.approx(1, rel=1e-5)


def test_weights_are_those_of_their_formulas():
    np.testing.assert_allclose(Power(gamma=0.5).raw(np.array([4, 100])), [1 / 2, 1 / 10])
    np.testing.assert_array_equal(EffectiveNumber(beta=0).raw(ROWS), Equal().raw(ROWS))
    numbers = [sum(0.9**i for i in range(n)) for n in ROWS]  # the geometric series of Cui et al. 2019
    np.testing.assert_allclose(EffectiveNumber(beta=0.9).raw(ROWS), 1 / np.array(numbers))


@pytest.mark.parametrize("weights", [Equal(), Power(), Power(gamma=0.5), EffectiveNumber(beta=0.99)])
def test_the_weighted_mean_is_that_of_torch(weights):
    criterion, z = bound(CrossEntropy(weights=weights)), logits(5, 3)
    losses, w = criterion.losses(z, LABELS, CELLS), criterion.weights(LABELS, CELLS, 0.0)
    by_class = torch.from_numpy(weights.raw(ROWS)).float()
    torch.testing.assert_close((w * losses).sum() / w.sum(), functional.cross_entropy(z, LABELS, by_class))


@given(st.integers(2, 10_000))
def test_deferred_weights_come_into_force_at_their_share_of_the_steps(steps):
    criterion = bound(Ldam(weights=Power(), deferred=0.8))
    first = next(t for t in range(steps * 4 // 5, steps + 1) if 5 * t >= 4 * steps)
    assert (criterion.weights(LABELS, CELLS, (first - 1) / steps) == 1).all()
    if first < steps:
        assert torch.equal(criterion.weights(LABELS, CELLS, first / steps), criterion.by_class[LABELS])


def test_focal_loss_looks_at_the_unweighted_probability():
    """Peers take p from the weighted cross-entropy, p ** w: then weights also change which samples count as easy."""
    criterion, plain = bound(Focal(weights=Power())), bound(Focal())
    z = logits(5, 3)
    assert torch.equal(criterion.losses(z, LABELS, CELLS), plain.losses(z, LABELS, CELLS))
    w, nll = criterion.by_class[LABELS], functional.cross_entropy(z, LABELS, reduction="none")
    torch.testing.assert_close(w * criterion.losses(z, LABELS, CELLS), w * (1 - (-nll).exp()) ** 2 * nll)
    assert ((w * nll - nll).abs() > 0.1).any()


# What the logits are conditioned on


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(),
        CrossEntropy(weights=Power(gamma=0.7)),
        CrossEntropy(weights=EffectiveNumber(beta=0.9), deferred=0.8),
        BalancedSoftmax(),
        BalancedSoftmax(tau=0.5, weights=Power()),
        VectorScaling(gamma=0, tau=1.3),
        BalPoe(),
        BalPoe(taus=(0.0, 3.0), weights=EffectiveNumber(beta=0.9)),
    ],
)
def test_the_expected_loss_is_least_where_logits_are_conditioned_on_the_prior_that_the_loss_tells(loss):
    random = np.random.default_rng(0)
    likelihood = random.dirichlet(np.ones(6), 3).T  # p(x | k), [6, 3]
    taus = getattr(loss, "taus", (getattr(loss, "tau", 0.0),))
    w = loss.weights.raw(ROWS)
    best = np.log(likelihood * w)[:, None] + (1 - np.array(taus)[:, None]) * np.log(KNOWN.prior)
    told = loss.logit_prior(KNOWN.prior, KNOWN)
    np.testing.assert_allclose(
        log_softmax(best.mean(1), axis=1), log_softmax(np.log(likelihood) + np.log(told), axis=1), atol=1e-12
    )

    criterion, z = bound(loss), torch.from_numpy(best).requires_grad_()
    joint = torch.from_numpy(likelihood * KNOWN.prior)
    cells = torch.zeros(6, dtype=torch.int64)
    for k in range(3):
        labels = torch.full((6,), k)
        weights = criterion.weights(labels, cells, 0.9).double()
        (joint[:, k] * weights * criterion.losses(z, labels, cells)).sum().backward()
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-7


def test_a_class_that_a_phase_never_draws_has_a_finite_shift():
    known = Known(np.array([[5, 5, 5]]), np.array([0.6, 0.4, 0.0]))
    for loss in (BalancedSoftmax(), VectorScaling(), BalPoe()):
        z = logits(5, heads_of(loss), 3)
        assert bound(loss, known).losses(z, LABELS, CELLS * 0).isfinite().all()
    assert (BalancedSoftmax(tau=0).logit_prior(known.prior, known) == known.prior).all()


# Group DRO


def one_worker(tensor: Tensor) -> Tensor:
    return tensor


def test_group_dro_is_the_algorithm_of_its_paper_over_the_groups_that_are_there():
    random = np.random.default_rng(0)
    known = Known(np.array([[50, 5], [0, 9]]), np.array([0.8, 0.2]))
    criterion = bound(GroupDro(eta=0.5, adjustment=2.0), known)
    q, expected = criterion.state, np.array([1, 1, 0, 1]) / 3  # nobody has label 0 in cell 1
    np.testing.assert_allclose(q, expected)
    handicap = 2 / np.sqrt([50, 5, 1, 9])
    for possible in ([0, 1, 3], [0], [1, 3], [3], [0, 3]):
        groups, losses = random.choice(possible, 12), random.exponential(1, 12)
        there = np.unique(groups)
        means = np.array([losses[groups == g].mean() for g in there])
        mass = expected[there].sum()
        expected[there] *= np.exp(0.5 * (means + handicap[there]))
        expected[there] *= mass / expected[there].sum()
        found, labels, cells = map(torch.from_numpy, (losses.astype(np.float32), groups % 2, groups // 2))
        q, weights = criterion.adapt(q, found, labels, cells, one_worker)
        np.testing.assert_allclose(q, expected, rtol=1e-6)
        np.testing.assert_allclose((weights * found).sum(), (expected[there] * means).sum(), rtol=1e-5)
    assert q.dtype == torch.float64
    assert q[2] == 0
    assert q.sum().item() == pytest.approx(1)


def test_group_dro_over_cells_has_a_weight_for_each():
    known = Known(np.array([[50, 5], [0, 0], [0, 9]]), np.array([0.8, 0.2]))
    assert bound(GroupDro(over="group"), known).state.tolist() == [0.5, 0.0, 0.5]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.booleans())
def test_group_dro_has_the_same_bits_however_the_batch_is_dealt(seed, workers, mixed):
    random = np.random.default_rng(seed)
    losses = torch.from_numpy(np.ldexp(random.random(24), random.integers(-40, 9, 24)).astype(np.float32))
    labels, cells = (torch.from_numpy(np.sort(random.integers(0, m, 24))) for m in (3, 2))
    shares = torch.from_numpy(random.random(24).astype(np.float32))
    criterion = bound(GroupDro(eta=1.0), Known(np.ones((2, 3), np.int64), np.full(3, 1 / 3)))
    sums: list[Tensor] = []

    def adapted(part: slice, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        given = shares[part] if mixed else None
        return criterion.adapt(criterion.state, losses[part], labels[part], cells[part], total, given)

    def noted(tensor: Tensor) -> Tensor:
        sums.append(tensor)
        return tensor

    whole = adapted(slice(None), noted)
    cuts = np.sort(random.integers(0, 25, workers - 1)).tolist()
    parts = [slice(*part) for part in pairwise([0, *cuts, 24])]
    for part in parts:
        adapted(part, noted)
    added = torch.stack(sums[1:]).sum(0)
    assert torch.equal(added, sums[0])
    found = [adapted(part, lambda _: added) for part in parts]
    assert all(torch.equal(state, whole[0]) for state, _ in found)
    assert torch.equal(torch.cat([weights for _, weights in found]), whole[1])


def test_shares_of_group_dro_count_as_so_many_images():
    criterion = bound(GroupDro(), Known(np.ones((1, 2), np.int64), np.full(2, 0.5)))
    losses, labels, cells = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.int64)
    twice = torch.tensor([0, 0, 0, 1, 2])
    counted, w = criterion.adapt(criterion.state, losses, labels, cells, one_worker, torch.tensor([3.0, 1.0, 1.0]))
    spelt, v = criterion.adapt(criterion.state, losses[twice], labels[twice], cells[twice], one_worker)
    assert torch.equal(counted, spelt)
    assert torch.equal(w[twice], v)
    absent, _ = criterion.adapt(criterion.state, losses, labels, cells, one_worker, torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(absent, criterion.state)


def test_a_loss_that_is_no_number_leaves_the_groups_as_the_others_make_them():
    """A step with one is not taken; what the next one goes on with must be sound."""
    criterion = bound(GroupDro(), Known(np.ones((1, 2), np.int64), np.full(2, 0.5)))
    labels, cells = torch.tensor([0, 0, 0, 1]), torch.zeros(4, dtype=torch.int64)
    wrong = torch.tensor([1.0, torch.nan, torch.inf, 2.0])
    q, weights = criterion.adapt(criterion.state, wrong, labels, cells, one_worker)
    kept = torch.tensor([0, 3])
    assert torch.equal(q, criterion.adapt(criterion.state, wrong[kept], labels[kept], cells[kept], one_worker)[0])
    assert not (weights * wrong).sum().isfinite()


def test_a_group_that_was_easy_for_long_can_come_back():
    criterion = bound(GroupDro(eta=1.0), Known(np.ones((1, 2), np.int64), np.full(2, 0.5)))
    labels, cells, q = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64), criterion.state
    for _ in range(2000):
        q, _ = criterion.adapt(q, torch.tensor([0.0, 5.0]), labels, cells, one_worker)
    assert 0 < q[0] < 1e-9
    for _ in range(20):
        q, _ = criterion.adapt(q, torch.tensor([5.0, 0.0]), labels, cells, one_worker)
    assert q[0] > 0.99
    alone, _ = criterion.adapt(q, torch.tensor([5.0]), labels[:1], cells[:1], one_worker)
    assert torch.equal(alone, q)


# The same for any number of workers

BATCH, FEATURES, STEPS = 17, 6, 3
CUTS = {1: (0, 17), 2: (0, 3, 17), 3: (0, 9, 10, 17)}
CASES: dict[str, Loss] = {
    "weighted": CrossEntropy(weights=Power(), smoothing=0.1),
    "deferred": Ldam(weights=EffectiveNumber(beta=0.99), deferred=0.5),
    "focal": Focal(weights=EffectiveNumber(beta=0.99)),
    "balanced": BalancedSoftmax(weights=Power(gamma=0.5)),
    "vs": VectorScaling(weights=Power(), by_group=True),
    "balpoe": BalPoe(weights=Power()),
    "dro": GroupDro(eta=0.5, adjustment=1.0),
    "dro of cells": GroupDro(eta=0.5, over="group"),
}


def _batch(step: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Features, and twice the share, labels and cells of mixed images; in the order of labels and cells, so that a
    worker has few of them and weights of its own."""
    random = np.random.default_rng(step)
    x, share = random.normal(0, 1, (BATCH, FEATURES)), random.beta(0.4, 0.4, BATCH)
    order = np.sort(random.choice(6, BATCH, p=[0.5, 0.2, 0.1, 0.1, 0.1, 0.0]))
    other = random.permutation(order)
    terms = [(share, order // 2, order % 2), (1 - share, other // 2, other % 2)]
    return torch.from_numpy(x).float(), [
        (torch.from_numpy(s).float(), torch.from_numpy(y), torch.from_numpy(g)) for s, y, g in terms
    ]


def _trained(loss: Loss, part: slice, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the first step, and weights and state after all of them, of a linear model with this loss."""
    criterion, heads, seen = bound(loss), loss.heads or 1, []
    state, w = criterion.state, logits(FEATURES, heads * 3, seed=1).requires_grad_()
    for step in range(STEPS):
        x, terms = _batch(step)
        terms = [tuple(column[part] for column in term) for term in terms]
        z = (x[part] @ w).view(-1, heads, 3)
        share, labels, cells = (torch.cat(column) for column in zip(*terms, strict=True))
        losses = torch.cat([criterion.losses(z, y, g) for _, y, g in terms])
        if loss.adaptive:
            state, weights = criterion.adapt(state, losses.detach(), labels, cells, total, share)
            divisor = 1.0
        else:
            weights = criterion.weights(labels, cells, step / STEPS)
            divisor = total((share * weights).sum())
        ((share * weights * losses).sum() / divisor).backward()
        assert w.grad is not None
        seen.append(total(w.grad))
        with torch.no_grad():
            w -= 0.5 * seen[-1]
        w.grad = None
    return seen[0], w.detach(), state


def _work(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=3)
    for workers in (2, 3):
        group = distributed.new_group(list(range(workers)))
        if not isinstance(group, distributed.ProcessGroup):
            continue

        def total(tensor: Tensor, group: distributed.ProcessGroup = group) -> Tensor:
            added = tensor.clone()
            distributed.all_reduce(added, group=group)
            return added

        part = slice(CUTS[workers][rank], CUTS[workers][rank + 1])
        found = {name: _trained(loss, part, total) for name, loss in CASES.items()}
        torch.save(found, Path(out) / f"{workers}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory: pytest.TempPathFactory):
    """What each worker of 2 and of 3 found, by (workers, rank)."""
    out = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        multiprocessing.set_forkserver_preload([__name__])  # once, not in all three
        start_processes(_work, (str(out),), nprocs=3, start_method="forkserver")
    return {(n, rank): torch.load(out / f"{n}-{rank}.pt") for n in (2, 3) for rank in range(n)}


@pytest.mark.parametrize("name", CASES)
def test_two_and_three_gloo_workers_with_unequal_weights_have_the_gradient_of_one(by_workers, name):
    alone = _trained(CASES[name], slice(None), one_worker)
    for found in by_workers.values():
        for mine, expected in zip(found[name], alone, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("workers", [2, 3])
def test_dividing_by_the_weights_of_each_worker_would_be_another_gradient(workers):
    """What torch's weighted mean does under DDP; so the test above can fail."""
    cuts, loss = CUTS[workers], CrossEntropy(weights=Power())
    right = _trained(loss, slice(None), one_worker)[0]
    wrong = torch.stack([_trained(loss, slice(*part), one_worker)[0] for part in pairwise(cuts)]).mean(0)
    assert (wrong - right).norm() / right.norm() > 0.5


@pytest.mark.parametrize("kind", variants(AnyLoss))
def test_only_a_loss_that_is_adaptive_has_a_state(kind):
    assert (len(bound(kind()).state) > 0) == kind.adaptive
    assert issubclass(kind, Weighted) != kind.adaptive
