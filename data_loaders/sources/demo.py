"""The built-in data set: drawn food, drinks and desserts with planted biases, so that every probe has a known answer.

Everything is painted from signed distances [B, S, S] (negative inside), B images of one sub-kind at a time. Per pixel
they use only what IEEE 754 rounds exactly (no sine, no BLAS), so that the bytes do not depend on the vector unit.
"""

import csv
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat

from data_loaders.faults import Fault, Refusal
from data_loaders.progress import Progress
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.rows import Read, Rejected, Row, Source

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Length = float | Floats  # the same in all images, or of each image: [B, 1, 1]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

CLASSES = ("food", "drinks", "desserts")
VENUES = ("restaurant", "home", "street")
CAMERAS = ("phone", "slr")
SPLITS = {"train": 0.57, "val": 0.12, "test": 0.17, "test_balanced": 0.14}
COLUMNS = ("path", "label", "venue", "camera", "split", "photographer", "taken_at")
TRUE_LABEL = "true_label"
PHOTOGRAPHERS = ("ada", "bo", "chen", "dara", "eli", "femi", "gus", "hana", "ines", "jo", "kofi", "lena")
STAMP = "demo.json"
DRAWING = 1  # raised when the pictures change, so that an older set on disk is drawn again
ENCODED_ANEW = 75  # JPEG quality below which a copy is encoded 20 better, and from which on 20 worse
MISLABELLING, LEAKING = 2**63, 2**63 + 1  # streams of random numbers, far from those of the rows
BATCH = 8  # images; more of them fall out of the processor's cache: 64 take 1.9 times as long

VENUE_OF_CLASS = np.array([[0.15, 0.15, 0.7], [0.7, 0.15, 0.15], [0.15, 0.7, 0.15]])  # [class, venue], at strength 1
CAST_OF_CLASS = np.array([[1.06, 1.0, 0.94], [0.94, 1.0, 1.06], [1.05, 0.93, 1.03]], np.float32)  # [class, RGB] gains
EXPOSURE = np.array([0.7, 1.0, 0.9], np.float32)  # [venue]
NOISE = np.array([0.06, 0.012], np.float32)  # [camera] standard deviation, of full scale
BLUR = np.array([0.3, 0.1], np.float32)  # [camera] largest weight of either neighbour
QUALITY = np.array([60, 90])  # [camera] JPEG
PALETTES = {  # RGB; every class paints with all of them, so that colour alone does not tell the class
    "baked": [(222, 170, 105), (190, 130, 70), (150, 95, 50), (235, 200, 140)],
    "dark": [(60, 35, 25), (90, 50, 30), (40, 45, 40), (110, 40, 30)],
    "pale": [(250, 240, 225), (245, 225, 180), (250, 215, 220), (225, 235, 225)],
    "bright": [(205, 50, 40), (240, 180, 50), (95, 150, 60), (225, 110, 140), (230, 125, 45)],
    "other": [(205, 50, 40), (240, 180, 50), (95, 150, 60), (225, 110, 140), (120, 170, 210)],
    "dish": [(240, 240, 238), (160, 180, 200), (70, 75, 85), (185, 105, 80), (225, 215, 195)],
}
SURFACES = [  # [venue, choice, RGB] of the table
    [(120, 75, 45), (90, 60, 50), (150, 105, 70), (75, 75, 80)],
    [(215, 205, 190), (150, 180, 205), (215, 140, 130), (150, 105, 70)],
    [(150, 150, 150), (120, 115, 110), (185, 175, 160), (75, 75, 80)],
]
SPIRAL = [(0.3 * i**0.5 * math.cos(2.4 * i), 0.3 * i**0.5 * math.sin(2.4 * i)) for i in range(13)]  # even over a disc
UPRIGHT = np.array([[1, 0]], np.float32)


class Demo(Source):
    """Procedurally drawn food, drinks and desserts with planted, documented, tunable biases."""

    kind: Literal["demo"] = "demo"
    folder: Path = Path("build/demo/images")
    """Where the image files and labels.csv are written."""
    images: Annotated[int, Field(ge=30)] = 6000
    """In all: 57 % train, 12 % val, 17 % test, 14 % test_balanced."""
    size: Annotated[int, Field(ge=16)] = 64
    """Height and width of an image, in pixels."""
    seed: NonNegativeInt = 0
    """Another seed draws other images; a seed draws the same bytes again."""
    imbalance: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (100, 12, 3)
    """Food : drinks : desserts in train, val and test; 1, 1, 1 is off. test_balanced always has equal numbers."""
    selection_bias: Share = 0.6
    """How far the venue depends on the class in train, val and test; 0 is off. It never does in test_balanced."""
    feature_bias: Share = 0.7
    """Share of the train and val rows whose colour cast is set by the class; the others draw theirs; 0 is off."""
    spatial_bias: Share = 1.0
    """Share of the train and val desserts that are exactly centred; the others lie anywhere; 0 is off."""
    leakage: Share = 0.0
    """Share of the val and test rows that show a train image of their class again, half of them encoded anew; 0 is
    off."""
    label_noise: Share = 0.0
    """Share of the train rows listed as the next class (food as drinks, drinks as desserts, desserts as food); the CSV
    then has a column `true_label` too. 0 is off."""

    @property
    def group_names(self) -> tuple[str, ...]:
        return self._listed().group_names

    def rows(self, labelled: bool = True) -> Iterator[Row | Rejected]:
        """Draws the data set, unless it is there already, and lists it as a CSV of yours would be."""
        self.draw()
        return self._listed().rows(labelled)

    def reader(self) -> AbstractContextManager[Read]:
        """Reads the drawn files."""
        return self._listed().reader()

    def file_of(self, row: Row) -> str | None:
        """The drawn file."""
        return self._listed().file_of(row)

    def _listed(self) -> Csv:
        return Csv(path=self.folder / "labels.csv", group_columns=("venue", "camera"), split_column="split")

    def draw(self) -> Path:
        """Draws the data set, unless it is there already; the path of the CSV that lists it.

        Raises Refusal where the folder holds something else.
        """
        labels, stamp = self.folder / "labels.csv", self.folder / STAMP
        settings = {"drawing": DRAWING, **self.model_dump(mode="json", exclude={"folder"})}
        if labels.exists() and stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == settings:
            return labels
        _prepare(self.folder, settings)
        plan = plan_rows(self)
        progress = Progress("draw", self.images, "images")
        drawn = 0
        for rows in batches(plan):
            pixels, _ = render(plan.take(rows), self.size, [_rng(self.seed, 2 + row) for row in plan.original[rows]])
            for row, image in zip(rows, pixels, strict=True):
                Image.fromarray(image).save(self.folder / plan.path(row), quality=int(plan.quality[row]))
            drawn += len(rows)
            progress.show(drawn)
        _write_csv(labels, plan, _rng(self.seed, 1), true_labels=self.label_noise > 0)
        return labels


class Plan(NamedTuple):
    """What is drawn, for N rows. Lengths are in half image widths, from the centre; colours 0..1."""

    split: Ints
    label: Ints
    number: Ints
    """Of the row within its split and class."""
    subkind: Ints
    """Position in DRAWN."""
    venue: Ints
    camera: Ints
    cast: Ints
    """The class whose colour cast the picture has."""
    quality: Ints
    """JPEG quality, 0..100."""
    centre: Floats
    """[N, 2] x (right), y (down) of the object."""
    scale: Floats
    """Half the size of the object."""
    turn: Floats
    """[N, 2] cosine and sine of the object's rotation."""
    light: Floats
    """[N, 2] gradient of the light along x and y."""
    colours: Floats
    """[N, palette, RGB]"""
    surface: Floats
    """[N, RGB] of the table."""
    free: Floats
    """[N, 32] uniform draws 0..1 for all other variation."""
    listed: Ints
    """The class that the CSV says; another than `label` where the label is noise."""
    original: Ints
    """The row whose image this one shows again; the row itself where nothing leaks."""

    def take(self, rows: Ints) -> "Plan":
        return Plan._make(column[rows] for column in self)

    def path(self, row: int) -> str:
        return f"{list(SPLITS)[self.split[row]]}/{CLASSES[self.label[row]]}-{self.number[row]:05d}.jpg"


def plan_rows(demo: Demo) -> Plan:
    """The parameters of every image. Plants share their random draws: one that is turned off changes nothing else."""
    rng = _rng(demo.seed, 0)
    split, label, number = _cells(demo)
    n, names = len(label), list(SPLITS)
    planted, balanced = split < names.index("test"), split == names.index("test_balanced")
    subkind = FIRST[label] + (rng.random(n) * MANY[label]).astype(int)
    venue = _venues(label, np.where(balanced, 0.0, demo.selection_bias), rng.random(n))
    camera = (rng.random(n) > 0.6).astype(int)
    cast = np.where(rng.random(n) < demo.feature_bias * planted, label, rng.integers(len(CLASSES), size=n))
    scale = rng.uniform(0.52, 0.82, n)
    centred = (rng.random(n) < demo.spatial_bias * planted) & (label == CLASSES.index("desserts"))
    centre = np.where(centred[:, None], 0.0, rng.uniform(-1, 1, (n, 2)) * (1.05 - scale)[:, None])
    angle = rng.uniform(-1, 1, n) * np.where(FROM_ABOVE[subkind], np.pi, 0.35)
    turn = np.stack([np.cos(angle), np.sin(angle)], 1)
    choice, jitter = rng.random((len(PALETTES) + 1, n)), rng.normal(0, 0.04, (n, len(PALETTES) + 1, 3))
    picked = [np.array(p)[(draw * len(p)).astype(int)] for p, draw in zip(PALETTES.values(), choice, strict=False)]
    colours = np.stack(picked, 1) / 255 + jitter[:, 1:]
    surface = np.array(SURFACES)[venue, (choice[-1] * len(SURFACES[0])).astype(int)] / 255 + jitter[:, 0] / 2
    light, free = rng.uniform(-0.25, 0.25, (n, 2)), rng.random((n, 32))
    quality = QUALITY[camera] + rng.integers(-8, 9, n)
    reals = (a.astype(np.float32) for a in (centre, scale, turn, light, colours, surface, free))
    own = np.arange(n)
    drawn = Plan._make([split, label, number, subkind, venue, camera, cast, quality, *reals, label, own])
    return _leaked(demo, _mislabelled(demo, drawn))


def _mislabelled(demo: Demo, plan: Plan) -> Plan:
    draw = _rng(demo.seed, MISLABELLING).random(len(plan.label))
    wrong = (draw < demo.label_noise) & (plan.split == 0)
    return plan._replace(listed=np.where(wrong, (plan.label + 1) % len(CLASSES), plan.label))


def _leaked(demo: Demo, plan: Plan) -> Plan:
    """Rows of val and test whose draw is below the share become a train row of their class: with its venue, camera and
    listed label, since those are of the image, but a place in the split of their own."""
    leaks, again, anew = _rng(demo.seed, LEAKING).random((3, len(plan.label)))
    original = plan.original.copy()
    for label in range(len(CLASSES)):
        train = np.flatnonzero((plan.split == 0) & (plan.label == label))
        rows = (leaks < demo.leakage) & (plan.split > 0) & (plan.split < len(SPLITS) - 1) & (plan.label == label)
        original[rows] = train[(again[rows] * len(train)).astype(int)]
    quality = plan.quality[original]
    other = (original != plan.original) & (anew < 0.5)
    quality = np.where(other, np.where(quality < ENCODED_ANEW, quality + 20, quality - 20), quality)
    return plan.take(original)._replace(split=plan.split, number=plan.number, quality=quality, original=original)


def batches(plan: Plan) -> Iterator[Ints]:
    """Rows to draw together: at most BATCH, of one sub-kind."""
    for subkind in range(len(DRAWN)):
        rows = np.flatnonzero(plan.subkind == subkind)
        yield from (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def render(plan: Plan, size: int, rngs: list[np.random.Generator]) -> tuple[NDArray[np.uint8], Floats]:
    """Draws B rows of one sub-kind: pixels u8 [B, S, S, 3], and how much of each the object covers [B, S, S] 0..1."""
    canvas = Canvas(plan, size)
    _background(canvas)
    _clutter(canvas)
    canvas.place(plan.centre, plan.scale, plan.turn)
    canvas.paint(canvas.ellipse(0.08, 0.12, 0.95, 0.92) / 6, "dark", tint=0.4, opacity=0.35, relief=0)  # a soft shadow
    canvas.covered[:] = 0
    DRAWN[plan.subkind[0]](canvas)
    covered = canvas.covered.copy()
    _occlude(canvas)
    return _photograph(canvas, rngs), covered


class Canvas:
    """B images in the drawing, and the coordinates u (right) and v (down) of every pixel in the present frame."""

    u: Floats
    v: Floats
    per_unit: Floats
    """[B, 1, 1] pixels in a unit of the frame."""

    def __init__(self, plan: Plan, size: int) -> None:
        self.plan, self.size = plan, size
        self.pixels = np.empty((len(plan.label), 3, size, size), np.float32)
        self.covered = np.zeros((len(plan.label), size, size), np.float32)
        axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1
        self.x, self.y = axis[None, None, :], axis[None, :, None]

    def place(self, centre: Floats, scale: Floats, turn: Floats) -> None:
        """Moves the frame: its origin to centre, its unit to scale."""
        cos, sin = (turn / scale[:, None]).T[:, :, None, None]
        x, y = self.x - centre[:, :1, None], self.y - centre[:, 1:, None]
        self.u, self.v = cos * x + sin * y, cos * y - sin * x
        self.per_unit = (scale * np.float32(self.size / 2))[:, None, None]

    def free(self, i: int, low: float = 0.0, high: float = 1.0) -> Floats:
        """[B, 1, 1] the free draws number i, from low to high."""
        return self.plan.free[:, i, None, None] * np.float32(high - low) + np.float32(low)

    def paint(
        self, distance: Floats, palette: str, *, tint: float = 1, opacity: float = 1, relief: float = 0.3
    ) -> None:
        """Fills where the distance is negative, with a rim one pixel soft; relief is how far the rim darkens."""
        alpha = np.clip(0.5 - distance * self.per_unit, 0, 1) * np.float32(opacity)
        shade = np.clip(distance * 4 + 1, 0, 1) * np.float32(-relief * tint) + np.float32(tint)
        colour = self.plan.colours[:, list(PALETTES).index(palette), :, None, None]
        for plane in range(3):
            change = shade * colour[:, plane]
            change -= self.pixels[:, plane]
            change *= alpha
            self.pixels[:, plane] += change
        np.maximum(self.covered, alpha, out=self.covered)

    def disc(self, x: Length, y: Length, radius: Length) -> Floats:
        return _length(self.u - x, self.v - y) - radius

    def ellipse(self, x: float, y: float, width: float, height: float) -> Floats:
        """Half axes; a bound of the distance, exact on the rim."""
        return (_length((self.u - x) * (1 / width), (self.v - y) * (1 / height)) - 1) * min(width, height)

    def box(self, x: Length, y: Length, width: Length, height: Length, corner: float = 0.02) -> Floats:
        """Half width and half height, and the radius of the corners."""
        du, dv = np.abs(self.u - x) - (width - corner), np.abs(self.v - y) - (height - corner)
        return _length(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - corner

    def trapezoid(self, top: float, bottom: float, above: Length, below: float) -> Floats:
        """From the height above to below, half as wide as said at each end; a bound of the distance."""
        sides = np.abs(self.u) - (self.v - above) * ((bottom - top) / (below - above)) - top
        return np.maximum(sides, np.maximum(above - self.v, self.v - below))

    def line(self, x: Length, y: Length, to_x: Length, to_y: Length, radius: float) -> Floats:
        dx, dy, du, dv = to_x - x, to_y - y, self.u - x, self.v - y
        along = np.clip((du * dx + dv * dy) / (dx * dx + dy * dy), 0, 1)
        return _length(du - along * dx, dv - along * dy) - radius

    def dots(self, pitch: float, radius: float) -> Floats:
        """A square lattice of discs."""
        return _length(_wave(self.u * (1 / pitch)), _wave(self.v * (1 / pitch))) * pitch - radius


def _length(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y)


def _wave(x: Floats) -> Floats:
    """Saw-tooth of period 1, from -0.5 to 0.5, zero at whole numbers: an exact stand-in for a sine."""
    return x - np.rint(x)


def _burger(c: Canvas) -> None:
    c.paint(c.box(0, 0.55, 0.82, 0.2, 0.15), "baked")
    c.paint(c.box(0, 0.3, c.free(0, 0.75, 0.95), 0.15, 0.12), "dark")
    c.paint(c.box(0, 0.1, 0.95, 0.08, 0.06), "bright")
    c.paint(c.box(0, -0.02, c.free(1, 0.7, 0.95), 0.07, 0.06), "other")
    bun = np.maximum(c.ellipse(0, 0, 0.88, 0.75), c.v + 0.06)
    c.paint(bun, "baked")
    c.paint(np.maximum(c.dots(0.27, 0.05), bun + 0.1), "pale", relief=0)


def _pizza(c: Canvas) -> None:
    c.paint(c.disc(0, 0, 0.98), "baked")
    c.paint(c.disc(0, 0, 0.8), "bright")
    for i, (x, y) in enumerate(SPIRAL[:7]):
        c.paint(c.disc(x * 0.75, y * 0.75, c.free(i, 0.08, 0.2)), "dark" if i % 3 else "other")
    c.paint(np.maximum(np.minimum(np.abs(c.u), np.abs(c.v)) - 0.015, c.disc(0, 0, 0.98)), "dark", opacity=0.6)


def _slice(c: Canvas) -> None:
    c.paint(c.trapezoid(0.75, 0.02, -0.7, 0.95), "bright", relief=0.15)
    for i, (x, y) in enumerate(((-0.25, -0.35), (0.3, -0.25), (0.02, 0.1))):
        c.paint(c.disc(x, y, c.free(i, 0.1, 0.18)), "other")
    c.paint(c.line(-0.75, -0.75, 0.75, -0.75, 0.15), "baked")


def _salad(c: Canvas) -> None:
    c.paint(c.disc(0, 0, 0.98), "dish")
    c.paint(c.disc(0, 0, 0.82), "dish", tint=0.75)
    for i, (x, y) in enumerate(SPIRAL):
        palette = ("bright", "other", "bright", "pale")[i % 4]
        c.paint(c.disc(x * 0.6, y * 0.6, c.free(i, 0.12, 0.3)), palette, tint=0.8 + 0.05 * (i % 5))


def _sushi(c: Canvas) -> None:
    for x, y in ((-0.5, 0.3), (0.5, 0.3), (0.0, -0.45)):
        c.paint(c.disc(x, y, 0.44), "dark")
        c.paint(c.disc(x, y, 0.35), "pale")
        c.paint(c.disc(x, y, c.free(0, 0.1, 0.2)), "bright")


def _soup(c: Canvas) -> None:
    c.paint(c.disc(0, 0, 0.9), "dish")
    liquid = c.disc(0, 0, 0.72)
    c.paint(liquid, "bright", tint=0.85)
    for i, side in ((0, 0.2), (1, -0.2)):
        c.paint(np.maximum(np.abs(c.disc(side, side / 2, c.free(i, 0.2, 0.5))) - 0.05, liquid), "pale")
    c.paint(np.maximum(c.disc(c.free(2, -0.4, 0.4), c.free(3, -0.4, 0.4), 0.18), liquid), "other")


def _glass(c: Canvas) -> None:
    c.paint(c.line(0.05, 0.4, c.free(0, 0.2, 0.6), -1.0, 0.05), "other")
    c.paint(c.trapezoid(0.55, 0.42, -0.75, 0.95), "pale", opacity=0.45)
    liquid = c.trapezoid(0.48, 0.38, c.free(1, -0.6, 0.1), 0.87)
    c.paint(liquid, "bright", opacity=0.85)
    c.paint(np.maximum(c.box(c.free(2, -0.3, 0.1), c.free(3, -0.2, 0.4), 0.15, 0.15), liquid), "pale", opacity=0.6)


def _mug(c: Canvas) -> None:
    c.paint(np.abs(c.disc(0.55, 0.1, 0.32)) - 0.09, "dish")
    c.paint(c.box(-0.1, 0.1, 0.6, 0.75, 0.12), "dish")
    c.paint(c.box(-0.1, 0.25, 0.6, c.free(0, 0.02, 0.25)), "other", relief=0)
    c.paint(c.ellipse(-0.1, -0.62, 0.6, 0.17), "dish", tint=0.8)
    c.paint(c.ellipse(-0.1, -0.6, 0.5, 0.12), "dark", relief=0)


def _bottle(c: Canvas) -> None:
    c.paint(c.box(0, -0.5, 0.13, 0.4, 0.04), "bright", tint=0.8)
    c.paint(c.box(0, 0.38, c.free(0, 0.3, 0.42), 0.62, 0.16), "bright", tint=0.8)
    c.paint(c.box(0, 0.42, c.free(0, 0.3, 0.42), c.free(1, 0.15, 0.3)), "pale", relief=0)
    c.paint(c.box(0, -0.9, 0.16, 0.1, 0.03), "other")


def _coffee(c: Canvas) -> None:
    c.paint(c.disc(0, 0, c.free(0, 0.75, 0.98)), "dish", tint=0.85)
    c.paint(c.line(0.5, 0, 0.85, 0, 0.09), "dish")
    c.paint(c.disc(0, 0, 0.6), "dish")
    c.paint(c.disc(0, 0, 0.48), "dark")
    c.paint(
        c.disc(c.free(1, -0.15, 0.15), c.free(2, -0.15, 0.15), c.free(3, 0, 0.3)) / 3, "pale", opacity=0.8, relief=0
    )


def _cake(c: Canvas) -> None:
    for i, palette in enumerate(("baked", "pale", "baked", "pale")):
        c.paint(c.box(0, 0.6 - 0.3 * i, 0.85, 0.16), palette, relief=0.1)
    c.paint(c.box(0, -0.55, 0.88, 0.15, 0.08), "bright")
    c.paint(c.disc(c.free(0, -0.5, 0.5), -0.8, 0.17), "other")


def _cone(c: Canvas) -> None:
    cone = c.trapezoid(0.45, 0.03, -0.1, 0.98)
    c.paint(cone, "baked")
    lattice = np.minimum(np.abs(_wave((c.u + c.v) * 4)), np.abs(_wave((c.u - c.v) * 4))) * 0.2 - 0.02
    c.paint(np.maximum(lattice, cone), "dark", opacity=0.5, relief=0)
    c.paint(c.disc(0, -0.3, 0.5), "pale")
    c.paint(c.disc(c.free(0, -0.15, 0.15), c.free(1, -0.75, -0.45), 0.36), "bright")


def _doughnut(c: Canvas) -> None:
    ring = np.abs(c.disc(0, 0, 0.6))
    c.paint(ring - 0.36, "baked")
    icing = ring - c.free(0, 0.2, 0.29)
    c.paint(icing, "bright")
    c.paint(np.maximum(c.dots(0.3, 0.06), icing), "other", relief=0)


def _cupcake(c: Canvas) -> None:
    paper = c.trapezoid(0.65, 0.45, 0.1, 0.95)
    c.paint(paper, "other")
    c.paint(np.maximum(np.abs(_wave(c.u * 5)) * 0.2 - 0.03, paper), "dark", opacity=0.4, relief=0)
    for i, palette in enumerate(("pale", "bright", "pale")):
        c.paint(c.ellipse(0, 0.1 - 0.3 * i, 0.78 - 0.2 * i, 0.27), palette)
    c.paint(c.disc(0, -0.75, c.free(0, 0.05, 0.17)), "dark")


SUBKINDS = {
    "food": (_burger, _pizza, _slice, _salad, _sushi, _soup),
    "drinks": (_glass, _mug, _bottle, _coffee),
    "desserts": (_cake, _cone, _doughnut, _cupcake),
}
DRAWN = [draw for name in CLASSES for draw in SUBKINDS[name]]
MANY = np.array([len(SUBKINDS[name]) for name in CLASSES])  # sub-kinds of each class
FIRST = MANY.cumsum() - MANY  # position in DRAWN of each class's first
FROM_ABOVE = np.array(
    [draw in {_pizza, _salad, _sushi, _soup, _coffee, _doughnut} for draw in DRAWN]
)  # lie at any angle


def _background(c: Canvas) -> None:
    """The table: planks in restaurants, checks at home, speckles in the street."""
    pitch, tilt = c.free(31, 1.5, 5), c.free(30, -0.7, 0.7)
    across, along = _wave((c.x + tilt * c.y) * pitch), _wave((c.y - tilt * c.x) * pitch)
    grain = _wave(c.x * 7.3 + along * 1.7) * _wave(c.y * 8.9 + across * 2.3) * 2
    textures = np.stack([np.minimum(np.abs(across) * 6, 1) * 0.3 + grain * 0.6, np.sign(across * along) * 0.2, grain])
    texture = textures[c.plan.venue, np.arange(len(c.plan.venue))] * c.free(29, 0.2, 1.0) + 1
    np.multiply(c.plan.surface[:, :, None, None], texture[:, None], out=c.pixels)


def _clutter(c: Canvas) -> None:
    """Parts of other tableware, whatever the class: two round ones and a long one."""
    for i, palette, inside in ((9, "dish", "pale"), (12, "other", "dark")):
        c.place(c.plan.free[:, i : i + 2] * 2.6 - 1.3, c.plan.free[:, i + 2] * 0.35 + 0.1, UPRIGHT)
        c.paint(c.disc(0, 0, 1), palette, tint=0.9)
        c.paint(c.disc(0, 0, c.free(i, 0.3, 0.9)), inside, tint=0.9, opacity=0.8)
    c.paint(c.line(c.free(15, -3, 3), c.free(16, -9, 9), c.free(17, -3, 3), c.free(18, -9, 9), 0.12), "dish", tint=0.8)


def _occlude(c: Canvas) -> None:
    """In a fifth of the pictures something long is held in front of the object."""
    x = np.where(c.free(19) < 0.2, c.free(20, -0.9, 0.9), np.float32(9))
    c.paint(c.line(x, 2.5, x + c.free(21, -1.2, 1.2), c.free(22, -0.6, 0.8), 0.15), "baked")


def _photograph(c: Canvas, rngs: list[np.random.Generator]) -> NDArray[np.uint8]:
    """Light, colour cast, lens and sensor: u8 [B, S, S, 3]."""
    plan = c.plan
    gain = CAST_OF_CLASS[plan.cast][:, :, None] * (EXPOSURE[plan.venue][:, None, None] * c.free(23, 0.8, 1.1))
    light = 1 + plan.light[:, 0, None, None] * c.x + plan.light[:, 1, None, None] * c.y
    pixels = c.pixels * gain[..., None] * light[:, None]
    blur = (BLUR[plan.camera][:, None, None] * c.free(24))[..., None]
    for view in (pixels, pixels.swapaxes(2, 3)):
        view[:, :, 1:-1] = view[:, :, 1:-1] * (1 - 2 * blur) + (view[:, :, 2:] + view[:, :, :-2]) * blur
    noise = np.stack([rng.standard_normal(pixels.shape[1:], np.float32) for rng in rngs])
    pixels += noise * (NOISE[plan.camera][:, None, None] * c.free(25, 0.5, 1.5))[..., None]
    return (np.clip(pixels, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8).transpose(0, 2, 3, 1)


def _cells(demo: Demo) -> tuple[Ints, Ints, Ints]:
    """Split, label and number within the two, of every row. Every class has a row in every split."""
    cells: list[tuple[int, int, int]] = []
    for split, (name, share) in enumerate(SPLITS.items()):
        ratio = np.ones(3) if name == "test_balanced" else np.array(demo.imbalance)
        rows = round(demo.images * share)
        counts = np.maximum(np.rint(rows * ratio / ratio.sum()).astype(int), 1)
        counts[ratio.argmax()] += rows - counts.sum()
        cells += [(split, label, number) for label, count in enumerate(counts) for number in range(count)]
    split, label, number = np.array(cells).T
    return split, label, number


def _venues(label: Ints, strength: Floats, draw: Floats) -> Ints:
    """Venue of each row, at uniform draws [N]; even at strength 1 every class is seen in every venue."""
    chance = (1 - strength[:, None]) / len(VENUES) + strength[:, None] * VENUE_OF_CLASS[label]
    return (draw[:, None] > chance.cumsum(1)[:, :-1]).sum(1)


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


def _prepare(folder: Path, settings: dict[str, object]) -> None:
    """Empties the folder of a former set and marks it as ours, before the first image is written."""
    if folder.exists() and any(folder.iterdir()) and not (folder / STAMP).exists():
        fault = Fault(
            str(folder), f"is not empty, and no {STAMP} says that it is ours", "give a new or an empty folder"
        )
        raise Refusal("The demo set cannot be drawn here:", [fault], exit_code=73)
    (folder / "labels.csv").unlink(missing_ok=True)
    for name in SPLITS:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    (folder / STAMP).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_csv(path: Path, plan: Plan, rng: np.random.Generator, true_labels: bool) -> None:
    """Shuffled rows; the photographer and the time depend on nothing."""
    order = rng.permutation(len(plan.label))
    people = rng.choice(PHOTOGRAPHERS, len(order))
    times = [datetime(2025, 1, 1) + timedelta(seconds=int(s)) for s in rng.integers(365 * 86400, size=len(order))]
    part = path.with_suffix(".csv.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        write((*COLUMNS, TRUE_LABEL) if true_labels else COLUMNS)
        for row, person, time in zip(order, people, times, strict=True):
            told = CLASSES[plan.listed[row]], VENUES[plan.venue[row]], CAMERAS[plan.camera[row]]
            cells = plan.path(row), *told, list(SPLITS)[plan.split[row]], person, time.isoformat()
            write((*cells, CLASSES[plan.label[row]]) if true_labels else cells)
    os.replace(part, path)
