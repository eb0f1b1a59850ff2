"""Predicts new images, from a folder or a CSV, with a trained model: probabilities, decision and its expected cost."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.folder import Folder
from jobs.command import command
from trainer.decision.ledger import Decision

EXAMPLE = "python -m jobs.predict run=runs/balanced source.kind=folder source.path=photos out=predictions.csv"


class Predict(Settings):
    """Which model, which images, and where to."""

    run: Path
    """Folder of the run."""
    source: Annotated[Csv | Folder, Field(discriminator="kind")]
    """The images; labels are not needed, and not read."""
    out: Path = Path("predictions.parquet")
    """A .parquet or .csv file."""
    decision: Decision | None = None
    """Another prior of use, or other costs, than the model was trained with; what is not given stays as it was."""

    @field_validator("out")
    @classmethod
    def _is_a_table(cls, out: Path) -> Path:
        if out.suffix not in {".parquet", ".csv"}:
            raise ValueError("predictions go to a .parquet or a .csv file")
        return out

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the model runs."""


def run(settings: Predict) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    from data_loaders import durable
    from data_loaders.progress import Progress
    from data_loaders.rejects import write_rejected
    from data_loaders.sources.rows import Rejected, Row
    from trainer.checkpoint import load_model
    from trainer.context import device_for
    from trainer.predict import predict

    durable.lasting(settings.out, "out")
    trained = load_model(settings.run / "model", device_for(settings.device))
    asked = settings.decision.model_fields_set if settings.decision else set()
    given = {name: getattr(settings.decision, name) for name in asked}
    ledger = trained.ledger.under(trained.config.decision.model_copy(update=given))
    listed = list(settings.source.rows(labelled=False))
    rows, rejected = [r for r in listed if isinstance(r, Row)], [r for r in listed if isinstance(r, Rejected)]
    progress, tables, done = Progress("predict", len(rows), "images"), [], 0
    for table, bad in predict(trained, ledger, settings.source, rows):
        tables.append(table)
        rejected += bad
        done += len(table) + len(bad)
        progress.show(done)
    if not any(map(len, tables)):
        nothing = Fault(str(settings.source.path), "holds no image", "it takes .jpg, .png and .webp files")
        raise Refusal("There is nothing to predict:", [r.fault for r in rejected] or [nothing], 65)
    with durable.writing(settings.out) as aside:
        save = pyarrow.csv.write_csv if settings.out.suffix == ".csv" else pyarrow.parquet.write_table
        save(pa.concat_tables(tables), aside)
    print(f"{sum(map(len, tables)):,} predictions in {settings.out}")
    if rejected:
        path = settings.out.with_suffix(".rejected.csv")
        write_rejected(path, rejected)
        print(f"{len(rejected):,} images could not be used: see {path}")


def main() -> None:
    command(lambda: Predict, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
