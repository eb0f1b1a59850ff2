"""Writes the cards of a data set: README.md, by which Hugging Face also reads its shards, and croissant.json. Counts,
imbalances and dropped rows are there by themselves; what only people know is asked for, and marked if not given."""

from pathlib import Path

from pydantic import PositiveInt

from data_loaders.export.about import About
from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.card data=datasets/food about.name=Food about.license=cc-by-4.0 'about.creator=Ada Lovelace'"


class Card(Settings):
    """Which data set, and what is known of it."""

    data: Path
    """Folder of the data set."""
    generation: PositiveInt | None = None
    """By default the newest."""
    out: Path | None = None
    """Folder for both cards; by default that of the data set, where their paths lead to the shards."""
    about: About = About()
    """What only people know."""


def run(settings: Card) -> None:
    from data_loaders import durable
    from data_loaders.export.convert import CARD, CROISSANT, write_cards

    out = durable.lasting(settings.out or settings.data, "out")
    write_cards(settings.data, settings.generation, out, settings.about)
    absent = [name for name, value in settings.about.model_dump().items() if not value]
    if absent:
        print(f"not given, and marked so: {', '.join(f'about.{name}' for name in absent)}")
    print(f"cards in {out / CARD} and {out / CROISSANT}")


def main() -> None:
    command(lambda: Card, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
