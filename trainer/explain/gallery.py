"""The pictures that explain a model on one split, as PNG files with a list of what they show, published whole.

A gallery is run/explain/SPLIT/{NNNN-what.png, explanations.json, MANIFEST.json}. Names of files never come from data.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from data_loaders import durable
from data_loaders.decode import Pixels
from data_loaders.index import Index
from data_loaders.loader import Data, exact_batches
from data_loaders.progress import Progress
from trainer.explain.choose import Section, Wrong
from trainer.explain.heatmaps import grad_cam, occlusion
from trainer.explain.maximize import maximize
from trainer.metrics.catalogue import Floats

LIST = "explanations.json"
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in lightness (ITU-R BT.601)."""
FOR = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""RGB of evidence for a class, from none to the most: matplotlib's inferno, whose lightness grows evenly."""
AGAINST = ((0, 0, 4), (20, 40, 110), (30, 100, 170), (70, 170, 220), (190, 240, 255))
"""RGB of evidence against a class, likewise."""


class Look(NamedTuple):
    """How closely to look at a model."""

    window: int
    """Side of the square that covers parts of an image, in pixels; it moves by a third of that."""
    steps: int
    """Of the optimisation of an image for each class; 0 makes none."""
    seed: int
    """Where that starts."""


def save(
    folder: Path,
    model: nn.Module,
    index: Index,
    data: Data,
    sections: list[Section],
    look: Look,
    facts: Mapping[str, Any],
) -> None:
    """Publishes the pictures of chosen rows, as evaluation sees them, and of each class, beside what is said of them;
    `facts` are what they were made with."""
    rows = [row for section in sections for row in section.rows]
    classes = index.classes if look.steps else ()
    progress = Progress(f"explain {folder.name}", len(rows) + len(classes), "rows and classes")
    with durable.publishing(folder) as aside:
        explained: list[dict[str, Any]] = []
        for row in _explained(aside, model, index, data, rows, look.window):
            explained.append(row)
            progress.show(len(explained))
        maximized: list[dict[str, Any]] = []
        for k, name in enumerate(classes):
            maximized.append(_maximized(aside, model, k, name, data.size, look))
            progress.show(len(explained) + len(maximized))
        left = iter(explained)
        tree = [{"title": section.title, "rows": list(islice(left, len(section.rows)))} for section in sections]
        durable.write_json(aside / LIST, {**facts, "sections": tree, "classes": maximized})


def pictures(folder: Path) -> Iterator[tuple[str, Path]]:
    """Caption and file of every picture of a gallery."""
    tree = json.loads((folder / LIST).read_bytes())
    for row in (row for section in tree["sections"] for row in section["rows"]):
        for picture in row["pictures"]:
            said = f"{row['id']}: {row['label']}, called {row['called']}, p = {row['probability']:.3f}"
            yield f"{said}; {picture['what']}", folder / picture["file"]
    for maximized in tree["classes"]:
        said = f"{maximized['class']}: activation maximization, log-odds {maximized['log_odds']:.1f} nats"
        yield said, folder / maximized["file"]


def overlay(image: Pixels, heat: Floats) -> Pixels:
    """A heatmap [H, W] over the greyed image [H, W, 3]; each map has its own scale, from none to its most."""
    most = np.abs(heat).max()
    strength = np.abs(heat) / most if most > 0 else np.zeros(heat.shape)
    colour = np.where(heat[..., None] >= 0, _ramp(FOR, strength), _ramp(AGAINST, strength))
    grey = 0.7 * (image @ np.array(LUMA))[..., None]
    cover = 0.8 * np.sqrt(strength)[..., None]
    return ((1 - cover) * grey + cover * colour).round().astype(np.uint8)


def _ramp(colours: tuple[tuple[int, int, int], ...], strength: Floats) -> Floats:
    """The colour, [H, W, 3], of each strength in 0 … 1, [H, W]."""
    marks = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(strength, marks, channel) for channel in zip(*colours, strict=True)], -1)


def _explained(
    aside: Path, model: nn.Module, index: Index, data: Data, rows: list[Wrong], window: int
) -> Iterator[dict[str, Any]]:
    """What is said of each row, after its pictures are written."""
    device = next(model.parameters()).device
    left = iter(enumerate(rows))
    for batch in exact_batches(index, data, np.array([row.row for row in rows], np.int64)):
        pixels = batch.images[batch.valid]
        part = list(islice(left, len(pixels)))
        images = torch.from_numpy(pixels).to(device)
        called = torch.tensor([index.classes.index(row.called) for _, row in part], device=device)
        label = torch.tensor([index.classes.index(row.label) for _, row in part], device=device)
        maps = torch.stack(
            [
                grad_cam(model, images, called),
                grad_cam(model, images, label),
                occlusion(model, images, called, window, max(window // 3, 1)),
            ],
            1,
        )
        for (number, row), image, heat in zip(part, pixels, maps.cpu().numpy(), strict=True):
            yield row._asdict() | {"pictures": _pictures(aside, number, row, image.transpose(1, 2, 0), heat)}


def _pictures(aside: Path, number: int, row: Wrong, image: Pixels, heat: Floats) -> list[dict[str, str]]:
    """Writes the pictures of a row; heat is [3, H, W]: Grad-CAM of `called` and of the label, occlusion of `called`."""
    low, high = heat[2].min(), heat[2].max()
    shown = [
        ("image", "image", image),
        ("called", f"Grad-CAM for {row.called}", overlay(image, heat[0])),
        ("label", f"Grad-CAM for {row.label}", overlay(image, heat[1])),
        ("covered", f"occlusion for {row.called}, {low:.2f} to {high:.2f} nats", overlay(image, heat[2])),
    ]
    return [{"file": _write(aside, f"{number:04d}-{kind}.png", pixels), "what": what} for kind, what, pixels in shown]


def _maximized(aside: Path, model: nn.Module, k: int, name: str, size: int, look: Look) -> dict[str, Any]:
    """What is said of a class, after its picture is written."""
    found = maximize(model, k, size, look.steps, look.seed)
    file = _write(aside, f"class-{k:04d}.png", found.image)
    return {"class": name, "log_odds": found.log_odds, "file": file}


def _write(aside: Path, name: str, image: Pixels) -> str:
    """Writes a PNG file; its name."""
    Image.fromarray(image).save(aside / name)
    return name
