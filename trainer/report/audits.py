"""What `jobs.audit` found of a data set and of a model, for a page."""

import json
from collections.abc import Iterator
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
SKILLS = 4
"""Properties that are shown of the label and of each group column."""
MAPS = 6
"""Classes whose map is shown."""
CELLS = 12
"""Changes of classes in groups that are shown."""


class ShownAudit(NamedTuple):
    """An audit of a data set."""

    data: str
    """Fingerprint of the data set."""
    tree: dict[str, Any]
    properties: Markup
    """Each property against chance."""
    skills: list[tuple[str, dict[str, Any]]]
    """What is told, the label or a group column, and the properties that tell it best."""


class ShownProbe(NamedTuple):
    """A probe of a model on a split."""

    tree: dict[str, Any]
    maps: list[tuple[str, Markup]]
    """What is mapped, and accuracy by place."""
    covered: list[tuple[str, Markup]]
    """Of each class, what it costs to cover a place up."""
    cells: list[dict[str, Any]]
    """Changes of classes in groups, the most certain to differ from other groups first, each with its `meaning`."""


def read_audit(run: Path) -> ShownAudit | None:
    """The audit that lies in the data set a run was trained on; None where there is none of that very data, or only one
    of an earlier version of the audit."""
    path = parse(Config, [str(run / "model" / "config.yaml")]).data.path / "audit.json"
    tree = _tree(path) if path.exists() else {}
    if tree.get("data") != _tree(run / "model" / "facts.json")["data"] or "of_groups" not in tree:
        return None
    return ShownAudit(tree["data"], tree, _properties(tree["properties"]), list(_skills(tree)))


def read_probes(run: Path, weights: Path) -> tuple[ShownProbe, ...]:
    """All probes of a run, after checksums agree; refuses those of other weights."""
    folders = sorted(p for p in (run / "probe").glob("[!.]*") if p.is_dir())
    faults = [fault for folder in folders for fault in _faults(folder, durable.sha256(weights))]
    if faults:
        raise Refusal("The probes cannot be shown:", faults, 65)
    trees = [_tree(folder / "probe.json") for folder in folders]
    return tuple(ShownProbe(tree, _maps(tree), _covered(tree), _cells(tree)) for tree in trees)


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


def _skills(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for of, lines in [("label", tree["properties"]), *((g["column"], g["properties"]) for g in tree["of_groups"])]:
        told = [line for line in lines if line["label"]]
        for line in sorted(told, key=lambda line: -line["skill"]["value"])[:SKILLS]:
            yield of, line


def _maps(tree: dict[str, Any]) -> list[tuple[str, Markup]]:
    """Balanced accuracy by place, and recall of the classes to which the centre matters most."""
    places = tree["spatial"]["places"]
    maps = [("balanced accuracy", [p["balanced"] for p in places])]
    for gain in tree["spatial"]["centre"][:MAPS]:
        k = tree["classes"].index(gain["name"])
        maps.append((f"recall of {gain['name']}", [p["recalls"][k] for p in places]))
    at = [(p["x"], p["y"], f"moved right by {p['x']:+.1%} and down by {p['y']:+.1%} of the frame") for p in places]
    return [(name, _map(name, at, values, 1.0)) for name, values in maps]


def _covered(tree: dict[str, Any]) -> list[tuple[str, Markup]]:
    """Of the classes that lose most at the rim; the darkest place is the most that any class loses anywhere."""
    of_class = sorted(tree["attention"]["covered"], key=lambda c: -c["excess"]["value"])[:MAPS]
    most = max((drop["value"] for c in of_class for drop in c["drops"]), default=0)
    at = [(x, y, f"covered {x:.0%} from the left and {y:.0%} from the top") for x, y in tree["attention"]["places"]]
    return [(c["name"], _map(f"nats lost by {c['name']}", at, c["drops"], most)) for c in of_class]


def _cells(tree: dict[str, Any]) -> list[dict[str, Any]]:
    found = [{"meaning": c["meaning"], **cell} for c in tree["features"]["changes"] for cell in c["cells"]]
    return sorted((cell for cell in found if cell["p"] is not None), key=lambda cell: cell["p"])[:CELLS]


def _map(name: str, at: list[tuple[float, float, str]], values: list[dict[str, Any]], most: float) -> Markup:
    """A heat map in the order of the frame; the shade is the value, darkest at `most`."""
    columns, rows = sorted({x for x, _, _ in at}), sorted({y for _, y, _ in at})
    parts: list[Markup] = []
    for (x, y, place), value in zip(at, values, strict=True):
        left, top = 4 + STEP * columns.index(x), 4 + STEP * rows.index(y)
        shade = min(max(value["value"] / most, 0), 1) if most > 0 else 0
        tip = TIP.format(f"{name} {value['value']:.2f}{_interval(value)}, {place}")
        parts.append(RECT.format("right", left, top, STEP - 1, STEP - 1, shade, tip))
        parts.append(TEXT.format("mid", left + STEP / 2, top + 0.6 * STEP, f"{value['value']:.2f}"))
    return figure(parts, name, STEP * len(columns) + 8, STEP * len(rows) + 8)


def _interval(value: dict[str, Any]) -> str:
    interval = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{interval}, n = {value['n']:,}"


def _tree(path: Path) -> Any:
    return json.loads(path.read_bytes())
