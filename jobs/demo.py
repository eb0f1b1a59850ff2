"""The whole way on the built-in images: ingest, audit, train twice with Ray on two workers, evaluate, probe, explain,
report.

The first model learns from rows as they come and decides by a bare argmax. The second draws every class equally often,
and its ledger brings the probabilities back to the natural prior, calibrates them and decides by cost.
"""

import shutil
import time
from pathlib import Path

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings, override, parse
from jobs.command import command

EXAMPLE = "python -m jobs.demo folder=build/demo"
CONFIGS = Path(__file__).parent / "configs"
SHOWN = "jobs/configs"
PARTS = {"images", "data", "runs", "report.html", "report.json"}


class Demo(Settings):
    """The demonstration."""

    folder: Path = Path("build/demo")
    """Where everything goes; what a former demonstration left there is removed."""


def run(settings: Demo) -> None:
    began = time.monotonic()
    from data_loaders.ingest import Ingest
    from jobs import audit, diagnose, evaluate, explain, ingest, report
    from trainer.config import Config
    from trainer.launch import cluster, train

    root, data = settings.folder, settings.folder / "data"
    _clear(root)
    _say(f"python -m jobs.ingest {SHOWN}/demo_data.yaml")
    words = [str(CONFIGS / "demo_data.yaml"), f"source.folder={root / 'images'}", f"out={data}"]
    ingest.run(parse(Ingest, words))
    _say(f"python -m jobs.audit data={data}")
    audit.run(audit.Audit(data=data))

    configs = [parse(Config, [str(CONFIGS / f"demo_{name}.yaml")]) for name in ("natural", "balanced")]
    configs = [override(config, {"folder": root / "runs", "data.path": data}) for config in configs]
    with cluster(configs[0].cluster):
        for config in configs:
            _say(f"python -m jobs.train {SHOWN}/demo_{config.name}.yaml")
            trained = train(config)
            print(f"W&B run in {trained.facts['tracked']}")
    splits = ("train", "test", "test_balanced")
    for config in configs:
        _say(f"python -m jobs.evaluate run={config.run_folder} splits=[{','.join(splits)}]")
        evaluate.evaluate_run(evaluate.Evaluate(run=config.run_folder, splits=splits, device="cpu"))
    balanced = configs[-1].run_folder
    _say(f"python -m jobs.audit run={balanced} split=test_balanced")
    audit.run(audit.Audit(run=balanced, split="test_balanced", device="cpu"))
    _say(f"python -m jobs.explain run={balanced} split=test_balanced")
    explain.run(explain.Explain(run=balanced, split="test_balanced", device="cpu"))
    _say(f"python -m jobs.diagnose run={balanced}")
    diagnose.run(diagnose.Diagnose(run=balanced))
    page = root / "report.html"
    runs = tuple(config.run_folder for config in configs)
    _say(f"python -m jobs.report runs=[{','.join(map(str, runs))}] out={page}")
    report.run(report.Report(runs=runs, out=page))
    _compare(*runs)
    print(f"\ndone in {time.monotonic() - began:.0f} s; open {page}")


def _clear(folder: Path) -> None:
    """Removes what a former demonstration left; refuses a folder that holds anything else."""
    strangers = [path for path in folder.glob("*") if path.name not in PARTS]
    if strangers:
        fix = "give another folder=…"
        raise Refusal(
            "Nothing was removed:", [Fault(str(path), "is not of a demonstration", fix) for path in strangers], 73
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _compare(natural: Path, balanced: Path) -> None:
    from trainer.report.page import read_run
    from trainer.report.tables import recall_gain, summary

    before = [s for s in read_run(natural).subjects if s.view == "argmax" and s.split != "train"]
    after = [s for s in read_run(balanced).subjects if s.view == "ledger" and s.split != "train"]
    pairs = list(zip(before, after, strict=True))
    print("\n" + summary([subject for pair in pairs for subject in pair]) + "\n")
    for old, new in pairs:
        low, high = recall_gain(old, new)
        change = new.worst_class()[1].value - old.worst_class()[1].value
        print(
            f"{new.split}: the recall of the worst class changes by {change:+.2f} [{low:+.2f}, {high:+.2f}], "
            f"the NLL in use by {new.nll() / old.nll() - 1:+.1%}"
        )


def _say(command_line: str) -> None:
    print(f"\n$ {command_line}", flush=True)


def main() -> None:
    command(lambda: Demo, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
