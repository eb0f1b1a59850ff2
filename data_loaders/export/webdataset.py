"""WebDataset: tars of samples, each an image, the number of its class and a .json with all that is known of it."""

import io
import json
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_loaders import durable
from data_loaders.export.names import safe
from data_loaders.export.rows import as_file, sizes, spans
from data_loaders.export.target import Done, Files, Target, suffixes_of
from data_loaders.index import Index, Ints, Reader

HEAD = 3 * 1024
"""Bytes that a sample takes in a tar beside its image, about: three headers, and what fills blocks up."""


class WebDataset(Target):
    """Tars SPLIT-000000.tar, … of samples: .jpg (.png, .webp), .cls and .json, with id, split, label and groups.

    Keys are numbers, since a key ends at its first dot and ids may be anything.
    """

    kind: Literal["webdataset"] = "webdataset"
    megabytes: Annotated[int, Field(gt=0, le=10_000)] = 256
    """Size of a tar, at most, in 10^6 bytes."""

    def write(self, index: Index, splits: dict[str, Ints], out: Path, done: Done) -> Files:
        files: Files = {}
        with closing(Reader(index)) as reader:
            for split, rows in splits.items():
                files[split] = []
                for start, stop in spans(sizes(index, rows) + HEAD, self.megabytes * 10**6):
                    name = f"{safe(split)}-{len(files[split]):06d}.tar"
                    files[split].append(Path(name))
                    with tarfile.open(out / name, "w", format=tarfile.USTAR_FORMAT) as tar:
                        for number, row in enumerate(rows[start:stop].tolist(), start):
                            content = as_file(index, reader.read(row))
                            about = _about(index, row)
                            members = {suffixes_of(content)[0]: content, ".cls": str(index.labels[row]).encode()}
                            members[".json"] = json.dumps(about, ensure_ascii=False).encode()
                            for suffix, member in members.items():
                                _add(tar, f"{number:09d}{suffix}", member)
                    done(stop - start)
        durable.write_json(out / "classes.json", list(index.classes))
        return files

    def source(self, out: Path) -> str:
        return f"source.kind=webdataset source.path={out} source.label=json:label source.split_column=split"


def _about(index: Index, row: int) -> dict[str, str]:
    """Field -> text. A group column has its own name, so `split` gives way to one of that name."""
    groups = {name: values[index.groups[row, a]] for a, (name, values) in enumerate(index.group_values.items())}
    split = index.splits[index.split[row]]
    return {"split": split, **groups, "id": index.ids[row].as_py(), "label": index.classes[index.labels[row]]}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """The same bytes each time: no date, no owner."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
