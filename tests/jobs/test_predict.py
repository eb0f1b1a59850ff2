"""Predictions of new images with an estimated prior, conformal sets and decisions that are left open."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from data_loaders.faults import Refusal
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.rows import Row
from trainer import predict as module
from trainer.checkpoint import load_model
from trainer.decision.conformal import Conformal
from trainer.predict import cells_of, predict

CLASSES = ("dessert", "drink", "food")
COUNTS = (20, 40, 140)
GROUPS = {"venue": ("home", "street"), "camera": ("phone", "slr")}


def run(job: str, *words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [job, *map(str, words)])
        importlib.import_module(f"jobs.{job}").main()


@pytest.fixture(scope="module")
def folder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run r that knows the three colours, and new images of them, of another mix than the validation rows."""
    folder = tmp_path_factory.mktemp("predict")
    words = ["data.size=12", "data.batch=16", "model.widths=[8]", "train.steps=100", "train.report_every=100"]
    run("train", f"data.path={dataset}", *words, "cluster.on=local", "cluster.device=cpu", f"folder={folder}", "name=r")
    random = np.random.default_rng(1)
    (folder / "new").mkdir()
    lines = ["path,label,venue,camera"]
    for i, k in enumerate(np.repeat(range(3), COUNTS).tolist()):
        colour = np.full(3, 90) + 90 * np.eye(3)[k] + random.normal(0, 40, 3)
        pixels = (colour + random.normal(0, 30, (12, 12, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "new" / f"{i:03}.png")
        lines.append(f"{i:03}.png,{CLASSES[k]},{('home', 'street', 'beach')[i % 3]},{('phone', 'slr')[i % 2]}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def predicted(folder: Path, *words: str, out: str = "p.parquet") -> dict[str, list]:
    source = ["source.kind=folder", f"source.path={folder / 'new'}", "device=cpu", f"out={folder / out}"]
    run("predict", f"run={folder / 'r'}", *source, *words)
    read = pyarrow.csv.read_csv if out.endswith(".csv") else pyarrow.parquet.read_table
    return read(folder / out).to_pydict()


def test_the_prior_of_the_images_is_estimated_from_them_and_used(folder, capsys):
    plain = predicted(folder)
    found = predicted(folder, "estimate_prior=em")
    estimate = json.loads((folder / "p.prior.json").read_text())
    true = np.array(COUNTS) / sum(COUNTS)
    assert all(low <= share <= high for low, share, high in zip(estimate["low"], true, estimate["high"], strict=True))
    assert (estimate["method"], estimate["n"], estimate["n_validation"]) == ("em", 200, 33)
    off, mended = (abs(np.mean(table["p.food"]) - true[2]) for table in (plain, found))
    assert mended < 0.7 * off
    said = capsys.readouterr().out
    assert "prior of use, by em from 200 images and 33 validation rows (condition number" in said
    assert "- the share of 'food' rests on 6 validation rows" in said


def test_a_prior_is_not_both_given_and_estimated_nor_estimated_from_a_few_images(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        predicted(folder, "estimate_prior=bbse", "decision.prior=uniform")
    assert end.value.code == 2
    assert "is given, and is to be estimated" in capsys.readouterr().err
    few = tmp_path / "few.csv"
    few.write_text(f"path\n{folder / 'new' / '000.png'}\n")
    words = ["source.kind=csv", f"source.path={few}", "source.root=/", "device=cpu", f"out={tmp_path / 'p.csv'}"]
    with pytest.raises(SystemExit) as end:
        run("predict", f"run={folder / 'r'}", *words, "estimate_prior=em")
    assert end.value.code == 65
    assert "there are 1, and 100 are needed" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_sets_hold_the_true_class_as_often_as_asked_and_say_where_they_cannot_leave_any_out(folder, capsys):
    found = predicted(folder, "conformal.alpha=0.1", "conformal.by=none")
    true = np.repeat(CLASSES, COUNTS)
    assert np.mean([label in held for label, held in zip(true, found["set"], strict=True)]) > 0.75
    assert np.mean([len(held) for held in found["set"]]) < 2
    again = predicted(folder, "conformal.by=none", out="p.csv")
    assert [json.loads(held) for held in again["set"]] == found["set"]
    capsys.readouterr()
    by_class = predicted(folder, "conformal.alpha=0.1", "conformal.by=class")
    assert "- 'food' is in every set: that needs 9 of its validation rows" in capsys.readouterr().out
    assert all("food" in held for held in by_class["set"])
    assert not all("drink" in held for held in by_class["set"])


def test_an_image_that_no_decision_is_worth_is_left_open(folder):
    words = ["decision.costs.kind=equal", "decision.costs.abstain=0.1"]
    found = predicted(folder, *words)
    p = np.stack([found[f"p.{name}"] for name in CLASSES], 1)
    left = np.array(found["decision"]) == "abstain"
    assert 0 < left.sum() < len(left)
    np.testing.assert_array_equal(left, p.max(1) < 0.9)
    np.testing.assert_allclose(found["expected_cost"], np.minimum(1 - p.max(1), 0.1), atol=1e-12)


def test_images_of_known_groups_get_the_sets_of_their_group_and_those_of_new_ones_get_whole_sets(folder):
    trained = load_model(folder / "r" / "model", torch.device("cpu"))
    source = Csv(path=folder / "list.csv", root=folder / "new", group_columns=("camera", "venue"))
    rows = [row for row in source.rows() if isinstance(row, Row)]
    cells = cells_of(rows, source.group_names, GROUPS)
    assert cells[:6].tolist() == [0, 3, -1, 1, 2, -1]
    asked = Conformal(alpha=0.3, by="group")
    found = predict(trained, GROUPS, trained.config.decision, source, rows, sets=asked)
    held = [classes for table, _ in found.tables for classes in table["set"].to_pylist()]
    sizes = np.array([len(classes) for classes in held])
    assert (sizes[cells < 0] == 3).all()
    assert sizes[cells >= 0].mean() < 2.5
    with pytest.raises(Refusal, match=r"no image is of a known group — give source.group_columns=\[venue,camera\]"):
        predict(
            trained, GROUPS, trained.config.decision, source.model_copy(update={"group_columns": ()}), rows, sets=asked
        )


def test_a_prior_is_not_estimated_from_more_than_memory_is_set_aside_for_nor_without_validation_rows(
    folder, monkeypatch
):
    from dataclasses import replace

    trained = load_model(folder / "r" / "model", torch.device("cpu"))
    source = Csv(path=folder / "list.csv", root=folder / "new")
    rows = [row for row in source.rows() if isinstance(row, Row)]
    with pytest.raises(Refusal, match="without what it says of its validation rows"):
        predict(replace(trained, validation=None), {}, trained.config.decision, source, rows, method="em")
    monkeypatch.setattr(module, "MOST_LOGITS", 599)
    with pytest.raises(Refusal, match="200 images of 3 classes are more than the 599 logits"):
        predict(trained, {}, trained.config.decision, source, rows, method="em")


def test_decisions_that_are_even_between_groups_leave_probabilities_and_new_groups_as_they_are(folder, capsys):
    listed = ["source.kind=csv", f"source.path={folder / 'list.csv'}", f"source.root={folder / 'new'}", "device=cpu"]
    listed += ["source.group_columns=[venue,camera]", f"run={folder / 'r'}", f"out={folder / 'e.parquet'}"]
    found = []
    for words in ([], ["equalise=cost"]):
        run("predict", *listed, *words)
        found.append(pyarrow.parquet.read_table(folder / "e.parquet").to_pydict())
    plain, even = found
    assert even["p.food"] == plain["p.food"]
    beach = np.arange(len(plain["path"])) % 3 == 2
    moved = np.array(plain["decision"]) != np.array(even["decision"])
    assert moved.any()
    assert not moved[beach].any()
    with pytest.raises(SystemExit) as end:
        predicted(folder, "equalise=recall")
    assert end.value.code == 2
    assert "equalise: no image is of a known group" in capsys.readouterr().err
