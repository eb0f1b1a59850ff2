"""The bytes at a place, of this machine or at an URL; only regular files are ever read, and none that is huge."""

import errno
import glob
import io
import os
import stat
from collections.abc import Callable, Iterator

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.places import Root, is_http, is_url, plain, shown, wrong_with
from data_loaders.sources.remote import Entry, fetch, glob_urls, is_folder, list_folder, open_url
from data_loaders.sources.rows import Unreadable

FILE_CAP = 256 * 2**20
"""Most bytes of an image."""
CANNOT_LIST = "http has no lists of files: name each of them, or use s3:// or gs://"


def reason(wrong: Exception) -> str:
    """Why something cannot be read, without its name."""
    return os.strerror(wrong.errno).lower() if isinstance(wrong, OSError) and wrong.errno else str(wrong)


def open_regular(path: str) -> int:
    """A descriptor of a regular file; the opening waits for nothing, and what is no file is never read."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as wrong:
        if wrong.errno == errno.ENXIO:
            raise Unreadable("is not a regular file") from wrong
        raise
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise Unreadable("is not a regular file")
    return opened


def open_place(place: str) -> io.BufferedIOBase:
    """A list or an archive, to read from its begin. Raises Unreadable or OSError."""
    if is_url(place):
        return open_url(place)
    if os.path.isdir(place):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return open(open_regular(place), "rb")


def image_reader(root: Root) -> Callable[[str], bytes]:
    """Reads the image with an id below a root, out of which no link leads. Raises Unreadable or OSError."""
    if is_url(root.place):
        return lambda name: fetch(root.file_of(name), FILE_CAP)
    real = os.path.realpath(root.place).rstrip("/") + "/"

    def read(name: str) -> bytes:
        opened = open_regular(root.file_of(name))
        try:
            if not os.readlink(f"/proc/self/fd/{opened}").startswith(real):
                raise Unreadable(f"links to a file outside of {root.place}")
            return _whole(opened)
        finally:
            os.close(opened)

    return read


def _whole(opened: int) -> bytes:
    size = os.fstat(opened).st_size
    if size > FILE_CAP:
        raise Unreadable(f"has {size:,} bytes, more than the cap of {FILE_CAP:,}")
    content = os.read(opened, size)
    if len(content) != size:
        raise Unreadable("was cut short while it was read")
    return content


def read_span(opened: int, start: int, size: int) -> bytes:
    """Some bytes of an open file. Raises Unreadable where it ends before."""
    content = os.pread(opened, size, start)
    if len(content) != size:
        raise Unreadable("was cut short since it was listed")
    return content


def entries(folder: str) -> list[Entry]:
    """What lies in a folder, in the order of names; a link counts as what it leads to. Raises Unreadable or OSError."""
    if is_url(folder):
        return list_folder(folder)
    with os.scandir(folder) as found:
        named = [Entry(entry.name, _leads_to_folder(entry), entry.is_symlink()) for entry in found]
    return sorted(named, key=lambda entry: entry.name)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        return os.path.isdir(entry)  # DirEntry.is_dir() raises where links go in a circle
    return entry.is_dir(follow_symlinks=False)


def walk(folder: str) -> Iterator[tuple[str, Entry]]:
    """Path below the folder of everything in it that is no folder itself, and of links to folders, which are not
    followed; by path, hidden ones left out. Holds the names of one folder, and of those above it, at a time.

    Raises Refusal where a folder cannot be listed.
    """
    waiting = [("", iter(listed(folder)))]
    while waiting:
        prefix, found = waiting[-1]
        entry = next(found, None)
        if entry is None:
            waiting.pop()
        elif entry.name.startswith("."):
            continue
        elif entry.is_folder and not entry.is_link:
            within = f"{prefix}{entry.name}/"
            waiting.append((within, iter(listed(f"{folder.rstrip('/')}/{within}"))))
        else:
            yield prefix + entry.name, entry


def listed(folder: str) -> list[Entry]:
    """What lies in a folder. Raises Refusal where it cannot be listed."""
    try:
        return entries(folder)
    except (OSError, Unreadable) as wrong:
        fault = Fault(
            plain(shown(folder)).rstrip("/"), f"cannot be listed: {reason(wrong)}", "give a folder that can be read"
        )
        raise Refusal("The folder of images cannot be read:", [fault], 65) from wrong


def expand(places: tuple[str, ...], suffixes: tuple[str, ...] = ()) -> Iterator[str | Fault]:
    """The files that places stand for: patterns are matched and, where there are suffixes, folders searched for files
    with one of them. A place that stands for none is a Fault.
    """
    for place in places:
        if wrong := wrong_with(place):
            yield Fault(plain(shown(place)), wrong, "give a path, or an URL without credentials")
            continue
        try:
            found = sorted(_in_folder(place, suffixes)) if suffixes and _is_folder(place) else _matched(place)
        except (OSError, Unreadable) as wrong:
            yield Fault(plain(shown(place)), f"cannot be listed: {reason(wrong)}", "give a place that can be read")
            continue
        what = f"has no file that ends in {' or '.join(suffixes)}" if suffixes else "matches no file"
        yield from found or [Fault(plain(shown(place)), what, "give the place of some")]


def _matched(place: str) -> list[str]:
    if is_http(place):
        if "*" in place or place.endswith("/"):
            raise Unreadable(CANNOT_LIST)
        return [place]
    if is_url(place):
        return list(glob_urls(place)) if "*" in place else [place]
    is_pattern = glob.has_magic(place) and not os.path.lexists(place)
    return sorted(glob.glob(place, recursive=True)) if is_pattern else [place]


def _is_folder(place: str) -> bool:
    return is_folder(place) if is_url(place) else os.path.isdir(place)


def _in_folder(place: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for path, entry in walk(place):
        if path.endswith(suffixes) and not entry.is_folder:
            yield f"{place.rstrip('/')}/{path}"
