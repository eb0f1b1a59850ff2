"""Rows that are the same image: across splits they leak, under two labels one of them is wrong.

Exact copies are found by checksum and length in the index, and only those are read, to be sure. Near copies (encoded
again, resized, cropped a little, brightened, captioned) are sought across splits: those whose looks in the index are
alike are read, and their details compared. How many are alike by chance is judged by the same search among mirrored
training images, of which there are no copies (as decoys: Elias and Gygi 2007).
"""

import hashlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_loaders.audit.likeness import ALIKE, likeness
from data_loaders.audit.looks import pairs_within, reach
from data_loaders.audit.reading import of_images
from data_loaders.decode import decode
from data_loaders.examine import small_grey, small_grey_of
from data_loaders.formats.read import read_header
from data_loaders.index import Index, Ints
from data_loaders.look import ACROSS

LISTED = 20
PAIRS = 100_000
"""Pairs whose pictures are compared at most, those first whose looks are nearest."""
HUB = 8
"""Images of one split with the very same look of which no more are compared: flat and empty ones come in thousands."""
AT_ONCE = 512
MIRROR = np.uint64(int.from_bytes(np.packbits(ACROSS % 2 == 1).tobytes(), "big"))
"""Bits of a look that turn when the picture is mirrored: those of waves that are odd across it."""


class Copy(NamedTuple):
    """A row that has copies."""

    id: str
    split: str
    label: str


class NearPair(NamedTuple):
    """Two rows of different splits that are nearly the same picture."""

    likeness: float
    """Correlation of their details, ALIKE to 1."""
    copies: list[Copy]


class Near(NamedTuple):
    """Near copies across splits, exact ones left out."""

    bits: int
    """Of 64 of a look, in which both of a pair differed at most; fewer where there are very many pairs, -1 where none
    was compared."""
    unknown: int
    """Rows without a look, not compared: flat, or ingested by their headers alone."""
    left_out: int
    """Rows not compared since very many have the same look, or pairs were too many."""
    pairs: int
    leaked: dict[str, int]
    """Split -> rows of it that have a near copy in the training split, and no exact one."""
    listed: list[NearPair]
    """The first pairs, those with the training split first, then the most alike."""
    by_chance: int = 0
    """Rows that are as near to a mirrored image of the training split: about as many of `leaked` are no copies."""


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
    near: Near


def duplicates(index: Index, train: str) -> Duplicates:
    """Of the whole data set."""
    sets = copies(index)
    labels = [len(set(index.labels[rows].tolist())) for rows in sets]
    splits = [set(index.split[rows].tolist()) for rows in sets]
    order = sorted(range(len(sets)), key=lambda s: (labels[s] == 1, len(splits[s]) == 1, int(sets[s][0])))
    leaking = _leaking(index, sets, train)
    return Duplicates(
        rows=sum(map(len, sets)),
        sets=len(sets),
        across_splits=sum(len(where) > 1 for where in splits),
        across_labels=sum(n > 1 for n in labels),
        leaked=_by_split(index, leaking, train),
        listed=[[_copy(index, row) for row in sets[s].tolist()[:LISTED]] for s in order[:LISTED]],
        near=near_copies(index, train, leaking),
    )


def leaks(index: Index, train: str) -> dict[str, int]:
    """Split -> rows of it that have an exact copy in the training split."""
    return _by_split(index, _leaking(index, copies(index), train), train)


def _leaking(index: Index, sets: list[Ints], train: str) -> NDArray[np.bool_]:
    """Rows of the sets that have a row in the training split, [N]."""
    leaking, in_train = np.zeros(len(index.labels), np.bool_), index.splits.index(train)
    for rows in sets:
        leaking[rows] = in_train in index.split[rows]
    return leaking


def copies(index: Index) -> list[Ints]:
    """Rows that have the same bytes, in order, for every such set."""
    _, place, counts = np.unique(_files(index), return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(counts[place] > 1)
    found: dict[bytes, list[int]] = defaultdict(list)
    for row, digest in zip(suspects.tolist(), of_images(index, suspects, _digest, "compare"), strict=True):
        found[digest].append(row)
    return [np.array(rows) for rows in found.values() if len(rows) > 1]


def near_copies(index: Index, train: str, leaking: NDArray[np.bool_]) -> Near:
    """Of rows of different splits; rows that are `leaking`, [N], are not counted again."""
    images, image = _images(index)
    looked = images[index.look[images] != 0]
    chosen = looked[_ranks(index.look[looked], index.split[looked]) < HUB]
    look, split, files = index.look[chosen], index.split[chosen].astype(np.int64), _files(index)
    bits, in_train = reach(look, split, PAIRS), index.splits.index(train)
    left, right = _nearest(look, split, bits)
    unlike = files[chosen[left]] != files[chosen[right]]
    left, right = chosen[left[unlike]], chosen[right[unlike]]
    alike = _likeness(index, left, right)
    good = alike >= ALIKE
    left, right, alike = left[good], right[good], alike[good]
    with_train = (index.split[left] == in_train) | (index.split[right] == in_train)
    found, decoys = np.zeros(len(images), bool), np.zeros(len(images), bool)
    found[image[left[with_train]]] = found[image[right[with_train]]] = True
    decoys[image[_near_mirrored(index, chosen, bits, in_train)]] = True
    order = np.lexsort((right, left, -alike, ~with_train))[:LISTED].tolist()
    return Near(
        bits=bits if len(look) else -1,
        unknown=int((index.look == 0).sum()),
        left_out=len(looked) - len(chosen) if bits >= 0 else len(looked),
        pairs=len(left),
        leaked=_by_split(index, found[image] & ~leaking, train),
        listed=[NearPair(float(alike[i]), [_copy(index, int(side[i])) for side in (left, right)]) for i in order],
        by_chance=sum(_by_split(index, decoys[image] & ~leaking, train).values()),
    )


def _near_mirrored(index: Index, chosen: Ints, bits: int, in_train: int) -> Ints:
    """Rows of other splits that are nearly the same as a mirrored image of the training split."""
    trains = index.split[chosen] == in_train
    left, right = _nearest(
        np.where(trains, index.look[chosen] ^ MIRROR, index.look[chosen]), trains.astype(np.int64), bits
    )
    left, right = chosen[np.where(trains[left], right, left)], chosen[np.where(trains[left], left, right)]
    return left[_likeness(index, left, right, mirrored=True) >= ALIKE]


def _nearest(look: NDArray[np.uint64], split: Ints, bits: int) -> tuple[Ints, Ints]:
    """Places of both of each pair, the nearest PAIRS of them."""
    none = np.zeros(0, np.int64)
    parts = list(pairs_within(look, split, bits)) if bits >= 0 else []
    left, right = (np.concatenate([none, *(part[side] for part in parts)]) for side in (0, 1))
    nearest = np.argsort(np.bitwise_count(look[left] ^ look[right]), kind="stable")[:PAIRS]
    return left[nearest], right[nearest]


def _likeness(index: Index, left: Ints, right: Ints, mirrored: bool = False) -> NDArray[np.float64]:
    """Of both rows of each pair, the right one `mirrored`; each image is read once."""
    rows, place = np.unique(np.concatenate([left, right]), return_inverse=True)
    pictures = of_images(index, rows, _small, "compare")
    a, b = place[: len(left)], place[len(left) :]
    found = [np.zeros(0)]
    for start in range(0, len(left), AT_ONCE):
        sides = (np.stack([pictures[p] for p in side[start : start + AT_ONCE]]).astype(np.float32) for side in (a, b))
        one, other = sides
        found.append(likeness(one, np.ascontiguousarray(other[:, :, ::-1]) if mirrored else other))
    return np.concatenate(found)


def _files(index: Index) -> NDArray[np.uint64]:
    """What tells the image files of rows apart, [N], but for one chance in 2^32 of those with the same length."""
    return index.image_crc32c.astype(np.uint64) << np.uint64(32) | index.length.astype(np.uint64)


def _images(index: Index) -> tuple[Ints, Ints]:
    """The first row of each image in each split, and the place in those of each row, [N]."""
    key = np.stack([_files(index), index.split.astype(np.uint64)], 1)
    _, first, image = np.unique(key, axis=0, return_index=True, return_inverse=True)
    return first, image.ravel()


def _ranks(look: NDArray[np.uint64], split: NDArray[np.integer]) -> Ints:
    """How many before each one have the same look and split, [N]."""
    order = np.lexsort((split, look))
    new = np.flatnonzero(np.diff(look[order], prepend=0).astype(bool) | np.diff(split[order], prepend=-1).astype(bool))
    ranks = np.empty(len(look), np.int64)
    ranks[order] = np.arange(len(look)) - np.repeat(new, np.diff(new, append=len(look)))
    return ranks


def _by_split(index: Index, rows: NDArray[np.bool_], train: str) -> dict[str, int]:
    """Split -> how many of its rows are among `rows`, [N], for all but the training split."""
    counts = np.bincount(index.split[rows], minlength=len(index.splits))
    return {name: int(n) for name, n in zip(index.splits, counts, strict=True) if name != train}


def _copy(index: Index, row: int) -> Copy:
    return Copy(index.ids[row].as_py(), index.splits[index.split[row]], index.classes[index.labels[row]])


def _digest(content: bytes, *_: int) -> bytes:
    return hashlib.sha256(content).digest()


def _small(content: bytes, pixel_cap: int, side: int) -> NDArray[np.uint8]:
    if side:
        return small_grey_of(decode(content, side=side))
    return small_grey(content, read_header(content, pixel_cap, whole=False))
