"""Explanations: captum as the oracle, a planted cause that must be found, and the whole way to the page."""

import importlib
import json
import shutil
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam, Occlusion
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from small_runs import CPU, config_for, train
from torch import Tensor, nn

from data_loaders import durable
from data_loaders.faults import Refusal
from data_loaders.index import open_index
from data_loaders.loader import exact_batches
from trainer import checkpoint
from trainer.explain.choose import Cell, most_confident, worst_cells
from trainer.explain.gallery import overlay, pictures
from trainer.explain.heatmaps import grad_cam, occlusion
from trainer.explain.maximize import maximize
from trainer.model import AnyModel, EfficientNet, ResNet, SmallCnn
from trainer.networks import Classifier, Ensemble
from trainer.report import explanations
from trainer.report.explanations import read_explanations
from trainer.report.page import read_run, weights_of

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'
MODELS = [SmallCnn(widths=(8, 16)), ResNet(), EfficientNet()]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def built(settings: AnyModel, seed: int = 0) -> Classifier:
    return settings.build(3, seed).eval()


def drawn(size: int, n: int = 4) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 3, size, size] and classes [n]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(n) % 3


def captum_cam(forward: nn.Module, member: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    layer = [m for m in member.modules() if isinstance(m, nn.AdaptiveAvgPool2d)][-1]
    oracle = LayerGradCam(forward, layer)
    found = oracle.attribute(images.float(), classes, attribute_to_layer_input=True, relu_attributions=True)
    assert isinstance(found, Tensor)
    return LayerAttribution.interpolate(found, tuple(images.shape[2:]), "bilinear")[:, 0].detach()


@pytest.mark.parametrize("settings", MODELS, ids=lambda m: m.kind)
def test_grad_cam_is_captums_for_every_kind_of_model(settings):
    model = built(settings)
    images, classes = drawn(48)
    expected = captum_cam(model, model, images, classes)
    assert expected.max() > 0
    torch.testing.assert_close(grad_cam(model, images, classes), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_grad_cam_of_an_ensemble_adds_its_members_maps():
    members = [built(SmallCnn(widths=(8, 16)), seed) for seed in range(3)]
    model = Ensemble(members, 3).eval()
    model.temperatures[1] = 2
    images, classes = drawn(16)
    expected = sum(captum_cam(model, member, images, classes) for member in members)
    torch.testing.assert_close(grad_cam(model, images, classes), expected)


@pytest.mark.parametrize(("size", "window", "stride"), [(12, 4, 4), (12, 5, 3), (13, 4, 3), (12, 12, 1)])
def test_occlusion_is_captums_with_the_mean_colour_as_its_baseline(size, window, stride):
    model = Ensemble([built(SmallCnn(widths=(8, 16)), seed) for seed in range(2)], 3).eval()
    images, classes = drawn(size)
    baseline = images.float().mean((2, 3), keepdim=True).expand(images.shape)
    oracle = Occlusion(lambda x: model(x).log_softmax(1))
    expected = oracle.attribute(images.float(), (3, window, window), (3, stride, stride), baseline, classes)
    torch.testing.assert_close(occlusion(model, images, classes, window, stride), expected[:, 0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def cornered() -> tuple[nn.Module, Tensor, Tensor]:
    """A model of images [B, 3, 32, 32] whose top left corner alone tells the class, by its colour, and such images."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(96) % 3
    images = torch.randint(60, 196, (96, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images[:, :, 2:10, 2:10] = (20 + 200 * torch.eye(3)[classes])[:, :, None, None].to(torch.uint8)
    model = SmallCnn(widths=(8, 16)).build(3, 0).train()
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        adam.zero_grad()
        nn.functional.cross_entropy(model(images), classes).backward()
        adam.step()
    model.eval()
    assert (model(images).argmax(1) == classes).all()
    return model, images[:12], classes[:12]


def test_a_planted_cause_is_where_both_kinds_of_heatmap_are_hot(cornered):
    model, images, classes = cornered
    for heat, least in ((grad_cam(model, images, classes), 0.6), (occlusion(model, images, classes, 6, 2), 0.8)):
        mass = heat.clamp(min=0)
        share = mass[:, :14, :14].sum((1, 2)) / mass.sum((1, 2))
        assert share.min() > least, share
        peak = heat.flatten(1).argmax(1)
        assert (peak // 32 < 12).all()
        assert (peak % 32 < 12).all()


@pytest.mark.parametrize(
    "explain",
    [
        grad_cam,
        lambda model, images, classes: occlusion(model, images, classes, 4, 2),
        lambda model, images, classes: maximize(model, int(classes[0]), 12, 3, 0),
    ],
    ids=["grad_cam", "occlusion", "maximize"],
)
def test_explaining_leaves_a_model_as_it_was(explain):
    model = built(SmallCnn(widths=(8, 16), dropout=0.5))
    model.network.train()  # modes that differ, to see that each is kept
    next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    explain(model, *drawn(12))
    with pytest.raises(RuntimeError):
        grad_cam(model, torch.zeros(2, 5, 12, 12), torch.zeros(2, dtype=torch.int64))
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in model.modules())


def test_heatmaps_are_those_of_the_model_in_use_where_it_was_left_in_training():
    model = built(SmallCnn(widths=(8, 16), dropout=0.5))
    images, classes = drawn(12)
    in_use = grad_cam(model, images, classes), occlusion(model, images, classes, 4, 2)
    model.train()
    assert torch.equal(grad_cam(model, images, classes), in_use[0])
    assert torch.equal(occlusion(model, images, classes, 4, 2), in_use[1])


def test_what_cannot_be_explained_is_said():
    images, classes = drawn(12)
    flat = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 3)))
    with pytest.raises(ValueError, match="global pooling"):
        grad_cam(flat, images, classes)
    for window, stride in ((13, 1), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match="do not cover"):
            occlusion(flat, images, classes, window, stride)


def test_an_image_is_optimised_the_same_whatever_torch_has_drawn(cornered):
    model = cornered[0]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        found.append(maximize(model, 1, 16, 8, seed=0))
        assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(found[0].image, found[1].image)
    assert found[0].log_odds == found[1].log_odds
    assert not np.array_equal(found[0].image, maximize(model, 1, 16, 8, seed=1).image)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, evaluated and explained on its test split."""
    config = config_for(dataset, tmp_path_factory.mktemp("runs"))
    train(config)
    call("evaluate", f"run={config.run_folder}", "device=cpu")
    call("explain", f"run={config.run_folder}", "device=cpu", "steps=32", "cells=3", "confident=2", "per_cell=2")
    return config.run_folder


def call(job: str, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [job, *words])
        importlib.import_module(f"jobs.{job}").main()


def test_the_purest_image_of_a_class_is_surer_than_every_image_of_the_data_set(dataset, run):
    trained = checkpoint.load_model(run / "model", CPU)
    index = open_index(dataset)
    batches = exact_batches(index, trained.config.data, np.arange(len(index.labels)))
    with torch.inference_mode():
        logits = torch.cat([trained.model(torch.from_numpy(b.images[b.valid])) for b in batches])
    for k in range(3):
        found = maximize(trained.model, k, 12, 1000, 0)
        image = torch.from_numpy(found.image).permute(2, 0, 1)[None]
        others = [j for j in range(3) if j != k]
        assert found.log_odds > float((logits[:, k] - logits[:, others].logsumexp(1)).max())
        assert found.log_odds > maximize(trained.model, k, 12, 0, 0).log_odds + 2
        with torch.no_grad():
            p = trained.model(image).double().softmax(1)[0, k]
        assert found.log_odds == pytest.approx(float(torch.logit(p)), abs=1e-3)


CLASSES = ("cake", "soup")


def predictions(n: int = 200, groups: bool = True) -> pa.Table:
    random = np.random.default_rng(0)
    p = random.random(n).round(2)
    columns = {
        "id": [f"{i}.png" for i in range(n)],
        "row": 1000 + np.arange(n),
        "label": np.array(CLASSES)[random.integers(0, 2, n)],
    }
    if groups:
        columns |= {f"group.{name}": np.array(["a", "b"])[random.integers(0, 2, n)] for name in ("x", "y")}
    columns |= {"p.cake": 1 - p, "p.soup": p, "decision.ledger": np.where(p > 0.3, "soup", "cake")}
    return pa.table(columns)


def test_the_worst_cells_show_their_surest_wrong_decisions_and_no_row_twice():
    table = predictions()
    cells = [Cell("cake", "x=a, y=b", 0.2, 40), Cell("soup", "y=b", 0.5, 90), Cell("cake", "x=a", 0.6, 99)]
    values = {"x": ("a", "b"), "y": ("a", "b")}
    sections = worst_cells(table, CLASSES, values, cells, 3, 5)
    assert [s.title.split(":")[0] for s in sections] == ["cake, x=a, y=b", "soup, y=b", "cake, x=a"]
    lines = table.to_pylist()

    def surest(label: str, called: str, without: Sequence[int] = (), **groups: str) -> list[int]:
        inside = [r for r in lines if r["label"] == label and r["decision.ledger"] == called]
        inside = [r for r in inside if all(r[f"group.{name}"] == value for name, value in groups.items())]
        left = [r for r in inside if r["row"] not in without]
        return [r["row"] for r in sorted(left, key=lambda r: -r[f"p.{called}"])][:5]

    first = surest("cake", "soup", x="a", y="b")
    assert [row.row for row in sections[0].rows] == first
    assert [row.row for row in sections[1].rows] == surest("soup", "cake", y="b")
    assert [row.row for row in sections[2].rows] == surest("cake", "soup", without=first, x="a")
    for row in (row for section in sections for row in section.rows):
        line = lines[row.row - 1000]
        assert (row.id, row.label, row.called) == (line["id"], line["label"], line["decision.ledger"])
        assert row.probability == line[f"p.{row.called}"]
        assert row.groups == {"x": line["group.x"], "y": line["group.y"]}
    assert worst_cells(table, CLASSES, values, cells, 1, 5) == sections[:1]
    assert worst_cells(table, CLASSES, values, cells, 3, 0) == worst_cells(table, CLASSES, values, cells, 0, 5) == []


def test_without_group_columns_the_worst_cells_are_classes():
    table = predictions(groups=False)
    (section,) = worst_cells(table, CLASSES, {}, [Cell("soup", "all", 0.5, 90)], 2, 3)
    assert {(row.label, row.called) for row in section.rows} == {("soup", "cake")}


def test_the_most_confidently_wrong_are_wrong_by_probability_whatever_the_decision_is():
    rows = most_confident(predictions(), CLASSES, 12).rows
    assert len({row.row for row in rows}) == 12
    assert [row.probability for row in rows] == sorted((row.probability for row in rows), reverse=True)
    assert all(row.label != row.called and row.probability >= 0.5 for row in rows)
    everything = most_confident(predictions(), CLASSES, 1000).rows
    assert any(row.decision != row.called for row in everything)


def test_where_nothing_is_wrong_nothing_is_shown():
    table = predictions().slice(0, 0)
    assert most_confident(table, CLASSES, 5).rows == []
    assert worst_cells(table, CLASSES, {}, [Cell("soup", "all", 1.0, 90)], 2, 3) == []


def test_an_overlay_shows_evidence_for_in_warm_and_against_in_cold_and_no_evidence_in_grey():
    image = np.full((4, 4, 3), 100, np.uint8)
    heat = np.zeros((4, 4))
    assert np.ptp(overlay(image, heat), axis=2).max() == 0
    heat[0, 0], heat[3, 3] = 2, -2
    shown = overlay(image, heat).astype(int)
    assert shown[0, 0, 0] > shown[0, 0, 2] + 50
    assert shown[3, 3, 2] > shown[3, 3, 0] + 30
    assert np.ptp(shown[1, 1]) == 0


def test_a_job_leaves_pictures_of_wrong_rows_and_of_each_class(run, dataset):
    gallery = run / "explain" / "test"
    assert durable.damage(gallery) is None
    tree = json.loads((gallery / "explanations.json").read_text())
    table = pyarrow.parquet.read_table(run / "evaluation" / "test" / "predictions.parquet")
    by_row = {line["row"]: line for line in table.to_pylist()}
    subject = next(s for s in read_run(run).subjects if (s.split, s.view) == ("test", "ledger"))
    label, group, recall = subject.cells()[0]
    assert tree["sections"][0]["title"] == f"{label}, {group}: recall {recall.value:.2f}, n = {recall.n}"
    for section in tree["sections"]:
        assert len({row["row"] for row in section["rows"]}) == len(section["rows"])
        for row in section["rows"]:
            assert by_row[row["row"]]["label"] == row["label"] != row["called"]
            assert by_row[row["row"]][f"p.{row['called']}"] == row["probability"]
    assert len(tree["sections"][-1]["rows"]) == 2
    captions, files = zip(*pictures(gallery), strict=True)
    assert len(files) == 4 * sum(len(s["rows"]) for s in tree["sections"]) + 3
    assert {path.name for path in gallery.iterdir()} == {path.name for path in files} | {
        "explanations.json",
        durable.MANIFEST,
    }
    assert captions[-1].startswith("food: activation maximization")
    index = open_index(dataset)
    first = tree["sections"][0]["rows"][0]
    batch = next(exact_batches(index, config_for(dataset, run).data, np.array([first["row"]])))
    assert np.array_equal(np.asarray(Image.open(files[0])), batch.images[0].transpose(1, 2, 0))


def test_explaining_again_makes_the_same_pictures(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    words = ["device=cpu", "steps=32", "cells=3", "confident=2", "per_cell=2"]
    call("explain", f"run={tmp_path / 'r'}", *words)
    for path in (run / "explain" / "test").glob("*.png"):
        assert (tmp_path / "r" / "explain" / "test" / path.name).read_bytes() == path.read_bytes()


class Elements(HTMLParser):
    """All tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def rendered(run: Path) -> str:
    folder = FileSystemLoader(Path(explanations.__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(
        '{% import "explanations.html" as parts %}{% for e in all %}{{ parts.shown(e) }}{% endfor %}'
    )
    return page.render(all=read_explanations(run, weights_of(run)))


def test_a_page_shows_every_picture_and_fetches_nothing(run):
    images = [attributes for tag, attributes in Elements(rendered(run)).found if tag == "img"]
    assert len(images) == len(list(pictures(run / "explain" / "test")))
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)


def test_a_hostile_id_runs_nothing_and_reads_nothing_else(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    gallery = tmp_path / "r" / "explain" / "test"
    tree = json.loads((gallery / "explanations.json").read_text())
    row = tree["sections"][0]["rows"][0]
    row |= dict.fromkeys(("id", "label", "called", "decision"), HOSTILE) | {"groups": {HOSTILE: HOSTILE}}
    row["pictures"][0] = {"file": f"../../../{row['pictures'][0]['file']}", "what": HOSTILE}
    tree["sections"][0]["title"] = tree["classes"][0]["class"] = HOSTILE
    republish(gallery, tree)
    page = rendered(tmp_path / "r")
    elements = Elements(page).found
    assert not [tag for tag, _ in elements if tag in {"script", "iframe", "link", "object", "form", "a"}]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on") or name == "style"]
    assert all(str(a["src"]).startswith("data:") for tag, a in elements if tag == "img")
    assert "&lt;script&gt;" in page


def republish(gallery: Path, tree: object) -> None:
    """The same gallery with another list, whose checksums agree."""
    former = gallery.rename(gallery.with_name("former"))
    with durable.publishing(gallery) as aside:
        for path in former.glob("*.png"):
            shutil.copy(path, aside)
        durable.write_json(aside / "explanations.json", tree)
    shutil.rmtree(former)


def test_explanations_that_are_damaged_or_of_other_weights_are_refused(run, tmp_path):
    assert read_explanations(tmp_path, weights_of(run)) == ()
    shutil.copytree(run, tmp_path / "r")
    gallery = tmp_path / "r" / "explain" / "test"
    tree = json.loads((gallery / "explanations.json").read_text())
    republish(gallery, tree | {"model": "0" * 64})
    with pytest.raises(Refusal, match="is of other weights"):
        read_explanations(tmp_path / "r", weights_of(run))
    (gallery / "0000-image.png").write_bytes(b"")
    with pytest.raises(Refusal, match=r"0000-image\.png is not as it was written"):
        read_explanations(tmp_path / "r", weights_of(run))


def test_what_was_not_evaluated_or_is_of_other_data_is_not_explained(run, dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        call("explain", f"run={run}", "split=nowhere", "device=cpu")
    assert end.value.code == 65
    assert f"python -m jobs.evaluate run={run} splits=nowhere" in capsys.readouterr().err
    source = [f"source.path={dataset.parent / 'labels.csv'}", "source.split_column=split", "workers=1"]
    call("ingest", "source.kind=csv", *source, f"out={tmp_path / 'data'}")
    with pytest.raises(SystemExit) as end:
        call("explain", f"run={run}", f"data={tmp_path / 'data'}", "device=cpu")
    assert end.value.code == 65
    assert "is of the data set" in capsys.readouterr().err
