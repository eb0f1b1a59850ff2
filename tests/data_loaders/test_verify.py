import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from benchmarks.corruption import MEMORY, ROWS, make, watched
from data_loaders import manifest as manifests
from data_loaders.faults import Refusal
from data_loaders.index import Index, open_index
from data_loaders.manifest import NAME, SHARDS
from data_loaders.verify import DamagedShard, Verdict, verify

Tree = dict[str, Any]
MALFORMED = 600


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two generations."""
    folder = tmp_path_factory.mktemp("grown") / "data"
    make(folder, "a")
    return folder


@pytest.fixture
def copy(grown: Path, tmp_path: Path) -> Path:
    return shutil.copytree(grown, tmp_path / "copy")


def shard_path(folder: Path, number: int) -> Path:
    return folder / SHARDS / manifests.read(folder).shards[number].name


def ids_of(index: Index, number: int) -> list[str]:
    return index.ids.take(pa.array(np.flatnonzero(index.shard == number))).to_pylist()


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def only(found: Verdict) -> DamagedShard:
    (shard,) = found.damaged
    assert not found.faults
    return shard


def forge(folder: Path, name: str, content: bytes) -> None:
    """Puts these bytes in the place of an index or a shard, and makes the hashes of every manifest agree."""
    path = folder / name if (folder / name).exists() else folder / SHARDS / name
    path.write_bytes(content)
    manifest, history = folder / NAME, list[Tree]()
    for number in (1, 2):
        tree = json.loads(manifests.copy_of(folder, number).read_bytes())
        for file in (tree["index"], *tree["shards"]):
            if file["name"] == name:
                file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        tree["history"] = history
        tree["fingerprint"] = manifests.fingerprint(tree)
        tree["checksum"] = manifests.checksum(tree)
        manifests.copy_of(folder, number).write_text(json.dumps(tree))
        manifest.write_text(json.dumps(tree))
        history = [{"generation": number, "fingerprint": tree["fingerprint"], "rows": tree["index"]["rows"]}]


def forge_table(folder: Path, path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = change(pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    forge(folder, path.name, sink.getvalue().to_pybytes())


def test_a_sound_data_set_is_found_sound(grown: Path, capsys: pytest.CaptureFixture[str]):
    found = verify(grown)
    assert found.all_faults == found.orphans == []
    assert found.generations == [1, 2]
    assert found.rows == ROWS[1]
    assert found.shards == len(manifests.read(grown).shards)
    assert found.bytes == sum(path.stat().st_size for path in (grown / SHARDS).iterdir())
    assert f"verify: {found.bytes:,} of {found.bytes:,} bytes, " in capsys.readouterr().err


def test_one_generation_may_be_verified_alone(copy: Path):
    shard_path(copy, -1).unlink()
    index = copy / manifests.read(copy).index.name
    flip(index, 800)
    assert verify(copy, 1).all_faults == []
    assert [Path(fault.where).name for fault in verify(copy, 2).faults] == [index.name]
    with pytest.raises(Refusal, match="no 3"):
        verify(copy, 3)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_flipped_bit_of_an_image_damages_its_row_and_no_other(copy: Path, threads):
    index = open_index(copy)
    row = int(np.flatnonzero(index.shard == 2)[5])
    flip(shard_path(copy, 2), int(index.offset[row]) + 9)
    shard = only(verify(copy, None, threads))
    assert shard.damaged == [index.ids[row].as_py()]
    assert sorted(shard.damaged + shard.good) == sorted(ids_of(index, 2))
    fault = shard.fault(copy)
    assert fault.where == str(shard_path(copy, 2))
    rows = f"1 rows are damaged ({shard.damaged[0]}), {len(shard.good)} are good"
    assert fault.what == f"is not as it was written; {rows}"
    assert fault.fix.startswith(f"restore it from a copy, whose SHA-256 is {manifests.read(copy).shards[2].sha256}")


def test_a_flipped_bit_elsewhere_damages_no_row_but_the_shard(copy: Path):
    path = shard_path(copy, 0)
    flip(path, path.read_bytes().index(b"phone"))
    shard = only(verify(copy))
    assert (shard.what, shard.damaged) == ("is not as it was written", [])
    assert shard.good == ids_of(open_index(copy), 0)


@pytest.mark.parametrize("number", [0, -1])
def test_a_shard_cut_short_has_good_rows_before_the_cut(copy: Path, number):
    index, path = open_index(copy), shard_path(copy, number)
    number %= len(index.shards)
    rows = np.flatnonzero(index.shard == number)
    size, cut = path.stat().st_size, int(index.offset[rows[3]]) + 1
    os.truncate(path, cut)
    shard = only(verify(copy))
    assert shard.what == f"has {cut:,} bytes, not {size:,}"
    assert shard.good == ids_of(index, number)[:3]
    assert shard.damaged == ids_of(index, number)[3:]


def test_a_shard_with_bytes_behind_its_end_has_good_rows(copy: Path):
    path = shard_path(copy, 0)
    size = path.stat().st_size
    os.truncate(path, 2**40)  # a hole, which is not read
    shard = only(verify(copy))
    assert (shard.what, shard.damaged) == (f"has 1,099,511,627,776 bytes, not {size:,}", [])


@pytest.mark.parametrize("instead", ["nothing", "pipe", "folder", "link to itself", "link to /dev/zero"])
def test_all_rows_of_a_shard_that_is_no_file_are_damaged(copy: Path, instead):
    path = shard_path(copy, 1)
    path.unlink()
    if instead == "pipe":
        os.mkfifo(path)
    elif instead == "folder":
        path.mkdir()
    elif instead != "nothing":
        path.symlink_to(path.name if instead == "link to itself" else "/dev/zero")
    shard = only(verify(copy))
    assert shard.what.startswith("cannot be read: ")
    assert (shard.damaged, shard.good) == (ids_of(open_index(copy), 1), [])


def test_all_damage_is_found_in_one_pass(copy: Path):
    index = open_index(copy)
    first = copy / manifests.read(copy, 1).index.name
    flip(shard_path(copy, 0), int(index.offset[0]))
    os.truncate(shard_path(copy, 1), 100)
    shard_path(copy, 2).unlink()
    swapped = shard_path(copy, 3).read_bytes()
    shard_path(copy, 3).write_bytes(shard_path(copy, 4).read_bytes())
    shard_path(copy, 4).write_bytes(swapped)
    flip(first, 900)
    manifests.copy_of(copy, 2).unlink()
    found = verify(copy)
    assert [fault.where for fault in found.faults] == [str(manifests.copy_of(copy, 2)), str(first)]
    assert {shard.file.name for shard in found.damaged} == {index.shards[number] for number in range(5)}
    assert [len(shard.damaged) > 0 for shard in found.damaged] == [True] * 5
    tree = json.loads(json.dumps(found.to_json()))
    assert tree["rows"] == ROWS[1]
    assert [shard["damaged"] for shard in tree["damaged_shards"]] == [shard.damaged for shard in found.damaged]
    assert len(tree["damage"]) == 2


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_lost_manifest_is_no_end_and_its_copy_is_named(copy: Path, how):
    shard_path(copy, 0).unlink()
    flip(copy / NAME, 90) if how == "damaged" else (copy / NAME).unlink()
    found = verify(copy)
    (fault,) = found.faults
    assert fault.where == str(copy / NAME)
    assert fault.fix == f"{manifests.copy_of(copy, 2)} is whole: put a copy of it there"
    assert len(found.damaged) == 1
    shutil.rmtree(copy / manifests.GENERATIONS)
    with pytest.raises(Refusal):
        verify(copy)


def test_shards_are_read_by_an_older_index_where_the_newest_is_damaged(copy: Path):
    index, newest = open_index(copy, 1), copy / manifests.read(copy).index.name
    flip(newest, 1000)
    flip(shard_path(copy, 0), int(index.offset[7]))
    shard_path(copy, -1).unlink()
    found = verify(copy)
    assert [fault.where for fault in found.faults] == [str(newest)]
    by_name = {shard.file.name: shard for shard in found.damaged}
    assert by_name[index.shards[0]].damaged == [index.ids[7].as_py()]
    assert by_name[shard_path(copy, -1).name].good == []
    assert found.rows == ROWS[0]


def test_what_no_generation_names_is_told_but_is_no_damage(copy: Path):
    left = [copy / SHARDS / "train-g3-00000-00-01234567.arrow", copy / "index-g3-01234567.arrow"]
    left.append(manifests.copy_of(copy, 3))
    for path in left:
        path.write_bytes(b"")
    (copy / "audit.json").write_text("{}")
    found = verify(copy)
    assert found.all_faults == []
    assert sorted(found.orphans) == sorted(left)
    flip(manifests.copy_of(copy, 1), 60)
    assert verify(copy).orphans == []  # its files would seem to be some


FORGED: dict[str, Callable[[pa.Table], pa.Table]] = {
    "label": lambda t: t.set_column(2, t.schema.field(2), [pa.array([(k + 1) % 2 for k in t["label"].to_pylist()])]),
    "id": lambda t: t.set_column(0, t.schema.field(0), [t["id"].to_pylist()[::-1]]),
    "venue": lambda t: t.set_column(3, t.schema.field(3), [t["venue"].to_pylist()[::-1]]),
    "crc32c": lambda t: t.set_column(5, t.schema.field(5), [pa.array([0] * len(t), pa.uint32())]),
    "names of classes": lambda t: t.replace_schema_metadata(
        {k: v.replace(b'"cat", "dog"', b'"dog", "cat"') for k, v in t.schema.metadata.items()}
    ),
    "image.path": lambda t: t.set_column(
        1,
        t.schema.field(1),
        [[{"bytes": image["bytes"], "path": "x" * len(image["path"])} for image in t["image"].to_pylist()]],
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_shard_that_tells_other_tools_something_else_is_found(copy: Path, what):
    """Even where every hash agrees."""
    path = shard_path(copy, 0)
    forge_table(copy, path, lambda t: t)
    assert verify(copy).all_faults == []
    forge_table(copy, path, FORGED[what])
    shard = only(verify(copy))
    assert shard.what == f"has other {what} than the index"
    assert shard.damaged == []


@pytest.mark.parametrize("how", ["renamed", "null", "no metadata"])
def test_a_shard_whose_rows_are_good_but_that_other_tools_misread_is_found(copy: Path, how):
    def change(table: pa.Table) -> pa.Table:
        if how == "renamed":
            return table.set_column(3, "vanue", table["venue"])
        if how == "null":
            return table.set_column(2, table.schema.field(2), [[None, *table["label"].to_pylist()[1:]]])
        return table.replace_schema_metadata({b"huggingfake": table.schema.metadata[b"huggingface"]})

    forge_table(copy, shard_path(copy, 0), change)
    shard = only(verify(copy))
    assert shard.damaged == []
    assert shard.what.startswith(
        "cannot be read by other tools: " if how == "no metadata" else "does not have the columns of a shard"
    )


@pytest.mark.parametrize("how", ["column more", "column less", "null", "compressed", "no metadata", "no rows"])
def test_a_shard_that_is_not_of_the_format_is_found(copy: Path, how):
    path = shard_path(copy, 0)
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    if how == "column more":
        table = table.append_column("more", table["id"])
    elif how == "column less":
        table = table.drop_columns(["venue"])
    elif how == "null":
        table = table.set_column(2, table.schema.field(2), [[None, *table["label"].to_pylist()[1:]]])
    elif how == "no metadata":
        table = table.replace_schema_metadata(None)
    elif how == "no rows":
        table = table.slice(0, 0)
    table = table.replace_schema_metadata((table.schema.metadata or {}) | {b"long": b"x" * path.stat().st_size})
    sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression="lz4" if how == "compressed" else None)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    forge(copy, path.name, sink.getvalue().to_pybytes())
    assert only(verify(copy)).damaged == ids_of(open_index(copy), 0)


def test_a_forged_index_whose_counts_are_not_those_of_the_manifest_is_found(copy: Path):
    def relabel(table: pa.Table) -> pa.Table:
        values = table["label"].to_pylist()
        place = table.schema.get_field_index("label")
        return table.set_column(place, table.schema.field(place), [pa.array([1 - values[0], *values[1:]], pa.int32())])

    path = copy / manifests.read(copy).index.name
    forge_table(copy, path, relabel)
    found = verify(copy)
    assert [fault.where for fault in found.faults] == [str(path), str(copy / manifests.read(copy, 1).index.name)]
    assert "has other rows of classes and splits than the manifest says" in str(found.faults[0])
    assert "has rows that a later generation changed" in str(found.faults[1])
    assert only(dataclasses.replace(found, faults=[])).what == "has rows that are not those of the index"


def malformed(content: bytes, random: np.random.Generator) -> bytes:
    """An Arrow file whose framing or metadata is broken, in the ways of apache/arrow-testing."""
    edited = bytearray(content)
    words = [0, 1, 7, 0xFF, 0x7FFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF8, len(content), len(content) * 2]
    kind = random.integers(6)
    footer = int.from_bytes(content[-10:-6], "little")
    parts = [(0, 16), (16, 1200), (len(content) - 10 - footer, len(content) - 10), (len(content) - 10, len(content))]
    start, stop = parts[random.integers(len(parts))]
    if kind == 0:  # no footer, or a part of it
        return content[: random.integers(len(content) - 10 - footer, len(content))]
    if kind == 1:
        return content[random.integers(1, 64) :]
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(start, max(start + 1, stop - 4)))
        if kind in {2, 3}:  # lengths and offsets of flatbuffers are words
            place = place // 4 * 4
            edited[place : place + 4] = int(random.choice(words)).to_bytes(4, "little")
        elif kind == 4:
            edited[place] ^= 1 << int(random.integers(8))
        else:
            edited[place : place + 64] = content[start : start + 64]
    return bytes(edited)


def judge_malformed(sender: Connection, clean: Path, folder: Path, numbers: range) -> None:
    shutil.copytree(clean, folder, dirs_exist_ok=True)
    newest = manifests.read(folder)
    paths = [folder / SHARDS / newest.shards[0].name, folder / newest.index.name]
    sender.send("ready")
    for number in numbers:
        path = paths[number % 2]
        content = path.read_bytes()
        forge(folder, path.name, malformed(content, np.random.default_rng(number)))
        try:
            sender.send("damaged" if verify(folder, 2, 1).all_faults else "sound")
        except Exception as wrong:
            sender.send(repr(wrong))
        forge(folder, path.name, content)


def test_malformed_arrow_files_with_the_right_hashes_end_in_a_verdict(grown: Path):
    """In a child, so that a crash of it is counted."""
    with (
        TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder,
        watched(judge_malformed, grown, Path(folder), range(MALFORMED)) as heard,
    ):
        verdicts = Counter(heard() for _ in range(MALFORMED))
    assert verdicts.keys() == {"damaged", "sound"}
    assert verdicts["damaged"] > MALFORMED / 2


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["verify", *map(str, words)])
    importlib.import_module("jobs.verify").main()


def test_the_job_says_that_all_is_well(monkeypatch, grown: Path, capsys: pytest.CaptureFixture[str]):
    run(monkeypatch, f"data={grown}")
    assert capsys.readouterr().out.startswith(f"generations 1, 2: {ROWS[1]} rows in ")


def test_the_job_ends_with_65_and_lists_the_damage(monkeypatch, copy: Path, capsys: pytest.CaptureFixture[str]):
    index = open_index(copy)
    flip(shard_path(copy, 2), int(index.offset[np.flatnonzero(index.shard == 2)[0]]))
    (copy / SHARDS / "train-g3-00000-00-01234567.arrow").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, f"data={copy}", f"out={copy / 'verdict.json'}")
    assert end.value.code == 65
    printed = capsys.readouterr()
    assert f"{shard_path(copy, 2)}: is not as it was written; 1 rows are damaged (" in printed.err
    assert f"the verdict is in {copy / 'verdict.json'}" in printed.err
    assert "no generation names 1 files" in printed.out
    (shard,) = json.loads((copy / "verdict.json").read_text())["damaged_shards"]
    assert shard["damaged"] == [ids_of(index, 2)[0]]
    assert shard["good"] == ids_of(index, 2)[1:]


def test_the_job_tells_a_folder_without_a_data_set(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, f"data={tmp_path}")
    assert end.value.code == 65
    assert "make a data set with python -m jobs.ingest" in capsys.readouterr().err
