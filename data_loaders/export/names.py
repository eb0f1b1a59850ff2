"""Any text as the name of a file: it leads to no other folder, and two texts never have the same name."""

import hashlib
import re

LONGEST = 180
"""Bytes of a name; file systems take 255."""


def safe(text: str) -> str:
    """Letters, digits and a few harmless signs stay; everything else, a leading dot and % itself become %XX."""
    name = re.sub(r"[^\w .,()+@=-]", _escaped, text)
    name = re.sub(r"^[. -]|[. ]$", _escaped, name) or "%"
    if len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:20]
    return f"{name.encode()[: LONGEST - 21].decode(errors='ignore')}%{digest}"


def image_name(id_: str, suffix: str, suffixes: tuple[str, ...]) -> str:
    """The id as the name of a file that ends in one of the suffixes: its own, or else `suffix` behind a bare %."""
    name = safe(id_)
    return name if name.lower().endswith(suffixes) else f"{name}%{suffix}"


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())
