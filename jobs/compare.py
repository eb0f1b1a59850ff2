"""Compares runs: what each remedy did to each class and group, with intervals, harm included."""

from pathlib import Path

from pydantic import Field, field_validator

from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.compare runs=[runs/natural,runs/balanced] splits=[test]"


class Compare(Settings):
    """Which runs, on what, and where to."""

    runs: tuple[Path, ...] = Field(min_length=1)
    """Folders of evaluated runs; all others, and all ways of deciding, are set against a bare argmax of the first."""
    splits: tuple[str, ...] = ("test",)
    """Splits on which all of them were evaluated."""
    out: Path = Path("comparison.json")
    """Every effect with its intervals, a .json file."""

    @field_validator("out")
    @classmethod
    def _is_json(cls, out: Path) -> Path:
        if out.suffix != ".json":
            raise ValueError("the comparison must be a .json file")
        return out


def run(settings: Compare) -> None:
    from data_loaders import durable
    from data_loaders.audit.summary import plain
    from trainer.mitigation import remedies, summary

    durable.lasting(settings.out, "out")
    found = [remedy for split in settings.splits for remedy in remedies(settings.runs, split)]
    durable.write_json(settings.out, [plain(remedy) for remedy in found])
    print("\n\n".join(map(summary, found)))
    print(f"\ncomparison in {settings.out}")


def main() -> None:
    command(lambda: Compare, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
