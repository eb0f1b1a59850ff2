"""Rows that are the same image, byte for byte: across splits they leak, under two labels one of them is wrong.

No image is read to find them: the index holds a checksum of image, label and groups, and a CRC can be wound back over
bytes that are known. Only rows that then agree in checksum and length are read, to be sure.
"""

import hashlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_loaders.audit.reading import of_images
from data_loaders.index import Index, Ints, tail

POLYNOMIAL = 0x82F63B78
"""CRC-32C (Castagnoli), its bits reversed."""
LISTED = 20


class Copy(NamedTuple):
    """A row that has copies."""

    id: str
    split: str
    label: str


class Duplicates(NamedTuple):
    """Sets of rows with the same image file."""

    rows: int
    """That have a copy."""
    sets: int
    across_splits: int
    """Sets with rows of several splits."""
    across_labels: int
    """Sets with rows of several labels."""
    leaked: dict[str, int]
    """Split -> rows of it that have a copy in the training split."""
    listed: list[list[Copy]]
    """The first sets, those across labels before those across splits."""


def duplicates(index: Index, train: str) -> Duplicates:
    """Of the whole data set."""
    sets = [rows for rows in copies(index) if len(rows) > 1]
    labels = [len(set(index.labels[rows].tolist())) for rows in sets]
    splits = [set(index.split[rows].tolist()) for rows in sets]
    order = sorted(range(len(sets)), key=lambda s: (labels[s] == 1, len(splits[s]) == 1, int(sets[s][0])))
    in_train = index.splits.index(train)
    leaking = [row for rows, where in zip(sets, splits, strict=True) if in_train in where for row in rows.tolist()]
    counts = np.bincount(index.split[leaking], minlength=len(index.splits)) if leaking else [0] * len(index.splits)
    return Duplicates(
        rows=sum(map(len, sets)),
        sets=len(sets),
        across_splits=sum(len(where) > 1 for where in splits),
        across_labels=sum(n > 1 for n in labels),
        leaked={name: int(n) for name, n in zip(index.splits, counts, strict=True) if name != train},
        listed=[[_copy(index, row) for row in sets[s].tolist()[:LISTED]] for s in order[:LISTED]],
    )


def copies(index: Index) -> list[Ints]:
    """Rows that have the same bytes, in order, for every such set."""
    key = image_checksums(index).astype(np.uint64) << np.uint64(32) | index.length.astype(np.uint64)
    _, place, counts = np.unique(key, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(counts[place] > 1)
    found: dict[bytes, list[int]] = defaultdict(list)
    for row, digest in zip(suspects.tolist(), of_images(index, suspects, _digest, "compare"), strict=True):
        found[digest].append(row)
    return [np.array(rows) for rows in found.values() if len(rows) > 1]


def image_checksums(index: Index) -> NDArray[np.uint32]:
    """CRC-32C of the image alone of each row, [N]."""
    forward, backward = _tables()
    register = ~index.crc32c.astype(np.uint32)
    cells, place = np.unique(np.column_stack([index.labels, index.groups]), axis=0, return_inverse=True)
    values = list(index.group_values.values())
    for cell, (label, *groups) in enumerate(cells.tolist()):
        rows = np.flatnonzero(place.ravel() == cell)
        state = register[rows]
        for byte in reversed(tail(label, *(values[a][v] for a, v in enumerate(groups)))):
            entry = backward[state >> np.uint32(24)]
            state = (state ^ forward[entry]) << np.uint32(8) | (entry ^ np.uint32(byte))
        register[rows] = state
    return ~register


def _tables() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """What a byte does to the register, [256], and which entry of it has each uppermost byte."""
    forward = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        forward = forward >> np.uint32(1) ^ np.where(forward & np.uint32(1), np.uint32(POLYNOMIAL), np.uint32(0))
    return forward, np.argsort(forward >> np.uint32(24)).astype(np.uint32)


def _copy(index: Index, row: int) -> Copy:
    return Copy(index.ids[row].as_py(), index.splits[index.split[row]], index.classes[index.labels[row]])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
