import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loaders import durable
from data_loaders.faults import Refusal

ROOT = Path(__file__).parents[2]


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


def python(script: str, *words: object, within: tuple[str, ...] = ()) -> list:
    """What a process says, as JSON; it may fork, which this one, with its threads, had better not."""
    line = [*within, sys.executable, "-c", script, *map(str, words)]
    return json.loads(subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


RACE = """
import json, os, sys
from pathlib import Path
from data_loaders import durable
from data_loaders.faults import Refusal

def contend(folder, start, told, over):
    os.read(start, 1)
    try:
        with durable.owned(folder):
            os.write(told, b"won %d;" % os.getpid())
            os.read(over, 1)
    except Refusal as refusal:
        os.write(told, b"%s %d;" % (str(refusal).replace("\\n", "").encode(), refusal.exit_code))
    os._exit(0)

races = []
for race in range(200):
    start, told, over = os.pipe(), os.pipe(), os.pipe()
    pids = []
    for _ in range(2):
        pids.append(os.fork())
        if not pids[-1]:
            os.close(start[1])
            os.close(over[1])
            contend(Path(sys.argv[1]), start[0], told[1], over[0])
    os.close(start[1])
    said = b""
    while said.count(b";") < 2:
        said += os.read(told[0], 4096)
    os.close(over[1])
    for pid in pids:
        os.waitpid(pid, 0)
    for handle in (start[0], *told, over[0]):
        os.close(handle)
    races.append(said.decode().strip(";").split(";"))
print(json.dumps(races))
"""


def test_of_two_processes_that_want_a_folder_exactly_one_gets_it_and_the_other_is_told_of_it(tmp_path: Path):
    races = python(RACE, tmp_path / "run")
    assert len(races) == 200
    for race in races:
        (winner,) = [said.removeprefix("won ") for said in race if said.startswith("won")]
        (loser,) = [said for said in race if not said.startswith("won")]
        assert f"belongs to process {winner} (-c) on " in loser
        assert loser.endswith("75")


KILLED = """
import os, signal, sys, time
from pathlib import Path
from data_loaders import durable

with durable.owned(Path(sys.argv[1])):
    fork = os.fork()
    if not fork:
        os.close(1)
        os.close(2)
        time.sleep(60)
    print([os.getpid(), fork], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_owner_lets_go_though_a_fork_of_it_lives_on_and_its_name_is_still_in_the_file(tmp_path: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, check=False, capture_output=True)
    owner, fork = json.loads(killed.stdout)
    assert json.loads((tmp_path / durable.OWNER).read_bytes())["pid"] == owner
    with durable.owned(tmp_path) as is_sure:
        assert is_sure
        os.kill(fork, signal.SIGKILL)
        with pytest.raises(Refusal, match=f"belongs to process {os.getpid()} "), durable.owned(tmp_path, wait_s=0.1):
            pass
    with durable.owned(tmp_path):
        pass


def test_where_files_cannot_be_locked_the_owner_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(durable.fcntl, "flock", no_locks)
    with durable.owned(tmp_path) as is_sure:
        assert not is_sure


FULL = """
import json, subprocess, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from data_loaders import durable
from data_loaders.faults import Refusal

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
with durable.publishing(disk / "step-1") as aside:
    (aside / "a.bin").write_bytes(b"former")
fills = {
    "nothing": lambda path: None,
    "bytes": lambda path: path.write_bytes(bytes(2**20)),
    "tensors": lambda path: save_file({"w": np.zeros(2**20, np.uint8)}, path),
}
said = []
for name, needed in (("nothing", 2**20), ("bytes", None), ("bytes", 1000), ("tensors", None)):
    try:
        with durable.publishing(disk / "step-1", needed) as aside:
            fills[name](aside / "a.bin")
    except Refusal as refusal:
        fault = refusal.faults[0]
        said.append([refusal.exit_code, fault.where, fault.what, [p.name for p in disk.iterdir()]])
print(json.dumps([said, durable.damage(disk / "step-1"), (disk / "step-1" / "a.bin").read_text()]))
"""


def test_a_full_disk_is_said_with_the_bytes_that_it_takes_and_what_was_stored_stays(tmp_path: Path):
    within = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))
    mount = [*within, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a disk")
    (refused, ahead, less, tensors), damage, content = python(FULL, tmp_path, within=within)
    path, free = str(tmp_path / "step-1"), "bytes are free"
    assert refused == [74, path, f"no space left on device: 1,048,576 bytes are needed, 253,952 {free}", ["step-1"]]
    for said, needed in ((ahead, ""), (less, "1,000 bytes are needed, "), (tensors, "")):
        assert said[:2] == [74, path]
        assert said[2].startswith(f"no space left on device: {needed}")
        assert said[2].endswith(free)
        assert said[3] == ["step-1"]
    assert damage is None
    assert content == "former"
