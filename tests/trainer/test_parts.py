"""Models, losses, penalties, optimisers: contracts over every member of their unions, and what each must be."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from data_loaders.settings import variants
from trainer.losses import AnyLoss, BalancedSoftmax, CrossEntropy
from trainer.model import AnyModel, EfficientNet, Initialisation, Model, ResNet, SmallCnn
from trainer.networks import IMAGENET_MEAN, IMAGENET_STD
from trainer.optimizer import AdamW, AnyOptimizer, Optimizing, Sgd
from trainer.penalties import Penalties

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), np.uint8))
LABELS = torch.tensor([0, 1, 2, 1])
LOG_PRIOR = torch.tensor([0.7, 0.2, 0.1]).log()


@pytest.mark.parametrize("kind", variants(AnyModel))
def test_every_model_goes_from_bytes_to_logits_and_learns(kind: type[Model]):
    model = kind(dropout=0.2).build(3, seed=0)
    logits = model(IMAGES)
    assert logits.shape == (4, 3)
    functional.cross_entropy(logits, LABELS).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [m.p for m in model.modules() if type(m) is nn.Dropout] == [0.2]


@pytest.mark.parametrize("kind", variants(AnyModel))
def test_dropout_zeroes_a_share_of_the_features_before_the_head_in_training_only(kind: type[Model]):
    model = kind(dropout=0.25).build(3, seed=0)
    (dropout,) = [m for m in model.modules() if type(m) is nn.Dropout]
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    seen: dict[nn.Module, torch.Tensor] = {}
    for module in (dropout, head):
        module.register_forward_pre_hook(lambda m, given: seen.update({m: given[0].detach().clone()}))
    model.train()(IMAGES)
    alive = seen[dropout] != 0
    kept = seen[head] != 0
    assert (alive & ~kept).sum() / alive.sum() == pytest.approx(0.25, abs=0.08)
    torch.testing.assert_close(seen[head][kept], seen[dropout][kept] / 0.75)
    model.eval()(IMAGES)
    assert torch.equal(seen[head], seen[dropout])


@pytest.mark.parametrize("kind", variants(AnyModel))
def test_every_model_is_drawn_from_its_seed(kind: type[Model]):
    a, b, c = (torch.cat([p.flatten() for p in kind().build(3, seed).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_torchvision_models_have_their_parameters():
    def parameters(model: Model) -> int:
        return sum(p.numel() for p in model.build(1000, 0).parameters())

    assert parameters(ResNet(depth=18)) == 11_689_512
    assert parameters(EfficientNet(size="b0")) == 5_288_548


@pytest.mark.parametrize("scheme", get_args(Initialisation))
def test_initialisation_has_the_spread_of_its_source(scheme):
    model = SmallCnn(widths=(64, 128), initialisation=scheme).build(10, 0)
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 64)
    fan_in, fan_out = 64 * 9, 128 * 9
    variance = 2 / (fan_in + fan_out) if scheme.startswith("xavier") else 2 / fan_in
    assert convolution.weight.var().item() == pytest.approx(variance, rel=0.03)
    bound = convolution.weight.abs().max().item()
    assert (bound <= (3 * variance) ** 0.5) == scheme.endswith("uniform")
    head = next(m for m in model.modules() if isinstance(m, nn.Linear))
    assert not head.bias.any()


def test_normalisation_travels_with_the_weights_and_is_that_of_imagenet():
    model = SmallCnn().build(3, 0)
    seen: list[torch.Tensor] = []
    model.network = nn.Module()
    model.network.forward = seen.append
    model(IMAGES)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(seen[0], (IMAGES / 255 - mean) / std)
    assert {"mean", "deviation"} <= set(model.state_dict())


@pytest.mark.parametrize("kind", variants(AnyLoss))
def test_every_loss_has_one_finite_value_a_sample_and_a_prior_that_sums_to_one(kind):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = kind()(logits, LABELS, LOG_PRIOR)
    assert loss.shape == (4,)
    loss.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(4), atol=1e-6, rtol=0)
    prior = kind().logit_prior(LOG_PRIOR.exp().numpy().astype(np.float64))
    assert prior.sum() == pytest.approx(1)


def test_balanced_softmax_is_cross_entropy_of_shifted_logits_and_none_at_tau_0():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    plain = CrossEntropy()(logits, LABELS, LOG_PRIOR)
    torch.testing.assert_close(BalancedSoftmax(tau=0)(logits, LABELS, LOG_PRIOR), plain)
    weights = LOG_PRIOR.exp() * logits.exp()  # Ren et al. 2020, equation 4: n_y e^z_y / sum_k n_k e^z_k
    expected = -(weights / weights.sum(1, keepdim=True)).gather(1, LABELS[:, None])[:, 0].log()
    torch.testing.assert_close(BalancedSoftmax()(logits, LABELS, LOG_PRIOR), expected)


def test_penalties_are_sums_over_weights_but_not_biases_or_norms():
    model = SmallCnn(widths=(4, 8)).build(3, 0)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    l1 = sum(w.abs().sum() for w in weights)
    l2 = sum(w.square().sum() for w in weights) / 2
    torch.testing.assert_close(Penalties(l1=0.1, l2=0.01)(model), 0.1 * l1 + 0.01 * l2)
    assert Penalties()(model) == 0.0
    penalty = Penalties(l1=0.1, l2=0.01)(model)
    assert isinstance(penalty, torch.Tensor)
    penalty.backward()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.grad is None
        if isinstance(module, nn.Conv2d):
            torch.testing.assert_close(module.weight.grad, 0.1 * module.weight.sign() + 0.01 * module.weight)


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
