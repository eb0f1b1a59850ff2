from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loaders.augment import PadCrop, Plain, Standard, centred, rng
from data_loaders.decode import decode
from data_loaders.index import DamagedRow, Reader, open_index
from data_loaders.loader import Batch, Data, exact_batches, file_batches, share, training_batches
from data_loaders.sampler import Stratified
from data_loaders.sources.folder import Folder
from data_loaders.sources.rows import Row

STEPS = range(3, 8)


def batches(folder: Path, rank: int = 0, workers: int = 1, **settings) -> list[Batch]:
    data = Data.model_validate({"path": folder, "size": 10, "batch": 16} | settings)
    index = open_index(folder)
    sampler = data.sampler.over(index, index.rows_of(data.train), 5)
    return list(training_batches(index, data, sampler, 5, STEPS, rank, workers))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


@given(st.integers(1, 500), st.integers(1, 64))
def test_shares_are_contiguous_whole_and_differ_by_one_at_most(batch, workers):
    parts = [share(batch, rank, workers) for rank in range(workers)]
    assert [p for start, stop in parts for p in range(start, stop)] == list(range(batch))
    assert np.ptp([stop - start for start, stop in parts]) <= 1


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_the_global_batch_is_the_same_for_any_number_of_workers(dataset: Path, workers):
    whole = batches(dataset)
    parts = [batches(dataset, rank, workers) for rank in range(workers)]
    joined = [Batch(*(np.concatenate(field) for field in zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert same(whole, joined)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (4, 2), (3, 9)])
def test_threads_and_prefetch_change_no_batch(dataset: Path, threads, prefetch):
    assert same(batches(dataset), batches(dataset, threads=threads, prefetch=prefetch))


@pytest.mark.parametrize("augmentation", [Plain(), Standard(rotation=20), PadCrop()])
def test_an_image_is_a_function_of_row_seed_and_position(dataset: Path, augmentation):
    index, reader = open_index(dataset), Reader(open_index(dataset))
    for step, batch in zip(STEPS, batches(dataset, augmentation=augmentation), strict=True):
        assert batch.images.dtype == np.uint8
        assert batch.images.shape == (16, 3, 10, 10)
        assert batch.valid.all()
        np.testing.assert_array_equal(batch.labels, index.labels[batch.rows])
        np.testing.assert_array_equal(batch.cells, index.cells[batch.rows])
        for place, row in enumerate(batch.rows):
            image = augmentation(decode(reader.read(row)), 10, rng(5, step * 16 + place))
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


def test_a_damaged_row_ends_the_stream_with_its_name(dataset: Path, tmp_path: Path):
    import shutil

    folder = shutil.copytree(dataset, tmp_path / "copy")
    index = open_index(folder)
    row = int(index.rows_of("train")[0])
    shard = folder / "shards" / index.shards[index.shard[row]]
    content = bytearray(shard.read_bytes())
    content[index.offset[row] + 40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedRow, match=rf"row {row} \("):
        batches(folder, sampler=Stratified(temper=1), batch=84)


def test_a_stream_that_is_left_early_closes_its_files(dataset: Path):
    import os

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
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_outside_of_a_data_set_are_read_and_bad_ones_told(dataset: Path, tmp_path: Path):
    from PIL import Image

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
