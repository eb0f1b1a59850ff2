"""Says which bias a run has, with evidence and remedies: gathers what audits, probes and evaluations have found."""

from pathlib import Path

from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.diagnose run=runs/balanced"


class Diagnose(Settings):
    """Which run; it must be evaluated, and is told more of where it was audited and probed too."""

    run: Path
    """Folder of the run; the diagnosis goes there as diagnosis.json; a report makes its own."""


def run(settings: Diagnose) -> None:
    from data_loaders import durable
    from data_loaders.audit.summary import plain
    from trainer.diagnosis import DIAGNOSIS, diagnose, gather, summary
    from trainer.report.page import weights_of

    verdicts = diagnose(*gather(settings.run))
    out = settings.run / DIAGNOSIS
    durable.write_json(out, {"model": durable.sha256(weights_of(settings.run)), "verdicts": plain(verdicts)})
    print(f"{summary(verdicts)}\ndiagnosis in {out}")


def main() -> None:
    command(lambda: Diagnose, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
