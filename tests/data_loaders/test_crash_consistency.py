"""Jobs that are killed, lose power, or find the disk full, at any thing that they do to it: a reader sees the former
generation or the new one, whole, and the same command goes on from what is stored."""

import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from data_loaders.faults import Refusal
from data_loaders.index import Reader, open_index

ROOT = Path(__file__).parents[2]
FIRST, MORE = 8, 12
"""Rows of the first generation, and of the second."""
Tree = dict[str, bytes]
Trace = list[tuple[str, str, str | None]]


class Forks:
    """The process of killable.py, which runs jobs in forks of itself."""

    def __init__(self, folder: Path, within: tuple[str, ...] = ()) -> None:
        line = [*within, sys.executable, str(Path(__file__).with_name("killable.py"))]
        self._said, self._trace = folder / "said", folder / "trace.json"
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or "null")

    def run(self, step: "Step", **how: Any) -> Any:
        """The exit code of a job, or how it was ended by a signal."""
        return self.ask(job=step.job, words=step.words, said=str(self._said), **how)

    def traced(self, step: "Step") -> Trace:
        """What a job that goes well does to the disk."""
        assert self.run(step, trace=str(self._trace)) == 0, self.said()
        found = json.loads(self._trace.read_text())
        assert found["unseen"] == 0  # not a byte is written past what is counted
        return [(what, path, content) for what, path, content in found["trace"]]

    def said(self) -> str:
        return self._said.read_text()

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Step(NamedTuple):
    """A job, and how many rows are listed by then."""

    job: str
    words: list[str]
    rows: int


class Scene:
    """A folder with images, and the three jobs that one after the other change its data set."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        for i in range(MORE):
            Image.new("RGB", (7 + i % 3, 5 + i % 5), (i, i * 2, 90)).save(folder / f"{i:02d}.png")
        source = ["source.kind=csv", f"source.path={folder / 'labels.csv'}", "source.group_columns=[venue]"]
        rest = ["splits.val=0.3", "splits.test=0", "shards.rows=4", "rejects.allow=0.2", "workers=1"]
        words = [*source, *rest, f"out={out}"]
        self.steps = {
            "ingest": Step("ingest", words, FIRST),
            "append": Step("ingest", [*words, "append=true"], MORE),
            "gc": Step("gc", [f"data={out}", "keep=1"], MORE),
        }

    def list_rows(self, count: int) -> None:
        """One of the rows has no label, and is rejected."""
        rows = [(f"{i:02d}.png", ("cat", "dog")[i % 2], ("home", "street")[i // 2 % 2]) for i in range(count)]
        with (self.folder / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "venue"), *rows, ("broken.png", "", "home")])

    def restore(self, state: Path) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if state.exists():
            shutil.copytree(state, self.out)


class Change(NamedTuple):
    """What a job did when nothing came in its way."""

    step: Step
    before: Path
    """A copy of the data set as it was; absent if there was none."""
    before_tree: Tree
    after_tree: Tree
    before_rows: dict[str, Any]
    after_rows: dict[str, Any]
    trace: Trace
    published: int
    """The point at which dataset.json is replaced."""

    def rows_at(self, point: int) -> dict[str, Any]:
        """What a reader finds when the job is ended at a point."""
        return self.after_rows if point > self.published else self.before_rows

    def tree_at(self, point: int) -> Tree:
        return self.after_tree if point > self.published else self.before_tree


def tree_of(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_list(tree: Tree) -> Tree:
    """The list of rejected rows is for people; no generation names it."""
    return {name: content for name, content in tree.items() if name != "rejected.csv"}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Lies in memory where it can: what is tested is the order of things, so waiting for a disk adds nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def forks(folder: Path) -> Iterator[Forks]:
    forks = Forks(folder)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def scene(folder: Path) -> Scene:
    return Scene(folder, folder / "data")


@pytest.fixture(scope="module")
def changes(scene: Scene, forks: Forks) -> dict[str, Change]:
    found: dict[str, Change] = {}
    scene.list_rows(FIRST)
    forks.ask(warm="ingest", words=[*scene.steps["ingest"].words, f"out={scene.folder / 'warm'}"])
    for name, step in scene.steps.items():
        scene.list_rows(step.rows)
        state = scene.folder / f"before-{name}"
        if scene.out.exists():
            shutil.copytree(scene.out, state)
        before = tree_of(scene.out), forks.ask(rows=str(scene.out))
        trace = forks.traced(step)
        after = tree_of(scene.out), forks.ask(rows=str(scene.out))
        publishes = [n for n, (_, path, _) in enumerate(trace, 1) if path.endswith(f"\0{scene.out / 'dataset.json'}")]
        assert len(publishes) == 1
        found[name] = Change(step, state, before[0], after[0], before[1], after[1], trace, publishes[0])
    return found


@pytest.fixture(params=["ingest", "append", "gc"])
def change(request: pytest.FixtureRequest, changes: dict[str, Change], scene: Scene) -> Change:
    scene.list_rows(changes[request.param].step.rows)
    return changes[request.param]


def test_more_than_400_points_at_which_the_three_jobs_can_be_killed_are_tried(changes: dict[str, Change]):
    assert sum(len(c.trace) for c in changes.values()) >= 400
    assert [len(c.before_rows.get("rows", ())) for c in changes.values()] == [0, FIRST, MORE]
    assert {row[0] for row in changes["gc"].after_rows["rows"].values()} == {"train", "val"}


def test_a_job_killed_at_any_point_leaves_the_old_or_the_new_generation_and_is_taken_up_by_the_same_command(
    change: Change, scene: Scene, forks: Forks
):
    met: set[frozenset[str]] = set()
    killed = scene.folder / "killed"
    for point in range(1, len(change.trace) + 1):
        scene.restore(change.before)
        assert forks.run(change.step, point=point) == -signal.SIGKILL
        assert forks.ask(rows=str(scene.out)) == change.rows_at(point), point
        left = {re.sub(r"\d+\.tmp$", "tmp", name) for name in tree_of(scene.out) if "/plan/" not in name}
        if frozenset(left) in met:
            continue  # other bytes in a file that the next run begins anew
        met.add(frozenset(left))
        shutil.rmtree(killed, ignore_errors=True)
        if scene.out.exists():
            shutil.copytree(scene.out, killed)
        taken_up(change, scene, forks, point)
        scene.restore(killed)
        if scene.out.exists():
            assert forks.run(Step("gc", [f"data={scene.out}"], 0)) == 0, forks.said()
            found, expected = tree_of(scene.out), change.tree_at(point)
            assert without_list(found).keys() == without_list(expected).keys(), point
            assert change.step.job == "gc" or without_list(found) == without_list(expected)  # gc: a shorter history
            assert not (scene.out / ".ingest").exists()
            assert forks.ask(rows=str(scene.out)) == change.rows_at(point)


def taken_up(change: Change, scene: Scene, forks: Forks, point: int) -> None:
    """The same command once more leaves what it would have left at once, and stores no shard again."""
    parts = list((scene.out / ".ingest" / "parts").glob("[!.]*"))
    stored = {path: path.stat().st_ino for path in (scene.out / "shards").glob("[!.]*")}
    code = forks.run(change.step)
    if change.step == scene.steps["ingest"] and point > change.published:
        assert code == 73
        assert "holds a data set already" in forks.said()
    else:
        assert code == 0, forks.said()
    assert tree_of(scene.out) == change.after_tree
    assert forks.ask(rows=str(scene.out)) == change.after_rows
    again = [path.name for path, inode in stored.items() if path.stat().st_ino != inode]
    before = sum(name.startswith("shards/") for name in change.before_tree)
    if point <= change.published and change.step.job == "ingest":
        assert len(stored) - before - len(again) == len(parts), again  # the shards of a task lie before its part does


def test_what_a_name_refers_to_is_on_the_disk_before_it_and_the_manifest_is_the_last_name(change: Change, scene: Scene):
    renames = [n for n, (what, _, _) in enumerate(change.trace) if what == "replace"]
    for n, following in zip(renames, [*renames[1:], len(change.trace)], strict=True):
        aside, path = change.trace[n][1].split("\0")
        touched = [what for what, where, _ in change.trace[:n] if where == aside]
        assert touched[-1] == "fsync"
        assert ("fsync", str(Path(path).parent)) in [event[:2] for event in change.trace[n:following]]
    assert change.trace[renames[-1]][1].endswith(f"\0{scene.out / 'dataset.json'}")


class Node:
    """A file or a folder: what a disk is sure to hold of it, and what it was told since."""

    def __init__(self, content: bytes = b"", entries: "dict[str, Node] | None" = None) -> None:
        self.content = content
        """Of a file when it was last flushed."""
        self.flushed = dict(entries or {})
        self.entries = dict(entries or {})
        self.pending: list[tuple[str, Node | None]] = []
        """Of a folder: names that came and went since it was flushed."""

    def put(self, name: str, node: "Node | None") -> "Node | None":
        self.pending.append((name, node))
        former = self.entries.pop(name, None)
        if node:
            self.entries[name] = node
        return former

    def flush(self, content: str | None) -> None:
        self.content = (content or "").encode("latin-1")
        self.flushed, self.pending = dict(self.entries), []

    def survives(self, kept: Callable[[int], int]) -> dict[str, "Node"]:
        """The entries after the power was lost: `kept` says how many of the last changes got to the disk."""
        left = dict(self.flushed)
        for name, node in self.pending[: kept(len(self.pending))]:
            if node:
                left[name] = node
            else:
                left.pop(name, None)
        return left


class Power:
    """A disk that loses what is not flushed. Of a folder, changes get to it in their order, but no one knows when."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self.root, self.top = root, Node()
        for name, content in tree.items():
            folder = self.top
            for part in Path(name).parts[:-1]:
                folder = folder.entries.setdefault(part, Node())
            folder.entries[Path(name).name] = Node(content)
        self._settle(self.top)

    def apply(self, what: str, path: str, content: str | None) -> bool:
        """Whether it may change what is left when the power is lost."""
        if what == "replace":
            a, b = path.split("\0")
            self._folder(b).put(Path(b).name, self._folder(a).put(Path(a).name, None))
        elif what == "fsync":
            self._node(path).flush(content)
        elif what in {"unlink", "rmdir"}:
            self._folder(path).put(Path(path).name, None)
        elif what in {"open", "mkdir"}:
            if Path(path).name in self._folder(path).entries:
                return False
            self._folder(path).put(Path(path).name, Node())
        return what not in {"write", "half", "failed"}

    def lose(self, folder: Path, kept: Callable[[int], int]) -> None:
        """What is left, as files in a folder."""
        self._write(folder, self.top, kept)

    def _write(self, folder: Path, node: Node, kept: Callable[[int], int]) -> None:
        folder.mkdir()
        for name, child in node.survives(kept).items():
            if child.entries or child.flushed or child.pending or name in FOLDERS:
                self._write(folder / name, child, kept)
            else:
                (folder / name).write_bytes(child.content)

    def _settle(self, node: Node) -> None:
        node.flushed = dict(node.entries)
        for child in node.entries.values():
            self._settle(child)

    def _node(self, path: str) -> Node:
        node = self.top
        for part in Path(path).relative_to(self.root).parts:
            node = node.entries[part]
        return node

    def _folder(self, path: str) -> Node:
        return self._node(str(Path(path).parent))


FOLDERS = {"data", "shards", "generations", ".ingest", "parts", "plan"}


def all_of(changes: int) -> int:
    return changes


def none_of(_: int) -> int:
    return 0


@pytest.mark.parametrize("kept", [all_of, none_of, random.Random(0).randint], ids=["all", "none", "some"])
def test_a_loss_of_power_at_any_point_leaves_the_old_or_the_new_generation(
    change: Change, scene: Scene, forks: Forks, kept: Callable[..., int]
):
    how = kept if kept in {all_of, none_of} else lambda changes: kept(0, changes)
    disk = Power(scene.folder, {f"data/{name}": content for name, content in change.before_tree.items()})
    lost, met = scene.folder / "lost", set[frozenset[tuple[str, bytes]]]()
    for point, (what, path, content) in enumerate(change.trace, 1):
        if not disk.apply(what, path, content) or "/plan/" in path:
            continue
        shutil.rmtree(lost, ignore_errors=True)
        disk.lose(lost, how)
        found = forks.ask(rows=str(lost / "data"))
        assert found in (change.before_rows, change.after_rows), (point, what, path)
        left = {item for item in tree_of(lost).items() if "/plan/" not in item[0]}
        if frozenset(left) in met:
            continue
        met.add(frozenset(left))
        scene.restore(lost / "data")
        if found == change.before_rows or change.step.words[-1] == "append=true":
            assert forks.run(change.step) == 0, forks.said()
            assert tree_of(scene.out) == change.after_tree
            assert forks.ask(rows=str(scene.out)) == change.after_rows
    shutil.rmtree(lost)
    disk.lose(lost, how)
    assert forks.ask(rows=str(lost / "data")) == change.after_rows  # when a job has ended, its work is on the disk


def test_a_reader_of_the_old_generation_goes_on_while_rows_are_added_and_garbage_is_collected(
    changes: dict[str, Change], scene: Scene, forks: Forks
):
    append = changes["append"]
    scene.restore(append.before)
    scene.list_rows(MORE)
    index = open_index(scene.out)
    idle, busy = Reader(index), Reader(index)
    images = {index.ids[row].as_py(): busy.read(row) for row in range(FIRST)}
    assert images == {name: (scene.folder / name).read_bytes() for name in images}
    for point in range(1, len(append.trace), 60):
        stopped = forks.run(append.step, point=point, signal=signal.SIGSTOP)
        for reader in (busy, Reader(index)):
            assert [reader.read(row) for row in range(FIRST)] == list(images.values())
            if reader is not busy:
                reader.close()
        assert forks.ask(resume=stopped["stopped"]) == 0 if stopped else True
    assert len(open_index(scene.out, 1).labels) == FIRST
    assert forks.run(scene.steps["gc"]) == 0
    for reader in (idle, busy):
        assert [reader.read(row) for row in range(FIRST)] == list(images.values())
        reader.close()
    with pytest.raises(Refusal, match="There is no such generation"):
        open_index(scene.out, 1)
    assert sorted(name for name in tree_of(scene.out) if not name.startswith("shards/")) == [
        "dataset.json",
        "generations/000002.json",
        next(path.name for path in scene.out.glob("index-g2-*")),
        next(path.name for path in scene.out.glob("order-g2-*")),
        "rejected.csv",
    ]


def test_processes_of_an_ingest_end_when_it_is_killed(scene: Scene, folder: Path):
    scene.restore(folder / "nothing")
    scene.list_rows(FIRST)
    words = [*scene.steps["ingest"].words, "workers=2", f"out={folder / 'parallel'}"]
    pipe, end = os.pipe()  # is closed when all that hold it have ended
    line = [sys.executable, "-m", "jobs.ingest", *words]
    ingest = subprocess.Popen(line, cwd=ROOT, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    while not list((folder / "parallel").glob("shards/*.arrow")) and ingest.poll() is None:
        time.sleep(0.01)
    ingest.kill()
    assert ingest.wait() == -signal.SIGKILL
    while os.read(pipe, 2**16):
        pass
    os.close(pipe)


def test_no_byte_of_a_data_set_depends_on_what_was_in_the_memory(changes: dict[str, Change], scene: Scene):
    for rubbish in ("85", "170"):
        memory = {"MALLOC_PERTURB_": rubbish, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        forks = Forks(scene.folder, ("env", *(f"{name}={value}" for name, value in memory.items())))
        for name in ("ingest", "append"):
            scene.restore(changes[name].before)
            scene.list_rows(changes[name].step.rows)
            assert forks.run(changes[name].step) == 0, forks.said()
            assert tree_of(scene.out) == changes[name].after_tree
        forks.close()


def test_a_second_job_is_refused_while_one_writes_and_harms_nothing(change: Change, scene: Scene, forks: Forks):
    points = [n for n, (what, _, _) in enumerate(change.trace, 1) if what in {"mkdir", "rmdir", "replace"}]
    locked = 0
    for point in sorted({*points, *range(1, len(change.trace), 40)}):
        scene.restore(change.before)
        what, path, _ = change.trace[point - 1]
        stopped = forks.run(change.step, point=point, signal=signal.SIGSTOP)
        if stopped == 0:
            assert what == "half"
            continue
        before = tree_of(scene.out)
        for second in scene.steps.values():
            code = forks.run(second)
            if code == 75:
                locked += 1
                assert "is being written by another process" in forks.said()
                assert tree_of(scene.out) == before
        code = forks.ask(resume=stopped["stopped"])
        assert code == 0 or (code == 73 and "holds a data set already" in forks.said()), (what, path, forks.said())
        assert not (scene.out / ".ingest").exists()
        assert forks.ask(rows=str(scene.out)) == change.after_rows, (what, path)
    assert locked > 3 * len(points) // 2


PAGE = 4096
"""Bytes by which a disk in memory grows."""


class SmallDisk:
    """A disk in memory, in a namespace of mounts that only the forks see; it is gone when they are."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.forks, self.scene = folder, forks, Scene(folder, folder / "disk" / "data")
        self.place = self.scene.out.parent
        self.place.mkdir()

    def mount(self, *options: str) -> bool:
        found = self.forks.ask(call=["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.place)])
        return found is not None

    def remount(self, *options: str) -> None:
        self.call("mount", "-o", ",".join(("remount", *options)), str(self.place))

    def unmount(self) -> None:
        self.call("umount", str(self.place))

    def pages(self) -> int:
        return int(self.call("df", f"-B{PAGE}", "--output=used", str(self.place)).split()[-1])

    def call(self, *words: str) -> str:
        said = self.forks.ask(call=list(words))
        assert said is not None, words
        return said

    def rows(self) -> dict[str, Any]:
        return self.forks.ask(rows=str(self.scene.out))


@pytest.fixture(scope="module")
def small_disk() -> Iterator[SmallDisk]:
    within = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))
    if not shutil.which("unshare") or subprocess.run([*within, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a test have mounts of its own")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        forks = Forks(Path(name), within)
        disk = SmallDisk(Path(name), forks)
        try:
            if not disk.mount("size=4m"):
                pytest.skip("this machine does not let a test mount a disk")
            disk.scene.list_rows(FIRST)
            warm = [*disk.scene.steps["ingest"].words, f"out={disk.folder / 'warm'}"]
            forks.ask(warm="ingest", words=warm)
            disk.unmount()
            yield disk
        finally:
            forks.close()


STAGES = {
    "spool": r"\.ingest/plan",
    "shard": r"shards/",
    "part": r"\.ingest/parts/",
    "list of rejected rows": r"rejected\.csv:",
    "index": r"\.(index|order)-g\d",
    "manifest": r"(generations/\d+|dataset)\.json:",
}


def complained(said: str) -> str:
    """Where it was that there was no room; the message is for people."""
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert "make room" in said
    if re.search(r"/(shards|parts|plan): no space left on device — ", said):
        return "folder"  # nothing is listed yet, and nobody knows how much there is to store
    assert re.search(r"no space left on device, .*some [1-9][\d,]* bytes", said), said
    return next((stage for stage, pattern in STAGES.items() if re.search(pattern, said)), said)


@pytest.mark.parametrize("name", ["ingest", "append"])
def test_a_full_disk_leaves_the_data_set_as_it_was_and_with_more_room_the_same_command_ends_well(
    small_disk: SmallDisk, name: str
):
    disk, forks, scene = small_disk, small_disk.forks, small_disk.scene
    step = scene.steps[name]
    assert disk.mount("size=4m")
    if name == "append":
        scene.list_rows(FIRST)
        assert forks.run(scene.steps["ingest"]) == 0
    scene.list_rows(step.rows)
    disk.call("rm", "-rf", str(disk.folder / "before"))
    disk.call("mkdir", str(scene.folder / "before"))
    disk.call("cp", "-a", f"{disk.place}/.", str(disk.folder / "before"))
    used, before = disk.pages(), disk.rows()
    assert forks.run(step) == 0
    after, met, pages, code = disk.rows(), set[str](), 1, 73
    disk.unmount()
    while code:
        assert disk.mount(f"size={(used + pages) * PAGE}")
        disk.call("cp", "-a", f"{disk.folder}/before/.", str(disk.place))
        code = forks.run(step)
        assert code in {0, 73}, forks.said()
        if code:
            met.add(complained(forks.said()))
            assert disk.rows() == before
            disk.remount("size=4m")
            assert forks.run(step) == 0, forks.said()
        assert disk.rows() == after
        disk.unmount()
        pages += 1
    assert met == set(STAGES)


def test_a_disk_that_takes_no_more_files_is_full_too(small_disk: SmallDisk):
    disk, forks, scene = small_disk, small_disk.forks, small_disk.scene
    scene.list_rows(FIRST)
    met = set[str]()
    for files in range(2, 90, 6):
        assert disk.mount("size=4m", f"nr_inodes={files}")
        if forks.run(scene.steps["ingest"]):
            met.add(complained(forks.said()))
            assert disk.rows() == {}
            disk.remount("nr_inodes=1000")
            assert forks.run(scene.steps["ingest"]) == 0, forks.said()
        assert len(disk.rows()["rows"]) == FIRST
        disk.unmount()
    assert met >= {"spool", "shard"}


@pytest.mark.parametrize("error", [errno.EIO, errno.EDQUOT], ids=["one that fails once", "an exhausted quota"])
def test_a_disk_that_fails_at_any_point_is_said_with_its_path_and_leaves_the_old_or_the_new_generation(
    change: Change, scene: Scene, forks: Forks, error: int
):
    points = [n for n, (what, _, _) in enumerate(change.trace, 1) if what not in {"half", "failed"}]
    refused = 0
    for point in points[:: 4 if len(points) > 60 else 1]:
        scene.restore(change.before)
        code, said = forks.run(change.step, point=point, error=error), forks.said()
        at = (point, *change.trace[point - 1][:2], said)
        assert code in {0, 73}, at
        refused += code == 73
        if code:
            assert "Traceback" not in said, at
            assert "Exception ignored" not in said, at
            assert os.strerror(error).lower() in said, at
            assert str(scene.folder) in said, at
        assert forks.ask(rows=str(scene.out)) == change.rows_at(point), at
        code = forks.run(change.step)
        assert code == 0 or (point > change.published and "holds a data set already" in forks.said()), at
        assert tree_of(scene.out) == change.after_tree, at
    assert refused > len(points) // 8


@pytest.mark.parametrize("largest", [1000, 2000, 3000, 4000])
def test_a_limit_on_the_size_of_a_file_is_said_with_its_path(change: Change, scene: Scene, forks: Forks, largest: int):
    scene.restore(change.before)
    code = forks.run(change.step, largest_file=largest)
    assert code == 73 or largest > 2000
    if code:
        assert "file too large" in forks.said()
        assert str(scene.out) in forks.said()
        assert len(forks.said().splitlines()) <= 4
    assert forks.ask(rows=str(scene.out)) in (change.before_rows, change.after_rows)
    assert not code or forks.run(change.step) == 0
    assert tree_of(scene.out) == change.after_tree


@pytest.mark.parametrize("name", ["ingest", "append", "gc"])
def test_a_disk_that_cannot_be_written_is_said_and_harms_nothing(small_disk: SmallDisk, name: str):
    disk, forks, scene = small_disk, small_disk.forks, small_disk.scene
    step = scene.steps[name]
    assert disk.mount("size=4m")
    scene.list_rows(FIRST)
    if name != "ingest":
        assert forks.run(scene.steps["ingest"]) == 0
        disk.call("mkdir", str(scene.out / "shards" / "left"))
    before = disk.rows()
    scene.list_rows(MORE)
    disk.remount("ro")
    assert forks.run(step) == (0 if name == "gc" else 73)
    if name != "gc":
        assert forks.said().splitlines() == [
            "The data set cannot be written:",
            f"  {scene.out}{'/.ingest' if before else ''}: read-only file system — "
            "make it a folder that can be written, or give another out=…",
        ]
    assert disk.rows() == before
    disk.remount("rw")
    assert forks.run(step) == 0, forks.said()
    disk.unmount()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_one_may_not_write_to_is_said(small_disk: SmallDisk):
    scene, forks = small_disk.scene, small_disk.forks
    scene.list_rows(FIRST)
    assert forks.run(scene.steps["ingest"], user=65534) == 73
    assert re.search(f"{scene.out}.*: permission denied — make it a folder that can be written", forks.said())


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_the_place_of_the_folder_is_said_and_stays(scene: Scene, forks: Forks, below: str):
    file = scene.folder / "file"
    file.write_text("mine")
    scene.list_rows(FIRST)
    words = [*scene.steps["ingest"].words, f"out={file}{below}"]
    assert forks.run(Step("ingest", words, FIRST)) == 73
    assert str(file) in forks.said()
    assert "Traceback" not in forks.said()
    assert file.read_text() == "mine"
    assert forks.run(Step("gc", [f"data={file}{below}"], FIRST)) in {65, 73}
    assert str(file) in forks.said()
