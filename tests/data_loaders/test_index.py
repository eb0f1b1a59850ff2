import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import resource
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from benchmarks.corruption import ROWS, make
from data_loaders import index as index_module
from data_loaders import manifest as manifests
from data_loaders.decode import decode
from data_loaders.faults import Refusal
from data_loaders.index import DamagedRow, Index, Reader, checksum, open_index, schema, tail, tail_id
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.manifest import SHARDS, Manifest
from data_loaders.sources.csv_file import Csv

Tree = dict[str, Any]


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two generations."""
    folder = tmp_path_factory.mktemp("grown") / "data"
    make(folder, "a")
    return folder


@pytest.fixture
def appended(grown: Path, tmp_path: Path) -> Path:
    return shutil.copytree(grown, tmp_path / "appended")


def index_file(folder: Path) -> Path:
    return folder / manifests.read(folder).index.name


def forge(folder: Path, change: Callable[[Tree], object], name: str = manifests.NAME) -> None:
    """Changes a manifest, and makes its hashes agree."""
    tree = json.loads((folder / name).read_bytes())
    change(tree)
    tree["fingerprint"] = manifests.fingerprint(tree)
    tree["checksum"] = manifests.checksum(tree)
    (folder / name).write_text(json.dumps(tree))


def forge_index(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Puts another index in the place of that of a data set, and makes all hashes agree."""
    path = index_file(folder)
    table = change(pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all())
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()

    def agree(tree: Tree) -> None:
        tree["index"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "rows": len(table)}

    forge(folder, agree)


def shard_of(index: Index, row: int) -> Path:
    return index.folder / SHARDS / index.shards[index.shard[row]]


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


def test_the_checksum_is_crc32c_of_image_label_groups_and_id(dataset: Path):
    assert checksum(b"123456789", b"") == 0xE3069283  # the check value of CRC-32C
    assert tail_id("é") == b"\xc3\xa9\0"
    assert tail(258, "a", "é", "") == b"\x02\x01\0\0\0\0\0\0a\0\xc3\xa9\0\0"
    assert checksum(b"1234", b"56789") == checksum(b"123456789", b"")
    index, reader = open_index(dataset), Reader(open_index(dataset))
    for row, name in enumerate(index.ids.to_pylist()):
        values = (names[g] for names, g in zip(index.group_values.values(), index.groups[row].tolist(), strict=True))
        content = reader.read(row)
        assert index.crc32c[row] == checksum(content, tail(int(index.labels[row]), *values) + tail_id(name))
        assert index.image_crc32c[row] == checksum(content, b"")
        assert reader.agrees(row, content)
        assert not reader.agrees(row, content + b"\0")


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


@pytest.mark.parametrize("instead", ["pipe", "folder", "socket", "link to itself", "link to /dev/zero"])
@pytest.mark.parametrize("part", ["manifest", "copy", "index", "shard"])
def test_what_is_no_file_is_refused_at_once(appended: Path, part, instead):
    index, generation = open_index(appended), 1 if part == "copy" else None
    paths = {"manifest": appended / manifests.NAME, "copy": manifests.copy_of(appended, 1)}
    paths |= {"index": index_file(appended), "shard": shard_of(index, 0)}
    (path := paths[part]).unlink()
    if instead == "pipe":
        os.mkfifo(path)
    elif instead == "folder":
        path.mkdir()
    elif instead == "socket":
        with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
            listener.bind(path.name)
    else:
        path.symlink_to(path.name if instead == "link to itself" else "/dev/zero")
    with pytest.raises(Refusal) as refusal:
        Reader(open_index(appended, generation)).read(0)
    assert refusal.value.exit_code == 65
    assert refusal.value.faults[0].where == str(path)


def test_a_link_to_the_same_file_elsewhere_is_followed(copy: Path, tmp_path: Path):
    path = shard_of(open_index(copy), 0)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert Reader(open_index(copy)).read(0)


def test_two_shards_that_changed_places_are_found(copy: Path):
    index = open_index(copy)
    a, b = (copy / SHARDS / name for name in index.shards[:2])
    a.rename(copy / "aside")
    b.rename(a)
    (copy / "aside").rename(b)
    assert damaged(index, 0)


@pytest.mark.parametrize("column", ["label", "group", "offset", "length", "shard", "crc32c"])
def test_an_index_of_other_rows_does_not_fit_the_shards(dataset: Path, column):
    index = open_index(dataset)
    values = np.array(getattr(index, column))
    if column in {"label", "group"}:
        values.T[0] = (values.T[0] + 1) % 2
    else:
        values[0] = values[0] + 1 if column != "shard" else 3
    assert damaged(dataclasses.replace(index, **{column: values}), 0)


def test_two_rows_that_changed_their_ids_are_found(dataset: Path):
    index = open_index(dataset)
    first, second, *_ = index.ids.to_pylist()
    swapped = f"{second}{first}".encode()
    text = np.append(np.frombuffer(swapped, np.uint8), index.id_text[len(swapped) :])
    ends = np.concatenate([[0, len(second.encode())], index.id_ends[2:]])
    index = dataclasses.replace(index, id_text=text, id_ends=ends)
    assert [index.id_of(row) for row in range(2)] == [second, first]
    assert damaged(index, 0)
    assert damaged(index, 1)
    assert Reader(index).read(2)


def test_many_threads_read_the_same_rows(dataset: Path):
    index, reader = open_index(dataset), Reader(open_index(dataset))
    rows = np.random.default_rng(0).integers(0, len(index.labels), 500).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, rows)) == [Reader(index).read(row) for row in rows]
    reader.close()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_damaged_index_is_refused(copy: Path, share):
    path = index_file(copy)
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(Refusal, match=rf"{path.name}: is not as it was written"):
        open_index(copy)
    os.truncate(path, int(share * len(content)))
    with pytest.raises(Refusal, match="is damaged"):
        open_index(copy)


def test_an_index_that_grew_is_refused_before_it_is_read(copy: Path):
    os.truncate(index_file(copy), 2**40)  # a hole: no byte of it is on the disk
    with pytest.raises(Refusal, match=r"has 1,099,511,627,776 bytes, more than"):
        open_index(copy)
    os.truncate(copy / manifests.NAME, 2**40)
    with pytest.raises(Refusal, match=r"has 1,099,511,627,776 bytes, more than"):
        open_index(copy)


def test_an_index_that_is_gone_is_refused(copy: Path):
    path = index_file(copy)
    path.unlink()
    with pytest.raises(Refusal, match=path.name) as refusal:
        open_index(copy)
    assert refusal.value.exit_code == 65


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"{}",
        b"\xff",
        b'{"format": "evenkeel-dataset"}',
        b"null",
        b"[" * 10**5,
        b"1" * 10**5,
        b'{"format": "evenkeel-dataset", "version": 1}',
        b'{"format": [], "version": {}}',
        b"NaN",
        b"\0" * 9,
    ],
)
def test_a_manifest_that_is_none_is_refused(copy: Path, content):
    (copy / "dataset.json").write_bytes(content)
    with pytest.raises(Refusal, match="cannot be read"):
        open_index(copy)


@pytest.mark.parametrize("name", [*Manifest.model_fields, "checksum"])
def test_a_manifest_that_lacks_or_changes_a_part_is_refused(copy: Path, name):
    path = copy / manifests.NAME
    tree = json.loads(path.read_bytes())
    for changed in ({**tree, name: "other"}, {k: v for k, v in tree.items() if k != name}):
        path.write_text(json.dumps(changed))
        with pytest.raises(Refusal, match="cannot be read"):
            open_index(copy)


def test_a_manifest_with_a_part_more_is_refused_even_if_its_checksum_agrees(copy: Path):
    forge(copy, lambda tree: tree.update(more=1))
    with pytest.raises(Refusal, match="more: extra inputs are not permitted"):
        open_index(copy)


def test_a_class_renamed_in_the_manifest_is_refused(copy: Path):
    path = copy / manifests.NAME
    path.write_text(path.read_text().replace('"drink"', '"drank"'))
    with pytest.raises(Refusal, match=r"dataset.json: is not as it was written"):
        open_index(copy)


def test_a_manifest_laid_out_otherwise_is_the_same(copy: Path):
    """Its checksum is of what it says."""
    former = manifests.read(copy)
    path = copy / manifests.NAME
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_bytes()).items()))))
    assert manifests.read(copy) == former


def test_every_flipped_byte_of_a_manifest_is_refused_or_changes_nothing(copy: Path):
    path, former = copy / manifests.NAME, manifests.read(copy)
    content, random, same = path.read_bytes(), np.random.default_rng(0), 0
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(content):
            os.pwrite(file.fileno(), bytes([byte ^ (1 << int(random.integers(8)))]), place)
            try:
                assert manifests.read(copy) == former
                same += 1
            except Refusal as refusal:
                assert refusal.exit_code == 65  # noqa: PT017
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert same < len(content) / 50  # one space become another


@pytest.mark.parametrize(
    "name", ["../dataset.json", "/etc/passwd", "..", "", "../shards.arrow", "a/b.arrow", ".a.arrow"]
)
def test_a_manifest_cannot_lead_out_of_the_data_set(copy: Path, name):
    """Even where an attacker made every hash agree."""
    whole = (copy / manifests.NAME).read_bytes()

    def index(tree: Tree) -> None:
        tree["index"]["name"] = name
        if (copy / name).is_file():
            tree["index"]["sha256"] = hashlib.sha256((copy / name).read_bytes()).hexdigest()

    for change in (index, lambda tree: tree["shards"][0].update(name=name)):
        (copy / manifests.NAME).write_bytes(whole)
        forge(copy, change)
        with pytest.raises(Refusal, match="cannot be read"):
            open_index(copy)


@pytest.mark.parametrize("part", ["index", "shards"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bytes", -1),
        ("bytes", 10**30),
        ("bytes", 1.5),
        ("bytes", None),
        ("bytes", "7"),
        ("bytes", True),
        ("rows", -1),
        ("rows", 10**30),
        ("sha256", "0"),
        ("sha256", 7),
        ("name", 7),
        ("name", None),
        ("name", "a" * 200 + ".arrow"),
    ],
)
def test_a_forged_file_in_a_manifest_is_refused(copy: Path, part, name, value):
    forge(copy, lambda tree: (tree["index"] if part == "index" else tree["shards"][0]).update({name: value}))
    with pytest.raises(Refusal) as refusal:
        open_index(copy)
    assert refusal.value.exit_code == 65


@pytest.mark.parametrize(
    "member",
    [
        {"classes": []},
        {"classes": ["a", "b"]},
        {"classes": "abc"},
        {"groups": {}},
        {"groups": []},
        {"splits": []},
        {"groups": {"venue": [], "camera": []}},
        {"groups": {"camera": ["phone", "slr"], "venue": ["home", "street"]}},
        {"shards": []},
        {"generation": 0},
        {"history": [{}]},
        {"history": 1},
        {"rows": {"train": {"food": -1}}},
    ],
)
def test_a_forged_member_of_a_manifest_is_refused(copy: Path, member):
    forge(copy, lambda tree: tree.update(member))
    with pytest.raises(Refusal) as refusal:
        open_index(copy)
    assert refusal.value.exit_code == 65


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", -1),
        ("label", 3),
        ("split", -1),
        ("split", 3),
        ("shard", -1),
        ("shard", 99),
        ("group.venue", -1),
        ("group.venue", 2),
        ("offset", -1),
        ("offset", 2**63 - 1),
        ("offset", 2**40),
        ("length", -1),
        ("length", 2**31 - 1),
        ("group.camera", 2**31 - 1),
    ],
)
def test_a_forged_number_in_an_index_is_refused(copy: Path, column, value):
    """Even where an attacker made every hash agree."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_numpy().copy()
        values[5] = value
        place = table.schema.get_field_index(column)
        return table.set_column(place, table.schema.field(column), pa.array(values))

    forge_index(copy, change)
    with pytest.raises(Refusal, match=r"does not fit the manifest|leads behind the end"):
        open_index(copy)


@pytest.mark.parametrize("column", [*schema(("venue", "camera")).names])
@pytest.mark.parametrize("how", ["null", "other type", "dictionary", "missing", "renamed", "twice"])
def test_a_forged_column_of_an_index_is_refused(copy: Path, column, how):
    def change(table: pa.Table) -> pa.Table:
        place, values = table.schema.get_field_index(column), table[column]
        if how == "null":
            values = pa.array([None, *values.to_pylist()[1:]], values.type)
        elif how == "other type":
            values = values.cast(pa.string())
        elif how == "dictionary":
            values = values.dictionary_encode()
        elif how == "missing":
            return table.remove_column(place)
        elif how == "twice":
            return table.append_column(column, values)
        return table.set_column(place, "other" if how == "renamed" else column, values)

    forge_index(copy, change)
    with pytest.raises(Refusal, match=r"has nulls|does not have the columns of an index"):
        open_index(copy)


@pytest.mark.parametrize("rows", [0, 1, 153])
def test_a_forged_number_of_rows_is_refused(copy: Path, rows):
    forge_index(copy, lambda table: table.slice(0, rows))
    with pytest.raises(Refusal, match=r"order-.* does not fit the manifest|0 record batches"):
        open_index(copy)
    forge(copy, lambda tree: tree["index"].update(rows=154))
    with pytest.raises(Refusal, match=r"index-.* does not fit the manifest|0 record batches"):
        open_index(copy)


def test_an_id_that_is_no_text_is_refused(copy: Path):
    def change(table: pa.Table) -> pa.Table:
        names = [b"\xff", *(name.encode() for name in table["id"].to_pylist()[1:])]
        return table.set_column(0, "id", pa.array(names, pa.large_binary()).view(pa.large_string()))

    forge_index(copy, change)
    with pytest.raises(Refusal, match=r"(?i)invalid utf-?8"):
        open_index(copy)


def test_a_forged_range_within_a_shard_is_a_damaged_row(copy: Path):
    forge_index(copy, lambda table: table.set_column(table.schema.get_field_index("offset"), "offset", [[0] * 154]))
    index = open_index(copy)
    for row in range(154):
        assert damaged(index, row)


def test_an_earlier_generation_is_read_as_it_was(appended: Path):
    first, second = open_index(appended, 1), open_index(appended)
    assert (len(first.labels), len(second.labels)) == ROWS
    assert open_index(appended, 2).fingerprint == second.fingerprint != first.fingerprint
    assert second.ids[: ROWS[0]].equals(first.ids)
    assert second.shards[: len(first.shards)] == first.shards
    readers = Reader(first), Reader(second)
    for row in range(ROWS[0]):
        assert readers[0].read(row) == readers[1].read(row)
    with pytest.raises(Refusal, match=r"no 3 — it has 1, 2"):
        open_index(appended, 3)


def test_damage_of_an_earlier_generation_is_none_of_the_newest(appended: Path):
    path = manifests.copy_of(appended, 1)
    path.write_bytes(path.read_bytes().replace(b'"cat"', b'"cow"'))
    assert len(open_index(appended).labels) == ROWS[1]
    with pytest.raises(Refusal, match=r"000001.json: is not as it was written"):
        open_index(appended, 1)
    path.unlink()
    with pytest.raises(Refusal, match=r"000001.json"):
        open_index(appended, 1)


def test_a_whole_manifest_in_the_place_of_another_is_found(appended: Path):
    newest = (appended / manifests.NAME).read_bytes()
    manifests.copy_of(appended, 1).write_bytes(newest)
    with pytest.raises(Refusal, match="is not generation 1 with the fingerprint"):
        open_index(appended, 1)


def test_an_older_manifest_put_back_is_the_older_data_set(appended: Path):
    shutil.copy(manifests.copy_of(appended, 1), appended / manifests.NAME)
    index = open_index(appended)
    reader = Reader(index)
    assert [len(reader.read(row)) for row in range(ROWS[0])] == index.length.tolist()


def test_an_older_index_in_the_place_of_the_newer_is_refused(appended: Path):
    shutil.copy(appended / manifests.read(appended, 1).index.name, index_file(appended))
    with pytest.raises(Refusal, match="is not as it was written"):
        open_index(appended)


def test_a_folder_without_a_data_set_is_told_how_to_make_one(tmp_path: Path):
    with pytest.raises(Refusal, match=r"does not exist — make a data set with python -m jobs.ingest"):
        manifests.read(tmp_path)


def test_more_groups_than_a_number_can_count_are_read_and_verified(photos: Path, tmp_path: Path):
    names = [f"g{a}" for a in range(16)]
    head, *lines = photos.read_text().splitlines()
    random = np.random.default_rng(0)
    values = [",".join(f"v{v}" for v in random.integers(0, 16, 16)) for _ in lines]
    photos.write_text("\n".join([",".join([head, *names]), *map(",".join, zip(lines, values, strict=True))]))
    ingest(Ingest(source=Csv(path=photos, group_columns=tuple(names)), out=tmp_path / "data"), in_processes(1))
    index = open_index(tmp_path / "data")
    assert math.prod(map(len, index.group_values.values())) > 2**60
    reader = Reader(index)
    for row, name in enumerate(index.ids.to_pylist()):
        assert reader.read(row) == (photos.parent / name).read_bytes()
    found, place = index.occurring_cells()
    listed = list(index.group_values.values())
    for row in range(len(index.labels)):
        assert found[place[row]] == tuple(listed[a][v] for a, v in enumerate(index.groups[row]))
    assert found == sorted(found, key=lambda cell: [listed[a].index(v) for a, v in enumerate(cell)])
    with pytest.raises(Refusal, match="groups are too many"):
        _ = index.cells


def test_occurring_cells_are_those_of_all_cells_that_have_a_row(dataset: Path):
    index = open_index(dataset)
    found, place = index.occurring_cells()
    assert [found[p] for p in place] == [index.cell_names[c] for c in index.cells]


def test_a_reader_holds_few_shards_open_and_none_when_it_is_gone(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_module, "HANDLES", 2)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    reader = Reader(open_index(dataset))
    assert len(reader.index.shards) > 4
    rows = np.random.default_rng(0).integers(0, len(reader.index.labels), 300).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reader.read, rows)) == [Reader(reader.index).read(row) for row in rows]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_may_open_no_more_files_does_not_call_the_data_damaged(dataset: Path):
    reader, limits = Reader(open_index(dataset)), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as wrong:
            reader.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not isinstance(wrong.value, Refusal)
    assert reader.read(0)
