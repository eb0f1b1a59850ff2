import io
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image
from pydantic import TypeAdapter
from webdataset.writer import TarWriter

from data_loaders.decode import decode
from data_loaders.faults import Refusal
from data_loaders.sources import AnySource
from data_loaders.sources.parquet import Parquet
from data_loaders.sources.rows import Rejected, Row, Source, Unreadable
from data_loaders.sources.tar import members
from data_loaders.sources.torchvision import Torchvision
from data_loaders.sources.webdataset import NOTE_CAP, WebDataset

CLASSES = ["cat", "dog"]


def picture(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4 + number % 3, 5), (number % 256, 7, 9)).save(content, "png")
    return content.getvalue()


def good(source: Source, labelled: bool = True) -> list[Row]:
    found = list(source.rows(labelled))
    assert [row for row in found if isinstance(row, Rejected)] == []
    return [row for row in found if isinstance(row, Row)]


def images(source: Source, rows: list[Row]) -> list[bytes | str]:
    found: list[bytes | str] = []
    with pickle.loads(pickle.dumps(source)).reader() as read:  # noqa: S301  # as it comes to a worker
        for row in rows:
            try:
                found.append(read(row))
            except (OSError, Unreadable) as wrong:
                found.append(str(wrong))
    return found


def table(numbers: range, **columns: Any) -> pa.Table:
    cells = [{"bytes": picture(n), "path": f"{n}.png"} for n in numbers]
    return pa.table({"image": cells, "label": [CLASSES[n % 2] for n in numbers], **columns})


def hub(folder: Path) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    cells = {"image": [{"bytes": picture(n), "path": None} for n in range(10)], "label": [n % 2 for n in range(10)]}
    return datasets.Dataset.from_dict(cells, features=features)


def test_a_repository_of_the_hub_has_its_classes_and_splits(tmp_path: Path):
    data = hub(tmp_path)
    (tmp_path / "data").mkdir()
    for number, split in enumerate(("train", "train", "validation", "test_far")):
        data.to_parquet(tmp_path / f"data/{split}-{number:05d}-of-00004.parquet")
    source = Parquet(path=tmp_path)
    rows = good(source)
    assert [row.split for row in rows] == ["test_far"] * 10 + ["train"] * 20 + ["val"] * 10
    assert [row.label for row in rows] == CLASSES * 20
    assert rows[13].id == "train-00000-of-00004/3"
    assert rows[13].where == f"{tmp_path}/data/train-00000-of-00004.parquet:3"
    assert images(source, rows) == [picture(n) for n in range(10)] * 4
    assert {row.split for row in good(Parquet(path=tmp_path, file_splits=False))} == {""}


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path: Path, as_dict):
    data = hub(tmp_path)
    if as_dict:
        datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(
            tmp_path / "set", num_shards={"train": 2, "validation": 1}
        )
    else:
        data.save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "cache-0123.arrow").write_bytes(b"left by a map")
    source = Parquet(path=tmp_path / "set")
    rows = good(source)
    assert [row.split for row in rows] == (["train"] * 10 + ["val"] * 10 if as_dict else [""] * 10)
    assert [row.label for row in rows] == CLASSES * (len(rows) // 2)
    assert images(source, rows) == [picture(n) for n in range(10)] * (len(rows) // 10)


@pytest.mark.parametrize("suffix", ["parquet", "file.arrow", "stream.arrow"])
def test_groups_units_splits_and_ids_come_from_columns_and_any_order_of_reading_is_right(tmp_path: Path, suffix):
    numbers = range(100)
    content = table(
        numbers,
        id=[f"a/{n}.png" for n in numbers],
        venue=pa.array([f" v{n % 3}" for n in numbers]).dictionary_encode(),
        night=[n % 2 == 0 for n in numbers],
        patient=[n // 4 for n in numbers],
    )
    path = tmp_path / f"part.{suffix}"
    if suffix == "parquet":
        pq.write_table(content, path, row_group_size=30)
    else:
        with (pa.ipc.new_file if "file" in suffix else pa.ipc.new_stream)(path, content.schema) as writer:
            writer.write_table(content, max_chunksize=30)
    source = Parquet(path=path, group_columns=("venue", "night"), split_by="patient")
    rows = good(source)
    row = rows[61]
    assert (row.id, row.label, row.groups, row.split, row.unit) == ("a/61.png", "dog", ("v1", "false"), "", "15")
    assert row.place == (0, 2, 1)
    order = [*np.random.default_rng(0).permutation(100).tolist(), 5, 5, 4]
    assert images(source, [rows[n] for n in order]) == [picture(n) for n in order]
    assert next((r.id, r.label, r.groups, r.unit) for r in good(source, labelled=False)) == ("a/0.png", "", (), "")
    assert {r.split for r in good(Parquet(path=path, split_column="venue"))} == {"v0", "v1", "v2"}


@pytest.mark.parametrize("write", [pq.write_table, None])
def test_rows_without_a_name_are_counted_even_where_nothing_else_is_read(tmp_path: Path, write):
    path = tmp_path / "x.arrow"
    if write:
        write(table(range(5)), path, row_group_size=2)
    else:
        with pa.ipc.new_file(path, table(range(5)).schema) as writer:
            writer.write_table(table(range(5)), max_chunksize=2)
    rows = good(Parquet(path=path), labelled=False)
    assert [(row.id, row.place) for row in rows] == [
        ("x/0", (0, 0, 0)),
        ("x/1", (0, 0, 1)),
        ("x/2", (0, 1, 0)),
        ("x/3", (0, 1, 1)),
        ("x/4", (0, 2, 0)),
    ]


def test_an_image_given_by_its_path_is_read_below_the_folder_of_its_list(tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a.png").write_bytes(picture(1))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    paths = ["sub/a.png", str(folder / "sub/a.png"), "../secret.png", "link.png", None, "gone.png"]
    cells = [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"image": cells, "label": ["cat"] * 6}), folder / "x.parquet")
    source = Parquet(path=folder / "x.parquet")
    found = images(source, good(source))
    assert found[:2] == [picture(1)] * 2
    assert found[2:5] == [
        f"'../secret.png' is outside of {folder}",
        f"links to a file outside of {folder}",
        "holds no image",
    ]
    assert "No such file" in str(found[5])


def test_rows_of_a_table_without_a_label_or_with_an_odd_name_are_rejected(tmp_path: Path):
    content = table(range(4)).set_column(1, "label", [["cat", None, " ", "dog"]])
    content = content.append_column("id", [["a", "b", "c", "../d"]])
    pq.write_table(content, tmp_path / "x.parquet")
    found = list(Parquet(path=tmp_path / "x.parquet").rows())
    assert [(r.fault.where[-1], r.fault.what) for r in found if isinstance(r, Rejected)] == [
        ("1", "no label"),
        ("2", "no label"),
        ("3", "'../d' is no path of an image"),
    ]


def test_files_that_hold_no_such_columns_are_told_all_at_once(tmp_path: Path):
    pq.write_table(pa.table({"img": [b"1"], "label": ["cat"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [1], "label": [[1]]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "d.arrow").write_bytes(b"")
    with pytest.raises(Refusal) as refusal:
        list(Parquet(path=tmp_path).rows())
    assert [(Path(f.where).name, f.what) for f in refusal.value.faults[:3]] == [
        ("a.parquet", "column 'image' stands 0 times"),
        ("b.parquet", "column 'image' holds int64"),
        ("b.parquet", "column 'label' holds list<element: int64>"),
    ]
    assert [Path(f.where).name for f in refusal.value.faults[3:]] == ["c.parquet", "d.arrow"]


def test_files_that_change_places_after_they_were_listed_are_not_mixed_up(tmp_path: Path):
    pq.write_table(table(range(3)), tmp_path / "b.parquet")
    source = Parquet(path=tmp_path)
    rows = good(source)
    pq.write_table(table(range(50, 53)), tmp_path / "a.parquet")
    assert images(source, rows) == ["is not where it was listed: files were added or removed since"] * 3


def test_tars_of_webdataset_have_labels_groups_and_splits(tmp_path: Path):
    for split in ("train", "val"):
        with TarWriter(str(tmp_path / f"{split}-000.tar")) as writer:
            for n in range(4):
                facts = {"venue": f"v{n}", "kind": CLASSES[n % 2], "patient": n // 2}
                writer.write({"__key__": f"{n:04d}", "png": picture(n), "cls": n % 2, "json": facts})
    source = WebDataset(path=str(tmp_path / "*.tar"), group_columns=("venue",), split_by="patient")
    rows = good(source)
    assert [(r.id, r.label, r.groups, r.split, r.unit) for r in rows[3:5]] == [
        ("train-000/0003.png", "1", ("v3",), "train", "1"),
        ("val-000/0000.png", "0", ("v0",), "val", "0"),
    ]
    assert rows[0].where == f"{tmp_path}/train-000.tar:0000.png"
    assert images(source, rows) == [picture(n) for n in range(4)] * 2
    named = WebDataset(path=tmp_path, label="json:kind", file_splits=False)
    assert [(r.label, r.split) for r in good(named)] == [("cat", ""), ("dog", "")] * 4
    assert [r.label for r in good(source, labelled=False)] == [""] * 8


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, form):
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name in (
            "a.jpg",
            "x" * 90 + "/" + "y" * 90 + ".jpg",
            "dir/ü.jpg",
            *(["z" * 300] if form != tarfile.USTAR_FORMAT else []),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(name) * 7
            tar.addfile(member, io.BytesIO(bytes(member.size)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with tarfile.open(tmp_path / "a.tar") as tar, (tmp_path / "a.tar").open("rb") as file:
        expected = [(m.name, m.isreg(), m.offset_data, m.size) for m in tar.getmembers()]
        assert [(m.name, m.is_file, m.offset, m.size) for m in members(file)] == expected


def test_a_sample_with_no_image_or_with_two_or_without_a_label_is_rejected(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in {
            "a.cls": b"1",
            "b.jpg": b"j",
            "b.png": b"p",
            "b.cls": b"1",
            "c.jpg": b"j",
            "d.jpg": b"j",
            "d.cls": b"\xff",
            "e.JPG": b"j",
            "e.cls": b"cat",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = list(WebDataset(path=tmp_path / "a.tar").rows())
    assert [r.id for r in found if isinstance(r, Row)] == ["a/e.JPG"]
    assert [(r.row.id, r.fault.what) for r in found if isinstance(r, Rejected)] == [
        ("a/a.cls", "has no .jpg, .png or .webp"),
        ("a/b.jpg", "has 2 images: b.jpg, b.png"),
        ("a/c.jpg", "no label"),
        ("a/d.jpg", "its label or .json member is not UTF-8, or not JSON"),
    ]


def tar_of(path: Path, *named: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in named:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_a_sample_whose_image_is_of_no_known_suffix_is_rejected_and_hidden_files_are_of_no_sample(tmp_path: Path):
    names = ["README", "._1.bmp", "1.bmp", "1.cls", "2.JPG2", "2.cls", "3.json", "4", "4.cls", ".DS_Store"]
    source = WebDataset(path=tar_of(tmp_path / "a.tar", *((name, b"1") for name in names)))
    for labelled in (True, False):
        found = list(source.rows(labelled))
        assert [(r.row.id, r.fault.what, r.fault.fix) for r in found if isinstance(r, Rejected)] == [
            (f"a/{name}", "has no .jpg, .png or .webp", "convert it, or remove the sample")
            for name in ("1.bmp", "2.JPG2", "3.json", "4.cls")
        ]
        assert len(found) == 4


def test_the_last_suffix_of_a_member_says_whether_it_is_an_image(tmp_path: Path):
    names = ["1.left.png", "1.cls", "2.left.png", "2.right.png", "2.cls", "3.png", "3.mask.PNG", "3.cls", "4.png.json"]
    source = WebDataset(path=tar_of(tmp_path / "a.tar", *((name, name.encode()) for name in names)))
    found = list(source.rows())
    rows = [row for row in found if isinstance(row, Row)]
    assert [(row.id, row.label) for row in rows] == [("a/1.left.png", "1.cls")]
    assert images(source, rows) == [b"1.left.png"]
    assert [(r.row.id, r.fault.what, r.fault.fix) for r in found if isinstance(r, Rejected)] == [
        ("a/2.left.png", "has 2 images: 2.left.png, 2.right.png", "keep one"),
        ("a/3.png", "has 2 images: 3.png, 3.mask.PNG", "keep one"),
        ("a/4.png.json", "has no .jpg, .png or .webp", "convert it, or remove the sample"),
    ]


def test_only_the_members_that_are_asked_for_are_kept_and_no_more_of_them_than_the_cap(tmp_path: Path):
    notes = [(f"1.note{n}", bytes(NOTE_CAP)) for n in range(100)]
    half = b" " * (NOTE_CAP // 2)
    path = tar_of(
        tmp_path / "a.tar",
        *[("1.jpg", b"j"), *notes, ("1.cls", b"cat"), ("1.json", b'{"x": 1}')],
        *[("2.jpg", b"j"), ("2.cls", half + b"cat"), ("2.json", half + b"{}")],
    )
    source = WebDataset(path=path, group_columns=("x",))
    tracemalloc.start()
    found = list(source.rows())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * NOTE_CAP
    assert isinstance(found[0], Row)
    assert (found[0].label, found[0].groups) == ("cat", ("1",))
    assert isinstance(found[1], Rejected)
    assert found[1].fault.what == "its label and .json member have more than 1,048,576 bytes"
    assert [row.label for row in good(WebDataset(path=path))] == ["cat", "cat"]


def long_labels(folder: Path, kind: str) -> Path:
    """A small file of 100,000 rows, a quarter of which say the same 16 kB for a label."""
    path, count = folder / "a.parquet", 100_000
    indices = pa.array(np.arange(count) % 4 != 1, pa.int32())
    label = pa.DictionaryArray.from_arrays(indices, ["x" * 16_000, " cat "])
    columns = {"image": pa.array(np.zeros(count, "S1")).cast(pa.binary()), "label": label}
    content = pa.table(columns)
    if kind == "texts":
        content = content.cast(pa.schema([("image", pa.binary()), ("label", pa.string())]))
    if kind == "arrow":
        with pa.ipc.new_file(path, content.schema) as writer:
            writer.write_table(content)
    else:
        pq.write_table(content, path)
    return path


@pytest.mark.parametrize("kind", ["dictionary", "texts", "arrow"])
def test_a_long_text_that_a_small_file_repeats_is_rejected_and_never_becomes_many(tmp_path: Path, kind):
    path = long_labels(tmp_path, kind)
    assert path.stat().st_size < 2_000_000
    list(Parquet(path=path).rows(labelled=False))
    Path("/proc/self/clear_refs").write_text("5")
    before, labels, faults = peak(), set[str](), list[Rejected]()
    for row in Parquet(path=path).rows():
        if isinstance(row, Rejected):
            faults += [row] * (len(faults) < 2)
        else:
            labels.add(row.label)
    assert peak() - before < 48 * 2**20
    assert labels == {"cat"}
    assert [tuple(r.fault) for r in faults] == [
        (f"{path}:{n}", "label of more than 4,096 characters", "shorten the cell") for n in (1, 5)
    ]
    assert faults[0].row.label == ""


def peak() -> int:
    """The most memory in use since it was last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_a_cell_may_have_4096_characters_of_any_script(tmp_path: Path, kind):
    cells = pa.array(["\N{SNOWMAN}" * 4096, "\N{SNOWMAN}" * 4097, "x" * 4097, None, " a "], kind)
    content = pa.table({"image": [b"1"] * 5, "label": ["cat"] * 5, "id": cells})
    with pa.ipc.new_file(tmp_path / "a.arrow", content.schema) as writer:
        writer.write_table(content)
    found = list(Parquet(path=tmp_path).rows())
    assert [row.id if isinstance(row, Row) else row.fault.what for row in found] == [
        "\N{SNOWMAN}" * 4096,
        "id of more than 4,096 characters",
        "id of more than 4,096 characters",
        "no id",
        "a",
    ]
    assert [row.row.id for row in found if isinstance(row, Rejected)] == ["a/1", "a/2", ""]


def test_a_split_is_named_in_ascii(tmp_path: Path):
    names = ["x\N{SUPERSCRIPT TWO}", "\N{LATIN SMALL LETTER E WITH ACUTE}", "x.1-b"]
    pq.write_table(pa.table({"image": [b"1"] * 3, "label": ["cat"] * 3, "part": names}), tmp_path / "a.parquet")
    samples = [(f"{n}.json", json.dumps({"part": name, "kind": "cat"}).encode()) for n, name in enumerate(names)]
    tar_of(tmp_path / "a.tar", *(m for n in range(3) for m in ((f"{n}.jpg", b"1"), samples[n])))
    for source in (
        Parquet(path=tmp_path, split_column="part"),
        WebDataset(path=tmp_path, split_column="part", label="json:kind"),
    ):
        found = list(source.rows())
        assert [row.split for row in found if isinstance(row, Row)] == ["x.1-b"]
        assert [row.fault.what for row in found if isinstance(row, Rejected)] == [
            f"{name!r} cannot name a split" for name in names[:2]
        ]


def test_the_file_of_a_row_is_its_archive(tmp_path: Path):
    pq.write_table(table(range(2)), tmp_path / "b.parquet")
    tar_of(tmp_path / "b.tar", ("1:2.jpg", b"1"), ("1:2.cls", b"1"))
    for source, name in ((Parquet(path=tmp_path), "b.parquet"), (WebDataset(path=tmp_path), "b.tar")):
        row = good(source)[0]
        before = pickle.dumps(source)
        assert source.file_of(row) == str(tmp_path / name)
        assert pickle.dumps(source) == before
        assert pickle.loads(before).file_of(row) == str(tmp_path / name)  # noqa: S301  # as it comes to a worker
        (tmp_path / name).rename(tmp_path / f"a{name}")
        assert pickle.loads(before).file_of(row) is None  # noqa: S301
        assert source.file_of(good(source)[0]) == str(tmp_path / f"a{name}")
    fake = Torchvision(name="FakeData", arguments={"size": "2"})
    assert fake.file_of(good(fake)[0]) is None


def test_a_packed_tar_is_told_to_be_unpacked(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(Refusal, match=r"is packed with gzip.*not packed"):
        list(WebDataset(path=tmp_path).rows())


def test_images_drawn_by_torchvision_are_kept_without_loss():
    source = Torchvision(name="FakeData", arguments={"size": "6", "image_size": "[3, 8, 9]", "num_classes": "2"})
    rows = good(source)
    data = torchvision.datasets.FakeData(6, (3, 8, 9), 2)
    assert [(row.id, row.label) for row in rows] == [(f"FakeData/{i}", str(int(data[i][1]))) for i in range(6)]
    for row, content in zip(rows, images(source, rows), strict=True):
        assert isinstance(content, bytes)
        assert (decode(content) == np.asarray(data[row.place[1]][0])).all()


def test_files_of_a_torchvision_set_are_taken_byte_for_byte(tmp_path: Path):
    for n in range(4):
        path = tmp_path / f"{CLASSES[n % 2]}/{n}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(n))
    (tmp_path / "dog/9.png").symlink_to("/etc/passwd")
    source = Torchvision(name="ImageFolder", root=tmp_path)
    rows = good(source)
    assert [(row.id, row.label) for row in rows] == [
        ("cat/0.png", "cat"),
        ("cat/2.png", "cat"),
        ("dog/1.png", "dog"),
        ("dog/3.png", "dog"),
        ("dog/9.png", "dog"),
    ]
    assert images(source, rows) == [*map(picture, (0, 2, 1, 3)), f"links to a file outside of {tmp_path}"]


def test_parts_of_a_torchvision_set_are_splits(tmp_path: Path):
    for part, count in (("train", 3), ("t10k", 2)):
        raw = tmp_path / "MNIST/raw"
        raw.mkdir(parents=True, exist_ok=True)
        pixels = (np.arange(count * 784) % 251).astype(np.uint8)
        head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count))
        )
    source = Torchvision(name="MNIST", root=tmp_path, held_out={"test": {"train": "false"}})
    rows = good(source)
    assert [(r.id, r.label, r.split) for r in rows] == [
        ("MNIST/0", "0 - zero", ""),
        ("MNIST/1", "1 - one", ""),
        ("MNIST/2", "2 - two", ""),
        ("MNIST/test/0", "0 - zero", "test"),
        ("MNIST/test/1", "1 - one", "test"),
    ]
    content = images(source, rows)[4]
    assert isinstance(content, bytes)
    assert (decode(content)[:, :, 0].ravel() == np.arange(784, 1568) % 251).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "Cifar10"}, "did you mean CIFAR10"),
        ({"name": "CIFAR10"}, "not found"),
        ({"name": "CIFAR10", "arguments": {"trian": "true"}}, "did you mean train?"),
        ({"name": "CIFAR10", "arguments": {"download": "true"}}, "no such argument"),
        ({"name": "wrap_dataset_for_transforms_v2"}, "has no data set"),
    ],
)
def test_a_torchvision_set_that_cannot_be_had_is_told_and_never_downloaded(tmp_path: Path, settings, said):
    with pytest.raises(Refusal, match=said):
        list(Torchvision(root=tmp_path, **settings).rows())
    assert os.listdir(tmp_path) == []


def test_every_kind_reads_its_settings_back():
    for settings in (
        {"kind": "csv", "path": "a.csv"},
        {"kind": "csv", "path": ["a.csv", "s3://b/c.csv"], "held_out": {"test": "t.csv"}},
        {"kind": "folder", "path": "gs://b/c"},
        {"kind": "parquet", "path": "a"},
        {"kind": "webdataset", "path": "a", "label": "json:x.y"},
        {"kind": "torchvision", "name": "CIFAR10", "held_out": {"test": {"train": "false"}}},
        {"kind": "demo"},
    ):
        adapter: TypeAdapter[Any] = TypeAdapter(AnySource)
        source = adapter.validate_python(settings)
        assert adapter.validate_python(json.loads(adapter.dump_json(source))) == source
