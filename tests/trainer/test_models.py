"""Models: contracts over every member of their union, what each must be, and what they start from."""

import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
import torchvision
from captum.attr import LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from small_runs import CPU, config_for, train
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.convnext import CNBlockConfig

from data_loaders import durable
from data_loaders.faults import Refusal
from data_loaders.settings import variants
from trainer import checkpoint
from trainer.explain.heatmaps import grad_cam
from trainer.model import (
    AnyModel,
    CifarResNet,
    ConvNeXt,
    Cosine,
    EfficientNet,
    Initialisation,
    MobileNet,
    Model,
    RegNet,
    ResNet,
    ResNeXt,
    SmallCnn,
    Timm,
)
from trainer.networks import IMAGENET_MEAN, IMAGENET_STD, Classifier
from trainer.networks.parts import Cosine as CosineLayer
from trainer.networks.parts import Parts, initialise
from trainer.networks.small import Block

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), np.uint8))
LABELS = torch.tensor([0, 1, 2, 1])
PREFIXES = {ResNet: "resnet", ResNeXt: "resnext", EfficientNet: "efficientnet_", ConvNeXt: "convnext_"}
PREFIXES |= {RegNet: "regnet_", MobileNet: "mobilenet_"}
"""What torchvision calls the models of each family, before their size."""
SMALL = SmallCnn(widths=(4, 8))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=variants(AnyModel), ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[Model]:
    return request.param


@pytest.fixture(scope="module")
def plain(kind: type[Model]) -> Classifier:
    """A model that tests share, since to draw a large one takes long; none changes its weights."""
    return kind(dropout=0.25).build(3, seed=0)


def logits_of(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def test_every_model_goes_from_bytes_to_logits_and_learns(plain: Classifier):
    logits = plain.train()(IMAGES)
    assert logits.shape == (4, 3)
    functional.cross_entropy(logits, LABELS).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in plain.parameters())
    assert [m.p for m in plain.modules() if type(m) is nn.Dropout] == [0.25]
    plain.zero_grad()


def test_every_model_reads_its_least_size(kind: type[Model], plain: Classifier):
    size = kind().least_size
    assert logits_of(plain, IMAGES[:2, :, :size, :size]).isfinite().all()


def test_dropout_zeroes_a_share_of_the_features_before_the_head_in_training_only(plain: Classifier):
    (dropout,) = [m for m in plain.modules() if type(m) is nn.Dropout]
    head = [m for m in plain.modules() if isinstance(m, nn.Linear)][-1]
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, given: seen.update({m: given[0].detach().clone()}))
        for module in (dropout, head)
    ]
    torch.manual_seed(0)
    with torch.no_grad():
        plain.train()(IMAGES)
    alive = seen[dropout] != 0
    kept = seen[head] != 0
    assert (alive & ~kept).sum() / alive.sum() == pytest.approx(0.25, abs=0.08)
    torch.testing.assert_close(seen[head][kept], seen[dropout][kept] / 0.75)
    logits_of(plain)
    assert torch.equal(seen[head], seen[dropout])
    for hook in hooks:
        hook.remove()


def test_every_model_is_drawn_from_its_seed(kind: type[Model], plain: Classifier):
    again = kind().build(3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


def test_grad_cam_reads_every_kind_of_model(plain: Classifier):
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()  # what the other tests have shown to it decides where evidence is
    heat = torch.stack([grad_cam(plain, IMAGES, torch.full((4,), k)) for k in range(3)])
    assert heat.shape == (3, 4, 64, 64)
    assert heat.isfinite().all()
    assert heat.max() > 0


def test_grad_cam_of_experts_is_captums_of_all_that_they_pool():
    model = CifarResNet(depth=8, heads=3).build(3, seed=0).eval()
    pool = next(m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
    oracle = LayerGradCam(model, pool)
    found = oracle.attribute(IMAGES.float(), LABELS, attribute_to_layer_input=True, relu_attributions=True)
    assert isinstance(found, Tensor)
    expected = functional.interpolate(found.detach(), (64, 64), mode="bilinear")[:, 0]
    assert expected.max() > 0
    torch.testing.assert_close(grad_cam(model, IMAGES, LABELS), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_several_heads_give_logits_of_each_in_training_and_their_mean_in_use(kind: type[Model]):
    model = kind(heads=3, head=Cosine(scale=7)).build(3, seed=0)
    model.train()
    for module in model.network.modules():
        module.training = False  # all but the classifier itself, so that both passes are the same
    with torch.no_grad():
        logits = model(IMAGES)
    assert logits.shape == (4, 3, 3)
    assert not torch.equal(logits[:, 0], logits[:, 1])
    torch.testing.assert_close(logits_of(model), logits.mean(1))
    assert logits.abs().max() <= 7.001
    assert kind(head=Cosine(scale=7)).scale == 7
    assert kind().scale == 1


def test_of_a_frozen_model_only_the_head_learns_and_nothing_else_moves(kind: type[Model], tmp_path):
    model = kind(freeze="backbone", weights=tmp_path).build(3, seed=0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    functional.cross_entropy(model(IMAGES), LABELS).backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    assert learning == {f"{head}.weight", f"{head}.bias"}
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    moving = {module for module in model.network.modules() if module.training}
    assert moving == set(model.head.modules())
    assert not any(module.training for module in model.eval().modules())


STAGES = {SmallCnn: 4, CifarResNet: 3, ResNet: 4, ResNeXt: 4, EfficientNet: 7, ConvNeXt: 4, RegNet: 4, MobileNet: 5}


def between(kind: type[Model], what: str, p: float) -> Model:
    return kind.model_validate({"dropout": 0.25, "stage_dropout": p, "stage_dropout_kind": what})


@pytest.mark.parametrize("what", ["element", "channel"])
@pytest.mark.parametrize("kind", STAGES, indirect=True)
def test_dropout_between_stages_is_after_each_but_the_last_and_renames_no_weight(kind: type[Model], what: str):
    with torch.device("cpu" if kind is RegNet else "meta"):  # torchvision reckons RegNet's widths in tensors
        names = list(kind().network(Parts(3)).state_dict())
        network = between(kind, what, 0.1).build(3, seed=0).network
    assert list(network.state_dict()) == names
    *stages, last = [m for m in network.modules() if isinstance(m, nn.Dropout | nn.Dropout2d)]
    assert [(type(m), m.p) for m in stages] == [(nn.Dropout2d if what == "channel" else nn.Dropout, 0.1)] * (
        STAGES[kind] - 1
    )
    assert (type(last), last.p) == (nn.Dropout, 0.25)


@pytest.mark.parametrize("kind", [SmallCnn, CifarResNet, MobileNet], indirect=True)
def test_dropout_between_stages_zeroes_numbers_or_whole_channels_in_training_only(kind: type[Model], plain: Classifier):
    for what in ("element", "channel"):
        model = between(kind, what, 0.5).build(3, seed=0)
        first = next(m for m in model.modules() if isinstance(m, nn.Dropout | nn.Dropout2d))
        passed: list[tuple[Tensor, Tensor]] = []
        hook = first.register_forward_hook(lambda _, given, out, passed=passed: passed.append((given[0], out)))
        model.train()(IMAGES)
        hook.remove()
        ((given, out),) = passed
        alive = given != 0
        zeroed = (alive & (out == 0)).sum((2, 3)) / alive.sum((2, 3)).clamp(min=1)
        whole = ((zeroed == 0) | (zeroed == 1))[alive.any((2, 3))]
        assert whole.all() if what == "channel" else not whole.all()
        assert zeroed[alive.any((2, 3))].mean() == pytest.approx(0.5, abs=0.1)
        fresh = between(kind, what, 0.5).build(3, seed=0)
        fresh.load_state_dict(plain.state_dict())
        assert torch.equal(logits_of(fresh), logits_of(plain))


def test_timm_knows_no_stages():
    with pytest.raises(ValidationError, match="stages are not known"):
        Timm(stage_dropout=0.1)


def test_known_networks_have_their_weights():
    def parameters(model: Model, classes: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in model.network(Parts(classes, model.heads)).parameters())

    assert parameters(CifarResNet(), 10) == 464_154  # Cao et al. 2019
    assert parameters(CifarResNet(), 100) == 470_004
    assert parameters(CifarResNet(heads=3), 100) == 1_362_364  # 1.36 M: BalPoE, Aimar et al. 2023
    assert parameters(CifarResNet(depth=20), 10) == 269_722  # 0.27 M, and 0.85 M: He et al. 2016, table 6
    assert parameters(CifarResNet(depth=56), 10) == 853_018
    assert parameters(ResNet(depth=18), 1000) == 11_689_512
    assert parameters(ResNeXt(), 1000) == 25_028_904
    assert parameters(EfficientNet(size="b0"), 1000) == 5_288_548
    assert parameters(ConvNeXt(), 1000) == 28_589_128
    assert parameters(MobileNet(), 1000) == 5_483_032


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_family_has_the_sizes_that_torchvision_has(kind: type[Model]):
    field = kind.model_fields["depth" if kind is ResNet else "size"]
    names = [f"{PREFIXES[kind]}{size}" for size in get_args(field.annotation)]
    assert sorted(names) == [
        name for name in torchvision.models.list_models(torchvision.models) if name.startswith(PREFIXES[kind])
    ]


@settings(deadline=None)
@given(before=st.integers(1, 5), more=st.integers(0, 5), stride=st.sampled_from([1, 2]), size=st.integers(1, 9))
def test_a_shortcut_of_option_a_takes_every_other_place_and_fills_up_with_zeros(before, more, stride, size):
    x = torch.randn(2, before, size, size)
    block = Block(before, before + more, stride)
    short = block.shortcut(x)
    assert short.shape == block(x).shape
    ahead = more // 2
    assert torch.equal(short[:, ahead : ahead + before], functional.avg_pool2d(x, 1, stride))
    assert not short[:, :ahead].any()
    assert not short[:, ahead + before :].any()


@pytest.mark.parametrize("wrong", [{"depth": 18}, {"depth": 2}, {"widths": (16, 8, 64)}])
def test_a_residual_network_that_cannot_be_built_is_refused(wrong):
    with pytest.raises(ValidationError):
        CifarResNet(**wrong)


@settings(deadline=None)
@given(scales=st.lists(st.floats(0.01, 100), min_size=5, max_size=5), seed=st.integers(0, 99))
def test_a_cosine_head_tells_angles_and_not_lengths(scales, seed):
    torch.manual_seed(seed)
    layer, features = CosineLayer(6, 5, 30.0), torch.randn(5, 6)
    expected = 30 * functional.cosine_similarity(features[:, None], layer.weight[None], dim=2)
    torch.testing.assert_close(layer(features), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.weight *= torch.tensor(scales)[:, None]
    torch.testing.assert_close(layer(features * torch.tensor(scales)[:, None]), expected, rtol=1e-4, atol=1e-4)


def test_a_cosine_head_of_features_that_are_zero_says_zero_and_learns_no_nonsense():
    layer, features = CosineLayer(6, 5, 30.0), torch.zeros(2, 6, requires_grad=True)
    logits = layer(features)
    assert not logits.any()
    functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert features.grad is not None
    assert layer.weight.grad is not None
    assert features.grad.abs().max() < 100
    assert not layer.weight.grad.any()


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


def test_initialisation_leaves_norms_and_scales_of_layers_to_their_network():
    stages = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    network = torchvision.models.ConvNeXt(stages, layer_scale=0.25)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    initialise(network, "he_normal")
    drawn = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert drawn == {name for name, tensor in before.items() if tensor.ndim in {2, 4}}
    assert sum(name.endswith("layer_scale") for name in before) == 2


def test_normalisation_travels_with_the_weights_and_is_that_of_imagenet():
    model = SmallCnn().build(3, 0)
    model.network = nn.Identity()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(model(IMAGES), (IMAGES / 255 - mean) / std)
    assert {"mean", "deviation"} <= set(model.state_dict())


def stock_of(asked: Model) -> nn.Module:
    """The model of torchvision or timm, with its own weights."""
    if isinstance(asked, Timm):
        return timm.create_model(asked.name, pretrained=False, num_classes=3)
    size = asked.depth if isinstance(asked, ResNet) else getattr(asked, "size")  # noqa: B009
    return torchvision.models.get_model(f"{PREFIXES[type(asked)]}{size}", num_classes=3)


STOCKED = [ResNet(), EfficientNet(), ConvNeXt(), RegNet(), Timm()]
STOCKED += [MobileNet(size=size) for size in get_args(MobileNet.model_fields["size"].annotation)]


@pytest.mark.parametrize("asked", STOCKED, ids=lambda m: f"{m.kind}-{getattr(m, 'size', '')}")
def test_a_model_with_torchvisions_or_timms_weights_says_what_theirs_says(asked: Model, tmp_path):
    torch.manual_seed(1)
    stock = stock_of(asked).eval()
    torch.save(stock.state_dict(), tmp_path / "stock.pth")
    model = asked.build(3, seed=0)
    asked = asked.model_copy(update={"weights": tmp_path / "stock.pth"})
    assert asked.start(model) == []
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = logits_of(stock, (IMAGES / 255 - mean) / std)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_model_starts_from_the_weights_of_another_and_takes_its_head_unless_asked_not_to(
    kind: type[Model], plain: Classifier, tmp_path
):
    save_file({name: t.contiguous() for name, t in plain.state_dict().items()}, tmp_path / "old.safetensors")
    asked = kind(weights=tmp_path / "old.safetensors")
    model = asked.build(3, seed=1)
    drawn = [layer.clone() for layer in model.head.parameters()]
    assert not torch.equal(drawn[0], next(plain.head.parameters()))
    (said,) = asked.model_copy(update={"new_head": True}).start(model)
    assert "new_head" in said
    assert all(torch.equal(a, b) for a, b in zip(drawn, model.head.parameters(), strict=True))
    assert asked.start(model) == []
    assert torch.equal(logits_of(model), logits_of(plain))


def test_a_head_for_other_classes_or_of_another_kind_stays_as_it_was_drawn_and_that_is_said(tmp_path):
    torch.save(SMALL.build(5, 0).state_dict(), tmp_path / "five.pt")
    for changes, classes in (({}, 3), ({"head": Cosine()}, 5)):
        asked = SMALL.model_copy(update={"weights": tmp_path / "five.pt", **changes})
        model = asked.build(classes, seed=1)
        drawn = next(model.head.parameters()).clone()
        (said,) = asked.start(model)
        assert said.startswith("the head is drawn anew")
        assert torch.equal(next(model.head.parameters()), drawn)
        assert torch.equal(next(model.parameters()), next(SMALL.build(5, 0).parameters()))


def test_a_model_starts_from_the_folder_of_a_run_which_is_verified(dataset, tmp_path):
    config = config_for(dataset, tmp_path, **{"train.steps": 4})
    train(config)
    folder = config.run_folder / "model"
    asked = config.model.model_copy(update={"weights": folder})
    model = asked.build(3, seed=5)
    assert asked.start(model) == []
    trained = checkpoint.load_model(folder, CPU).model
    images = IMAGES[:, :, :12, :12]
    assert torch.equal(logits_of(model, images), logits_of(trained, images))
    assert asked.start_hash() == durable.sha256(folder / "model.safetensors")
    assert config.model.start_hash() == ""
    (folder / "model.safetensors").write_bytes(b"damaged")
    for call in (lambda: asked.start(model), asked.start_hash):
        with pytest.raises(Refusal, match="is not as it was written") as refusal:
            call()
        assert refusal.value.exit_code == 65


def refused(path: Path, asked: Model = SMALL) -> str:
    model = asked.build(3, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Refusal) as refusal:
        asked.model_copy(update={"weights": path}).start(model)
    assert refusal.value.exit_code == 65
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(refusal.value)


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    tensors = SMALL.build(3, 0).state_dict()
    for n in range(5):
        tensors[f"network.more.{n}"] = torch.zeros(1)
    del tensors["network.0.0.weight"]
    tensors["network.0.1.bias"] = torch.zeros(9)
    tensors["network.0.1.weight"] = torch.full((4,), torch.nan)
    torch.save(tensors, tmp_path / "w.pt")
    said = refused(tmp_path / "w.pt")
    assert "lacks 1 of the 14 tensors of the model: network.0.0.weight" in said
    assert "has 5 tensors that the model does not have: network.more.0, network.more.1, network.more.2, …" in said
    assert "1 tensors of another shape: network.0.1.bias [9] instead of [4]" in said
    assert "not finite in 1 tensors: network.0.1.weight" in said
    assert said.count(str(tmp_path / "w.pt")) == 4


def test_a_file_may_lack_the_counts_of_batches_as_those_of_before_2018_do(tmp_path):
    stock = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save({k: v for k, v in stock.items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.pth")
    assert ResNet(weights=tmp_path / "w.pth").start(ResNet().build(3, 0)) == []


class Runs:
    """What pickle would run when it reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_holds_more_than_tensors_is_refused_and_runs_nothing(tmp_path):
    torch.save({"weight": Runs(tmp_path / "ran")}, tmp_path / "evil.pt")
    assert "cannot be read as plain tensors" in refused(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.save({"epoch": 3, "state_dict": SMALL.build(3, 0).state_dict()}, tmp_path / "more.pt")
    assert "does not hold tensors by name" in refused(tmp_path / "more.pt")
    assert "does not exist" in refused(tmp_path / "none.pt")
    assert "has no MANIFEST.json" in refused(tmp_path)


@settings(max_examples=25, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True), suffix=st.sampled_from([".pt", ".safetensors"]))
def test_a_file_that_was_cut_short_is_refused(cut, suffix, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / f"w{suffix}"
    tensors = {name: t.contiguous() for name, t in SMALL.build(3, 0).state_dict().items()}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    assert "cannot be read as plain tensors" in refused(path)


@pytest.mark.parametrize("wrong", [{"new_head": True}, {"freeze": "backbone"}])
def test_nothing_is_frozen_or_drawn_anew_without_weights_to_start_from(wrong):
    with pytest.raises(ValidationError, match="weights, which are not given"):
        SmallCnn(**wrong)


@pytest.mark.parametrize(
    ("name", "what"),
    [("resnet10x", "has no model"), ("hf-hub:a/b", "has no model"), ("vit_tiny_patch16_224", "does not end")],
)
def test_what_timm_has_not_or_what_is_no_convolutional_network_is_refused(name, what):
    with pytest.raises(Refusal, match=what):
        Timm(name=name).build(3, 0)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(Refusal, match=r"pip install 'evenkeel\[timm\]'"):
        Timm().build(3, 0)
