"""A data set in other layouts, read back by other tools and by our own ingest, and its cards."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet as pq
import pytest
import torchvision
import yaml
from hypothesis import given
from PIL import Image

from data_loaders.audit.duplicates import duplicates
from data_loaders.augment import centred
from data_loaders.contents.overview import overview, read
from data_loaders.contents.pixels import channels
from data_loaders.decode import decode
from data_loaders.export import card as export_card
from data_loaders.export.about import About
from data_loaders.export.card import markdown
from data_loaders.export.convert import convert, write_cards
from data_loaders.export.folder import Folder
from data_loaders.export.kinds import AnyTarget
from data_loaders.export.names import LONGEST, image_name, safe
from data_loaders.export.parquet import HuggingFace
from data_loaders.export.rows import spans
from data_loaders.export.webdataset import WebDataset
from data_loaders.faults import Refusal
from data_loaders.index import DamagedRow, Reader, open_index
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.manifest import publish
from data_loaders.shards import Shards
from data_loaders.sources import folder as sources_folder
from data_loaders.sources import webdataset as sources_webdataset
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.parquet import Parquet
from data_loaders.splits import Splits

CLASSES = ("../evil", "..", "<script>alert(1)</script>", "a/b | *c*", "Größe 🍕")
VENUES = ("home", "--- `x`")
TARGETS: list[AnyTarget] = [HuggingFace(), WebDataset(), Folder()]
FULL = About(
    name="Odd <b>images</b>",
    description="Noise.",
    license="cc-by-4.0",
    creator="Ada Lovelace",
    url="https://example.org/odd",
    citation="@misc{odd}",
    published="2026-01-02",  # pyright: ignore[reportArgumentType], as YAML gives it
    version="1.2.3",
    biases="Drawn by a machine.",
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows whose ids, classes and groups are anything but names of files; one is dropped."""
    folder, random = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    lines = [("path", "label", "my venue", "split", "kind")]
    for i in range(61):
        place = ("", "deep/er/", "ü & %2F/", "-dash's/")[i % 4]
        name = f"{place}{'.' * (i % 3 == 1)}{i}{('.png', '.JPG', '.x.webp')[i % 3]}"
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (8 + i % 3, 9, 3), np.uint8)
        Image.fromarray(pixels).save(path, {".JPG": "jpeg"}.get(path.suffix, path.suffix[1:]))
        split = ("train", "train", "val", "test", "far-1")[i // 5 % 5]
        lines.append((name, CLASSES[i % 5], VENUES[i % 7 % 2], split, f"k{i % 2}"))
    (folder / "images" / lines[-1][0]).write_bytes(b"broken")
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    columns = ("my venue", "kind")
    source = Csv(path=folder / "list.csv", root=folder / "images", group_columns=columns, split_column="split")
    settings = Ingest.model_validate(
        {"source": source, "out": folder / "data", "shards": Shards(rows=16), "rejects": {"allow": 0.1}}
    )
    ingest(settings, in_processes(1))
    return folder / "data"


Content = Counter[tuple[str, ...]]


def content(data: Path, splits: dict[str, str] | None = None, groups: bool = True) -> Content:
    """Split (renamed), class, groups and bytes of each row."""
    index = open_index(data)
    reader, found = Reader(index), Content()
    for row in range(len(index.labels)):
        split = str(index.splits[index.split[row]])
        values = [v[index.groups[row, a]] for a, v in enumerate(index.group_values.values())] if groups else []
        label = str(index.classes[index.labels[row]])
        found[((splits or {}).get(split, split), label, *values, reader.read(row).hex())] += 1
    return found


def again(source: Any, out: Path) -> Path:
    ingest(Ingest(source=source, out=out, splits=Splits(val=0, test=0)), in_processes(1))
    return out


def script(text: str, place: Path) -> Any:
    """What a script prints as JSON, in a process of its own: these libraries warn, and keep caches."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", text], env=os.environ | quiet, capture_output=True, text=True, check=False, cwd=place
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def inside(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_parquet_files_come_back_as_the_same_rows(odd: Path, tmp_path: Path):
    convert(odd, None, HuggingFace(), tmp_path / "out", About())
    source = Parquet(path=tmp_path / "out" / "data", group_columns=("my venue", "kind"))
    back = again(source, tmp_path / "back")
    assert content(back) == content(odd, {"far-1": "train"})  # whose name tells our own ingest nothing
    assert sorted(open_index(back).ids.to_pylist()) == sorted(open_index(odd).ids.to_pylist())
    index = open_index(odd)
    table = pq.read_table(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    assert table["crc32c"].to_pylist() == index.crc32c[index.rows_of("train")].tolist()


def test_hugging_face_loads_the_folder_by_its_card(odd: Path, tmp_path: Path):
    convert(odd, None, HuggingFace(), tmp_path / "out", FULL)
    text = """
import datasets, json
from huggingface_hub import DatasetCard
found = datasets.load_dataset("out")
features = found["train"].features
assert isinstance(features["image"], datasets.Image) and found["far_1"][0]["image"].size[0] == 9
known = DatasetCard.load("out/README.md").data
assert known.license == "cc-by-4.0" and known.pretty_name == "Odd <b>images</b>"
print(json.dumps([{s: d["id"][:] for s, d in found.items()}, features["label"].names, found["train"]["label"][:]]))
"""
    ids, names, labels = script(text, tmp_path)
    index = open_index(odd)
    assert ids == {s.replace("-", "_"): index.ids.take(index.rows_of(s)).to_pylist() for s in index.splits}
    assert names == list(index.classes)
    assert labels == index.labels[index.rows_of("train")].tolist()


def test_tars_come_back_as_the_same_rows_and_in_webdataset(odd: Path, tmp_path: Path):
    convert(odd, None, WebDataset(), tmp_path / "out", About())
    source = sources_webdataset.WebDataset(
        path=tmp_path / "out", label="json:label", group_columns=("my venue", "kind"), split_column="split"
    )
    assert content(again(source, tmp_path / "back")) == content(odd)
    text = """
import json, webdataset
data = webdataset.WebDataset("out/train-000000.tar", shardshuffle=False).decode()
print(json.dumps([[s["__key__"], s["cls"], s["json"]["id"]] for s in data]))
"""
    index = open_index(odd)
    rows = index.rows_of("train").tolist()
    expected = [[f"{n:09d}", int(index.labels[row]), index.ids[row].as_py()] for n, row in enumerate(rows)]
    assert script(text, tmp_path) == expected
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == list(index.classes)


def test_a_folder_comes_back_as_the_same_rows_by_its_list_and_by_its_names(odd: Path, tmp_path: Path):
    convert(odd, None, Folder(), tmp_path / "out", About())
    listed = Csv(path=tmp_path / "out/labels.csv", group_columns=("my venue", "kind"), split_column="split")
    assert content(again(listed, tmp_path / "a")) == content(odd)
    splits = open_index(odd).splits
    named = sources_folder.Folder(path=tmp_path / "out/images", splits=splits)
    back = content(again(named, tmp_path / "b"))
    assert back == Counter({(s, safe(label), image): n for (s, label, image), n in content(odd, groups=False).items()})
    found = torchvision.datasets.ImageFolder(tmp_path / "out/images/train", allow_empty=True)
    assert found.classes == sorted(map(safe, CLASSES))
    assert len(found) == len(open_index(odd).rows_of("train"))


@pytest.mark.parametrize("to", TARGETS, ids=lambda to: to.kind)
def test_nothing_is_written_outside_and_twice_is_the_same(odd: Path, tmp_path: Path, to: AnyTarget):
    for name in ("one", "two"):
        convert(odd, None, to, tmp_path / name, About(name="same"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert inside(tmp_path / "one") == inside(tmp_path / "two")
    head = yaml.safe_load((tmp_path / "one/README.md").read_text().split("---\n")[1])
    assert ("configs" in head) is isinstance(to, HuggingFace)
    for name in inside(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("to", TARGETS, ids=lambda to: to.kind)
def test_one_damaged_row_leaves_nothing(odd: Path, tmp_path: Path, to: AnyTarget):
    shutil.copytree(odd, tmp_path / "data")
    index = open_index(odd)
    row = int(index.rows_of("val")[-1])
    shard = tmp_path / "data/shards" / index.shards[index.shard[row]]
    spoilt = bytearray(shard.read_bytes())
    spoilt[int(index.offset[row]) + 5] ^= 1
    shard.write_bytes(spoilt)
    with pytest.raises(DamagedRow, match=f"row {row} "):
        convert(tmp_path / "data", None, to, tmp_path / "out", About())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_is_there_already_stays_as_it_is(odd: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("out", "link"):
        with pytest.raises(Refusal, match="exists already") as refusal:
            convert(odd, None, Folder(), tmp_path / name, About())
        assert refusal.value.exit_code == 73
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_splits_that_hugging_face_cannot_tell_apart_are_refused(tmp_path: Path, photos: Path):
    lines = [line.split(",") for line in photos.read_text().splitlines()]
    lines = [[*line, "split" if n == 0 else ("train", "a-b", "a.b")[n // 2 % 3]] for n, line in enumerate(lines)]
    photos.write_text("\n".join(map(",".join, lines)))
    again(Csv(path=photos, split_column="split"), tmp_path / "data")
    with pytest.raises(Refusal, match="a-b: would be called a_b"):
        convert(tmp_path / "data", None, HuggingFace(), tmp_path / "out", About())


def test_files_are_cut_by_their_size(tmp_path: Path):
    random = np.random.default_rng(0)
    for i in range(4):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (380, 380, 3), np.uint8)).save(path)
    data = again(sources_folder.Folder(path=tmp_path / "images"), tmp_path / "data")
    tars = convert(data, None, WebDataset(megabytes=1), tmp_path / "tars", About())
    assert [path.name for path in tars["train"]] == ["train-000000.tar", "train-000001.tar"]
    files = convert(data, None, HuggingFace(megabytes=1), tmp_path / "files", About())
    assert [path.name for path in files["train"]] == [f"train-{n:05d}-of-00002.parquet" for n in range(2)]


@given(st.lists(st.integers(0, 50)), st.integers(1, 60), st.integers(1, 5))
def test_spans_cover_everything_and_only_one_row_alone_is_larger_than_asked_for(sizes, most, rows):
    found = list(spans(np.array(sizes, np.int64), most, rows))
    assert [place for start, stop in found for place in range(start, stop)] == list(range(len(sizes)))
    assert all(sum(sizes[start:stop]) <= most or stop - start == 1 for start, stop in found)
    assert all(0 < stop - start <= rows for start, stop in found)


@given(st.text(), st.text())
def test_a_name_is_one_harmless_file_and_no_other_text_has_it(a, b):
    for name in (safe(a), image_name(a, ".png", (".png",))):
        assert not re.search(r'[/\\\0<>:"|?*\x00-\x1f]', name)
        assert name.strip(". ") == name
        assert name[0] not in ".-"
        assert len(name.encode()) <= LONGEST + 8
    assert (safe(a) == safe(b)) is (a == b)
    assert (image_name(a, ".png", (".png",)) == image_name(b, ".png", (".png",))) is (a == b)


@pytest.mark.parametrize("text", ["x" * 500, "日" * 200, "x" * 179 + "/"])
def test_long_names_are_cut_and_stay_different(text):
    assert len(safe(text).encode()) <= LONGEST
    assert safe(text) != safe(text + "y")


@given(st.text())
def test_no_text_is_markup_on_a_card(text):
    line = markdown(text)
    assert "\n" not in line
    assert not re.search(r"[<>]|(?<!\\)[|`*\[\]]", line.replace("\\\\", ""))


def test_a_card_tells_every_count_and_marks_what_nobody_said(odd: Path, tmp_path: Path):
    write_cards(odd, None, tmp_path, About())
    text = (tmp_path / "README.md").read_text()
    head, body = text.removeprefix("---\n").split("---\n", 1)
    known, index = yaml.safe_load(head), open_index(odd)
    assert [split["num_examples"] for split in known["dataset_info"]["splits"]] == [
        len(index.rows_of(split)) for split in index.splits
    ]
    assert known["license"] == "unknown"
    write_cards(odd, None, tmp_path, About(license="ask <me>"))
    assert "\nlicense: other\nlicense_name: ask <me>\n" in (tmp_path / "README.md").read_text()
    assert "<script>" not in body
    assert str(odd.parent) not in text
    made, _ = read(odd)
    for line in overview(index, made).counts.cells:
        cells = " | ".join([*map(markdown, line.name), *map(str, line.rows.values())])
        assert f"| {cells} |" in body
    assert body.count("*not given*") == 15
    assert "1 rows could not be used" in body
    assert "As its source says." in body
    assert "classes in groups have fewer than 30 rows in train" in body


def test_a_card_tells_the_findings_of_an_audit_of_the_same_data_only(odd: Path, tmp_path: Path):
    shutil.copytree(odd, tmp_path / "data")
    for data, told in ((open_index(odd).fingerprint, True), ("0" * 16, False)):
        (tmp_path / "data/audit.json").write_text(
            json.dumps({"data": data, "findings": [{"text": "The moon is *large*"}]})
        )
        write_cards(tmp_path / "data", None, tmp_path, About())
        assert (r"- The moon is \*large\*" in (tmp_path / "README.md").read_text()) is told
        assert ("The moon is *large*" in (tmp_path / "croissant.json").read_text()) is told


@pytest.mark.parametrize("broken", ["", "{", "[]", "7", '{"data": "FINGERPRINT"}', "[" * 100_000])
def test_a_card_goes_without_an_audit_that_cannot_be_read(odd: Path, tmp_path: Path, broken: str):
    shutil.copytree(odd, tmp_path / "data")
    write_cards(tmp_path / "data", None, tmp_path, About())
    without = (tmp_path / "README.md").read_text()
    (tmp_path / "data/audit.json").write_text(broken.replace("FINGERPRINT", open_index(odd).fingerprint))
    write_cards(tmp_path / "data", None, tmp_path, About())
    assert (tmp_path / "README.md").read_text() == without


@pytest.mark.parametrize("settings", [{}, {"source": {}}, {"source": "ours", "splits": None}, {"splits": {"val": "?"}}])
def test_a_card_of_another_writers_data_does_not_say_how_rows_were_divided(odd: Path, tmp_path: Path, settings):
    shutil.copytree(odd, tmp_path / "data")
    publish(tmp_path / "data", read(odd)[0].model_copy(update={"settings": settings}))
    write_cards(tmp_path / "data", None, tmp_path, About())
    assert "## How rows were divided\n\n*not given*\n" in (tmp_path / "README.md").read_text()


def test_imbalances_are_counted_once_for_both_cards(odd: Path, tmp_path: Path, monkeypatch):
    asked = list[str]()
    monkeypatch.setattr(export_card, "duplicates", lambda index, train: asked.append(train) or duplicates(index, train))
    write_cards(odd, None, tmp_path, About())
    assert asked == ["train"]
    convert(odd, None, HuggingFace(), tmp_path / "out", About())
    assert asked == ["train", "train"]


CROISSANT = """
import json, logging, mlcroissant
said = []
logging.getLogger("absl").addHandler(type("Told", (logging.Handler,), {"emit": lambda self, r: said.append(r.msg)})())
data = mlcroissant.Dataset(jsonld="croissant.json")
issues = data.metadata.ctx.issues
rows = [[r["rows/id"].decode(), int(r["rows/label"]), r["rows/my~20venue"].decode(), r["rows/~split"].decode(),
         list(r["rows/image"].size)] for r in (data.records("rows") if False else ())]
classes = [r["classes/name"] for r in data.records("classes")]
print(json.dumps([sorted(issues.errors), sorted(issues.warnings), said, classes, rows]))
"""


def test_croissant_of_the_shards_is_valid_and_names_each_with_its_hash(odd: Path, tmp_path: Path):
    shutil.copytree(odd, tmp_path / "data")
    write_cards(tmp_path / "data", None, tmp_path / "data", FULL)
    errors, warnings, said, classes, _ = script(CROISSANT, tmp_path / "data")
    assert (errors, warnings, said) == ([], [], [])
    made, index = read(odd)
    assert classes == list(index.classes)
    tree = json.loads((tmp_path / "data/croissant.json").read_text())
    files = [part for part in tree["distribution"] if part["@type"] == "cr:FileObject"]
    assert {f["contentUrl"]: f["sha256"] for f in files} == {f"shards/{s.name}": s.sha256 for s in made.shards}
    assert tree["rai:dataBiases"][-1] == "Drawn by a machine."
    assert "1 rows could not be used and were dropped; by class" in tree["rai:dataCollectionMissingData"]
    assert tree["rai:dataUseCases"] == "not given"


def test_croissant_without_any_word_of_people_misses_a_date_and_nothing_else(odd: Path, tmp_path: Path):
    write_cards(odd, None, tmp_path, About())
    errors, warnings, *_ = script(CROISSANT, tmp_path)
    assert errors == []
    assert len(warnings) == 1
    assert "datePublished" in warnings[0]


def test_croissant_lists_the_records_of_parquet_files(odd: Path, tmp_path: Path):
    convert(odd, None, HuggingFace(), tmp_path / "out", FULL)
    *_, rows = script(CROISSANT.replace("if False", "if True"), tmp_path / "out")
    index = open_index(odd)
    assert sorted(rows) == sorted(
        [
            index.ids[row].as_py(),
            int(index.labels[row]),
            index.group_values["my venue"][index.groups[row, 0]],
            index.splits[index.split[row]].replace("-", "_"),
            [int(index.width[row]), int(index.height[row])],
        ]
        for row in range(len(index.labels))
    )


@pytest.mark.parametrize("size", [None, 6])
def test_mean_and_deviation_of_channels_are_those_of_all_pixels(odd: Path, size):
    index = open_index(odd)
    rows, reader = index.rows_of("train"), Reader(index)
    images = [decode(reader.read(row)) for row in rows.tolist()]
    pixels = [(image if size is None else centred(image, size)).reshape(-1, 3) / 255 for image in images]
    found = channels(index, rows, size)
    assert [line.name for line in found] == ["", *index.classes]
    for line in found:
        own = [
            p for p, k in zip(pixels, index.labels[rows], strict=True) if not line.name or index.classes[k] == line.name
        ]
        assert (line.images, line.pixels) == (len(own), sum(map(len, own)))
        assert np.allclose(line.mean, np.concatenate(own).mean(0), rtol=0, atol=1e-12)
        assert np.allclose(line.std, np.concatenate(own).std(0), rtol=0, atol=1e-12)


def test_channels_of_no_row_are_not_numbers(odd: Path):
    (line,) = channels(open_index(odd), np.zeros(0, np.int64))
    assert (line.images, line.pixels) == (0, 0)
    assert np.isnan([*line.mean, *line.std]).all()
