"""Searches regularisation, dropout and whatever else is asked, with Ray Tune over Ray Train; trains the winner anew,
and evaluates it on splits that the search never saw. The same words go on with a search that was interrupted."""

from typing import TYPE_CHECKING

from jobs.command import command

if TYPE_CHECKING:
    from trainer.space import Tuning

EXAMPLE = "python -m jobs.tune jobs/configs/demo_tune.yaml search.trials=12"


def settings() -> "type[Tuning]":
    from trainer.space import Tuning

    return Tuning


def run(tuning: "Tuning") -> None:
    import pyarrow.parquet

    from jobs import evaluate
    from trainer.search import search

    found = search(tuning)
    table = pyarrow.parquet.read_table(found.table)
    judged = {"min": "ascending", "max": "descending"}[tuning.search.mode]
    shown = ["trial", "state", "step", "objective", *tuning.search.ranges]
    print(as_text(table.sort_by([("objective", judged)]).select(shown).to_pylist()))
    run_folder, data = found.config.run_folder, found.config.data
    unseen = [name for name in data.index().splits if name not in (data.train, data.validation)]
    if unseen:
        evaluate.run(evaluate.Evaluate(run=run_folder, splits=tuple(unseen)))
    else:
        print("take care: the data has no split that the search did not see")
    print(f"trials in {found.table}")
    print(f"winner, {found.trial.name}, in {run_folder}")


def as_text(lines: list[dict[str, object]]) -> str:
    """A table for the terminal."""
    cells = [list(lines[0]), *([_short(value) for value in line.values()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _short(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    command(settings, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
