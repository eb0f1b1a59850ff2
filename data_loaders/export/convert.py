"""A data set in another layout, and the cards that belong to it: all or nothing."""

from pathlib import Path

from data_loaders import durable
from data_loaders.contents.overview import overview, read
from data_loaders.export.about import About
from data_loaders.export.card import card, imbalances
from data_loaders.export.croissant import ARROW, PARQUET, Part, croissant
from data_loaders.export.kinds import AnyTarget
from data_loaders.export.parquet import HuggingFace
from data_loaders.export.target import Files, publishing
from data_loaders.manifest import SHARDS
from data_loaders.progress import Progress

CARD, CROISSANT = "README.md", "croissant.json"


def convert(data: Path, generation: int | None, to: AnyTarget, out: Path, about: About) -> Files:
    """Writes every row of a generation, each image checked, into a new folder `out`, and a card beside them.

    Raises Refusal: 73 where `out` exists already, 65 where a row is damaged; then nothing is left of it.
    """
    made, index = read(data, generation)
    found, told = overview(index, made), _named(about, data, made.generation)
    progress, done = Progress("convert", len(index.labels), "rows"), 0

    def more(rows: int) -> None:
        nonlocal done
        done += rows
        progress.show(done)

    with publishing(out) as aside:
        files = to.write(index, {split: index.rows_of(split) for split in index.splits}, aside, more)
        is_hub = isinstance(to, HuggingFace)
        counted = imbalances(index, found)
        (aside / CARD).write_text(card(told, found, made, index, counted, files if is_hub else None), encoding="utf-8")
        if is_hub:
            paths = [path for part in files.values() for path in part]
            parts = [Part(p, (aside / p).stat().st_size, durable.sha256(aside / p)) for p in paths]
            tree = croissant(told, found, index, parts, PARQUET, counted)
            durable.write_json(aside / CROISSANT, tree)
    return files


def write_cards(data: Path, generation: int | None, out: Path, about: About) -> None:
    """README.md and croissant.json of the data set as it is, into `out`: its own folder, or one to look at them."""
    made, index = read(data, generation)
    found, told = overview(index, made), _named(about, data, made.generation)
    shards = dict(zip((shard.name for shard in made.shards), made.shards, strict=True))
    files: Files = {}
    for split in index.splits:
        there = sorted(set(index.shard[index.rows_of(split)].tolist()))
        files[split] = [Path(SHARDS, index.shards[s]) for s in there]
    parts = [Part(p, shards[p.name].bytes, shards[p.name].sha256) for part in files.values() for p in part]
    counted = imbalances(index, found)
    durable.write(out / CARD, card(told, found, made, index, counted, files, index.side))
    durable.write_json(out / CROISSANT, croissant(told, found, index, parts, ARROW, counted))


def _named(about: About, data: Path, generation: int) -> About:
    """With a name and a version, where none is given."""
    given = {"name": about.name or data.resolve().name, "version": about.version or f"{generation}.0.0"}
    return about.model_copy(update=given)
