"""Shows what is in a data set: generations, rows by split, class and group with the smallest cell first, images,
dropped rows and, on a page, sample pictures of each class and group."""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt, field_validator

from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.inspect data=datasets/food out=food.html"


class Inspect(Settings):
    """Which data set, and where to."""

    data: Path
    """Folder of the data set."""
    generation: PositiveInt | None = None
    """By default the newest."""
    train: str | None = None
    """Split that sizes are of, and that says which cell is the smallest; by default `train`."""
    out: Path | None = None
    """A .html page, or the same in .json; without it, all is printed only."""
    cells: PositiveInt = 60
    """Classes in groups of which the page shows samples, at most, the smallest first."""
    per_cell: PositiveInt = 6
    """Samples of each of them."""
    seed: NonNegativeInt = 0
    """Of the draw of samples."""

    @field_validator("out")
    @classmethod
    def _is_a_page(cls, out: Path | None) -> Path | None:
        if out is not None and out.suffix not in {".html", ".json"}:
            raise ValueError("the overview must be a .html or a .json file")
        return out


def run(settings: Inspect) -> None:
    from data_loaders import durable
    from data_loaders.contents.overview import overview, read, summary, to_json

    if settings.out:
        durable.lasting(settings.out, "out")
    made, index = read(settings.data, settings.generation)
    found = overview(index, made, settings.train)
    print(summary(found))
    if settings.out and settings.out.suffix == ".json":
        durable.write_json(settings.out, to_json(found))
    elif settings.out:
        from data_loaders.contents.page import write

        drawn = write(found, index, settings.out, settings.cells, settings.per_cell, settings.seed)
        print(f"\n{drawn:,} pictures")
    if settings.out:
        print(f"overview in {settings.out}")


def main() -> None:
    command(lambda: Inspect, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
