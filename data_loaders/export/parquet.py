"""The layout of the Hugging Face hub: Parquet files data/SPLIT-00000-of-0000N.parquet."""

from pathlib import Path
from typing import Annotated, Literal

import pyarrow.parquet as pq
from pydantic import Field

from data_loaders.export.hugging_face import plain_split
from data_loaders.export.rows import schema, sizes, spans, tables
from data_loaders.export.target import Done, Files, Target
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index, Ints


class HuggingFace(Target):
    """Parquet files and a card, which `load_dataset(FOLDER)` and the hub read as they are."""

    kind: Literal["huggingface"] = "huggingface"
    megabytes: Annotated[int, Field(gt=0, le=10_000)] = 256
    """Images in a file, at most, in 10^6 bytes."""

    def write(self, index: Index, splits: dict[str, Ints], out: Path, done: Done) -> Files:
        names = {split: plain_split(split) for split in splits}
        twice = [s for s, name in names.items() if list(names.values()).count(name) > 1]
        if twice:
            fix = "ingest them under other names"
            raise Refusal(
                "The splits cannot be told apart:", [Fault(s, f"would be called {names[s]}", fix) for s in twice]
            )
        (out / "data").mkdir()
        files: Files = {}
        for split, rows in splits.items():
            parts = list(spans(sizes(index, rows), self.megabytes * 10**6))
            paths = [Path("data", f"{names[split]}-{n:05d}-of-{len(parts):05d}.parquet") for n in range(len(parts))]
            for path, (start, stop) in zip(paths, parts, strict=True):
                with pq.ParquetWriter(out / path, schema(index), write_page_checksum=True) as writer:
                    for table in tables(index, rows[start:stop]):
                        writer.write_table(table)
                        done(len(table))
            files[split] = paths
        return files

    def source(self, out: Path) -> str:
        return f"source.kind=parquet source.path={out / 'data'}"
