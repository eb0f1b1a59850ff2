import io
import json
import os
import pickle
import tarfile
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
from data_loaders.sources.webdataset import WebDataset

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


def test_a_sample_with_no_image_is_none_and_one_with_two_or_without_a_label_is_rejected(tmp_path: Path):
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
        ("a/b.jpg", "has 2 images: b.jpg, b.png"),
        ("a/c.jpg", "no label"),
        ("a/d.jpg", "its label or .json member is not UTF-8, or not JSON"),
    ]


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
