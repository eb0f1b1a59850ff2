"""Shows what a run looks at where it is wrong: Grad-CAM and occlusion for rows of the worst cells and for the most
confidently wrong ones, and an image of each class at its purest. The report shows the pictures."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from jobs.command import command

EXAMPLE = "python -m jobs.explain run=runs/balanced split=test"


class Explain(Settings):
    """Which run, and how much of it."""

    run: Path
    """Folder of the run, evaluated on the split."""
    split: str = "test"
    """Split whose rows are shown."""
    cells: NonNegativeInt = 2
    """Classes in groups that are shown, those of lowest recall."""
    per_cell: NonNegativeInt = 4
    """Wrong rows of each of them, the most probable decisions first."""
    confident: NonNegativeInt = 8
    """Rows whose most probable class is wrong, the most probable first."""
    window: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Side of the square that occlusion covers, as a share of the image's."""
    steps: NonNegativeInt = 64
    """Steps that optimise an image for each class; 0 makes none."""
    data: Path | None = None
    """Folder of the data set; by default the one the run was trained on."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the model runs."""


def run(settings: Explain) -> None:
    import torch

    from data_loaders.index import open_index
    from trainer.checkpoint import load_model
    from trainer.collect import add_images
    from trainer.context import device_for
    from trainer.explain.gallery import Look, pictures, save

    trained = load_model(settings.run / "model", device_for(settings.device))
    config = trained.config.model_copy(update={"folder": settings.run.resolve().parent})
    torch.set_num_threads(config.cluster.threads * config.cluster.most)
    index = open_index(settings.data) if settings.data else config.data.index()
    sections, facts = _chosen(settings, index)
    look = Look(max(round(settings.window * config.data.size), 1), settings.steps, config.seed)
    out = settings.run / "explain" / settings.split
    save(out, trained.model, index, config.data, sections, look, facts)
    print("\n".join(f"{section.title}: {len(section.rows)} rows" for section in sections))
    drawn = list(pictures(out))
    print(f"{len(drawn)} pictures in {out}")
    place, _ = add_images(config, f"explain/{settings.split}", drawn)
    if place:
        print(f"and in W&B: {place}")


def _chosen(settings: Explain, index: Any) -> tuple[list[Any], dict[str, Any]]:
    """The rows to show, from the evaluation of the split, and what that was made with."""
    import pyarrow.parquet

    from trainer.explain.choose import Cell, most_confident, worst_cells
    from trainer.report.page import read_run
    from trainer.report.tables import LEAST_N

    evaluation = settings.run / "evaluation" / settings.split
    fix = f"python -m jobs.evaluate run={settings.run} splits={settings.split}"
    subjects = [s for s in read_run(settings.run).subjects if (s.split, s.view) == (settings.split, "ledger")]
    if not subjects:
        raise Refusal("There is nothing to explain:", [Fault(str(evaluation), "does not exist", fix)], 65)
    made = json.loads((evaluation / "facts.json").read_bytes())
    if made["data"] != index.fingerprint:
        fault = Fault(str(evaluation), f"is of the data set {made['data']}, not {index.fingerprint}", fix)
        raise Refusal("The data set is not the one of the evaluation:", [fault], 65)
    found = subjects[0].cells() or [(label, "all", recall) for label, recall in subjects[0].recalls()]
    cells = [Cell(label, group, recall.value, recall.n) for label, group, recall in found if recall.n >= LEAST_N]
    cells.sort(key=lambda cell: cell.recall)
    table = pyarrow.parquet.read_table(evaluation / "predictions.parquet")
    sections = worst_cells(table, index.classes, index.group_values, cells, settings.cells, settings.per_cell)
    sections.append(most_confident(table, index.classes, settings.confident))
    facts = {name: made[name] for name in ("split", "data", "model")}
    return sections, facts | {"settings": settings.model_dump(mode="json")}


def main() -> None:
    command(lambda: Explain, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
