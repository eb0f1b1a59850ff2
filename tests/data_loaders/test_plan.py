"""What is found only by comparing all rows."""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import planned

from data_loaders import plan
from data_loaders.faults import Fault, Refusal
from data_loaders.rejects import write_rejected
from data_loaders.sources.rows import Rejected, Row
from data_loaders.splits import Splits


def row(where: str, name: str, label: str = "food", split: str = "", unit: str = "") -> Row:
    return Row(where, name, label, (), split, unit)


def test_rows_listed_twice_are_told_with_the_place_of_the_first():
    names = [("a.jpg", "food"), ("b.jpg", "food"), ("a.jpg", "food"), ("b.jpg", "drink"), ("c.jpg", "drink")]
    good, bad = planned(Splits(), [row(f"l:{n}", name, label) for n, (name, label) in enumerate(names, 2)])
    assert [r.id for r in good] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [fault[:2] for fault in bad] == [
        ("l:4", "'a.jpg' is listed already at l:2"),
        ("l:5", "'b.jpg' is labelled 'drink' here and 'food' at l:3"),
    ]


def test_labels_that_differ_only_in_case_or_spaces_are_told_the_usual_spelling():
    labels = ["Hot dog", "hot  dog", "Hot dog", "HOT DOG", "Straße", "STRASSE", "Straße", "cat"]
    good, bad = planned(Splits(), [row(f"l:{i}", str(i), label) for i, label in enumerate(labels)])
    assert [r.label for r in good] == ["Hot dog", "Hot dog", "Straße", "Straße", "cat"]
    assert [fault[:2] for fault in bad] == [
        ("l:1", "label 'hot  dog' differs from 'Hot dog' only in case or spaces"),
        ("l:3", "label 'HOT DOG' differs from 'Hot dog' only in case or spaces"),
        ("l:5", "label 'STRASSE' differs from 'Straße' only in case or spaces"),
    ]


def test_a_class_that_is_given_says_how_its_label_is_spelled():
    _, bad = planned(Splits(), [row(f"l:{i}", str(i), "Cat") for i in range(5)], ("cat", "dog"))
    assert {fault.what for fault in bad} == {"label 'Cat' differs from 'cat' only in case or spaces"}


def test_classes_that_differ_only_in_case_are_kept_where_they_are_given():
    rows = [row(f"l:{i}", str(i), "aA"[i % 2]) for i in range(6)]
    assert planned(Splits(), rows, ("a", "A"))[1] == []


def test_a_column_of_ids_is_not_taken_for_labels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "STRATA", 50)
    with pytest.raises(Refusal, match=r"is source\.label_column right"):
        planned(Splits(), [row(f"l:{i}", str(i), str(i)) for i in range(60)])


def test_a_unit_on_both_sides_of_a_held_out_split_is_rejected_on_the_drawn_side():
    rows = [
        row("l:1", "1", unit="p1"),
        row("l:2", "2", unit="p2"),
        row("l:3", "3", unit=""),
        row("t:1", "4", split="test", unit="p1"),
        row("t:2", "5", split="test", unit="p1"),
        row("t:3", "6", split="test"),
        row("u:1", "7", split="far", unit="p1"),
    ]
    good, bad = planned(Splits(), rows)
    assert [r.id for r in good] == ["2", "3", "4", "5", "6"]
    assert [fault[:2] for fault in bad] == [
        ("l:1", "'p1' has rows in the split 'test' too, at t:1"),
        ("u:1", "'p1' has rows in the split 'test' too, at t:1"),
    ]


def test_a_nul_in_a_text_is_told_since_it_ends_the_texts_of_a_checksum():
    odd = [row("l:1", "a\0b"), row("l:2", "c", "fo\0od"), Row("l:3", "d", "food", ("x\0",)), row("l:4", "e")]
    good, bad = planned(Splits(), [r._replace(groups=r.groups or ("x",)) for r in odd])
    assert [r.id for r in good] == ["e"]
    assert [fault.where for fault in bad] == ["l:1", "l:2", "l:3"]


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab")), max_size=80))
def test_twins_are_those_that_a_dictionary_finds(drawn):
    rows = [row(f"l:{n}", str(name), label) for n, (name, label) in enumerate(drawn)]
    first: dict[str, Row] = {}
    for r in rows:
        first.setdefault(r.id, r)
    good, bad = planned(Splits(), rows)
    assert [r._replace(split="") for r in good] == list(first.values())
    assert [fault.where for fault in bad] == [r.where for r in rows if first[r.id] is not r]


def test_rows_of_many_batches_are_compared_as_those_of_one(monkeypatch: pytest.MonkeyPatch):
    rows = [row(f"l:{n}", str(n * n % 9973), "ab"[n % 2]) for n in range(9000)]
    whole = planned(Splits(val=0.2), rows)
    assert len(whole[1]) > 500
    monkeypatch.setattr(plan, "BATCH", 70)
    monkeypatch.setattr(plan, "IN_MEMORY", 500)
    assert planned(Splits(val=0.2), rows) == whole


def test_two_ids_with_one_hash_are_not_taken_for_twins(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Splits, "place", lambda self, name: len(name))
    good, bad = planned(Splits(), [row("l:1", "a"), row("l:2", "b"), row("l:3", "a")])
    assert [r.id for r in good] == ["a", "b"]
    assert [fault[:2] for fault in bad] == [("l:3", "'a' is listed already at l:1")]


def test_rejected_rows_are_a_csv_that_reads_back(tmp_path: Path):
    odd = Row("l.csv:2", 'a,"b"\n.jpg', "thé", ("home",))
    write_rejected(tmp_path / "rejected.csv", [Rejected(odd, Fault("l.csv:2:1", "no label", "fill"))])
    with (tmp_path / "rejected.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["where", "reason", "fix", "id", "label"],
            ["l.csv:2:1", "no label", "fill", 'a,"b"\n.jpg', "thé", "home"],
        ]
