"""A folder of images in one sub-folder for each class, alone or inside one for each split."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from data_loaders.faults import Fault, Refusal
from data_loaders.sources.archives import SPLITS
from data_loaders.sources.places import Place, Root, is_http, is_url, plain, shown, wrong_with
from data_loaders.sources.rows import IMAGE_SUFFIXES, Read, Rejected, Row, Source, SplitName
from data_loaders.sources.storage import CANNOT_LIST, image_reader, listed, walk


class Folder(Source):
    """Images at path/<class>/…, or at path/<split>/<class>/… when `splits` names the sub-folders; hidden files are left
    out."""

    kind: Literal["folder"] = "folder"
    path: Place
    """The folder; a path, or an URL (s3, gs)."""
    splits: tuple[SplitName, ...] = ()
    """Sub-folders that are splits (train, val, test); without them, splits are drawn."""

    @property
    def group_names(self) -> tuple[str, ...]:
        return ()

    def rows(self, labelled: bool = True) -> Iterator[Row | Rejected]:
        """Every image file below the folder; without labels when they are only to be predicted."""
        root = str(self.path)
        self._refuse_if_no_folder(root, labelled)
        for path, entry in walk(root):
            where, name = plain(f"{shown(root).rstrip('/')}/{path}"), plain(path)
            split, label = self._place(name.split("/")) if labelled else ("", "")
            row = Row(where, name, label, (), split)
            if name != path:
                what, fix = "its name is not UTF-8", "rename it"
            elif entry.is_folder:
                what, fix = "links to another folder", "copy the folder, or remove the link"
            elif os.path.splitext(path)[1].lower() not in IMAGE_SUFFIXES:
                what, fix = "is not a .jpg, .png or .webp file", "move it out of the folder"
            elif labelled and not label:
                what, fix = "lies in no folder of a class", "move it to <class>/, or set source.splits"
            else:
                yield row
                continue
            yield Rejected(row, Fault(where, what, fix))

    @contextmanager
    def reader(self) -> Iterator[Read]:
        """Reads the images by their paths; links that lead out of the folder are not followed."""
        read = image_reader(Root(str(self.path)))
        yield lambda row: read(row.id)

    def file_of(self, row: Row) -> str | None:
        """The image itself."""
        root = str(self.path)
        return None if is_url(root) else Root(root).file_of(row.id)

    def _refuse_if_no_folder(self, root: str, labelled: bool) -> None:
        wrong = wrong_with(root) or (CANNOT_LIST if is_http(root) else "")
        if not wrong and not is_url(root) and not os.path.isdir(root):
            wrong = "is not a folder"
        fix = "give the folder that holds a folder for each class"
        if not wrong and labelled and not self.splits:
            names = [e.name for e in listed(root) if e.is_folder and not e.name.startswith(".")]
            if names and set(names) <= SPLITS.keys():
                wrong, fix = f"holds {', '.join(names)}, and no classes", f"set source.splits=[{','.join(names)}]"
        if wrong:
            fault = Fault(plain(shown(root)), wrong, fix)
            raise Refusal("There is no folder of images:", [fault], 65)

    def _place(self, parts: list[str]) -> tuple[str, str]:
        """Split and class of a file; the class is empty where the file does not lie in one."""
        if not self.splits:
            return "", parts[0] if len(parts) > 1 else ""
        return (parts[0], parts[1]) if len(parts) > 2 and parts[0] in self.splits else ("", "")
