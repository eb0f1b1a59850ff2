"""The pictures that `jobs.explain` left in a run's folder, for a page that fetches nothing."""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

from data_loaders import durable
from data_loaders.faults import Fault, Refusal


class Explanation(NamedTuple):
    """Of one split; each picture has its `src`, a data: URI."""

    split: str
    sections: list[dict[str, Any]]
    """Title, and rows with their id, label, called, probability, decision, groups and pictures."""
    classes: list[dict[str, Any]]
    """Class, log_odds and picture, by activation maximization, of each class."""


def read_explanations(run: Path, weights: Path) -> tuple[Explanation, ...]:
    """All that is explained of a run, after checksums agree; refuses explanations of other weights."""
    galleries = sorted(p for p in (run / "explain").glob("[!.]*") if p.is_dir())
    faults = [fault for gallery in galleries for fault in _faults(gallery, durable.sha256(weights))]
    if faults:
        raise Refusal("The explanations cannot be shown:", faults, 65)
    return tuple(_read(gallery) for gallery in galleries)


def _faults(gallery: Path, weights: str) -> list[Fault]:
    fix = "explain again, or remove it"
    if damage := durable.damage(gallery):
        return [Fault(str(gallery), damage, fix)]
    if _tree(gallery)["model"] != weights:
        return [Fault(str(gallery), "is of other weights than the model's", fix)]
    return []


def _read(gallery: Path) -> Explanation:
    tree = _tree(gallery)
    for picture in (p for section in tree["sections"] for row in section["rows"] for p in row["pictures"]):
        picture["src"] = _uri(gallery, picture["file"])
    for maximized in tree["classes"]:
        maximized["src"] = _uri(gallery, maximized["file"])
    return Explanation(tree["split"], tree["sections"], tree["classes"])


def _tree(gallery: Path) -> dict[str, Any]:
    return json.loads((gallery / "explanations.json").read_bytes())


def _uri(gallery: Path, name: str) -> str:
    content = (gallery / Path(name).name).read_bytes()  # a name alone: nothing outside of the gallery is read
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
