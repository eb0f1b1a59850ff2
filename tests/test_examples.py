"""Scripts that others wrote, before and after: few lines change, and both run to their end."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_loaders.export.about import About
from data_loaders.export.convert import convert
from data_loaders.export.folder import Folder

ROOT = Path(__file__).parent.parent
SMALL = ("--epochs=1", "--steps=3", "--batch=8", "--size=32", "--workers=0")


@pytest.fixture(scope="module")
def images(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files."""
    out = tmp_path_factory.mktemp("folder") / "out"
    convert(dataset, None, Folder(), out, About())
    return out / "images"


@pytest.mark.parametrize("name", ["torchvision", "timm", "lightning"])
def test_a_script_of_others_takes_our_data_with_ten_lines_changed_at_most(name):
    before, after = ((ROOT / "examples" / f"{name}_{when}.py").read_text().splitlines() for when in ("before", "after"))
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert len(changed) <= 10, changed
    assert any("BalancedSampler(train)" in line for line in changed)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision", "epoch 0: recall of dessert "),
        ("timm", "epoch 0: recall of dessert "),
        ("lightning", "after 3 steps: loss "),
    ],
)
def test_it_runs_to_its_end_before_and_after(dataset: Path, images: Path, tmp_path: Path, name, said, when):
    data = images if when == "before" else dataset
    line = [sys.executable, str(ROOT / "examples" / f"{name}_{when}.py"), str(data), *SMALL]
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        line, env=os.environ | offline, cwd=tmp_path, check=False, capture_output=True, text=True
    )  # in a process of its own: these libraries warn
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert list(tmp_path.iterdir()) == []
