"""Image files in images/SPLIT/CLASS/…, as torchvision's ImageFolder wants them, and a list of them with the groups."""

import csv
from contextlib import closing
from pathlib import Path
from typing import Literal

from data_loaders.export.names import image_name, safe
from data_loaders.export.rows import as_file
from data_loaders.export.target import Done, Files, Target, suffixes_of
from data_loaders.index import Index, Ints, Reader


class Folder(Target):
    """Files images/SPLIT/CLASS/NAME, and labels.csv with path, label, split, id and groups.

    A name is the id of its row; what cannot stand in the name of a file is written as %XX.
    """

    kind: Literal["folder"] = "folder"

    def write(self, index: Index, splits: dict[str, Ints], out: Path, done: Done) -> Files:
        columns = ["path", "label", "split", "id"]
        groups = [name if name not in columns else f"group.{name}" for name in index.group_values]
        with (
            closing(Reader(index)) as reader,
            (out / "labels.csv").open("w", newline="", encoding="utf-8") as file,
        ):
            listed = csv.writer(file)
            listed.writerow([*columns, *groups])
            for split, rows in splits.items():
                folders = [Path("images", safe(split), safe(name)) for name in index.classes]
                for folder in folders:
                    (out / folder).mkdir(parents=True)  # also that of an empty class, so that numbers stay the same
                for row in rows.tolist():
                    content = as_file(index, reader.read(row))
                    label, name = int(index.labels[row]), index.ids[row].as_py()
                    fitting = suffixes_of(content)
                    path = folders[label] / image_name(name, fitting[0], fitting)
                    with (out / path).open("xb") as image:
                        image.write(content)
                    values = [v[index.groups[row, a]] for a, v in enumerate(index.group_values.values())]
                    listed.writerow([path.as_posix(), index.classes[label], split, name, *values])
                    done(1)
        return {split: [Path("images", safe(split))] for split in splits}

    def source(self, out: Path) -> str:
        return f"source.kind=csv source.path={out / 'labels.csv'} source.split_column=split"
