"""A second reader of data sets, made from docs/format.md alone; it shares no code with the project's own."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import pyarrow as pa
import pyarrow.ipc

NUMBERS = {"label": pa.int32(), "split": pa.int16(), "shard": pa.int32(), "offset": pa.int64(), "length": pa.int32()}
NUMBERS |= {"crc32c": pa.uint32(), "image_crc32c": pa.uint32(), "width": pa.int32(), "height": pa.int32()}
NUMBERS |= {"quality": pa.uint8(), "look": pa.uint64(), "unit": pa.uint64()}
LISTS = {"classes": list, "groups": dict, "splits": list, "shards": list, "history": list, "index": dict, "order": dict}


class Row(NamedTuple):
    id: str
    label: str
    groups: dict[str, str]
    split: str
    image: bytes


def rows(folder: Path, generation: int | None = None, shards: set[str] | None = None) -> Iterator[Row]:
    """Every row, or those of the shards with these names. Raises ValueError or OSError at damage."""
    manifest = manifest_of(folder, generation)
    groups: dict[str, list[str]] = manifest["groups"]
    files: dict[int, int] = {}
    try:
        table = index_of(folder, manifest)
        check_order(folder, manifest, table)
        for row in table.to_pylist():
            shard, label = row["shard"], row["label"]
            name = manifest["shards"][shard]["name"]
            if shards is not None and name not in shards:
                continue
            if shard not in files:
                files[shard] = open_file(folder / "shards" / name)
            image = os.pread(files[shard], row["length"], row["offset"])
            values = {group: names[row[f"group.{group}"]] for group, names in groups.items()}
            covered = (
                image
                + label.to_bytes(8, "little")
                + b"".join(t.encode() + b"\0" for t in (*values.values(), row["id"]))
            )
            require(google_crc32c.value(covered) == row["crc32c"], f"{name}: row {row['id']!r} is damaged")
            yield Row(row["id"], manifest["classes"][label], values, manifest["splits"][row["split"]], image)
    finally:
        for file in files.values():
            os.close(file)


def manifest_of(folder: Path, generation: int | None) -> dict[str, Any]:
    newest = parsed(folder / "dataset.json")
    if generation is None or newest["generation"] == generation:
        return newest
    published = [(g["generation"], g["fingerprint"]) for g in newest["history"] if g["generation"] == generation]
    require(bool(published), f"there is no generation {generation}")
    earlier = parsed(folder / "generations" / f"{generation:06d}.json")
    require((earlier["generation"], earlier["fingerprint"]) == published[0], "the copy is of another generation")
    return earlier


def parsed(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(content_of(path, 2**30))
        require((tree["format"], tree["version"]) == ("evenkeel-dataset", 3), f"{path}: is of another format")
        require(digest({k: v for k, v in tree.items() if k != "checksum"}) == tree["checksum"], f"{path}: is damaged")
        rows_are = {name: tree[name] for name in ("classes", "groups", "splits", "side", "index", "order", "shards")}
        require(digest(rows_are)[:16] == tree["fingerprint"], f"{path}: is damaged")
        require(all(isinstance(tree[name], kind) for name, kind in LISTS.items()), f"{path}: is forged")
        for file in (tree["index"], tree["order"], *tree["shards"]):
            require(re.fullmatch(r"\w[\w.-]*\.arrow", file["name"]) is not None, f"{path}: names a strange file")
            require(len(file["name"]) <= 120 and file["bytes"] >= 0, f"{path}: names a strange file")
        return tree
    except (KeyError, TypeError, AttributeError, RecursionError) as wrong:
        raise ValueError(f"{path}: is no manifest") from wrong


def index_of(folder: Path, manifest: dict[str, Any]) -> pa.Table:
    groups = [(f"group.{name}", pa.int32()) for name in manifest["groups"]]
    path = folder / manifest["index"]["name"]
    table = table_of(path, manifest["index"], pa.schema([("id", pa.large_string()), *groups, *NUMBERS.items()]))
    sizes = [shard["bytes"] for shard in manifest["shards"]]
    ends = {"label": len(manifest["classes"]), "split": len(manifest["splits"]), "shard": len(sizes)}
    ends |= {f"group.{name}": len(values) for name, values in manifest["groups"].items()}
    for name, end in ends.items():
        require(all(0 <= number < end for number in table[name].to_pylist()), f"{path}: {name} is out of range")
    places = zip(*(table[name].to_pylist() for name in ("shard", "offset", "length")), strict=True)
    require(isinstance(manifest["side"], int) and 0 <= manifest["side"] <= 1024, f"{path}: has pixels of another size")
    if side := manifest["side"]:
        shapes = zip(*(table[name].to_pylist() for name in ("length", "height", "width")), strict=True)
        require(all(shape == (side * side * 3, side, side) for shape in shapes), f"{path}: has other pixels")
    require(all(o >= 0 and n >= 0 and o + n <= sizes[s] for s, o, n in places), f"{path}: leads behind a shard")
    return table


def check_order(folder: Path, manifest: dict[str, Any], index: pa.Table) -> None:
    """Whether the order is what it should be of these rows."""
    names, path = [f"group.{name}" for name in manifest["groups"]], folder / manifest["order"]["name"]
    kept = [("split", pa.int16()), ("label", pa.int32()), *((name, pa.int32()) for name in names)]
    table = table_of(path, manifest["order"], pa.schema([*kept, ("rows", pa.large_list(pa.int64()))]))
    classes, cells = dict[Any, list[int]](), dict[Any, list[int]]()
    for row, (split, label, *values) in enumerate(zip(*(index[name].to_pylist() for name, _ in kept), strict=True)):
        classes.setdefault((split, label, *(-1 for _ in values)), []).append(row)
        cells.setdefault((split, label, *values), []).append(row)
    expected = [(*key, rows) for lines in (classes, cells)[: 2 if names else 1] for key, rows in sorted(lines.items())]
    found = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    require(found == expected, f"{path}: is of other rows")


def table_of(path: Path, about: dict[str, Any], schema: pa.Schema) -> pa.Table:
    content = content_of(path, about["bytes"])
    require(hashlib.sha256(content).hexdigest() == about["sha256"], f"{path}: is damaged")
    try:
        reader = pa.ipc.open_file(pa.py_buffer(content))
        require(reader.num_record_batches == 1, f"{path}: has other rows")
        table = reader.read_all()
        table.validate(full=True)
    except pa.ArrowException as wrong:
        raise ValueError(f"{path}: {wrong}") from wrong
    require(table.schema == schema, f"{path}: has other columns")
    require(len(table) == about["rows"] and not any(c.null_count for c in table.columns), f"{path}: has other rows")
    return table


def content_of(path: Path, most: int) -> bytes:
    with os.fdopen(open_file(path), "rb") as file:
        content = file.read(most + 1)
    require(len(content) <= most, f"{path}: is too long")
    return content


def open_file(path: Path) -> int:
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(f"{path}: is no file")
    return file


def digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
