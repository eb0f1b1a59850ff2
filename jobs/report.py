"""Writes one self-contained HTML page of evaluated runs, worst group first, and the JSON behind it."""

from pathlib import Path

from pydantic import Field, field_validator

from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.report runs=[runs/natural,runs/balanced] out=report.html"


class Report(Settings):
    """Which runs, and where to."""

    runs: tuple[Path, ...] = Field(min_length=1)
    """Folders of evaluated runs."""
    out: Path = Path("report.html")
    """The page, a .html file; its JSON lies beside it."""

    @field_validator("out")
    @classmethod
    def _is_a_page(cls, out: Path) -> Path:
        if out.suffix != ".html":
            raise ValueError("the page must be a .html file")
        return out


def run(settings: Report) -> None:
    from data_loaders import durable
    from data_loaders.audit.summary import plain
    from trainer.diagnosis import diagnose, gather
    from trainer.mitigation import common, remedies
    from trainer.report.page import read_whole, write

    durable.lasting(settings.out, "out")
    verdicts = [plain(diagnose(*gather(folder))) for folder in settings.runs]
    runs = [read_whole(f)._replace(diagnosis=v) for f, v in zip(settings.runs, verdicts, strict=True)]
    found = [plain(remedy) for split in common(settings.runs) for remedy in remedies(settings.runs, split)]
    write(runs, settings.out, found)
    print(f"report in {settings.out}, its data in {settings.out.with_suffix('.json')}")


def main() -> None:
    command(lambda: Report, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
