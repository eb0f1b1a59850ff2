"""Croissant 1.1 with the terms of its RAI extension: what a machine reads of a data set, its files and its columns."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from data_loaders.contents.overview import LEAST, Overview
from data_loaders.export.about import About
from data_loaders.export.card import NOT_GIVEN, small_cells
from data_loaders.index import Index
from data_loaders.shards import features

ARROW, PARQUET = "application/vnd.apache.arrow.file", "application/x-parquet"
SPLIT = {
    ARROW: r"^(?:.*/)?([^/]+)-g\d+-\d{5,}-\d\d+-[0-9a-f]{8}\.arrow$",
    PARQUET: r"^(?:.*/)?([^/]+)-\d{5}-of-\d{5}\.parquet$",
}
"""How the name of a file says its split."""
TYPES = {"string": "sc:Text", "uint32": "cr:UInt32"}
TERMS = (
    *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileProperty"),
    *(
        "fileObject",
        "fileSet",
        "format",
        "includes",
        "isArray",
        "isLiveDataset",
        "jsonPath",
        "key",
        "md5",
        "parentField",
    ),
    *("path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator", "source"),
    *("subField", "transform"),
)
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    **{term: f"cr:{term}" for term in TERMS},
}
"""As the examples of the specification have it, whole, since readers compare."""


class Part(NamedTuple):
    """A file of rows."""

    path: Path
    """Relative to croissant.json."""
    bytes: int
    sha256: str


def croissant(
    about: About, o: Overview, index: Index, parts: list[Part], kind: str, found: list[str]
) -> dict[str, Any]:
    """JSON-LD. `kind` is the encoding of the files, ARROW or PARQUET; `found` says which imbalances were counted."""
    given = {
        "url": about.url,
        "datePublished": about.published and about.published.isoformat(),
        "creator": about.creator and {"@type": about.creator_kind, "name": about.creator},
    }
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": about.name,
        "description": about.description or NOT_GIVEN,
        "license": about.license or NOT_GIVEN,
        "citeAs": about.citation or NOT_GIVEN,
        "version": about.version,
        "keywords": ["image-classification", "evenkeel"],
        **{name: value for name, value in given.items() if value},
        **_responsible(about, o, found),
        "distribution": [*(_file(part, kind) for part in parts), _files(parts, kind)],
        "recordSet": [_classes(index), _rows(index, kind)],
    }


def _responsible(about: About, o: Overview, found: list[str]) -> dict[str, Any]:
    """Terms of the RAI extension."""
    cells = len(o.counts.cells or o.counts.classes)
    small = f"{small_cells(o):,} of {cells:,} classes in groups have fewer than {LEAST} rows in {o.train}"
    by = {"class": o.dropped.by_class, **o.dropped.by_group}
    dropped = [f"by {name}: {', '.join(f'{n:,} {value}' for value, n in v.items())}" for name, v in by.items() if v]
    missing = f"{o.dropped.rows:,} rows could not be used and were dropped"
    return {
        "rai:dataCollection": about.collection or NOT_GIVEN,
        "rai:dataCollectionMissingData": "; ".join([missing, *dropped]),
        "rai:dataAnnotationProtocol": about.annotation or NOT_GIVEN,
        "rai:dataBiases": [*found, small, about.biases or f"others: {NOT_GIVEN}"],
        "rai:dataLimitations": [about.limitations or NOT_GIVEN, f"Not to be used: {about.misuses or NOT_GIVEN}"],
        "rai:dataUseCases": about.uses or NOT_GIVEN,
        "rai:dataSocialImpact": about.impact or NOT_GIVEN,
        "rai:personalSensitiveInformation": about.personal or NOT_GIVEN,
        "rai:dataReleaseMaintenancePlan": about.maintenance or NOT_GIVEN,
    }


def _file(part: Part, kind: str) -> dict[str, Any]:
    path = part.path.as_posix()
    known = {"contentUrl": path, "contentSize": f"{part.bytes} B", "encodingFormat": kind, "sha256": part.sha256}
    return {"@type": "cr:FileObject", "@id": _id(path), "name": part.path.name, **known}


def _files(parts: list[Part], kind: str) -> dict[str, Any]:
    """All of them, by name; not `containedIn` them, which mlcroissant would take for archives."""
    includes = [part.path.as_posix() for part in parts]
    return {"@type": "cr:FileSet", "@id": "files", "name": "files", "encodingFormat": kind, "includes": includes}


def _classes(index: Index) -> dict[str, Any]:
    fields = [
        {"@type": "cr:Field", "@id": "classes/number", "dataType": "sc:Integer"},
        {"@type": "cr:Field", "@id": "classes/name", "dataType": "sc:Text"},
    ]
    data = [{"classes/number": k, "classes/name": name} for k, name in enumerate(index.classes)]
    key = {"@id": "classes/number"}
    return {"@type": "cr:RecordSet", "@id": "classes", "name": "classes", "key": key, "field": fields, "data": data}


def _rows(index: Index, kind: str) -> dict[str, Any]:
    side = index.side if kind == ARROW else 0
    fields = [_field(name, column, index) for name, column in features(index.classes, index.group_values, side).items()]
    split = {"fileSet": {"@id": "files"}, "extract": {"fileProperty": "fullpath"}, "transform": {"regex": SPLIT[kind]}}
    fields.append({"@type": "cr:Field", "@id": "rows/~split", "name": "split", "dataType": "sc:Text", "source": split})
    about = "A row is an image with its label and groups; crc32c covers image, label, groups and id."
    return {"@type": "cr:RecordSet", "@id": "rows", "name": "rows", "description": about, "field": fields}


def _field(name: str, column: dict[str, Any], index: Index) -> dict[str, Any]:
    source: dict[str, Any] = {"fileSet": {"@id": "files"}, "extract": {"column": name}}
    field = {"@type": "cr:Field", "@id": f"rows/{_id(name)}", "name": name, "source": source}
    if column["_type"] == "Image":
        source["transform"] = {"jsonPath": "bytes"}
        return {**field, "dataType": "sc:ImageObject"}
    if column["_type"] == "Sequence":
        told = f"Pixels of {index.side} x {index.side}, row by row from the top, each red, green and blue, 0 to 255."
        shape = {"isArray": True, "arrayShape": str(column["length"])}
        return {**field, "dataType": "cr:UInt8", "description": told, **shape}
    if column["_type"] == "ClassLabel":
        told = f"A number in classes, 0 … {len(index.classes) - 1}."
        return {**field, "dataType": "sc:Integer", "description": told}
    told = f"Group column, one of: {', '.join(index.group_values[name])[:2000]}" if name in index.group_values else ""
    return {**field, "dataType": TYPES[column["dtype"]], **({"description": told} if told else {})}


def _id(text: str) -> str:
    """What mlcroissant takes for an @id: no spaces, not even as %20; two texts never have the same."""
    return re.sub(r"[^A-Za-z0-9_./-]", lambda match: "".join(f"~{byte:02X}" for byte in match[0].encode()), text)
