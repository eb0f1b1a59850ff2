import bz2
import codecs
import csv
import gzip
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings, dump, parse, parse_text
from data_loaders.sources import AnySource
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.demo import Demo
from data_loaders.sources.folder import Folder
from data_loaders.sources.places import Root
from data_loaders.sources.rows import Rejected, Row, Source, Unreadable


class Listed(NamedTuple):
    rows: list[Row]
    rejected: list[Rejected]


def all_of(source: Source, labelled: bool = True) -> Listed:
    found = list(source.rows(labelled))
    return Listed([r for r in found if isinstance(r, Row)], [r for r in found if isinstance(r, Rejected)])


def listed(tmp_path: Path, content: str | bytes, **settings) -> Listed:
    path = tmp_path / "labels.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return all_of(Csv(path=path, **settings))


def contents(source: Source) -> dict[str, bytes | str]:
    """Id -> bytes, or why there are none."""
    found: dict[str, bytes | str] = {}
    with source.reader() as read:
        for row in all_of(source).rows:
            try:
                found[row.id] = read(row)
            except (OSError, Unreadable) as wrong:
                found[row.id] = str(getattr(wrong, "strerror", None) or wrong)
    return found


def faults(tmp_path: Path, content: str | bytes, **settings) -> list[Fault]:
    with pytest.raises(Refusal) as refusal:
        listed(tmp_path, content, **settings)
    assert refusal.value.exit_code == 65
    return refusal.value.faults


def rejected(listing: Listed) -> dict[str, str]:
    """file:line:column, without the folder, -> reason."""
    return {Path(fault.where).name: fault.what for _, fault in listing.rejected}


def test_a_folder_of_splits_is_not_taken_for_one_of_classes(tmp_path: Path, shoot):
    for split in ("train", "val"):
        shoot(f"images/{split}/cat/{split}.png")
    with pytest.raises(Refusal, match=r"holds train, val, and no classes — set source.splits=\[train,val\]"):
        list(Folder(path=tmp_path / "images").rows())
    assert len(list(Folder(path=tmp_path / "images", splits=("train", "val")).rows())) == 2
    assert len(list(Folder(path=tmp_path / "images").rows(labelled=False))) == 2


def test_a_split_is_named_in_ascii(tmp_path: Path):
    text = "path,label,split\na.jpg,food,x\N{SUPERSCRIPT TWO}\nb.jpg,food,x2\n"
    found = listed(tmp_path, text, split_column="split")
    assert [row.split for row in found.rows] == ["x2"]
    assert rejected(found) == {"labels.csv:2:3": "'x\N{SUPERSCRIPT TWO}' cannot name a split"}


def test_the_file_of_a_row_is_its_image(tmp_path: Path, shoot):
    for name in ("a/cat/1.png", "b/cat/2.png"):
        shoot(f"images/{name}")
    for part, name in (("a", "cat/1.png"), ("b", "cat/2.png")):
        (tmp_path / f"images/{part}/l.csv").write_text(f"path,label\n{name},cat\n")
    here = tmp_path / "images"
    expected = [str(here / "a/cat/1.png"), str(here / "b/cat/2.png")]
    one = Csv(path=str(here / "[a]/l.csv"))
    several = Csv(path=str(here / "*/l.csv"))
    below = Csv(path=str(here / "*/l.csv"), root=tmp_path)
    folder = Folder(path=here, splits=("a", "b"))
    assert [one.file_of(row) for row in all_of(one).rows] == expected[:1]
    assert [several.file_of(row) for row in all_of(several).rows] == expected
    assert [below.file_of(row) for row in all_of(below).rows] == [
        str(tmp_path / "cat/1.png"),
        str(tmp_path / "cat/2.png"),
    ]
    assert [folder.file_of(row) for row in all_of(folder).rows] == expected
    (here / "a/l.csv").unlink()
    assert [several.file_of(row) for row in all_of(several).rows] == expected[1:]
    demo = Demo(folder=tmp_path / "demo", images=30, size=16)
    files = [demo.file_of(row) or "" for row in all_of(demo).rows]
    assert len(set(files)) == 30
    assert all(map(os.path.isfile, files))


def test_a_row_has_its_place_file_label_groups_and_unit(tmp_path: Path):
    text = "id,path,label,venue,camera,patient\n1,a/b.jpg, food ,home,phone,p1\n"
    (row,) = listed(tmp_path, text, group_columns=("camera", "venue"), split_by="patient").rows
    where = f"{tmp_path / 'labels.csv'}:2"
    assert row == Row(where, "a/b.jpg", "food", ("phone", "home"), "", "p1")


def test_columns_that_are_not_named_are_ignored_whatever_they_hold(tmp_path: Path):
    rows = listed(tmp_path, 'split,x,x,path,label,\n,,"a\nb",a.jpg,food,\n').rows
    assert [(row.id, row.label, row.split, row.groups) for row in rows] == [("a.jpg", "food", "", ())]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_byte_order_mark_and_any_line_end_are_read(tmp_path: Path, newline, mark, end):
    text = "path,label\na.jpg,food\n\nb.jpg,düm" + end
    rows = listed(tmp_path, mark + text.replace("\n", newline).encode()).rows
    assert [(row.id, row.label, row.where[-1]) for row in rows] == [("a.jpg", "food", "2"), ("b.jpg", "düm", "4")]


def test_quoted_commas_quotes_and_newlines_are_read_and_lines_are_those_of_the_file(tmp_path: Path):
    text = 'label,path,note\n"a, ""b""",1.jpg,"two\nlines"\nc,2.jpg\nd,3.jpg,\n'
    listing = listed(tmp_path, text)
    assert [(row.label, row.id, row.where.rpartition(":")[2]) for row in listing.rows] == [
        ('a, "b"', "1.jpg", "2"),
        ("d", "3.jpg", "5"),
    ]
    assert rejected(listing) == {"labels.csv:4": "2 cells under 3 columns"}


def test_spaces_around_cells_and_column_names_do_not_count(tmp_path: Path):
    rows = listed(tmp_path, "path , label, venue\n a.jpg , food , home \n", group_columns=("venue",)).rows
    assert [(row.id, row.label, row.groups) for row in rows] == [("a.jpg", "food", ("home",))]


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
    assert [row.id for row in listing.rows] == ["a.jpg", "g.jpg"]
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
            all_of(Csv(path=path))


def test_what_is_wrong_with_several_csv_files_is_told_at_once(tmp_path: Path):
    (tmp_path / "test.csv").write_text("path\n")
    found = faults(tmp_path, "label\n", held_out={"test": tmp_path / "test.csv", "far": tmp_path / "far.csv"})
    assert [Path(fault.where).name for fault in found] == ["labels.csv:1", "test.csv:1", "far.csv"]


def test_held_out_files_are_splits_relative_to_their_own_folder(tmp_path: Path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/test.csv").write_text("path,label\na.jpg,drink\n")
    text = "path,label,fold\na.jpg,food,train\n"
    rows = listed(tmp_path, text, split_column="fold", held_out={"test": tmp_path / "far/test.csv"}).rows
    assert [(row.split, row.label, row.id) for row in rows] == [
        ("train", "food", "a.jpg"),
        ("test", "drink", "far/a.jpg"),
    ]


def test_several_lists_of_several_folders_have_ids_that_differ_and_paths_that_stay_in_their_own(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(name.encode())
        (tmp_path / name / "list.csv").write_text("path,label\na.jpg,food\n../one/a.jpg,food\nleak.jpg,food\n")
    (tmp_path / "two/leak.jpg").symlink_to("../one/a.jpg")
    source = Csv(path=(str(tmp_path / "*/list.csv"), str(tmp_path / "two/list.csv")))
    found = all_of(source)
    assert [row.id for row in found.rows] == [
        *("one/a.jpg", "one/a.jpg", "one/leak.jpg"),
        *("two/a.jpg", "two/leak.jpg"),
        *("two/a.jpg", "two/leak.jpg"),
    ]
    assert {r.fault.what for r in found.rejected} == {f"'../one/a.jpg' is outside of {tmp_path / 'two'}"}
    assert contents(source) == {
        "one/a.jpg": b"one",
        "one/leak.jpg": "No such file or directory",
        "two/a.jpg": b"two",
        "two/leak.jpg": f"links to a file outside of {tmp_path / 'two'}",
    }
    assert contents(Csv(path=tmp_path / "two/list.csv", root=tmp_path / "one"))["a.jpg"] == b"one"


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("gz", gzip.compress),
        ("gz", lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:])),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", lambda content: pa.compress(content, "zstd", asbytes=True)),
    ],
)
def test_packed_lists_are_streamed_and_their_lines_are_those_of_the_list(tmp_path: Path, suffix, pack):
    lines = "".join(f"images/{n * 7919 % 100_003:x}/{n}.jpg,füd\r\n" for n in range(40_000))
    (tmp_path / f"labels.csv.{suffix}").write_bytes(pack(b"\xef\xbb\xbfpath,label\r\n" + lines.encode()))
    rows = all_of(Csv(path=tmp_path / f"labels.csv.{suffix}")).rows
    assert [row.id for row in rows] == [line.partition(",")[0] for line in lines.split()]
    assert [int(row.where.rpartition(":")[2]) for row in rows] == list(range(2, 40_002))


def test_a_row_that_lies_across_two_blocks_is_whole(tmp_path: Path):
    for extra in range(2**20 - 8, 2**20 + 8):
        head = "path,label\n" + '"' + "x" * 99 + '",a\n'
        fill = ("y" * 1022 + ",b\n") * ((extra - len(head)) // 1025)
        text = head + fill + "z" * (extra - len(head) - len(fill)) + ',"c\r\nd"\r\nlast,e\r\n'
        rows = listed(tmp_path, text).rows
        assert [row.label for row in rows[-2:]] == ["c\r\nd", "e"]
        assert rows[-1].where.endswith(f":{len(rows) + 2}")


def test_every_header_is_checked_before_the_first_row_and_what_can_be_listed_is(tmp_path: Path):
    (tmp_path / "a.csv").write_text("path,label\na.jpg,food\n")
    (tmp_path / "b.csv").write_text("path,label\nb.jpg,food\n" + '"')
    (tmp_path / "c.csv").write_text("path,label\nc.jpg,food\n")
    stream = Csv(path=str(tmp_path / "*.csv")).rows()
    found: list[object] = []
    with pytest.raises(Refusal, match=r"b\.csv:3: is not CSV"):
        found.extend(row.id for row in stream if isinstance(row, Row))
    (tmp_path / "c.csv").write_text("path\n")
    with pytest.raises(Refusal) as refusal:
        next(Csv(path=str(tmp_path / "*.csv")).rows())
    assert [Path(fault.where).name for fault in refusal.value.faults] == ["c.csv:1"]


def test_rows_without_end_are_listed_in_little_memory(tmp_path: Path):
    with (tmp_path / "labels.csv").open("w") as file:
        file.write("path,label,venue\n")
        file.writelines(f"images/{n}.jpg,food,home\n" for n in range(100_000))
    tracemalloc.start()
    try:
        count = sum(1 for _ in Csv(path=tmp_path / "labels.csv", group_columns=("venue",)).rows())
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert count == 100_000


@pytest.mark.parametrize("split", ["../../up", "a/b", ".hidden", "a b", "x" * 41, "-", "a\nb"])
def test_a_split_that_could_not_name_a_file_is_rejected(tmp_path: Path, split):
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "fold", "label"), ("a.jpg", split, "food"), ("b.jpg", "train-1", "food")])
    listing = all_of(Csv(path=tmp_path / "labels.csv", split_column="fold"))
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


def test_a_list_may_be_one_word_or_several_on_the_command_line():
    class Job(Settings):
        source: AnySource

    said = ["source.kind=csv", "source.path=a.csv", "source.held_out.test=[b.csv, s3://c/d.csv]"]
    job = parse(Job, said)
    assert job == Job(source=Csv(path="a.csv", held_out={"test": ("b.csv", "s3://c/d.csv")}))
    assert job == parse_text(Job, dump(job))
    assert parse(Job, ["source.kind=csv", "source.path=[a.csv, b.csv]"]).source == Csv(path=("a.csv", "b.csv"))
    assert Csv(path=Path("a.csv")) == Csv(path="a.csv")


def test_sources_are_imported_without_torch_and_without_what_only_remote_ones_need():
    code = "import data_loaders.sources, sys; print({'torch', 'torchvision', 'fsspec', 's3fs'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "set()\n"


def test_rows_to_predict_need_only_a_path(tmp_path: Path):
    (tmp_path / "a.csv").write_text("path\na.jpg\n../b.jpg\n")
    source = Csv(path=tmp_path / "a.csv", group_columns=("venue",), split_column="split")
    listing = all_of(source, labelled=False)
    assert [(row.id, row.label, row.groups, row.split) for row in listing.rows] == [("a.jpg", "", (), "")]
    assert len(listing.rejected) == 1


@pytest.mark.parametrize("path", ["../a", "b/../../a", "/etc/passwd", "nul\0.jpg", "..", ".", "b/..", "http://a/b.jpg"])
def test_no_path_leads_out_of_the_root(tmp_path: Path, path):
    assert Root(str(tmp_path)).id_of(path) is None
    assert Root("s3://bucket/root").id_of(path) is None


@pytest.mark.parametrize("path", ["out/a", "link.jpg", "chain.jpg"])
def test_no_link_leads_out_of_the_root(tmp_path: Path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    (tmp_path / "a").write_bytes(b"secret")
    (root / "link.jpg").symlink_to("../a")
    (root / "chain.jpg").symlink_to("link.jpg")
    (root / "labels.csv").write_text(f"path,label\n{path},food\n")
    assert contents(Csv(path=root / "labels.csv")) == {path: f"links to a file outside of {root}"}


def test_paths_that_stay_in_the_root_are_followed(tmp_path: Path):
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"1")
    (root / "link.jpg").symlink_to("b/../a.jpg")
    (tmp_path / "way").symlink_to(root)
    for base in (root, tmp_path / "way"):
        for path in ("a.jpg", "b/../a.jpg", str(root / "a.jpg"), "./a.jpg", "b//../a.jpg", "../root/a.jpg", "link.jpg"):
            (tmp_path / "list.csv").write_text(f"path,label\n{path},food\n")
            name = "link.jpg" if path == "link.jpg" else "a.jpg"
            if base == root or path != "../root/a.jpg":
                assert contents(Csv(path=tmp_path / "list.csv", root=base)) == {name: b"1"}


def test_urls_below_the_root_are_relative_to_it():
    assert Root("http://host/root").id_of("http://host/root/a%20b/../c%20d.jpg") == "c d.jpg"
    assert Root("http://host/root").file_of("c d.jpg") == "http://host/root/c%20d.jpg"
    assert Root("s3://bucket/root/").id_of("s3://bucket/root/a%20b.jpg") == "a%20b.jpg"
    assert Root("s3://bucket/root/").file_of("a%20b.jpg") == "s3://bucket/root/a%20b.jpg"
    assert Root("s3://bucket/root").id_of("s3://bucket/rootkit/a.jpg") is None


def test_a_name_that_only_begins_like_the_root_is_outside(tmp_path: Path):
    (tmp_path / "root").mkdir()
    assert Root(str(tmp_path / "root")).id_of("../rootkit/a.jpg") is None


def test_links_in_a_circle_are_no_crash(tmp_path: Path):
    (tmp_path / "a.jpg").symlink_to("b.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    (tmp_path / "labels.csv").write_text("path,label\na.jpg,food\n")
    assert contents(Csv(path=tmp_path / "labels.csv")) == {"a.jpg": "Too many levels of symbolic links"}


def test_a_folder_of_classes_is_listed_in_order(tmp_path: Path, shoot: Callable[..., Path]):
    for name in ("dog/b.png", "cat/deep/er/c.JPG", "cat/a.webp", "dog/.hidden.png", ".git/x.png", "dog/a.jpeg"):
        shoot(name)
    listing = all_of(Folder(path=tmp_path))
    assert [(r.id, r.label, r.split) for r in listing.rows] == [
        ("cat/a.webp", "cat", ""),
        ("cat/deep/er/c.JPG", "cat", ""),
        ("dog/a.jpeg", "dog", ""),
        ("dog/b.png", "dog", ""),
    ]
    assert listing.rejected == []
    assert [r.label for r in all_of(Folder(path=tmp_path), labelled=False).rows] == [""] * 4


def test_a_folder_of_splits_gives_each_row_its_split(tmp_path: Path, shoot: Callable[..., Path]):
    for name in ("train/cat/a.png", "val/dog/b.png", "more/cat/c.png", "val/d.png"):
        shoot(name)
    listing = all_of(Folder(path=tmp_path, splits=("train", "val")))
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
    listing = all_of(Folder(path=root))
    assert [r.id for r in listing.rows] == [f"cat/{n}.png" for n in ("broken", "good", "leak", "loop", "pipe")]
    assert rejected(listing) == {
        "lost.png": "lies in no folder of a class",
        "notes.txt": "is not a .jpg, .png or .webp file",
        "inner": "links to another folder",
        "dog": "links to another folder",
        "caf\\xe9.png": "its name is not UTF-8",
    }
    found = contents(Folder(path=root))
    assert found.pop("cat/good.png") == (root / "cat/good.png").read_bytes()
    assert found == {
        "cat/broken.png": "No such file or directory",
        "cat/leak.png": f"links to a file outside of {root}",
        "cat/loop.png": "Too many levels of symbolic links",
        "cat/pipe.png": "is not a regular file",
    }


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(Refusal, match="is not a folder"):
            all_of(Folder(path=path))
