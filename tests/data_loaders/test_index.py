import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from data_loaders.decode import decode
from data_loaders.faults import Refusal
from data_loaders.index import DamagedRow, Index, Reader, checksum, fingerprint, open_index, read_manifest, tail


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


def shard_of(index: Index, row: int) -> Path:
    return index.folder / "shards" / index.shards[index.shard[row]]


def damaged(index: Index, row: int) -> str:
    with pytest.raises(DamagedRow) as wrong:
        Reader(index).read(row)
    (fault,) = wrong.value.faults
    return str(fault)


def test_the_index_agrees_with_the_shards(dataset: Path):
    index, reader = open_index(dataset), Reader(open_index(dataset))
    row = 0
    for number, name in enumerate(index.shards):
        table = pa.ipc.open_file(dataset / "shards" / name).read_all()
        for stored in table.to_pylist():
            assert reader.read(row) == stored["image"]["bytes"]
            assert index.shard[row] == number
            assert index.labels[row] == stored["label"]
            assert index.crc32c[row] == stored["crc32c"]
            assert index.ids[row].as_py() == stored["id"]
            values = [names[g] for names, g in zip(index.group_values.values(), index.groups[row], strict=True)]
            assert values == [stored[name] for name in index.group_values]
            row += 1
    assert row == len(index.labels) == 154
    reader.close()


def test_rows_of_the_splits_are_every_row_once(dataset: Path):
    index = open_index(dataset)
    rows = np.concatenate([index.rows_of(split) for split in index.splits])
    assert sorted(rows) == list(range(len(index.labels)))
    assert {split: len(index.rows_of(split)) for split in index.splits} == {"train": 84, "val": 33, "test": 37}
    with pytest.raises(Refusal, match=r"no split 'dev' — it has train, test, val"):
        index.rows_of("dev")


def test_cells_are_the_intersections_of_the_groups(dataset: Path):
    index = open_index(dataset)
    assert index.cell_names == [("home", "phone"), ("home", "slr"), ("street", "phone"), ("street", "slr")]
    for cell, groups in zip(index.cells, index.groups, strict=True):
        assert index.cell_names[cell] == (
            index.group_values["venue"][groups[0]],
            index.group_values["camera"][groups[1]],
        )


def test_the_checksum_is_crc32c_of_image_label_and_groups():
    assert checksum(b"123456789", b"") == 0xE3069283  # the check value of CRC-32C
    assert tail(258, "a", "é", "") == b"\x02\x01\0\0\0\0\0\0a\0\xc3\xa9\0\0"
    assert checksum(b"1234", b"56789") == checksum(b"123456789", b"")


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_of_an_image_is_found_and_named(copy: Path, bit):
    index = open_index(copy)
    random = np.random.default_rng(bit)
    for row in random.integers(0, len(index.labels), 6):
        path = shard_of(index, row)
        former = path.read_bytes()
        content = bytearray(former)
        content[index.offset[row] + random.integers(index.length[row])] ^= 1 << bit
        path.write_bytes(content)
        assert damaged(index, row).startswith(f"{path}: row {row} ({index.ids[row]}) is not as it was written")
        path.write_bytes(former)
        assert decode(Reader(index).read(row)).shape == (12, 12, 3)


@pytest.mark.parametrize("bytes_left", [0, 1, 700])
def test_a_shard_that_was_cut_short_damages_the_rows_behind_the_cut_and_no_other(copy: Path, bytes_left):
    index = open_index(copy)
    os.truncate(shard_of(index, 0), bytes_left)
    assert damaged(index, 0).startswith(f"{shard_of(index, 0)}: row 0 (")
    other = int(np.flatnonzero(index.shard != index.shard[0])[0])
    assert Reader(index).read(other)


def test_a_shard_cut_short_under_an_open_reader_is_no_crash(copy: Path):
    index = open_index(copy)
    reader, last = Reader(index), int(np.flatnonzero(index.shard == 0)[-1])
    reader.read(last)
    os.truncate(shard_of(index, last), int(index.offset[last]) + 3)
    assert reader.read(0)
    with pytest.raises(DamagedRow, match=rf"row {last} \("):
        reader.read(last)


def test_a_shard_that_is_gone_damages_its_rows(copy: Path):
    index = open_index(copy)
    shard_of(index, 5).unlink()
    assert "row 5 (" in damaged(index, 5)
    assert "cannot be read: no such file" in damaged(index, 5)


def test_two_shards_that_changed_places_are_found(copy: Path):
    index = open_index(copy)
    a, b = (copy / "shards" / name for name in index.shards[:2])
    a.rename(copy / "aside")
    b.rename(a)
    (copy / "aside").rename(b)
    assert damaged(index, 0)


@pytest.mark.parametrize("column", ["labels", "groups", "offset", "length", "shard"])
def test_an_index_of_other_rows_does_not_fit_the_shards(dataset: Path, column):
    index = open_index(dataset)
    getattr(index, column)[0] = getattr(index, column)[0] + 1 if column != "shard" else 3
    if column in {"labels", "groups"}:
        getattr(index, column)[0] %= 2
    assert damaged(index, 0)


def test_many_threads_read_the_same_rows(dataset: Path):
    index, reader = open_index(dataset), Reader(open_index(dataset))
    rows = np.random.default_rng(0).integers(0, len(index.labels), 500).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, rows)) == [Reader(index).read(row) for row in rows]
    reader.close()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_damaged_index_is_refused(copy: Path, share):
    path = copy / "index.arrow"
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(Refusal, match=r"index.arrow: is not as it was written"):
        open_index(copy)
    os.truncate(path, int(share * len(content)))
    with pytest.raises(Refusal, match="is damaged"):
        open_index(copy)


def test_an_index_that_is_gone_is_refused(copy: Path):
    (copy / "index.arrow").unlink()
    with pytest.raises(Refusal, match=r"index.arrow") as refusal:
        open_index(copy)
    assert refusal.value.exit_code == 65


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"{}", b"\xff", b'{"format": "evenkeel-dataset"}', b"null"]
)
def test_a_manifest_that_is_none_is_refused(copy: Path, content):
    (copy / "dataset.json").write_bytes(content)
    with pytest.raises(Refusal, match="cannot be read"):
        open_index(copy)


@pytest.mark.parametrize("name", ["format", "version", "fingerprint", "classes", "groups", "splits", "index", "shards"])
def test_a_manifest_that_lacks_or_changes_a_part_is_refused(copy: Path, name):
    path = copy / "dataset.json"
    manifest = json.loads(path.read_bytes())
    for changed in ({**manifest, name: "other"}, {k: v for k, v in manifest.items() if k != name}):
        path.write_text(json.dumps(changed))
        with pytest.raises(Refusal, match="cannot be read"):
            open_index(copy)


def test_a_class_renamed_in_the_manifest_is_refused(copy: Path):
    path = copy / "dataset.json"
    path.write_text(path.read_text().replace('"drink"', '"drank"'))
    with pytest.raises(Refusal, match=r"dataset.json: is not as it was written"):
        open_index(copy)


@pytest.mark.parametrize("name", ["../dataset.json", "/etc/passwd", "..", ""])
def test_a_manifest_cannot_lead_out_of_the_data_set(copy: Path, name):
    """Even where an attacker made every hash agree."""
    manifest = json.loads((copy / "dataset.json").read_bytes())
    for part in ("index", "shards"):
        changed = json.loads(json.dumps(manifest))
        (changed["index"] if part == "index" else changed["shards"][0])["name"] = name
        if part == "index" and (copy / name).is_file():
            changed["index"]["sha256"] = hashlib.sha256((copy / name).read_bytes()).hexdigest()
        changed["fingerprint"] = fingerprint(changed)
        (copy / "dataset.json").write_text(json.dumps(changed))
        with pytest.raises(Refusal, match="cannot be read"):
            open_index(copy)


def test_a_folder_without_a_data_set_is_told_how_to_make_one(tmp_path: Path):
    with pytest.raises(Refusal, match=r"does not exist — make a data set with python -m jobs.ingest"):
        read_manifest(tmp_path)
