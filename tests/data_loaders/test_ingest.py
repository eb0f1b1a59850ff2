import csv
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.ipc
import pytest
from PIL import Image

from data_loaders.decode import PIXEL_CAP
from data_loaders.faults import Refusal
from data_loaders.index import Reader, open_index
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.loader import Data, file_batches
from data_loaders.manifest import collect_garbage
from data_loaders.settings import override
from data_loaders.shards import Done, Shards, Task
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.folder import Folder
from data_loaders.sources.rows import Row
from data_loaders.splits import Splits

Shoot = Callable[..., Path]
Write = Callable[[Sequence[Sequence[str]]], Path]


@pytest.fixture
def settings(photos: Path, tmp_path: Path) -> Ingest:
    """40 good rows."""
    return Ingest(source=Csv(path=photos, group_columns=("venue",)), out=tmp_path / "data", shards=Shards(rows=7))


def made(settings: Ingest, workers: int = 1) -> dict[str, Any]:
    """The manifest of the data set that the settings ask for, as it is stored."""
    ingest(settings, in_processes(workers))
    return json.loads((settings.out / "dataset.json").read_bytes())


def refused(settings: Ingest) -> Refusal:
    with pytest.raises(Refusal) as refusal:
        made(settings)
    return refusal.value


def stored(out: Path) -> dict[str, dict[str, Any]]:
    """Id -> what the shards say of it, read with pyarrow alone."""
    manifest = json.loads((out / "dataset.json").read_bytes())
    tables = [pa.ipc.open_file(out / "shards" / shard["name"]).read_all() for shard in manifest["shards"]]
    return {row["id"]: row | {"shard": n} for n, table in enumerate(tables) for row in table.to_pylist()}


def spoil(photos: Path, lines: dict[int, str]) -> None:
    """Replaces lines of the CSV, by their number in the file."""
    content = photos.read_text().splitlines()
    for number, line in lines.items():
        content[number - 1] = line
    photos.write_text("\n".join(content) + "\n")


def remains(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}


def die(task: Task) -> Done:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def remains_swept(out: Path) -> set[str]:
    """What is left where no data set was made, when what is stored is given up."""
    assert not (out / "dataset.json").exists()
    collect_garbage(out)
    return remains(out)


def rejected_rows(out: Path) -> list[dict[str, str]]:
    with (out / "rejected.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_image_lies_in_a_shard_byte_for_byte_with_its_label_and_groups(settings: Ingest, photos: Path):
    manifest = made(settings)
    rows = stored(settings.out)
    with photos.open(newline="") as file:
        listed = {line["path"]: line for line in csv.DictReader(file)}
    assert rows.keys() == listed.keys()
    for name, row in rows.items():
        assert row["image"] == {"bytes": (photos.parent / name).read_bytes(), "path": name}
        assert manifest["classes"][row["label"]] == listed[name]["label"]
        assert row["venue"] == listed[name]["venue"]
        assert row.keys() == {"id", "image", "label", "venue", "crc32c", "shard"}


def test_the_checksum_of_a_row_can_be_recomputed_from_its_shard_alone(settings: Ingest):
    made(settings)
    for row in stored(settings.out).values():
        texts = row["venue"].encode() + b"\0" + row["id"].encode() + b"\0"
        covered = row["image"]["bytes"] + row["label"].to_bytes(8, "little") + texts
        assert row["crc32c"] == google_crc32c.value(covered)


def test_the_manifest_counts_what_the_shards_hold(settings: Ingest):
    manifest = made(settings)
    index = open_index(settings.out)
    assert manifest["classes"] == ["cat", "dog"]
    assert manifest["groups"] == {"venue": ["home", "street"]}
    assert manifest["rejected"] == {"rows": 0, "by_class": {}, "by_group": {"venue": {}}, "by_cell": []}
    assert manifest["images"] == {"PNG": 40}
    assert manifest["rows"] == {split: {"cat": n, "dog": n} for split, n in (("train", 16), ("test", 2), ("val", 2))}
    assert sum(shard["rows"] for shard in manifest["shards"]) == len(index.labels) == 40
    assert [shard["name"] for shard in manifest["shards"]] == list(index.shards)
    for shard in manifest["shards"]:
        path = settings.out / "shards" / shard["name"]
        assert path.stat().st_size == shard["bytes"]
        assert shard["sha256"].startswith(path.stem.rpartition("-")[2])
    assert remains(settings.out) == {
        "dataset.json",
        "generations",
        "generations/000001.json",
        manifest["index"]["name"],
        manifest["order"]["name"],
        "rejected.csv",
        "shards",
        *(f"shards/{name}" for name in index.shards),
    }
    assert rejected_rows(settings.out) == []


def test_the_number_of_processes_changes_nothing(settings: Ingest, photos: Path, tmp_path: Path):
    (photos.parent / "images/05.png").write_bytes(b"broken")
    settings = override(settings, {"rejects.allow": 0.5})
    one, two = (made(override(settings, {"out": tmp_path / f"data{n}"}), n) for n in (1, 2))
    varying = {"settings", "checksum"}
    assert {k: v for k, v in one.items() if k not in varying} == {k: v for k, v in two.items() if k not in varying}
    for shard in one["shards"]:
        files = [tmp_path / f"data{n}" / "shards" / shard["name"] for n in (1, 2)]
        assert files[0].read_bytes() == files[1].read_bytes()
    for name in (one["index"]["name"], one["order"]["name"], "rejected.csv"):
        assert (tmp_path / "data1" / name).read_bytes() == (tmp_path / "data2" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "differs"),
    [({"workers": 2}, False), ({"rejects.allow": 0.1}, False), ({"splits.seed": 1}, True), ({"shards.rows": 9}, True)],
)
def test_the_fingerprint_changes_with_the_rows_and_with_nothing_else(settings: Ingest, change, differs, tmp_path):
    first = made(settings)
    second = made(override(settings, {"out": tmp_path / "other"} | change))
    assert (first["fingerprint"] != second["fingerprint"]) is differs


def test_one_changed_pixel_changes_the_fingerprint(settings: Ingest, photos: Path, tmp_path: Path):
    first = made(settings)
    Image.new("RGB", (7, 5), (1, 2, 3)).save(photos.parent / "images/00.png")
    second = made(override(settings, {"out": tmp_path / "other"}))
    assert first["fingerprint"] != second["fingerprint"]
    assert len({s["name"] for s in first["shards"]} & {s["name"] for s in second["shards"]}) == len(first["shards"]) - 1


def test_a_folder_of_images_becomes_the_same_data_set_as_a_csv_of_them(
    tmp_path: Path, shoot: Shoot, listing_csv: Write
):
    rows = [("path", "label")]
    for i in range(20):
        shoot(f"images/{'cat' if i % 2 else 'dog'}/{i:02d}.png")
        rows.append((f"{'cat' if i % 2 else 'dog'}/{i:02d}.png", "cat" if i % 2 else "dog"))
    source = Csv(path=listing_csv([rows[0], *sorted(rows[1:])]), root=tmp_path / "images")
    a = made(Ingest(source=source, out=tmp_path / "a"))
    b = made(Ingest(source=Folder(path=tmp_path / "images"), out=tmp_path / "b"))
    assert a["fingerprint"] == b["fingerprint"]


def test_every_bad_row_is_listed_in_one_pass_and_nothing_else_is_written(settings: Ingest, photos: Path, shoot: Shoot):
    folder = photos.parent / "images"
    os.mkfifo(folder / "pipe.png")
    (folder / "sub").mkdir()
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    shoot("images/gif.png", format="GIF")
    (folder / "zeros").symlink_to("/dev/zero")
    (folder / "circle.png").symlink_to("circle.png")
    shoot("images/large.jpg", size=(300, 300))
    (folder / "cut.jpg").write_bytes((folder / "large.jpg").read_bytes()[:-200])
    bad = {
        3: ("images/01.png,cat,home,more,cells", "labels.csv:3", "5 cells under 4 columns"),
        4: ("images/02.png,,street,p0", "labels.csv:4:2", "no label"),
        5: ("images/gone.png,dog,home,p0", "labels.csv:5", "'images/gone.png': no such file or directory"),
        6: ("images/zero.png,cat,home,p0", "labels.csv:6", "'images/zero.png': is empty: it has 0 bytes"),
        7: ("images/text.jpg,cat,home,p0", "labels.csv:7", "'images/text.jpg': is not a JPEG, PNG, WEBP image"),
        8: ("images/pipe.png,cat,home,p0", "labels.csv:8", "'images/pipe.png': is not a regular file"),
        9: ("images/sub,cat,home,p0", "labels.csv:9", "'images/sub': is not a regular file"),
        10: ("images/zeros,cat,home,p0", "labels.csv:10", "'images/zeros': is not a regular file"),
        11: (
            "images/circle.png,cat,home,p0",
            "labels.csv:11",
            "'images/circle.png': too many levels of symbolic links",
        ),
        12: ("images/gif.png,cat,home,p0", "labels.csv:12", "'images/gif.png': is not a JPEG, PNG, WEBP image"),
        13: ("images/00.png,cat,home,p0", "labels.csv:13", f"'images/00.png' is listed already at {photos}:2"),
        14: (
            "images/00.png,dog,home,p0",
            "labels.csv:14",
            f"'images/00.png' is labelled 'dog' here and 'cat' at {photos}:2",
        ),
        15: ("images/13.png, Cat ,home,p0", "labels.csv:15", "label 'Cat' differs from 'cat' only in case or spaces"),
        16: ("images/cut.jpg,cat,home,p0", "labels.csv:16", "'images/cut.jpg': "),
        17: ("../a.png,cat,home,p0", "labels.csv:17:1", "'../a.png' is outside of"),
        18: (f"{'x' * 300}.png,cat,home,p0", "labels.csv:18", f"'{'x' * 300}.png': file name too long"),
    }
    spoil(photos, {number: line for number, (line, _, _) in bad.items()})
    refusal = refused(settings)
    assert refusal.exit_code == 65
    assert refusal.title.startswith("16 of 40 rows cannot be used")
    assert "rejects.allow=0.4 with rejects.uneven=allow (most are of label x venue" in refusal.title
    found = {Path(fault.where).name: fault.what for fault in refusal.faults}
    assert found.keys() == {place for _, place, _ in bad.values()}
    for _, place, reason in bad.values():
        assert found[place].startswith(reason)
    assert all(fault.fix for fault in refusal.faults)
    assert [(line["where"], line["reason"], line["fix"]) for line in rejected_rows(settings.out)] == refusal.faults
    assert remains_swept(settings.out) == {"rejected.csv"}


def test_a_pipe_among_the_files_to_predict_is_told_and_read_by_nobody(tmp_path: Path, shoot: Shoot):
    shoot("images/a.png")
    os.mkfifo(tmp_path / "images/pipe.png")
    source = Folder(path=tmp_path / "images")
    rows = [row for row in source.rows(labelled=False) if isinstance(row, Row)]
    ((images, good, bad),) = file_batches(source, rows, Data(path=tmp_path, size=4))
    assert (images.shape, [row.id for row in good]) == ((1, 3, 4, 4), ["a.png"])
    assert [fault.what for _, fault in bad] == ["'pipe.png': is not a regular file"]


def test_bad_rows_under_the_ceiling_are_dropped_and_counted_by_class_and_group(settings: Ingest, photos: Path):
    spoil(photos, {4: "images/02.png,,street,p0", 7: "images/gone.png,dog,home,p0", 8: "images/06.png,cat,,p0"})
    (photos.parent / "images/39.png").write_bytes(b"broken")
    manifest = made(override(settings, {"rejects.allow": 0.1}))
    assert manifest["rejected"] == {
        "rows": 4,
        "by_class": {"(none)": 1, "cat": 1, "dog": 2},
        "by_group": {"venue": {"street": 2, "(none)": 1, "home": 1}},
        "by_cell": [
            [["(none)", "street"], 1],
            [["cat", "(none)"], 1],
            [["dog", "home"], 1],
            [["dog", "street"], 1],
        ],
    }
    assert len(rejected_rows(settings.out)) == 4
    assert len(stored(settings.out)) == 36
    assert open_index(settings.out).fingerprint == manifest["fingerprint"]


@pytest.mark.parametrize("bad", [1, 2, 3, 6, 7, 11, 12, 13])
def test_the_ceiling_that_a_refusal_names_is_enough_and_less_is_not(tmp_path: Path, photos: Path, bad):
    for i in range(bad):
        (photos.parent / f"images/{i:02d}.png").write_bytes(b"broken")
    settings = Ingest(source=Csv(path=photos), out=tmp_path / "data")
    named = refused(settings).title.partition("rejects.allow=")[2].split()[0]
    assert refused(override(settings, {"rejects.allow": float(named) - 0.001})).exit_code == 65
    assert made(override(settings, {"rejects.allow": float(named)}))["rejected"]["rows"] == bad


def test_no_ceiling_is_named_that_would_leave_no_row(settings: Ingest, photos: Path):
    for path in (photos.parent / "images").iterdir():
        path.write_bytes(b"broken")
    assert "rejects.allow" not in refused(settings).title
    assert remains_swept(settings.out) == {"rejected.csv"}


def test_the_pixel_cap_holds_before_anything_is_decoded(settings: Ingest, photos: Path):
    Image.new("RGB", (50, 50)).save(photos.parent / "images/00.png")
    (fault,) = refused(override(settings, {"shards.pixel_cap": 2_499})).faults
    assert "claims 50 x 50 pixels, more than the cap of 2,499" in fault.what
    assert Shards.model_fields["pixel_cap"].default == PIXEL_CAP


def test_a_class_without_a_training_row_is_refused(settings: Ingest, photos: Path):
    spoil(photos, {2: "images/00.png,bird,home,p0"})
    refusal = refused(override(settings, {"splits.val": 0.7, "splits.test": 0.2}))
    assert refusal.faults[0].where == "bird"
    assert remains_swept(settings.out) == {"rejected.csv"}


def test_one_class_or_none_is_not_enough(settings: Ingest, photos: Path, listing_csv: Write):
    spoil(photos, {n: f"images/{n - 2:02d}.png,cat,home,p0" for n in range(2, 42)})
    assert "a classifier needs two" in str(refused(settings))
    listing_csv([("path", "label", "venue")])
    assert "a classifier needs two" in str(refused(settings))
    assert remains_swept(settings.out) == {"rejected.csv"}


def test_given_classes_fix_their_order_and_others_are_rejected(settings: Ingest, photos: Path, tmp_path: Path):
    assert made(override(settings, {"classes": ("dog", "cat")}))["classes"] == ["dog", "cat"]
    spoil(photos, {2: "images/00.png,bird,home,p0"})
    refusal = refused(override(settings, {"classes": ("dog", "cat"), "out": tmp_path / "b"}))
    assert [fault.what for fault in refusal.faults] == ["label 'bird' is not in `classes`"]


def test_units_lie_on_one_side_and_held_out_ones_on_none_other(settings: Ingest, photos: Path, tmp_path: Path):
    source = Csv(path=photos, split_by="patient", group_columns=("venue",))
    made(override(settings, {"source": source, "splits": Splits(val=0.2, test=0.2)}))
    with photos.open(newline="") as file:
        patient = {line["path"]: line["patient"] for line in csv.DictReader(file)}
    index = open_index(settings.out)
    sides = {(patient[name], split) for name, split in zip(index.ids.to_pylist(), index.split.tolist(), strict=True)}
    assert max(Counter(p for p, _ in sides).values()) == 1
    assert len({split for _, split in sides}) == 3
    (tmp_path / "far.csv").write_text("path,label,venue,patient\nimages/00.png,cat,home,p3\n")
    spoil(photos, {2: ""})
    held = source.model_copy(update={"held_out": {"far": tmp_path / "far.csv"}})
    refusal = refused(override(settings, {"source": held, "out": tmp_path / "b"}))
    assert [(Path(fault.where).name, fault.what) for fault in refusal.faults] == [
        (f"labels.csv:{line}", f"'p3' has rows in the split 'far' too, at {tmp_path / 'far.csv'}:2")
        for line in (14, 15, 16, 17)
    ]


def test_shards_hold_as_many_rows_as_asked_for_but_the_last(settings: Ingest):
    manifest = made(override(settings, {"splits": Splits(val=0.0, test=0.0)}))
    assert [shard["rows"] for shard in manifest["shards"]] == [7, 7, 7, 7, 7, 5]


def test_large_images_that_lie_together_do_not_make_one_large_shard(settings: Ingest, photos: Path):
    for i in range(12):
        with (photos.parent / f"images/{i:02d}.png").open("ab") as file:
            file.write(bytes(400_000))  # behind the end of a PNG anything may stand
    changes = {"shards.megabytes": 1, "shards.rows": 1000, "splits": Splits(val=0.0, test=0.0)}
    manifest = made(override(settings, changes))
    assert max(shard["bytes"] for shard in manifest["shards"]) < 1_500_000
    assert len(stored(settings.out)) == 40


def test_one_image_larger_than_a_shard_has_one_of_its_own(settings: Ingest, photos: Path):
    with (photos.parent / "images/20.png").open("ab") as file:
        file.write(bytes(3_000_000))
    manifest = made(override(settings, {"shards.megabytes": 1, "splits": Splits(val=0.0, test=0.0)}))
    assert len(stored(settings.out)) == 40
    assert [shard["rows"] for shard in manifest["shards"]] == [7, 7, 7, 7, 7, 5]


def test_a_data_set_is_never_written_over(settings: Ingest):
    made(settings)
    before = {name: (settings.out / name).stat().st_mtime_ns for name in remains(settings.out)}
    refusal = refused(settings)
    assert refusal.exit_code == 73
    assert "holds a data set already" in str(refusal)
    assert {name: (settings.out / name).stat().st_mtime_ns for name in remains(settings.out)} == before


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere/data", "/dev/null"])
def test_an_out_that_cannot_be_written_is_refused(settings: Ingest, tmp_path: Path, out):
    (tmp_path / "file").write_text("mine")
    refusal = refused(override(settings, {"out": tmp_path / out}))
    assert refusal.exit_code == 73
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_refusal_leaves_is_garbage_but_for_what_others_put_there(settings: Ingest, photos: Path):
    (settings.out / "shards").mkdir(parents=True)
    (settings.out / "shards/mine.arrow").write_bytes(b"mine")
    (photos.parent / "images/39.png").write_bytes(b"broken")
    refused(settings)
    assert remains_swept(settings.out) == {"rejected.csv", "shards", "shards/mine.arrow"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("after", [0, 2, 5])
def test_what_a_failed_run_has_stored_is_kept_and_not_stored_again(settings: Ingest, tmp_path: Path, error, after):
    def stumble(work: Callable[[Task], Done], tasks: Iterable[Task]) -> Iterator[Done]:
        done = [work(task) for task in tasks]  # other processes are ahead of what was handed over
        yield from done[:after]
        (settings.out / "shards/.train-g1-00009-00.77.tmp").write_bytes(b"half")
        raise error

    whole = made(override(settings, {"out": tmp_path / "whole"}))
    with pytest.raises((KeyboardInterrupt, RuntimeError, Refusal)) as raised:
        ingest(settings, stumble)
    if isinstance(raised.value, Refusal):
        assert raised.value.exit_code == 73
        assert "no space left on device" in str(raised.value)
        assert "bytes more are needed" in str(raised.value)
    assert not (settings.out / "dataset.json").exists()
    written = {path.name: path.stat().st_ino for path in (settings.out / "shards").glob("*.arrow")}
    assert written.keys() == {shard["name"] for shard in whole["shards"]}
    assert made(settings)["fingerprint"] == whole["fingerprint"]
    assert remains(settings.out) == remains(tmp_path / "whole")
    assert written == {path.name: path.stat().st_ino for path in (settings.out / "shards").glob("*.arrow")}


def test_a_refusal_keeps_the_good_images_for_the_mended_command(settings: Ingest, photos: Path, capfd):
    (photos.parent / "images/39.png").write_bytes(b"broken")
    refused(settings)
    assert "good images are kept" in capfd.readouterr().err
    written = {path.name: path.stat().st_ino for path in (settings.out / "shards").glob("*.arrow")}
    made(override(settings, {"rejects.allow": 0.1}))
    again = {path.name: path.stat().st_ino for path in (settings.out / "shards").glob("*.arrow")}
    assert len(again) == len(written) > 4
    assert len(again.items() - written.items()) == 1  # that of the task with the bad one
    assert not (settings.out / ".ingest").exists()


def test_images_that_changed_since_a_run_was_killed_are_read_again(settings: Ingest, photos: Path):
    def stumble(work: Callable[[Task], Done], tasks: Iterable[Task]) -> Iterator[Done]:
        yield from [work(task) for task in tasks]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(settings, stumble)
    for i in (3, 17):
        Image.new("RGB", (7, 5), (1, 2, i)).save(photos.parent / f"images/{i:02d}.png")
    made(settings)
    for name, row in stored(settings.out).items():
        assert row["image"]["bytes"] == (photos.parent / name).read_bytes()


def test_a_worker_that_is_killed_is_said_and_the_same_command_goes_on(settings: Ingest):
    with pytest.raises(Refusal, match=r"the same command goes on:\n  workers: a process was killed") as refusal:
        ingest(settings, lambda work, tasks: in_processes(2)(die, tasks))
    assert refusal.value.exit_code == 75


def test_a_task_whose_images_could_not_all_be_used_is_done_again(settings: Ingest, photos: Path):
    def stumble(work: Callable[[Task], Done], tasks: Iterable[Task]) -> Iterator[Done]:
        yield from [work(task) for task in tasks]
        raise KeyboardInterrupt

    image = photos.parent / "images/07.png"
    good = image.read_bytes()
    image.write_bytes(b"broken")
    with pytest.raises(KeyboardInterrupt):
        ingest(settings, stumble)
    image.write_bytes(good)
    assert made(settings)["rejected"]["rows"] == 0
    assert len(stored(settings.out)) == 40


def test_a_failure_while_publishing_leaves_no_data_set_and_the_next_run_ends_it(settings: Ingest):
    settings.out.mkdir()
    in_the_way = settings.out / f".dataset.json.{os.getpid()}.tmp"  # where it would be written
    in_the_way.mkdir()
    with pytest.raises(Refusal, match="cannot be written"):
        made(settings)
    with pytest.raises(Refusal, match="no data set"):
        open_index(settings.out)
    in_the_way.rmdir()
    assert len(made(settings)["shards"]) == len(list((settings.out / "shards").iterdir()))


def test_what_a_killed_run_left_is_swept_away_by_the_next(settings: Ingest):
    left = settings.out / "shards"
    left.mkdir(parents=True)
    for name in ("train-g1-00000-00-0123abcd.arrow", ".train-g1-00001-00.4711.tmp", "val-g2-00000-00-ffffffff.arrow"):
        (left / name).write_bytes(b"old")
    for name in ("index-g1-01234567.arrow", "order-g1-01234567.arrow", ".order-g1.4711.tmp"):
        (settings.out / name).write_bytes(b"old")
    manifest = made(settings)
    assert {path.name for path in left.iterdir()} == {shard["name"] for shard in manifest["shards"]}
    assert {path.name for path in settings.out.glob("*.arrow")} == {manifest[f]["name"] for f in ("index", "order")}
    assert not list(settings.out.glob(".order*"))
    assert len(open_index(settings.out).labels) == 40


def test_group_columns_may_be_called_anything_that_the_shards_do_not_use(tmp_path: Path, photos: Path):
    names = ("rows", "by_class", "split", "bytes", "offset", "group.x", "naïve column", "class")
    content = photos.read_text().splitlines()
    lines = [",".join((content[0], *names)), *(f"{line},{','.join(names)}" for line in content[1:])]
    photos.write_text("\n".join(lines))
    (photos.parent / "images/00.png").write_bytes(b"broken")
    settings = Ingest(source=Csv(path=photos, group_columns=names), out=tmp_path / "data")
    manifest = made(override(settings, {"rejects.allow": 0.5}))
    assert manifest["rejected"]["rows"] == 1
    assert manifest["rejected"]["by_group"] == {name: {name: 1} for name in names}
    index = open_index(settings.out)
    assert index.group_values == {name: (name,) for name in names}
    assert all(row[name] == name for row in stored(settings.out).values() for name in names)
    assert Reader(index).read(0)


def test_labels_and_values_may_be_any_text(tmp_path: Path, photos: Path):
    odd = ["no", "007", "Größe, 'x'", "日本語", "=1+1", "🍕"]
    with photos.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(("path", "label", "venue"))
        out.writerows((f"images/{i:02d}.png", odd[i % 6], odd[i % 5]) for i in range(36))
    made(Ingest(source=Csv(path=photos, group_columns=("venue",)), out=tmp_path / "data"))
    index = open_index(tmp_path / "data")
    assert index.classes == tuple(sorted(odd))
    for row, name in enumerate(index.ids.to_pylist()):
        i = int(name[7:9])
        assert index.classes[index.labels[row]] == odd[i % 6]
        assert index.group_values["venue"][index.groups[row, 0]] == odd[i % 5]
        assert Reader(index).read(row) == (photos.parent / name).read_bytes()


def test_hugging_face_datasets_reads_the_shards_with_images_and_class_names(settings: Ingest, photos: Path, tmp_path):
    made(settings)
    script = f"""
import datasets, io, json
files = {{s: [str(p) for p in sorted(__import__("pathlib").Path({str(settings.out)!r}, "shards").glob(s + "-*"))]
         for s in ("train", "val", "test")}}
found = datasets.load_dataset("arrow", data_files=files, cache_dir={str(tmp_path / "cache")!r})
assert {{s: len(d) for s, d in found.items()}} == {{"train": 32, "val": 4, "test": 4}}, found
features = found["train"].features
assert isinstance(features["image"], datasets.Image), features
assert features["label"] == datasets.ClassLabel(names=["cat", "dog"]), features
assert features["venue"] == features["id"] == datasets.Value("string"), features
for row in found["val"]:
    number = int(row["id"][7:9])
    assert row["label"] == features["label"].str2int(("cat", "dog")[number % 2])
    assert row["image"].size == (7 + number % 3, 5 + number % 5)
    assert row["venue"] == ("home", "street")[number // 2 % 2]
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
