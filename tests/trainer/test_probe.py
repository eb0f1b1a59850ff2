"""What the probes say of models whose bias is known, and what they do to an image."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_probes import CLASSES, ledger, no_swaps, shown, told_by
from small_runs import CPU, config_for, train
from torch import Tensor, nn

from data_loaders.faults import Refusal
from data_loaders.index import open_index
from data_loaders.loader import Data
from data_loaders.settings import override
from trainer.checkpoint import Trained, load_model
from trainer.probe import features, spatial
from trainer.probe.cells import groupings
from trainer.probe.features import LIGHTS, NAMES, PERTURBATIONS, grey, grey_world, hue, light, perturbed, shuffled
from trainer.probe.paired import Number, change, rate, resampled
from trainer.probe.passes import decided, run
from trainer.probe.probe import chosen, learnt, probe
from trainer.probe.spatial import CENTRE, PLACES, RIM, placed

Images = arrays(np.uint8, st.tuples(st.just(2), st.just(3), st.just(12), st.just(12)))
ROWS = np.array([7, 8])


@given(Images, st.sampled_from([2, 4, 5, 20]))
def test_shuffled_patches_are_a_permutation_of_the_pixels_and_the_rows_own(pixels, parts):
    images = torch.from_numpy(pixels)
    once, again = (shuffled(parts)(images, ROWS) for _ in range(2))
    assert torch.equal(once, again)
    for before, after in zip(images.flatten(2), once.flatten(2), strict=True):
        assert sorted(map(tuple, before.T.tolist())) == sorted(map(tuple, after.T.tolist()))
    assert torch.equal(shuffled(parts)(images[1:], ROWS[1:]), once[1:])


@given(Images)
def test_one_patch_no_turn_and_no_light_leave_the_images(pixels):
    images = torch.from_numpy(pixels)
    for perturbation in (shuffled(1), hue(0), hue(3), light((1.0, 1.0, 1.0))):
        assert torch.equal(perturbation(images, ROWS), images)


@given(Images)
def test_grey_leaves_the_luma_and_takes_the_colour(pixels):
    found = grey(torch.from_numpy(pixels), ROWS).numpy()
    luma = np.einsum("c,bchw->bhw", features.LUMA, pixels.astype(np.float64))
    assert np.abs(found - luma[:, None]).max() <= 0.51
    assert (np.ptp(found, axis=1) == 0).all()


@given(Images)
def test_a_turned_wheel_keeps_brightness_of_mean_and_turns_back(pixels):
    images = torch.from_numpy(pixels)
    once = hue(1)(images, ROWS)
    assert torch.equal(once.int().sum(1), images.int().sum(1))
    assert torch.equal(hue(2)(once, ROWS), images)


def test_a_grey_world_knows_no_light():
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(40, 160, (2, 3, 16, 16)).astype(np.uint8))
    plain, in_light = (grey_world(x, ROWS).float() for x in (images, light((1.2, 1.0, 0.8))(images, ROWS)))
    means = plain.mean((2, 3))
    assert (means - means.mean(1, keepdim=True)).abs().max() < 0.5
    gains = in_light.mean((1, 2, 3)) / plain.mean((1, 2, 3))
    assert (in_light - gains[:, None, None, None] * plain).abs().mean() < 1


@given(Images)
@settings(deadline=None)  # the first resizing of a process is slow
def test_a_placed_picture_is_whole_at_every_place_on_its_border_s_colour(pixels):
    images = torch.from_numpy(pixels)
    frames = list(placed(shown(images)))
    assert len(frames) == len(PLACES)
    for (x, y), frame in zip(PLACES, frames, strict=True):
        centre = frames[CENTRE][:, :, 2:11, 2:11]
        left, top = (round(3 * (step + 1) / 2) for step in (x, y))
        assert torch.equal(frame[:, :, top : top + 9, left : left + 9], centre)
        outside = torch.ones(12, 12, dtype=torch.bool)
        outside[top : top + 9, left : left + 9] = False
        assert (frame[:, :, outside] == frame[:, :, outside][:, :, :1]).all()
    border = np.concatenate([pixels[:, :, :2].reshape(2, 3, -1), pixels[:, :, -2:].reshape(2, 3, -1)], 2)
    sides = np.concatenate([pixels[:, :, 2:-2, :2].reshape(2, 3, -1), pixels[:, :, 2:-2, -2:].reshape(2, 3, -1)], 2)
    colour = np.concatenate([border, sides], 2).mean(2)
    np.testing.assert_allclose(frames[0][:, :, -1, -1], colour, atol=0.51)


def test_paired_changes_have_newcombes_interval():
    """Newcombe 1998, Statistics in Medicine 17:2635, table II, method 10: 36, 12, 2, 0 and 50, 0, 0, 0."""

    def found(both: int, after: int, before: int, neither: int) -> Number:
        counts = (both, after, before, neither)
        return change(np.repeat([True, False, True, False], counts), np.repeat([True, True, False, False], counts))

    assert found(36, 12, 2, 0)[:3] == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)
    assert found(54, 0, 0, 0)[:3] == pytest.approx((0, -0.0664, 0.0664), abs=1e-4)
    assert found(0, 30, 20, 0).value == pytest.approx(0.2)
    nothing = change(np.zeros(0, bool), np.zeros(0, bool))
    assert nothing.n == 0
    assert np.isnan(nothing.value)
    assert nothing.signed() == "–"


@given(st.integers(0, 2**31), st.integers(1, 40))
def test_a_change_is_the_other_way_round_with_its_sides_changed(seed, n):
    before, after = np.random.default_rng(seed).random((2, n)) < 0.6
    one, other = change(before, after), change(after, before)
    np.testing.assert_allclose(one[:3], (-other.value, -other.high, -other.low), atol=1e-12)
    assert -1 <= one.low <= one.value <= one.high <= 1 or n == 0


def test_a_paired_interval_covers_as_often_as_it_says():
    random, right = np.random.default_rng(1), 0
    for _ in range(400):
        before = random.random(60) < 0.7
        after = np.where(random.random(60) < 0.2, random.random(60) < 0.3, before)
        c = change(before, after)
        right += c.low <= 0.2 * (0.3 - 0.7) <= c.high
    assert right / 400 > 0.92


def test_bootstraps_are_drawn_within_classes_and_are_paired():
    labels = np.repeat([0, 2], [30, 5])
    values = np.stack([np.arange(35) % 2, np.arange(35) % 2], 1).astype(float)
    first, second = resampled(labels, values, 0)
    assert first.shape == second.shape
    assert (first[:, 0] == first[:, 1]).all()
    assert first[:, 0].std() == pytest.approx(0.5 / np.sqrt(30), rel=0.1)


class MeanColour(nn.Module):
    """Takes the class of the strongest channel; knows nothing of shape or place."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


class CentreOnly(nn.Module):
    """Calls class 1 what is much brighter in the middle of the frame than on the whole, else 0."""

    def forward(self, images: Tensor) -> Tensor:
        grey, size = images.float().mean(1), images.shape[-1]
        third = size // 3
        middle = grey[:, third : size - third, third : size - third].mean((1, 2)) - grey.mean((1, 2))
        return torch.stack([torch.full_like(middle, 50.0), middle], 1)


def test_a_model_of_colour_alone_is_told_by_light_and_grey_and_not_by_patches(dataset: Path):
    index = open_index(dataset)
    rows, data = index.rows_of("test"), Data(path=dataset, size=12)
    (after,) = run(index, data, rows, CPU, [decided(MeanColour(), ledger(), perturbed)])
    labels = index.labels[rows]
    found = features.features(after, no_swaps(labels), labels, CLASSES, groupings(index, rows))
    assert (after[0] == labels).mean() > 0.85
    changes = {c.name: c for c in found.changes}
    assert list(changes) == [*NAMES, "background same", "background other"]
    for parts in (2, 4):
        assert changes[f"patches {parts}"].flipped.value == 0
    assert changes["hue 1/3"].balanced.high < -0.4
    assert (after[1 + NAMES.index("grey")] == 0).all()  # all channels are as strong
    assert [n for *_, n in found.recalls] == [20, 11, 6]
    assert "patches 8" in features.summary(found, CLASSES)


def test_a_model_that_goes_by_the_cast_is_told_by_a_coloured_light():
    random = np.random.default_rng(4)
    images = torch.from_numpy(
        (120 + random.normal(0, 4, (90, 3, 1, 1)) + random.normal(0, 9, (90, 3, 8, 8))).astype("u1")
    )
    labels = MeanColour()(images).argmax(1).numpy()
    after = told_by(MeanColour(), perturbed, images)
    found = features.features(after, no_swaps(labels), labels, CLASSES, [])
    greener = next(s for s in found.sways if (s.before, s.after, s.name) == ("green", "magenta", "drink"))
    assert greener.moved.value == pytest.approx(-1, abs=0.05)
    assert greener.moved.n == 90
    told = list(features.findings(found, CLASSES))
    assert {finding.bias for finding in told} == {"feature"}
    assert any("called drink changes by -" in finding.text and finding.where == "drink" for finding in told)
    assert any("hangs by a thread: in a light of 10 % less green" in finding.text for finding in told)


def test_decisions_are_in_the_order_of_rows_and_the_ledgers(dataset: Path):
    index = open_index(dataset)
    rows, data = index.rows_of("test")[::-1].copy(), Data(path=dataset, size=12)
    (forward,) = run(index, data, rows[::-1].copy(), CPU, [decided(MeanColour(), ledger(), perturbed)])
    (backward,) = run(index, data, rows, CPU, [decided(MeanColour(), ledger(), perturbed)])
    assert (backward == forward[:, ::-1]).all()
    costly = ledger()
    costly.costs[:] = [[0, 99, 99], [0, 0, 99], [0, 99, 0]]
    (dear,) = run(index, data, rows, CPU, [decided(MeanColour(), costly, perturbed)])
    assert (dear == 0).mean() > (backward == 0).mean()


def squares(n: int = 40) -> tuple[Tensor, np.ndarray]:
    """Grey images, every second one with a bright square in the middle; and their labels."""
    random = np.random.default_rng(2)
    pixels = random.integers(60, 90, (n, 3, 24, 24)).astype(np.uint8)
    pixels[1::2, :, 8:16, 8:16] = 220
    return torch.from_numpy(pixels), np.arange(n) % 2


def test_a_model_that_sees_only_the_centre_is_told_with_its_class():
    images, labels = squares()
    found = spatial.spatial(told_by(CentreOnly(), placed, images), labels, ("none", "square"), 24)
    (first, gain), (second, none) = found.centre
    assert (first, second) == ("square", "none")
    assert gain.value > 0.9
    assert gain.n == 20
    assert none.value == 0
    assert found.spread.value > 0.4 > found.by_chance
    told = list(spatial.findings(found))
    assert told[0].text.startswith("square is seen best in the centre")
    assert [(finding.bias, finding.where) for finding in told] == [("spatial", "square"), ("spatial", "all classes")]
    assert all(place.balanced.low <= place.balanced.value <= place.balanced.high for place in found.places)
    assert found.places[CENTRE].recalls[1].value == 1
    assert {(round(p.x, 3), round(p.y, 3)) for p in found.places} == {
        (x / 8, y / 8) for x in (-1, 0, 1) for y in (-1, 0, 1)
    }
    assert "square" in spatial.summary(found)


def test_a_model_of_colour_alone_has_no_place():
    images, labels = squares()
    decided = np.stack([(MeanColour()(frame)[:, 0] > 80).long().numpy() for frame in placed(shown(images))])
    found = spatial.spatial(decided, labels, ("none", "square"), 24)
    assert found.spread.value == found.by_chance == 0
    assert list(spatial.findings(found)) == []


def test_the_spread_stays_below_chance_where_no_place_matters():
    random = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], [60, 30, 20])
    above = told = 0
    for _ in range(60):
        ease = random.beta(2, 1, 110)
        decided = np.where(random.random((len(PLACES), 110)) < ease, labels, (labels + 1) % 3)
        found = spatial.spatial(decided, labels, CLASSES, 24)
        above += found.spread.value > found.by_chance
        told += any(spatial.findings(found))
    assert above <= 8
    assert told <= 3


def test_classes_that_do_not_occur_have_no_number_and_break_nothing():
    labels = np.array([0, 0, 2, 2, 2])
    decided = np.tile(labels, (len(PLACES), 1))
    found = spatial.spatial(decided, labels, CLASSES, 24)
    assert [c.name for c in found.centre] == ["dessert", "food"]
    assert np.isnan(found.places[0].recalls[1].value)
    assert np.isnan(found.places[0].recalls[1].low)
    told = features.features(np.tile(labels, (1 + len(PERTURBATIONS), 1)), no_swaps(labels), labels, CLASSES, [])
    assert told.changes[0].recalls[1].n == 0
    assert told.changes[0].balanced[:3] == (0, 0, 0)
    assert len(told.sways) == len(LIGHTS) * 3


def test_a_rate_has_wilsons_interval():
    assert rate(np.arange(10) < 8)[:3] == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert len(RIM) == 8


@pytest.fixture(scope="module")
def small(dataset: Path, tmp_path_factory) -> Path:
    """A run, and its data set beside it."""
    folder = tmp_path_factory.mktemp("probed")
    data = shutil.copytree(dataset, folder / "data")
    train(config_for(data, folder, **{"cluster.workers": 1, "cluster.threads": 1}))
    return folder / "r"


def call(monkeypatch: pytest.MonkeyPatch, job: str, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [job, *map(str, words)])
    importlib.import_module(f"jobs.{job}").main()


def strict(path: Path) -> Any:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_run_is_audited_and_probed_and_the_same_again(small: Path, monkeypatch, capsys):
    written = []
    for _ in range(2):
        call(monkeypatch, "audit", f"data={small.parent / 'data'}", f"run={small}", "device=cpu")
        written.append((small / "probe" / "test" / "probe.json").read_bytes())
    assert written[0] == written[1]
    tree = strict(small / "probe" / "test" / "probe.json")
    assert (tree["split"], tree["n"], tree["classes"]) == ("test", 37, list(CLASSES))
    assert tree["data"] == strict(small.parent / "data" / "audit.json")["data"]
    assert len(tree["model"]) == 64
    out = capsys.readouterr().out
    assert "patches 4" in out
    (small.parent / "data" / "audit.json").unlink()
    call(monkeypatch, "audit", f"run={small}", "device=cpu")  # the run alone is probed, and its data left alone
    assert (small / "probe" / "test" / "probe.json").read_bytes() == written[0]
    assert not (small.parent / "data" / "audit.json").exists()
    assert f"probes in {small / 'probe' / 'test'}" in out


def test_the_report_shows_an_audit_and_a_probe_without_script_or_style(small: Path, monkeypatch):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from trainer.report.audits import read_audit, read_probes
    from trainer.report.page import HERE, weights_of

    call(monkeypatch, "audit", f"data={small.parent / 'data'}", f"run={small}", "device=cpu")
    audit, probes = read_audit(small), read_probes(small, weights_of(small))
    assert audit
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    macros = environment.get_template("audit.html").module
    text = str(macros.of_data(audit)) + "".join(str(macros.of_run(probe)) for probe in probes)  # pyright: ignore[reportAttributeAccessIssue]
    for part in (
        "border_red_green: drink",
        "Cramér",
        "test, probed",
        "recall of food",
        "in 4 x 4 patches",
        "nats lost by drink",
        "heat in the centre",
    ):
        assert part in text
    assert not re.search(r"<script|<style|style=|\bon\w+=|src=|href=|nan", text)


def test_an_audit_of_other_data_and_no_probe_are_not_shown(small: Path, dataset: Path, monkeypatch):
    from trainer.report.audits import read_audit, read_probes
    from trainer.report.page import weights_of

    path = small.parent / "data" / "audit.json"
    path.unlink(missing_ok=True)
    shutil.rmtree(small / "probe", ignore_errors=True)
    assert read_audit(small) is None
    assert read_probes(small, weights_of(small)) == ()
    path.write_text(json.dumps({"data": "another"}))
    assert read_audit(small) is None


def test_a_probe_of_other_weights_is_not_shown(small: Path, monkeypatch):
    from trainer.report.audits import read_probes

    call(monkeypatch, "audit", f"data={small.parent / 'data'}", f"run={small}", "device=cpu")
    with pytest.raises(Refusal, match="cannot be shown"):
        read_probes(small, small / "model" / "config.yaml")
    (small / "probe" / "test" / "probe.json").write_text("{}")
    with pytest.raises(Refusal, match="is not as it was written"):
        read_probes(small, small / "model" / "model.safetensors")
    shutil.rmtree(small / "probe")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run=nowhere"], 65, "train it first"),
        (["run={}", "split=tset"], 65, "no split 'tset'"),
    ],
)
def test_a_mistake_of_use_is_answered_before_the_audit(small, tmp_path, monkeypatch, capsys, words, code, said):
    out = tmp_path / "audit.json"
    data = f"data={small.parent / 'data'}"
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "audit", data, *(word.format(small) for word in words), f"out={out}", "device=cpu")
    assert end.value.code == code
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_rows_to_probe_are_capped_by_class_and_must_fit_the_model(small: Path, dataset: Path):
    trained, index = load_model(small / "model", CPU), open_index(dataset)
    rows = chosen(trained, index, "test", 18)
    assert np.bincount(index.labels[rows]).tolist() == [6, 6, 6]
    assert chosen(trained, index, "test", 1000).tolist() == index.rows_of("test").tolist()
    other = Trained(trained.model, trained.config, ledger(2))
    with pytest.raises(Refusal, match="does not fit the model"):
        chosen(other, index, "test", 18)


@pytest.mark.slow
def test_probes_tell_planted_biases_on_from_off(tmp_path: Path):
    """Trains on 6,000 built-in images with all plants, without that of colour, and without that of place."""
    from data_loaders.ingest import Ingest, in_processes, ingest
    from data_loaders.settings import parse
    from data_loaders.sources.demo import Demo
    from trainer.config import Config
    from trainer.run import train as train_in_processes

    gains, sways = {}, {}
    for name, off in {"on": {}, "colour": {"feature_bias": 0}, "place": {"spatial_bias": 0}}.items():
        source = Demo(folder=tmp_path / f"{name}-images", **off)
        data = tmp_path / name
        ingest(Ingest(source=source, out=data), in_processes(1))
        changes = {"data.path": data, "folder": tmp_path / "runs", "name": name, "train.epochs": 6}
        local = {"cluster.on": "local", "cluster.workers": 1, "cluster.threads": 1, "tracking.mode": "disabled"}
        config = override(parse(Config, ["jobs/configs/demo_balanced.yaml"]), {**changes, **local})
        trained = load_model(train_in_processes(config).folder / "model", CPU)
        index = open_index(data)
        found = probe(trained, index, index.rows_of("test_balanced"), learnt(trained, index, 2000))
        gains[name] = next(gain.value for label, gain in found.spatial.centre if label == "desserts")
        sways[name] = abs(found.features.sways[0].moved.value)
    assert min(gains["on"], gains["colour"]) > spatial.NOTABLE > gains["place"]
    assert min(sways["on"], sways["place"]) > features.NOTABLE > sways["colour"]
