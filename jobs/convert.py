"""Converts a data set: to Parquet files as the Hugging Face hub has them, to WebDataset tars or to a folder of images.
Every image is checked on the way; the new folder appears when it is whole."""

from pathlib import Path

from pydantic import PositiveInt

from data_loaders.export.about import About
from data_loaders.export.kinds import AnyTarget
from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.convert data=datasets/food out=food_parquet to.kind=huggingface about.license=cc-by-4.0"


class Convert(Settings):
    """Which data set, to what, and where to."""

    data: Path
    """Folder of the data set."""
    out: Path
    """Folder to make; must not exist yet."""
    to: AnyTarget
    """What to make of it."""
    generation: PositiveInt | None = None
    """By default the newest."""
    about: About = About()
    """For the card."""


def run(settings: Convert) -> None:
    from data_loaders import durable, manifest
    from data_loaders.export.convert import convert

    out = durable.lasting(settings.out, "out")
    files = convert(settings.data, settings.generation, settings.to, out, settings.about)
    for split, paths in files.items():
        print(f"{split}: {paths[0]}" + (f" … {paths[-1].name}" if len(paths) > 1 else ""))
    print(f"converted in {settings.out}, with a card in README.md")
    columns = ",".join(manifest.read(settings.data, settings.generation).groups)
    groups = f" source.group_columns=[{columns}]" if columns else ""
    print(f"to ingest it: python -m jobs.ingest {settings.to.source(settings.out)}{groups} out=…")


def main() -> None:
    command(lambda: Convert, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
