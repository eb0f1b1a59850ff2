"""A folder of images in one sub-folder for each class, alone or inside one for each split."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from data_loaders.sources.rows import IMAGE_SUFFIXES, Listing, Row, SplitName, inside


class Folder(Settings):
    """Images at path/<class>/…, or at path/<split>/<class>/… when `splits` names the sub-folders; hidden files are left
    out."""

    kind: Literal["folder"] = "folder"
    path: Path
    """The folder."""
    splits: tuple[SplitName, ...] = ()
    """Sub-folders that are splits (train, val, test); without them, splits are drawn."""

    def listing(self, labelled: bool = True) -> Listing:
        """Every image file below the folder; without labels when they are only to be predicted."""
        if not self.path.is_dir():
            raise Refusal("There is no folder of images:", [Fault(str(self.path), "is not a folder")], 65)
        listing = Listing()
        for file in sorted(_files(self.path)):
            path = file.relative_to(self.path)
            split, label = self._place(path.parts) if labelled else ("", "")
            target = inside(self.path, str(path))
            row = Row(_text(file), str(target or ""), _text(path), _text(label), (), split)
            if _text(file) != str(file):
                listing.reject(row, row.where, "its name is not UTF-8", "rename it")
            elif target is None:
                listing.reject(row, str(file), "links to a file outside of the folder", "copy the file into the folder")
            elif file.is_dir():
                listing.reject(row, str(file), "links to another folder", "copy the folder, or remove the link")
            elif file.suffix.lower() not in IMAGE_SUFFIXES:
                listing.reject(row, str(file), "is not a .jpg, .png or .webp file", "move it out of the folder")
            elif labelled and not label:
                listing.reject(
                    row, str(file), "lies in no folder of a class", "move it to <class>/, or set source.splits"
                )
            else:
                listing.rows.append(row)
        return listing

    def _place(self, parts: tuple[str, ...]) -> tuple[str, str]:
        """Split and class of a file; the class is empty where the file does not lie in one."""
        if not self.splits:
            return "", parts[0] if len(parts) > 1 else ""
        return (parts[0], parts[1]) if len(parts) > 2 and parts[0] in self.splits else ("", "")


def _files(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder itself; links to folders, which are not followed, too."""

    def refuse(wrong: OSError) -> None:
        fault = Fault(str(wrong.filename), f"cannot be listed: {(wrong.strerror or str(wrong)).lower()}")
        raise Refusal("The folder of images cannot be read:", [fault], 65) from wrong

    for parent, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in (*files, *links) if not name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]


def _text(name: Path | str) -> str:
    """A name that can be written down: bytes that are not UTF-8 become backslash escapes."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
