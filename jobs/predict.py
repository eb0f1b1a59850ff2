"""Predicts new images, from a folder or a CSV, with a trained model: probabilities, decision and its expected cost."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.folder import Folder
from jobs.command import command
from trainer.decision.conformal import Conformal
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
    estimate_prior: Literal["em", "bbse"] | None = None
    """Estimates the prior of use from these very images, if only that differs from the validation rows (label shift):
    em takes the likeliest prior (Saerens et al. 2002), bbse inverts the confusion (Lipton et al. 2018). The estimate is
    printed with its interval, and lies beside the predictions as JSON."""
    conformal: Conformal | None = None
    """Adds a column `set`: the classes that the image may be of, so that the true one is missing from at most alpha of
    the sets. With `by=group`, the source needs the run's group columns."""

    equalise: Literal["recall", "selection_rate", "cost"] | None = None
    """Thresholds of each group's own, fitted on the validation rows: as even a recall (equal opportunity) or selection
    rate (demographic parity) in all groups, or the least cost in each. The source needs the run's group columns. It
    uses the group to decide, which in some places and uses is unlawful, in others asked for: know which."""

    @field_validator("out")
    @classmethod
    def _is_a_table(cls, out: Path) -> Path:
        if out.suffix not in {".parquet", ".csv"}:
            raise ValueError("predictions go to a .parquet or a .csv file")
        return out

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the model runs."""

    def faults(self) -> list[Fault]:
        given = self.decision is not None and "prior" in self.decision.model_fields_set
        both = Fault("decision.prior", "is given, and is to be estimated", "leave out decision.prior or estimate_prior")
        return [both] * (given and self.estimate_prior is not None)


def run(settings: Predict) -> None:
    import json

    import pyarrow as pa

    from data_loaders import durable
    from data_loaders.rejects import write_rejected
    from data_loaders.sources.rows import Rejected, Row
    from trainer.checkpoint import load_model
    from trainer.context import device_for
    from trainer.predict import predict, save

    durable.lasting(settings.out, "out")
    trained = load_model(settings.run / "model", device_for(settings.device))
    groups = json.loads((settings.run / "model" / "facts.json").read_bytes())["groups"]
    asked = settings.decision.model_fields_set if settings.decision else set()
    given = {name: getattr(settings.decision, name) for name in asked}
    decision = trained.config.decision.model_copy(update=given)
    listed = list(settings.source.rows(labelled=False))
    rows, rejected = [r for r in listed if isinstance(r, Row)], [r for r in listed if isinstance(r, Rejected)]
    found = predict(
        trained, groups, decision, settings.source, rows, settings.estimate_prior, settings.conformal, settings.equalise
    )
    print("\n".join(found.lines), end="\n" if found.lines else "")
    tables = []
    for table, bad in found.tables:
        tables.append(table)
        rejected += bad
    if not any(map(len, tables)):
        nothing = Fault(str(settings.source.path), "holds no image", "it takes .jpg, .png and .webp files")
        raise Refusal("There is nothing to predict:", [r.fault for r in rejected] or [nothing], 65)
    save(pa.concat_tables(tables), settings.out)
    print(f"{sum(map(len, tables)):,} predictions in {settings.out}")
    if found.estimate:
        durable.write_json(settings.out.with_suffix(".prior.json"), found.estimate.to_json())
    if rejected:
        path = settings.out.with_suffix(".rejected.csv")
        write_rejected(path, rejected)
        print(f"{len(rejected):,} images could not be used: see {path}")


def main() -> None:
    command(lambda: Predict, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
