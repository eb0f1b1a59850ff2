"""The data sets of torchvision, once they are on the disk: nothing is ever downloaded."""

import inspect
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import nearest
from data_loaders.sources.places import Place, Root, plain
from data_loaders.sources.rows import Read, Rejected, Row, Source, SplitName, Unreadable
from data_loaders.sources.storage import image_reader

OURS = {"root", "download", "transform", "target_transform", "transforms", "loader", "is_valid_file"}
"""Arguments of a data set that are not for the user."""


class Torchvision(Source):
    """A data set of torchvision (CIFAR10, Food101, ImageFolder, …) that is on the disk already."""

    kind: Literal["torchvision"] = "torchvision"
    name: str
    """Its class in torchvision.datasets."""
    root: Place = "."
    """The folder that torchvision is told to look in."""
    arguments: dict[str, str] = Field(default_factory=dict)
    """Further arguments of the class: `source.arguments.train=true`, `source.arguments.split=train`."""
    held_out: dict[SplitName, dict[str, str]] = Field(default_factory=dict)
    """Further parts, each a split of its own, by what is different: `source.held_out.test.train=false`."""

    @property
    def group_names(self) -> tuple[str, ...]:
        return ()

    def rows(self, labelled: bool = True) -> Iterator[Row | Rejected]:
        """Every image; none is decoded where the data set knows its targets without."""
        for number, (split, data) in enumerate(self._parts()):
            classes = _class_names(data)
            files = _files(data)
            for index, target in enumerate(_targets(data) if labelled else [""] * len(data)):
                image = self._id(split, index, files)
                where, label = f"{self.name}:{image}", _label(target, classes)
                row = Row(where, image, label, (), split if labelled else "", "", (number, index, 0))
                if labelled and not label:
                    fault = Fault(
                        where, f"its target is no class: {str(target)[:100]!r}", "use a set for classification"
                    )
                    yield Rejected(row, fault)
                else:
                    yield row

    @contextmanager
    def reader(self) -> Iterator[Read]:
        """Reads files as they are; images that are no files of their own become PNG, which loses nothing."""
        parts = [(data, _files(data)) for _, data in self._parts()]
        read_file = image_reader(Root(str(self.root)))

        def read(row: Row) -> bytes:
            data, files = parts[row.place[0]]
            if files:
                within = os.path.relpath(files[row.place[1]], str(self.root))
                return read_file(within)
            return _png(data, row.place[1])

        yield read

    def _id(self, split: str, index: int, files: Sequence[str]) -> str:
        if files:
            name = Root(str(self.root)).id_of(os.path.abspath(files[index]))
            if name is not None:
                return plain(name)
        return f"{self.name}/{split}/{index}" if split else f"{self.name}/{index}"

    def _parts(self) -> list[tuple[str, Any]]:
        """Split and data set of every part. Raises Refusal where one cannot be had."""
        faults: list[Fault] = []
        found: list[tuple[str, Any]] = []
        kind = self._class()
        for split, changes in {"": {}, **self.held_out}.items():
            given = {**self.arguments, **changes}
            where = f"source.held_out.{split}" if split else "source.arguments"
            known = [name for name in inspect.signature(kind).parameters if name not in OURS | {"self"}]
            wrong = [name for name in given if name not in known]
            faults += [
                Fault(f"{where}.{name}", f"{self.name} has no such argument", nearest(name, known)) for name in wrong
            ]
            if not wrong:
                try:
                    found.append((split, self._make(kind, given)))
                except Exception as error:  # each data set has its own
                    said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                    fix = f"put the files of {self.name} where torchvision looks for them, below source.root"
                    faults.append(Fault(f"{where} ({self.root})", f"{self.name} cannot be used: {said}", fix))
        if faults:
            raise Refusal("The data set of torchvision cannot be used:", faults, 65)
        return found

    def _class(self) -> Any:
        from torchvision import datasets

        found = {name: getattr(datasets, name) for name in datasets.__all__}
        known = [
            name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, datasets.VisionDataset)
        ]
        if self.name not in known:
            fault = Fault("source.name", f"torchvision has no data set {self.name!r}", _nearest(self.name, known))
            raise Refusal("The data set of torchvision cannot be used:", [fault])
        return found[self.name]

    def _make(self, kind: Any, given: dict[str, str]) -> Any:
        parameters = inspect.signature(kind).parameters
        fixed = {"root": str(self.root), "download": False}
        values = {name: _value(text, parameters[name].annotation) for name, text in given.items()}
        return kind(**{name: value for name, value in fixed.items() if name in parameters}, **values)


def _nearest(name: str, known: list[str]) -> str:
    alike = [other for other in known if other.lower() == name.lower()]
    return nearest(alike[0], alike) if alike else nearest(name, known)


def _value(text: str, annotation: Any) -> Any:
    """A number, true, false or a list where the text spells one and no text is wanted."""
    if annotation is str:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _files(data: Any) -> Sequence[str]:
    """The file of each image; empty where the data set does not say, or an image is only a part of one."""
    samples = getattr(data, "samples", None)
    if (
        isinstance(samples, list)
        and len(samples) == len(data)
        and all(isinstance(s[0], str | os.PathLike) for s in samples)
    ):
        return [str(sample[0]) for sample in samples]
    files = getattr(data, "_image_files", None)
    return list(map(str, files)) if isinstance(files, list) and len(files) == len(data) else []


def _targets(data: Any) -> Iterator[Any]:
    for name in ("targets", "labels", "_labels"):
        known = getattr(data, name, None)
        if known is not None and not callable(known) and len(known) == len(data):
            yield from known.tolist() if hasattr(known, "tolist") else known
            return
    for index in range(len(data)):
        yield data[index][1]


def _class_names(data: Any) -> Sequence[Any]:
    for name in ("classes", "categories"):
        known = getattr(data, name, None)
        if isinstance(known, list | tuple):
            return known
    return ()


def _label(target: Any, classes: Sequence[Any]) -> str:
    value = target.item() if hasattr(target, "item") else target
    if isinstance(value, int) and 0 <= value < len(classes):
        value = classes[value]
    if isinstance(value, tuple) and all(isinstance(word, str) for word in value):
        value = ", ".join(value)  # ImageNet has two classes that are called crane, and differ in their second word
    return str(value).strip() if isinstance(value, str | int) else ""


def _png(data: Any, index: int) -> bytes:
    from PIL import Image

    try:
        image = data[index][0]
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        content = io.BytesIO()
        image = image if image.mode in {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"} else image.convert("RGB")
        image.save(content, "png", compress_level=1)
    except Exception as wrong:  # each data set has its own
        raise Unreadable((str(wrong) or type(wrong).__name__)[:300]) from wrong
    return content.getvalue()
