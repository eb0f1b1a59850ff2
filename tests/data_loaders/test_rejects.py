"""What rows are lost, and whether classes and groups lose alike."""

import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from data_loaders.faults import Refusal
from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.rejects import LEVEL, uneven
from data_loaders.settings import override
from data_loaders.sources.csv_file import Csv

Write = Callable[..., Path]


def test_a_loss_that_falls_on_one_class_is_found_and_named():
    dropped, kept = {("cat",): 9, ("dog",): 1}, {("cat",): 491, ("dog",): 4999}
    (found,) = uneven(dropped, kept, ())
    assert (found.attribute, found.value, found.dropped, found.rows) == ("label", "cat", 9, 500)
    assert found.p < 0.001


def test_the_p_value_is_that_of_fishers_exact_test():
    """For two values, the chi-squared statistic orders the tables as the distance from what is expected does."""
    for cats, dogs, rows in ((5, 0, 40), (6, 1, 60), (4, 1, 100)):
        dropped, kept = {("cat",): cats, ("dog",): dogs}, {("cat",): rows - cats, ("dog",): rows - dogs}
        exact: Any = stats.fisher_exact([[cats, rows - cats], [dogs, rows - dogs]])
        found = uneven(dropped, kept, ())
        assert bool(found) == (exact.pvalue < LEVEL)
        if found:
            assert found[0].p == pytest.approx(exact.pvalue, abs=3e-3)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_an_even_loss_is_refused_no_more_often_than_the_level_says(share):
    random = np.random.default_rng(0)
    sizes = {("cat", "home"): 900, ("cat", "street"): 50, ("dog", "home"): 30, ("dog", "street"): 1000}
    trials, found = 200, 0
    for _ in range(trials):
        dropped = {cell: int(random.binomial(n, share)) for cell, n in sizes.items()}
        found += bool(uneven(dropped, {cell: n - dropped[cell] for cell, n in sizes.items()}, ("venue",)))
    assert found <= stats.binom.ppf(0.999, trials, LEVEL)


def test_a_loss_by_group_and_one_by_cell_are_told_apart():
    cells = [(label, venue) for label in ("cat", "dog") for venue in ("home", "street")]
    by_group = {cell: 40 if cell[1] == "street" else 1 for cell in cells}
    by_cell = {cell: 40 if cell in {("cat", "home"), ("dog", "street")} else 1 for cell in cells}
    kept = dict.fromkeys(cells, 1000)
    assert {u.attribute for u in uneven(by_group, kept, ("venue",))} == {"venue", "label x venue"}
    assert {u.attribute for u in uneven(by_cell, kept, ("venue",))} == {"label x venue"}


def test_rows_whose_value_is_not_known_say_nothing_of_it():
    assert uneven({("(none)",): 50}, {("cat",): 100, ("dog",): 100}, ()) == []
    assert uneven({}, {("cat",): 100, ("dog",): 100}, ()) == []


def test_many_classes_take_little_memory():
    kept = {(f"class {k}",): 100 for k in range(20_000)}
    tracemalloc.start()
    assert uneven({("class 7",): 2}, kept, ()) != []
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def break_all_of(photos: Path, venue: str) -> Counter[str]:
    broken = Counter[str]()
    for line in photos.read_text().splitlines()[1:]:
        path, label, group, _ = line.split(",")
        if group == venue:
            (photos.parent / path).write_bytes(b"broken")
            broken[label] += 1
    return broken


def test_an_ingest_that_would_lose_one_group_is_refused_whatever_share_is_allowed(photos: Path, tmp_path: Path):
    broken = break_all_of(photos, "street")
    source = Csv(path=photos, group_columns=("venue",))
    settings = Ingest(source=source, out=tmp_path / "data", rejects={"allow": 0.9})  # type: ignore[arg-type]
    with pytest.raises(Refusal) as refusal:
        ingest(settings, in_processes(1))
    assert refusal.value.exit_code == 65
    assert "venue: 20 of 20 rows of 'street' are dropped, p = 0.0001" in str(refusal.value)
    assert not (tmp_path / "data/dataset.json").exists()
    assert (tmp_path / "data/rejected.csv").read_text().count("broken") == 0
    assert len((tmp_path / "data/rejected.csv").read_text().splitlines()) == 1 + broken.total()
    made = ingest(override(settings, {"rejects.uneven": "allow"}), in_processes(1))
    assert made.rejected.by_cell == ((("cat", "street"), broken["cat"]), (("dog", "street"), broken["dog"]))


def test_one_refusal_names_both_settings_that_would_drop_the_rows(photos: Path, tmp_path: Path):
    break_all_of(photos, "street")
    settings = Ingest(source=Csv(path=photos, group_columns=("venue",)), out=tmp_path / "data")
    with pytest.raises(Refusal, match=r"rejects.allow=0.5 with rejects.uneven=allow \(most are of venue 'street'\)"):
        ingest(settings, in_processes(1))
    whole = override(settings, {"rejects.allow": 0.5, "rejects.uneven": "allow"})
    assert ingest(whole, in_processes(1)).index.rows == 20


def test_a_list_of_which_no_image_is_found_is_asked_for_its_root(listing_csv: Write, tmp_path: Path):
    rows = [("path", "label"), *((f"{i}.png", "ab"[i % 2]) for i in range(20))]
    settings = Ingest(source=Csv(path=listing_csv(rows)), out=tmp_path / "data")
    with pytest.raises(Refusal, match=r"20 of 20 rows .*is source.root right\?") as refusal:
        ingest(settings, in_processes(1))
    assert {fault.fix for fault in refusal.value.faults} == {"correct the path, or remove the row"}


def test_a_million_bad_rows_are_counted_and_only_the_first_are_carried(listing_csv: Write, tmp_path: Path, capfd):
    """A thousand of them, here: enough for the cap."""
    rows = [("path", "label"), *((f"{i}.png", "") for i in range(1, 1500))]
    settings = Ingest(source=Csv(path=listing_csv(rows)), out=tmp_path / "data")
    with pytest.raises(Refusal) as refusal:
        ingest(settings, in_processes(1))
    assert str(refusal.value).endswith("… and 1,479 more")
    assert len((tmp_path / "data/rejected.csv").read_text().splitlines()) == 1500
    said = capfd.readouterr().err
    assert said.count("a bad row — ") == 1
    assert "labels.csv:2:2: no label" in said
