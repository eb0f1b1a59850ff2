"""The native library: the pixels of the slow path, of every kind of JPEG; and no bytes that harm it.

`python tests/data_loaders/test_native.py SEED COUNT` gives it so many mutated files in that very process.
"""

import importlib.util
import io
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple
from unittest import mock

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from data_loaders import native, stream
from data_loaders.augment import placed
from data_loaders.decode import decode
from data_loaders.formats.header import Undecodable
from data_loaders.formats.read import read_header

pytestmark = pytest.mark.skipif(not native.NAME, reason="the native library is not built: call make setup")

PROJECT = Path(__file__).parents[2]
HOSTILE = Path(__file__).with_name("hostile.py")
FUZZED = 4000
NEIGHBOUR = 171
SAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:4:0": (1, 2), "4:2:0": (2, 2), "4:1:1": (4, 1), "4:1:0": (4, 2)}
"""Columns and rows of pixels for each of the colours."""


class Task(NamedTuple):
    """What is to become of an image."""

    content: bytes
    width: int
    height: int
    box: tuple[float, float, float, float] = (0, 0, 0, 0)
    """All of it, if it has no width."""
    shift: tuple[int, int] = (0, 0)
    flip: int = 0
    raw: int = 0

    @property
    def whole(self) -> tuple[float, float, float, float]:
        return self.box if self.box[2] else (0, 0, self.width, self.height)

    def expected(self, size: int) -> np.ndarray:
        """By Pillow."""
        raw = np.frombuffer(self.content, np.uint8).reshape(self.raw, self.raw, 3) if self.raw else None
        pixels = decode(self.content) if raw is None else raw
        return placed(pixels, np.array(self.whole, np.float64), np.array(self.shift), self.flip, size)


def shard(tasks: list[Task]) -> tuple[IO[bytes], np.ndarray]:
    """An open file, and its rows."""
    file, rows = TemporaryFile(), np.zeros(len(tasks), native.ROW)  # noqa: SIM115
    for place, (task, row) in enumerate(zip(tasks, rows, strict=True)):
        row["fd"], row["offset"], row["length"] = file.fileno(), file.tell(), len(task.content)
        row["crc32c"], row["place"] = google_crc32c.value(task.content), place
        row["width"], row["height"], row["raw"] = task.width, task.height, task.raw
        row["box"], row["shift"], row["flip"] = task.whole, task.shift, task.flip
        file.write(task.content)
    file.flush()
    return file, rows


def made(tasks: list[Task], size: int, fast: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Images and statuses."""
    images = np.full((len(tasks), size, size, 3), NEIGHBOUR, np.uint8)
    file, rows = shard(tasks)
    with file:
        native.load(rows, images, fast)
    return images, rows["status"]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """With structure at every scale, as photographs have."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for side in (2, 5, 17, 60):
        noise = Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8))
        pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / 4
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "JPEG", **options)
        return file.getvalue()


def sampled(image: Image.Image, factors: tuple[int, int], quality: int) -> bytes:
    """With its colours in scans of their own, each the scan of a grey JPEG, so of any size."""
    small = -(-image.width // factors[0]), -(-image.height // factors[1])
    parts = [p if not c else p.resize(small) for c, p in enumerate(image.convert("YCbCr").split())]
    first, *rest = [jpeg(part, quality=quality) for part in parts]
    starts = [content.index(b"\xff\xda") for content in (first, *rest)]
    frame = first.index(b"\xff\xc0")
    channels = bytes([3, 1, factors[0] << 4 | factors[1], 0, 2, 0x11, 0, 3, 0x11, 0])
    size = struct.pack(">HBHH", 8 + 9, 8, image.height, image.width)
    whole = first[: frame + 2] + size + channels + first[frame + 13 : starts[0]]
    for number, (content, start) in enumerate(zip((first, *rest), starts, strict=True), 1):
        whole += content[start : start + 5] + bytes([number]) + content[start + 6 : -2]
    return whole + b"\xff\xd9"


def turned(content: bytes, orientation: int) -> bytes:
    """With an EXIF segment, as cameras write it."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return content[:2] + b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff + content[2:]


def gap(task: Task, size: int) -> np.ndarray:
    """Levels by which native and slow path differ, once it is sure that both paths of the library do not."""
    images, status = made([task], size)
    plain, _ = made([task], size, fast=False)
    assert status[0] == 0
    assert np.array_equal(images, plain)
    return np.abs(images[0].astype(int) - task.expected(size))


side = st.integers(1, 70)


@st.composite
def boxes(draw: st.DrawFn, width: int, height: int) -> tuple[float, float, float, float]:
    """In steps of 1/256 of a pixel."""
    found = list[tuple[float, float]]()
    for pixels in (width, height):
        length = draw(st.integers(256, 256 * pixels))
        found.append((draw(st.integers(0, 256 * pixels - length)) / 256, length / 256))
    return found[0][0], found[1][0], found[0][1], found[1][1]


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """A JPEG of any kind, and what may become of it."""
    width, height, quality = draw(side), draw(side), draw(st.integers(1, 100))
    image = photo(width, height, draw(st.integers(0, 3)))
    match draw(st.sampled_from(["grey", "scans", "plain", "plain"])):
        case "grey":
            content = jpeg(image.convert("L"), quality=quality, progressive=draw(st.booleans()))
        case "scans":
            content = sampled(image, SAMPLINGS[draw(st.sampled_from(sorted(SAMPLINGS)))], quality)
        case _:
            options = {"subsampling": draw(st.integers(0, 2)), "progressive": draw(st.booleans())}
            options |= {"restart_marker_blocks": draw(st.integers(0, 3)), "optimize": draw(st.booleans())}
            content = jpeg(image, quality=quality, **options)
    orientation = draw(st.integers(0, 9))
    if orientation >= 5 and orientation != 9:
        width, height = height, width
    shift = draw(st.tuples(st.integers(-9, 9), st.integers(-9, 9)) | st.just((0, 0)))
    return Task(
        turned(content, orientation) if orientation else content,
        width,
        height,
        draw(boxes(width, height) | st.just((0, 0, width, height))),
        shift,
        draw(st.integers(0, 3)),
    )


@hypothesis_settings(max_examples=300)
@given(tasks(), st.integers(1, 50))
def test_any_jpeg_has_the_pixels_of_the_slow_path_to_a_level(task: Task, size: int) -> None:
    found = gap(task, size)
    if min(task.whole[2:]) < 4 * size:
        assert found.max() <= 1
    else:
        assert found.mean() <= 3
        assert found.max() <= 40


@pytest.mark.parametrize("subsampling", [0, 1, 2, "grey", "progressive"])
@pytest.mark.parametrize("corner", [0, 1, 0.37])
def test_a_crop_of_a_photograph_has_the_pixels_of_the_slow_path(subsampling: Any, corner: float) -> None:
    image = photo(500, 375).convert("L" if subsampling == "grey" else "RGB")
    options = {"progressive": True} if subsampling in {"grey", "progressive"} else {"subsampling": subsampling}
    content = jpeg(image, quality=90, **options)
    for width, height in ((97.5, 61.25), (300, 200), (131, 311)):
        box = (corner * (500 - width) // 1, corner * (375 - height) // 1, width, height)
        assert gap(Task(content, 500, 375, box, flip=1), 128).max() <= 1


@pytest.mark.parametrize("size", [16, 25, 50])
def test_what_is_decoded_at_a_part_of_its_size_looks_the_same(size: int) -> None:
    content = jpeg(photo(403, 301), quality=92)
    for box in ((0, 0, 403, 301), (1.5, 3.25, 207, 205), (190, 84.5, 213, 216.5)):
        found = gap(Task(content, 403, 301, box), size)
        assert found.mean() < 1
        assert found.max() <= 6


@given(st.integers(1, 40), st.data())
def test_raw_pixels_are_resampled_moved_and_flipped_as_by_the_slow_path(length: int, data: st.DataObject) -> None:
    pixels = np.random.default_rng(length).integers(0, 256, (length, length, 3), np.uint8)
    size = data.draw(st.integers(1, 40) | st.just(length))
    box = data.draw(boxes(length, length) | st.just((0, 0, length, length)))
    shift = data.draw(st.tuples(st.integers(-50, 50), st.integers(-50, 50)) | st.just((0, 0)))
    task = Task(pixels.tobytes(), length, length, box, shift, data.draw(st.integers(0, 3)), raw=length)
    found = gap(task, size)
    assert found.max() <= (0 if box[2:] == (size, size) and not box[0] % 1 and not box[1] % 1 else 1)


@pytest.mark.parametrize("length", [*range(1, 40), 64, 101])
def test_the_checksum_of_any_number_of_bytes_is_compared(length: int) -> None:
    task = Task(np.random.default_rng(length).bytes(3 * length * length), length, length, raw=length)
    for fast in (True, False):
        file, rows = shard([task, task])
        rows["crc32c"][1] ^= np.uint32(1 << length % 32)
        with file:
            native.load(rows, np.zeros((2, 1, 1, 3), np.uint8), fast)
        assert (rows["status"] == 0).tolist() == [True, False]


entries = st.tuples(st.sampled_from([0x0112, 0x0112, 0x0111]), st.integers(2, 5), st.integers(0, 2), st.integers(0, 9))


@st.composite
def tiffs(draw: st.DrawFn) -> bytes:
    """EXIF as it may be, of which some is odd or cut off."""
    order, mark = draw(st.sampled_from([("<", b"II*\0"), (">", b"MM\0*"), (">", b"II*\0"), ("<", b"MM*\0")]))
    start, found = draw(st.integers(6, 11)), draw(st.lists(entries, max_size=3))
    count = draw(st.just(len(found)) | st.integers(0, 4))
    tiff = (mark + struct.pack(order + "I", start)).ljust(start, b"\0") + struct.pack(order + "H", count)
    for tag, kind, number, value in found:
        held = struct.pack(order + ("HH" if kind == 3 else "I"), *((value, 7) if kind == 3 else (value,)))
        tiff += struct.pack(order + "HHI", tag, kind, number) + held
    return tiff[: draw(st.just(len(tiff)) | st.integers(0, len(tiff)))]


@hypothesis_settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from([b"Exif\0\0", b"Exif\0", b"http"]), tiffs()), max_size=3))
def test_the_orientation_is_the_one_that_the_header_says(segments: list[tuple[bytes, bytes]]) -> None:
    content = jpeg(photo(24, 16), quality=95)
    parts = [b"\xff\xe1" + struct.pack(">H", 2 + len(kind + tiff)) + kind + tiff for kind, tiff in segments]
    content = content[:2] + b"".join(parts) + content[2:]
    assert gap(Task(content, *read_header(content).upright), 9).max() <= 1


def hostile() -> dict[str, bytes]:
    """Name -> file of every case of hostile.py."""
    spec = importlib.util.spec_from_file_location("hostile", HOSTILE)
    assert spec
    assert spec.loader
    module = sys.modules["hostile"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {case.name: case.content for case in module.cases()}


def test_a_hostile_file_is_left_to_the_slow_path_or_has_its_pixels_and_takes_no_time() -> None:
    taken = 0
    for name, content in hostile().items():
        try:
            width, height = read_header(content).upright
        except Undecodable:
            width, height = 64, 48
        began = time.thread_time()
        images, status = made([Task(content, width, height)], 32)
        assert time.thread_time() - began < 3, name
        if not status[0]:
            taken += 1
            assert np.abs(images[0].astype(int) - Task(content, width, height).expected(32)).max() <= 1, name
    assert taken > 10


GOOD = jpeg(photo(40, 30), quality=90)
LEFT = {
    "nothing": b"",
    "text": b"no picture at all",
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "CMYK": jpeg(photo(40, 30).convert("CMYK")),
    "cut in its data": GOOD[:-40],
    "without its end": GOOD[:-2],
    "cut in its header": GOOD[:200],
    "arithmetic": GOOD.replace(b"\xff\xc0", b"\xff\xc9"),
    "12 bits": GOOD.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "a progressive one that lacks scans": (found := jpeg(photo(40, 30), progressive=True))[: found.rindex(b"\xff\xda")]
    + b"\xff\xd9",
    "without tables": GOOD.replace(b"\xff\xdb", b"\xff\xef"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_plain_is_left_to_the_slow_path(name: str) -> None:
    tasks = [Task(GOOD, 40, 30), Task(LEFT[name], 40, 30, (0, 0, 30, 20)), Task(GOOD, 40, 30)]
    images, status = made(tasks, 8)
    assert (status == 0).tolist() == [True, False, True]
    assert np.array_equal(images[0], images[2])


def test_tables_of_a_file_do_not_serve_the_next() -> None:
    """A decoder that is used again would remember them."""
    tables = [GOOD.index(mark) for mark in (b"\xff\xdb", b"\xff\xc0")]
    bare = GOOD[: tables[0]] + GOOD[tables[1] :]
    _, status = made([Task(GOOD, 40, 30), Task(bare, 40, 30)], 8)
    assert (status == 0).tolist() == [True, False]


WRONG = {
    "size": {"width": 30, "height": 40},
    "checksum": {"crc32c": 1},
    "file": {"fd": -1},
    "length": {"length": 10**6},
    "negative length": {"length": -1},
    "offset": {"offset": -5},
    "raw": {"raw": 3},
    "side that overflows": {"raw": 2**31 - 1},
    "place": {"place": 3},
    "negative place": {"place": -1},
    "box to the right": {"box": (20.5, 0, 20, 20)},
    "box to the left": {"box": (-1, 0, 20, 20)},
    "box below": {"box": (0, 20, 20, 11)},
    "empty box": {"box": (0, 0, 0, 10)},
    "box of no numbers": {"box": (np.nan, 0, 10, 10)},
    "box without an end": {"box": (0, 0, np.inf, 10)},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_row_that_is_wrong_has_a_status_and_leaves_its_neighbours_alone(what: str) -> None:
    file, rows = shard([Task(GOOD, 40, 30)] * 3)
    images = np.full((3, 8, 8, 3), NEIGHBOUR, np.uint8)
    for field, value in WRONG[what].items():
        rows[field][1] = value
    with file:
        native.load(rows[1:2], images)
    assert rows["status"][1] != 0
    assert (images[[0, 2]] == NEIGHBOUR).all()


@pytest.mark.parametrize("shift", [(0, 8), (-8, 3), (2**31 - 1, 0), (0, -(2**31))])
def test_what_is_moved_out_of_the_image_leaves_it_black(shift: tuple[int, int]) -> None:
    images, status = made([Task(GOOD, 40, 30, shift=shift)], 8)
    assert status[0] == 0
    assert not images.any()


def test_threads_give_the_same_bytes() -> None:
    some = [Task(jpeg(photo(90 + n, 80, n)), 90 + n, 80, (n, 2.5, 60, 55), flip=n % 4) for n in range(24)]
    file, rows = shard(some * 8)
    rows["place"] = np.arange(len(rows))
    images = np.zeros((len(rows), 33, 33, 3), np.uint8)
    with file, ThreadPoolExecutor(8) as pool:
        assert all(
            reading > 0 and decoding > 0
            for reading, decoding in pool.map(lambda part: native.load(part, images), np.array_split(rows, 16))
        )
    assert not rows["status"].any()
    assert (images.reshape(8, 24, 33, 33, 3) == made(some, 33)[0]).all()


def test_arrays_of_another_form_are_refused() -> None:
    rows, images = np.zeros(4, native.ROW), np.zeros((4, 8, 8, 3), np.uint8)
    others: list[Any] = [images[..., ::-1], images[:, :4], images.astype(np.int8), images[0]]
    for wrong in others:
        with pytest.raises(ValueError, match="images"):
            native.load(rows, wrong)
    others = [np.zeros(2, np.uint8), rows[::2], rows[None]]
    for wrong in others:
        with pytest.raises(ValueError, match="rows"):
            native.load(wrong, images)


def test_a_library_made_of_another_source_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.c").write_bytes((native.HERE / "rows.c").read_bytes() + b"\n")
    assert native._library()
    monkeypatch.setattr(native, "HERE", tmp_path)
    assert native._library() is None
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "rows.so")
    assert native._library() is None


def test_the_library_needs_no_torch() -> None:
    code = "import sys, data_loaders.native as native; sys.exit('torch' in sys.modules or not native.NAME)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("compiler", ["cc", "/no/compiler", "false"])
def test_a_wheel_has_the_library_or_is_for_any_machine(tmp_path: Path, compiler: str) -> None:
    package = tmp_path / "data_loaders" / "native"
    package.mkdir(parents=True)
    for other in ("jobs", "trainer"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "__init__.py").touch()
    for name in ("pyproject.toml", "hatch_build.py", ".gitignore", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, tmp_path)
    for name in ("rows.c", "__init__.py"):
        shutil.copy(native.HERE / name, package)
    environment = {**os.environ, "CC": compiler, "EVENKEEL_NATIVE": ""}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "made"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    (wheel,) = (tmp_path / "made").iterdir()
    said = [line for line in (done.stdout + done.stderr).splitlines() if "so Pillow decodes" in line]
    held = "data_loaders/native/rows.so" in zipfile.ZipFile(wheel).namelist()
    assert held == (compiler == "cc") == (not said)
    assert wheel.name.endswith("-any.whl") != held
    environment["EVENKEEL_NATIVE"] = "1"
    forced = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False)
    assert (forced.returncode == 0) == held


def test_mutated_files_do_no_harm() -> None:
    """In a process of its own, whose end would be that of the tests."""
    done = subprocess.run(
        [sys.executable, __file__, "0", str(FUZZED)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr
    taken = int(done.stdout)
    assert FUZZED / 100 < taken < FUZZED


def seeds() -> list[Task]:
    """One of each kind."""
    image = photo(53, 47)
    plain = [
        jpeg(image, subsampling=s, progressive=p, restart_marker_blocks=s) for s in range(3) for p in (False, True)
    ]
    others = [jpeg(image.convert("L")), jpeg(image.convert("L"), progressive=True)]
    others += [sampled(image, factors, 80) for factors in SAMPLINGS.values()]
    others += [jpeg(image.convert("CMYK")), jpeg(image, optimize=True, quality=98)]
    found = [Task(content, 53, 47) for content in [*plain, *others, *(turned(plain[4], n) for n in (1, 3))]]
    return [*found, *(Task(turned(plain[n], 5 + n), 47, 53) for n in range(4))]


def mutated(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """With flipped bits, another byte in the header, a part of another file, or without its end."""
    found = bytearray(content)
    header = found.index(b"\xff\xda") + 14
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(len(found)))
        match random.integers(7):
            case 0 | 1:
                found[at] ^= 1 << int(random.integers(8))
            case 2 | 3:
                found[min(at % header, len(found) - 1)] = int(random.integers(256))
            case 4:
                stop, start = at + int(random.integers(200)), int(random.integers(len(other)))
                found[at:stop] = other[start : start + int(random.integers(200))]
            case 5:
                found[at : at + 1] = bytes(
                    [255, int(random.choice([0xC0, 0xC2, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD]))]
                )
            case _:
                del found[at if random.integers(2) else -2 :]
                found += b"\xff\xd9" if random.integers(2) else b""
        if not found:
            return b""
    return bytes(found)


def fuzz(seed: int, count: int) -> int:
    """How many mutated files were decoded; fails where a neighbour was written to or a file took long."""
    random, known, batch, taken = np.random.default_rng(seed), seeds(), 50, 0
    for _ in range(0, count, batch):
        chosen = random.integers(len(known), size=(batch, 2))
        size, some = int(random.integers(1, 60)), list[Task]()
        for one, other in chosen:
            task = known[one]
            low, length = np.round(random.random((2, 2)) ** 2 * 256 * [task.width - 1, task.height - 1]) / 256
            part = np.minimum(length + 1, [task.width, task.height] - low)
            box = tuple(np.concatenate([low, part]).tolist()) if random.integers(3) else (0, 0, 0, 0)
            shift = tuple(random.integers(-size, size + 1, 2).tolist()) if random.integers(2) else (0, 0)
            content = mutated(task.content, known[other].content, random)
            some.append(task._replace(content=content, box=box, shift=shift, flip=int(random.integers(4))))
        file, rows = shard(some)
        rows["place"] = 2 * np.arange(batch) + 1
        images = np.full((2 * batch + 1, size, size, 3), NEIGHBOUR, np.uint8)
        began = time.thread_time()
        with file:
            native.load(rows, images, bool(random.integers(2)))
        assert time.thread_time() - began < 60
        assert (images[::2] == NEIGHBOUR).all()
        taken += int((rows["status"] == 0).sum())
    return taken


if __name__ == "__main__":
    print(fuzz(*map(int, sys.argv[1:])))


@given(
    st.lists(st.tuples(st.integers(1, 2**40), st.floats(0, 1, exclude_max=True), st.integers(0, 2**62)), max_size=50)
)
def test_rows_are_drawn_alike_with_and_without_the_library(drawn):
    sizes = np.array([size for size, _, _ in drawn], np.int64)
    places = np.array([min(int(at * size), size - 1) for size, at, _ in drawn], np.int64)
    keys = np.array([key for _, _, key in drawn], np.int64)
    found = stream.permute(places, sizes, 7, keys)
    with mock.patch.object(native, "NAME", ""):
        np.testing.assert_array_equal(found, stream.permute(places, sizes, 7, keys))


def test_places_outside_of_their_sizes_are_refused():
    one = np.array([5], np.uint64)
    with pytest.raises(ValueError, match="places do not fit their sizes"):
        native.permute(one, one, one, 8, 3)
