"""The jobs that look at a data set, describe it and convert it, as people call them."""

import importlib
import json
import re
import subprocess
import sys
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_loaders.decode import decode
from data_loaders.index import Reader, open_index
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.sources.csv_file import Csv

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "<script>alert('x')</script>"


def run(monkeypatch: pytest.MonkeyPatch, job: str, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [job, *map(str, words)])
    importlib.import_module(f"jobs.{job}").main()


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job: str, *words: object
) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, job, *words)
    assert isinstance(end.value.code, int)
    return end.value.code, capsys.readouterr().err


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen, self.sources = set[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]
        assert not [name for name, _ in attrs if name.startswith("on")]


@pytest.fixture
def hostile(dataset: Path, tmp_path: Path) -> Path:
    """A data set of the same images, whose class, group and file names are HTML; one row is dropped."""
    images = sorted(dataset.parent.glob("*.png"))[:24]
    lines = ["path,label,venue"]
    for i, image in enumerate(images):
        name = f"<img src=x onerror=alert({i})>.png"
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(image.read_bytes() if i else b"broken")
        lines.append(f'{name},"{HOSTILE if i % 2 else "plain"}","{"<b>home" if i % 3 else "&amp;"}"')
    (tmp_path / "list.csv").write_text("\n".join(lines))
    source = Csv(path=tmp_path / "list.csv", root=tmp_path / "images", group_columns=("venue",))
    ingest(
        Ingest.model_validate({"source": source, "out": tmp_path / "data", "rejects": {"allow": 0.1}}), in_processes(1)
    )
    return tmp_path / "data"


def test_inspect_tells_the_smallest_cell_first_and_every_count(dataset: Path, tmp_path: Path, monkeypatch, capsys):
    run(monkeypatch, "inspect", f"data={dataset}", f"out={tmp_path / 'it.json'}")
    said, index = capsys.readouterr().out, open_index(dataset)
    tree = json.loads((tmp_path / "it.json").read_text())
    assert tree["counts"]["splits"] == {split: len(index.rows_of(split)) for split in ("train", "test", "val")}
    assert [line["name"] for line in tree["counts"]["classes"]] == [["food"], ["drink"], ["dessert"]]
    cells = tree["counts"]["cells"]
    assert [line["rows"]["train"] for line in cells] == sorted(line["rows"]["train"] for line in cells)
    assert len(cells) == 12
    for line in cells:
        label, venue, camera = line["name"]
        own = (index.labels == index.classes.index(label)) & (index.cells == index.cell_names.index((venue, camera)))
        assert sum(line["rows"].values()) == own.sum()
    assert tree["sizes"][0]["width"] == {"n": 84, "least": 12.0, "median": 12.0, "most": 12.0}
    assert tree["sizes"][0]["quality"] == {"n": 0, "least": None, "median": None, "most": None}
    worst = cells[0]
    assert re.search(
        rf"class +venue +camera +train +test +val\n{' +'.join(worst['name'])} +{worst['rows']['train']} ", said
    )
    assert "images: 154 PNG" in said
    assert "no row was dropped" in said


def test_the_page_shows_samples_of_each_cell_and_runs_nothing_of_what_names_say(
    hostile: Path, tmp_path, monkeypatch, capsys
):
    page = tmp_path / "page.html"
    run(monkeypatch, "inspect", f"data={hostile}", f"out={page}", "per_cell=2")
    text = page.read_text()
    assert "8 pictures" in capsys.readouterr().out
    assert text.count("data:image/png;base64,") == 8
    assert not re.search(r"<script|<img src=x|<b>home|onerror=alert\(\d+\)>\.png", text)
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert "&lt;b&gt;home" in text
    assert "&amp;amp;" in text
    assert "default-src 'none'" in text
    tags = Tags(text)
    assert "img" in tags.seen
    assert not tags.seen & {"script", "iframe", "object", "embed", "link", "a", "b", "form", "svg", "base"}
    assert all(src.startswith("data:image/") for src in tags.sources)
    assert tags.sources
    assert "1 rows could not be used" in text
    run(monkeypatch, "inspect", f"data={hostile}", f"out={tmp_path / 'again.html'}", "per_cell=2")
    assert (tmp_path / "again.html").read_text() == text


def test_generations_are_told_and_an_earlier_one_can_be_looked_at(hostile: Path, tmp_path, monkeypatch, capsys):
    (tmp_path / "images" / "new.png").write_bytes(
        (tmp_path / "images" / "<img src=x onerror=alert(1)>.png").read_bytes()
    )
    with (tmp_path / "list.csv").open("a") as file:
        file.write("\nnew.png,plain,<b>home")
    source = Csv(path=tmp_path / "list.csv", root=tmp_path / "images", group_columns=("venue",))
    settings = {"source": source, "out": hostile, "rejects": {"allow": 0.9, "uneven": "allow"}, "append": True}
    ingest(Ingest.model_validate(settings), in_processes(1))
    run(monkeypatch, "inspect", f"data={hostile}")
    assert re.search(r"generation 1: 23 rows, .*\ngeneration 2: 24 rows", capsys.readouterr().out)
    run(monkeypatch, "inspect", f"data={hostile}", "generation=1")
    assert capsys.readouterr().out.startswith("generation 1: 23 rows")
    assert refused(monkeypatch, capsys, "inspect", f"data={hostile}", "generation=3")[0] == 65


def test_stats_are_those_of_the_pixels(dataset: Path, tmp_path: Path, monkeypatch, capsys):
    run(monkeypatch, "stats", f"data={dataset}", f"out={tmp_path / 'stats.json'}")
    index = open_index(dataset)
    reader = Reader(index)
    pixels = np.concatenate([decode(reader.read(row)).reshape(-1, 3) for row in index.rows_of("train").tolist()]) / 255
    tree = json.loads((tmp_path / "stats.json").read_text())
    assert np.allclose(tree["channels"][0]["mean"], pixels.mean(0), rtol=0, atol=1e-12)
    assert np.allclose(tree["channels"][0]["std"], pixels.std(0), rtol=0, atol=1e-12)
    assert [(line["name"], line["images"]) for line in tree["channels"]] == [
        ("", 84),
        ("dessert", 60),
        ("drink", 18),
        ("food", 6),
    ]
    said = capsys.readouterr().out
    assert f"Normalize(mean=({', '.join(f'{v:.4f}' for v in pixels.mean(0))})" in said
    run(monkeypatch, "stats", f"data={dataset}", "split=val", "size=4")
    assert "val of" in (said := capsys.readouterr().out)
    assert f"{33 * 16:,}" in said


def test_a_card_lies_beside_the_shards_and_says_what_was_not_given(hostile: Path, monkeypatch, capsys):
    run(
        monkeypatch,
        "card",
        f"data={hostile}",
        "about.name=Odd",
        "about.license=cc-by-4.0",
        "about.published=2026-03-01",
    )
    said = capsys.readouterr().out
    assert "about.creator" in said
    assert "about.license" not in said
    head = yaml.safe_load((hostile / "README.md").read_text().split("---\n")[1])
    assert (head["pretty_name"], head["license"]) == ("Odd", "cc-by-4.0")
    listed = [path for part in head["configs"][0]["data_files"] for path in part["path"]]
    assert sorted(listed) == sorted(f"shards/{path.name}" for path in (hostile / "shards").iterdir())
    tree = json.loads((hostile / "croissant.json").read_text())
    assert (tree["datePublished"], tree["version"]) == ("2026-03-01", "1.0.0")
    open_index(hostile)  # the data set is as it was


def test_group_columns_of_many_values_are_counted_by_those_that_occur(dataset: Path, tmp_path, monkeypatch, capsys):
    images = sorted(dataset.parent.glob("*.png"))[:60]
    values = [",".join(f"{i * k % 59}" for k in range(1, 13)) for i in range(60)]
    lines = [f"{image.name},{'ab'[i % 2]},{values[i]}" for i, image in enumerate(images)]
    names = [f"g{k}" for k in range(12)]
    (tmp_path / "list.csv").write_text("\n".join([f"path,label,{','.join(names)}", *lines]))
    source = Csv(path=tmp_path / "list.csv", root=dataset.parent, group_columns=tuple(names))
    ingest(Ingest.model_validate({"source": source, "out": tmp_path / "data"}), in_processes(1))
    run(monkeypatch, "inspect", f"data={tmp_path / 'data'}", f"out={tmp_path / 'it.json'}")
    counts = json.loads((tmp_path / "it.json").read_text())["counts"]
    rows = [tuple(line.split(",")[1:]) for line in lines]
    assert {tuple(line["name"]): sum(line["rows"].values()) for line in counts["cells"]} == Counter(rows)
    assert counts["empty"] == 2 * 59**12 - len(set(rows))
    run(monkeypatch, "card", f"data={tmp_path / 'data'}")
    assert f"{counts['empty']:,} classes in groups have no row at all" in (tmp_path / "data/README.md").read_text()
    run(monkeypatch, "convert", f"data={tmp_path / 'data'}", f"out={tmp_path / 'out'}", "to.kind=huggingface")


@pytest.mark.parametrize("job", ["stats", "inspect", "audit"])
def test_an_image_that_cannot_be_decoded_ends_a_job_without_a_traceback(
    dataset: Path, tmp_path, monkeypatch, capsys, job
):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(sorted(dataset.parent.glob("*.png"))[:8]):
        content = image.read_bytes()
        start, end = content.index(b"IDAT"), content.index(b"IEND") - 8
        spoilt = content[start:end] if i else b"IDAT" + bytes(end - start - 4)
        spoilt += zlib.crc32(spoilt).to_bytes(4, "big")
        (tmp_path / "images" / f"{i}.png").write_bytes(content[:start] + spoilt + content[end + 4 :])
    lines = "\n".join(["path,label,split", *(f"{i}.png,{'ab'[i % 2]},train" for i in range(8))])
    (tmp_path / "list.csv").write_text(lines)
    source = Csv(path=tmp_path / "list.csv", root=tmp_path / "images", split_column="split")
    settings = {"source": source, "out": tmp_path / "data", "shards": {"check": "header"}}
    ingest(Ingest.model_validate(settings), in_processes(1))
    words = [f"out={tmp_path / 'page.html'}"] if job == "inspect" else []
    code, said = refused(monkeypatch, capsys, job, f"data={tmp_path / 'data'}", *words)
    assert code == 65
    assert "row 0 (0.png)" in said
    assert "ingest again with shards.check=decode" in said


@pytest.mark.parametrize("kind", ["huggingface", "webdataset", "folder"])
def test_convert_says_where_it_is_and_refuses_what_is_there(hostile: Path, tmp_path: Path, monkeypatch, capsys, kind):
    out = tmp_path / "out"
    run(monkeypatch, "convert", f"data={hostile}", f"out={out}", f"to.kind={kind}")
    assert f"converted in {out}" in capsys.readouterr().out
    assert (out / "README.md").exists()
    code, said = refused(monkeypatch, capsys, "convert", f"data={hostile}", f"out={out}", f"to.kind={kind}")
    assert (code, "exists already" in said) == (73, True)


@pytest.mark.parametrize(
    ("job", "words", "said"),
    [
        ("inspect", ("out=it.pdf",), "must be a .html or a .json file"),
        ("convert", ("out=x", "to.kind=zip"), "no kind 'zip'"),
        ("convert", ("out=x",), "to is required"),
        ("stats", ("size=0",), "greater than 0"),
        ("card", ("about.licence=mit",), "did you mean license or"),
        ("stats", ("split=far",), "no split 'far'"),
        ("inspect", ("train=far",), "no split 'far'"),
    ],
)
def test_mistakes_are_told_in_words(dataset: Path, monkeypatch, capsys, job, words, said):
    code, told = refused(monkeypatch, capsys, job, f"data={dataset}", *words)
    assert code in {2, 65}
    assert said in told


@pytest.mark.parametrize("job", ["inspect", "stats", "card", "convert"])
def test_a_folder_without_a_data_set_is_told_without_a_traceback(tmp_path: Path, job):
    words = {"convert": ("to.kind=folder", f"out={tmp_path / 'out'}")}.get(job, ())
    line = [sys.executable, "-m", f"jobs.{job}", f"data={tmp_path}", *words]
    done = subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 65
    assert done.stderr.startswith("There is no data set:")
    assert list(tmp_path.iterdir()) == []
