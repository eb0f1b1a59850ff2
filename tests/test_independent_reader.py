"""That docs/format.md suffices to read a data set: the reader made from it reads what ours reads."""

import ast
import shutil
from pathlib import Path

import pytest

from benchmarks.corruption import ROWS, make, ours
from data_loaders import manifest
from tests import independent_reader
from tests.independent_reader import rows


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown") / "data"
    make(folder, "a")
    return folder


def test_it_shares_no_code_with_the_project():
    tree = ast.parse(Path(independent_reader.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names}.isdisjoint({"data_loaders", "trainer", "jobs", "benchmarks", "tests"})


def test_it_reads_row_for_row_what_ours_reads(dataset: Path):
    assert list(rows(dataset)) == list(ours(dataset, None, None))
    assert len(list(rows(dataset))) == 154


@pytest.mark.parametrize("generation", [None, 1, 2])
def test_it_reads_every_generation(grown: Path, generation):
    read = list(rows(grown, generation))
    assert read == list(ours(grown, generation, None))
    assert len(read) == ROWS[0 if generation == 1 else 1]
    assert {row.groups["venue"] for row in read} == {"home", "street", "café"}


def test_a_generation_that_is_not_there_is_refused(grown: Path):
    with pytest.raises(ValueError, match="no generation 3"):
        next(rows(grown, 3))


def test_damage_is_refused(grown: Path, tmp_path: Path):
    folder = shutil.copytree(grown, tmp_path / "copy")
    truth = list(rows(folder))
    shard = folder / "shards" / manifest.read(folder).shards[-1].name
    content = bytearray(shard.read_bytes())
    content[content.index(truth[-1].image) + 5] ^= 1
    shard.write_bytes(content)
    seen = []
    with pytest.raises(ValueError, match=f"{shard.name}: row '{truth[-1].id}' is damaged"):
        seen.extend(rows(folder))
    assert seen == truth[:-1]
