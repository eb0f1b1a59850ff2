"""What an audit says of selection: information and its null, a reference population, missing values, divided units."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyarrow import parquet
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

from data_loaders.audit import associations
from data_loaders.audit.associations import association, contingency, cramers_v, mutual_information, step_down
from data_loaders.audit.audit import Asked, Audit, audit
from data_loaders.audit.coverage import Reference, coverage, read_reference, wilson
from data_loaders.audit.findings import findings
from data_loaders.audit.missing import missingness
from data_loaders.audit.summary import summary
from data_loaders.audit.units import divided
from data_loaders.faults import Refusal
from data_loaders.index import Index, open_index
from trainer.metrics import intervals

Tables = arrays(np.int64, st.tuples(st.integers(2, 5), st.integers(2, 5)), elements=st.integers(0, 40))


def as_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.indices(table.shape).reshape(2, -1)
    return np.repeat(a, table.ravel()), np.repeat(b, table.ravel())


@given(Tables.filter(lambda t: t.sum() > 0))
def test_mutual_information_is_that_of_scikit_learn(table):
    assert mutual_information(table) == pytest.approx(mutual_info_score(*as_rows(table)), abs=1e-9)


def test_information_is_corrected_and_scaled_as_scikit_learn_does_by_the_expectation_under_permutation():
    table = np.array([[40, 10, 6], [5, 14, 3], [2, 2, 9]])
    told, (a, b) = association(table), as_rows(table)
    assert told.told == pytest.approx(adjusted_mutual_info_score(a, b, average_method="min"), abs=0.002)
    assert told.information_by_chance < told.information < mutual_info_score(a, b)
    assert association(np.diag([50, 20, 5])).told == pytest.approx(1)


def test_permuted_rows_have_the_null_of_drawn_tables():
    table = np.array([[9, 3, 2, 1], [4, 4, 0, 6]])
    random = [np.random.Generator(np.random.Philox(key=[0, i])) for i in range(2)]
    nulls = associations._tables(table, 9999, random[0]), associations._permuted(table, 9999, random[1])
    for drawn, permuted in zip(*nulls, strict=True):
        assert permuted.mean() == pytest.approx(drawn.mean(), rel=0.05)
        assert np.quantile(permuted, 0.95) == pytest.approx(np.quantile(drawn, 0.95), rel=0.05)


def test_most_cells_of_a_large_table_are_never_looked_at(monkeypatch):
    monkeypatch.setattr(associations, "_tables", None)  # a call of it would fail
    monkeypatch.setattr(associations, "FEWEST_TABLES", 49)
    monkeypatch.setattr(associations, "WORK", 0)
    random = np.random.default_rng(0)
    a, b = random.integers(0, 500, 4000), random.integers(0, 400, 4000)
    told = association(contingency(a, np.where(a % 9 == 0, a % 400, b), (500, 400)))
    assert told.p == 1 / 50
    assert association(contingency(a, b, (500, 400))).p > 0.02


def test_step_down_keeps_false_alarms_of_dependent_tests_at_the_level_and_is_stricter_than_none():
    random = np.random.default_rng(1)
    alarms = 0
    for _ in range(400):
        drawn = random.normal(size=(200, 8)) + random.normal(size=(200, 1))
        alarms += (step_down(drawn[0], drawn[1:]) <= 0.05).any()
    assert 0.02 < alarms / 400 < 0.09
    null = random.normal(size=(199, 3)) * [1, 50, 1]
    found = step_down(np.array([9.0, 20.0, np.nan]), null)
    assert found[0] == 1 / 200
    assert found[1] > 0.2
    assert np.isnan(found[2])


def test_the_interval_of_a_share_is_that_of_the_metrics():
    for hits, trials in ((0, 7), (3, 7), (7, 7), (50, 1000)):
        low, high = intervals.wilson(np.array(hits), np.array(trials))
        assert wilson(hits, trials) == pytest.approx((float(low), float(high)))
    assert np.isnan(wilson(0, 0)).all()


def by_venue(index: Index) -> dict[str, int]:
    """Rows of the training split by the first group column."""
    (name, values), *_ = index.group_values.items()
    counts = np.bincount(index.groups[index.rows_of("train"), 0], minlength=len(values))
    assert name
    return dict(zip(values, counts.tolist(), strict=True))


def reference(index: Index, shares: dict[str, float]) -> Reference:
    return Reference((next(iter(index.group_values)),), [(v,) for v in shares], np.array([*shares.values()]))


def test_data_like_their_population_are_covered_and_need_no_image(dataset: Path):
    index = open_index(dataset)
    counts = by_venue(index)
    n = sum(counts.values())
    c = coverage(index, "train", reference(index, {v: k / n for v, k in counts.items()}))
    assert c.distance == pytest.approx(0, abs=1e-12)
    assert (c.p, c.n) == (1, n)
    assert [cell.needed for cell in c.cells] == [0] * len(counts)
    assert all(cell.low < 1 < cell.high for cell in c.cells)


def test_images_that_are_needed_bring_a_cell_up_to_its_share(dataset: Path):
    index = open_index(dataset)
    counts = by_venue(index)
    names, n = [*counts], sum(counts.values())
    shares = {v: 0.1 / (len(names) - 1) for v in names[1:]} | {names[0]: 0.9}
    c = coverage(index, "train", reference(index, shares))
    worst = c.cells[-1] if c.cells[-1].values == (names[0],) else c.cells[0]
    assert worst.values == (names[0],)
    assert worst.ratio == pytest.approx(counts[names[0]] / n / 0.9)
    added = worst.needed or 0
    assert (counts[names[0]] + added) / (n + added) >= 0.9 > (counts[names[0]] + added - 1) / (n + added - 1)
    assert c.distance == pytest.approx(sum(abs(counts[v] / n - shares[v]) for v in names) / 2)
    assert c.p < 0.01


def test_samples_of_the_population_are_as_seldom_told_as_the_level_says(dataset: Path, monkeypatch):
    monkeypatch.setattr("data_loaders.audit.coverage.TABLES", 199)
    monkeypatch.setattr("data_loaders.audit.coverage.FEWEST_TABLES", 199)
    index, random = open_index(dataset), np.random.default_rng(2)
    values = len(next(iter(index.group_values.values())))
    uniform = reference(index, dict.fromkeys(next(iter(index.group_values.values())), 1 / values))
    p = []
    for seed in range(300):
        drawn = np.column_stack([random.integers(0, values, len(index.labels)), index.groups[:, 1:]])
        p.append(coverage(replace(index, group=tuple(drawn.T.astype(np.int32))), "train", uniform, seed).p)
    assert np.mean(np.array(p) <= 0.05) < 0.09


def test_what_the_data_lack_and_what_the_population_lacks_are_both_told(dataset: Path):
    index = open_index(dataset)
    counts = by_venue(index)
    (first, *others), n = [*counts], sum(counts.values())
    c = coverage(index, "train", reference(index, {"nowhere": 0.5, first: 0.5}))
    assert (c.cells[0].values, c.cells[0].ratio, c.cells[0].low) == (("nowhere",), 0, 0)
    assert c.cells[0].needed == n
    assert {cell.values[0] for cell in c.cells if np.isnan(cell.ratio)} == set(others)
    alone = coverage(index, "train", reference(index, {"nowhere": 1.0}))
    assert alone.cells[0].needed is None
    assert alone.distance == pytest.approx(1)


def write(path: Path, *lines: tuple[object, ...]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def test_a_table_is_read_from_csv_and_parquet_alike(dataset: Path, tmp_path: Path):
    index = open_index(dataset)
    name, values = next(iter(index.group_values.items()))
    lines = [(v, i + 1) for i, v in enumerate(values)]
    table = write(tmp_path / "t.csv", (name, "count"), *lines)
    parquet.write_table(pa.table({name: list(values), "count": [n for _, n in lines]}), tmp_path / "t.parquet")
    for path in (table, tmp_path / "t.parquet"):
        found = read_reference(path, index)
        assert found.cells == [(v,) for v in values]
        np.testing.assert_allclose(found.shares, np.arange(1, len(values) + 1) / sum(n for _, n in lines))


def test_all_that_is_wrong_with_a_table_is_told_at_once_with_its_place(dataset: Path, tmp_path: Path):
    index = open_index(dataset)
    name, (first, second, *_) = next(iter(index.group_values.items()))
    table = write(
        tmp_path / "t.csv",
        ("label", name, "share"),
        (index.classes[0], first, "0.5"),
        (index.classes[0], first, "-0.5"),
        ("nothing", first, "half"),
        (index.classes[0], second + "x", "0.1"),
        (index.classes[0], second),
    )
    with pytest.raises(Refusal) as refused:
        read_reference(table, index)
    told = [(fault.where.removeprefix(str(table)), fault.what) for fault in refused.value.faults]
    assert (":3:3", "'-0.5' is no share") in told
    assert (":4:3", "'half' is no share") in told
    assert (":4:1", "no label 'nothing' in the data set") in told
    assert (":5:2", f"no {name} {second + 'x'!r} in the data set") in told
    assert any(where == ":3" and "stands twice" in what for where, what in told)
    assert (":6", "2 cells under 3 columns") in told
    assert refused.value.exit_code == 65


@pytest.mark.parametrize(
    ("header", "line", "said"),
    [
        (("venu", "share"), ("x", 1), "no column 'venu'"),
        (("label",), ("x",), "no share"),
        (("share",), (1,), "describes no attribute"),
        (("label", "share", "count"), ("x", 1, 1), "share and count"),
        (("label", "share"), ("{}", 0.4), "sum to 0.4"),
    ],
)
def test_a_table_that_describes_no_population_is_refused(dataset: Path, tmp_path: Path, header, line, said):
    index = open_index(dataset)
    line = tuple(cell.format(index.classes[0]) if isinstance(cell, str) else cell for cell in line)
    with pytest.raises(Refusal, match=said):
        read_reference(write(tmp_path / "t.csv", header, line), index)


def unknown(index: Index, where: np.ndarray) -> Index:
    """The first group column unknown in these rows, [N]."""
    name, values = next(iter(index.group_values.items()))
    groups = index.groups.copy()
    groups[where, 0] = len(values)
    return replace(
        index, group=tuple(groups.T.astype(np.int32)), group_values={**index.group_values, name: (*values, "Unknown")}
    )


def grown(index: Index, n: int) -> Index:
    """As many rows, drawn from it."""
    rows = np.random.default_rng(3).integers(0, len(index.labels), n)
    return replace(
        index,
        label=index.label[rows],
        group=tuple(values[rows] for values in index.group),
        in_split=index.in_split[rows],
    )


def test_values_that_are_missing_in_one_class_are_told_and_those_missing_anywhere_are_not(dataset: Path):
    index, random = grown(open_index(dataset), 2000), np.random.default_rng(4)
    name = next(iter(index.group_values))
    share = np.where(index.labels == 1, 0.3, 0.05)
    for lacks, told in ((random.random(2000) < share, True), (random.random(2000) < 0.1, False)):
        found = missingness(unknown(index, lacks), {})
        assert found.rows == {name: int(lacks.sum())}
        pair = next(p for p in found.pairs if p.against == "label")
        assert (pair.adjusted <= 0.01) == told
        assert found.patterns[0] == ((name,), int(lacks.sum()))
        if told:
            assert (pair.value, pair.n) == (index.classes[1], int((index.labels == 1).sum()))
            assert pair.share > 0.2 > pair.others


def test_rows_dropped_for_want_of_a_value_count_as_missing(dataset: Path):
    index = open_index(dataset)
    others = tuple(values[0] for values in list(index.group_values.values())[1:])
    found = missingness(index, {(index.classes[0], "(none)", *others): 7, ("(none)", "(none)", *others): 9})
    assert found.rows == {next(iter(index.group_values)): 7}
    assert found.n == len(index.labels) + 7
    assert missingness(index, {}).pairs == []


def test_a_unit_that_stands_in_training_and_test_is_told_with_its_rows(dataset: Path, tmp_path: Path):
    index = open_index(dataset)
    ids = index.ids.to_pylist()
    people = ["ann" if i % 5 == 0 else f"of {index.splits[s]}" for i, s in enumerate(index.split.tolist())]
    table = write(tmp_path / "people.csv", ("path", "person"), *zip(ids, people, strict=True))
    (found,) = divided(index, "train", "person", table)
    assert found.units == len(set(people))
    assert (found.divided, found.listed) == (1, ["ann"])
    for split, rows in found.leaked.items():
        assert rows == (index.split[::5] == index.splits.index(split)).sum() > 0
    assert divided(index, "train") == []


def test_units_of_the_ingest_are_checked_without_asking(dataset: Path):
    index = open_index(dataset)
    whole = replace(index, unit=(index.split + 1).astype(np.uint64))
    cut = replace(index, unit=np.where(np.arange(len(index.split)) % 5 == 0, 99, whole.unit).astype(np.uint64))
    for of, across in ((whole, 0), (cut, 1)):
        (found,) = divided(of, "train")
        assert (found.asked, found.divided) == (True, across)


@pytest.mark.parametrize("content", [[("id", "person")], [("path", "person"), ("elsewhere.png", "ann")]])
def test_a_table_of_units_that_fits_nothing_is_refused(dataset: Path, tmp_path: Path, content):
    with pytest.raises(Refusal, match="units cannot be told"):
        divided(open_index(dataset), "train", "person", write(tmp_path / "p.csv", *content))
    with pytest.raises(Refusal, match="no group column 'person'"):
        divided(open_index(dataset), "train", "person")


def test_an_audit_tells_a_population_that_it_misses_and_units_that_it_divides(dataset: Path):
    index = open_index(dataset)
    name = next(iter(index.group_values))
    found: Audit = audit(
        index, "train", 30, Asked(reference(index, {"nowhere": 0.9, by_venue(index).popitem()[0]: 0.1}), name)
    )
    told = {(f.bias, f.where) for f in findings(found)}
    assert ("selection", name) in told
    assert any(bias == "leakage" for bias, _ in told)
    text = summary(found)
    assert "nowhere" in text
    assert "units stand in several splits" in text


def test_v_has_no_number_where_there_is_one_value():
    told = association(np.array([[3, 4]]))
    assert np.isnan([told.v, told.information, told.told, told.p]).all()
    assert told.n == 7
    assert np.isnan(cramers_v(np.zeros((3, 0), np.int64)))
