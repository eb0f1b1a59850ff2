"""Pairs of looks (data_loaders/look.py) that differ in few bits, all of them, without comparing all with all.

Multi-index hashing (Norouzi et al. 2012): the 64 bits are cut into BANDS, and looks that differ in d bits differ in at
most d // BANDS of them in some band. So in each band only those are compared whose bits there are that close.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from data_loaders.index import Ints
from data_loaders.look import LOOKS_ALIKE

BANDS = ((0, 22), (22, 21), (43, 21))
"""First bit and width of each."""
AT_ONCE = 2**21
"""Pairs that are held at once."""
SAMPLE = 4096

Looks = NDArray[np.uint64]


def reach(looks: Looks, sides: Ints, most: int) -> int:
    """In how many bits the looks of a pair may differ if about `most` pairs are wanted; LOOKS_ALIKE at most, -1: none.

    Judged by a sample, the same each time.
    """
    if len(looks) > SAMPLE:
        chosen = np.random.default_rng(0).choice(len(looks), SAMPLE, replace=False)
        scale, looks, sides = (len(looks) / SAMPLE) ** 2, looks[chosen], sides[chosen]
    else:
        scale = 1.0
    away = np.zeros(65, np.int64)
    for start in range(0, len(looks), 256):
        part = slice(start, start + 256)
        differ = np.bitwise_count(looks[part, None] ^ looks)
        away += np.bincount(differ[sides[part, None] != sides], minlength=65)
    pairs = away.cumsum() / 2 * scale
    return int(np.searchsorted(pairs[: LOOKS_ALIKE + 1], most, "right")) - 1


def pairs_within(looks: Looks, sides: Ints, bits: int) -> Iterator[tuple[Ints, Ints]]:
    """Places of both of each pair whose looks differ in `bits` at most, and whose sides differ; each pair once."""
    radius = bits // len(BANDS)
    for number, (first, width) in enumerate(BANDS):
        key = (looks >> np.uint64(first)).astype(np.int64) & ((1 << width) - 1)
        order = np.argsort(key, kind="stable")
        ends = np.bincount(key, minlength=1 << width).cumsum()
        for a, b in _close(key[order], ends, width, radius):
            differ = looks[order[a]] ^ looks[order[b]]
            good = (np.bitwise_count(differ) <= bits) & (sides[order[a]] != sides[order[b]])
            for earlier, size in BANDS[:number]:  # where the pair was found already
                within = differ >> np.uint64(earlier) & np.uint64((1 << size) - 1)
                good &= np.bitwise_count(within) > radius
            yield order[a[good]], order[b[good]]


def _close(key: Ints, ends: Ints, width: int, radius: int) -> Iterator[tuple[Ints, Ints]]:
    """Places of pairs whose keys, which are in order, differ in `radius` bits at most."""
    starts = ends - np.diff(ends, prepend=0)
    place = np.arange(len(key))
    yield from _expand(place, place + 1, ends[key])
    unset = [np.flatnonzero(~key >> bit & 1) for bit in range(width)]  # the one of a pair with it has no other twin
    for count in range(1, radius + 1):
        for flipped in combinations(range(width), count):
            rows = unset[flipped[-1]]
            other = key[rows] ^ sum(1 << bit for bit in flipped)
            yield from _expand(rows, starts[other], ends[other])


def _expand(rows: Ints, first: Ints, last: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Each of the rows with each place from its first to before its last."""
    some = np.flatnonzero(last > first)
    rows, first, count = rows[some], first[some], (last - first)[some]
    total = count.cumsum()
    cut = np.searchsorted(total, np.arange(AT_ONCE, int(total[-1]) + AT_ONCE, AT_ONCE)) if len(total) else []
    for part in np.split(np.arange(len(rows)), np.unique(cut)):
        if len(part):
            n = count[part]
            within = np.arange(n.sum()) - np.repeat(n.cumsum() - n, n)
            yield np.repeat(rows[part], n), np.repeat(first[part], n) + within
