"""Files at URLs (s3, gs, http), by way of fsspec: bounded in size, retried, and with errors free of credentials."""

import errno
import io
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple, TypeVar, cast

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.places import PROTOCOLS, URL, is_http, shown
from data_loaders.sources.rows import Unreachable, Unreadable

TRIES = 3
PAUSE = 0.25
"""Seconds before the second try, up to twice that by chance; twice as long before each further one."""
BLOCK = 4 * 2**20
"""Bytes asked for at once of a file that is read from its begin to its end."""
PLAIN = {"Accept-Encoding": "identity"}
SERVER_BUSY = {errno.EREMOTEIO, errno.EBUSY, errno.ETIMEDOUT, errno.EAGAIN}
CUT = "the server's answer was cut short"
NO_CONNECTION = "the server cannot be reached"
SAID = {
    "TimeoutError": "the server did not answer in time",
    "ClientPayloadError": CUT,
    "IncompleteRead": CUT,
    "IncompleteReadError": CUT,
    "ClientConnectionError": NO_CONNECTION,
    "HTTPClientError": NO_CONNECTION,
    "ConnectionError": NO_CONNECTION,
    "NoCredentialsError": "no credentials for it are in the environment",
}
"""Names of errors, by which they are known without their packages -> what they mean."""
BY_STATUS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}
BY_NAME = {"FileNotFoundError": errno.ENOENT, "PermissionError": errno.EACCES}

T = TypeVar("T")


class Entry(NamedTuple):
    """What lies in a folder."""

    name: str
    is_folder: bool
    is_link: bool = False


def filesystem(place: str) -> Any:
    """What fsspec knows the place by. Raises Refusal where its package is not installed."""
    import fsspec  # which takes a tenth of a second, and most lists are files of this machine

    match = URL.match(place)
    protocol = match[1] if match else ""
    try:
        if is_http(place):
            import aiohttp

            # fsspec waits five minutes for a whole file, which a large one may take, and for ever at a silent server.
            patience = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
            return fsspec.filesystem(protocol, client_kwargs={"timeout": patience, "trust_env": True})
        once = {"config_kwargs": {"retries": {"total_max_attempts": 1}}} if protocol == "s3" else {}
        system = fsspec.filesystem(protocol, use_listings_cache=False, **once)
    except ImportError as wrong:
        fix = f"pip install 'evenkeel[{PROTOCOLS[protocol]}]'"
        fault = Fault(shown(place), f"needs a package for {protocol}://", fix)
        raise Refusal("A package is missing:", [fault]) from wrong
    system.retries = 1  # tries are counted here, alike for all
    return system


def fetch(place: str, cap: int) -> bytes:
    """A whole file of at most `cap` bytes. Raises Unreadable or OSError."""
    system = filesystem(place)
    if is_http(place):
        return _wait(_get, system, place, cap)
    content = patiently(lambda: system.cat_file(place, start=0, end=cap + 1))
    if len(content) > cap:
        raise Unreadable(f"has more than the cap of {cap:,} bytes")
    return content


def fetch_span(place: str, start: int, size: int) -> bytes:
    """Some bytes of a file. Raises Unreadable or OSError."""
    system = filesystem(place)
    content = patiently(lambda: system.cat_file(place, start=start, end=start + size)) if size else b""
    if len(content) != size:
        raise Unreadable(f"the server sent {len(content):,} bytes where {size:,} were asked for")
    return content


def _wait(ask: Callable[..., Coroutine[Any, Any, T]], system: Any, *arguments: Any) -> T:
    """The answer to a request of our own to a system of fsspec, whose loop has a thread of its own."""
    from fsspec.asyn import sync

    return patiently(lambda: cast(T, sync(system.loop, ask, system, *arguments)))


async def _get(system: Any, url: str, cap: int) -> bytes:
    """The body of an answer, which ends the reading where it grows beyond the cap, whatever its headers said."""
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=PLAIN) as answer:
        answer.raise_for_status()
        parts: list[bytes] = []
        size = 0
        async for part in answer.content.iter_chunked(BLOCK):
            size += len(part)
            if size > cap:
                raise Unreadable(f"has more than the cap of {cap:,} bytes")
            parts.append(part)
        return b"".join(parts)


def open_url(place: str) -> io.BufferedIOBase:
    """A file to read from its begin; to seek in too, where the server answers requests for a part."""
    system = filesystem(place)
    how: dict[str, Any] = {"block_size": BLOCK, "cache_type": "readahead"}
    if is_http(place):
        size = _wait(_size, system, place)
        how = {**how, "size": size} if size else {"block_size": 0}  # 0: as a stream
    return io.BufferedReader(_Patient(patiently(lambda: system.open(place, "rb", **how))), 2**16)


async def _size(system: Any, url: str) -> int:
    """Bytes of a file of which the server sends parts; 0 if it sends none."""
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers={**PLAIN, "Range": "bytes=0-0"}) as answer:
        if answer.status == 416:  # an empty file has no first byte
            return 0
        answer.raise_for_status()
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if answer.status == 206 and total.isdigit() else 0


class _Patient(io.RawIOBase):
    """A remote file whose reads are tried again, where that starts from a known position."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file, self._again = file, bool(file.seekable()) and bool(getattr(file, "size", None))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._again

    def readinto(self, buffer: Any) -> int:
        content = patiently(lambda: self._file.read(len(buffer)), TRIES if self._again else 1)
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def list_folder(place: str) -> list[Entry]:
    """What lies in a folder, in the order of names. Raises Unreadable or OSError."""
    system = filesystem(place)
    folder = system._strip_protocol(place).rstrip("/")
    found = patiently(lambda: system.ls(place, detail=True))
    named = ((info["name"].rstrip("/")[len(folder) + 1 :], info["type"] == "directory") for info in found)
    entries = {Entry(name, is_folder) for name, is_folder in named if name and "/" not in name}
    return sorted(entries, key=lambda entry: entry.name)


def glob_urls(pattern: str) -> Iterator[str]:
    """The files that a pattern matches, in order."""
    system = filesystem(pattern)
    protocol = pattern.partition("://")[0]
    yield from (f"{protocol}://{name}" for name in sorted(patiently(lambda: system.glob(pattern))))


def is_folder(place: str) -> bool:
    return not is_http(place) and patiently(lambda: bool(filesystem(place).isdir(place)))


def patiently(action: Callable[[], T], tries: int = TRIES) -> T:
    """The result of an action, tried again where the server or the way to it failed for now.

    Raises OSError or Unreadable whose text is ours: that of a library may hold the URL with its signature. Of them,
    Unreachable says that it may go well another time.
    """
    for attempt in range(tries):
        try:
            return action()
        except (Unreadable, Refusal):
            raise
        except Exception as error:  # each library has its own
            wrong = error.__cause__ if isinstance(error, FileNotFoundError) else None  # fsspec has it for anything
            wrong = wrong if isinstance(wrong, Exception) else error
            if not _may_pass(wrong):
                raise _plain(wrong) from None
            if attempt + 1 == tries:
                plain = _plain(wrong)
                raise Unreachable((plain.strerror if isinstance(plain, OSError) else "") or str(plain)) from None
        time.sleep(PAUSE * 2**attempt * (1 + random.random()))
    raise AssertionError("unreachable")


def _may_pass(wrong: Exception) -> bool:
    status = _status(wrong)
    if status:
        return status in {408, 429} or status >= 500
    names = {kind.__name__ for kind in type(wrong).__mro__}
    return bool(names & (SAID.keys() - {"NoCredentialsError"})) or _errno(wrong) in SERVER_BUSY


def _status(wrong: BaseException) -> int:
    """The HTTP status that an error stands for; 0 if it is none."""
    response = getattr(wrong, "response", None) or getattr(wrong.__cause__, "response", None)
    if isinstance(response, dict):  # of boto
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    status = getattr(wrong, "status", None) or getattr(wrong, "code", None)  # of aiohttp, of gcsfs
    return int(str(status)) if str(status).isdigit() else 0


def _errno(wrong: Exception) -> int:
    return wrong.errno or 0 if isinstance(wrong, OSError) else 0


def _plain(wrong: Exception) -> Exception:
    """An error that says the same without the words of a library."""
    status, names = _status(wrong), {kind.__name__ for kind in type(wrong).__mro__}
    code = BY_STATUS.get(status) or BY_NAME.get(type(wrong).__name__) or _errno(wrong)
    said = next((text for name, text in SAID.items() if name in names), "")
    if status and code not in BY_STATUS.values():
        return Unreadable(f"the server answered with status {status}")
    if code and not said:
        return OSError(code, os.strerror(code))
    return Unreadable(said or f"cannot be read ({type(wrong).__name__})")
