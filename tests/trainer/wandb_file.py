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


def history(path: Path) -> list[dict[str, Any]]:
    return [_values(r.history.item) for r in records(path) if r.WhichOneof("record_type") == "history"]


def config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            found |= _values(record.run.config.update)
    return found


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            found |= _values(record.summary.update)
    return found


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
