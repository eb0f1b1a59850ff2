"""Generations of a data set: rows are added, and nothing that was published changes."""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_loaders import manifest
from data_loaders.faults import Refusal
from data_loaders.index import Index, Reader, open_index
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.loader import Data
from data_loaders.manifest import Manifest
from data_loaders.settings import override
from data_loaders.shards import Shards
from data_loaders.sources.csv_file import Csv
from data_loaders.splits import Splits

Write = Callable[..., Path]
Shoot = Callable[..., Path]


@pytest.fixture
def first(photos: Path, listing_csv: Write, tmp_path: Path) -> Ingest:
    """Settings that append all 40 photos, of which a generation of 24 is there already."""
    lines = lines_of(photos)
    listing_csv(lines[:25], "few.csv")
    few = Csv(path=tmp_path / "few.csv", group_columns=("venue",))
    settings = Ingest(source=few, out=tmp_path / "data", shards=Shards(rows=5))
    ingest(settings, in_processes(1))
    return override(settings, {"append": True, "source.path": str(photos)})


def lines_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def add(settings: Ingest) -> Manifest:
    return ingest(settings, in_processes(1))


def contents(index: Index) -> dict[str, tuple[bytes, str, str, str]]:
    """Id -> image, label, venue and split of every row."""
    reader = Reader(index)
    return {
        name: (
            reader.read(row),
            index.classes[index.labels[row]],
            index.group_values["venue"][index.groups[row, 0]],
            index.splits[index.split[row]],
        )
        for row, name in enumerate(index.ids.to_pylist())
    }


def refused(settings: Ingest) -> Refusal:
    with pytest.raises(Refusal) as refusal:
        add(settings)
    return refusal.value


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_new_rows_come_behind_the_old_ones_which_keep_their_splits(first: Ingest, photos: Path):
    before, was = contents(open_index(first.out)), files(first.out)
    made = add(first)
    index = open_index(first.out)
    after = contents(index)
    assert list(after)[:24] == list(before)
    assert {name: after[name] for name in before} == before
    assert {name: (image, label, venue) for name, (image, label, venue, _) in after.items()} == {
        name: ((photos.parent / name).read_bytes(), label, venue) for name, label, venue, _ in lines_of(photos)[1:]
    }
    now = files(first.out)
    assert {name: now[name] for name in was if name not in {"dataset.json", "rejected.csv"}} == {
        name: content for name, content in was.items() if name not in {"dataset.json", "rejected.csv"}
    }
    assert (made.generation, made.index.rows, made.history[0].rows) == (2, 40, 24)
    assert Counter(made.images) == {"PNG": 40}
    assert sum(rows for classes in made.rows.values() for rows in classes.values()) == 40


def test_every_stratum_of_old_and_new_rows_together_is_within_one_row_of_its_share(first: Ingest):
    for settings in (override(first, {"splits.seed": 5}), first):
        add(settings)
        cells = Counter((label, venue, split) for _, label, venue, split in contents(open_index(first.out)).values())
        for label in ("cat", "dog"):
            for venue in ("home", "street"):
                assert abs(cells[label, venue, "val"] - 1) <= 1
                assert abs(cells[label, venue, "test"] - 1) <= 1
                assert sum(cells[label, venue, split] for split in ("train", "val", "test")) == 10


def test_an_earlier_generation_can_still_be_opened(first: Ingest):
    before = contents(open_index(first.out))
    old = open_index(first.out).fingerprint
    add(first)
    index = Data(path=first.out, generation=1).index()
    assert (index.fingerprint, contents(index)) == (old, before)
    assert Data(path=first.out).index().fingerprint != old
    with pytest.raises(Refusal, match=r"no 3 — it has 1, 2"):
        open_index(first.out, 3)


def test_a_reader_of_the_old_generation_goes_on_while_one_is_added(first: Ingest):
    index = open_index(first.out)
    reader, before = Reader(index), contents(index)
    first_half = {name: reader.read(row) for row, name in enumerate(index.ids.to_pylist()) if row < 12}
    add(first)
    second_half = {name: reader.read(row) for row, name in enumerate(index.ids.to_pylist()) if row >= 12}
    assert first_half | second_half == {name: image for name, (image, *_) in before.items()}


def test_appending_what_is_there_already_changes_nothing(first: Ingest):
    add(first)
    before = files(first.out)
    assert add(first).generation == 2
    assert files(first.out) == before


def test_without_append_a_data_set_is_left_alone(first: Ingest):
    before = files(first.out)
    refusal = refused(override(first, {"append": False}))
    assert refusal.exit_code == 73
    assert "append=true adds rows to it" in str(refusal)
    assert files(first.out) == before


def test_a_known_row_that_changed_is_refused_and_the_old_generation_stays(first: Ingest, photos: Path):
    before = files(first.out)
    lines = photos.read_text().splitlines()
    lines[1], lines[2] = "images/00.png,dog,home,p0", "images/01.png,dog,street,p0"
    photos.write_text("\n".join(lines))
    refusal = refused(first)
    assert [fault.what for fault in refusal.faults] == [
        "'images/00.png' is labelled 'dog' here and 'cat' in the data set",
        "'images/01.png' is in the group street here and home in the data set",
    ]
    assert {name: content for name, content in files(first.out).items() if name in before} | {
        "rejected.csv": b""
    } == before | {"rejected.csv": b""}
    manifest.collect_garbage(first.out)
    assert files(first.out).keys() == before.keys()


def test_a_known_row_that_is_given_another_split_is_refused(photos: Path, listing_csv: Write, tmp_path: Path):
    splits = ["train", "train", "val", "val"] * 10
    lines = [[*line, split] for line, split in zip(lines_of(photos)[1:], splits, strict=True)]
    head = ["path", "label", "venue", "patient", "split"]
    source = Csv(path=listing_csv([head, *lines], "split.csv"), group_columns=("venue",), split_column="split")
    settings = Ingest(source=source, out=tmp_path / "data", append=True)
    add(settings)
    lines[3][4], lines[4][4] = "train", "far"
    listing_csv([head, *lines], "split.csv")
    assert [fault.what for fault in refused(settings).faults] == [
        "'images/03.png' is of the split 'train' here and of 'val' in the data set",
        "'images/04.png' is of the split 'far' here and of 'train' in the data set",
    ]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"source.group_columns": ()}, "has the group columns venue"),
        ({"source.group_columns": ("venue", "patient")}, "has the group columns venue"),
        ({"classes": ("dog", "cat")}, "has the classes cat, dog"),
        ({"source.split_by": "patient"}, "was not divided by units"),
    ],
)
def test_what_does_not_fit_the_data_set_is_refused(first: Ingest, change, what):
    before = files(first.out)
    refusal = refused(override(first, change))
    assert what in str(refusal)
    assert all(fault.fix for fault in refusal.faults)
    assert files(first.out) == before


def test_a_new_class_is_refused_and_a_new_value_of_a_group_is_not(first: Ingest, photos: Path, shoot: Shoot):
    shoot("images/new.png")
    with photos.open("a") as file:
        file.write("images/new.png,bird,home,p0\n")
    assert [fault.what for fault in refused(first).faults] == ["label 'bird' is no class of the data set"]
    photos.write_text(photos.read_text().replace("bird,home", "cat,beach"))
    made = add(first)
    assert made.groups == {"venue": ("home", "street", "beach")}
    assert made.classes == ("cat", "dog")
    index = open_index(first.out)
    assert contents(index)["images/new.png"][1:3] == ("cat", "beach")
    assert contents(open_index(first.out, 1)).items() <= contents(index).items()


def test_a_unit_stays_on_the_side_where_it_was(photos: Path, listing_csv: Write, tmp_path: Path):
    lines = lines_of(photos)
    even = [lines[0], *(line for i, line in enumerate(lines[1:]) if i % 4 < 2)]  # half of every patient
    source = Csv(path=listing_csv(even, "even.csv"), group_columns=("venue",), split_by="patient")
    settings = Ingest(source=source, out=tmp_path / "data", splits=Splits(val=0.2, test=0.2))
    add(settings)
    made = add(override(settings, {"append": True, "source.path": str(photos)}))
    assert (made.generation, made.index.rows) == (2, 40)
    patient = {line[0]: line[3] for line in lines[1:]}
    sides = {(patient[name], split) for name, (*_, split) in contents(open_index(tmp_path / "data")).items()}
    assert max(Counter(p for p, _ in sides).values()) == 1
    assert {split for _, split in sides} == {"train", "val", "test"}


@pytest.mark.parametrize("split_by", [None, "venue"])
def test_rows_are_not_added_by_another_unit_than_the_data_set_was_divided_by(photos: Path, tmp_path: Path, split_by):
    source = Csv(path=photos, group_columns=("venue",), split_by="patient")
    settings = Ingest(source=source, out=tmp_path / "data", append=True)
    add(settings)
    refusal = refused(settings.model_copy(update={"source": source.model_copy(update={"split_by": split_by})}))
    assert "was divided by 'patient' — set source.split_by=patient" in str(refusal)


def test_a_given_split_that_would_divide_a_unit_of_the_data_set_is_refused(
    photos: Path, listing_csv: Write, tmp_path: Path
):
    source = Csv(path=photos, group_columns=("venue",), split_by="patient")
    settings = Ingest(source=source, out=tmp_path / "data", splits=Splits(val=0.2, test=0.2), append=True)
    add(settings)
    far = listing_csv([("path", "label", "venue", "patient"), ("images/x.png", "cat", "home", "p3")], "far.csv")
    held_out = source.model_copy(update={"held_out": {"far": (str(far),)}})
    (fault,) = refused(settings.model_copy(update={"source": held_out})).faults
    assert fault.where == f"{far}:2"
    assert "'p3' has rows in the split" in fault.what
    assert "in the data set" in fault.what


def test_each_generation_says_which_rows_its_ingest_dropped(first: Ingest, photos: Path):
    (photos.parent / "images/30.png").write_bytes(b"broken")
    add(override(first, {"rejects.allow": 0.1}))
    assert manifest.read(first.out).rejected.by_cell == ((("cat", "street"), 1),)
    (photos.parent / "images/30.png").write_bytes((photos.parent / "images/33.png").read_bytes())
    made = add(first)
    assert (made.generation, made.index.rows, made.rejected.rows) == (3, 40, 0)


def test_a_bad_row_that_is_listed_again_weighs_as_much_as_it_did_at_first(first: Ingest, photos: Path, shoot: Shoot):
    """The rows that are there already count as kept, of which the bad ones are a share as even as ever."""
    for i in (24, 25, 26, 27):
        (photos.parent / f"images/{i}.png").write_bytes(b"broken")
    settings = override(first, {"rejects.allow": 0.1})
    add(settings)
    for i in range(6):
        shoot(f"images/new-{i}.png")
    with photos.open("a") as file:
        file.writelines(f"images/new-{i}.png,cat,home,p0\n" for i in range(6))
    made = add(settings)
    assert (made.generation, made.index.rows, made.rejected.rows) == (3, 42, 4)


def test_rows_appended_at_once_or_one_after_the_other_are_the_same_rows(
    first: Ingest, photos: Path, listing_csv: Write, tmp_path: Path
):
    def rows(path: Path) -> Sequence[tuple[str, tuple[bytes, str, str]]]:
        return sorted((name, row[:3]) for name, row in contents(open_index(path)).items())

    add(first)
    ingest(override(first, {"append": False, "out": tmp_path / "whole"}), in_processes(1))
    assert rows(first.out) == rows(tmp_path / "whole")
