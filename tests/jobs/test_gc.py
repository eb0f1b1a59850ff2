"""The job that removes what no generation of a data set names."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_loaders import durable
from data_loaders.index import open_index

Call = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a job; what it says. Of one that exits, its exit code comes first."""

    def call(job: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [job, *map(str, words)])
        code = ""
        try:
            importlib.import_module(f"jobs.{job}").main()
        except SystemExit as end:
            code = f"{end.code} "
        out, err = capsys.readouterr()
        return code + out + err

    return call


@pytest.fixture
def data(tmp_path: Path, call: Call) -> Path:
    """A data set of three generations."""
    for generation in range(3):
        for label in ("cat", "dog"):
            for i in range(2):
                path = tmp_path / "images" / label / f"{generation}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4), (generation, i, 9)).save(path)
        source = ["source.kind=folder", f"source.path={tmp_path / 'images'}", "splits.val=0", "splits.test=0"]
        call("ingest", *source, f"out={tmp_path / 'data'}", "append=true", "workers=1")
    assert len(open_index(tmp_path / "data").labels) == 12
    return tmp_path / "data"


def named(data: Path) -> list[str]:
    return sorted(str(path.relative_to(data)) for path in data.rglob("*") if path.is_file())


def test_a_data_set_without_garbage_stays_as_it_is(data: Path, call: Call):
    before = named(data)
    assert call("gc", f"data={data}") == f"removed 0 files, 0 bytes, from {data}\n"
    assert named(data) == before
    assert len(open_index(data, 1).labels) == 4


def test_old_generations_go_with_their_bytes_said_and_no_row_is_lost(data: Path, call: Call):
    gone = [data / "generations" / "000001.json", next(data.glob("index-g1-*")), next(data.glob("order-g1-*"))]
    size = sum(path.stat().st_size for path in gone)
    said = call("gc", f"data={data}", "keep=2")
    assert said.endswith(f"removed 3 files, {size:,} bytes, from {data}\n")
    assert all(str(path) in said and not path.exists() for path in gone)
    assert [len(open_index(data, generation).labels) for generation in (2, 3)] == [8, 12]
    assert len(list((data / "shards").iterdir())) == 3


def test_what_killed_ingests_left_goes_and_what_others_put_there_stays(data: Path, call: Call):
    left = ["shards/train-g4-00000-00-0123abcd.arrow", "shards/.train-g4-00001-00.77.tmp", "index-g4-0123abcd.arrow"]
    left += [".ingest/plan/rows.arrow", ".dataset.json.77.tmp", "generations/000004.json"]
    mine = [
        "audit.json",
        ".audit.json.77.tmp",
        "shards/notes.txt",
        "shards/train-00000.tar",
        "index.arrow",
        "notes.tmp",
    ]
    before = named(data)
    for name in (*left, *mine):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"12345")
    assert f"removed {len(left)} files, {5 * len(left)} bytes" in call("gc", f"data={data}")
    assert named(data) == sorted([*before, *mine])
    assert not (data / ".ingest").exists()


def test_many_files_are_not_all_told(data: Path, call: Call):
    for i in range(50):
        (data / "shards" / f"train-g4-{i:05d}-00-0123abcd.arrow").touch()
    said = call("gc", f"data={data}").splitlines()
    assert len(said) == 22
    assert said[-2:] == ["… and 30 more", f"removed 50 files, 0 bytes, from {data}"]


def test_the_leftovers_of_an_ingest_that_never_ended_go(tmp_path: Path, call: Call):
    for name in (".ingest/parts/a.arrow", "shards/train-g1-00000-00-0123abcd.arrow", "generations/000001.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert "removed 3 files" in call("gc", f"data={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_that_lost_its_manifest_is_no_leftover(data: Path, call: Call):
    (data / "dataset.json").unlink()
    before = named(data)
    for job, words in {"gc": [f"data={data}"], "ingest": ["source.kind=demo", f"out={data}"]}.items():
        said = call(job, *words)
        assert said.startswith("65 ")
        assert "generations/000003.json" in said
        assert named(data) == before
    (data / "generations" / "000003.json").rename(data / "dataset.json")
    assert len(open_index(data).labels) == 12


def test_it_waits_for_no_ingest(data: Path, call: Call):
    with durable.locked(data):
        assert call("gc", f"data={data}").startswith("75 Nothing was written")


def test_a_folder_that_is_not_there_is_said(tmp_path: Path, call: Call):
    assert call("gc", f"data={tmp_path / 'x'}").startswith("65 There is no data set")
    assert call("gc", f"data={tmp_path}", "keep=0").startswith("2 ")
