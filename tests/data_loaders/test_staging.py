import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import ingested, noisy, path_of

from data_loaders.images import picture
from data_loaders.index import DamagedRow, Reader, open_index
from data_loaders.loader import Data, training_batches
from data_loaders.sampler import Stratified
from data_loaders.staging import LOOK_S, ROOM, StagedReader, Stager, copy_of


def staged(index, cache: Path) -> list[Path]:
    """All copies, once they are made."""
    stager, copies = Stager(index, cache), [copy_of(cache, shard) for shard in index.manifest.shards]
    until = time.monotonic() + 30
    while not all(copy.exists() for copy in copies) and time.monotonic() < until:
        time.sleep(0.01)
    stager.close()
    return copies


def test_every_shard_is_copied_once_as_it_was_written(dataset: Path, tmp_path: Path):
    index = open_index(dataset)
    copies = staged(index, tmp_path / "cache")
    for copy, shard in zip(copies, index.manifest.shards, strict=True):
        assert copy.read_bytes() == (dataset / "shards" / shard.name).read_bytes()
    before = {copy: copy.stat().st_mtime_ns for copy in copies}
    staged(index, tmp_path / "cache")
    assert {copy: copy.stat().st_mtime_ns for copy in copies} == before
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(copy.name for copy in copies)


def test_rows_are_read_from_the_copies_when_the_source_is_gone(dataset: Path, tmp_path: Path):
    folder = Path(shutil.copytree(dataset, tmp_path / "data"))
    index = open_index(folder)
    staged(index, tmp_path / "cache")
    expected = [Reader(index).read(row) for row in range(len(index))]
    shutil.rmtree(folder / "shards")
    reader = StagedReader(index, tmp_path / "cache")
    assert [reader.read(row) for row in range(len(index))] == expected


def test_a_copy_that_appears_later_is_found(dataset: Path, tmp_path: Path):
    index = open_index(dataset)
    reader = StagedReader(index, tmp_path / "cache")
    before = reader.handle(0).number
    staged(index, tmp_path / "cache")
    assert reader.handle(0).number == before
    reader._looked[0] -= LOOK_S + 1
    number = reader.handle(0).number
    assert Path(f"/proc/self/fd/{number}").readlink() == copy_of(tmp_path / "cache", index.manifest.shards[0])
    assert reader.read(0) == Reader(index).read(0)


def test_a_damaged_copy_is_removed_and_the_row_read_afar(dataset: Path, tmp_path: Path):
    index = open_index(dataset)
    copies = staged(index, tmp_path / "cache")
    for copy in copies:
        copy.write_bytes(bytes(copy.stat().st_size))
    reader = StagedReader(index, tmp_path / "cache")
    assert [reader.read(row) for row in range(len(index))] == [Reader(index).read(row) for row in range(len(index))]
    assert not any(copy.exists() for copy in copies)


def test_pixels_do_not_depend_on_whether_a_copy_is_damaged_or_the_cache_is_no_folder(photos: Path, tmp_path: Path):
    index, found = open_index(photos), []
    for name in ("none", "whole", "damaged", "a file"):
        cache = None if name == "none" else tmp_path / name
        for copy in staged(index, tmp_path / name) if name in {"whole", "damaged"} else ():
            if name == "damaged":
                copy.write_bytes(bytes(copy.stat().st_size))
        if name == "a file":
            (tmp_path / name).write_text("")
        data = Data(path=photos, size=20, batch=6, cache=cache)
        stream = training_batches(index, data, Stratified().over(index, index.rows_of("train"), 0), 0, range(4))
        found.append(np.concatenate([batch.images for batch in stream]))
    assert all((images == found[0]).all() for images in found[1:])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six noisy JPEGs."""
    folder = tmp_path_factory.mktemp("photos")
    for k in range(6):
        noisy(k, 60, 80).save(path_of(folder / "images", k), quality=80)
    return ingested(folder / "images")


def test_a_cache_that_others_may_write_to_is_not_used(dataset: Path, tmp_path: Path, capsys):
    index, cache = open_index(dataset), tmp_path / "cache"
    copies = staged(index, cache)
    cache.chmod(0o777)
    for copy in copies:
        copy.write_bytes(b"theirs")
    reader = StagedReader(index, cache)
    assert [reader.read(row) for row in range(5)] == [Reader(index).read(row) for row in range(5)]
    assert all(copy.read_bytes() == b"theirs" for copy in copies)
    stager = Stager(index, cache)
    stager._thread.join()
    assert "is not a folder that you alone may write to" in capsys.readouterr().err


def test_a_link_in_the_place_of_a_copy_under_way_is_not_followed(dataset: Path, tmp_path: Path, capsys):
    index, cache, victim = open_index(dataset), tmp_path / "cache", tmp_path / "victim"
    cache.mkdir(mode=0o700)
    victim.write_text("precious")
    first = copy_of(cache, index.manifest.shards[0])
    first.with_name(f".{first.name}.tmp").symlink_to(victim)
    stager = Stager(index, cache)
    stager._thread.join()
    assert victim.read_text() == "precious"
    assert "shards are read from" in capsys.readouterr().err


def test_no_more_shards_are_open_than_may_be(dataset: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("data_loaders.index.HANDLES", 2)
    index = open_index(dataset)
    staged(index, tmp_path / "cache")
    reader = StagedReader(index, tmp_path / "cache")
    assert [reader.read(row) for row in range(len(index))] == [Reader(index).read(row) for row in range(len(index))]
    assert len(reader._handles) <= 2 < len(index.shards)


def test_who_comes_late_to_a_copy_leaves_it_whole(dataset: Path, tmp_path: Path, monkeypatch):
    """Another process publishes the copy between the opening of the file beside it and its lock."""
    index, cache = open_index(dataset), tmp_path / "cache"
    (whole,) = {copy.read_bytes() for copy in staged(index, cache)[:1]}
    first = copy_of(cache, index.manifest.shards[0])
    aside = first.with_name(f".{first.name}.tmp")
    first.rename(aside)
    lock = fcntl.flock

    def late(file, how):
        if aside.exists():
            aside.rename(first)
        return lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    staged(index, cache)
    assert first.read_bytes() == whole


def test_a_damaged_source_is_not_copied_and_its_rows_are_named(dataset: Path, tmp_path: Path):
    folder = Path(shutil.copytree(dataset, tmp_path / "data"))
    index = open_index(folder)
    shard = folder / "shards" / index.shards[0]
    content = bytearray(shard.read_bytes())
    row = int(np.flatnonzero(index.shard == 0)[0])
    content[index.offset[row] + 40] ^= 1
    shard.write_bytes(content)
    stager = Stager(index, tmp_path / "cache")
    while not copy_of(tmp_path / "cache", index.manifest.shards[-1]).exists():
        time.sleep(0.01)
    stager.close()
    assert not copy_of(tmp_path / "cache", index.manifest.shards[0]).exists()
    with pytest.raises(DamagedRow, match=rf"row {row} \("):
        StagedReader(index, tmp_path / "cache").read(row)


def test_what_a_killed_process_left_is_copied_anew_and_what_another_copies_is_left_to_it(dataset: Path, tmp_path: Path):
    index, cache = open_index(dataset), tmp_path / "cache"
    cache.mkdir()
    first = copy_of(cache, index.manifest.shards[0])
    aside = first.with_name(f".{first.name}.tmp")
    aside.write_bytes(b"half")
    locking = f"f=open({str(aside)!r},'ab');fcntl.flock(f,fcntl.LOCK_EX);print(1,flush=True);time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", f"import fcntl,time;{locking}"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    stager = Stager(index, cache)
    while not copy_of(cache, index.manifest.shards[-1]).exists():
        time.sleep(0.01)
    stager.close()
    assert not first.exists()
    assert aside.read_bytes() == b"half"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert all(copy.exists() for copy in staged(index, cache))
    assert first.read_bytes() == (dataset / "shards" / index.shards[0]).read_bytes()
    assert not aside.exists()


@pytest.mark.parametrize("wrong", ["full", "a file"])
def test_a_cache_that_cannot_be_written_is_told_and_shards_are_read_afar(
    dataset: Path, tmp_path: Path, wrong, monkeypatch, capsys
):
    index, cache = open_index(dataset), tmp_path / "cache"
    if wrong == "full":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(ROOM * usage.total)))
    else:
        cache.write_text("")
    stager = Stager(index, cache)
    stager._thread.join()
    stager.close()
    assert "shards are read from" in capsys.readouterr().err
    assert picture(StagedReader(index, cache), 0).shape == (12, 12, 3)


@pytest.mark.parametrize("loading", ["threads", "processes"])
def test_batches_are_the_same_with_a_cache_and_leave_no_file_open(dataset: Path, tmp_path: Path, loading):
    index, found = open_index(dataset), []
    before = len(os.listdir("/proc/self/fd"))
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        data = Data(path=dataset, size=10, batch=16, cache=cache, loading=loading)
        stream = training_batches(index, data, Stratified().over(index, index.rows_of("train"), 0), 0, range(20))
        found.append(np.concatenate([batch.images for batch in stream]))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # what multiprocessing keeps open once it was used
