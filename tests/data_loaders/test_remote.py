"""Lists, images, tables and tars on real servers of this machine: of http, and moto's of S3."""

import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from data_loaders.faults import Refusal
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.sources import remote, storage
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.folder import Folder
from data_loaders.sources.parquet import Parquet
from data_loaders.sources.rows import Rejected, Row, Source, Unreadable
from data_loaders.sources.webdataset import WebDataset

pytest.importorskip("aiohttp")

SECRET = "hunter2"


class Files(SimpleHTTPRequestHandler):
    """A folder, with requests for parts of files, and the failures of servers, which a path asks for first."""

    asked: Counter[str]

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        trouble, _, rest = self.path.lstrip("/").partition("/")
        if trouble == "busy" and self.asked[self.path] == 1:
            self.send_error(503)
        elif trouble == "broken":
            self.send_error(500)
        elif trouble == "forbidden":
            self.send_error(403)
        elif trouble == "moved":
            self.send_response(302)
            self.send_header("Location", f"http://{self.headers['Host'].replace('127.0.0.1', 'localhost')}/{rest}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif trouble == "hangs-up":
            self.close_connection = True
        else:
            self._send(
                Path(self.translate_path(rest if trouble in {"busy", "cut", "endless", "whole"} else self.path)),
                trouble,
            )

    do_HEAD = do_GET  # noqa: N815

    def _send(self, file: Path, trouble: str) -> None:
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        start, end = 0, len(content)
        if (asked := self.headers.get("Range")) and trouble != "whole":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or end) + 1, end)
        self.send_response(206 if asked and trouble != "whole" else 200)
        if trouble != "whole":
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if trouble != "endless":
            self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start : end - 5 if trouble == "cut" else end])
        return None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Server(NamedTuple):
    url: str
    folder: Path
    asked: Counter[str]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    asked: Counter[str] = Counter()
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Counted", (Files,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        yield Server(f"http://127.0.0.1:{http.server_address[1]}", folder, asked)
        http.shutdown()
        thread.join()


def good(source: Source) -> list[Row]:
    found = list(source.rows())
    assert [row for row in found if isinstance(row, Rejected)] == []
    return [row for row in found if isinstance(row, Row)]


def images(source: Source) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    rows = good(source)
    with source.reader() as read:
        for row in rows:
            try:
                found[row.id] = read(row)
            except OSError as wrong:
                found[row.id] = str(wrong.strerror)
            except Unreadable as wrong:
                found[row.id] = str(wrong)
    return found


def listing(server: Server, *names: str, name: str = "labels.csv") -> None:
    (server.folder / name).write_text("path,label\n" + "".join(f"{n},food\n" for n in names))


def test_an_outage_ends_an_ingest_and_drops_no_image(server: Server, tmp_path: Path):
    names = [f"broken/{i}.png" for i in range(3)]
    listing(server, *names)
    source = Csv(path=f"{server.url}/labels.csv")
    settings = Ingest.model_validate({"source": source, "out": tmp_path / "data", "rejects": {"allow": 0.9}})
    with pytest.raises(Refusal, match="cannot be read now") as refusal:
        ingest(settings, in_processes(1))
    assert refusal.value.exit_code == 75
    assert not (tmp_path / "data/dataset.json").exists()


def test_a_list_and_its_images_come_over_http(server: Server):
    (server.folder / "a b").mkdir()
    (server.folder / "a b/c#d?.jpg").write_bytes(b"1")
    (server.folder / "e.jpg").write_bytes(b"")
    listing(server, f"{server.url}/a%20b/c%23d%3F.jpg", f"{server.url}/e.jpg", "gone.jpg")
    source = Csv(path=f"{server.url}/labels.csv")
    assert images(source) == {"a b/c#d?.jpg": b"1", "e.jpg": b"", "gone.jpg": "No such file or directory"}
    assert good(source)[0].where == f"{server.url}/labels.csv:2"


def test_the_files_of_a_server_are_none_of_this_machine(server: Server):
    listing(server, "a.jpg")
    archives(server.folder)
    for source in (
        Csv(path=f"{server.url}/labels.csv"),
        Parquet(path=f"{server.url}/train.parquet"),
        WebDataset(path=f"{server.url}/train.tar"),
    ):
        assert source.file_of(good(source)[0]) is None


@pytest.mark.parametrize("rooted", [True, False])
def test_the_signature_of_an_url_in_a_list_is_told_nowhere(server: Server, tmp_path: Path, rooted, capfd):
    Image.new("RGB", (8, 8)).save(server.folder / "good.png")
    signed = f"X-Amz-Signature={SECRET}&b=c"
    paths = [
        "good.png",
        f"1.png?{signed}",
        f"{server.url}/2.png?{signed}",
        f"http://u:{SECRET}@elsewhere/3.png?{signed}",
        f"HTTPS://elsewhere/4.png?{signed}",
        f"../5.png?{signed}",
        f"6.png?too,{signed},many",
    ]
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{path},food\n" for path in paths))
    if rooted:
        source = Csv(path=tmp_path / "l.csv", root=server.url)
    else:
        Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
        paths[:] = [path if "://" in path else "good.png" for path in paths]
        (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{path},food\n" for path in paths))
        source = Csv(path=tmp_path / "l.csv")
    found = [row for row in source.rows() if isinstance(row, Rejected)]
    if rooted:
        assert (found[0].row.id, *found[0].fault) == (
            "1.png",
            f"{tmp_path}/l.csv:3:1",
            "'1.png' comes with a query",
            "list plain paths; leave signatures to the server's settings",
        )
    settings = Ingest.model_validate({"source": source, "out": tmp_path / "data"})
    with pytest.raises(Refusal) as refusal:
        ingest(settings, in_processes(1))
    (listed,) = (tmp_path / "data").rglob("rejected*.csv")
    said = capfd.readouterr()
    assert "2.png" in listed.read_text()
    for text in (listed.read_text(), str(found), str(refusal.value), said.out, said.err):
        assert SECRET not in text
        assert "X-Amz" not in text


def test_a_list_of_signed_urls_without_a_header_tells_no_signature(server: Server, tmp_path: Path):
    (tmp_path / "l.csv").write_text(f"{server.url}/1.png?s={SECRET},food\n2.png?s={SECRET},food\n")
    for root in (server.url, None):
        with pytest.raises(Refusal) as refusal:
            good(Csv(path=tmp_path / "l.csv", root=root))
        assert SECRET not in str(refusal.value)


def test_a_local_list_may_name_images_of_a_server_and_none_outside_of_its_root(server: Server, tmp_path: Path):
    (server.folder / "in").mkdir()
    (server.folder / "in/a.jpg").write_bytes(b"1")
    paths = [
        "a.jpg",
        "../b.jpg",
        f"{server.url}/b.jpg",
        f"{server.url}/in/../b.jpg",
        f"{server.url}/inside.jpg",
        "/a.jpg",
    ]
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{path},food\n" for path in paths))
    found = list(Csv(path=tmp_path / "l.csv", root=f"{server.url}/in").rows())
    assert [row.id for row in found if isinstance(row, Row)] == ["a.jpg"]
    assert all("is outside of" in row.fault.what for row in found if isinstance(row, Rejected))


@pytest.mark.parametrize(
    ("trouble", "content", "tries"),
    [
        ("busy", b"content", 2),
        ("broken", "the server answered with status 500", 3),
        ("forbidden", "Permission denied", 1),
        ("hangs-up", "the server cannot be reached", 6),  # aiohttp asks twice each time
        ("cut", "the server's answer was cut short", 3),
        ("endless", b"content", 1),
        ("moved", b"content", 1),
        ("none", "No such file or directory", 1),
    ],
)
def test_what_may_pass_is_tried_three_times_and_nothing_is_taken_for_whole_that_is_not(
    server: Server, trouble, content, tries
):
    (server.folder / "a.jpg").write_bytes(b"content")
    listing(server, "a.jpg")
    source = Csv(path=f"{server.url}/labels.csv", root=f"{server.url}/{trouble}")
    assert images(source) == {"a.jpg": content}
    assert server.asked[f"/{trouble}/a.jpg"] == tries


@pytest.mark.parametrize("trouble", ["cut", "broken", "gone", "hangs-up"])
def test_a_list_that_does_not_come_whole_is_refused_where_it_lies(server: Server, trouble):
    listing(server, *(f"{n}.jpg" for n in range(1000)))
    with pytest.raises(Refusal) as refusal:
        good(Csv(path=f"{server.url}/{trouble}/labels.csv?signature={SECRET}"))
    (fault,) = refusal.value.faults
    assert fault.where == f"{server.url}/{trouble}/labels.csv"
    assert fault.fix
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize("trouble", ["whole", "busy", "moved"])
def test_a_list_of_many_blocks_is_streamed_whether_or_not_the_server_sends_parts(server: Server, trouble, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    listing(server, *(f"images/{n:08d}.jpg" for n in range(50_000)))
    assert len(good(Csv(path=f"{server.url}/{trouble}/labels.csv"))) == 50_000


def test_no_more_of_an_image_is_read_than_the_cap(server: Server, monkeypatch: pytest.MonkeyPatch):
    (server.folder / "a.jpg").write_bytes(bytes(2000))
    listing(server, "a.jpg")
    monkeypatch.setattr(storage, "FILE_CAP", 1999)
    for trouble in ("endless", ""):
        source = Csv(path=f"{server.url}/labels.csv", root=f"{server.url}/{trouble}")
        assert images(source) == {"a.jpg": "has more than the cap of 1,999 bytes"}


def archives(folder: Path) -> None:
    pq.write_table(
        pa.table({"image": [b"0", b"1", b"2"], "label": ["cat", "dog", "cat"]}),
        folder / "train.parquet",
        row_group_size=2,
    )
    with TarWriter(str(folder / "train.tar")) as writer:
        for n in range(3):
            writer.write({"__key__": f"{n}", "jpg": str(n).encode(), "cls": n % 2})


def test_tables_and_tars_are_read_in_parts_over_http(server: Server):
    archives(server.folder)
    assert images(Parquet(path=f"{server.url}/train.parquet")) == {f"train/{n}": str(n).encode() for n in range(3)}
    assert images(WebDataset(path=f"{server.url}/train.tar")) == {f"train/{n}.jpg": str(n).encode() for n in range(3)}
    for source in (Parquet(path=f"{server.url}/whole/train.parquet"), WebDataset(path=f"{server.url}/whole/train.tar")):
        with pytest.raises(Refusal, match="sends no parts of files"):
            good(source)


def test_http_which_has_no_lists_of_files_is_refused_where_one_is_needed(server: Server):
    for source in (
        Folder(path=f"{server.url}/x"),
        Csv(path=f"{server.url}/*.csv"),
        Parquet(path=f"{server.url}/data/"),
    ):
        with pytest.raises(Refusal, match="http has no lists of files"):
            good(source)


@pytest.mark.parametrize(
    "path",
    [
        "file:///a.csv",
        "github://a:b@/x.csv",
        "zip://a.csv::http://h/a.zip",
        "ftp://h/a.csv",
        f"https://u:{SECRET}@h/a.csv",
        "simplecache::http://h/a.csv",
    ],
)
def test_only_known_protocols_without_credentials_are_opened(path):
    for source in (
        Csv(path=path),
        Csv(path="a.csv", root=path),
        Folder(path=path),
        Parquet(path=path),
        WebDataset(path=path),
    ):
        with pytest.raises(Refusal) as refusal:
            good(source)
        assert "s3://" in str(refusal.value) or "credentials" in str(refusal.value)
        assert SECRET not in str(refusal.value)


def test_a_package_that_is_missing_is_named_with_the_way_to_install_it():
    code = """
import sys
sys.modules.update(dict.fromkeys(["aiohttp", "s3fs", "gcsfs"]))
from data_loaders.faults import Refusal
from data_loaders.sources.csv_file import Csv
for url in ("s3://b/a.csv", "gs://b/a.csv", "https://h/a.csv"):
    try:
        list(Csv(path=url).rows())
    except Refusal as refusal:
        print(refusal.faults[0])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "s3://b/a.csv: needs a package for s3:// — pip install 'evenkeel[s3]'",
        "gs://b/a.csv: needs a package for gs:// — pip install 'evenkeel[gs]'",
        "https://h/a.csv: needs a package for https:// — pip install 'evenkeel[http]'",
    ]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket of moto's server, which the environment leads to."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3")
    with pytest.MonkeyPatch.context() as patch:
        threaded = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        threaded.start()
        host, port = threaded.get_host_and_port()
        environment = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": SECRET}
        for name, value in {**environment, "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("no_proxy", host)
        client = boto3.client("s3")
        client.create_bucket(Bucket="shop")
        yield client
        client.close()
        threaded.stop()


def upload(client: Any, folder: Path, prefix: str) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            client.upload_file(str(file), "shop", f"{prefix}/{file.relative_to(folder)}")


def test_every_kind_of_source_reads_s3(bucket: Any, tmp_path: Path):
    folder = tmp_path / "up"
    for name in ("cat/a b.jpg", "cat/deep/c.jpg", "dog/ü.jpg", "dog/.hidden.jpg", "dog/x.txt"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(name.encode())
    for part in ("a", "b"):
        (folder / f"{part}.csv").write_text(
            f"path,label\nimages/cat/a b.jpg,cat\nimages/cat/{part}.jpg,cat\n../x.jpg,cat\n"
        )
    archives(folder)
    upload(bucket, folder, "set")
    found = list(Folder(path="s3://shop/set/images").rows())
    assert [(row.id, row.label) for row in found if isinstance(row, Row)] == [
        ("cat/a b.jpg", "cat"),
        ("cat/deep/c.jpg", "cat"),
        ("dog/ü.jpg", "dog"),
    ]
    assert [row.fault.where for row in found if isinstance(row, Rejected)] == ["s3://shop/set/images/dog/x.txt"]
    with Folder(path="s3://shop/set/images").reader() as read:
        assert [read(row) for row in found if isinstance(row, Row)] == [
            name.encode() for name in ("cat/a b.jpg", "cat/deep/c.jpg", "dog/ü.jpg")
        ]
    lists = Csv(path="s3://shop/set/*.csv")
    rows = list(lists.rows())
    assert [row.row.id for row in rows if isinstance(row, Rejected)] == ["../x.jpg"] * 2
    with lists.reader() as read:
        assert read(rows[0]) == b"cat/a b.jpg"  # type: ignore[arg-type]
        with pytest.raises(OSError, match="No such file"):
            read(rows[1])  # type: ignore[arg-type]
    assert images(Parquet(path="s3://shop/set")) == {f"train/{n}": str(n).encode() for n in range(3)}
    assert images(WebDataset(path="s3://shop/set/*.tar")) == {f"train/{n}.jpg": str(n).encode() for n in range(3)}
    shutil.rmtree(folder)


def test_what_s3_does_not_have_is_told_without_credentials(bucket: Any):
    for source in (
        Csv(path="s3://shop/none.csv"),
        Csv(path="s3://nobody/none.csv"),
        Folder(path="s3://shop/none"),
        Parquet(path="s3://shop/none.parquet"),
        WebDataset(path="s3://shop/*.none"),
    ):
        with pytest.raises(Refusal) as refusal:
            good(source)
        assert "s3://" in refusal.value.faults[0].where
        assert SECRET not in str(refusal.value)
