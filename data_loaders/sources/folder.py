"""A folder of images in one sub-folder for each class, alone or inside one for each split."""

from pathlib import Path
from typing import Literal

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from data_loaders.sources.rows import IMAGE_SUFFIXES, Listing, Row, inside


class Folder(Settings):
    """Images at path/<class>/…, or at path/<split>/<class>/… when `splits` names the sub-folders."""

    kind: Literal["folder"] = "folder"
    path: Path
    """The folder."""
    splits: tuple[str, ...] = ()
    """Sub-folders that are splits (train, val, test); without them, splits are drawn."""

    def listing(self, labelled: bool = True) -> Listing:
        """Every image file below the folder; without labels when they are only to be predicted."""
        if not self.path.is_dir():
            raise Refusal("There is no folder of images:", [Fault(str(self.path), "is not a folder")], 65)
        listing = Listing()
        for file in sorted(p for p in self.path.rglob("*") if p.is_file() and not _hidden(p.relative_to(self.path))):
            path = file.relative_to(self.path)
            split, label = self._place(path.parts) if labelled else ("", "")
            row = Row(str(file), str(file.resolve()), str(path), label, (), split)
            if inside(self.path, str(path)) is None:
                listing.reject(row, str(file), "links to a file outside of the folder", "copy the file into the folder")
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


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
