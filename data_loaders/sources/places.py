"""Names of places, of files and folders on this machine or at an URL: what they mean, before anything is opened."""

import os
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, unquote, urlsplit

from pydantic import AfterValidator, PlainSerializer

PROTOCOLS = {"s3": "s3", "gs": "gs", "http": "http", "https": "http"}
"""Protocol -> the extra of this package that installs what it needs."""

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|\w+::")


def texts(given: str | Path | tuple[str | Path, ...]) -> tuple[str, ...]:
    """One place or several, as text."""
    return tuple(map(str, given)) if isinstance(given, tuple) else (str(given),)


def _kept(given: str | Path | tuple[str | Path, ...]) -> str | list[str]:
    """What is written down: no signature of an URL."""
    return [shown(place) for place in texts(given)] if isinstance(given, tuple) else shown(str(given))


_without_secrets = PlainSerializer(_kept, when_used="json")
Place = Annotated[str | Path, AfterValidator(str), _without_secrets]
Places = Annotated[str | Path | tuple[str, ...], AfterValidator(texts), _without_secrets]


def wrong_with(place: str) -> str:
    """Why a place cannot be used; empty if it can."""
    if not (match := URL.match(place)):
        return "it holds a NUL" if "\0" in place else ""
    if match[1] not in PROTOCOLS or "::" in place:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        return f"{shown(place)!r} is neither a path of this machine nor one of {known}"
    parts = urlsplit(place)
    if "@" in parts.netloc:
        return f"{shown(place)!r} comes with credentials; leave them to the environment (or ~/.netrc)"
    return "" if parts.netloc else f"{shown(place)!r} names no server or bucket"


def is_url(place: str) -> bool:
    return URL.match(place) is not None


def is_http(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def shown(place: str) -> str:
    """A place as messages tell it: an URL without what could be a credential."""
    if not is_url(place):
        return place
    head, separator, rest = place.rpartition("://")
    host, slash, path = rest.partition("/")
    path = re.split(r"[?#]", path)[0] if head.lower().endswith(("http", "https")) else path
    return f"{head}{separator}{host.rpartition('@')[2]}{slash}{path}"


def plain(name: str) -> str:
    """A name that can be written down: bytes that are not UTF-8 become backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def folder_of(place: str) -> str:
    """The folder that a file lies in."""
    if not is_url(place):
        return os.path.dirname(place) or "."
    head, separator, rest = (re.split(r"[?#]", place)[0] if is_http(place) else place).partition("://")
    return head + separator + (rest.rpartition("/")[0] or rest)


def common_folder(folders: Sequence[str]) -> str | None:
    """The deepest folder that holds all of these; None for folders of different machines."""
    if len(set(folders)) == 1:
        return folders[0]
    if not any(map(is_url, folders)):
        return os.path.commonpath([os.path.abspath(folder) for folder in folders])
    levels = zip(*(folder.rstrip("/").split("/") for folder in folders), strict=False)
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels)]
    return "/".join(shared) if len(shared) > 2 else None


class Root:
    """A folder that paths are relative to and may not leave, as far as names tell: links are for who opens the file."""

    def __init__(self, place: str, base: str | None = None) -> None:
        self.place, self.base = place, place if base is None else base

    def id_of(self, path: str) -> str | None:
        """The path relative to the base, with nothing to be resolved; None where it leaves the root.

        Takes an absolute path, or an URL, below the root too.
        """
        if path[0] not in "./" and path[-1] != "/" and "//" not in path and "/." not in path and "\0" not in path:
            return self._prefix + path
        return self._resolved(path)

    def _resolved(self, path: str) -> str | None:
        if "\0" in path:
            return None
        if not is_url(self.place):
            return None if "://" in path else self._of_this_machine(path)
        if "://" in path:
            if not path.startswith(self.place.rstrip("/") + "/"):
                return None
            path = path[len(self.place.rstrip("/")) + 1 :]
            path = unquote(path) if is_http(self.place) else path
        within = os.path.normpath(path)
        return None if within.startswith(("/", "../")) or within in {".", ".."} else self._prefix + within

    def _of_this_machine(self, path: str) -> str | None:
        within = os.path.normpath(os.path.join(self._absolute, path))
        for root in (self._absolute, self._real):
            if within.startswith(root.rstrip("/") + "/"):
                return self._prefix + within[len(root.rstrip("/")) + 1 :]
        return None

    @cached_property
    def _absolute(self) -> str:
        return os.path.abspath(self.place)

    @cached_property
    def _real(self) -> str:
        return os.path.realpath(self.place)

    @cached_property
    def _prefix(self) -> str:
        """What leads from the base to the root, so that ids of several roots differ."""
        if self.base == self.place:
            return ""
        if is_url(self.base):
            return self.place.rstrip("/")[len(self.base.rstrip("/")) + 1 :] + "/"
        within = os.path.relpath(self.place, self.base)
        return "" if within == "." else within + "/"

    def file_of(self, name: str) -> str:
        """The place of the file with an id."""
        within = name[len(self._prefix) :]
        if not is_url(self.place):
            return os.path.join(self.place, within)
        return f"{self.place.rstrip('/')}/{quote(within) if is_http(self.place) else within}"
