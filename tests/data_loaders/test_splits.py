from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import planned
from pydantic import ValidationError

from data_loaders.sources.rows import Row
from data_loaders.splits import TRAIN, Splits

shares = st.sampled_from([0.0, 0.01, 0.1, 0.15, 0.25, 0.33, 0.45, 0.49]) | st.floats(0, 0.49)
drawn_splits = st.builds(Splits, val=shares, test=shares, seed=st.integers(0, 9))
strata_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30) | st.lists(st.just(1), min_size=1, max_size=200)


def draw(splits: Splits, rows: list[Row]) -> list[Row]:
    """What ingest makes of good rows."""
    drawn, rejected = planned(splits, rows)
    assert rejected == []
    return drawn


def counts(rows: list[Row]) -> dict[str, int]:
    """Rows of each split, in the order of first appearance."""
    return dict(Counter(row.split for row in rows))


def rows_of(sizes: list[int]) -> list[Row]:
    """Strata of these sizes, made of a label and a group."""
    return [
        Row(f"l:{i}", f"{s}-{i}", f"class {s // 2}", (f"group {s % 2}",))
        for s, size in enumerate(sizes)
        for i in range(size)
    ]


def share_of(splits: Splits) -> dict[str, float]:
    return {"val": splits.val, "test": splits.test, TRAIN: 1 - splits.val - splits.test}


@given(drawn_splits, strata_sizes)
def test_every_stratum_and_the_whole_are_within_one_row_of_their_shares(splits, sizes):
    rows = rows_of(sizes)
    drawn = draw(splits, rows)
    assert [row._replace(split="") for row in drawn] == rows
    cells = Counter((row.label, row.groups, row.split) for row in drawn)
    for split, share in share_of(splits).items():
        for (label, groups), size in Counter((row.label, row.groups) for row in rows).items():
            assert abs(cells[label, groups, split] - share * size) < 1 + 1e-6
        assert abs(counts(drawn).get(split, 0) - share * len(rows)) < 1 + 1e-6
    assert set(counts(drawn)) <= share_of(splits).keys()


def test_rare_strata_reach_every_split():
    drawn = draw(Splits(val=0.1, test=0.1), rows_of([1] * 100))
    assert Counter(row.split for row in drawn) == Counter(train=80, val=10, test=10)


@given(drawn_splits, st.lists(st.integers(1, 6), min_size=1, max_size=12), st.data())
def test_the_order_of_the_file_does_not_change_the_split_of_a_row(splits, sizes, data):
    units = data.draw(st.lists(st.sampled_from(["", "p1", "p2", "p3", "p4"]), min_size=sum(sizes), max_size=sum(sizes)))
    rows = [row._replace(unit=unit) for row, unit in zip(rows_of(sizes), units, strict=True)]
    shuffled = data.draw(st.permutations(rows))
    assert {r.id: r.split for r in draw(splits, rows)} == {r.id: r.split for r in draw(splits, shuffled)}


def test_another_seed_draws_other_rows_and_the_same_seed_the_same():
    rows = rows_of([40, 40])
    assert draw(Splits(seed=1), rows) == draw(Splits(seed=1), rows) != draw(Splits(seed=2), rows)


@given(drawn_splits, st.lists(st.sampled_from(["", "test", "train", "fold-7"]), max_size=60))
def test_given_splits_are_kept_and_nothing_is_drawn_for_them(splits, given_splits):
    rows = [row._replace(split=split) for row, split in zip(rows_of([30, 30]), given_splits, strict=False)]
    drawn = draw(splits, rows)
    for row, now in zip(rows, drawn, strict=True):
        assert row.split in {now.split, ""}
        assert now.split
    fresh = Counter(now.split for row, now in zip(rows, drawn, strict=True) if not row.split)
    assert "test" not in fresh or "test" not in given_splits
    assert "fold-7" not in fresh


@given(drawn_splits, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=80))
def test_units_are_never_divided(splits, drawn_rows):
    rows = [
        Row(f"l:{i}", str(i), f"class {label}", (), "", f"p{unit}" if unit else "")
        for i, (label, unit) in enumerate(drawn_rows)
    ]
    where: dict[str, set[str]] = defaultdict(set)
    for row in draw(splits, rows):
        assert row.split in share_of(splits)
        assert row.split not in {name for name, share in share_of(splits).items() if share == 0}
        where[row.unit].add(row.split)
    assert all(len(found) == 1 for unit, found in where.items() if unit)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_shares_are_honoured_with_whole_units(seed, largest):
    """60 units of up to `largest` rows, each of one class."""
    sizes = [1 + (seed * 7 + u * u) % largest for u in range(60)]
    rows = [Row("", f"{u}-{i}", f"class {u % 2}", (), "", f"p{u}") for u, size in enumerate(sizes) for i in range(size)]
    splits = Splits(val=0.2, test=0.3, seed=seed)
    cells = Counter((row.label, row.split) for row in draw(splits, rows))
    for label, total in Counter(row.label for row in rows).items():
        for split, share in share_of(splits).items():
            assert abs(cells[label, split] - share * total) <= largest


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (0.9, 0.2)])
def test_shares_that_leave_nothing_to_train_on_are_refused(val, test):
    with pytest.raises(ValidationError, match="leaves no row to train on"):
        Splits(val=val, test=test)


def test_no_rows_are_no_splits():
    assert draw(Splits(), []) == []
    assert counts([]) == {}
