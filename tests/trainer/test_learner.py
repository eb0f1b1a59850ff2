"""One step: whatever a batch is cut into it is the same step, and one that goes wrong changes no weight."""

import json
from collections import deque
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from small_runs import CPU, config_for, train
from torch import nn

from data_loaders.faults import Refusal
from data_loaders.index import open_index
from trainer import checkpoint, loop, run
from trainer.config import Config
from trainer.context import Local
from trainer.learner import Learner
from trainer.losses import Criterion

DESCENT = {
    "optimizer": {"kind": "sgd", "lr": 1.0, "momentum": 0, "warmup": 0},
    "train.steps": 1,
    "calibration": {"kind": "temperature"},
}
"""One step of plain descent with a learning rate of 1, so that the change of the weights is the gradient."""


def final(config: Config) -> dict[str, torch.Tensor]:
    train(config)
    return checkpoint.load_model(config.run_folder / "model", CPU).model.state_dict()


def without_norms() -> Any:
    def scale_and_shift(self: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]

    return mock.patch.object(nn.BatchNorm2d, "forward", scale_and_shift)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": {"kind": "focal", "weights": {"kind": "power"}, "gamma": 2}},
        {"mixing": {"kind": "mixup"}, "loss": {"kind": "balanced_softmax", "weights": {"kind": "effective_number"}}},
        {"mixing": {"kind": "cmo", "probability": 1}, "penalties": {"l1": 1e-3, "l2": 1e-2}},
        {"loss": {"kind": "balpoe"}, "model": {"kind": "small_cnn", "widths": [8, 8], "heads": 3, "dropout": 0}},
    ],
)
@pytest.mark.parametrize("cut", [{"train.accumulate": 2}, {"train.accumulate": 3}, {"train.reproducible": 4}])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(dataset, tmp_path, changes, cut):
    # Batch norm sees each part alone, and dropout draws for each: both are left out of this comparison.
    same = DESCENT | {"model.dropout": 0} | changes
    with without_norms():
        one, many = (final(config_for(dataset, tmp_path / name, **same | how)) for name, how in (("1", {}), ("n", cut)))
    for name, value in one.items():
        if name.endswith(("weight", "bias")):
            torch.testing.assert_close(many[name], value, atol=1e-6, rtol=1e-5)


def test_worst_groups_have_the_gradient_of_the_whole_in_parts(dataset, tmp_path):
    same = DESCENT | {"model.dropout": 0, "loss": {"kind": "group_dro", "eta": 1.0}}
    with without_norms():
        one = final(config_for(dataset, tmp_path / "1", **same))
        many = final(config_for(dataset, tmp_path / "n", **same, **{"train.reproducible": 4}))
    for name, value in one.items():
        if name.endswith(("weight", "bias")):
            torch.testing.assert_close(many[name], value, atol=1e-6, rtol=1e-5)


def test_a_loss_that_looks_at_the_whole_batch_is_not_accumulated(dataset, tmp_path):
    with pytest.raises(Refusal, match=r"group_dro looks at a whole batch at once: train\.accumulate is 1"):
        config_for(dataset, tmp_path, **{"loss.kind": "group_dro", "train.accumulate": 2})


def test_heads_that_do_not_fit_the_loss_are_refused(dataset, tmp_path):
    with pytest.raises(Refusal, match=r"balpoe needs model\.heads=3"):
        config_for(dataset, tmp_path, **{"loss.kind": "balpoe"})


def spoiled(at: int, how: str) -> Any:
    """Puts a number that is none into step `at`: into the loss of images 3 and 5, a gradient, or a weight."""
    update, losses, seen = Learner._update, Criterion.losses, {"steps": 0}

    def in_loss(self: Criterion, *given: Any) -> torch.Tensor:
        found = losses(self, *given)
        factor = torch.ones_like(found)
        factor[[3, 5]] = torch.nan if seen["steps"] == at else 1.0
        seen["steps"] += 1
        return found * factor

    def before_update(self: Learner, what: Any) -> None:
        weight = next(self.model.parameters())
        if what.step == at and how == "gradient":
            assert weight.grad is not None
            weight.grad[0, 0, 0, 0] = torch.inf
        update(self, what)
        if what.step + 1 == at and how == "weight":
            with torch.no_grad():
                weight[0, 0, 0, 0] = torch.nan

    return (
        mock.patch.object(Criterion, "losses", in_loss)
        if how == "loss"
        else mock.patch.object(Learner, "_update", before_update)
    )


@pytest.mark.parametrize("at", [1, 3, 4, 7])
@pytest.mark.parametrize("how", ["loss", "gradient", "weight"])
def test_a_number_that_is_none_stops_the_run_in_the_same_step_and_its_images_are_named(dataset, tmp_path, at, how):
    config = config_for(dataset, tmp_path, **{"train.report_every": 2, "model.dropout": 0})
    index = open_index(dataset)
    stream = config.data.sampler.over(index, index.rows_of("train"), config.seed)
    batch = stream.rows(np.arange(16) + 16 * at)
    with pytest.raises(Refusal) as refusal, spoiled(at, how):
        train(config)
    assert refusal.value.exit_code == 65
    said = str(refusal.value)
    is_saved_next = how == "weight" and at % 2 == 0
    assert ("the weights are not finite" if is_saved_next else f"in step {at + 1},") in said
    if how == "loss":
        assert f"the loss of these images is not a finite number: rows {batch[3]} (" in said
        assert f", {batch[5]} (" in said
        assert said.count(".png") == 2
    assert ("each loss is finite" in said) == (how == "gradient")
    folder, _ = checkpoint.newest(config.run_folder)
    assert (0 if folder is None else checkpoint.state_of(folder).step) == at // 2 * 2 - 2 * is_saved_next
    if folder is not None:
        assert all(t.isfinite().all() for t in checkpoint.load(folder)[1].tensors["model"].values())


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_are(dataset, tmp_path):
    config = config_for(dataset, tmp_path)
    config.run_folder.mkdir()
    learners: list[Learner] = []
    keep = Learner.__init__

    def kept(self: Learner, *given: Any) -> None:
        keep(self, *given)
        learners.append(self)

    with mock.patch.object(Learner, "__init__", kept), spoiled(1, "gradient"), pytest.raises(Refusal):
        loop.fit(config, Local(config.run_folder, CPU))
    (learner,) = learners
    assert all(p.isfinite().all() for p in learner.model.parameters())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_about_the_same_and_goes_on_from_a_checkpoint(dataset, tmp_path, precision):
    changes = {"train.steps": 8, "calibration": {"kind": "temperature"}}
    exact = final(config_for(dataset, tmp_path / "exact", **changes))
    half = config_for(dataset, tmp_path / "half", **changes, **{"train.precision": precision})
    found = final(half)
    for name, value in exact.items():
        if name.endswith("weight"):
            assert (found[name] - value).norm() < 0.05 * value.norm()
    parted = config_for(dataset, tmp_path / "parted", **changes, **{"train.precision": precision})
    train(parted, stop_after=4)
    again = final(parted)
    assert all(torch.equal(again[name], value) for name, value in found.items())


def test_small_gradients_survive_in_float16_because_the_loss_is_scaled(dataset, tmp_path):
    changes = {"train.precision": "float16", "optimizer": {"kind": "adamw", "lr": 1e-3, "warmup": 0}}
    config = config_for(dataset, tmp_path, **{"train.steps": 2, "calibration": {"kind": "temperature"}}, **changes)
    train(config)
    folder, _ = checkpoint.newest(config.run_folder)
    assert folder
    assert checkpoint.load(folder)[1].plain["scaler"]["scale"] >= 2**10


def test_clipping_shortens_a_gradient_to_the_norm_that_is_asked_for(dataset, tmp_path):
    changes = DESCENT | {"model.dropout": 0, "penalties": {"l1": 0, "l2": 0}}
    before = config_for(dataset, tmp_path).model.build(3, 0).state_dict()
    moved = {}
    for name, clip in (("free", None), ("clipped", 0.01)):
        config = config_for(dataset, tmp_path / name, **changes, **{"optimizer.clip": clip})
        after = final(config)
        moved[name] = torch.cat([(after[k] - v).flatten() for k, v in before.items() if k.endswith(("weight", "bias"))])
    assert moved["free"].norm() > 0.02
    assert moved["clipped"].norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(moved["clipped"] / 0.01, moved["free"] / moved["free"].norm(), atol=1e-4, rtol=1e-3)


def test_the_mean_of_the_weights_is_what_is_validated_and_kept(dataset, tmp_path):
    config = config_for(dataset, tmp_path, **{"train.average": 0.5, "calibration": {"kind": "temperature"}})
    seen: list[dict[str, torch.Tensor]] = []
    update = Learner._update

    def after(self: Learner, what: Any) -> None:
        update(self, what)
        seen.append({name: value.clone() for name, value in self.model.state_dict().items()})

    with mock.patch.object(Learner, "_update", after):
        kept = final(config)
    expected = config.model.build(3, config.seed).state_dict()
    for step, state in enumerate(seen):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in state.items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value)


def test_training_stops_early_on_a_proper_score_and_keeps_the_best_weights_through_a_resume(dataset, tmp_path):
    changes = {"train.steps": 60, "train.report_every": 3, "train.patience": 2, "train.keep": 1}
    changes |= {"optimizer": {"kind": "sgd", "lr": 0.5, "warmup": 0}, "calibration": {"kind": "temperature"}}
    config = config_for(dataset, tmp_path / "whole", **changes)
    rows = list(train(config).rows.values())
    scores = [row["calibrated_nll"] for row in rows]
    best = int(np.argmin(scores))
    assert len(rows) == best + 3 < 20
    facts = json.loads((config.run_folder / "model" / "facts.json").read_bytes())
    assert facts["stopped_early"]
    assert (facts["step"], facts["kept_step"]) == (rows[-1]["step"], rows[best]["step"])
    folder = config.run_folder / "checkpoints" / checkpoint.key_of(facts["kept_step"])
    weights = checkpoint.load(folder)[1].tensors["model"]
    kept = checkpoint.load_model(config.run_folder / "model", CPU).model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in weights.items())

    parted = config_for(dataset, tmp_path / "parted", **changes)
    train(parted, stop_after=rows[best]["step"] + 3)
    again = train(parted)
    assert max(row["step"] for row in again.rows.values()) == facts["step"]
    assert list(train(parted).rows) == [checkpoint.key_of(facts["step"])]  # which is over already
    a, b = (c.run_folder / "model" / "model.safetensors" for c in (config, parted))
    assert a.read_bytes() == b.read_bytes()


LATE = {"kind": "deferred", "after": 0.8}


@pytest.mark.parametrize(
    "late", [{"data.sampler": LATE}, {"loss": {"kind": "cross_entropy", "weights": {"kind": "power"}, "deferred": 0.8}}]
)
def test_a_run_that_ends_before_a_remedy_comes_into_force_knows_what_its_logits_are_conditioned_on(
    dataset, tmp_path, late
):
    natural = {"data.sampler": {"kind": "stratified", "temper": 1}}
    config = config_for(dataset, tmp_path, **natural | {"train.steps": 84, "train.report_every": 21} | late)
    config.run_folder.mkdir()
    (config.run_folder / "stop").touch()  # after the first report
    train(config)
    early = checkpoint.load_model(config.run_folder / "model", CPU).ledger
    np.testing.assert_allclose(early.logit_prior, np.array([60, 18, 6]) / 84, atol=0.02)
    (config.run_folder / "stop").unlink()
    train(config)
    late_ledger = checkpoint.load_model(config.run_folder / "model", CPU).ledger
    np.testing.assert_allclose(late_ledger.logit_prior, np.full(3, 1 / 3), atol=0.02)


def test_the_ledger_counts_the_labels_of_pasted_foregrounds(dataset, tmp_path):
    changes = {"data.sampler": {"kind": "stratified", "temper": 1}, "mixing": {"kind": "cmo"}, "train.steps": 84}
    config = config_for(dataset, tmp_path, **changes, **{"data.size": 32, "train.report_every": 84})
    mass = np.zeros(3)
    losses = Criterion.losses

    def counted(self: Criterion, logits: Any, labels: torch.Tensor, cells: Any) -> torch.Tensor:
        nonlocal mass
        mass = mass + weights.popleft() @ np.eye(3)[labels.numpy()]
        return losses(self, logits, labels, cells)

    forward, weights = Learner._forward, deque[Any]()

    def noted(self: Learner, part: Any, *rest: Any) -> Any:
        weights.append(part.shares.numpy())
        return forward(self, part, *rest)

    with mock.patch.object(Criterion, "losses", counted), mock.patch.object(Learner, "_forward", noted):
        train(config)
    ledger = checkpoint.load_model(config.run_folder / "model", CPU).ledger
    np.testing.assert_allclose(ledger.logit_prior, mass / mass.sum(), atol=0.012)


def test_settings_that_do_not_fit_the_workers_leave_nothing_behind(dataset, tmp_path):
    bad = {"train.reproducible": 2, "cluster.workers": 4}
    with pytest.raises(Refusal, match="4 workers share 2 micro-batches"):
        run.train(config_for(dataset, tmp_path, **bad))
    with pytest.raises(Refusal, match="typo"):
        run.train(config_for(dataset, tmp_path, **{"model.weights": "/nowhere/typo.safetensors"}))
    assert not (tmp_path / "r").exists()


def test_logits_that_are_no_numbers_are_a_divergence(dataset, tmp_path):
    config = config_for(dataset, tmp_path)
    evaluated = loop.logits_of

    def broken(*given: Any) -> Any:
        return evaluated(*given) * np.nan

    said = "33 validation images have logits"
    with mock.patch.object(loop, "logits_of", broken), pytest.raises(Refusal, match=said) as refusal:
        train(config)
    assert refusal.value.exit_code == 65
    assert not (config.run_folder / "checkpoints").exists()


@pytest.mark.filterwarnings("ignore")  # of torch's compilers
def test_a_network_that_cannot_be_compiled_runs_as_it_is_and_says_so(dataset, tmp_path, capsys):
    plain = final(config_for(dataset, tmp_path / "plain", **{"train.steps": 4, "calibration": {"kind": "temperature"}}))

    def fails(*given: Any, **named: Any) -> Any:
        raise RuntimeError("no compiler here")

    with mock.patch.object(torch, "compile", return_value=fails):
        changes = {"train.compile": True, "train.steps": 4, "calibration": {"kind": "temperature"}}
        found = final(config_for(dataset, tmp_path / "compiled", **changes))
    assert "torch cannot compile this model here, so it runs as it is: no compiler here" in capsys.readouterr().err
    assert all(torch.equal(found[name], value) for name, value in plain.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compilers
def test_a_compiled_network_learns_the_same(dataset, tmp_path, capsys):
    changes = {"train.steps": 4, "calibration": {"kind": "temperature"}, "model.dropout": 0}
    plain = final(config_for(dataset, tmp_path / "plain", **changes))
    found = final(config_for(dataset, tmp_path / "compiled", **changes, **{"train.compile": True}))
    assert "cannot compile" not in capsys.readouterr().err
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3)
