"""Sizes as a table in plain text."""

import math

from data_loaders.audit.summary import aligned, number
from data_loaders.contents.sizes import Sizes, Spread


def size_table(lines: list[Sizes]) -> str:
    """Least / median / most of each size."""
    head = ("class", "n", "width", "height", "width / height", "bytes", "JPEG quality")
    cells = [
        (
            s.name or "all",
            f"{s.width.n:,}",
            text(s.width),
            text(s.height),
            text(s.aspect, 2),
            text(s.bytes),
            text(s.quality),
        )
        for s in lines
    ]
    return aligned(head, cells)


def text(spread: Spread, digits: int = 0) -> str:
    """Least / median / most."""
    return "–" if math.isnan(spread.median) else " / ".join(number(value, digits) for value in spread[1:])
