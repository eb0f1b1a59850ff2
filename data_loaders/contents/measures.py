"""What the images of a split are like, in numbers: channels and sizes, of all and of each class."""

from typing import Any, NamedTuple

from data_loaders.audit.summary import aligned, number, plain
from data_loaders.contents.pixels import Channels, channels
from data_loaders.contents.sizes import Sizes, sizes
from data_loaders.contents.text import size_table
from data_loaders.index import Index


class Measures(NamedTuple):
    """Of one split."""

    data: str
    """Fingerprint of the data set."""
    split: str
    size: int | None
    """Height and width that the channels were measured at; None is every pixel of every image."""
    channels: list[Channels]
    """Of all, then of each class."""
    sizes: list[Sizes]


def measures(index: Index, split: str, size: int | None = None) -> Measures:
    """Reads every image of the split. Raises DamagedRow."""
    rows = index.rows_of(split)
    return Measures(index.fingerprint, split, size, channels(index, rows, size), sizes(index, rows))


def to_json(m: Measures) -> dict[str, Any]:
    return plain(m)


def summary(m: Measures) -> str:
    """Tables in plain text."""
    seen = "all pixels" if m.size is None else f"centred squares of {m.size} x {m.size} pixels"
    lines = [
        (
            c.name or "all",
            f"{c.images:,}",
            f"{c.pixels:,}",
            *(" ".join(number(v, 4) for v in part) for part in (c.mean, c.std)),
        )
        for c in m.channels
    ]
    whole = m.channels[0]
    return "\n".join(
        [
            f"{m.split} of {m.data}, {seen}; 0 is black and 1 is white:",
            aligned(("class", "images", "pixels", "mean of R G B", "std of R G B"), lines),
            "",
            size_table(m.sizes),
            "",
            f"Normalize(mean={_short(whole.mean)}, std={_short(whole.std)})",
        ]
    )


def _short(values: tuple[float, ...]) -> str:
    return f"({', '.join(number(value, 4) for value in values)})"
