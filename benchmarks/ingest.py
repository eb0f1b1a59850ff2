"""Ingest against what others write: speed, memory, and the time to the first error.

    python -m benchmarks.ingest speed PHOTOS     a folder of photographs (any depth); writers take turns in one process
    python -m benchmarks.ingest memory           peak memory for 10^4 to 10^6 small images
    python -m benchmarks.ingest first-error      a CSV of 1,000,000 rows of which the last is bad

MosaicML's package asks for an older numpy than ours. This puts it where `speed` finds it; without, it is left out:

    pip install --no-deps --target build/peers mosaicml-streaming==0.13.0 transformers tokenizers brotli \\
        python-snappy cramjam zstd catalogue
"""

import csv
import importlib.util
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from PIL import Image

from data_loaders.faults import Refusal
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.shards import Shards
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.folder import Folder
from data_loaders.splits import Splits

TURNS = 5
COPIES = 5
"""Of each photograph, under other names."""
CLASSES = 10
Write = Callable[[Path, Path], None]
"""Stores the images of a folder of classes in another folder."""


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    with tempfile.TemporaryDirectory(dir=Path(os.environ.get("TMPDIR", "/tmp"))) as scratch:
        if what == "speed":
            speed(Path(sys.argv[2]), Path(scratch))
        elif what == "memory":
            memory(Path(scratch))
        elif what == "peak":
            peak(Path(scratch), int(sys.argv[2]))
        elif what == "first-error":
            first_error(Path(scratch))
        else:
            sys.exit(__doc__)


def speed(photos: Path, scratch: Path) -> None:
    images = scratch / "images"
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    for k in range(CLASSES):
        (images / f"class-{k}").mkdir(parents=True)
    for number, file in enumerate(files * COPIES):
        shutil.copyfile(file, images / f"class-{number % CLASSES}" / f"{number:06d}.jpg")
    count, size = len(files) * COPIES, sum(file.stat().st_size for file in files) * COPIES
    print(f"{count:,} photographs, {size / count / 1000:.0f} kB each, one process; the best of {TURNS} turns")
    least = {name: (float("inf"), float("inf")) for name in WRITERS}
    for turn in range(TURNS):
        for name, write in WRITERS.items():
            out = scratch / f"{turn}-{len(name)}"
            began, busy = time.perf_counter(), time.process_time()
            with redirect_stderr(io.StringIO()):
                write(images, out)
            took = time.perf_counter() - began, time.process_time() - busy
            least[name] = min(least[name][0], took[0]), min(least[name][1], took[1])
            shutil.rmtree(out)
    wall, cpu = least["evenkeel, check=header"]
    print(f"{'writer':52} images/s  images/CPU s  ours is faster by (CPU)")
    for name, (seconds, busy) in least.items():
        print(f"{name:52} {count / seconds:8,.0f}  {count / busy:12,.0f}  {seconds / wall:.2f} ({busy / cpu:.2f})")


def _evenkeel(check: str) -> Write:
    def write(images: Path, out: Path) -> None:
        shards = Shards.model_validate({"check": check})
        settings = Ingest(source=Folder(path=images), out=out, shards=shards, splits=Splits(val=0, test=0))
        ingest(settings, in_processes(1))

    return write


def _hugging_face(images: Path, out: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    made = datasets.load_dataset("imagefolder", data_dir=str(images), split="train", cache_dir=str(out / "cache"))
    made.save_to_disk(str(out / "data"))


def _mosaic(hashes: list[str]) -> Write:
    def write(images: Path, out: Path) -> None:
        from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

        with MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}, hashes=hashes) as writer:
            for k, folder in enumerate(sorted(images.iterdir())):
                for file in sorted(folder.iterdir()):
                    writer.write({"image": file.read_bytes(), "label": k})

    return write


def _webdataset(decoded: bool) -> Write:
    def write(images: Path, out: Path) -> None:
        from webdataset.writer import ShardWriter

        out.mkdir()
        with ShardWriter(str(out / "%06d.tar"), maxsize=64e6, verbose=0) as writer:
            for k, folder in enumerate(sorted(images.iterdir())):
                for file in sorted(folder.iterdir()):
                    content = file.read_bytes()
                    if decoded:
                        Image.open(io.BytesIO(content)).load()
                    writer.write({"__key__": file.stem, "jpg": content, "cls": k})

    return write


WRITERS: dict[str, Write] = {
    "evenkeel, check=header": _evenkeel("header"),
    "webdataset ShardWriter": _webdataset(decoded=False),
    "Hugging Face ImageFolder, save_to_disk": _hugging_face,
    "evenkeel, check=decode (default)": _evenkeel("decode"),
    "webdataset ShardWriter, each image decoded by Pillow": _webdataset(decoded=True),
}
if Path("build/peers/streaming").exists():
    sys.path.append("build/peers")
if importlib.util.find_spec("streaming"):
    WRITERS |= {"MosaicML MDSWriter": _mosaic([]), "MosaicML MDSWriter, hashes=[sha1]": _mosaic(["sha1"])}


def memory(scratch: Path) -> None:
    """Peak memory of a process that does everything."""
    print("rows        peak MB  rows/s")
    for rows in (10**4, 10**5, 10**6):
        subprocess.run([sys.executable, "-m", "benchmarks.ingest", "peak", str(rows)], check=True)


def peak(scratch: Path, rows: int) -> None:
    """The rows are spread over few files, so that a million of them need no million files."""
    listed = _listing(scratch, rows)
    source = Csv(path=listed, group_columns=("venue",))
    began = time.perf_counter()
    ingest(Ingest(source=source, out=scratch / "data", shards=Shards(rows=4096)), in_processes(1))
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"{rows:9,}  {used:8,.0f}  {rows / seconds:6,.0f}", flush=True)


def _listing(scratch: Path, rows: int) -> Path:
    """A CSV of so many small images, each a link to one of a few hundred files."""
    (scratch / "images").mkdir()
    for n in range(256):
        Image.new("RGB", (8, 8), (n, 255 - n, n * 7 % 256)).save(scratch / f"images/{n}.png")
    with (scratch / "labels.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["path", "label", "venue"])
        for n in range(rows):
            folder = scratch / f"images/{n // 1000:04d}"
            if n % 1000 == 0:
                folder.mkdir()
            os.link(scratch / f"images/{n % 256}.png", folder / f"{n}.png")
            out.writerow([f"images/{n // 1000:04d}/{n}.png", f"class {n % 10}", f"venue {n % 3}"])
    return scratch / "labels.csv"


def first_error(scratch: Path) -> None:
    """The images do not exist: what is bad in the list itself is told before any image is read."""
    rows = 10**6
    with (scratch / "labels.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["path", "label", "venue"])
        out.writerows([f"images/{n}.png", f"class {n % 10}", f"venue {n % 3}"] for n in range(rows - 1))
        out.writerow([f"images/{rows}.png", "", "venue 1"])
    source = Csv(path=scratch / "labels.csv", group_columns=("venue",))
    said = _FirstLine("a bad row")
    try:
        with redirect_stderr(said):
            ingest(Ingest(source=source, out=scratch / "data"), in_processes(1))
    except Refusal as refusal:
        print(f"the last of {rows:,} rows is bad; told after {said.seconds:.1f} s: {said.line}")
        print(f"all told after {said.since():.1f} s: {refusal.title}")


class _FirstLine(io.StringIO):
    """Notes when a line that begins so is written."""

    def __init__(self, begin: str) -> None:
        super().__init__()
        self.begin, self.began, self.seconds, self.line = begin, time.perf_counter(), float("nan"), ""

    def since(self) -> float:
        return time.perf_counter() - self.began

    def write(self, text: str, /) -> int:
        if text.startswith(self.begin) and not self.line:
            self.seconds, self.line = self.since(), text
        return len(text)


if __name__ == "__main__":
    main()
