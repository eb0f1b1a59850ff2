"""What `jobs.audit` found of a data set and of a model, for a page."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.settings import parse
from trainer.config import Config
from trainer.report.figures import LINE, POINT, RECT, STEP, TEXT, TIP, figure

SIDE = 320
ROW = 22
LABEL, NAMED = 190, 32
"""Room for a name, in pixels and in characters."""
MAPS = 6
"""Classes whose map is shown."""


class ShownAudit(NamedTuple):
    """An audit of a data set."""

    data: str
    """Fingerprint of the data set."""
    tree: dict[str, Any]
    properties: Markup
    """Each property against chance."""


class ShownProbe(NamedTuple):
    """A probe of a model on a split."""

    tree: dict[str, Any]
    maps: list[tuple[str, Markup]]
    """What is mapped, and accuracy by place."""


def read_audit(run: Path) -> ShownAudit | None:
    """The audit that lies in the data set a run was trained on; None where there is none of that very data."""
    path = parse(Config, [str(run / "model" / "config.yaml")]).data.path / "audit.json"
    tree = _tree(path) if path.exists() else {}
    if tree.get("data") != _tree(run / "model" / "facts.json")["data"]:
        return None
    return ShownAudit(tree["data"], tree, _properties(tree["properties"]))


def read_probes(run: Path, weights: Path) -> tuple[ShownProbe, ...]:
    """All probes of a run, after checksums agree; refuses those of other weights."""
    folders = sorted(p for p in (run / "probe").glob("[!.]*") if p.is_dir())
    faults = [fault for folder in folders for fault in _faults(folder, durable.sha256(weights))]
    if faults:
        raise Refusal("The probes cannot be shown:", faults, 65)
    trees = [_tree(folder / "probe.json") for folder in folders]
    return tuple(ShownProbe(tree, _maps(tree)) for tree in trees)


def _faults(folder: Path, weights: str) -> list[Fault]:
    fix = "audit again with run=…, or remove it"
    if damage := durable.damage(folder):
        return [Fault(str(folder), damage, fix)]
    if _tree(folder / "probe.json")["model"] != weights:
        return [Fault(str(folder), "is of other weights than the model's", fix)]
    return []


def _properties(lines: list[dict[str, Any]]) -> Markup:
    """Each property: the share of other images that the class stands above, against the band of chance."""
    told = [line for line in lines if line["label"]]
    foot = ROW * len(told) + 8
    parts = [LINE.format("ideal", LABEL + SIDE / 2, 4, LABEL + SIDE / 2, foot)]
    for i, line in enumerate(told):
        c, y = line["contrast"], 4 + ROW * (i + 0.5)
        name = line["property"]["name"]
        parts.append(TEXT.format("end", LABEL - 6, y + 4, f"{name}: {line['label']}"[:NAMED]))
        parts.append(RECT.format("mass", LABEL + SIDE * c["low"], y - 6, SIDE * (c["high"] - c["low"]), 12, 0.35, ""))
        tip = f"{name} of {line['label']}: above {c['above']:.0%} of the others, by chance {c['low']:.0%} to "
        tip += f"{c['high']:.0%}, p = {c['p']:.2g}, n = {c['n']:,}"
        parts.append(POINT.format(LABEL + SIDE * c["above"], y, TIP.format(tip)))
    for share in (0, 0.5, 1):
        parts.append(TEXT.format("mid", LABEL + SIDE * share, foot + 14, f"{share:.0%}"))
    return figure(parts, "Properties of images against the label", LABEL + SIDE + 24, foot + 24)


def _maps(tree: dict[str, Any]) -> list[tuple[str, Markup]]:
    """Balanced accuracy by place, and recall of the classes to which the centre matters most."""
    places = tree["spatial"]["places"]
    maps = [("balanced accuracy", [(p["x"], p["y"], p["balanced_accuracy"], "") for p in places])]
    for gain in tree["spatial"]["centre"][:MAPS]:
        k = tree["classes"].index(gain["name"])
        recalls = [(p["x"], p["y"], p["recalls"][k]) for p in places]
        maps.append((f"recall of {gain['name']}", [(x, y, r["value"], _interval(r)) for x, y, r in recalls]))
    return [(name, _map(name, cells)) for name, cells in maps]


def _map(name: str, cells: list[tuple[float, float, float, str]]) -> Markup:
    """A heat map in the order of the frame; the shade is the value."""
    columns, rows = sorted({cell[0] for cell in cells}), sorted({cell[1] for cell in cells})
    parts: list[Markup] = []
    for x, y, value, interval in cells:
        left, top = 4 + STEP * columns.index(x), 4 + STEP * rows.index(y)
        tip = TIP.format(f"{name} {value:.2f}{interval}, moved right by {x:+.1%} and down by {y:+.1%} of the frame")
        parts.append(RECT.format("right", left, top, STEP - 1, STEP - 1, value, tip))
        parts.append(TEXT.format("mid", left + STEP / 2, top + 0.6 * STEP, f"{value:.2f}"))
    return figure(parts, name, STEP * len(columns) + 8, STEP * len(rows) + 8)


def _interval(value: dict[str, Any]) -> str:
    return f" [{value['low']:.2f}, {value['high']:.2f}], n = {value['n']:,}"


def _tree(path: Path) -> Any:
    return json.loads(path.read_bytes())
