"""Lists, folders, tables and tars that were made to break the reader, or to lead it out of its root."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import signal
import socket
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.folder import Folder
from data_loaders.sources.parquet import Parquet
from data_loaders.sources.rows import Rejected, Row, Source, Unreadable
from data_loaders.sources.webdataset import WebDataset

CANARY = b"the canary lies outside of every root"
SECONDS = 2
MEMORY = 512 * 2**20
KEPT = 20_000
"""Rows that a test looks at; what memory they take is not the reader's."""
Make = Callable[[Path], Source]
CASES: dict[str, Make] = {}


class Outcome(NamedTuple):
    rows: list[Row]
    rejected: list[Fault]
    unread: list[str]
    refused: list[Fault]


def case(make: Make) -> Make:
    CASES[make.__name__] = make
    return make


def listing(content: str | bytes, name: str = "labels.csv", **settings: Any) -> Make:
    def make(root: Path) -> Source:
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return Csv(path=root / name, **settings)

    return make


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(path)
    return path


def paths(*names: str) -> Make:
    """A list of these paths, with whatever characters."""

    def make(root: Path) -> Source:
        with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label"), *((name, "food") for name in names)])
        return Csv(path=root / "labels.csv")

    return make


def packed(content: bytes, pack: Callable[[bytes], bytes], suffix: str, cut: int = 0) -> Make:
    data = pack(content)
    return listing(data[: len(data) - cut], f"labels.csv.{suffix}")


def bomb(line: bytes, packer: Any, blocks: int) -> bytes:
    """As much of a line as only a bomb holds, packed without ever being whole."""
    block = line * (2**20 // len(line))
    return b"".join(
        [packer.compress(b"path,label\n"), *(packer.compress(block) for _ in range(blocks)), packer.flush()]
    )


HEAD = "path,label\n"
CASES |= {
    "parents": paths("../canary.jpg", "a/../../canary.jpg", "../../../../../../etc/passwd", "./../canary.jpg", ".."),
    "absolute": paths("/etc/passwd", "/proc/self/environ", "//etc/passwd", "/"),
    "the root itself": paths(".", "./", "a/..", "./."),
    "a home": paths("~/canary.jpg", "$HOME/canary.jpg", "%2e%2e/canary.jpg", "..\\canary.jpg"),
    "urls in a local list": paths("http://127.0.0.1:9/a.jpg", "file:///etc/passwd", "s3://b/a.jpg", "zip::a.jpg"),
    "a NUL": listing(b"path,label\na.jpg,food\nb\0.jpg,food\n"),
    "only NULs": listing(bytes(4096)),
    "a byte order mark": listing(b"\xef\xbb\xbfpath,label\na.jpg,food\n"),
    "two byte order marks": listing(b"\xef\xbb\xbf\xef\xbb\xbfpath,label\na.jpg,food\n"),
    "utf-16": listing("path,label\na.jpg,food\n".encode("utf-16")),
    "utf-16 without a mark": listing("path,label\na.jpg,food\n".encode("utf-16-le")),
    "utf-32": listing("path,label\na.jpg,food\n".encode("utf-32")),
    "latin-1": listing("path,label\na.jpg,crème\n".encode("latin-1")),
    "surrogates": listing(b"path,label\n\xed\xa0\x80.jpg,food\n"),
    "overlong utf-8": listing(b"path,label\n\xc0\xae\xc0\xae/canary.jpg,food\n"),
    "an endless quote": listing(HEAD + '"a.jpg,food\n' + "b.jpg,food\n" * 500_000),
    "endless cells": listing(HEAD + '"\n",' * 1_000_000),
    "a huge cell": listing(HEAD + "a" * 200_000 + ",food\n"),
    "a line of 10 MB": listing(HEAD + "a,b" * 3_500_000),
    "a header of 10 MB": listing("a" * 10_000_000),
    "a repeated column": listing("path,label,label\na.jpg,food,drink\n"),
    "an empty header": listing("\na.jpg,food\n"),
    "a header of commas": listing(",,,\na.jpg,food,,\n"),
    "only a header": listing(HEAD),
    "no header": listing("a.jpg,food\nb.jpg,drink\n"),
    "an empty file": listing(""),
    "one byte": listing("\n"),
    "repeated rows": paths("a.jpg", "a.jpg", "./a.jpg", "b/../a.jpg"),
    "conflicting labels": listing(HEAD + "a.jpg,food\na.jpg,drink\n"),
    "an empty class": listing(HEAD + "a.jpg,\nb.jpg, \nc.jpg,\u00a0\n"),
    "formulas": listing(HEAD + "a.jpg,=cmd|' /C calc'!A0\nb.jpg,@SUM(1)\nc.jpg,+1\n"),
    "scripts": listing(HEAD + "a.jpg,<script>alert(1)</script>\n<img src=x>.jpg,food\n"),
    "right to left": listing(HEAD + "a\u202egpj.exe,food\nb.jpg,\u202efood\n"),
    "spaces that are not seen": listing(HEAD + "a\u00a0.jpg,fo\u200bod\n\ufeffb.jpg,food\n\u200b,food\n"),
    "escapes of a terminal": listing(HEAD + "\x1b[2J\x1b]0;x\x07.jpg,food\n"),
    "a very long path": paths("a" * 5000 + ".jpg", "a/" * 4000 + "b.jpg", "a" * 100_000),
    "a newline in a path": paths("a\n.jpg", "a\r\n.jpg", "\n", "a\n/../../canary.jpg"),
    "case twins": paths("A.jpg", "a.jpg", "a.JPG"),
    "trailing spaces": listing("path ,label \na.jpg , food \n  ,food\n"),
    "carriage returns": listing("path,label\ra.jpg,food\rb.jpg,food\r"),
    "mixed line ends": listing("path,label\r\na.jpg,food\nb.jpg,food\rc.jpg,food\n\r"),
    "comments": listing("# made by hand\npath,label\na.jpg,food\n"),
    "semicolons": listing("path;label\na.jpg;food\n"),
    "tabs": listing("path\tlabel\na.jpg\tfood\n"),
    "10,000 columns": listing(",".join(["path", "label", *map(str, range(10_000))]) + "\n" + ",".join("x" * 10_002)),
    "rows of all lengths": listing(HEAD + "".join("a," * n + "\n" for n in range(300))),
    "odd splits": listing(
        "path,label,split\n" + "".join(f"a.jpg,food,{s}\n" for s in ("../up", "a/b", "-", "x" * 99)),
        split_column="split",
    ),
    "no such columns": listing("file,class\na.jpg,food\n", group_columns=("venue",), split_by="patient"),
    "a cut gz": packed(b"path,label\n" + os.urandom(9000).hex().encode(), gzip.compress, "gz", 900),
    "a cut xz": packed(b"path,label\n" + os.urandom(9000).hex().encode(), lzma.compress, "xz", 900),
    "a cut bz2": packed(b"path,label\n" + os.urandom(9000).hex().encode(), bz2.compress, "bz2", 900),
    "no gz": listing(HEAD + "a.jpg,food\n", "labels.csv.gz"),
    "no xz": listing(HEAD + "a.jpg,food\n", "labels.csv.xz"),
    "no bz2": listing(HEAD + "a.jpg,food\n", "labels.csv.bz2"),
    "no zst": listing(HEAD + "a.jpg,food\n", "labels.csv.zst"),
    "a gz in a gz": listing(gzip.compress(gzip.compress(HEAD.encode())), "labels.csv.gz"),
    "a gz that is called csv": listing(gzip.compress(HEAD.encode())),
    "a gz of a line without end": listing(bomb(b"a", zlib.compressobj(9, zlib.DEFLATED, 31), 1000), "l.gz"),
    "a gz of empty lines": listing(bomb(b"\n", zlib.compressobj(9, zlib.DEFLATED, 31), 1000), "l.gz"),
    "a gz of one row again and again": listing(
        bomb(b"a.jpg,food\n", zlib.compressobj(9, zlib.DEFLATED, 31), 1000), "l.gz"
    ),
    "a bz2 of a line without end": listing(bomb(b"a", bz2.BZ2Compressor(), 100), "l.bz2"),
    "a bz2 of empty lines": listing(bomb(b"\n", bz2.BZ2Compressor(), 100), "l.bz2"),
    "an xz of empty lines": listing(bomb(b"\n", lzma.LZMACompressor(preset=0), 100), "l.xz"),
    "a zst of a line without end": listing(pa.compress(HEAD.encode() + b"a" * 10**8, "zstd", asbytes=True), "l.zst"),
    "a zst of empty lines": listing(pa.compress(HEAD.encode() + b"\n" * 10**8, "zstd", asbytes=True), "l.zst"),
    "a pattern that matches nothing": lambda root: Csv(path=root / "*.csv"),
    "a pattern of folders": lambda root: Csv(path=str((root / "a.csv").mkdir() or root / "*.csv")),
    "a folder as a list": lambda root: Csv(path=root),
    "a list as a folder": lambda root: Folder(path=listing(HEAD)(root) and root / "labels.csv"),
    "nothing there": lambda root: Csv(path=root / "none.csv"),
    "a root that is not there": lambda root: Csv(
        path=listing(HEAD + "a.jpg,x\n")(root) and root / "labels.csv", root=root / "none"
    ),
    "a root that is a file": lambda root: Csv(
        path=listing(HEAD + "a.jpg,x\n")(root) and root / "labels.csv", root=root / "labels.csv"
    ),
    "the device zero as a list": lambda root: Csv(path="/dev/zero"),
    "the device full as a table": lambda root: Parquet(path="/dev/full"),
    "the device zero as a tar": lambda root: WebDataset(path="/dev/zero"),
    "a list of another protocol": lambda root: Csv(path="file:///etc/passwd"),
    "a chain of protocols": lambda root: Csv(path="zip://a.csv::https://127.0.0.1/a.zip"),
    "a folder of github": lambda root: Folder(path="github://org:repo@/x"),
    "a folder of http": lambda root: Folder(path="http://127.0.0.1:9/x/"),
    "credentials in an url": lambda root: Csv(path="https://user:hunter2@127.0.0.1:9/a.csv"),
    "an url without a host": lambda root: Csv(path="s3:///a.csv"),
}


@case
def links_that_lead_out(root: Path) -> Source:
    (root / "file.jpg").symlink_to(root.parent / "canary.jpg")
    (root / "chain.jpg").symlink_to("file.jpg")
    (root / "absolute.jpg").symlink_to("/etc/passwd")
    (root / "folder").symlink_to(root.parent)
    (root / "rootfs").symlink_to("/")
    return paths("file.jpg", "chain.jpg", "absolute.jpg", "folder/canary.jpg", "rootfs/etc/passwd")(root)


@case
def a_link_to_a_folder_whose_name_begins_alike(root: Path) -> Source:
    (root.parent / "rootkit").mkdir()
    (root.parent / "rootkit/canary.jpg").write_bytes(CANARY)
    (root / "a.jpg").symlink_to("../rootkit/canary.jpg")
    return paths("a.jpg")(root)


@case
def links_in_a_circle(root: Path) -> Source:
    (root / "a.jpg").symlink_to("b.jpg")
    (root / "b.jpg").symlink_to("a.jpg")
    (root / "self").symlink_to(".")
    return paths("a.jpg", "self/self/self/a.jpg")(root)


@case
def what_is_no_file(root: Path) -> Source:
    os.mkfifo(root / "pipe.jpg")
    (root / "zero.jpg").symlink_to("/dev/zero")
    (root / "tty.jpg").symlink_to("/dev/tty")
    (root / "folder.jpg").mkdir()
    (root / "gone.jpg").symlink_to("nothing")
    with short_of(root), socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    return paths("pipe.jpg", "zero.jpg", "tty.jpg", "folder.jpg", "gone.jpg", "socket.jpg", "socket.jpg/x")(root)


@case
def a_list_that_is_a_pipe(root: Path) -> Source:
    os.mkfifo(root / "labels.csv")
    return Csv(path=root / "labels.csv")


@case
def a_list_that_is_a_socket(root: Path) -> Source:
    with short_of(root), socket.socket(socket.AF_UNIX) as server:
        server.bind("labels.csv")
    return Csv(path=root / "labels.csv")


@case
def a_sparse_list_of_10_gb(root: Path) -> Source:
    with (root / "labels.csv").open("wb") as file:
        file.write(HEAD.encode())
        file.truncate(10 * 10**9)
    return Csv(path=root / "labels.csv")


@case
def a_sparse_image_of_10_gb(root: Path) -> Source:
    with (root / "a.jpg").open("wb") as file:
        file.truncate(10 * 10**9)
    return paths("a.jpg")(root)


@case
def a_list_that_nobody_may_read(root: Path) -> Source:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    source = paths("a.jpg")(root)
    (root / "labels.csv").chmod(0)
    return source


@case
def several_lists_of_which_some_are_bad(root: Path) -> Source:
    for name, text in {"a": HEAD + "x.jpg,food\n", "b": "file\n", "c": HEAD + '"x'}.items():
        (root / f"{name}.csv").write_text(text)
    return Csv(path=(str(root / "*.csv"), str(root / "d.csv")), held_out={"test": str(root / "e*.csv")})


@case
def a_folder_of_odd_names(root: Path) -> Source:
    image(root / "cat/good.png")
    for name in (
        b"caf\xe9.png",
        b"new\nline.png",
        b"\x1b[31m.png",
        b"a\\b.png",
        b"-rf.png",
        b"A.PNG",
        b"a.png",
        b" .png",
    ):
        image(root / "cat" / os.fsdecode(name))
    image(root / os.fsdecode(b"d\xf6g") / "a.png")
    image(root / "cat/a.gif")
    return Folder(path=root)


@case
def a_folder_with_ways_out(root: Path) -> Source:
    (root / "cat").mkdir()
    (root / "cat/leak.jpg").symlink_to(root.parent / "canary.jpg")
    (root / "cat/zero.png").symlink_to("/dev/zero")
    (root / "cat/circle").symlink_to("..")
    (root / "all").symlink_to("/")
    os.mkfifo(root / "cat/pipe.jpg")
    return Folder(path=root)


@case
def a_deep_folder(root: Path) -> Source:
    here = os.open(root, os.O_RDONLY)
    try:
        for _ in range(30):  # deeper than a path can be long
            os.mkdir("d" * 200, dir_fd=here)
            deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = deeper
    finally:
        os.close(here)
    return Folder(path=root)


@case
def a_wide_folder(root: Path) -> Source:
    (root / "cat").mkdir()
    for number in range(5000):
        (root / f"cat/{number}.jpg").touch()
    return Folder(path=root)


def table(**columns: Any) -> pa.Table:
    return pa.table({"image": [b"1", b"2"], "label": ["cat", "dog"]} | columns)


def damaged(name: str, damage: Callable[[bytes], bytes], **columns: Any) -> Make:
    def make(root: Path) -> Source:
        path, content = root / name, table(**columns)
        if name.endswith("parquet"):
            pq.write_table(content, path)
        else:
            with (pa.ipc.new_file if "file" in name else pa.ipc.new_stream)(path, content.schema) as writer:
                writer.write_table(content)
        path.write_bytes(damage(path.read_bytes()))
        return Parquet(path=path)

    return make


for kind in ("a.parquet", "file.arrow", "stream.arrow"):
    CASES |= {
        f"{kind} cut in half": damaged(kind, lambda content: content[: len(content) // 2]),
        f"{kind} cut at its end": damaged(kind, lambda content: content[:-3]),
        f"{kind} of nothing": damaged(kind, lambda content: b""),
        f"{kind} of its first bytes": damaged(kind, lambda content: content[:8]),
        f"{kind} of noise": damaged(kind, lambda content: content[:8] + os.urandom(5000) + content[-8:]),
        f"{kind} with a huge length": damaged(kind, lambda content: content[:-8] + b"\xff\xff\xff\x7f" + content[-4:]),
        f"{kind} with images of another type": damaged(kind, bytes, image=[1, 2]),
        f"{kind} with labels of another type": damaged(kind, bytes, label=[[1], [2]]),
        f"{kind} with labels of floats": damaged(kind, bytes, label=[0.5, 1.0]),
        f"{kind} with labels of nothing": damaged(kind, bytes, label=pa.nulls(2)),
        f"{kind} with ways out": damaged(
            kind, bytes, image=[{"bytes": None, "path": "../canary.jpg"}, {"bytes": None, "path": "/etc/passwd"}]
        ),
        f"{kind} with names that lead out": damaged(kind, bytes, id=["../a", "/etc/passwd"]),
        f"{kind} with names of nothing": damaged(kind, bytes, id=[None, ""]),
        f"{kind} that is a csv": damaged(kind, lambda content: b"path,label\n"),
    }


@case
def a_stream_whose_offsets_lie(root: Path) -> Source:
    with pa.ipc.new_stream(root / "b.arrow", table().schema) as writer:
        writer.write_batch(
            pa.record_batch([pa.array([b"1", b"2"]), pa.array(["cat", "dog"])], names=["image", "label"])
        )
    data = bytearray((root / "b.arrow").read_bytes())
    place = data.index(struct.pack("<3i", 0, 1, 2))
    data[place : place + 12] = struct.pack("<3i", 0, 10**6, 2 * 10**9)
    (root / "b.arrow").write_bytes(data)
    return Parquet(path=root)


@case
def metadata_that_is_no_json(root: Path) -> Source:
    deep = b"[" * 100_000
    for number, text in enumerate(
        (b"{", b"\xff", deep, b'{"info": 1}', b'{"info":{"features":{"label":{"names":7}}}}')
    ):
        pq.write_table(table(label=[0, 1]).replace_schema_metadata({"huggingface": text}), root / f"{number}.parquet")
    return Parquet(path=root)


@case
def a_small_table_that_says_one_long_label_again_and_again(root: Path) -> Source:
    rows = 2**16
    content = pa.table({"image": pa.array([b""] * rows), "label": pa.array(["x" * 16_000] * rows)})
    pq.write_table(content, root / "a.parquet", compression="zstd", write_statistics=False)
    assert (root / "a.parquet").stat().st_size < 10_000
    return Parquet(path=root)


@case
def a_tar_of_many_notes_of_one_image(root: Path) -> Source:
    with (root / "a.tar").open("wb") as file:
        for number in range(1000):
            member = tarfile.TarInfo(f"a.{number}" if number else "a.jpg")
            member.size = 2**20
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.seek(member.size, os.SEEK_CUR)
        file.write(bytes(1024))
    return WebDataset(path=root)


@case
def classes_beyond_their_names(root: Path) -> Source:
    features = {"info": {"features": {"label": {"names": ["cat"]}}}}
    content = table(label=[1, -1]).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(content, root / "a.parquet")
    return Parquet(path=root)


def tar(*named: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "", claims: int | None = None) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as file:
        for name, data in named:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            member.size = len(data)
            head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
            if claims is not None:
                head[124:136] = (b"\x80" + claims.to_bytes(11, "big")) if claims >= 8**11 else b"%011o\0" % claims
                head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 256)
            file.fileobj.write(head + data + bytes(-len(data) % 512))  # type: ignore[union-attr]
    return content.getvalue()


SAMPLE = (("a.jpg", b"j" * 700), ("a.cls", b"1"))


def archive(content: bytes, name: str = "a.tar") -> Make:
    def make(root: Path) -> Source:
        (root / name).write_bytes(content)
        return WebDataset(path=root / name)

    return make


CASES |= {
    "a tar cut in a header": archive(tar(*SAMPLE)[:300]),
    "a tar cut in an image": archive(tar(*SAMPLE)[:900]),
    "a tar cut between members": archive(tar(*SAMPLE)[:1536]),
    "a tar of nothing": archive(b""),
    "a tar of zeros": archive(bytes(10240)),
    "a tar of noise": archive(os.urandom(10240)),
    "a tar that is a csv": archive(HEAD.encode() * 100),
    "a packed tar": archive(gzip.compress(tar(*SAMPLE)), "a.tar.gz"),
    "a packed tar that is called tar": archive(bz2.compress(tar(*SAMPLE))),
    "a tar of links": archive(tar(("a.jpg", b""), ("b.jpg", b""), kind=tarfile.SYMTYPE, link="/etc/passwd")),
    "a tar of hard links": archive(tar(("a.jpg", b""), kind=tarfile.LNKTYPE, link="../canary.jpg")),
    "a tar of devices": archive(tar(("a.jpg", b""), ("b.png", b""), kind=tarfile.CHRTYPE)),
    "a tar of pipes": archive(tar(("a.jpg", b""), kind=tarfile.FIFOTYPE)),
    "a tar of unknown members": archive(tar(("a.jpg", b"x"), kind=b"Q")),
    "a tar of sparse members": archive(tar(("a.jpg", b"x"), kind=tarfile.GNUTYPE_SPARSE)),
    "a tar with names that lead out": archive(
        tar(("../canary.jpg", b"x"), ("/etc/passwd.jpg", b"x"), ("a/../../b.jpg", b"x"))
    ),
    "a tar with names of nothing": archive(tar(("", b"x"), (".jpg", b"x"), ("/", b"x"), ("..", b"x"))),
    "a tar with a name that is not utf-8": archive(tar((os.fsdecode(b"caf\xe9.jpg"), b"x"))),
    "a tar whose member claims 8 GB": archive(tar(*SAMPLE, claims=8 * 10**9)),
    "a tar whose member claims 2^80 bytes": archive(tar(*SAMPLE, claims=2**80)),
    "a tar whose link claims 8 GB": archive(tar(("a.jpg", b""), kind=tarfile.SYMTYPE, claims=8 * 10**9)),
    "a tar whose name claims 8 GB": archive(tar(("a.jpg", b""), kind=tarfile.GNUTYPE_LONGNAME, claims=8 * 10**9)),
    "a tar whose extension claims 50 KB": archive(tar(("a.jpg", b""), kind=tarfile.XHDTYPE, claims=50_000)),
    "a tar whose extension is noise": archive(tar(("x", b"99999 path="), ("a.jpg", b"x"), kind=tarfile.XHDTYPE)),
    "a tar whose extension says a huge size": archive(
        tar(("x", b"29 size=99999999999999999999\n"), kind=tarfile.XHDTYPE) + tar(*SAMPLE)
    ),
    "a tar with a damaged header": archive(tar(*SAMPLE).replace(b"a.cls", b"b.cls")),
    "a tar with a huge label": archive(tar(("a.jpg", b"x"), ("a.cls", b"1" * 2_000_000))),
    "a tar with deep json": lambda root: WebDataset(
        path=archive(tar(("a.jpg", b"x"), ("a.json", b"[" * 100_000)))(root) and root / "a.tar", label="json:x"
    ),
    "a tar with a list for json": lambda root: WebDataset(
        path=archive(tar(("a.jpg", b"x"), ("a.json", b"[1]")))(root) and root / "a.tar", label="json:x"
    ),
    "a tar that is a link to a device": lambda root: WebDataset(
        path=(root / "a.tar").symlink_to("/dev/zero") or root / "a.tar"
    ),
}


@contextmanager
def short_of(folder: Path) -> Iterator[None]:
    """Within a folder, since the address of a socket must be short."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def bounded() -> Iterator[None]:
    """Fails a block that waits, works for more than 2 s, or holds more than 512 MB more than before."""

    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak(), time.process_time()
    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    assert time.process_time() - began <= SECONDS
    assert peak() - before <= MEMORY


def peak() -> int:
    """The most memory in use since it was last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def outcome(source: Source) -> Outcome:
    rows: list[Row] = []
    rejected: list[Fault] = []
    unread: list[str] = []
    refused: list[Fault] = []
    try:
        for found in source.rows():
            if isinstance(found, Rejected):
                rejected += [found.fault] * (len(rejected) < KEPT)
            else:
                rows += [found] * (len(rows) < KEPT)
    except Refusal as refusal:
        refused = refusal.faults
    if rows:
        with source.reader() as read:
            for row in rows:
                try:
                    content = read(row)
                except (OSError, Unreadable) as wrong:
                    unread.append(str(wrong))
                else:
                    assert CANARY not in content
                    assert b"root:" not in content
                    assert len(content) < 2**20
    return Outcome(rows, rejected, unread, refused)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "canary.jpg").write_bytes(CANARY)
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize("name", CASES)
def test_whatever_a_list_holds_nothing_breaks_hangs_or_leaks_and_each_fault_has_its_place_and_repair(root: Path, name):
    source = CASES[name](root)
    with bounded():
        rows, rejected, unread, refused = outcome(source)
    assert rows or rejected or refused or name in {"only a header", "a tar of zeros"}
    assert all(unread)
    for fault in rejected + refused:
        place = str(getattr(source, "path", ""))
        assert str(root) in fault.where or "/dev/" in fault.where or "://" in fault.where, place
        assert fault.what
        assert fault.fix
        assert len(str(fault)) < 300_000
        assert "hunter2" not in str(fault)
        fault.where.encode()
    for row in rows:
        assert row.id == os.path.normpath(row.id)
        assert not row.id.startswith(("/", "../"))
        row.id.encode()
        assert row.label


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "utf-16": "labels.csv:1: is UTF-16, not UTF-8 — save the file as UTF-8 CSV",
        "a NUL": "labels.csv:3: holds a NUL byte — save the file as UTF-8 CSV",
        "semicolons": "labels.csv:1: column 'path' stands 0 times — separate the cells with commas, not with ';'",
        "a gz of a line without end": "l.gz:2: unpacks to more than 250 times its size — give the unpacked file",
        "a line of 10 MB": "labels.csv:2: a line of more than 1,048,576 bytes — give a CSV file, "
        "with an image in each line",
        "a pattern that matches nothing": "*.csv: matches no file — give the place of some",
        "a list that is a pipe": "labels.csv: cannot be read: is not a regular file — give the path of a CSV file",
        "parents": "labels.csv:2:1: '../canary.jpg' is outside of ROOT — move the file there, or set source.root to a "
        "folder above all, and write paths relative to it",
        "a tar cut between members": "a.tar: is cut short at byte 1,536: it does not end as a tar does — "
        "make the tar anew",
        "a tar of links": "a.tar:a.jpg: is a link or a device, no file — put the file itself into the tar",
        "a.parquet with labels of floats": "a.parquet: column 'label' holds double — "
        "use a column of texts, whole numbers or true and false",
    }.items(),
)
def test_a_fault_says_what_where_and_how_to_mend_it(root: Path, name, said):
    make = CASES.get(name) or CASES[name.replace(" ", "_")]
    found = outcome(make(root))
    assert str((found.rejected + found.refused)[0]).replace(str(root), "ROOT") == f"ROOT/{said}"


def test_an_image_that_vanishes_or_becomes_a_link_after_it_was_listed_is_not_read(root: Path):
    for name in ("a", "b", "c"):
        image(root / f"cat/{name}.png")
    source = Folder(path=root)
    rows = [row for row in source.rows() if isinstance(row, Row)]
    (root / "cat/a.png").unlink()
    (root / "cat/b.png").unlink()
    (root / "cat/b.png").symlink_to(root.parent / "canary.jpg")
    with source.reader() as read:
        with pytest.raises(FileNotFoundError):
            read(rows[0])
        with pytest.raises(Unreadable, match="links to a file outside of"):
            read(rows[1])
        assert read(rows[2]) == (root / "cat/c.png").read_bytes()
        (root / "cat").rename(root.parent / "moved")
        (root / "cat").symlink_to(root.parent / "moved")
        with pytest.raises(Unreadable, match="links to a file outside of"):
            read(rows[2])
