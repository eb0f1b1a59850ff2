import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loaders import durable


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    with durable.publishing(folder) as aside:
        for name, content in files.items():
            (aside / name).write_bytes(content)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != durable.MANIFEST}


def test_a_file_is_published_whole_with_the_folders_it_lies_in(tmp_path: Path):
    path = tmp_path / "new" / "deep" / "a.txt"
    durable.write(path, "é")
    assert path.read_bytes() == "é".encode()
    durable.write(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_failure_while_writing_leaves_the_former_file_and_nothing_else(tmp_path: Path, error):
    durable.write(tmp_path / "a.txt", "former")

    def fail():
        with durable.writing(tmp_path / "a.txt") as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "former"


def test_a_file_that_was_never_written_is_an_error_and_not_an_empty_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError), durable.writing(tmp_path / "a.txt"):
        pass
    assert os.listdir(tmp_path) == []


def test_not_a_number_never_gets_into_a_json_file(tmp_path: Path):
    durable.write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        durable.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "loss": 1.0\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_published_whole_and_undamaged(tmp_path: Path):
    folder = fill(tmp_path / "deep" / "step-1", {"a.bin": b"abc", "empty": b""})
    assert content(folder) == {"a.bin": b"abc", "empty": b""}
    assert durable.damage(folder) is None
    assert os.listdir(folder.parent) == ["step-1"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_while_filling_leaves_the_former_folder_and_nothing_else(tmp_path: Path, error):
    folder = fill(tmp_path / "step-1", {"a.bin": b"former"})

    def fail():
        with durable.publishing(folder) as aside:
            (aside / "a.bin").write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert content(folder) == {"a.bin": b"former"}
    assert durable.damage(folder) is None
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_folder_published_again_is_replaced_with_none_of_its_former_files(tmp_path: Path):
    fill(tmp_path / "step-1", {"a.bin": b"former", "b.bin": b"former"})
    folder = fill(tmp_path / "step-1", {"a.bin": b"new"})
    assert content(folder) == {"a.bin": b"new"}
    assert durable.damage(folder) is None
    assert os.listdir(tmp_path) == ["step-1"]


def test_what_a_killed_process_left_does_not_get_in_the_way(tmp_path: Path):
    for end in ("tmp", "old"):
        left = tmp_path / f".step-1.{os.getpid()}.{end}"
        left.mkdir()
        (left / "stale.bin").write_bytes(b"stale")
    fill(tmp_path / "step-1", {"a.bin": b"1"})
    folder = fill(tmp_path / "step-1", {"a.bin": b"2"})
    assert content(folder) == {"a.bin": b"2"}
    assert os.listdir(tmp_path) == ["step-1"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("durable") / "step-1", {"a.bin": bytes(range(200)), "b.json": b'{"x": 1}'})


@given(st.data())
def test_any_flipped_bit_and_any_truncation_is_found(published: Path, data):
    path = published / data.draw(st.sampled_from(["a.bin", "b.json", durable.MANIFEST]))
    former = path.read_bytes()
    at = data.draw(st.integers(0, len(former) - 1))
    flipped = bytearray(former)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    for damaged in (bytes(flipped), former[:at]):
        path.write_bytes(damaged)
        assert durable.damage(published) is not None
    path.write_bytes(former)
    assert durable.damage(published) is None


@pytest.mark.parametrize("name", ["a.bin", durable.MANIFEST])
def test_a_missing_file_is_found(tmp_path: Path, name):
    folder = fill(tmp_path / "step-1", {"a.bin": b"abc"})
    (folder / name).unlink()
    assert name in (durable.damage(folder) or "")


@pytest.mark.parametrize("manifest", ["", "[]", "7", '{"files": []}', '{"files": {"a.bin": 3}}', '{"files": {"": {}}}'])
def test_a_manifest_that_is_none_of_ours_is_damage_and_no_crash(tmp_path: Path, manifest):
    folder = fill(tmp_path / "step-1", {"a.bin": b"abc"})
    (folder / durable.MANIFEST).write_text(manifest)
    assert durable.damage(folder)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path):
    folder = fill(tmp_path / "step-1", {"a.bin": b"abc"})
    (tmp_path / "a.bin").write_bytes(b"abc")
    manifest = folder / durable.MANIFEST
    manifest.write_text(manifest.read_text().replace('"a.bin"', '"../a.bin"'))
    (folder / "a.bin").unlink()
    assert durable.damage(folder)
