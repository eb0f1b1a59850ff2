"""What an audit says of data: its null bands against permuted rows, its findings against planted truth."""

import csv
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw
from scipy.stats import contingency as scipy_contingency
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from data_loaders.audit import associations
from data_loaders.audit import contrasts as of_properties
from data_loaders.audit.associations import association, contingency, cramers_v, holm, residuals
from data_loaders.audit.audit import Audit, audit, class_counts, effective_number, groups, quota, sample
from data_loaders.audit.contrasts import Contrast, contrasts
from data_loaders.audit.duplicates import copies, duplicates
from data_loaders.audit.findings import findings
from data_loaders.audit.properties import LONGEST, PROPERTIES, border, measure, off_centre, reduced
from data_loaders.audit.summary import aligned, plain, summary, to_json
from data_loaders.faults import Refusal
from data_loaders.index import open_index
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.shards import Shards
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.demo import Demo

PLACE = {p.name: i for i, p in enumerate(PROPERTIES)}
Tables = arrays(np.int64, st.tuples(st.integers(2, 5), st.integers(2, 5)), elements=st.integers(0, 40))


@pytest.fixture
def few(monkeypatch):
    """Replicates, few enough for a test that repeats the null."""
    monkeypatch.setattr(of_properties, "REPLICATES", 199)
    monkeypatch.setattr(associations, "TABLES", 199)
    monkeypatch.setattr(associations, "FEWEST_TABLES", 199)


def ranked(values: np.ndarray, labels: np.ndarray, cells: np.ndarray) -> list[Contrast]:
    return [contrast for contrast, _ in contrasts(values, labels, cells)]


def as_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.indices(table.shape).reshape(2, -1)
    return np.repeat(a, table.ravel()), np.repeat(b, table.ravel())


@given(Tables.filter(lambda t: (t.sum(0) > 0).all() and (t.sum(1) > 0).all()))
def test_cramers_v_is_that_of_scipy_with_bergsmas_correction(table):
    n, (r, c) = table.sum(), table.shape
    plain_v = scipy_contingency.association(table, method="cramer")
    phi2 = max(0.0, plain_v**2 * (min(r, c) - 1) - (r - 1) * (c - 1) / (n - 1))
    most = min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    if most > 1e-6:
        assert cramers_v(table) == pytest.approx(np.sqrt(phi2 / most), abs=1e-6)


@given(Tables)
def test_cramers_v_is_a_share_that_knows_no_order_and_no_empty_value(table):
    v = cramers_v(table)
    assert np.isnan(v) or -1e-9 <= v <= 1 + 1e-9
    wider = np.pad(table, ((0, 1), (1, 0)))
    for other in (table.T, table[::-1], wider):
        np.testing.assert_allclose(cramers_v(other), v, atol=1e-9)


@given(Tables, st.randoms(use_true_random=False))
def test_a_contingency_table_knows_no_order_of_rows(table, random):
    a, b = as_rows(table)
    order = np.array(random.sample(range(len(a)), len(a)), np.int64)
    assert (contingency(a[order], b[order], table.shape) == table).all()


def test_a_function_of_the_label_has_a_v_of_one_and_a_single_value_has_none():
    assert cramers_v(np.diag([50, 20, 5])) == pytest.approx(1)
    assert np.isnan(cramers_v(np.array([[3, 4]])))
    assert np.isnan(cramers_v(np.zeros((2, 2), np.int64)))


def test_the_null_of_v_is_that_of_permuted_rows():
    table = np.array([[40, 10, 6], [5, 4, 3]])
    a, b = as_rows(table)
    random = np.random.default_rng(0)
    null = np.array([cramers_v(contingency(a, random.permutation(b), (2, 3))) for _ in range(4000)])
    told = association(table)
    assert told.by_chance == pytest.approx(np.quantile(null, 0.95), abs=0.03)
    assert told.p == pytest.approx((null >= told.v - 1e-9).mean(), abs=0.03)
    assert told == association(table)


def test_independent_groups_are_as_seldom_told_as_the_level_says_on_rows_of_99_to_1(few):
    random = np.random.default_rng(1)
    label = (np.arange(2000) >= 1980).astype(np.int64)
    p = [association(contingency(label, random.integers(0, 3, 2000), (2, 3)), seed).p for seed in range(300)]
    assert np.mean(np.array(p) <= 0.05) < 0.09


def test_a_million_rows_of_many_groups_take_no_longer_than_their_table():
    random = np.random.default_rng(2)
    told = association(random.multinomial(10**6, np.full(60, 1 / 60)).reshape(3, 20))
    assert told.n == 10**6
    assert told.by_chance < 0.01


def test_residuals_are_those_of_haberman():
    table = np.array([[30, 10], [20, 40]])
    expected = 50 * 40 / 100
    assert residuals(table)[0, 0] == pytest.approx((30 - expected) / np.sqrt(expected * 0.6 * 0.5))
    assert (residuals(np.array([[5, 0], [7, 0]])) == 0).all()


def test_holm_adjusts_and_leaves_out_what_is_no_test():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, np.nan, 0.03, 0.005])), [0.03, 0.06, np.nan, 0.06, 0.02])
    assert holm(np.array([])).shape == (0,)


def test_a_contrast_of_two_classes_is_the_area_under_the_curve_and_the_rank_sum_test(few):
    random = np.random.default_rng(3)
    labels = np.repeat([0, 1], [70, 30])
    for shift in (0.0, 0.3):
        values = np.round(random.normal(0, 1, 100) + shift * labels, 1)  # with ties
        (c,) = ranked(values[:, None], labels, np.zeros(100, np.int64))
        area = roc_auc_score(labels == c.label, values)
        assert c.above == pytest.approx(area)
        assert c.p == pytest.approx(mannwhitneyu(values[labels == 1], values[labels == 0]).pvalue, abs=0.09)
        assert c.n == (labels == c.label).sum()


def test_noise_tells_no_class_of_rows_of_99_to_1(few):
    """cleanlab 2.9 calls it spurious (bias.md 4.1 b)."""
    random = np.random.default_rng(4)
    labels = (np.arange(1500) >= 1485).astype(np.int64)
    found = ranked(random.normal(size=(1500, 200)), labels, np.zeros(1500, np.int64))
    p = np.array([c.p for c in found])
    assert 0.01 < np.mean(p <= 0.05) < 0.1
    assert 0.4 < np.mean(p <= 0.5) < 0.6


def test_what_sets_a_rare_class_apart_is_told_with_its_name_and_its_n(few):
    random = np.random.default_rng(5)
    labels = np.repeat([0, 1, 2], [1500, 300, 15])
    (c,) = ranked((random.normal(size=1815) - 2 * (labels == 2))[:, None], labels, np.zeros(1815, np.int64))
    assert (c.label, c.n, c.p) == (2, 15, 1 / 200)
    assert c.above < 0.15 < c.low < 0.5 < c.high


def test_what_the_groups_explain_is_no_contrast(few):
    random = np.random.default_rng(6)
    cells = random.integers(0, 3, 1200)
    labels = np.where(random.random(1200) < 0.7, cells, random.integers(0, 3, 1200))
    values = (cells + random.normal(0, 0.5, 1200))[:, None]
    (within,), (without,) = ranked(values, labels, cells), ranked(values, labels, np.zeros(1200, np.int64))
    assert within.p > 0.05
    assert without.p == 1 / 200


def test_only_rows_that_have_others_to_be_compared_with_in_their_cell_count(few):
    random = np.random.default_rng(7)
    labels = np.concatenate([np.repeat([0, 1], 500), np.repeat([0, 1], 10)])
    cells = np.concatenate([np.repeat([0, 1], 500), np.full(20, 2)])
    values = np.concatenate([random.normal(size=1000), np.arange(20.0)])[:, None]
    (c,) = ranked(values, labels, cells)
    assert c.p == 1 / 200
    assert abs(c.above - 0.5) == pytest.approx(0.5)
    assert (c.low, c.high) == pytest.approx((0.25, 0.75), abs=0.06)


def test_where_nothing_can_be_compared_there_is_no_number():
    labels, cells = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])
    for values, of in ((np.ones((4, 1)), np.zeros(4, np.int64)), (np.arange(4.0)[:, None], cells)):
        (c,) = ranked(values, labels, of)
        assert c.label == -1
        assert np.isnan([c.above, c.low, c.high, c.p]).all()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 80))
def test_a_sample_takes_the_same_of_each_class_that_has_it(labels, cap):
    labels = np.array(labels)
    most = quota(labels, cap)
    rows = sample(labels, most, 0)
    assert (np.diff(rows) > 0).all()
    assert (np.bincount(labels[rows], minlength=4) == np.minimum(np.bincount(labels, minlength=4), most)).all()
    assert len(rows) <= max(cap, len(set(labels.tolist())))


def test_effective_numbers_are_those_of_cui():
    assert effective_number(1) == pytest.approx(1)
    assert effective_number(5) == pytest.approx(sum(0.999**i for i in range(5)))
    assert effective_number(10**6) == pytest.approx(1000)


@pytest.fixture
def copied(shoot: Callable[..., Path], tmp_path: Path) -> Path:
    """Twelve images, and four copies: 00 and 04 in another split, 05 twice under another label."""
    lines = [(f"{i:02d}.png", "ab"[i % 2], "xyz"[i % 3], ("train", "test", "val")[i % 3]) for i in range(12)]
    for i, (path, *_) in enumerate(lines):
        shoot(path, size=(9 + i, 9))
    for path, like, venue, split in (
        ("c0.png", "00.png", "y", "test"),
        ("c1.png", "04.png", "y", "val"),
        ("c2.png", "05.png", "y", "val"),
        ("c3.png", "05.png", "x", "val"),
    ):
        (tmp_path / path).write_bytes((tmp_path / like).read_bytes())
        lines.append((path, "a", venue, split))
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "venue", "split"), *lines])
    source = Csv(path=tmp_path / "labels.csv", group_columns=("venue",), split_column="split")
    ingest(Ingest(source=source, out=tmp_path / "data", shards=Shards(rows=5)), in_processes(1))
    return tmp_path / "data"


def test_copies_are_found_across_splits_labels_and_groups(copied: Path):
    index = open_index(copied)
    found = duplicates(index, "train")
    assert (found.rows, found.sets, found.across_splits, found.across_labels) == (7, 3, 2, 1)
    assert found.leaked == {"test": 1, "val": 0}
    assert sorted(copy.id for copy in found.listed[0]) == ["05.png", "c2.png", "c3.png"]
    names = [sorted(index.ids[row].as_py() for row in rows.tolist()) for rows in copies(index)]
    assert sorted(names) == [["00.png", "c0.png"], ["04.png", "c1.png"], ["05.png", "c2.png", "c3.png"]]


def test_files_of_one_length_and_checksum_are_compared_byte_by_byte(dataset: Path):
    index = open_index(dataset)
    same = replace(index, image_crc32c=np.zeros_like(index.image_crc32c))
    assert len(np.unique(index.length)) < len(index.length)
    assert copies(same) == []


def png(pixels: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def measured(pixels: np.ndarray) -> dict[str, float]:
    return dict(zip(PLACE, measure(png(pixels)).tolist(), strict=True))


def test_properties_of_a_flat_image_are_its_colour():
    found = measured(np.broadcast_to([100, 50, 200], (20, 40, 3)))
    luma = 0.299 * 100 + 0.587 * 50 + 0.114 * 200
    assert (found["brightness"], found["border_brightness"]) == pytest.approx((luma, luma), rel=1e-5)
    assert found["contrast"] == pytest.approx(0, abs=1e-3)
    assert found["red_green"] == found["border_red_green"] == pytest.approx(np.log(101 / 51))
    assert found["border_blue_green"] == pytest.approx(np.log(201 / 51))
    assert found["off_centre"] == 0
    assert (found["aspect"], found["pixels"]) == (pytest.approx(np.log(2)), pytest.approx(np.log(800)))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (300, 500)])
def test_every_size_can_be_measured(size):
    assert np.isfinite(list(measured(np.full((*size, 3), 7)).values())).all()


def test_a_border_is_an_eighth_of_each_side():
    assert border(16, 32).sum() == 16 * 32 - 12 * 24
    assert border(1, 5).all()


def test_large_images_are_averaged_down():
    wide = np.zeros((LONGEST * 2, LONGEST * 4, 3), np.uint8)
    wide[:, ::2] = 200
    assert reduced(wide).shape == (LONGEST // 2, LONGEST, 3)
    assert (reduced(wide) == 100).all()


@given(st.integers(12, 28), st.integers(12, 28), st.floats(0.5, 1.5))
def test_an_object_off_the_centre_is_as_far_off_in_any_light(x, y, light):
    image = Image.new("RGB", (40, 40), (90, 80, 70))
    ImageDraw.Draw(image).ellipse((x - 6, y - 6, x + 6, y + 6), (160, 150, 20))
    pixels = (np.asarray(image) * light).astype(np.float32)
    found = off_centre(pixels, border(40, 40))
    assert found == pytest.approx(np.hypot(x + 0.5 - 20, y + 0.5 - 20) / 20, abs=0.03)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Callable[..., Audit]:
    """Audits of 684 balanced rows of the built-in images with all other plants, but those turned off."""
    made: dict[str, Audit] = {}

    def planted(**off) -> Audit:
        key = str(off)
        if key not in made:
            folder = tmp_path_factory.mktemp("plants")
            source = Demo(folder=folder / "images", images=1200, size=32, imbalance=(1, 1, 1), **off)
            ingest(Ingest(source=source, out=folder / "data"), in_processes(1))
            index = open_index(folder / "data")
            made[key] = audit(index, "train", 10**4)
        return made[key]

    return planted


def property_of(a: Audit, name: str) -> tuple[float, str]:
    return a.properties[PLACE[name]].contrast.adjusted, a.properties[PLACE[name]].label


def texts(a: Audit) -> list[str]:
    return [finding.text for finding in findings(a)]


def test_an_audit_tells_imbalance_on_from_off(planted, tmp_path):
    source = Demo(folder=tmp_path / "images", images=300, size=16, imbalance=(10, 3, 1))
    ingest(Ingest(source=source, out=tmp_path / "data"), in_processes(1))
    index = open_index(tmp_path / "data")
    off = planted()
    on = off._replace(classes=class_counts(index, "train"))
    assert (on.classes.imbalance, off.classes.imbalance) == (pytest.approx(10, rel=0.1), 1)
    assert on.classes.effective < 2.2 < off.classes.effective == pytest.approx(3)
    for a, is_on in ((on, True), (off, False)):
        assert any("times as many rows of food" in text for text in texts(a)) == is_on


def test_an_audit_tells_selection_bias_on_from_off(planted):
    on, off = planted(), planted(selection_bias=0)
    for a, is_on in ((on, True), (off, False)):
        venue = next(g for g in a.groups if (g.split, g.grouping) == ("train", "venue"))
        camera = next(g for g in a.groups if (g.split, g.grouping) == ("train", "camera"))
        assert (venue.adjusted < 0.01) == is_on
        assert (venue.association.v > 3 * venue.association.by_chance) == is_on
        assert camera.adjusted > 0.05
        assert any(text.startswith("venue goes with") for text in texts(a)) == is_on


def test_an_audit_tells_feature_bias_on_from_off(planted):
    on, off = planted(), planted(feature_bias=0)
    assert property_of(on, "border_red_green") == (pytest.approx(0.0005), "drinks")
    assert property_of(on, "border_blue_green")[0] < 0.01
    for a, is_on in ((on, True), (off, False)):
        assert any(f.bias == "feature" and f.where.startswith("border_") for f in findings(a)) == is_on
    assert property_of(off, "border_red_green")[0] > 0.05
    assert property_of(off, "border_blue_green")[0] > 0.05


def test_an_audit_tells_spatial_bias_on_from_off(planted):
    on, off = planted(), planted(spatial_bias=0)
    assert property_of(on, "off_centre") == (pytest.approx(0.0005), "desserts")
    assert on.properties[PLACE["off_centre"]].contrast.above < 0.3
    assert property_of(off, "off_centre")[0] > 0.05
    assert [any(f.bias == "spatial" for f in findings(a)) for a in (on, off)] == [True, False]


def test_an_audit_of_nothing_planted_tells_of_no_border_place_or_group(planted):
    clean = planted(selection_bias=0, feature_bias=0, spatial_bias=0)
    assert [text for text in texts(clean) if "may be the objects" not in text] == []


def test_an_audit_is_strict_json_and_says_all_that_is_summed_up(planted):
    a = planted()
    tree = json.loads(json.dumps(to_json(a), allow_nan=False))
    assert tree["properties"][PLACE["aspect"]]["contrast"]["above"] is None
    assert [finding["text"] for finding in tree["findings"]] == texts(a)
    assert set(tree["findings"][0]) == {"bias", "where", "text", "value", "low", "high", "chance", "n"}
    text = summary(a)
    for part in ("venue x camera", "off_centre", "by chance", "copies: 0 rows", *texts(a)):
        assert part in text
    assert "aspect" not in text  # the same in all images


def test_a_capped_audit_says_so_and_is_the_same_again(dataset: Path):
    index = open_index(dataset)
    first, again = (audit(index, "train", 30) for _ in range(2))
    assert plain(first) == plain(again)
    assert (first.measured, first.at_most) == (30, 12)
    assert "30, at most 12 of a class, rows of train" in summary(first)


def test_a_split_without_a_class_has_no_ratio_but_says_which(dataset: Path):
    index = open_index(dataset)
    lacking = replace(index, label=np.where(index.label == 2, 1, index.label).astype(np.int32))
    classes = class_counts(lacking, "train")
    assert np.isnan(classes.imbalance)
    assert "train has no row of food" in texts(audit(index, "train", 30)._replace(classes=classes))


def test_tables_are_aligned():
    assert aligned(("a", "bb"), [("ccc", "d")]) == "a    bb\nccc  d"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["audit", *map(str, words)])
    importlib.import_module("jobs.audit").main()


def test_the_job_leaves_the_audit_beside_the_data(copied: Path, monkeypatch, capsys):
    run(monkeypatch, f"data={copied}")
    tree = json.loads((copied / "audit.json").read_text())
    assert tree["data"] == open_index(copied).fingerprint
    assert "1 sets of copies stand under several labels" in capsys.readouterr().out
    open_index(copied)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["rows=5"], 2, "give data=…, run=… or both"),
        (["data={}", "units=people.csv"], 2, "say which by unit=…"),
        (["run={}", "unit=venue"], 2, "give data=… too"),
        (["data={}", "unit=venu"], 2, "did you mean venue?"),
        (["data={}", "reference=nowhere.csv"], 65, "nowhere.csv"),
        (["data=nowhere"], 65, "make a data set"),
        (["data={}", "train=trian"], 65, "no split 'trian'"),
    ],
)
def test_a_mistake_of_use_is_answered_in_a_line_with_its_code(copied, monkeypatch, capsys, words, code, said):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *(word.format(copied) for word in words))
    assert end.value.code == code
    assert said in capsys.readouterr().err


def test_a_damaged_image_ends_an_audit(copied: Path):
    for shard in (copied / "shards").iterdir():
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(Refusal, match="damaged"):
        audit(open_index(copied), "train", 100)


def test_classes_of_a_few_rows_that_are_drawn_evenly_are_no_imbalance(dataset: Path):
    index, random = open_index(dataset), np.random.default_rng(8)
    train, told = index.rows_of("train"), 0
    for _ in range(100):
        labels = index.labels.copy()
        labels[train] = random.integers(0, len(index.classes), len(train))
        classes = class_counts(replace(index, label=labels.astype(np.int32)), "train")
        told += classes.imbalance > classes.by_chance
    assert told <= 5


def test_the_job_compares_with_a_population_and_follows_units(copied: Path, tmp_path: Path, monkeypatch, capsys):
    table = tmp_path / "population.csv"
    table.write_text("venue,share\nx,0.2\ny,0.2\nz,0.6\n")
    run(monkeypatch, f"data={copied}", f"reference={table}", "unit=venue")
    tree, said = json.loads((copied / "audit.json").read_text()), capsys.readouterr().out
    assert {cell["values"][0] for cell in tree["coverage"]["cells"]} == {"x", "y", "z"}
    assert (tree["units"][0]["name"], tree["units"][0]["asked"]) == ("venue", True)
    assert "images needed" in said
    assert "stand in several splits" in said


def test_groupings_too_many_for_a_table_have_no_number_but_their_n(dataset: Path, monkeypatch):
    monkeypatch.setattr("data_loaders.audit.audit.MOST_ENTRIES", 1)
    index = open_index(dataset)
    found = groups(index, "train")
    assert {g.grouping for g in found} >= set(index.group_values)
    for g in found:
        assert g.association.n == len(index.rows_of("train"))
        assert np.isnan([g.association.v, g.association.p, g.adjusted]).all()
