"""A data set as a source of Ray Data: only the shards that its manifest names, each row with its checksum."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from data_loaders.export.rows import spans, tables
from data_loaders.index import Ints, open_index

if TYPE_CHECKING:
    import ray.data

TASK_BYTES = 64 * 10**6
"""Most image bytes that one task reads."""


def read_ray(
    path: str | Path, split: str = "train", generation: int | None = None, **options: Any
) -> "ray.data.Dataset":
    """The rows of a split, with the columns of its shards; pixels are arrays [side, side, 3]. A damaged row fails the
    read with DamagedRow.

    The folder must lie where every node sees it; `options` go to ray.data.read_datasource.
    """
    import ray.data

    index = open_index(Path(path).resolve(), generation)
    rows = index.rows_of(split)
    parts = [rows[start:stop] for start, stop in spans(index.length[rows], TASK_BYTES)]

    class ShardDatasource(ray.data.Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return int(index.length[rows].sum(dtype=np.int64))

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> Any:
            from ray.data.block import BlockMetadata

            least = np.array_split(rows, max(1, min(parallelism, len(rows))))
            divided = least if len(least) > len(parts) else parts
            return [
                ray.data.ReadTask(
                    partial(_read, index.folder, index.manifest.generation, part),
                    BlockMetadata(len(part), int(index.length[part].sum(dtype=np.int64)), None, None),
                    per_task_row_limit=per_task_row_limit,
                )
                for part in divided
            ]

    return ray.data.read_datasource(ShardDatasource(), **options)


def _read(folder: Path, generation: int, rows: Ints) -> Iterator[pa.Table]:
    """In a task, whose index the driver has verified."""
    yield from tables(open_index(folder, generation, verifies=False), rows, tensors=True)
