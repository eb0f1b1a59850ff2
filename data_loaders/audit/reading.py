"""Images of many rows, each read with its checksum and handed to a function, in threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

from data_loaders.images import made_of
from data_loaders.index import Index, Ints, Reader
from data_loaders.progress import Progress

T = TypeVar("T")
AT_ONCE = 1024
THREADS = min(8, len(os.sched_getaffinity(0)))


def of_images(index: Index, rows: Ints, work: Callable[[bytes, int, int], T], what: str) -> list[T]:
    """`work` of what is stored of each row [N], of the most pixels it may have and of the data set's `side`, in their
    order; `what` names it on the line of progress. Raises DamagedRow."""
    progress, found = Progress(what, len(rows), "images"), list[T]()
    with closing(Reader(index)) as reader, ThreadPoolExecutor(THREADS, "audit") as pool:
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE].tolist()
            found += pool.map(lambda row: made_of(reader, row, work), part)
            progress.show(len(found))
    return found
