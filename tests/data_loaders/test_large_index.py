"""An index that is mapped into memory, and verified while it is used, is the one that is read into memory."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import large_index
from data_loaders import indexing, mapped
from data_loaders import manifest as manifests
from data_loaders.faults import Refusal
from data_loaders.index import Index, Reader, open_index, schema
from data_loaders.manifest import Dropped, File, Manifest
from data_loaders.mapped import ArrowFile
from data_loaders.sampler import AnySampler, Deferred, GroupConditional, Joint, Progressive, Stratified, Undersampled
from data_loaders.verify import verify

FAR = 2000
MIXES: list[AnySampler] = [
    Stratified(),
    Stratified(temper=1),
    Stratified(by="label_and_group", temper=0.5),
    Stratified(by="label_and_group", columns=("venue", "camera")),
    Stratified(by="label_and_group", columns=("camera", "venue")),
    Stratified(by="label_and_group", columns=("camera",)),
    Stratified(by="group", temper=1),
    Undersampled(by="label_and_group"),
    Undersampled(redraw=True),
    GroupConditional(),
    Progressive(),
    Deferred(),
]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every index is a large one."""
    monkeypatch.setattr(mapped, "LARGE", 0)


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


def of_rows(folder: Path, table: pa.Table, counts: tuple[int, ...], classes: int, splits: int) -> Manifest:
    """A data set of these rows, whose images are nowhere; `counts` are those of the values of each group column."""
    groups = {f"g{a}": tuple(f"v{v}" for v in range(count)) for a, count in enumerate(counts)}
    index, order = indexing.write(folder, 1, tuple(groups), [table[:3], table[3:]], len(table), folder)
    shard = File(name="a-g1-00000-00-00000000.arrow", rows=len(table), bytes=2**30, sha256="0" * 64)
    dropped = Dropped(rows=0, by_class={}, by_group={}, by_cell=())
    made = Manifest(
        generation=1,
        classes=tuple(f"c{k}" for k in range(classes)),
        groups=groups,
        splits=tuple(f"s{s}" for s in range(splits)),
        index=index,
        order=order,
        shards=(shard,),
        rows={},
        images={},
        rejected=dropped,
        settings={},
    )
    return manifests.publish(folder, made)


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, tuple[int, ...], int, int]:
    """Rows of an index, and how many values each group column, class and split may have."""
    rows, counts = draw(st.integers(1, 60)), tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    classes, splits, seed = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    most = {"label": classes, "split": splits, "shard": 1, "offset": 1000} | {
        f"group.g{a}": n for a, n in enumerate(counts)
    }
    stored = schema(tuple(f"g{a}" for a in range(len(counts))))
    columns = {
        field.name: pa.array(random.integers(0, most.get(field.name, 100), rows), field.type)
        for field in stored
        if field.name != "id"
    }
    ids = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), min_size=rows, max_size=rows))
    return pa.table(columns | {"id": pa.array(ids, pa.large_string())}, schema=stored), counts, classes, splits


@given(tables())
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_and_mapped_as_it_was_and_its_order_is_that_of_a_sort(given):
    table, *most = given
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        manifest = of_rows(Path(name), table, *most)
        small = open_index(Path(name))
        patch.setattr(mapped, "LARGE", 0)
        patch.setattr(mapped, "SLICE", 7)
        index = open_index(Path(name))
        index.check(wait=True)
        assert index.ids.to_pylist() == table["id"].to_pylist() == [index.id_of(row) for row in range(len(table))]
        for column in ("shard", "offset", "length", "crc32c", "width", "look", "unit"):
            assert getattr(index, column).tolist() == getattr(small, column).tolist() == table[column].to_pylist()
        assert index.labels.tolist() == table["label"].to_pylist()
        assert index.groups.T.tolist() == [table[f"group.{name}"].to_pylist() for name in manifest.groups]
        keys = [index.split, index.labels, *index.groups.T]
        for order, counted in ((index.by_class, keys[:2]), (index.by_cell, keys)):
            parts = [order.rows[f : f + n] for f, n in zip(order.first, order.sizes, strict=True)]
            assert np.concatenate(parts).tolist() == np.lexsort((np.arange(len(table)), *counted[::-1])).tolist()
        for split in index.splits:
            whole, listed = index.whole(split), index.rows_of(split)
            assert len(whole) == len(listed)
            assert np.asarray(whole).tolist() == listed.tolist()
            for sizes in (Index.class_sizes, Index.cell_sizes):
                assert sizes(index, whole).tolist() == sizes(index, listed).tolist()
        assert index.cells_of(np.arange(len(table))).tolist() == index.cells.tolist()


@pytest.mark.parametrize("at_once", [1, 5, 2**22])
def test_rows_are_sorted_some_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at_once):
    monkeypatch.setattr(indexing, "SORTED", at_once)
    monkeypatch.setattr(indexing, "IN_MEMORY", 10)
    made = large_index.write(tmp_path, 3000, 4, 3)
    index = open_index(tmp_path)
    order = index.by_cell
    assert len(order.sizes) > 20
    keys = (np.arange(3000), *index.groups.T[::-1], index.labels, index.split)
    assert order.rows[order.first[0] :].tolist() == np.lexsort(keys).tolist()
    assert {path.name for path in tmp_path.glob("*.arrow")} == {made.index.name, made.order.name}


@pytest.mark.parametrize("mix", MIXES, ids=repr)
def test_a_stream_over_a_whole_split_is_the_one_over_the_list_of_its_rows(large: None, dataset: Path, mix: AnySampler):
    index = open_index(dataset)
    streams = [mix.over(index, rows, 3, FAR) for rows in (index.whole("train"), index.rows_of("train"))]
    first, second = (stream.rows(np.arange(FAR)).tolist() for stream in streams)
    assert first == second
    for span in ((0, FAR), (7, 90), (FAR // 2, FAR)):
        assert streams[0].counts(*span).tolist() == streams[1].counts(*span).tolist()


def test_a_joint_mix_of_a_whole_split_is_the_one_of_its_rows(large: None, dataset: Path):
    index = open_index(dataset)
    shares = {name: {"home, phone": 1.0} for name in ("food", "drink")} | {"dessert": {"home, slr": 2.0}}
    mix = Joint(shares=shares)
    streams = [mix.over(index, rows, 3) for rows in (index.whole("train"), index.rows_of("train"))]
    assert streams[0].rows(np.arange(FAR)).tolist() == streams[1].rows(np.arange(FAR)).tolist()


def test_a_class_of_which_a_whole_split_has_no_row_is_named(tmp_path: Path):
    large_index.write(tmp_path, 1000, 3, 2)
    index = open_index(tmp_path)
    stream = Stratified().over(index, index.whole("val"), 0)
    assert set(index.labels[stream.rows(np.arange(60))].tolist()) == {0, 1, 2}
    forge_manifest(tmp_path, lambda tree: tree["classes"].append("more"))
    index = open_index(tmp_path)
    with pytest.raises(Refusal, match="no training row of 'more'"):
        Stratified().over(index, index.whole("val"), 0)


def test_the_images_of_a_mapped_index_are_those_of_one_in_memory(large: None, dataset: Path):
    index = open_index(dataset)
    reader = Reader(index)
    assert [reader.read(row) for row in range(len(index))]
    index.check(wait=True)


def test_neither_opening_nor_sampling_takes_memory_for_each_row(large: None, tmp_path: Path):
    rows = 400_000
    large_index.write(tmp_path, rows, 20, 5)
    tracemalloc.start()
    try:
        index = open_index(tmp_path, verifies=False)
        for mix in large_index.MIXES.values():
            mix.over(index, index.whole("train"), 0).rows(np.arange(256))
        index.cell_sizes(index.whole("train"))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < rows


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def forge_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads((folder / manifests.NAME).read_bytes())
    change(tree)
    tree["fingerprint"], tree["checksum"] = manifests.fingerprint(tree), ""
    tree["checksum"] = manifests.checksum(tree)
    (folder / manifests.NAME).write_text(json.dumps(tree))


def forge(folder: Path, part: str, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Changes the index or the order of a data set, and makes all hashes agree."""
    about = getattr(manifests.read(folder), part)
    path = folder / about.name
    table = change(pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all())
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "rows": len(table)}
    forge_manifest(folder, lambda tree: tree[part].update(about))
    return path


@pytest.mark.parametrize("part", ["index", "order"])
@pytest.mark.parametrize("place", [0, 8, 300, -300, -1])
@pytest.mark.parametrize("is_large", [False, True])
def test_damage_anywhere_is_found_at_the_opening_or_when_it_is_asked_for(
    copy: Path, monkeypatch: pytest.MonkeyPatch, part, place, is_large
):
    monkeypatch.setattr(mapped, "LARGE", 0 if is_large else 2**28)
    path = copy / getattr(manifests.read(copy), part).name
    flip(path, place)
    with pytest.raises(Refusal, match=path.name) as refusal:
        open_index(copy).check(wait=True)
    assert refusal.value.exit_code == 65


USES: dict[str, Callable[[Index], object]] = {
    **{name: attrgetter(name) for name in ("labels", "groups", "split", "ids", "cells")},
    "rows of a split": lambda index: index.rows_of("train"),
    "list of a whole split": lambda index: np.asarray(index.whole("train")),
    "occurring cells": Index.occurring_cells,
    "image": lambda index: Reader(index).read(5),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_is_asked_of_all_rows_waits_for_the_verdict(large: None, copy: Path, use):
    path = copy / manifests.read(copy).index.name
    offsets = open_index(copy, verifies=False).offset
    flip(path, path.read_bytes().index(offsets.tobytes()) + 5 * 8)
    index = open_index(copy)
    with pytest.raises(Refusal, match=rf"{path.name}: is not as it was written"):
        use(index)


def _known(index: Index) -> None:
    index.samples(np.arange(3))
    index.check(wait=True)


@pytest.mark.parametrize("column", ["shard", "label", "group.venue"])
def test_a_number_that_leads_nowhere_is_damage_of_the_index_wherever_it_is_met(large: None, copy: Path, column):
    path = copy / manifests.read(copy).index.name
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    content = bytearray(path.read_bytes())
    start = content.index(table[column].to_numpy().tobytes())
    content[start + 3] = 0x7F
    path.write_bytes(content)
    index = open_index(copy)
    with pytest.raises(Refusal, match="is not as it was written"):
        Reader(index).read(0)
    with pytest.raises(Refusal, match="is not as it was written"):
        _known(open_index(copy))


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lets the thread that verifies begin when it is set."""
    go, parent, whole = threading.Event(), os.getpid(), ArrowFile.verify

    def late(file: ArrowFile) -> None:
        if os.getpid() == parent:
            go.wait()
        whole(file)

    monkeypatch.setattr(ArrowFile, "verify", late)
    yield go
    go.set()


def test_a_check_does_not_wait_unless_it_is_told_to(large: None, copy: Path, held_back: threading.Event):
    path = copy / manifests.read(copy).order.name
    rows = open_index(copy, verifies=False).by_class.rows
    flip(path, path.read_bytes().index(rows.tobytes()))
    index = open_index(copy)
    index.check()
    held_back.set()
    for wait in (True, False):
        with pytest.raises(Refusal, match=rf"{path.name}: is not as it was written"):
            index.check(wait)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 says so of any fork with threads
def test_a_fork_verifies_by_itself_what_its_parent_has_not_verified_yet(
    large: None, copy: Path, held_back: threading.Event
):
    index = open_index(copy)
    child = os.fork()
    if not child:
        index.check(wait=True)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    held_back.set()
    index.check(wait=True)


def _opened(index: Index) -> tuple[int, str]:
    index.check(wait=True)
    return len(index), index.fingerprint


def test_an_index_is_sent_to_other_processes_as_its_place(large: None, dataset: Path):
    index = open_index(dataset)
    assert len(pickle.dumps(index)) < 10_000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_opened, (index,))[1] == index.fingerprint
    sent = pickle.loads(pickle.dumps(index.whole("val")))  # noqa: S301
    assert np.asarray(sent).tolist() == index.rows_of("val").tolist()


def test_the_verification_reads_all_of_both_files_while_the_index_is_used(
    large: None, dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mapped, "SLICE", 100)
    index = open_index(dataset)
    index.check(wait=True)
    assert not any(thread.name == "verify" and thread.is_alive() for thread in threading.enumerate())


@pytest.mark.parametrize(
    "how", ["other row", "two rows turned", "row twice", "row missing", "stratum twice", "other class", "no row there"]
)
@pytest.mark.parametrize("level", ["class", "cell"])
def test_a_forged_order_is_found_by_the_opening_or_by_verify(copy: Path, how, level):
    def change(table: pa.Table) -> pa.Table:
        lines = table.to_pylist()
        line = next(n for n, one in enumerate(lines) if (one["group.venue"] < 0) == (level == "class") and n % 2)
        rows, before = lines[line]["rows"], lines[line - 1]["rows"]
        if how == "other row":
            rows[0], before[0] = before[0], rows[0]
        elif how == "two rows turned":
            own = [one for one in lines if (one["group.venue"] < 0) == (level == "class")]
            longest = max(own, key=lambda one: len(one["rows"]))
            longest["rows"] = longest["rows"][::-1]
        elif how == "row twice":
            rows.append(rows[-1])
        elif how == "row missing":
            rows.pop()
        elif how == "stratum twice":
            lines.insert(line, lines[line])
        elif how == "other class":
            lines[line]["label"] += 1
        else:
            rows[0] = 154
        return pa.Table.from_pylist(lines, table.schema).combine_chunks()

    path = forge(copy, "order", change)
    if how in {"other row", "two rows turned"}:
        assert len(open_index(copy)) == 154
    else:
        with pytest.raises(Refusal, match=rf"{path.name}: does not fit the manifest"):
            open_index(copy)
    assert str(path) in [fault.where for fault in verify(copy).faults]


def test_an_index_of_several_batches_is_refused(copy: Path):
    path = copy / manifests.read(copy).index.name
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    content = path.read_bytes()
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    forge_manifest(copy, lambda tree: tree["index"].update(about))
    with pytest.raises(Refusal, match="has 2 record batches, not one"):
        open_index(copy)


def test_the_benchmark_measures_a_data_set_that_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    large_index.write(tmp_path, 5000, 3, 2)
    large_index.measure(tmp_path)
    said = capsys.readouterr().out
    assert "5,000 rows" in said
    assert "verified:" in said
