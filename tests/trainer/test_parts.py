"""Penalties, optimisers: contracts over every member of their unions, and what each must be."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from data_loaders.settings import variants
from trainer.model import SmallCnn
from trainer.optimizer import AdamW, AnyOptimizer, Constant, Optimizing, Sgd, Steps
from trainer.penalties import Penalties

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), np.uint8))
LABELS = torch.tensor([0, 1, 2, 1])


def test_penalties_add_the_gradient_of_sums_over_weights_but_not_biases_or_norms():
    model = SmallCnn(widths=(4, 8)).build(3, 0)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    (sum(0.1 * w.abs().sum() + 0.01 * w.square().sum() / 2 for w in weights) + 0 * model(IMAGES).sum()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Penalties(l1=0.1, l2=0.01).add_gradient(model)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected[name] if p.ndim > 1 else torch.zeros_like(p))
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    Penalties().add_gradient(model)
    assert all(
        torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True) if p.grad is not None
    )


def test_penalties_leave_alone_what_does_not_learn():
    model = SmallCnn(widths=(4, 8)).build(3, 0)
    Penalties(l1=0.1).add_gradient(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", variants(AnyOptimizer))
def test_every_optimiser_lowers_a_loss_and_spares_biases_and_norms_from_decay(kind: type[Optimizing]):
    model = SmallCnn(widths=(8,)).build(3, 0)
    optimizer = kind(lr=0.01, weight_decay=0.1).build(model)
    losses = []
    for _ in range(15):
        loss = functional.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in model.parameters() if p.ndim > 1} == {0.1}
    assert {decay[id(p)] for p in model.parameters() if p.ndim == 1} == {0.0}
    assert len(decay) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.4, warmup=0.1), AdamW(lr=0.4, warmup=0.1)])
def test_the_learning_rate_rises_to_its_peak_and_falls_as_a_cosine(optimizer):
    rates = [optimizer.rate(step, 100) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.linspace(0.04, 0.4, 10))
    np.testing.assert_allclose(rates[10:], [0.2 * (1 + np.cos(np.pi * i / 90)) for i in range(90)])
    assert min(rates) > 0
    assert Sgd(warmup=0).rate(0, 1) == Sgd().lr


def test_the_learning_rate_falls_in_steps_as_in_the_recipe_of_cao_et_al():
    optimizer = Sgd(lr=0.1, warmup=5 / 200, schedule=Steps(at=(0.8, 0.9), factor=0.01))
    rates = [optimizer.rate(epoch, 200) for epoch in range(200)]
    np.testing.assert_allclose(rates[:5], [0.02, 0.04, 0.06, 0.08, 0.1])
    np.testing.assert_allclose(rates[5:], [0.1] * 155 + [0.001] * 20 + [0.00001] * 20)


def test_a_constant_learning_rate_stays():
    assert {Sgd(warmup=0, schedule=Constant()).rate(step, 9) for step in range(9)} == {0.1}


def test_fused_optimisers_take_weights_laid_out_with_the_channels_last():
    for optimizer in (Sgd(lr=0.1, warmup=0), AdamW(lr=0.1, warmup=0)):
        moved = []
        for form in (torch.contiguous_format, torch.channels_last):
            model = nn.Conv2d(3, 4, 3)
            with torch.no_grad():
                model.weight.copy_(torch.linspace(-1, 1, 108).view(4, 3, 3, 3))
            model.to(memory_format=form)  # pyright: ignore[reportCallIssue]
            built = optimizer.build(model)
            for _ in range(3):
                built.zero_grad()
                (model.weight * torch.arange(108).view(4, 3, 3, 3)).sum().backward()
                built.step()
            moved.append(model.weight.detach().clone())
        torch.testing.assert_close(*moved)
