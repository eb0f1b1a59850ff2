"""Audits a data set for bias before a model learns it and, with a run, probes what its model has learnt."""

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, model_validator

from data_loaders.settings import Settings
from data_loaders.splits import TRAIN
from jobs.command import command

EXAMPLE = "python -m jobs.audit data=build/demo/data"


class Audit(Settings):
    """What to audit: a data set, a run, or both."""

    data: Path | None = None
    """Folder of the data set to audit."""
    run: Path | None = None
    """Folder of a run, whose model is probed, on this data set or else on the one it was trained on."""
    train: str | None = None
    """Split whose biases a model learns; by default that of the run, else `train`."""
    split: str = "test"
    """Split on which the model is probed."""
    rows: PositiveInt = 20_000
    """Images that are looked at, at most, by the audit and by the probes: the same number of each class that has it."""
    reference: Path | None = None
    """CSV or Parquet of the population that the training split is to stand for: columns `label` or group columns, and
    `share` or `count`."""
    unit: str = ""
    """What no two splits should share (patient, photographer): a group column, or a column of the CSV `units`."""
    units: Path | None = None
    """CSV with the ids of rows as `path`, and the column `unit`."""
    out: Path | None = None
    """Where the audit goes as JSON; by default audit.json in the folder of the data set, where a report finds it."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the model runs."""

    @model_validator(mode="after")
    def _has_a_subject(self) -> "Audit":
        if self.data is None and self.run is None:
            raise ValueError("there is nothing to audit: give data=…, run=… or both")
        asked = self.model_fields_set
        if self.data is None and asked & {"out", "train", "reference", "unit", "units"}:
            raise ValueError("train, reference, unit, units and out are of an audit of a data set: give data=… too")
        if self.units and not self.unit:
            raise ValueError("units is a CSV with a column of units: say which by unit=…")
        if self.run is None and asked & {"split", "device"}:
            raise ValueError("split and device are of the probes of a run: give run=… too")
        return self


def run(settings: Audit) -> None:
    from data_loaders.index import open_index

    if settings.run is None:
        _audit(settings, TRAIN)
        return
    from trainer.checkpoint import load_model
    from trainer.context import device_for
    from trainer.probe.probe import chosen, learnt, probe, save, summary

    trained = load_model(settings.run / "model", device_for(settings.device))
    index = open_index(settings.data) if settings.data else trained.config.data.index()
    rows = chosen(trained, index, settings.split, settings.rows)  # refuses what does not fit before the audit
    if settings.data:
        _audit(settings, trained.config.data.train)
    found = probe(trained, index, rows, learnt(trained, index, settings.rows))
    out = save(settings.run, index, settings.split, found)
    print(f"\n{summary(found)}\nprobes in {out}")


def _audit(settings: Audit, train: str) -> None:
    from data_loaders import durable
    from data_loaders.audit.audit import Asked, audit
    from data_loaders.audit.coverage import read_reference
    from data_loaders.audit.summary import summary, to_json
    from data_loaders.index import open_index

    data = settings.data or Path()
    out = durable.lasting(settings.out or data / "audit.json", "out")
    index = open_index(data)
    reference = read_reference(settings.reference, index) if settings.reference else None
    asked = Asked(reference, settings.unit, settings.units)
    found = audit(index, settings.train or train, settings.rows, asked)
    durable.write_json(out, to_json(found))
    print(f"{summary(found)}\naudit in {out}")


def main() -> None:
    command(lambda: Audit, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
