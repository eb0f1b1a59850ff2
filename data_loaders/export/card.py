"""A data set card: the README.md that Hugging Face reads, with every count and its n, and what nobody said marked."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from data_loaders import manifest
from data_loaders.audit.audit import Audit, class_counts, groups
from data_loaders.audit.duplicates import duplicates
from data_loaders.audit.findings import findings
from data_loaders.contents.counts import tables
from data_loaders.contents.overview import LEAST, Overview
from data_loaders.contents.sizes import Spread
from data_loaders.export.about import About
from data_loaders.export.hugging_face import plain_split
from data_loaders.export.target import Files
from data_loaders.index import Index
from data_loaders.manifest import Manifest
from data_loaders.shards import features

NOT_GIVEN = "not given"
LINES = 500
"""Most lines of a table."""
KNOWN = re.compile(
    r"(apache-2\.0|mit|(cc-)?(cc0|by(-nc)?(-sa|-nd)?)-\d\.\d|cc0-1\.0|odbl|pddl|odc-by|gpl-3\.0|bsd-3-clause)"
)
"""Licenses that the hub knows by these names."""
TOLD = {
    "Collection": "collection",
    "Annotation": "annotation",
    "Uses": "uses",
    "What it must not be used for": "misuses",
    "Biases that are known": "biases",
    "Limitations": "limitations",
    "Personal and sensitive information": "personal",
    "Impact on people": "impact",
    "Maintenance": "maintenance",
}
"""Heading -> field of About."""


def card(
    about: About,
    o: Overview,
    made: Manifest,
    index: Index,
    found: list[str],
    files: Files | None = None,
    side: int = 0,
) -> str:
    """`found` says which imbalances were counted. `files`, of Arrow or Parquet, are those that Hugging Face is to read,
    below the README; with a `side`, they hold pixels."""
    tree = _metadata(about, o) | _hugging_face(o, index, files or {}, side)
    head = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{head}---\n\n" + "\n".join(_body(about, o, _divided(index.folder, made), found)) + "\n"


def imbalances(index: Index, o: Overview) -> list[str]:
    """What can be told from chance, in words: of an audit of this very data if there is one, else from the index."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or not one of ours
        tree = json.loads(manifest.content_of(index.folder / "audit.json", manifest.SIZE_CAP))
        if tree["data"] == index.fingerprint:
            return [str(finding["text"]) for finding in tree["findings"]]
    found = Audit(
        data=index.fingerprint,
        train=o.train,
        classes=class_counts(index, o.train),
        groups=groups(index, o.train),
        duplicates=duplicates(index, o.train),
        properties=[],
        measured=0,
        at_most=None,
    )
    return [finding.text for finding in findings(found)]


def small_cells(o: Overview) -> int:
    """Classes in groups of which the training split has fewer than LEAST rows."""
    return sum(line.rows[o.train] < LEAST for line in o.counts.cells or o.counts.classes)


def markdown(text: str) -> str:
    """Text as text, on one line: nothing in it is markup, of Markdown or of HTML."""
    line = re.sub(r"[\x00-\x1f\x7f\s]+", " ", text).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#|~$!])", r"\\\1", line)


def _metadata(about: About, o: Overview) -> dict[str, Any]:
    spdx = about.license.lower()
    license_ = spdx if KNOWN.fullmatch(spdx) else "other" if spdx else "unknown"
    return {
        "pretty_name": about.name,
        "license": license_,
        **({"license_name": about.license} if license_ == "other" else {}),
        "task_categories": ["image-classification"],
        "size_categories": [_size_category(sum(o.counts.splits.values()))],
        "tags": ["evenkeel", "croissant"],
    }


def _hugging_face(o: Overview, index: Index, files: Files, side: int) -> dict[str, Any]:
    """Where the rows are and what their columns mean, so that `load_dataset` asks nothing."""
    if not files:
        return {}
    names = {split: plain_split(split) for split in files}
    sizes = {split: int(index.length[index.rows_of(split)].sum(dtype="int64")) for split in files}
    paths = [{"split": names[split], "path": [path.as_posix() for path in files[split]]} for split in files]
    told = {
        "features": [_feature(*item) for item in features(index.classes, index.group_values, side).items()],
        "splits": [{"name": names[s], "num_bytes": sizes[s], "num_examples": o.counts.splits[s]} for s in files],
        "download_size": sum(sizes.values()),
        "dataset_size": sum(sizes.values()),
    }
    return {"configs": [{"config_name": "default", "data_files": paths}], "dataset_info": told}


def _feature(name: str, kind: dict[str, Any]) -> dict[str, Any]:
    if kind["_type"] == "ClassLabel":
        names = {str(k): label for k, label in enumerate(kind["names"])}
        return {"name": name, "dtype": {"class_label": {"names": names}}}
    if kind["_type"] == "Sequence":
        return {"name": name, "sequence": kind["feature"]["dtype"], "length": kind["length"]}
    return {"name": name, "dtype": "image" if kind["_type"] == "Image" else kind["dtype"]}


def _size_category(n: int) -> str:
    ends = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = max(0, len(str(n)) - 3)
    return f"n<{ends[0]}" if place == 0 else f"{ends[place - 1]}<n<{ends[place]}" if place < len(ends) else "n>1T"


def _body(about: About, o: Overview, divided: str, found: list[str]) -> Iterator[str]:
    yield f"# {markdown(about.name)}\n\n{_said(about.description)}\n"
    rows, cells = sum(o.counts.splits.values()), len(o.counts.cells or o.counts.classes)
    yield f"{rows:,} images of {len(o.counts.classes):,} classes; data set `{o.data}`, generation {o.generation}.\n"
    yield "## Rows\n"
    for names, lines in tables(o.counts, o.groups):
        cut = [(*map(markdown, line.name), *(f"{n:,}" for n in line.rows.values())) for line in lines[:LINES]]
        yield _table((*names, *o.counts.splits), cut)
        yield f"… and {len(lines) - LINES:,} more.\n" if len(lines) > LINES else ""
    if o.counts.empty:
        yield f"{o.counts.empty:,} classes in groups have no row at all.\n"
    yield f"## How rows were divided\n\n{divided}\n"
    yield f"## Dropped rows\n\n{_dropped(o)}\n"
    yield "## Imbalances that were counted\n"
    yield from (f"- {markdown(line)}" for line in found)
    yield f"- {small_cells(o):,} of {cells:,} classes in groups have fewer than {LEAST} rows in {markdown(o.train)}\n"
    yield "## Images\n"
    yield ", ".join(f"{n:,} {markdown(what)}" for what, n in o.images.items()) + "\n"
    every = o.sizes[0]
    spans = {"width, pixels": every.width, "height, pixels": every.height, "bytes": every.bytes}
    spans |= {"JPEG quality": every.quality}
    yield _table((f"in {o.train}", "n", "least", "median", "most"), [(name, *_cells(s)) for name, s in spans.items()])
    for heading, field in TOLD.items():
        yield f"## {heading}\n\n{_said(getattr(about, field))}\n"
    yield "## License, creator, citation\n"
    facts = {"License": about.license, "Creator": about.creator, "Page": about.url, "Citation": about.citation}
    facts |= {"Published": str(about.published or ""), "Version": about.version}
    yield "\n".join(f"- {name}: {_said(value)}" for name, value in facts.items())


def _said(text: str) -> str:
    return markdown(text) if text.strip() else f"*{NOT_GIVEN}*"


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """`lines` are Markdown already."""
    rows = [tuple(map(markdown, head)), tuple("---" for _ in head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _cells(spread: Spread) -> tuple[str, ...]:
    return f"{spread.n:,}", *(f"{value:,.0f}" if spread.n else "–" for value in spread[1:])


def _divided(folder: Path, made: Manifest) -> str:
    """Of each generation, where they differ."""
    told = {m.generation: _how(m) for m in (*(manifest.read(folder, g.generation) for g in made.history), made)}
    if len(set(told.values())) == 1:
        return told[made.generation]
    return "\n".join(f"- Rows that came with generation {generation}: {how}" for generation, how in told.items())


def _how(made: Manifest) -> str:
    """No path is told: those are of the machine that ingested. Another writer may have had other settings."""
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        return _drawn(made)
    return f"*{NOT_GIVEN}*"


def _drawn(made: Manifest) -> str:
    source, drawn = made.settings["source"], made.settings["splits"]
    if source.get("split_column"):
        return "As its source says."
    parts = ", ".join(f"{name} {drawn[name]:g}" for name in ("val", "test") if drawn.get(name))
    unit = source.get("split_by")
    how = f"Never dividing rows of one {markdown(unit)}. " if unit else ""
    given = [*source.get("held_out", ()), *(source.get("splits") or ())]
    kept = f"As its source says: {', '.join(map(markdown, given))}. " if given else ""
    rest = f"seed {drawn['seed']}: {parts or 'nothing'}, the rest train. {how}"
    return f"{kept}Drawn stratified by class and group, {rest}".strip()


def _dropped(o: Overview) -> str:
    if not o.dropped.rows:
        return "None."
    by = {"class": o.dropped.by_class, **o.dropped.by_group}
    lines = [(markdown(name), markdown(value), f"{n:,}") for name, values in by.items() for value, n in values.items()]
    return f"{o.dropped.rows:,} rows could not be used.\n\n" + _table(("of", "value", "rows"), lines)
