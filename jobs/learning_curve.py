"""Trains on growing shares of the training rows, and says for each class whether more data or more capacity would help.
The same words go on with what was interrupted."""

from typing import Annotated

from pydantic import Field, PositiveInt

from jobs.command import command
from trainer.config import Config

EXAMPLE = "python -m jobs.learning_curve jobs/configs/demo_natural.yaml name=curve points=4"


class LearningCurve(Config):
    """The settings of a training, for all of its runs."""

    points: Annotated[int, Field(ge=3)] = 4
    """Shares of the training rows: all, a half, a quarter and so on; each is a part of the next, with every class."""
    repeats: PositiveInt = 1
    """Runs of each share, each with a seed of its own; with one, intervals leave out the chance of training."""

    def runs(self, steps: int) -> list[Config]:
        """In the folder of the curve; all have as many steps, so that they differ in nothing but their rows."""
        same = {name: getattr(self, name) for name in Config.model_fields}
        same |= {"folder": self.run_folder, "train": self.train.model_copy(update={"steps": steps})}
        return [
            Config(**same | {"name": f"1-of-{part}-{n}", "data": data, "seed": self.seed * self.repeats + n})
            for part in (2**k for k in reversed(range(self.points)))
            for data in [self.data.model_copy(update={"fraction": self.data.fraction / part})]
            for n in range(self.repeats)
        ]


def run(curve: LearningCurve) -> None:
    from data_loaders import durable
    from data_loaders.audit.summary import plain
    from trainer.probe.learning_curve import Run, findings, learning_curves, of_several, summary, wrong_of
    from trainer.run import untrained

    if curve.cluster.on == "ray":
        from trainer.launch import train
    else:
        from trainer.run import train

    curve = curve.model_copy(update={"data": curve.data.pinned()})
    index = curve.data.index()
    rows = curve.data.training_rows(index)
    configs = curve.runs(curve.train.total(len(rows), curve.data.batch))
    for config in untrained(configs):
        train(config)
    unseen = index.rows_of(curve.data.validation)
    runs = [Run(config.data.fraction, wrong_of(config.run_folder, index, unseen)) for config in configs]
    learnt = index.labels_of(rows), wrong_of(configs[-1].run_folder, index, rows)
    found = learning_curves(runs, index.labels_of(unseen), learnt, index.classes)
    told = list(findings(found))
    tree = {"data": index.fingerprint, "curves": plain(found), "findings": plain(told)}
    durable.write_json(curve.run_folder / "learning_curve.json", tree)
    print(summary(found), *(f"- {finding.text}" for finding in told), sep="\n")
    if not of_several(runs):
        print("take care: with one run for each share, intervals leave out the chance of training; repeats=3 has it in")
    print(f"curves in {curve.run_folder / 'learning_curve.json'}")


def main() -> None:
    command(lambda: LearningCurve, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
