"""Images that are stored as pixels: which pixels, that they serve for all that files do, and that damage shows."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
from independent_reader import rows as independent_rows
from PIL import Image

from data_loaders import manifest
from data_loaders.audit.audit import audit
from data_loaders.augment import centred
from data_loaders.contents.overview import overview, read, summary
from data_loaders.contents.page import write
from data_loaders.contents.pixels import channels
from data_loaders.decode import Pixels, decode
from data_loaders.examine import examine
from data_loaders.export.about import About
from data_loaders.export.convert import convert, write_cards
from data_loaders.export.folder import Folder
from data_loaders.export.kinds import AnyTarget
from data_loaders.export.parquet import HuggingFace
from data_loaders.export.rows import sizes
from data_loaders.export.webdataset import WebDataset
from data_loaders.faults import Refusal
from data_loaders.images import Decoder, picture
from data_loaders.index import DamagedRow, Reader, open_index
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.loader import Batch, Data, exact_batches, training_batches
from data_loaders.recode import png
from data_loaders.settings import parse
from data_loaders.shards import Done, Shards, Task
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.parquet import Parquet
from data_loaders.sources.webdataset import WebDataset as Tars
from data_loaders.torch import ShardDataset
from data_loaders.verify import verify

SIDE = 8
COLUMNS = ("path", "label", "venue", "split")
RAW = Shards(encoding="raw", side=SIDE, rows=7)


def photo(random: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth, so that a JPEG of it is not mostly noise."""
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def files() -> dict[str, bytes]:
    """An image of every kind that is not plain, and some that are."""
    random = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    wide, exact = photo(random, 21, 34), photo(random, SIDE, SIDE)
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("exact.png", exact, {}),
        ("exact.webp", exact, {"lossless": True}),
        ("wide.jpg", wide, {}),
        ("tall.png", photo(random, 40, 9), {}),
        ("tiny.png", photo(random, 3, 5), {}),
        ("turned.jpg", wide, {"exif": turned}),
        ("grey.png", wide.convert("L"), {}),
        ("deep.png", Image.fromarray(random.integers(0, 2**16, (11, 9), np.uint16)), {}),
        ("ink.jpg", wide.convert("CMYK"), {}),
        ("clear.png", Image.merge("RGBA", [*wide.split(), wide.convert("L")]), {}),
        ("palette.png", wide.convert("P"), {"transparency": 3}),
        ("large.jpg", photo(random, 300, 400), {"progressive": True}),
    ]
    found = dict[str, bytes]()
    for name, image, how in made:
        with io.BytesIO() as file:
            image.save(file, {"jpg": "jpeg"}.get(name[-3:], name.split(".")[1]), **how)
            found[name] = file.getvalue()
    return found


FILES = files()


def listed(folder: Path, images: dict[str, bytes], name: str = "list.csv", copies: int = 2) -> Csv:
    """Each image some times over, under as many ids, in both classes and in two splits."""
    lines = list[tuple[str, ...]]()
    for copy in range(copies):
        for i, (image, content) in enumerate(images.items()):
            path = folder / "images" / str(copy) / image
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            split, venue = ("train", "test")[(i + copy) % 3 == 2], ("home", "street")[i % 3 == 0]
            lines.append((f"{copy}/{image}", ("cat", "dog")[(i + copy) % 2], venue, split))
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *lines])
    return Csv(path=folder / name, root=folder / "images", group_columns=("venue",), split_column="split")


def stored(source: Any, out: Path, shards: Shards = RAW, **other: Any) -> Path:
    ingest(Ingest(source=source, out=out, shards=shards, **other), in_processes(1))
    return out


def pictures(data: Path) -> dict[str, list[list[list[int]]]]:
    """Id -> pixels."""
    index = open_index(data)
    reader = Reader(index)
    return {index.ids[row].as_py(): picture(reader, row).tolist() for row in range(len(index.labels))}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    return stored(listed(folder, FILES), folder / "data")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same squares, stored as pixels and as PNGs."""
    folder, random = tmp_path_factory.mktemp("pair"), np.random.default_rng(1)
    source = listed(folder, {f"{n}.png": png(np.asarray(photo(random, SIDE, SIDE))) for n in range(20)}, copies=1)
    return stored(source, folder / "raw"), stored(source, folder / "files", Shards())


def test_every_kind_of_image_is_stored_as_evaluation_sees_it(raw: Path):
    found = pictures(raw)
    assert found.keys() == {f"{copy}/{name}" for copy in range(2) for name in FILES}
    for id_, pixels in found.items():
        assert pixels == centred(decode(FILES[id_[2:]]), SIDE).tolist(), id_


def test_an_image_of_the_wanted_shape_is_kept_exactly(raw: Path):
    found = pictures(raw)
    assert found["0/exact.png"] == found["1/exact.webp"] == decode(FILES["exact.png"]).tolist()


def test_quality_and_look_are_those_of_the_file_and_the_size_is_that_of_the_pixels(raw: Path):
    index = open_index(raw)
    for row, id_ in enumerate(index.ids.to_pylist()):
        seen = examine(FILES[id_[2:]])
        assert (index.quality[row], index.look[row]) == (seen.quality, seen.look)
    assert set(index.width.tolist()) == set(index.height.tolist()) == {SIDE}
    assert manifest.read(raw).images["turned"] == 2


def test_pixels_lie_side_by_side_in_the_shard(raw: Path):
    index = open_index(raw)
    each = 3 * SIDE**2
    assert index.length.tolist() == [each] * len(index.labels)
    for shard, name in enumerate(index.shards):
        rows = np.flatnonzero(index.shard == shard)
        assert np.unique(np.diff(index.offset[rows])).tolist() in ([each], [])
        with pa.memory_map(str(raw / "shards" / name)) as file:
            column = pa.ipc.open_file(file).read_all()["image"].combine_chunks()
            assert column.type == pa.list_(pa.uint8(), each)
            expected = [picture(Reader(index), row).ravel().tolist() for row in rows.tolist()]
            assert column.to_pylist() == expected


def test_pixels_and_files_of_the_same_squares_are_the_same_to_a_model(pair: tuple[Path, Path]):
    raw, plain = (open_index(folder) for folder in pair)
    assert (raw.side, plain.side) == (SIDE, 0)
    assert raw.ids.equals(plain.ids)
    assert (raw.look == plain.look).all()
    readers = Reader(raw), Reader(plain)
    for row in range(len(raw.labels)):
        one, other = (picture(reader, row) for reader in readers)
        assert one.shape == (SIDE, SIDE, 3)
        assert (one == other).all()
    assert [c[1:] for c in channels(raw, raw.rows_of("train"))] == [
        c[1:] for c in channels(plain, plain.rows_of("train"))
    ]
    items = [[np.asarray(image).tolist() for image, _ in ShardDataset(folder)] for folder in pair]  # pyright: ignore
    assert items[0] == items[1]


@pytest.mark.parametrize(("decoder", "most"), [("pillow", 0), ("auto", 2)])
def test_batches_of_pixels_are_those_of_files(pair: tuple[Path, Path], decoder: Decoder, most: int):
    found = list[list[Batch]]()
    for folder in pair:
        data = Data(path=folder, size=6, batch=5, decoder=decoder)
        index = data.index()
        rows = np.asarray(data.training_rows(index))
        of_training = training_batches(index, data, data.sampler.over(index, rows, 3), 3, range(4))
        found.append([*of_training, *exact_batches(index, data, rows)])
    for one, other in zip(*found, strict=True):
        assert (one.rows == other.rows).all()
        assert np.abs(one.images.astype(int) - other.images).max() <= most  # the native library resamples pixels alone


def test_an_audit_finds_the_same_in_pixels_as_in_files(pair: tuple[Path, Path], raw: Path):
    one, other = (audit(open_index(folder), "train", 100) for folder in pair)
    of_pixels, of_files = ({p.property.name: repr(p) for p in found.properties} for found in (one, other))
    assert {name for name, told in of_pixels.items() if told != of_files[name]} <= {"bytes_per_pixel"}
    assert one.duplicates == other.duplicates
    found = audit(open_index(raw), "train", 100).duplicates
    assert found.sets == len(FILES) - 1  # each image is there twice, and two files have the same pixels
    assert {copy.id[2:] for copies in found.listed for copy in copies} == set(FILES)


def test_what_is_in_it_can_be_looked_at(raw: Path, tmp_path: Path):
    made, index = read(raw)
    found = overview(index, made)
    assert f"stored as pixels, {SIDE} x {SIDE}" in summary(found)
    assert write(found, index, tmp_path / "page.html", 4, 2, 0) > 0
    assert "stored as pixels" in (tmp_path / "page.html").read_text()
    write_cards(raw, None, tmp_path, About(name="Squares"))
    column = next(
        f
        for f in json.loads((tmp_path / "croissant.json").read_text())["recordSet"][1]["field"]
        if f["name"] == "image"
    )
    assert (column["dataType"], column["arrayShape"]) == ("cr:UInt8", str(3 * SIDE**2))


def test_broken_images_are_rejected_whatever_the_check(tmp_path: Path):
    images = {**FILES, "cut.jpg": FILES["large.jpg"][:-2000], "text.png": b"no image"}
    source = listed(tmp_path, images)
    stored(source, tmp_path / "data", RAW.model_copy(update={"check": "header"}), rejects={"allow": 0.5})
    made = manifest.read(tmp_path / "data")
    assert made.rejected.rows == 4
    assert open_index(tmp_path / "data").look[0] != 0
    assert verify(tmp_path / "data").all_faults == []


def test_a_killed_ingest_goes_on_and_ends_in_the_same_data_set(raw: Path, tmp_path: Path):
    source, out = listed(tmp_path, FILES), tmp_path / "data"

    def dying(work: Callable[[Task], Done], tasks: Iterable[Task]) -> Iterator[Done]:
        yield work(next(iter(tasks)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(Ingest(source=source, out=out, shards=RAW), dying)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    assert len(before) == 1
    stored(source, out)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}.items()
    assert open_index(out).fingerprint == open_index(raw).fingerprint


def test_rows_are_added_as_pixels_and_in_no_other_encoding(tmp_path: Path):
    half = dict(list(FILES.items())[:6])
    data = stored(listed(tmp_path, half), tmp_path / "data")
    whole = listed(tmp_path, FILES, "whole.csv")
    for asked, what in (
        (Shards(encoding="raw", side=SIDE + 1), "stores pixels of 8 x 8"),
        (Shards(encoding="file"), "stores pixels of 8 x 8"),
        (Shards(resize={"longest": 16}), "stores pixels of 8 x 8"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(Refusal, match=what):
            stored(whole, data, asked, append=True)
    stored(whole, data, Shards(), append=True)
    made = manifest.read(data)
    assert (made.generation, made.side) == (2, SIDE)
    assert made.settings["shards"]["encoding"] == "raw"
    assert len(pictures(data)) == 2 * len(FILES)
    assert pictures(data)["1/large.jpg"] == centred(decode(FILES["large.jpg"]), SIDE).tolist()
    assert verify(data).all_faults == []


def test_pixels_are_not_added_to_files(pair: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(Refusal, match="stores image files"):
        stored(listed(tmp_path, FILES), pair[1], append=True)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["shards.encoding=raw"], "only raw has one"),
        (["shards.side=32"], "only raw has one"),
        (["shards.encoding=file", "shards.side=32"], "only raw has one"),
        (["shards.encoding=raw", "shards.side=32", "shards.resize.longest=64"], "nothing to do"),
        (["shards.encoding=raw", "shards.side=2000"], "1024"),
        (["shards.encoding=row", "shards.side=32"], "raw"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words: list[str], what: str):
    with pytest.raises(Refusal, match=what):
        parse(Ingest, ["source.kind=folder", "source.path=photos", "out=data", *words])


def test_verify_finds_each_flipped_pixel(raw: Path, tmp_path: Path):
    index, random = open_index(raw), np.random.default_rng(2)
    shard = index.shards[0]
    whole = (raw / "shards" / shard).read_bytes()
    for row in np.flatnonzero(index.shard == 0).tolist():
        content = bytearray(whole)
        content[int(index.offset[row] + random.integers(index.length[row]))] ^= 1 << int(random.integers(8))
        with changed(raw / "shards" / shard, bytes(content)):
            assert [s.damaged for s in verify(raw).damaged] == [[index.ids[row].as_py()]]
            with pytest.raises(DamagedRow, match="is not as it was written"):
                picture(Reader(index), row)
    assert verify(raw).all_faults == []


class changed:  # noqa: N801
    """A file with other content for a while."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content, self.whole = path, content, path.read_bytes()

    def __enter__(self) -> None:
        self.path.write_bytes(self.content)

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.whole)


def test_a_manifest_whose_side_is_not_that_of_its_rows_is_refused(raw: Path, pair: tuple[Path, Path]):
    for folder, side, what in (
        (raw, 9, "not pixels of 9 x 9"),
        (raw, -SIDE, "greater than or equal to 0"),
        (raw, 2000, "less than or equal to 1024"),
        (pair[1], SIDE, "not pixels of 8 x 8"),
    ):
        path = folder / manifest.NAME
        tree = {**json.loads(path.read_bytes()), "side": side}
        tree["fingerprint"] = manifest.fingerprint(tree)
        tree["checksum"] = manifest.checksum({k: v for k, v in tree.items() if k != "checksum"})
        with changed(path, json.dumps(tree).encode()), pytest.raises(Refusal, match=what):
            open_index(folder)


def test_a_reader_made_from_the_page_reads_the_same_pixels(raw: Path):
    found = {row.id: row.image for row in independent_rows(raw)}
    assert {
        id_: np.frombuffer(image, np.uint8).reshape(SIDE, SIDE, 3).tolist() for id_, image in found.items()
    } == pictures(raw)


@pytest.mark.parametrize("target", [HuggingFace(), WebDataset(), Folder()], ids=lambda target: target.kind)
@pytest.mark.parametrize("shards", [Shards(), RAW], ids=["files", "pixels"])
def test_every_export_comes_back_as_the_same_pixels(raw: Path, tmp_path: Path, target: AnyTarget, shards: Shards):
    convert(raw, None, target, tmp_path / "out", About())
    sources: dict[str, Any] = {
        "huggingface": lambda out: Parquet(path=out / "data", group_columns=("venue",)),
        "webdataset": lambda out: Tars(path=out, label="json:label", split_column="split", group_columns=("venue",)),
        "folder": lambda out: Csv(path=out / "labels.csv", split_column="split", group_columns=("venue",)),
    }
    back = stored(sources[target.kind](tmp_path / "out"), tmp_path / "back", shards)
    assert sorted(pictures(back).values()) == sorted(pictures(raw).values())
    assert verify(back).all_faults == []


def test_a_checksum_that_leaves_with_a_png_is_that_of_the_png(raw: Path, tmp_path: Path):
    convert(raw, None, HuggingFace(), tmp_path / "out", About())
    source = Parquet(path=tmp_path / "out" / "data", group_columns=("venue",))
    back = open_index(stored(source, tmp_path / "back", Shards()))
    again = dict(zip(back.ids.to_pylist(), back.image_crc32c.tolist(), strict=True))
    index = open_index(raw)
    reader = Reader(index)
    for row, id_ in enumerate(index.ids.to_pylist()):
        assert again[id_] == google_crc32c.value(png(picture(reader, row)))


def test_a_png_of_noise_is_no_larger_than_was_said(raw: Path):
    for side in (1, 16, 200, 1024):
        pixels: Pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
        index = replace(open_index(raw), side=side, length=np.array([pixels.size], np.int32))
        assert len(png(pixels)) <= sizes(index, np.zeros(1, np.int64))[0]
