import errno
import os
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import ingested, noisy, path_of
from PIL import Image

from data_loaders import images, loader
from data_loaders.audit.properties import measure
from data_loaders.audit.reading import of_images
from data_loaders.augment import PadCrop, Plain, Standard, centred
from data_loaders.contents.overview import overview, read
from data_loaders.contents.page import write as write_page
from data_loaders.contents.pixels import channels
from data_loaders.decode import Undecodable, decode
from data_loaders.faults import Refusal
from data_loaders.index import DamagedRow, Index, Reader, open_index
from data_loaders.loader import (
    MOST_AHEAD,
    Batch,
    Costs,
    Data,
    cuts,
    exact_batches,
    file_batches,
    ids_of,
    training_batches,
)
from data_loaders.policies import RandAugment
from data_loaders.sampler import Stratified
from data_loaders.sources.folder import Folder
from data_loaders.sources.rows import Row
from data_loaders.torch import ShardDataset

STEPS = range(3, 8)


def batches(folder: Path, rank: int = 0, workers: int = 1, costs: Costs | None = None, **settings) -> list[Batch]:
    data = Data.model_validate({"path": folder, "size": 10, "batch": 16} | settings)
    index = open_index(folder)
    sampler = data.sampler.over(index, index.rows_of(data.train), 5)
    return list(training_batches(index, data, sampler, 5, STEPS, cuts(data.batch, workers)[rank], costs=costs))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(arrays(p), arrays(q), strict=True)
    )


def arrays(batch: Batch) -> list[Any]:
    """What a batch holds that no GPU has to decode."""
    assert batch.encoded is None
    return list(batch)[:-1]


def joined(parts: list[list[Batch]]) -> list[Batch]:
    """The whole batch of every step, of the parts that several workers have."""
    steps = (zip(*map(arrays, step), strict=True) for step in zip(*parts, strict=True))
    return [Batch(*[np.concatenate(field) for field in step], encoded=None) for step in steps]


@given(st.integers(1, 500), st.integers(1, 64))
def test_parts_of_a_batch_are_contiguous_begin_at_even_places_and_are_about_as_large(batch, parts):
    found = cuts(batch, parts)
    assert [place for part in found for place in part] == list(range(batch))
    assert len(found) == parts
    assert all(part.start % 2 == 0 for part in found)
    assert np.ptp([len(part) for part in found]) <= 3


@pytest.mark.parametrize("workers", [2, 3, 4, 5])
def test_the_global_batch_is_the_same_for_any_number_of_workers(dataset: Path, workers):
    whole = batches(dataset)
    parts = [batches(dataset, rank, workers) for rank in range(workers)]
    assert same(whole, joined(parts))


@pytest.mark.parametrize(
    "settings", [{"threads": 1}, {"threads": 5, "memory": 1}, {"loading": "processes", "threads": 2}]
)
@pytest.mark.parametrize("augmentation", [Standard(rotation=20, policy=RandAugment(), cutout=3), PadCrop()])
def test_threads_processes_and_memory_change_no_batch(dataset: Path, settings, augmentation):
    assert same(batches(dataset, augmentation=augmentation), batches(dataset, augmentation=augmentation, **settings))


@pytest.mark.parametrize("shards", [{}, {"encoding": "raw", "side": 24}])
def test_photographs_and_pixels_are_the_same_bits_however_they_are_loaded(tmp_path: Path, shards):
    for k in range(12):
        noisy(k, 50 + k, 70).save(path_of(tmp_path / "images", k))
    folder = ingested(tmp_path / "images", **shards)
    augmentation = Standard(area=(0.08, 1.0), policy=RandAugment())
    whole = batches(folder, augmentation=augmentation)
    ways: list[dict[str, Any]] = [{"threads": 1}, {"threads": 7}, {"loading": "processes", "threads": 1}]
    for settings in ways:
        assert same(whole, batches(folder, augmentation=augmentation, **settings))
    assert same(whole, joined([batches(folder, rank, 4, augmentation=augmentation) for rank in range(4)]))


@pytest.mark.parametrize("augmentation", [Plain(), Standard(rotation=20), PadCrop()])
def test_an_image_is_a_function_of_row_seed_and_position(dataset: Path, augmentation):
    index, reader = open_index(dataset), Reader(open_index(dataset))
    for step, batch in zip(STEPS, batches(dataset, augmentation=augmentation), strict=True):
        assert batch.images.dtype == np.uint8
        assert batch.images.shape == (16, 3, 10, 10)
        assert batch.valid.all()
        np.testing.assert_array_equal(batch.labels, index.labels[batch.rows])
        np.testing.assert_array_equal(batch.cells, index.cells[batch.rows])
        np.testing.assert_array_equal(batch.positions, step * 16 + np.arange(16))
        for place, row in enumerate(batch.rows):
            image = augmentation.augmented(decode(reader.read(row)), 10, 5, step * 16 + place)
            np.testing.assert_array_equal(batch.images[place], image.transpose(2, 0, 1))


def test_a_balanced_batch_holds_every_class_equally_often(dataset: Path):
    for batch in batches(dataset, batch=15, sampler=Stratified()):
        np.testing.assert_array_equal(np.bincount(batch.labels), [5, 5, 5])


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_an_exact_pass_holds_every_row_once_in_the_same_batches(dataset: Path, workers):
    index = open_index(dataset)
    data, rows = Data(path=dataset, size=10, batch=8), open_index(dataset).rows_of("test")
    found = [list(exact_batches(index, data, rows, rank, workers)) for rank in range(workers)]
    seen = np.concatenate([batch.rows[batch.valid] for part in found for batch in part])
    assert sorted(seen) == sorted(rows)
    whole = list(exact_batches(index, data, rows))
    assert same(whole, [found[i % workers][i // workers] for i in range(len(whole))])
    assert all(batch.images.shape[0] == 8 for batch in whole)
    assert [int(batch.valid.sum()) for batch in whole] == [8, 8, 8, 8, 5]
    assert not whole[-1].images[5:].any()


def test_an_exact_pass_sees_the_centre_and_no_augmentation(dataset: Path):
    index, rows = open_index(dataset), open_index(dataset).rows_of("test")[:3]
    (batch,) = exact_batches(index, Data(path=dataset, size=10, batch=3), rows)
    for image, row in zip(batch.images, rows, strict=True):
        np.testing.assert_array_equal(image, centred(decode(Reader(index).read(row)), 10).transpose(2, 0, 1))


def damaged(dataset: Path, folder: Path, rows: list[int]) -> Path:
    """A copy of a data set in which a bit of each of these rows is another one."""
    shutil.copytree(dataset, folder)
    index = open_index(folder)
    for row in rows:
        with (folder / "shards" / index.shards[index.shard[row]]).open("r+b") as shard:
            shard.seek(int(index.offset[row]) + 40)
            (byte,) = shard.read(1)
            shard.seek(-1, os.SEEK_CUR)
            shard.write(bytes([byte ^ 1]))
    return folder


@pytest.mark.parametrize("loading", ["threads", "processes"])
def test_a_damaged_row_ends_the_stream_with_its_name(dataset: Path, tmp_path: Path, loading):
    row = int(open_index(dataset).rows_of("train")[0])
    folder = damaged(dataset, tmp_path / "copy", [row])
    with pytest.raises(DamagedRow, match=rf"row {row} \("):
        batches(folder, sampler=Stratified(temper=1), batch=84, loading=loading)


def bad_rows(dataset: Path, n: int) -> list[int]:
    """The first rows that are learnt from of the largest cell."""
    index = open_index(dataset)
    rows = index.rows_of("train")
    kinds = index.labels[rows] * len(index.cell_names) + index.cells[rows]
    return rows[kinds == np.bincount(kinds).argmax()][:n].tolist()


@pytest.mark.parametrize("settings", [{}, {"loading": "processes"}, {"threads": 3}])
def test_a_damaged_row_may_be_skipped_for_another_of_its_class_and_groups(
    dataset: Path, tmp_path: Path, settings, capsys
):
    bad = bad_rows(dataset, 2)
    folder = damaged(dataset, tmp_path / "copy", bad)
    settings = {"damaged": "skip", "most_damaged": 0.02, "sampler": Stratified(temper=1), "batch": 42} | settings
    costs = Costs()
    sound, mended = batches(dataset, **settings), batches(folder, costs=costs, **settings)
    replaced = 0
    for before, after in zip(sound, mended, strict=True):
        assert not np.isin(after.rows, bad).any()
        np.testing.assert_array_equal(before.labels, after.labels)
        np.testing.assert_array_equal(before.cells, after.cells)
        same_row = before.rows == after.rows
        np.testing.assert_array_equal(same_row, ~np.isin(before.rows, bad))
        np.testing.assert_array_equal(before.images[same_row], after.images[same_row])
        np.testing.assert_array_equal(after.replaced, ~same_row)
        replaced += int(after.replaced.sum())
    assert replaced > 0
    assert costs.damaged == set(bad)
    assert all(f"row {row} (" in capsys.readouterr().err for row in bad[:1])
    parts = [batches(folder, rank, 3, **settings) for rank in range(3)]
    assert same(mended, joined(parts))


def test_what_fails_for_now_is_never_skipped(dataset: Path, monkeypatch):
    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(DamagedRow, match="cannot be read: stale file handle"):
        batches(dataset, damaged="skip", most_damaged=1.0)
    monkeypatch.undo()

    def short(*_):
        raise Undecodable("takes more memory to decode than there is") from MemoryError()

    monkeypatch.setattr(images, "decode", short)
    with pytest.raises(DamagedRow, match="more memory"):
        batches(dataset, damaged="skip", most_damaged=1.0)


def test_of_a_rare_kind_another_row_is_found_however_far_away(dataset: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loader, "LOOKED_AT", 0)
    bad = bad_rows(dataset, 1)
    folder = damaged(dataset, tmp_path / "copy", bad)
    settings = {"damaged": "skip", "sampler": Stratified(temper=1), "batch": 42}
    one, two = batches(folder, **settings), batches(folder, **settings, threads=3)
    assert sum(int(batch.replaced.sum()) for batch in one) > 0
    assert same(one, two)
    for before, after in zip(batches(dataset, **settings), one, strict=True):
        np.testing.assert_array_equal(before.cells, after.cells)
        np.testing.assert_array_equal(before.labels, after.labels)


def test_more_damaged_rows_than_the_ceiling_end_the_stream(dataset: Path, tmp_path: Path):
    folder = damaged(dataset, tmp_path / "copy", bad_rows(dataset, 2))
    with pytest.raises(Refusal, match=r"2 damaged rows were met, and data\.most_damaged lets 1 be skipped"):
        batches(folder, damaged="skip", sampler=Stratified(temper=1), batch=84)


def test_a_damaged_row_that_is_the_last_of_its_kind_ends_the_stream(dataset: Path, tmp_path: Path):
    index = open_index(dataset)
    rows = index.rows_of("train")
    kinds = index.labels[rows] * len(index.cell_names) + index.cells[rows]
    sizes = np.bincount(kinds)
    bad = rows[kinds == np.flatnonzero(sizes == sizes[sizes > 0].min())[0]].tolist()
    folder = damaged(dataset, tmp_path / "copy", bad)
    with pytest.raises(DamagedRow):
        batches(folder, damaged="skip", most_damaged=1.0, sampler=Stratified(temper=1), batch=84)


def test_memory_of_batches_is_used_again_when_nobody_holds_them(dataset: Path):
    seen = set()
    for batch in batches_of(dataset, range(40)):
        seen.add(batch.images.ctypes.data)
    assert len(seen) <= MOST_AHEAD + 2
    kept = list(batches_of(dataset, range(12)))
    assert len({batch.images.ctypes.data for batch in kept}) == 12
    assert same(kept, list(batches_of(dataset, range(12))))


def batches_of(folder: Path, steps: range) -> Iterator[Batch]:
    index, data = open_index(folder), Data(path=folder, size=10, batch=16)
    yield from training_batches(index, data, data.sampler.over(index, data.training_rows(index), 5), 5, steps)


def test_memory_that_holds_less_than_three_batches_is_refused(dataset: Path):
    with pytest.raises(
        Refusal, match=r"data\.memory: 1 MB hold less than three batches of 0\.5 MB.* data.memory=2 or more"
    ):
        batches(dataset, memory=1, size=100)


def test_a_process_that_loads_and_is_killed_is_told(dataset: Path):
    index, data = open_index(dataset), Data(path=dataset, size=10, batch=16, loading="processes", threads=1)
    stream = training_batches(index, data, Stratified().over(index, index.rows_of("train"), 5), 5, range(1000))
    next(stream)
    tasks = Path("/proc/self/task").glob("*/children")
    children = [int(pid) for task in tasks for pid in task.read_text().split()]
    (helper,) = [pid for pid in children if b"help_with" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(helper, signal.SIGKILL)
    with pytest.raises(Refusal, match="ended with exit code -9"):
        for _ in stream:
            pass


def test_the_time_that_is_waited_is_shared_out_by_cause(dataset: Path):
    costs = Costs()
    batches(dataset, costs=costs, augmentation=Standard(policy=RandAugment()))
    assert (costs.waited > 0).all()


def test_a_stream_that_is_left_early_closes_its_files(dataset: Path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        stream = training_batches(
            open_index(dataset),
            Data(path=dataset, size=10, batch=8),
            Stratified().over(open_index(dataset), open_index(dataset).rows_of("train"), 0),
            0,
            range(10**6),
        )
        next(stream)
        stream.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_files_outside_of_a_data_set_are_read_and_bad_ones_told(dataset: Path, tmp_path: Path):
    for i in range(5):
        Image.new("RGB", (20, 10 + i), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"not an image")
    source = Folder(path=tmp_path)
    rows = [row for row in source.rows(labelled=False) if isinstance(row, Row)]
    found = list(file_batches(source, rows, Data(path=dataset, size=8, batch=2)))
    assert [len(images) for images, _, _ in found] == [2, 1, 1]
    assert [row.id for _, good, _ in found for row in good] == ["0.png", "1.png", "3.png", "4.png"]
    assert [r.row.id for _, _, bad in found for r in bad] == ["2.png"]
    assert [int(images[0, 0, 0, 0]) for images, _, _ in found] == [0, 3, 4]


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
def test_files_are_seen_as_evaluation_sees_them(tmp_path: Path, decoder):
    for k in range(4):
        exif = Image.Exif()
        exif[0x0112] = (1, 6, 3, 8)[k]
        noisy(k, 50 + k, 70).save(path_of(tmp_path / "images", k), exif=exif)
    index = open_index(ingested(tmp_path / "images"))
    data, source = Data(path=index.folder, size=16, batch=4, decoder=decoder), Folder(path=tmp_path / "images")
    rows = [row for row in source.rows(labelled=False) if isinstance(row, Row)]
    ((files, good, _),) = file_batches(source, rows, data)
    (batch,) = exact_batches(index, data, np.arange(4))
    order = [ids_of(index, batch.rows).to_pylist().index(row.id) for row in good]
    np.testing.assert_array_equal(files, batch.images[order])


READERS: dict[str, Callable[[Path, Path], object]] = {
    "training batches": lambda data, _: batches(data, batch=4, sampler=Stratified(temper=1)),
    "exact batches": lambda data, _: list(
        exact_batches(open_index(data), Data(path=data, size=10, batch=4), np.arange(4))
    ),
    "torch": lambda data, _: [ShardDataset(data)[item][0].size for item in range(4)],
    "page": lambda data, out: paged(data, out / "page.html"),
    "stats": lambda data, _: channels(open_index(data), np.arange(4)),
    "audit": lambda data, _: of_images(open_index(data), np.arange(4), measure, "measure"),
}


def paged(data: Path, out: Path) -> None:
    made, index = read(data)
    write_page(overview(index, made), index, out, 4, 4, 0)


def shot(path: Path, size: tuple[int, int] = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, sum(path.name.encode()) % 200).save(path)


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, one of which has more pixels than may be decoded unless the ingest has said so."""
    folder = tmp_path_factory.mktemp("huge") / "images"
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        shot(folder / name)
    shot(folder / "dog/d.png", (8001, 8001))
    return ingested(folder, pixel_cap=65_000_000, check="header")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, of which the last one, d.png, has a good header alone."""
    folder = tmp_path_factory.mktemp("broken") / "images"
    for name in ("cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"):
        shot(folder / name)
    content = (folder / "dog/d.png").read_bytes()
    start = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[start - 4 : start])
    chunk = b"IDAT" + b"\xff" * length
    chunk += struct.pack(">I", zlib.crc32(chunk))
    (folder / "dog/d.png").write_bytes(content[:start] + chunk + content[start + len(chunk) :])
    return ingested(folder, check="header")


@pytest.mark.parametrize("reader", READERS)
def test_an_image_larger_than_usual_that_was_ingested_can_be_read_too(huge: Path, tmp_path: Path, reader):
    READERS[reader](huge, tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_an_image_that_cannot_be_decoded_is_told_with_its_row_and_its_shard(broken: Path, tmp_path: Path, reader):
    with pytest.raises(DamagedRow, match=r"row 3 \(dog/d\.png\)") as damaged:
        READERS[reader](broken, tmp_path)
    (fault,) = damaged.value.faults
    assert fault.where == str(broken / "shards" / open_index(broken).shards[0])
    assert fault.fix == "ingest again with shards.check=decode"


def test_an_image_that_memory_is_too_short_for_is_not_called_broken(dataset: Path, monkeypatch):
    def short(*_):
        raise Undecodable("takes more memory to decode than there is") from MemoryError()

    monkeypatch.setattr(images, "decode", short)
    with pytest.raises(DamagedRow) as damaged:
        images.picture(Reader(open_index(dataset)), 0)
    assert "more memory" in damaged.value.faults[0].fix


@given(st.lists(st.integers(0, 29), max_size=40))
def test_ids_come_in_the_order_of_the_rows(rows):
    names = [f"ä{i}" for i in range(30)]
    found = ids_of(with_ids(pa.array(names, pa.large_string())), np.array(rows, np.int64))
    assert (found.type, found.to_pylist()) == (pa.string(), [names[row] for row in rows])


def test_ids_of_more_than_2_gib_can_be_taken():
    text = pa.py_buffer(np.full(2**30, ord("x"), np.uint8))
    ends = pa.py_buffer(np.array([0, 1, 2**30 - 3, 2**30], np.int64))
    found = ids_of(with_ids(pa.Array.from_buffers(pa.large_string(), 3, [None, ends, text])), np.array([1, 0, 1, 2, 1]))
    assert found.type == pa.large_string()
    assert [len(found[i].as_buffer()) for i in range(5)] == [2**30 - 4, 1, 2**30 - 4, 3, 2**30 - 4]


def with_ids(ids: pa.Array) -> Index:
    """An index of which nothing else is known."""
    return cast(Index, SimpleNamespace(ids=pa.chunked_array([ids])))
