"""Near copies: what is alike is found, what is not is not, and no pair is lost on the way."""

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from benchmarks import near_copies
from data_loaders.audit import duplicates as searched
from data_loaders.audit.duplicates import MIRROR, duplicates
from data_loaders.audit.findings import beyond_chance
from data_loaders.audit.likeness import ALIKE, likeness
from data_loaders.audit.looks import pairs_within, reach
from data_loaders.audit.summary import near
from data_loaders.examine import examine, small_grey
from data_loaders.formats.read import read_header
from data_loaders.index import Index, open_index
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.look import LOOKS_ALIKE, SIDE, look_of
from data_loaders.sources.csv_file import Csv

RANDOM = np.random.default_rng(0)


@lru_cache(512)
def scene(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    """Clouds of all sizes in colour, as photographs have: energy falls as 1 over frequency."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width) * width, np.fft.fftfreq(height) * height))
    waves = np.fft.fft2(random.normal(size=(3, height, width))) / np.maximum(frequency, 1)
    pixels = np.fft.ifft2(waves).real
    pixels = 0.7 * pixels[:1] + 0.3 * pixels
    return Image.fromarray((128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def captioned(image: Image.Image) -> bytes:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, image.height * 0.93, image.width, image.height), (0, 0, 0))
    draw.text((4, image.height * 0.92), "caption", (255, 255, 255), font_size=6)
    return encoded(image, "JPEG")


def bits(a: bytes, b: bytes) -> int:
    return (examine(a).look ^ examine(b).look).bit_count()


ALTERED: dict[str, Callable[[Image.Image], bytes]] = {
    "quality 30": lambda image: encoded(image, "JPEG", quality=30),
    "WebP": lambda image: encoded(image, "WEBP", quality=60),
    "PNG": encoded,
    "x 0.3": lambda image: encoded(image.resize((image.width * 3 // 10, image.height * 3 // 10))),
    "x 2": lambda image: encoded(image.resize((image.width * 2, image.height * 2))),
    "other sides": lambda image: encoded(image.resize((image.width, image.width))),
    "crop": lambda image: encoded(image.crop((2, 1, image.width - 2, image.height - 2))),
    "brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.2)),
    "paler": lambda image: encoded(ImageEnhance.Contrast(image).enhance(0.8)),
    "gamma": lambda image: encoded(image.point([round(255 * (v / 255) ** 1.2) for v in range(256)] * 3)),
    "blur": lambda image: encoded(image.filter(ImageFilter.GaussianBlur(1))),
    "grey": lambda image: encoded(image.convert("L")),
    "caption": captioned,
    "noise": lambda image: encoded(
        Image.fromarray(
            (np.asarray(image) + RANDOM.normal(0, 6, (image.height, image.width, 3))).clip(0, 255).astype(np.uint8)
        )
    ),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_an_altered_copy_looks_alike(kind):
    found = [bits(encoded(scene(n), "JPEG", quality=90), ALTERED[kind](scene(n))) for n in range(20)]
    assert np.mean(np.array(found) <= LOOKS_ALIKE) >= 0.95, found


def test_other_pictures_do_not_look_alike():
    looks = np.array([examine(encoded(scene(n))).look for n in range(100)], np.uint64)
    away = np.bitwise_count(looks[:, None] ^ looks)[np.triu_indices(100, 1)]
    assert away.min() > LOOKS_ALIKE
    assert away.mean() == pytest.approx(32, abs=2)


Looks = st.lists(
    st.tuples(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 63), max_size=12)), min_size=1, max_size=40
)


@settings(max_examples=30)
@given(Looks, st.sampled_from([0, 2, 5, 8]), st.integers(1, 3))
def test_the_search_finds_every_pair_once_and_no_other(seeds, most, sides):
    looks = [look ^ sum(1 << bit for bit in set(flipped)) for look, flips in seeds for flipped in ([], flips)]
    looks = np.array(looks, np.uint64)
    side = np.arange(len(looks)) * 7 // 3 % sides
    differ = np.bitwise_count(looks[:, None] ^ looks)
    expected = {(i, j) for i, j in np.argwhere((differ <= most) & (side[:, None] != side)).tolist() if i < j}
    found = [tuple(sorted(pair)) for part in pairs_within(looks, side, most) for pair in zip(*part, strict=True)]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_the_search_misses_no_pair_at_its_longest_reach():
    looks = RANDOM.integers(0, 2**63, 300, np.uint64)
    for n in range(300):
        flipped = RANDOM.choice(64, LOOKS_ALIKE + n % 2, replace=False)
        looks = np.append(looks, looks[n] ^ np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64)))
    found = [pair for part in pairs_within(looks, np.arange(600), LOOKS_ALIKE) for pair in zip(*part, strict=True)]
    assert {tuple(sorted(map(int, pair))) for pair in found} == {(n, 300 + n) for n in range(0, 300, 2)}


def test_a_search_of_many_is_done_in_parts_of_bounded_size(monkeypatch):
    monkeypatch.setattr("data_loaders.audit.looks.AT_ONCE", 1000)
    looks, side = np.zeros(200, np.uint64), np.arange(200) % 2
    parts = [len(a) for a, _ in pairs_within(looks, side, 0)]
    assert sum(parts) == 100 * 100
    assert max(parts) < 1000 + 200


def test_the_reach_is_shortened_until_the_pairs_are_few_enough():
    looks = np.array([0, 0b1, 0b111, 0b1111111], np.uint64)
    side = np.arange(4)
    assert [reach(looks, side, most) for most in (0, 1, 2, 3, 4, 5, 6)] == [0, 1, 2, 3, 5, 6, LOOKS_ALIKE]
    assert reach(looks, np.zeros(4, np.int64), 0) == LOOKS_ALIKE
    assert reach(np.zeros(20_000, np.uint64), np.arange(20_000), 1000) == -1
    many = RANDOM.integers(0, 2**63, 20_000, np.uint64)
    assert reach(many, np.arange(20_000), 10**5) == LOOKS_ALIKE


def pictures(*images: Image.Image) -> np.ndarray:
    contents = [encoded(image) for image in images]
    return np.stack([small_grey(content, read_header(content)) for content in contents]).astype(np.float32)


def test_likeness_undoes_light_shift_and_zoom_but_not_other_details():
    image = scene(0, 400, 300)
    one = pictures(*[image] * 4)
    altered = pictures(
        image,
        ImageEnhance.Contrast(image).enhance(0.7),
        image.crop((0, 0, 380, 285)),
        image.crop((10, 9, 392, 296)),
    )
    assert likeness(one, altered)[0] == pytest.approx(1, abs=1e-4)
    assert (likeness(one, altered) > 0.9).all()
    np.testing.assert_allclose(likeness(one, altered), likeness(altered, one), atol=0.1)
    others = [scene(0, 400, 300).filter(ImageFilter.GaussianBlur(40)), scene(1, 400, 300), Image.new("RGB", (9, 9))]
    assert (likeness(one[:3], pictures(*others)) < 0.5).all()


ORIGINALS = 60


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, dict[str, str]]:
    """Scenes to learn from; near copies of each kind of every fourth, exact copies and other scenes to test on."""
    folder = tmp_path_factory.mktemp("near")
    lines, kinds = [], {}

    def put(name: str, content: bytes, split: str) -> None:
        (folder / name).write_bytes(content)
        lines.append((name, "ab"[len(lines) % 2], split))

    for n in range(ORIGINALS):
        put(f"original-{n}.jpg", encoded(scene(n), "JPEG", quality=90), "train")
    for k, (kind, alter) in enumerate(ALTERED.items()):
        for n in range(k % 4, ORIGINALS, 4):
            kinds[f"near-{k}-{n}"] = kind
            put(f"near-{k}-{n}", alter(scene(n)), "test")
    for n in range(20):
        put(f"exact-{n}.jpg", encoded(scene(n), "JPEG", quality=90), "val")
    for n in range(100):
        put(f"other-{n}.jpg", encoded(scene(1000 + n), "JPEG", quality=90), ("test", "val")[n % 2])
    put("flat.png", encoded(Image.new("RGB", (9, 9))), "val")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *lines])
    source = Csv(path=folder / "labels.csv", split_column="split")
    ingest(Ingest(source=source, out=folder / "data"), in_processes(1))
    return open_index(folder / "data"), kinds


def test_planted_exact_copies_are_all_found_and_nineteen_of_twenty_planted_near_copies(planted, monkeypatch):
    index, kinds = planted
    monkeypatch.setattr(searched, "LISTED", 10**6)
    found = duplicates(index, "train")
    assert (found.sets, found.across_splits, found.leaked) == (20, 20, {"test": 0, "val": 20})
    near_ids = {copy.id for pair in found.near.listed for copy in pair.copies}
    recall = {kind: np.mean([name in near_ids for name in kinds if kinds[name] == kind]) for kind in ALTERED}
    assert len(kinds) > 200
    assert np.mean([name in near_ids for name in kinds]) >= 0.95, recall
    assert found.near.leaked == {"test": sum(name in near_ids for name in kinds), "val": 0}


def test_no_pair_of_near_copies_is_of_different_scenes(planted, monkeypatch):
    index, _ = planted
    monkeypatch.setattr(searched, "LISTED", 10**6)
    found = duplicates(index, "train").near
    of = {name: (name.startswith("other"), name.split("-")[-1].removesuffix(".jpg")) for name in index.ids.to_pylist()}
    assert [pair for pair in found.listed if of[pair.copies[0].id] != of[pair.copies[1].id]] == []
    assert {len({copy.split for copy in pair.copies}) for pair in found.listed} == {2}
    assert min(pair.likeness for pair in found.listed) >= ALIKE
    assert (found.unknown, found.left_out, found.bits) == (1, 0, LOOKS_ALIKE)


def test_pairs_with_the_training_split_are_listed_first_then_the_most_alike(planted):
    index, _ = planted
    listed = duplicates(index, "train").near.listed
    assert len(listed) == searched.LISTED
    assert all("train" in {copy.split for copy in pair.copies} for pair in listed)
    assert [pair.likeness for pair in listed] == sorted((pair.likeness for pair in listed), reverse=True)


def test_what_was_not_compared_is_said(planted, monkeypatch):
    index, _ = planted
    rows = len(index.labels)
    blind = duplicates(replace(index, look=np.zeros(rows, np.uint64)), "train")
    assert (blind.near.bits, blind.near.unknown, blind.near.pairs) == (-1, rows, 0)
    assert blind.leaked["val"] == 20
    assert near(blind.near).startswith("not looked for, since no row has a look")
    assert "not compared: 1 rows that have no look" in near(duplicates(index, "train").near)
    same = duplicates(replace(index, look=np.ones(rows, np.uint64)), "train").near
    assert same.left_out == rows - 3 * searched.HUB
    assert "of very many that look the same" in near(same)
    monkeypatch.setattr(searched, "PAIRS", 260)
    few = duplicates(index, "train").near
    assert 0 <= few.bits < LOOKS_ALIKE
    assert 0 < few.pairs <= 260
    assert f"pairs that differ in more than {few.bits} of 64 bits, being too many" in near(few)
    monkeypatch.setattr(searched, "PAIRS", 1)
    assert near(duplicates(index, "train").near) == "not looked for, since too many rows look the same"


@pytest.mark.parametrize("name", ["a.JPEG", "a.jpg", "a.Png"])
def test_the_benchmark_finds_photographs_however_their_suffix_is_written(tmp_path: Path, monkeypatch, capsys, name):
    monkeypatch.setattr(near_copies, "KINDS", {"PNG": encoded})
    scene(1).save(tmp_path / name)
    near_copies.main(tmp_path)
    assert capsys.readouterr().out.startswith("1 photographs")


def test_the_benchmark_says_that_a_folder_has_no_photograph(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(SystemExit, match="has no photograph"):
        near_copies.main(tmp_path)


def test_a_mirrored_picture_has_the_look_with_the_bits_of_odd_waves_turned():
    for seed in range(20):
        picture = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE)).astype(np.uint8)
        assert look_of(picture[:, ::-1]) == look_of(picture) ^ int(MIRROR)


def test_what_is_as_often_near_to_mirrored_images_is_no_finding():
    assert [beyond_chance(*counts) for counts in ((1, 0), (1, 2), (9, 9), (6, 0))] == [False] * 4
    assert [beyond_chance(*counts) for counts in ((7, 0), (42, 1), (90, 40))] == [True] * 3
