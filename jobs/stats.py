"""Measures the images of a split: mean and standard deviation of each channel, exactly, sizes, bytes and JPEG quality,
of all and of each class."""

from pathlib import Path

from pydantic import PositiveInt

from data_loaders.settings import Settings
from data_loaders.splits import TRAIN
from jobs.command import command

EXAMPLE = "python -m jobs.stats data=datasets/food size=224 out=stats.json"


class Stats(Settings):
    """Which images, and how they are seen."""

    data: Path
    """Folder of the data set."""
    generation: PositiveInt | None = None
    """By default the newest."""
    split: str = TRAIN
    """Split that is measured."""
    size: PositiveInt | None = None
    """Pixels in height and width of the centred square, as a model sees it, so that every image counts the same;
    without it, all pixels of all images."""
    out: Path | None = None
    """A .json file."""


def run(settings: Stats) -> None:
    from data_loaders import durable
    from data_loaders.contents.measures import measures, summary, to_json
    from data_loaders.index import open_index

    if settings.out:
        durable.lasting(settings.out, "out")
    found = measures(open_index(settings.data, settings.generation), settings.split, settings.size)
    print(summary(found))
    if settings.out:
        durable.write_json(settings.out, to_json(found))
        print(f"\nmeasures in {settings.out}")


def main() -> None:
    command(lambda: Stats, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
