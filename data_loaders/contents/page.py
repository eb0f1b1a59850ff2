"""A data set as one self-contained page, with sample pictures of each class and group: no script runs, and nothing is
fetched."""

import base64
import hashlib
import io
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from data_loaders import durable
from data_loaders.augment import rng
from data_loaders.contents.counts import Line, tables
from data_loaders.contents.overview import Overview, images_of
from data_loaders.contents.text import text
from data_loaders.images import picture
from data_loaders.index import Index, Ints, Reader

HERE = Path(__file__).parent
SIDE = 112
"""Most pixels of a picture in height and width."""


class Picture(NamedTuple):
    """A sample; what is shown is a small copy."""

    id: str
    split: str
    size: str
    src: str
    """A data: URI."""


class Shelf(NamedTuple):
    """Samples of a class in a group."""

    line: Line
    pictures: list[Picture]


def write(o: Overview, index: Index, out: Path, most_cells: int, per_cell: int, seed: int) -> int:
    """Writes the page; samples of at most so many cells, the worst first. Returns the number of pictures."""
    shelves = _shelves(o, index, most_cells, per_cell, seed)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = (HERE / "page.css").read_text()
    page = environment.get_template("page.html").render(
        o=o,
        tables=list(tables(o.counts, o.groups)),
        shelves=shelves,
        left=len(o.counts.cells or o.counts.classes) - len(shelves),
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        spread=text,
        images=images_of(o),
    )
    durable.write(out, page)
    return sum(len(shelf.pictures) for shelf in shelves)


def _shelves(o: Overview, index: Index, most: int, per_cell: int, seed: int) -> list[Shelf]:
    """Samples drawn at random, of the training split as far as it has any; the same for the same seed."""
    shelves = list[Shelf]()
    with closing(Reader(index)) as reader:
        for line in (o.counts.cells or o.counts.classes)[:most]:
            rows = _rows(index, line)
            drawn = rows[rng(seed, len(shelves)).permutation(len(rows))]
            learnt = index.split[drawn] == index.splits.index(o.train)
            drawn = drawn[np.argsort(~learnt, kind="stable")][:per_cell]
            shelves.append(Shelf(line, [_picture(index, reader, row) for row in drawn.tolist()]))
    return shelves


def _rows(index: Index, line: Line) -> Ints:
    label, *groups = line.name
    there = index.labels == index.classes.index(label)
    for a, value in enumerate(groups):
        there &= index.groups[:, a] == list(index.group_values.values())[a].index(value)
    return np.flatnonzero(there)


def _picture(index: Index, reader: Reader, row: int) -> Picture:
    image = Image.fromarray(picture(reader, row))
    image.thumbnail((SIDE, SIDE))
    with io.BytesIO() as file:
        image.save(file, "JPEG" if image.width * image.height > 1024 else "PNG", quality=85)
        kind = "jpeg" if image.width * image.height > 1024 else "png"
        src = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    size = f"{index.width[row]} × {index.height[row]}"
    return Picture(index.ids[row].as_py(), index.splits[index.split[row]], size, src)
