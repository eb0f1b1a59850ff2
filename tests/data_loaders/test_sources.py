import codecs
import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.folder import Folder
from data_loaders.sources.rows import (
    Listing,
    Rejected,
    Row,
    inside,
    without_divided_units,
    without_twins,
    write_rejected,
)


def listed(tmp_path: Path, content: str | bytes, **settings) -> Listing:
    path = tmp_path / "labels.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Csv(path=path, **settings).listing()


def faults(tmp_path: Path, content: str | bytes, **settings) -> list[Fault]:
    with pytest.raises(Refusal) as refusal:
        listed(tmp_path, content, **settings)
    assert refusal.value.exit_code == 65
    return refusal.value.faults


def rejected(listing: Listing) -> dict[str, str]:
    """file:line:column, without the folder, -> reason."""
    return {Path(fault.where).name: fault.what for _, fault in listing.rejected}


def test_a_row_has_its_place_file_label_groups_and_unit(tmp_path: Path):
    text = "id,path,label,venue,camera,patient\n1,a/b.jpg, food ,home,phone,p1\n"
    (row,) = listed(tmp_path, text, group_columns=("camera", "venue"), split_by="patient").rows
    where, file = f"{tmp_path / 'labels.csv'}:2", str((tmp_path / "a/b.jpg").resolve())
    assert row == Row(where, file, "a/b.jpg", "food", ("phone", "home"), "", "p1")


def test_columns_that_are_not_named_are_ignored_whatever_they_hold(tmp_path: Path):
    rows = listed(tmp_path, 'split,x,x,path,label,\n,,"a\nb",a.jpg,food,\n').rows
    assert [(row.path, row.label, row.split, row.groups) for row in rows] == [("a.jpg", "food", "", ())]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_byte_order_mark_and_any_line_end_are_read(tmp_path: Path, newline, mark, end):
    text = "path,label\na.jpg,food\n\nb.jpg,düm" + end
    rows = listed(tmp_path, mark + text.replace("\n", newline).encode()).rows
    assert [(row.path, row.label, row.where[-1]) for row in rows] == [("a.jpg", "food", "2"), ("b.jpg", "düm", "4")]


def test_quoted_commas_quotes_and_newlines_are_read_and_lines_are_those_of_the_file(tmp_path: Path):
    text = 'label,path,note\n"a, ""b""",1.jpg,"two\nlines"\nc,2.jpg\nd,3.jpg,\n'
    listing = listed(tmp_path, text)
    assert [(row.label, row.path, row.where.rpartition(":")[2]) for row in listing.rows] == [
        ('a, "b"', "1.jpg", "2"),
        ("d", "3.jpg", "5"),
    ]
    assert rejected(listing) == {"labels.csv:4": "2 cells under 3 columns"}


def test_spaces_around_cells_and_column_names_do_not_count(tmp_path: Path):
    rows = listed(tmp_path, "path , label, venue\n a.jpg , food , home \n", group_columns=("venue",)).rows
    assert [(row.path, row.label, row.groups) for row in rows] == [("a.jpg", "food", ("home",))]


def test_every_missing_or_repeated_column_is_told_at_once(tmp_path: Path):
    found = faults(tmp_path, "path,Label,venue,venue\n", group_columns=("venue", "camera"), split_by="patient")
    assert [fault.what for fault in found] == [
        "column 'label' stands 0 times",
        "column 'venue' stands 2 times",
        "column 'camera' stands 0 times",
        "column 'patient' stands 0 times",
    ]
    assert {fault.where for fault in found} == {f"{tmp_path / 'labels.csv'}:1"}
    assert all("path, Label, venue, venue" in fault.fix for fault in found)


@pytest.mark.parametrize("content", ["", "\n", codecs.BOM_UTF8, "\n\npath,label\n"])
def test_an_empty_file_is_told_to_begin_with_a_header(tmp_path: Path, content):
    found = faults(tmp_path, content)
    assert [fault.what for fault in found] == ["column 'path' stands 0 times", "column 'label' stands 0 times"]
    assert all("begin the file" in fault.fix for fault in found)


def test_only_a_header_is_no_rows(tmp_path: Path):
    listing = listed(tmp_path, "path,label\n")
    assert listing.rows == listing.rejected == []


def test_every_bad_row_is_listed_with_line_column_and_reason(tmp_path: Path):
    text = (
        "path,label,venue\n"
        "a.jpg,food,home\n"
        "b.jpg,,home\n"
        ",food,home\n"
        "c.jpg, ,\n"
        "d.jpg,food\n"
        "e.jpg,food,home,more\n"
        "../f.jpg,food,home\n"
        "/etc/passwd,food,home\n"
        "   \n"
        "g.jpg,food,home\n"
    )
    listing = listed(tmp_path, text, group_columns=("venue",))
    assert [row.path for row in listing.rows] == ["a.jpg", "g.jpg"]
    assert rejected(listing) == {
        "labels.csv:3:2": "no label",
        "labels.csv:4:1": "no path",
        "labels.csv:5:2": "no label and no venue",
        "labels.csv:6": "2 cells under 3 columns",
        "labels.csv:7": "4 cells under 3 columns",
        "labels.csv:8:1": f"'../f.jpg' is outside of {tmp_path}",
        "labels.csv:9:1": f"'/etc/passwd' is outside of {tmp_path}",
        "labels.csv:10": "1 cells under 3 columns",
    }
    assert all(fault.fix for _, fault in listing.rejected)


def test_a_file_that_is_not_utf8_is_refused_with_its_first_such_line(tmp_path: Path):
    lines = ["path,label", *(f"{i}.jpg,food" for i in range(5_000)), "a.jpg,crème", "b.jpg,thé"]
    (fault,) = faults(tmp_path, "\n".join(lines).encode("latin-1"))
    assert fault == Fault(f"{tmp_path / 'labels.csv'}:5002", "is not UTF-8", "save the file as UTF-8 CSV")
    (fault,) = faults(tmp_path, "path,label\n".encode("utf-16"))
    assert fault.where.endswith("labels.csv:1")


@pytest.mark.parametrize("line", ['"a.jpg"x,food', 'a.jpg,"food', "a.jpg," + '"' + "x" * 200_000 + '"'])
def test_a_stray_quote_is_refused_where_it_begins_since_it_would_swallow_rows(tmp_path: Path, line):
    (fault,) = faults(tmp_path, f'path,label\nz.jpg,"fo\nod"\n{line}\nb.jpg,food\n')
    assert fault.where == f"{tmp_path / 'labels.csv'}:4"
    assert fault.what.startswith("is not CSV: ")


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path):
    for path, reason in ((tmp_path / "missing.csv", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(Refusal, match=f"{path}: cannot be read: {reason}"):
            Csv(path=path).listing()


def test_what_is_wrong_with_several_csv_files_is_told_at_once(tmp_path: Path):
    (tmp_path / "test.csv").write_text("path\n")
    found = faults(tmp_path, "label\n", held_out={"test": tmp_path / "test.csv", "far": tmp_path / "far.csv"})
    assert [Path(fault.where).name for fault in found] == ["labels.csv:1", "test.csv:1", "far.csv"]


def test_held_out_files_are_splits_relative_to_their_own_folder(tmp_path: Path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/test.csv").write_text("path,label\na.jpg,drink\n")
    text = "path,label,fold\na.jpg,food,train\n"
    rows = listed(tmp_path, text, split_column="fold", held_out={"test": tmp_path / "far/test.csv"}).rows
    assert [(row.split, row.label, row.file) for row in rows] == [
        ("train", "food", str((tmp_path / "a.jpg").resolve())),
        ("test", "drink", str((tmp_path / "far/a.jpg").resolve())),
    ]


@pytest.mark.parametrize("split", ["../../up", "a/b", ".hidden", "a b", "x" * 41, "a\0b", "-", "a\nb"])
def test_a_split_that_could_not_name_a_file_is_rejected(tmp_path: Path, split):
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "fold", "label"), ("a.jpg", split, "food"), ("b.jpg", "train-1", "food")])
    listing = Csv(path=tmp_path / "labels.csv", split_column="fold").listing()
    assert [row.split for row in listing.rows] == ["train-1"]
    assert rejected(listing) == {"labels.csv:2:2": f"{split!r} cannot name a split"}
    with pytest.raises(ValidationError, match="should match pattern"):
        Csv(path=Path("a"), held_out={split: Path("b")})
    with pytest.raises(ValidationError, match="should match pattern"):
        Folder(path=Path("a"), splits=(split,))


@pytest.mark.parametrize("names", [("id",), ("image",), ("label",), ("crc32c",), ("",), ("venue", "venue")])
def test_group_columns_that_the_shards_could_not_tell_apart_are_refused(names):
    with pytest.raises(ValidationError, match="a group column stands once"):
        Csv(path=Path("a"), group_columns=names)


def test_rows_to_predict_need_only_a_path(tmp_path: Path):
    (tmp_path / "a.csv").write_text("path\na.jpg\n../b.jpg\n")
    source = Csv(path=tmp_path / "a.csv", group_columns=("venue",), split_column="split")
    listing = source.listing(labelled=False)
    assert [(row.path, row.label, row.groups, row.split) for row in listing.rows] == [("a.jpg", "", (), "")]
    assert len(listing.rejected) == 1


@pytest.mark.parametrize(
    "path", ["../a", "b/../../a", "/etc/passwd", "out/a", "link.jpg", "chain.jpg", "nul\0.jpg", ".."]
)
def test_no_path_leads_out_of_the_root(tmp_path: Path, path):
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path)
    (tmp_path / "a").write_bytes(b"secret")
    (root / "link.jpg").symlink_to("../a")
    (root / "chain.jpg").symlink_to("link.jpg")
    assert inside(root, path) is None


def test_paths_that_stay_in_the_root_are_followed(tmp_path: Path):
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"1")
    (root / "link.jpg").symlink_to("b/../a.jpg")
    (tmp_path / "way").symlink_to(root)
    for base in (root, tmp_path / "way"):
        for path in ("a.jpg", "b/../a.jpg", "link.jpg", str(root / "a.jpg"), "./a.jpg"):
            assert inside(base, path) == (root / "a.jpg").resolve()


def test_a_name_that_only_begins_like_the_root_is_outside(tmp_path: Path):
    (tmp_path / "root").mkdir()
    assert inside(tmp_path / "root", "../rootkit/a.jpg") is None


def test_links_in_a_circle_are_no_crash(tmp_path: Path):
    (tmp_path / "a.jpg").symlink_to("b.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    (row,) = listed(tmp_path, "path,label\na.jpg,food\n").rows
    with pytest.raises(OSError, match="symbolic links"):
        os.stat(row.file)


def row(where: str, file: str, label: str = "food", split: str = "", unit: str = "") -> Row:
    return Row(where, file, file, label, (), split, unit)


def test_rows_listed_twice_are_told_with_the_place_of_the_first(tmp_path: Path):
    listing = without_twins(
        listed(tmp_path, "path,label\na.jpg,food\nb.jpg,food\n./a.jpg,food\nb.jpg,drink\nc.jpg,drink\n")
    )
    first = f"{tmp_path / 'labels.csv'}"
    assert [r.path for r in listing.rows] == ["a.jpg", "b.jpg", "c.jpg"]
    assert rejected(listing) == {
        "labels.csv:4": f"'./a.jpg' is listed already at {first}:2",
        "labels.csv:5": f"'b.jpg' is labelled 'drink' here and 'food' at {first}:3",
    }


def test_two_links_to_one_image_are_one_image(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    listing = without_twins(listed(tmp_path, "path,label\na.jpg,food\nb.jpg,food\n"))
    assert [r.path for r in listing.rows] == ["a.jpg"]


def test_labels_that_differ_only_in_case_or_spaces_are_told_the_usual_spelling():
    labels = ["Hot dog", "hot  dog", "Hot dog", "HOT DOG", "Straße", "STRASSE", "Straße", "cat"]
    listing = without_twins(Listing((), [row(f"l:{i}", str(i), label) for i, label in enumerate(labels)]))
    assert [r.label for r in listing.rows] == ["Hot dog", "Hot dog", "Straße", "Straße", "cat"]
    assert [(fault.where, fault.what) for _, fault in listing.rejected] == [
        ("l:1", "label 'hot  dog' differs from 'Hot dog' only in case or spaces"),
        ("l:3", "label 'HOT DOG' differs from 'Hot dog' only in case or spaces"),
        ("l:5", "label 'STRASSE' differs from 'Straße' only in case or spaces"),
    ]


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
    listing = without_divided_units(Listing((), rows))
    assert [r.file for r in listing.rows] == ["2", "3", "4", "5", "6"]
    assert [(fault.where, fault.what) for _, fault in listing.rejected] == [
        ("l:1", "'p1' has rows in the split 'test' too, at t:1"),
        ("u:1", "'p1' has rows in the split 'test' too, at t:1"),
    ]


def test_rejected_rows_are_a_csv_that_reads_back(tmp_path: Path):
    odd = Row("l.csv:2", "f", 'a,"b"\n.jpg', "thé", ("home",))
    write_rejected(tmp_path / "rejected.csv", [Rejected(odd, Fault("l.csv:2:1", "no label", "fill"))], ("venue",))
    with (tmp_path / "rejected.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["where", "reason", "fix", "path", "label", "venue"],
            ["l.csv:2:1", "no label", "fill", 'a,"b"\n.jpg', "thé", "home"],
        ]


def test_a_folder_of_classes_is_listed_in_order(tmp_path: Path, shoot: Callable[..., Path]):
    for name in ("dog/b.png", "cat/deep/er/c.JPG", "cat/a.webp", "dog/.hidden.png", ".git/x.png", "dog/a.jpeg"):
        shoot(name)
    listing = Folder(path=tmp_path).listing()
    assert [(r.path, r.label, r.split) for r in listing.rows] == [
        ("cat/a.webp", "cat", ""),
        ("cat/deep/er/c.JPG", "cat", ""),
        ("dog/a.jpeg", "dog", ""),
        ("dog/b.png", "dog", ""),
    ]
    assert listing.rejected == []
    assert [r.label for r in Folder(path=tmp_path).listing(labelled=False).rows] == [""] * 4


def test_a_folder_of_splits_gives_each_row_its_split(tmp_path: Path, shoot: Callable[..., Path]):
    for name in ("train/cat/a.png", "val/dog/b.png", "more/cat/c.png", "val/d.png"):
        shoot(name)
    listing = Folder(path=tmp_path, splits=("train", "val")).listing()
    assert [(r.split, r.label) for r in listing.rows] == [("train", "cat"), ("val", "dog")]
    assert rejected(listing) == dict.fromkeys(["c.png", "d.png"], "lies in no folder of a class")


def test_everything_in_a_folder_that_is_no_image_of_a_class_is_rejected_with_its_reason(
    tmp_path: Path, shoot: Callable[..., Path]
):
    root = tmp_path / "root"
    shoot("root/cat/good.png")
    shoot("root/lost.png")
    shoot("secret.png")
    shoot("elsewhere/a.png")
    (root / "cat/notes.txt").write_text("x")
    (root / "cat/leak.png").symlink_to(tmp_path / "secret.png")
    (root / "cat/inner").symlink_to(root / "cat")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat/loop.png").symlink_to("loop.png")
    (root / "cat/broken.png").symlink_to("nothing.png")
    os.mkfifo(root / "cat/pipe.png")
    (root / os.fsdecode(b"cat/caf\xe9.png")).write_bytes(b"1")
    listing = Folder(path=root).listing()
    # What cannot be opened is for the shard's writer to say.
    assert [r.path for r in listing.rows] == ["cat/broken.png", "cat/good.png", "cat/loop.png", "cat/pipe.png"]
    assert rejected(listing) == {
        "lost.png": "lies in no folder of a class",
        "notes.txt": "is not a .jpg, .png or .webp file",
        "leak.png": "links to a file outside of the folder",
        "inner": "links to another folder",
        "dog": "links to a file outside of the folder",
        "caf\\xe9.png": "its name is not UTF-8",
    }
    write_rejected(tmp_path / "rejected.csv", listing.rejected)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(Refusal, match="is not a folder"):
            Folder(path=path).listing()
