"""Every snippet of docs/readers.md, run as it stands, gives the very rows that our own reader gives."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_loaders.export.ray_data import read_ray
from data_loaders.faults import Refusal
from data_loaders.index import Reader, open_index
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.shards import Shards
from data_loaders.sources.csv_file import Csv
from data_loaders.torch import ShardDataset
from jobs.card import Card
from jobs.card import run as write_card
from jobs.convert import Convert
from jobs.convert import run as convert

ROOT = Path(__file__).parent.parent.parent
SNIPPETS = dict(re.findall(r"^```python (.+?)\n(.*?)^```", (ROOT / "docs" / "readers.md").read_text(), re.M | re.S))
ALONE = {"hugging face, card", "hugging face, in place", "ray data", "pytorch", "webdataset"}
"""Snippets that need no list of shards."""
UNDECODED = "(dict(r) for r in data.cast_column('image', datasets.Image(decode=False)))"
ROWS = {
    "hugging face, map": UNDECODED,
    "hugging face, streaming": UNDECODED,
    "hugging face, card": UNDECODED,
    "hugging face, in place": UNDECODED.replace("datasets", "__import__('datasets')"),
    "polars": "frame.collect().to_dicts()",
    "pandas": "frame.to_dict('records')",
    "pyarrow": "data.to_table().to_pylist()",
    "duckdb": "duckdb.sql('SELECT * FROM rows').to_arrow_table().to_pylist()",
    "on your own": "[r for s in shards for r in pa.ipc.open_file(s).read_all().to_pylist()]",
    "webdataset": "webdataset.WebDataset('food_tars/train-000000.tar', shardshuffle=False)",
}
"""Snippet -> its rows, in terms of what it leaves."""
ALSO = {
    "polars": "assert row['id'].item() == frame.collect()['id'][40]",
    "pyarrow": "assert set(first['label'].to_pylist()) == {0}; "
    "assert some['id'].to_pylist() == [data.to_table()['id'][i].as_py() for i in (3, 1, 4)]",
    "duckdb": "assert sum(n for _, n in counts.fetchall()) == rows.count_rows()",
    "webdataset": "assert all(s['jpg' if 'jpg' in s else 'png'].shape[2] == 3 for s in data if 'webp' not in s)",
}
PLAIN = """
import hashlib, json, sys
import numpy as np
def plain(row):
    if "cls" in row:  # of webdataset
        about, image = json.loads(row["json"]), next(row[k] for k in ("jpg", "png", "webp") if k in row)
        row = {**about, "label": int(row["cls"]), "image": {"bytes": image}, "crc32c": None}
    image = row["image"]["bytes"] if isinstance(row["image"], dict) else np.asarray(row["image"], np.uint8).tobytes()
    image = hashlib.sha256(image).hexdigest()
    return [row["id"], int(row["label"]), row["venue"], row["camera"], image, row["crc32c"] and int(row["crc32c"])]
"""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 rows of two generations, in several shards of three splits; JPEG, PNG and WebP, and a hostile class name."""
    return made_in(tmp_path_factory.mktemp("grown"), Shards(rows=12))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as pixels."""
    return made_in(tmp_path_factory.mktemp("squares"), Shards(rows=12, encoding="raw", side=6))


def made_in(folder: Path, shards: Shards) -> Path:
    random = np.random.default_rng(0)
    lines = [("path", "label", "venue", "camera", "split")]
    for i in range(90):
        name = f"a/{i:03d}.{('png', 'jpg', 'webp')[i % 3]}"
        (folder / "a").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (9 + i % 5, 12 + i % 3, 3), np.uint8)).save(folder / name)
        label, venue = ("cat", "dog", "<script>")[i % 7 % 3], ("home", "street")[i // 4 % 2]
        lines.append(
            (name, label, venue, ("phone", "slr, old")[i // 3 % 2], ("train", "train", "val", "test-hard")[i % 4])
        )
    for end in (61, 91):
        with (folder / "list.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines[:end])
        source = Csv(path=folder / "list.csv", group_columns=("venue", "camera"), split_column="split")
        settings = Ingest(source=source, out=folder / "data", append=end > 61, shards=shards)
        made = ingest(settings, in_processes(1))
    assert made.generation == 2
    return folder / "data"


@pytest.fixture
def spoilt(grown: Path, tmp_path: Path) -> Path:
    """A copy in which a bit of the first image of `train` is turned, and the last shard of `train` is gone."""
    shutil.copytree(grown, tmp_path / "spoilt")
    index = open_index(grown)
    first, *_, last = index.rows_of("train").tolist()
    shards = [tmp_path / "spoilt" / "shards" / index.shards[index.shard[row]] for row in (first, last)]
    content = bytearray(shards[0].read_bytes())
    content[int(index.offset[first]) + 9] ^= 4
    shards[0].write_bytes(content)
    shards[1].unlink()
    return tmp_path / "spoilt"


def ours(folder: Path, split: str = "train") -> list[list[Any]]:
    """Id, label, groups, hash of the image and checksum of each row, as our own reader has them."""
    index = open_index(folder)
    reader = Reader(index)
    venues, cameras = index.group_values.values()
    return [
        [
            index.ids[row].as_py(),
            int(index.labels[row]),
            venues[index.groups[row, 0]],
            cameras[index.groups[row, 1]],
            hashlib.sha256(reader.read(row)).hexdigest(),
            int(index.crc32c[row]),
        ]
        for row in index.rows_of(split).tolist()
    ]


def run(folder: Path, script: str, place: Path) -> Any:
    """What a script prints as JSON, in a process of its own: some of these libraries warn, and keep caches."""
    script = script.replace('"datasets/food"', repr(str(folder)))
    script += "\nimport os, sys; sys.stdout.flush(); os._exit(0)"  # Arrow may abort at a usual exit: apache/arrow#45214
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | quiet | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name in ROWS])
def test_a_snippet_reads_the_rows_that_we_read(grown: Path, tmp_path: Path, name):
    if name == "hugging face, card":
        write_card(Card(data=grown))
    if name == "webdataset":
        convert(Convert.model_validate({"data": grown, "out": tmp_path / "food_tars", "to": {"kind": "webdataset"}}))
    before = "" if name in ALONE else SNIPPETS["shards"]
    after = f"{ALSO.get(name, '')}\n{PLAIN}\nprint(json.dumps([plain(row) for row in {ROWS[name]}]))"
    found, expected = run(grown, f"{before}\n{SNIPPETS[name]}\n{after}", tmp_path), ours(grown)
    if name == "webdataset":
        expected = [[*row[:-1], None] for row in expected]
    assert len(expected) > 40
    assert found == expected


def test_hugging_face_knows_images_and_class_names(grown: Path, tmp_path: Path):
    script = f"""{SNIPPETS["hugging face, in place"]}
import datasets, json, pyarrow
assert pyarrow.total_allocated_bytes() < 10_000, pyarrow.total_allocated_bytes()
assert data.features["image"] == datasets.Image()
assert data.features["label"].names == ["<script>", "cat", "dog"]
assert to_hf("datasets/food", "test-hard").split == "test_hard"
print(json.dumps([list(data[0]["image"].size), data.num_rows, len(data.with_format("numpy")["label"][:])]))
"""
    index = open_index(grown)
    row = int(index.rows_of("train")[0])
    n = len(index.rows_of("train"))
    assert run(grown, script, tmp_path) == [[int(index.width[row]), int(index.height[row])], n, n]


def test_a_shard_that_is_not_as_it_was_written_is_opened_by_nobody(spoilt: Path, tmp_path: Path):
    script = f"""
from data_loaders.faults import Refusal
import json
try:
    {SNIPPETS["hugging face, in place"].replace(chr(10), chr(10) + "    ")}
except Refusal as refusal:
    print(json.dumps([refusal.exit_code, [fault.what for fault in refusal.faults]]))
"""
    assert run(spoilt, script, tmp_path) == [65, ["is not as it was written", "no such file or directory"]]


def test_the_torch_snippet_draws_each_class_equally_often(grown: Path, tmp_path: Path):
    script = f"""{SNIPPETS["pytorch"]}
import collections, json
print(json.dumps(sorted(collections.Counter(int(k) for _, k in loader).values())))
"""
    n = len(open_index(grown).rows_of("train"))
    assert run(grown, script, tmp_path) == sorted(n // 3 + (k < n % 3) for k in range(3))


@pytest.mark.ray
def test_ray_data_reads_the_rows_that_we_read_and_refuses_a_damaged_one(
    grown: Path, squares: Path, spoilt: Path, tmp_path: Path
):
    script = f"""
import logging, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
ray.data.DataContext.get_current().enable_progress_bars = False
{SNIPPETS["ray data"]}
{PLAIN}
rows = sorted(plain(row) for row in data.iter_rows())
assert data.count() == len(rows)
small = sorted(plain(row) for row in read_ray("datasets/food", "train", override_num_blocks=3).limit(5).iter_rows())
assert len(small) == 5 and all(row in rows for row in small)
try:
    read_ray({str(spoilt)!r}, "train").materialize()
except Exception as wrong:
    assert "DamagedRow" in str(wrong), wrong
else:
    raise AssertionError("damage was not found")
data = read_ray({str(squares)!r}, "train")
assert next(iter(data.iter_batches(batch_size=5)))["image"].shape == (5, 6, 6, 3)
print(json.dumps([rows, sorted(plain(row) for row in data.iter_rows())]))
"""
    assert run(grown, script, tmp_path) == [sorted(ours(grown)), sorted(ours(squares))]


def test_the_shards_of_a_split_are_not_those_of_another_whose_name_begins_alike(tmp_path: Path):
    own = [f"train-g{g}-00000-0{part}-0123abcd.arrow" for g, part in ((1, 0), (1, 1), (12, 0))]
    others = ["train-gold-g1-00000-00-0123abcd.arrow", "train-g1-g1-00000-00-0123abcd.arrow", "val-g1-00000-00-0.arrow"]
    (tmp_path / "dataset.json").write_text(json.dumps({"shards": [{"name": name} for name in [*own, *others]]}))
    script = f"{SNIPPETS['shards']}\nprint(json.dumps([pathlib.Path(shard).name for shard in shards]))"
    assert run(tmp_path, script, tmp_path) == own


def test_the_same_snippets_read_pixels(squares: Path, tmp_path: Path):
    read = {name: rows.replace(UNDECODED, "data") for name, rows in ROWS.items() if name != "webdataset"}
    read["hugging face, in place"] = "data"
    write_card(Card(data=squares))
    script = "found = {}\n" + "".join(
        f"{SNIPPETS['shards']}\n{SNIPPETS[name]}\n{PLAIN}\nfound[{name!r}] = [plain(row) for row in {rows}]\n"
        for name, rows in read.items()
    )
    found, expected = run(squares, f"{script}\nprint(json.dumps(found))", tmp_path), ours(squares)
    assert len(expected) > 40
    assert found.keys() == read.keys()
    for name, rows in found.items():
        assert rows == expected, name


def test_pixels_are_arrays_in_every_tool(squares: Path, tmp_path: Path):
    parts = [name for name in SNIPPETS if name.startswith("pixels, ")]
    ends = "images = np.asarray(images)\nfound[{!r}] = [images.shape, str(images.dtype), images.tobytes().hex()]"
    before = f"{SNIPPETS['shards']}\n{SNIPPETS['pixels']}\nfound = {{}}\n"
    script = before + "\n".join(f"{SNIPPETS[name]}\n{ends.format(name)}" for name in parts)
    found, index = run(squares, f"{script}\nprint(json.dumps(found))", tmp_path), open_index(squares)
    rows, reader = index.rows_of("train").tolist(), Reader(index)
    pixels = b"".join(reader.read(row) for row in rows).hex()
    assert found == {name: [[len(rows), 6, 6, 3], "uint8", pixels] for name in parts}
    data = ShardDataset(squares, "train")
    assert b"".join(np.asarray(data[item][0]).tobytes() for item in range(len(data))).hex() == pixels


def test_every_snippet_is_run_by_a_test():
    of_pixels = {name for name in SNIPPETS if name.startswith("pixels")}
    assert SNIPPETS.keys() - of_pixels == ROWS.keys() | {"shards", "ray data", "pytorch"}


def test_a_split_that_is_not_there_is_refused_before_ray_starts(grown: Path):
    with pytest.raises(Refusal, match="no split 'far'"):
        read_ray(grown, "far")
