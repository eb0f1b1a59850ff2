"""A split as a Hugging Face `datasets.Dataset`, whose images stay where they are: in the mapped shards."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_loaders import durable, manifest
from data_loaders.faults import Fault, Refusal
from data_loaders.index import index_of
from data_loaders.manifest import SHARDS, File

if TYPE_CHECKING:
    import datasets


def to_hf(path: str | Path, split: str = "train", generation: int | None = None) -> "datasets.Dataset":
    """Image, ClassLabel and group columns; nothing is copied. Needs the package `datasets`.

    Every shard is hashed before Arrow opens it. Raises Refusal (65) where one is not as it was written. The files are
    mapped, so they must stay as they are while the data set is used.
    """
    import datasets

    folder = Path(path).resolve()
    made = manifest.read(folder, generation)
    index = index_of(folder, made)
    rows = index.rows_of(split)
    shards = [made.shards[s] for s in np.unique(index.shard[rows]).tolist()]
    with ThreadPoolExecutor(4, "hash") as pool:
        wrong = [
            fault for fault in pool.map(lambda shard: _damage(folder / SHARDS / shard.name, shard), shards) if fault
        ]
    if wrong:
        raise Refusal("The data set is damaged:", wrong, 65)
    table = pa.concat_tables([_mapped(folder / SHARDS / shard.name) for shard in shards])
    if len(table) != len(rows):
        raise Refusal("The data set is damaged:", [Fault(str(folder), "its shards and its index differ")], 65)
    return datasets.Dataset(table, split=split_name(split), fingerprint=f"{made.fingerprint}-{split}")


def split_name(split: str) -> "datasets.NamedSplit":
    """As Hugging Face admits it: letters, digits and _, in parts with a dot between them."""
    import datasets

    return datasets.NamedSplit(plain_split(split))


def plain_split(split: str) -> str:
    return re.sub(r"\W", "_", split)


def _damage(path: Path, shard: File) -> Fault | None:
    try:
        if path.stat().st_size == shard.bytes and durable.sha256(path) == shard.sha256:
            return None
        what = "is not as it was written"
    except OSError as wrong:
        what = (wrong.strerror or str(wrong)).lower()
    return Fault(str(path), what, "ingest again, or restore it")


def _mapped(path: Path) -> pa.Table:
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    table.validate(full=True)
    return table
