"""Reads an offline W&B run file: LevelDB log framing around protobuf records (wandb ships no reader any more)."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """Every record of the file, in order."""
    from wandb.proto import wandb_internal_pb2

    kind: Any = wandb_internal_pb2

    for payload in _payloads(path.read_bytes()):
        record = kind.Record()
        record.ParseFromString(payload)
        yield record


def run(path: Path) -> Any:
    """The record that begins the run."""
    return next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")


def history(path: Path) -> list[dict[str, Any]]:
    return [_values(r.history.item) for r in records(path) if r.WhichOneof("record_type") == "history"]


def config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            found |= _values(record.run.config.update)
        elif record.WhichOneof("record_type") == "config":
            found |= _values(record.config.update)
    return found


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            found |= _values(record.summary.update)
    return found


def table(path: Path, name: str) -> list[dict[str, Any]]:
    """Rows of the last table of this name; of a chart's, which is called NAME_table."""
    place = [line[f"{name}/path"] for line in history(path) if f"{name}/path" in line][-1]
    tree = json.loads((path.parent / "files" / place).read_bytes())
    return [dict(zip(tree["columns"], row, strict=True)) for row in tree["data"]]


def charts(path: Path) -> dict[str, dict[str, Any]]:
    """Settings of each chart by its name."""
    start = "_wandb/visualize/"
    return {
        name.removeprefix(start): value["panel_config"]
        for name, value in config(path).items()
        if name.startswith(start)
    }


def artifacts(path: Path, kind: str) -> list[Any]:
    """Records of the artifacts of this type; `use_after_commit` says that one is an input of the run."""
    found = [record.artifact for record in records(path) if record.WhichOneof("record_type") == "artifact"]
    return [artifact for artifact in found if artifact.type == kind]


def stats(path: Path) -> list[dict[str, Any]]:
    """System metrics of the machine that the collector runs on."""
    return [_values(r.stats.item) for r in records(path) if r.WhichOneof("record_type") == "stats"]


def exit_codes(path: Path) -> list[int]:
    return [r.exit.exit_code for r in records(path) if r.WhichOneof("record_type") == "exit"]


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _payloads(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    place, parts = HEADER, b""
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        if not length and not kind:
            return
        part = content[place + HEADER : place + HEADER + length]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        place += HEADER + length
        parts = part if kind in (1, 2) else parts + part  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            yield parts
