"""docs/coverage.md names a setting or command and a test for each technique and metric of the two source documents."""

import ast
import re
from pathlib import Path

import pytest

from data_loaders.ingest import Ingest
from data_loaders.settings import Settings, variants
from jobs.audit import Audit
from jobs.compare import Compare
from jobs.diagnose import Diagnose
from jobs.evaluate import Evaluate
from jobs.explain import Explain
from jobs.learning_curve import LearningCurve
from jobs.predict import Predict
from trainer.space import Tuning

ROOT = Path(__file__).parent.parent
ROWS = [line for line in (ROOT / "docs" / "coverage.md").read_text().splitlines() if line.startswith("| ")]
CELLS = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in ROWS if not row.startswith(("| what", "|-"))]


def paths(kind: type[Settings], prefix: str = "") -> set[str]:
    """Every dotted path of a tree of settings, through all its variants."""
    found = set()
    for name, field in kind.model_fields.items():
        found.add(prefix + name)
        for choice in variants(field.annotation):
            found |= paths(choice, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("cells", CELLS, ids=lambda cells: cells[0][:60])
def test_every_row_names_a_test_that_exists(cells):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cells[-1])
    assert named
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


def test_every_setting_and_job_that_is_named_exists():
    of_jobs = {"ingest": Ingest, "tune": Tuning, "audit": Audit, "evaluate": Evaluate, "explain": Explain}
    of_jobs |= {"predict": Predict, "diagnose": Diagnose, "compare": Compare, "learning_curve": LearningCurve}
    for code in re.findall(r"`([^`]+)`", " ".join(cells[1] for cells in CELLS)):
        job = re.search(r"python -m jobs\.(\w+)", code)
        known = paths(of_jobs[job[1]] if job else Tuning)
        for path in re.findall(r"(?<![\w./])((?:\w+\.)*\w+)=", code):
            assert path in known, code


def test_both_documents_are_served():
    text = (ROOT / "docs" / "coverage.md").read_text().lower()
    named = ["rotation", "flipping", "cropping", "zooming", "xavier", "he initialisation", "l1", "l2", "dropout"]
    named += ["precision", "recall", "f1", "disparate impact", "equal opportunity difference", "heatmaps"]
    named += ["activation maximization", "spatial bias", "feature bias", "class imbalance", "selection bias"]
    named += ["underfitting", "overfitting", "inductive bias", "oversampling", "undersampling", "ensemble", "csv"]
    named += ["calibrated", "proper scoring", "costs", "normali", "resiz", "learning rate", "batch size", "epochs"]
    assert [name for name in named if name not in text] == []
