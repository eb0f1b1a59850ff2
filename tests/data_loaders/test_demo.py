"""The demo set: the same bytes from a seed, and every planted bias there when it is on and gone when it is off."""

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chi2_contingency

from data_loaders.faults import Refusal
from data_loaders.settings import override
from data_loaders.sources import demo
from data_loaders.sources.demo import CAMERAS, CLASSES, SPLITS, VENUES, Demo, Plan

TRAIN, VAL, TEST, BALANCED = range(4)
DESSERTS = CLASSES.index("desserts")


def read(labels: Path) -> list[dict[str, str]]:
    with labels.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def bytes_of(folder: Path) -> str:
    """Hash of the CSV and of every image."""
    files = [*sorted(folder.rglob("*.jpg")), folder / "labels.csv"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def pictures(plan: Plan, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 64, 64, 3] and covers [N, 64, 64] of the rows of a plan."""
    pixels = np.zeros((len(plan.label), 64, 64, 3), np.uint8)
    covered = np.zeros(pixels.shape[:3], np.float32)
    for rows in demo.batches(plan):
        pixels[rows], covered[rows] = demo.render(plan.take(rows), 64, [demo._rng(seed, 2 + r) for r in rows])
    return pixels, covered


def dependence(one: np.ndarray, other: np.ndarray) -> float:
    """p-value of the chi-square test of independence."""
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1)
    return chi2_contingency(table[:, table.any(0)][table.any(1)]).pvalue  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "images"
    Demo(folder=folder, images=300).draw()
    return folder


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(drawn: Path, tmp_path: Path):
    again, other = Demo(folder=tmp_path / "a", images=300), Demo(folder=tmp_path / "b", images=300, seed=1)
    assert bytes_of(again.draw().parent) == bytes_of(drawn) != bytes_of(other.draw().parent)


def test_the_bytes_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch):
    plan = demo.plan_rows(Demo(images=30))
    pixels, covered = pictures(plan)
    monkeypatch.setattr(demo, "BATCH", 1)
    for one, other in zip(pictures(plan), (pixels, covered), strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_image_is_a_64_by_64_colour_jpeg(drawn: Path):
    for row in read(drawn / "labels.csv"):
        with Image.open(drawn / row["path"]) as image:
            image.load()
            assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")


def test_the_csv_lists_each_file_once_in_no_order(drawn: Path):
    rows = read(drawn / "labels.csv")
    assert tuple(rows[0]) == demo.COLUMNS
    assert sorted(row["path"] for row in rows) == sorted(str(f.relative_to(drawn)) for f in drawn.rglob("*.jpg"))
    for column in ("label", "split", "path"):
        assert [row[column] for row in rows] != sorted(row[column] for row in rows)


def test_the_csv_says_what_was_drawn(drawn: Path):
    plan = demo.plan_rows(Demo(images=300))
    by_path = {row["path"]: row for row in read(drawn / "labels.csv")}
    for i in range(300):
        row = by_path[plan.path(i)]
        names = CLASSES[plan.label[i]], VENUES[plan.venue[i]], CAMERAS[plan.camera[i]], list(SPLITS)[plan.split[i]]
        assert (row["label"], row["venue"], row["camera"], row["split"]) == names


@pytest.mark.parametrize("rows", [30, 300, 6000])
def test_the_counts_of_every_split_follow_the_imbalance_and_the_last_split_is_balanced(rows: int):
    plan = demo.plan_rows(Demo(images=rows))
    for split, share in enumerate(SPLITS.values()):
        counts = np.bincount(plan.label[plan.split == split], minlength=3)
        ratio = np.array([1, 1, 1] if split == BALANCED else [100, 12, 3])
        assert counts.sum() == round(rows * share)
        assert (abs(counts - counts.sum() * ratio / ratio.sum()) <= 2).all()
        assert counts.min() >= 1


def test_equal_imbalance_gives_equal_counts():
    plan = demo.plan_rows(Demo(images=600, imbalance=(1, 1, 1)))
    counts = Counter(zip(plan.split, plan.label, strict=True))
    assert all(abs(counts[s, 0] - counts[s, label]) <= 1 for s in range(4) for label in range(3))


def test_every_class_is_seen_in_every_venue_with_every_camera_even_at_full_strength():
    plan = demo.plan_rows(Demo(images=6000, imbalance=(1, 1, 1), selection_bias=1, feature_bias=1))
    assert len(set(zip(plan.label, plan.venue, plan.camera, strict=True))) == 3 * 3 * 2


@pytest.mark.parametrize("split", [TRAIN, VAL, TEST])
def test_selection_bias_ties_the_venue_to_the_class(split: int):
    on = _split(demo.plan_rows(Demo(images=6000)), split)
    off = _split(demo.plan_rows(Demo(images=6000, selection_bias=0)), split)
    assert dependence(on.label, on.venue) < 1e-6
    assert dependence(off.label, off.venue) > 1e-3


def test_the_balanced_test_rows_have_no_plant_at_all():
    plan = _split(demo.plan_rows(Demo(images=6000, selection_bias=1, feature_bias=1)), BALANCED)
    for column in (plan.venue, plan.camera, plan.cast):
        assert dependence(plan.label, column) > 1e-3
    assert not (plan.centre == 0).any()


@pytest.mark.parametrize("bias", [0.0, 0.7, 1.0])
def test_feature_bias_is_the_share_of_training_rows_whose_cast_the_class_sets(bias: float):
    plan = demo.plan_rows(Demo(images=6000, imbalance=(1, 1, 1), feature_bias=bias))
    for split, expected in ((TRAIN, bias), (VAL, bias), (TEST, 0), (BALANCED, 0)):
        own = plan.cast == plan.label
        for label in range(3):
            share = own[(plan.split == split) & (plan.label == label)].mean()
            assert share == pytest.approx(expected + (1 - expected) / 3, abs=0.13)


def test_feature_bias_shows_in_the_mean_colours_of_training_rows_only():
    def blueness(bias: float, split: int) -> float:
        """How much bluer drinks are than food, beyond what their shapes make: plant on less plant off."""
        plan = _split(demo.plan_rows(Demo(images=900, imbalance=(1, 1, 1), feature_bias=bias)), split)
        colour = pictures(plan)[0].mean((1, 2))
        ratio = np.log(colour[:, 2] / colour[:, 0])
        return ratio[plan.label == 1].mean() - ratio[plan.label == 0].mean()

    assert blueness(0.9, TRAIN) - blueness(0, TRAIN) > 0.1
    assert blueness(0.9, TEST) == blueness(0, TEST)  # the very same pictures


def test_spatial_bias_centres_the_training_desserts_and_nothing_else():
    plan = demo.plan_rows(Demo(images=600, imbalance=(1, 1, 1)))
    centred = (plan.centre == 0).all(1)
    np.testing.assert_array_equal(centred, (plan.label == DESSERTS) & (plan.split <= VAL))
    assert not (demo.plan_rows(Demo(images=600, imbalance=(1, 1, 1), spatial_bias=0)).centre == 0).any()


def test_spatial_bias_shows_in_the_pixels_that_desserts_cover():
    def spread(plan: Plan) -> float:
        """Root mean square distance of the objects' centroids from the image centre, in half image widths."""
        covered, axis = pictures(plan)[1], (np.arange(64) + 0.5) / 32 - 1
        weight = covered.sum((1, 2))
        x, y = (covered.sum(1) * axis).sum(1) / weight, (covered.sum(2) * axis).sum(1) / weight
        return float(np.sqrt((x**2 + y**2).mean()))

    on, off = (demo.plan_rows(Demo(images=300, imbalance=(1, 1, 1), spatial_bias=b)) for b in (1.0, 0.0))
    desserts = (on.label == DESSERTS) & (on.split == TRAIN)
    assert spread(on.take(np.flatnonzero(desserts))) < 0.1
    assert spread(off.take(np.flatnonzero(desserts))) > 0.25
    assert spread(on.take(np.flatnonzero((on.label == DESSERTS) & (on.split == TEST)))) > 0.25


def test_a_plant_that_is_turned_off_changes_nothing_else():
    on, off = demo.plan_rows(Demo(images=300)), demo.plan_rows(Demo(images=300, selection_bias=0, spatial_bias=0))
    for name in set(Plan._fields) - {"venue", "surface", "centre"}:
        np.testing.assert_array_equal(getattr(on, name), getattr(off, name), err_msg=name)


def test_leaked_rows_show_a_train_image_of_their_class_half_of_them_encoded_anew():
    plan = demo.plan_rows(Demo(images=6000, leakage=0.2))
    leaks = plan.original != np.arange(6000)
    held_out = (plan.split == VAL) | (plan.split == TEST)
    assert not leaks[~held_out].any()
    assert leaks[held_out].mean() == pytest.approx(0.2, abs=0.03)
    own = plan.original[leaks]
    assert (plan.split[own] == TRAIN).all()
    for column in (plan.label, plan.listed, plan.venue, plan.camera, plan.subkind):
        np.testing.assert_array_equal(column[leaks], column[own])
    anew = plan.quality[leaks] != plan.quality[own]
    assert anew.mean() == pytest.approx(0.5, abs=0.1)
    assert (abs(plan.quality[leaks] - plan.quality[own])[anew] == 20).all()
    assert plan.quality.max() <= 98
    assert (plan.listed == plan.label).all()


def test_copies_that_are_not_encoded_anew_are_the_very_bytes(tmp_path: Path):
    settings = Demo(folder=tmp_path, images=300, size=16, leakage=0.5)
    plan, labels = demo.plan_rows(settings), settings.draw()
    leaks = np.flatnonzero(plan.original != np.arange(300))
    assert len(leaks) > 20
    for row in leaks.tolist():
        of = int(plan.original[row])
        files = [(labels.parent / plan.path(r)).read_bytes() for r in (row, of)]
        assert (files[0] == files[1]) == (plan.quality[row] == plan.quality[of])


def test_label_noise_lists_train_rows_as_the_next_class_and_keeps_the_truth(tmp_path: Path):
    plan = demo.plan_rows(Demo(images=6000, label_noise=0.1))
    wrong = plan.listed != plan.label
    assert not wrong[plan.split != TRAIN].any()
    assert wrong[plan.split == TRAIN].mean() == pytest.approx(0.1, abs=0.02)
    np.testing.assert_array_equal(plan.listed[wrong], (plan.label[wrong] + 1) % 3)
    rows = read(Demo(folder=tmp_path, images=300, size=16, label_noise=0.1).draw())
    assert list(rows[0]) == [*demo.COLUMNS, demo.TRUE_LABEL]
    assert {row["true_label"] for row in rows} == set(CLASSES)
    assert any(row["true_label"] != row["label"] for row in rows)
    assert all(row["true_label"] in row["path"] for row in rows)


def test_a_leaked_copy_of_a_wrongly_labelled_image_keeps_its_label():
    plan = demo.plan_rows(Demo(images=6000, label_noise=0.3, leakage=0.3))
    np.testing.assert_array_equal(
        plan.listed[plan.original != np.arange(6000)], plan.listed[plan.original][plan.original != np.arange(6000)]
    )
    assert (plan.listed != plan.label)[plan.split == TEST].any()


def test_leakage_and_label_noise_change_no_other_row():
    off, on = demo.plan_rows(Demo(images=900)), demo.plan_rows(Demo(images=900, leakage=0.3, label_noise=0.3))
    kept = np.flatnonzero(on.original == np.arange(900))
    for name in set(Plan._fields) - {"listed"}:
        np.testing.assert_array_equal(getattr(on, name)[kept], getattr(off, name)[kept], err_msg=name)


@pytest.mark.parametrize(("seed", "expected"), [(0, "31198f41e748265c"), (3, "7d6b0b448eeb2cdc")])
def test_the_images_without_them_are_those_of_before_they_could_be_planted(tmp_path: Path, seed: int, expected: str):
    assert bytes_of(Demo(folder=tmp_path, images=120, size=32, seed=seed).draw().parent).startswith(expected)


def test_the_groups_differ_in_light_and_in_noise():
    plan = _split(demo.plan_rows(Demo(images=600)), TRAIN)
    pixels = pictures(plan)[0].astype(float)
    light, noise = pixels.mean((1, 2, 3)), abs(np.diff(pixels, axis=2)).mean((1, 2, 3)) / pixels.mean((1, 2, 3))
    assert light[plan.venue == VENUES.index("restaurant")].mean() < 0.7 * light[plan.venue != 0].mean()
    assert noise[plan.camera == CAMERAS.index("phone")].mean() > 1.2 * noise[plan.camera != 0].mean()


def test_a_second_call_draws_nothing_again(drawn: Path):
    before = {file: file.stat().st_mtime_ns for file in drawn.rglob("*")}
    assert Demo(folder=drawn, images=300).draw() == drawn / "labels.csv"
    assert {file: file.stat().st_mtime_ns for file in drawn.rglob("*")} == before


def test_other_settings_draw_again_and_leave_no_older_image(tmp_path: Path):
    first = Demo(folder=tmp_path, images=60)
    first.draw()
    override(first, {"images": 30}).draw()
    assert len(read(tmp_path / "labels.csv")) == len(list(tmp_path.rglob("*.jpg"))) == 30


def test_a_set_that_was_cut_off_is_drawn_to_the_end(tmp_path: Path):
    whole = Demo(folder=tmp_path, images=30)
    expected = bytes_of(whole.draw().parent)
    (tmp_path / "labels.csv").unlink()
    next(tmp_path.rglob("*.jpg")).unlink()
    assert bytes_of(whole.draw().parent) == expected


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "holiday.jpg").write_text("mine")
    with pytest.raises(Refusal, match=r"is not empty.*new or an empty folder") as refused:
        Demo(folder=tmp_path).draw()
    assert refused.value.exit_code == 73
    assert [file.name for file in tmp_path.iterdir()] == ["holiday.jpg"]


def test_the_stamp_does_not_hold_the_folder_so_that_a_set_can_be_moved(drawn: Path):
    assert "folder" not in json.loads((drawn / demo.STAMP).read_text(encoding="utf-8"))


def _split(plan: Plan, split: int) -> Plan:
    return plan.take(np.flatnonzero(plan.split == split))
